"""Stanzas (RFC 6120 8): messages, presences and IQs as they pass through the server.

A stanza is kept as *neutral* bytes: UTF-8 XML in which the stanza's own namespace is the default one and is not
declared. Such bytes can be written to any client stream and to any server stream (whose default namespace is the
content namespace there), kept in the database, and sent between nodes. The lxml element is made when somebody looks
inside.
"""

import re
from collections.abc import Iterator, Mapping
from typing import ClassVar, Final
from xml.sax.saxutils import escape, quoteattr

from lxml import etree
from lxml.etree import _Element

from xmppd.errors import StanzaError, StreamError
from xmppd.protocol import ns
from xmppd.protocol.jid import JID, parse
from xmppd.protocol.libxml import read_neutral

MESSAGE: Final = f"{{{ns.CLIENT}}}message"
PRESENCE: Final = f"{{{ns.CLIENT}}}presence"
IQ: Final = f"{{{ns.CLIENT}}}iq"
_BODY: Final = f"{{{ns.CLIENT}}}body"
# The type of a stanza without the attribute (RFC 6121 5.2.2, 4.7.1).
DEFAULT_TYPES: Final[dict[str, str]] = {"message": "normal", "presence": "available", "iq": ""}
KINDS: Final[dict[str, str]] = {MESSAGE: "message", PRESENCE: "presence", IQ: "iq"}

_DECLARED: Final = b' xmlns="' + ns.CLIENT.encode() + b'"'
_DECLARED_STREAM: Final = b' xmlns:stream="' + ns.STREAMS.encode() + b'"'
_PREFIXES: Final[tuple[bytes, ...]] = tuple(
    b"<" + kind.encode() + _DECLARED + more for kind in KINDS.values() for more in (_DECLARED_STREAM, b"")
)
_START_TAG: Final = re.compile(rb"""<(?:[^<>"']++|"[^"]*+"|'[^']*+')*+>""")
_UNDECLARED: Final = frozenset({ns.CLIENT, ns.STREAMS, "http://www.w3.org/XML/1998/namespace"})  # in neutral bytes
_PARSER: Final = etree.XMLParser(resolve_entities=False, no_network=True, huge_tree=False)


def neutral(element: _Element) -> bytes:
    """The neutral bytes of a stanza element; StreamError bad-namespace-prefix when its own namespace has a prefix."""
    raw: bytes = etree.tostring(element, encoding="utf-8", with_tail=False)
    for prefix in _PREFIXES:
        if raw.startswith(prefix):
            return raw[: prefix.index(b" ")] + raw[len(prefix) :]
    if element.prefix is not None:
        raise StreamError("bad-namespace-prefix", "the content namespace must be the default namespace")
    return raw.replace(_DECLARED, b"", 1).replace(_DECLARED_STREAM, b"", 1)


class Stanza:
    """One message, presence or IQ. Treat it as immutable: `replace` gives a changed copy.

    kind: "message", "presence" or "iq"; type: the attribute, with the default of RFC 6121 for messages ("normal"),
    "available" for a presence without one; id: "" when there is none; to, from_: JIDs, or None. place: where a message
    stands among all that were received from clients, on whatever node; 0 where that does not matter. Copies keep it.
    """

    __slots__ = ("_element", "_xml", "from_", "id", "kind", "malformed", "place", "to", "type")

    kept: ClassVar[bool] = False  # it is a row of the spool, and stays one until it has arrived
    hops: ClassVar[int] = 0  # links between nodes that it has crossed
    moved: ClassVar[bool] = False  # it waited for a session on another node, which has come here
    behind: ClassVar[bool] = False  # so did what is stored for its user, and that comes first
    copy: ClassVar[bool] = False  # of what stays where it is: not sent again when it is lost with its connection

    def __init__(
        self,
        kind: str,
        type: str,
        id: str,
        to: JID | None,
        from_: JID | None,
        xml: bytes,
        element: _Element | None = None,
    ) -> None:
        self.kind = kind
        self.type = type
        self.id = id
        self.to = to
        self.from_ = from_
        self._xml = xml
        self._element = element
        self.malformed = False  # its `to` could not be parsed (jid-malformed)
        self.place = 0

    @classmethod
    def from_bytes(cls, xml: bytes) -> "Stanza":
        """The stanza whose neutral bytes these are; ValueError when they are none, JidError for a bad address."""
        return cls.from_element(read_neutral(xml), xml)

    @classmethod
    def from_element(cls, element: _Element, xml: bytes | None = None) -> "Stanza":
        """A stanza around an element in jabber:client; addresses are parsed (JidError)."""
        kind = KINDS.get(element.tag)
        if kind is None:
            raise ValueError(f"not a stanza: {element.tag}")
        to, from_ = element.get("to"), element.get("from")
        return cls(
            kind,
            element.get("type") or DEFAULT_TYPES[kind],
            element.get("id") or "",
            parse(to) if to else None,
            parse(from_) if from_ else None,
            neutral(element) if xml is None else xml,
            element,
        )

    @property
    def xml(self) -> bytes:
        """The neutral bytes."""
        return self._xml

    @property
    def element(self) -> _Element:
        """The lxml element, for looking; whoever wants to change it takes a copy with `replace` or `edited`."""
        if self._element is None:
            self._element = read_neutral(self._xml)
        return self._element

    def forget_element(self) -> None:
        """Free the parsed form; it comes back from the bytes when asked for."""
        self._element = None

    @property
    def children(self) -> Iterator[_Element]:
        """The direct child elements."""
        return self.element.iterchildren(tag=etree.Element)

    def child(self, namespace: str, name: str | None = None) -> _Element | None:
        """The first direct child in that namespace (and of that name)."""
        if not self.names(namespace):
            return None
        wanted = f"{{{namespace}}}{name or '*'}"
        return self.element.find(wanted)

    def names(self, namespace: str) -> bool:
        """Whether there may be something in that namespace. Where there is not, nothing has to be parsed to say so."""
        xml = self._xml
        # Its name stands there as it is, or with characters written as numbers. (`in` tries a number first, and takes
        # half as long again.)
        return xml.find(namespace.encode()) >= 0 or namespace in _UNDECLARED or xml.find(b"&#") >= 0

    @property
    def payload(self) -> _Element | None:
        """The one child of an IQ request (RFC 6120 8.2.3), or None when there is none or more than one."""
        found = None
        for child in self.children:
            if found is not None:
                return None
            found = child
        return found

    @property
    def body(self) -> str | None:
        """The text of the first <body/>, or None."""
        return self.element.findtext(_BODY)

    def _beginning(self) -> bytes:
        """What follows its start tag, as far as `<body>` and one byte: of most messages nothing has to be parsed."""
        start = self._xml.find(b"<", 1)  # no start tag has another "<" in it
        return self._xml[start : start + 7] if start > 0 else b""

    @property
    def has_body(self) -> bool:
        if self._beginning().startswith(b"<body>"):
            return True
        return self.element.find(_BODY) is not None

    @property
    def has_text(self) -> bool:
        """Whether it has a <body/> that is not empty."""
        beginning = self._beginning()
        if beginning.startswith(b"<body>") and beginning != b"<body><":
            return True
        return any(body.text for body in self.element.iterchildren(_BODY))

    @property
    def inner(self) -> bytes:
        """The neutral bytes between the stanza's start tag and its end tag."""
        start = _START_TAG.match(self._xml)
        if start is None or self._xml.endswith(b"/>", 0, start.end()):
            return b""
        return self._xml[start.end() : self._xml.rindex(b"</")]

    def editable(self) -> _Element:
        """A fresh element of its own, to be changed and given to `edited`."""
        return read_neutral(self._xml)

    def edited(self, element: _Element) -> "Stanza":
        """The stanza made of an element that came from `editable`."""
        return self._placed(Stanza.from_element(element))

    def _placed(self, copy: "Stanza") -> "Stanza":
        copy.place = self.place
        return copy

    def replace(self, **attributes: str | None) -> "Stanza":
        """A copy with other attributes (`to`, `from_`, `id`, `type`); None removes one."""
        element = self.editable()
        for name, value in attributes.items():
            name = name.rstrip("_")
            if value is None:
                element.attrib.pop(name, "")
            else:
                element.set(name, value)
        return self._placed(Stanza.from_element(element))

    def addressed(self, to: JID) -> "Stanza":
        """A copy of a stanza that has no `to`, sent to somebody; cheap, for broadcasts."""
        tag = len(self.kind) + 1
        xml = self._xml[:tag] + attributes({"to": to.full}).encode() + self._xml[tag:]
        return self._placed(Stanza(self.kind, self.type, self.id, to, self.from_, xml))

    def __repr__(self) -> str:
        # The opening tag only: bodies stay out of logs.
        start = _START_TAG.match(self._xml)
        return start.group().decode("utf-8", "replace") if start else f"<{self.kind}>"


def is_namespace(uri: str) -> bool:
    """Whether neutral bytes that declare this namespace can be parsed again: libxml2 insists on the syntax of a URI."""
    try:
        etree.fromstring(f"<a xmlns={quoteattr(uri)}/>".encode(), _PARSER)
    except etree.XMLSyntaxError:
        return False
    return True


def attributes(values: Mapping[str, str | None]) -> str:
    """Attributes as XML text with a leading blank, escaped; None leaves one out."""
    return "".join(f" {name}={quoteattr(value)}" for name, value in values.items() if value is not None)


def build(kind: str, attrs: Mapping[str, str | None], inner: bytes = b"") -> Stanza:
    """A stanza of the server's own making. `inner` is neutral XML; attribute values are escaped here."""
    head = f"<{kind}{attributes(attrs)}"
    xml = f"{head}>".encode() + inner + f"</{kind}>".encode() if inner else f"{head}/>".encode()
    to, from_ = attrs.get("to"), attrs.get("from")
    return Stanza(
        kind,
        attrs.get("type") or DEFAULT_TYPES[kind],
        attrs.get("id") or "",
        parse(to) if to else None,
        parse(from_) if from_ else None,
        xml,
    )


def serialize(element: _Element) -> bytes:
    """The neutral bytes of a payload (a child of a stanza)."""
    raw: bytes = etree.tostring(element, encoding="utf-8", with_tail=False)
    return raw


def iq_result(request: Stanza, payload: bytes | _Element | None = None) -> Stanza:
    """The result to an IQ request (RFC 6120 8.2.3), from where the request was sent to."""
    inner = payload if isinstance(payload, bytes) else b"" if payload is None else serialize(payload)
    return build(
        "iq",
        {
            "type": "result",
            "id": request.id,
            "to": request.from_.full if request.from_ else None,
            "from": request.to.full if request.to else None,
        },
        inner,
    )


def error_reply(stanza: Stanza, error: StanzaError) -> Stanza | None:
    """What its sender is told about a stanza that went wrong (RFC 6120 8.3.1): from the address it was meant for, same
    id, its payload kept. None where no error may be sent: in answer to an error, or to an IQ result."""
    if stanza.type == "error" or (stanza.kind == "iq" and stanza.type == "result"):
        return None
    return build(
        stanza.kind,
        {
            "type": "error",
            "id": stanza.id or None,
            "to": stanza.from_.full if stanza.from_ else None,
            "from": stanza.to.full if stanza.to else None,
            **_prefixes(stanza),
        },
        stanza.inner + error_element(error),
    )


def _prefixes(stanza: Stanza) -> dict[str, str | None]:
    """The declarations in a stanza's start tag, which what is inside of it may rely on."""
    start = _START_TAG.match(stanza.xml)
    if start is None or b"xmlns:" not in start.group():
        return {}
    usual = {None: ns.CLIENT, "stream": ns.STREAMS}
    return {f"xmlns:{prefix}": uri for prefix, uri in stanza.editable().nsmap.items() if usual.get(prefix) != uri}


def error_element(error: StanzaError) -> bytes:
    """The <error/> child (RFC 6120 8.3.2) as neutral bytes."""
    text = f'<text xmlns="{ns.STANZA_ERRORS}" xml:lang="en">{escape(error.text)}</text>' if error.text else ""
    defined = f'<error type="{error.type}"><{error.condition} xmlns="{ns.STANZA_ERRORS}"/>{text}'.encode()
    return defined + error.application + b"</error>"


def delay_element(stamp: str, from_: str, reason: str = "") -> bytes:
    """A delayed-delivery stamp (XEP-0203); `stamp` is a XEP-0082 date and time in UTC."""
    attrs = attributes({"xmlns": ns.DELAY, "from": from_, "stamp": stamp})
    return f"<delay{attrs}>{escape(reason)}</delay>".encode()


def with_child(stanza: Stanza, child: bytes) -> Stanza:
    """A copy with one more child, given as neutral bytes, at the end."""
    copy = Stanza(stanza.kind, stanza.type, stanza.id, stanza.to, stanza.from_, xml_with_child(stanza, child))
    copy.place = stanza.place
    return copy


def xml_with_child(stanza: Stanza, child: bytes) -> bytes:
    """The neutral bytes of `with_child`."""
    xml = stanza.xml
    if xml.endswith(b"/>"):
        return b"%b>%b</%b>" % (xml[:-2], child, stanza.kind.encode())
    end = xml.rindex(b"</")
    return xml[:end] + child + xml[end:]
