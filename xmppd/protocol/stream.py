"""The reading side of an XML stream (RFC 6120 4): bytes in, events out, however the network cut them.

What is refused here, with the stream error that names it: document types, comments, processing instructions
(RFC 6120 11.1), other encodings than UTF-8, wrong namespaces, and whatever goes over a limit.

lxml's pull parser (libxml2) does the parsing. Eight things about it shape this file:
- An element is serialised *before* it is removed from the root, or libxml2 invents prefixes for it.
- Each finished stanza is removed from the root, so memory stays flat; white space between stanzas never reaches the
  parser, where it would pile up as text of the root.
- The root must not keep a text of its own while stanzas and what follows them are removed: libxml2 would take it for
  the text it wrote last, and go on at an offset that belongs to the other one, past the end of its memory.
- It keeps every name it has seen as long as the stream lives (libxml.py sees to it that it is not longer), so names
  nobody knows are counted per stream. It does so with runs of 16 to 59 blanks between two tags, too, and with the
  values of xml:id unless told otherwise.
- A parser that is given up inside its document has to be taken apart, or it waits for the collector.
- It waits for ever at a NUL byte in a CDATA section.
- It forgives what breaks the rules of namespaces: undeclared prefixes, two attributes of one name, namespaces that are
  no URI. Others do not: they would end the stream of the client that is sent such a stanza.
- It would read a DOCTYPE before anybody could object, so the prolog is looked at before it is fed.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final, cast
from xml.sax.saxutils import escape, quoteattr

from lxml import etree
from lxml.etree import _Element

from xmppd.errors import JidError, StreamError
from xmppd.protocol import ns
from xmppd.protocol.jid import JID, parse
from xmppd.protocol.libxml import NameTable, give_up
from xmppd.protocol.names import KNOWN_NAMES
from xmppd.protocol.stanza import DEFAULT_TYPES, KINDS, Stanza, is_namespace, neutral

_STREAM_TAG: Final = f"{{{ns.STREAMS}}}stream"
_XML_LANG: Final = f"{{{ns.XML}}}lang"
_BOM: Final = b"\xef\xbb\xbf"
_BLANKS: Final = b" \t\r\n"
_AFTER_NAME: Final = frozenset(b" \t\r\n/>")
_BLANK_BYTES: Final = frozenset(_BLANKS)
# Not "comment" and "pi", which double the cost of parsing: they are looked for where "<!" or "<?" is seen.
_EVENTS: Final = ("start", "end", "start-ns")
_TAGS: Final = {kind: (f"<{kind}".encode(), f"</{kind}>".encode()) for kind in KINDS.values()}
_DECLARATION: Final = re.compile(rb"""<\?xml[ \t\r\n](?:[^?"']++|"[^"]*+"|'[^']*+')*+\?>""")
_ENCODING: Final = re.compile(rb"""[ \t\r\n]encoding[ \t\r\n]*=[ \t\r\n]*["']([^"']*)["']""")
_TAG: Final = re.compile(rb"""<!\[CDATA\[(?:.*?\]\]>|.*)|<(?![!?])(?:[^<>"']++|"[^"]*+"|'[^']*+')*+>|<""", re.DOTALL)
_BLANK_RUN: Final = re.compile(rb">([ \t\r\n]{16,59})(?=<)")
# Acknowledgements and requests for them as clients usually write them, of which there may be as many as messages.
_SM: Final = re.compile(
    b"|".join(
        b"<(?:r xmlns=%b|a xmlns=%b h=%b|a h=%b xmlns=%b) ?/>" % (named, named, counted, counted, named)
        for named, counted in ((q + ns.SM.encode() + q, q + b"([0-9]{1,9})" + q) for q in (b'"', b"'"))
    )
)
_SM_ALL: Final = re.compile(rb"(?:%b)+" % _SM.pattern)
_SM_LENGTH: Final = 80  # bytes; longer than two of them
_REQUESTS: Final = frozenset(
    {b"<r xmlns='urn:xmpp:sm:3'/>", b'<r xmlns="urn:xmpp:sm:3"/>', b'<r xmlns="urn:xmpp:sm:3" />'}
)
_ACKS: Final = frozenset({b"<a xmlns='urn:xmpp:sm:3' h='", b'<a xmlns="urn:xmpp:sm:3" h="'})
_SM_COUNT: Final = 28  # where the count begins
_SM_STARTS: Final = (b"<r xmlns=", b"<a xmlns=", b"<a h=")
_SM_FIRST: Final = (b"<r ", b"<a ")
_SM_REQUEST: Final = f"{{{ns.SM}}}r"
_SM_ACK: Final = f"{{{ns.SM}}}a"
_NAME_LENGTH: Final = 128
_UNDECLARED_ENTITY: Final = 26  # libxml2's XML_ERR_UNDECLARED_ENTITY
_PLAIN_NAMESPACES: Final = {None: ns.CLIENT, "stream": ns.STREAMS}


@dataclass(frozen=True, slots=True)
class Limits:
    """What one stream may cost. Going over any of them ends it with `policy-violation`."""

    size: int  # bytes since the last finished stanza
    depth: int = 64  # elements inside each other, the stanza being the first
    elements: int = 10_000  # in one stanza
    names: int = 1000  # different names of any kind that are not in KNOWN_NAMES, and long runs of blanks, per stream;
    # a name counts once for every _NAME_LENGTH bytes of it
    total: int | None = None  # elements in the whole stream (before authentication)


@dataclass(frozen=True, slots=True)
class StreamOpened:
    """The stream header; `to` and `from_` are as written by the peer."""

    to: str | None
    from_: str | None
    version: str | None
    lang: str | None
    id: str | None


@dataclass(frozen=True, slots=True)
class Nonza:
    """A direct child of the root that is no stanza: SASL, STARTTLS, stream management, errors."""

    element: _Element


@dataclass(slots=True)  # not frozen, which costs: there may be one for each message
class Acknowledgement:
    """<a/> (XEP-0198): the peer has handled so many stanzas, modulo 2^32."""

    h: int


@dataclass(frozen=True, slots=True)
class AcknowledgementRequest:
    """<r/> (XEP-0198)."""


@dataclass(frozen=True, slots=True)
class StreamClosed:
    """The peer sent </stream:stream>."""


Event = StreamOpened | Stanza | Nonza | Acknowledgement | AcknowledgementRequest | StreamClosed | StreamError


@dataclass(slots=True)
class _Stamp:
    """Who sends on this stream once a resource is bound: the address every stanza gets as its `from`."""

    jid: JID
    attribute: bytes = field(init=False)

    def __post_init__(self) -> None:
        self.attribute = b" from=" + _quoted(self.jid.full)


class Stream:
    """One direction of one stream. `receive` never raises for what a peer sent: a StreamError is the last event.

    After a StreamError or StreamClosed everything that still comes is ignored. A stream restart (RFC 6120 4.3.3) and a
    new TLS layer each begin with `restart`.
    """

    __slots__ = (
        "_blanks",
        "_deepest",
        "_depth",
        "_elements",
        "_ended",
        "_exact",
        "_held",
        "_iter",
        "_lang",
        "_lang_attribute",
        "_limits",
        "_names",
        "_novelty",
        "_parser",
        "_prolog",
        "_root",
        "_simple",
        "_stamp",
        "_suspect",
        "_table",
        "_total",
    )

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._names: set[str | bytes] = set()
        self._novelty = 0  # their number, long ones counted more than once
        self._stamp: _Stamp | None = None
        self._total = 0
        self._blanks = 0
        self._begin()

    def restart(self) -> None:
        """Expect a new stream header; what was counted as novel names stays counted."""
        self.release()
        self._begin()

    def _begin(self) -> None:
        self._parser: etree.XMLPullParser | None = None  # until there is something for it: it costs 10 KiB
        self._iter: Iterator[tuple[str, Any]] = iter(())
        self._root: _Element | None = None
        self._prolog: bytes | None = b""
        self._depth = 0
        self._deepest = 0  # for the root's start to be noticed
        self._elements = 0  # started since the last finished stanza
        self._suspect = False  # "<!" or "<?" was seen: CDATA, or something forbidden
        self._held = bytearray()  # the bytes since the last finished stanza
        self._ended = False
        self._simple = False  # the root declares nothing but the two usual namespaces
        self._exact = False  # the last read held one whole stanza and nothing else
        self._lang: str | None = None
        self._lang_attribute = b""

    def release(self) -> None:
        """The stream is over: free the parser, with all that has come of an unfinished stanza."""
        self._ended = True
        parser, self._parser = self._parser, None
        root, self._root = self._root, None
        if parser is None:
            return
        for action, item in self._iter:
            if root is None and action == "start":
                root = item
        give_up(parser, root, self._table)

    def set_limits(self, limits: Limits) -> None:
        """Other limits from here on (after authentication)."""
        self._limits = limits
        if self._root is not None:
            self._deepest = limits.depth + 1

    def bind(self, jid: JID) -> None:
        """From now on each stanza's `from` must be this address (or its bare form, or absent) and becomes it."""
        self._stamp = _Stamp(jid)

    @property
    def ended(self) -> bool:
        return self._ended

    def receive(self, data: bytes) -> list[Event]:
        """What these bytes complete, in order."""
        if self._ended:
            return []
        if not data:
            return []
        if self._stamp is None or self._held or self._depth != 1:
            pass
        elif data[-2:] == b"/>":
            if len(data) < _SM_LENGTH:
                if data in _REQUESTS:
                    return [_REQUEST]
                if data[:_SM_COUNT] in _ACKS and data[-3] == data[_SM_COUNT - 1] and data[_SM_COUNT:-3].isdigit():
                    h = int(data[_SM_COUNT:-3])
                    if h < 1 << 32:
                        return [Acknowledgement(h)]
                if (one := _SM.fullmatch(data)) is not None:
                    return [_acknowledging(one)]
                if _SM_ALL.fullmatch(data) is not None:
                    return [_acknowledging(found) for found in _SM.finditer(data)]
            cut = data.rfind(b"<")
            if cut > 0 and data.startswith(_SM_STARTS, cut) and (one := _SM.fullmatch(data, cut)) is not None:
                return self.receive(data[:cut]) + self._receive_behind(data[cut:], one)
        elif data.startswith(_SM_FIRST) and (first := _SM_ALL.match(data)) is not None:
            before = [_acknowledging(found) for found in _SM.finditer(data, 0, first.end())]
            return before + self.receive(data[first.end() :])
        if data[0] in _BLANK_BYTES and not self._held and not self._prolog and self._depth < 2:
            stripped = data.lstrip(_BLANKS)
            if (self._root is None or self._limits.total is not None) and self._blank(len(data) - len(stripped)):
                return [_too_blank(self._limits.size)]
            data = stripped
            if not data:
                return []
        nul = data.find(0)
        if nul >= 0:
            return self._receive_nul(data, nul)
        try:
            if self._prolog is not None:
                data = self._read_prolog(data)
                if not data:
                    return []
            return self._read(data)
        except StreamError as error:
            self._ended = True
            return [_bare(error)]

    def _receive_behind(self, data: bytes, found: re.Match[bytes]) -> list[Event]:
        """What looks like stream management, and is that if it stands between stanzas."""
        if self._ended:
            return []
        if self._held or self._depth != 1:
            return self._read(data)
        return [_acknowledging(found)]

    def _blank(self, count: int) -> bool:
        """So much white space came before the header, or before authentication; is it too much?"""
        self._blanks += count
        self._ended = self._blanks > self._limits.size
        return self._ended

    def _receive_nul(self, data: bytes, nul: int) -> list[Event]:
        events = self.receive(data[:nul])
        if not self._ended:
            self._ended = True
            utf16 = self._prolog is not None and len(self._prolog) < 2
            condition = "unsupported-encoding" if utf16 else "not-well-formed"
            events.append(StreamError(condition, "a NUL byte"))
        return events

    # -- the prolog: everything before the root element's name

    def _read_prolog(self, data: bytes) -> bytes:
        """Hold back what comes before the root, until it is sure that it is no DOCTYPE, comment or foreign encoding."""
        assert self._prolog is not None
        prolog = self._prolog + data
        if prolog[:1] in (b"\xff", b"\xfe"):
            raise StreamError("unsupported-encoding", "only UTF-8 is spoken here")
        rest = prolog[len(_BOM) :] if prolog.startswith(_BOM) else prolog
        if _BOM.startswith(rest) or _is_undecided(rest):
            self._prolog = prolog
            if len(prolog) > self._limits.size:
                raise StreamError("policy-violation", f"more than {self._limits.size} bytes without a stream header")
            return b""
        self._prolog = None
        return rest if rest[:1] == b"<" else rest.lstrip(_BLANKS)

    # -- the stream itself

    def _read(self, data: bytes) -> list[Event]:
        whole = self._depth == 1 and not self._held  # the chunk begins where a stanza begins
        if b"<!" in data or b"<?" in data or (data[0] in b"!?" and self._held and self._held[-1] == 60):
            self._suspect = True
        failure: StreamError | None = None
        parser = self._parser or self._new_parser()
        try:
            with self._table:
                parser.feed(data)
        except etree.XMLSyntaxError as exc:
            failure = _syntax_error(exc)
            whole = False
        header_too = self._depth == 0
        out: list[Event] = []
        item: Any = None  # an element, or for start-ns (prefix, uri)
        try:
            for action, item in self._iter:
                if action == "start":
                    self._depth += 1
                    if item.tag not in KNOWN_NAMES:
                        self._novel_name(item.tag)
                    novel = False
                    for name in item.keys():  # noqa: SIM118 -- iterating an element gives its children
                        if name not in KNOWN_NAMES:
                            self._novel_name(name)
                            novel = True
                    if novel:
                        _look_for_twins(item)
                    self._elements += 1
                    if self._depth > self._deepest or self._elements > self._limits.elements:
                        self._too_much(out, item)
                elif action == "end":
                    self._depth -= 1
                    if self._depth == 1:
                        self._finish(item, data if whole and not out else b"", out)
                    elif self._depth == 0:
                        if _has_text(item.text):
                            raise _stray_text()
                        self._ended = True
                        out.append(StreamClosed())
                        failure = None  # of what comes behind the end
                        break
                else:
                    self._declare(*item)
            if failure is not None:
                raise failure
        except StreamError as error:
            self._end(_bare(error), data, header_too, out)
            if self._root is None and type(item) is _Element:
                self._root = item  # of another kind; to be released
            return out
        if self._exact:
            self._exact = False
            return out
        try:
            self._count_bytes(data, header_too, out)
        except StreamError as error:
            self._ended = True
            out.append(_bare(error))
        return out

    def _new_parser(self) -> etree.XMLPullParser:
        self._table = NameTable()
        self._parser = parser = etree.XMLPullParser(events=_EVENTS, collect_ids=False)
        self._iter = parser.read_events()
        return parser

    def _end(self, error: StreamError, data: bytes, header_too: bool, out: list[Event]) -> None:
        """Let the error be the last event. A stanza that was finished before it may be too large: that comes first."""
        self._ended = True
        data = bytes(self._held) + data
        start = 0
        for done, end in zip(range(len(out)), _unit_ends(data, 0 if header_too else 1), strict=False):
            fault = self._fault(data, start, end)
            if fault is not None:
                del out[done:]
                error = fault
                break
            start = end
        else:
            if self._root is not None:
                error = _misplaced(data[start:].lstrip(_BLANKS)) or error
        out.append(error)

    def _too_much(self, out: list[Event], element: _Element) -> None:
        """The root is open, or a limit is reached."""
        limits = self._limits
        if self._root is None:
            out.append(self._open_root(element))
            self._elements = 0
            self._deepest = limits.depth + 1
        elif self._depth > self._deepest:
            raise StreamError("policy-violation", f"elements nested deeper than {limits.depth}")
        else:
            raise StreamError("policy-violation", f"more than {limits.elements} elements in one stanza")

    def _open_root(self, element: _Element) -> StreamOpened:
        if element.tag != _STREAM_TAG:
            if etree.QName(element).namespace != ns.STREAMS:
                raise StreamError("invalid-namespace", "the stream namespace is " + ns.STREAMS)
            raise StreamError("bad-format", "the root of a stream is <stream:stream>")
        nsmap = element.nsmap
        if nsmap.get(None) != ns.CLIENT:
            raise StreamError("invalid-namespace", "the content namespace of this stream is " + ns.CLIENT)
        if element.prefix != "stream":
            raise StreamError("bad-namespace-prefix", "the prefix of the stream namespace is 'stream'")
        self._root = element
        self._simple = nsmap == _PLAIN_NAMESPACES
        self._lang = element.get(_XML_LANG)
        if self._lang is not None:
            self._lang_attribute = b" xml:lang=" + _quoted(self._lang)
        return StreamOpened(
            element.get("to"), element.get("from"), element.get("version"), self._lang, element.get("id")
        )

    def _finish(self, element: _Element, chunk: bytes, out: list[Event]) -> None:
        root = self._root
        assert root is not None
        before = root.text
        if before is not None:
            if _has_text(before):
                raise _stray_text()
            root.text = None  # at the latest before the stanza goes: see above
        if self._suspect and (root[0] is not element or next(element.iter(etree.Comment, etree.PI), None) is not None):
            raise _restricted()
        limits = self._limits
        if limits.total is not None:
            self._total += self._elements
            if self._total > limits.total:
                raise StreamError("policy-violation", f"more than {limits.total} elements before authentication")
        kind = KINDS.get(element.tag)
        out.append(self._other(element) if kind is None else self._stanza(element, kind, chunk))
        self._elements = 0
        stray = _has_text(element.tail)
        del root[0]
        if stray:
            raise _stray_text()

    def _other(self, element: _Element) -> Event:
        if element.tag == _SM_REQUEST:
            return _REQUEST
        if element.tag == _SM_ACK:
            h = element.get("h", "")
            if h.isascii() and h.isdigit() and len(h) < 11 and int(h) < 1 << 32:
                return Acknowledgement(int(h))
        return self._nonza(element)

    def _nonza(self, element: _Element) -> Nonza:
        namespace = etree.QName(element).namespace
        if namespace == ns.CLIENT:
            raise StreamError("unsupported-stanza-type", f"<{etree.QName(element).localname}/> is no stanza")
        if namespace in (None, ns.SERVER):
            raise StreamError("invalid-namespace", "a stanza of this stream is in " + ns.CLIENT)
        return Nonza(element)

    def _stanza(self, element: _Element, kind: str, chunk: bytes) -> Stanza:
        get = element.get
        stamp = self._stamp
        to_text, claimed = get("to"), get("from")
        own: JID | None = None
        changed = False
        added = b""  # attributes the stanza gets
        if stamp is not None:
            own = stamp.jid
            if claimed is None:
                added = stamp.attribute
            elif claimed != own.full:
                if not _is_own(claimed, own):
                    raise StreamError("invalid-from", "a stanza's sender must be the address bound to the stream")
                changed = True
        if self._lang is not None and get(_XML_LANG) is None:
            added += self._lang_attribute
        xml = b""
        if chunk and self._simple and not changed and not element.tail:
            # The usual case, one read that holds one whole stanza: its bytes are neutral as they are.
            xml = self._raw(chunk, kind, self._elements, added)
        if not xml:
            if own is not None:
                element.set("from", own.full)
            if self._lang is not None and get(_XML_LANG) is None:
                element.set(_XML_LANG, self._lang)
            xml = neutral(element)
        to, malformed = None, False
        if to_text is not None:
            try:
                to = parse(to_text)
            except JidError:
                malformed = True
        stanza = Stanza(kind, get("type") or DEFAULT_TYPES[kind], get("id") or "", to, own, xml, element)
        if malformed:
            stanza.malformed = True
        return stanza

    def _raw(self, chunk: bytes, kind: str, elements: int, added: bytes) -> bytes:
        """The chunk as a stanza's neutral bytes with added attributes; b"" when it is not exactly that one stanza.

        The parser has accepted these bytes, but an unfinished tag or a text may still wait in it. A tag left over
        begins with "<", so then there are more of those than the stanza's start and end tags account for. A text is
        left over when the chunk does not end with the stanza's own last tag.
        """
        start, end = _TAGS[kind]
        if (
            not chunk.startswith(start)
            or chunk[len(start)] not in _AFTER_NAME  # else the rest of a prefix: <message:message/>
            or not (chunk.endswith(end) or chunk.find(b">") == len(chunk) - 1)
            or chunk.count(b"<") != elements + chunk.count(b"</")
            or (b"xmlns" in chunk and _declares_oddly(chunk))
            or _BLANK_RUN.search(chunk) is not None
        ):
            return b""
        self._exact = len(chunk) <= self._limits.size
        return start + added + chunk[len(start) :] if added else chunk

    # -- counting

    def _declare(self, prefix: str, uri: str) -> None:
        if prefix and prefix not in KNOWN_NAMES:
            self._novel(prefix)
        if uri not in KNOWN_NAMES:
            if uri not in self._names and not self._is_namespace(uri):
                raise StreamError("not-well-formed", f"{uri[:80]!r} is no URI")
            self._novel(uri)

    def _novel_name(self, name: str) -> None:
        if name.find(":", name.rfind("}") + 1) >= 0:
            raise StreamError("not-well-formed", f"the prefix of {name} is not declared")
        self._novel(name)

    def _is_namespace(self, uri: str) -> bool:
        with self._table:
            return is_namespace(uri)

    def _novel(self, name: str | bytes) -> None:
        names = self._names
        if name in names:
            return
        names.add(name)
        self._novelty += 1 + len(name) // _NAME_LENGTH
        if self._novelty > self._limits.names:
            raise StreamError("policy-violation", f"more than {self._limits.names} unknown names")

    def _count_bytes(self, data: bytes, header_too: bool, out: list[Event]) -> None:
        """Hold every stanza, finished or not, to its size; bytes are counted exactly, wherever the reads were cut."""
        held = self._held
        if not out:
            held += data
            rest = held
        else:
            if held:
                data = bytes(held) + data
            start = 0
            for done, end in enumerate(_unit_ends(data, 0 if header_too else 1)):
                fault = self._fault(data, start, end)
                if fault is not None:
                    del out[done:]
                    raise fault
                start = end
            if self._ended:
                empty = header_too and len(out) == 2 and data[start - 2] == 47  # <stream:stream/>
                stray = None if empty else _misplaced(data[start:].lstrip(_BLANKS))
                if stray is not None:  # a blank, but written as a character reference
                    out.pop()
                    raise stray
                return
            for run in _BLANK_RUN.findall(data, 0, start):
                self._novel(run)
            rest = self._held = bytearray(data[start:].lstrip(_BLANKS))
        if not rest:
            self._suspect = False
            return
        misplaced = _misplaced(rest) if self._root is not None else None
        if misplaced is not None:
            raise misplaced
        if len(rest) > self._limits.size:
            raise _too_large(self._limits.size)

    def _fault(self, data: bytes, start: int, end: int) -> StreamError | None:
        """What is wrong with a finished stanza and the white space before it: text there, or its size."""
        if data[start] != 60 or end - start > self._limits.size:
            unit = data[start:end].lstrip(_BLANKS)
            if unit[0] != 60:
                return _stray_text()
            if len(unit) > self._limits.size:
                return _too_large(self._limits.size)
        return None


_REQUEST: Final = AcknowledgementRequest()


def _acknowledging(found: re.Match[bytes]) -> Event:
    return _REQUEST if found.lastindex is None else Acknowledgement(int(found[found.lastindex]))


def error_bytes(error: StreamError) -> bytes:
    """<stream:error/> as it goes to the peer (RFC 6120 4.9.2)."""
    text = f"<text xmlns='{ns.STREAM_ERRORS}' xml:lang='en'>{escape(error.text)}</text>" if error.text else ""
    return (
        f"<stream:error><{error.condition} xmlns='{ns.STREAM_ERRORS}'/>{text}".encode()
        + error.application
        + b"</stream:error>"
    )


def _is_undecided(prolog: bytes) -> bool:
    """Whether more bytes are needed to see that the root element comes now; StreamError when something else does."""
    rest = prolog
    if b"<?xml"[: len(rest)] == rest[:5] and (len(rest) < 6 or rest[5] in _BLANK_BYTES):
        declaration = _DECLARATION.match(rest)
        if declaration is None:
            if b"?>" in rest:
                raise StreamError("not-well-formed", "the XML declaration is not well-formed")
            return True
        encoding = _ENCODING.search(declaration.group())
        if encoding is not None and encoding.group(1).lower() != b"utf-8":
            raise StreamError("unsupported-encoding", "only UTF-8 is spoken here")
        rest = rest[declaration.end() :]
    rest = rest.lstrip(_BLANKS)
    if len(rest) < 2 and rest[:1] in (b"", b"<"):
        return True
    if rest[:1] != b"<":
        raise StreamError("not-well-formed", "a stream begins with <stream:stream>")
    if rest[1:2] in (b"!", b"?"):
        raise StreamError("restricted-xml", "document types, comments and processing instructions are not allowed")
    return False


def _unit_ends(data: bytes, depth: int) -> Iterator[int]:
    """Where the stream header (depth 0) and each stanza end in bytes that the parser has accepted."""
    for tag in _TAG.finditer(data):
        start, end = tag.span()
        if end - start == 1:
            if depth == 0 and data[end : end + 1] == b"?":
                continue  # the XML declaration
            return  # a tag that is not finished, or something that will be refused
        second = data[start + 1]
        if second == 33:  # "!": CDATA
            continue
        if second == 47:  # "/"
            depth -= 1
            if depth == 1:
                yield end
            elif depth == 0:
                return
        elif data[end - 2] == 47:
            if depth < 2:
                yield end
            if depth == 0:
                return  # the header is the end, too: <stream:stream/>
        else:
            depth += 1
            if depth == 1:
                yield end


def _look_for_twins(element: _Element) -> None:
    names = cast(list[str], element.keys())
    if len(set(names)) != len(names):
        raise StreamError("not-well-formed", f"two attributes {next(name for name in names if names.count(name) > 1)}")


def _bare(error: StreamError) -> StreamError:
    """Without the places it came through, which refer to the stream, and it to them: work for the collector."""
    error.__traceback__ = error.__context__ = error.__cause__ = None
    return error


def _too_blank(size: int) -> StreamError:
    return StreamError("policy-violation", f"more than {size} bytes of white space")


def _restricted() -> StreamError:
    return StreamError("restricted-xml", "comments and processing instructions are not allowed")


def _declares_oddly(chunk: bytes) -> bool:
    """Whether there is, or may be, a namespace declaration that does not survive being copied as it stands."""
    return (
        b"jabber:client" in chunk
        or b"&#" in chunk  # a namespace could be spelled with it
        or b"xmlns:" in chunk  # the parser drops declarations that are against the rules, and says nothing
        or b"http://www.w3.org/" in chunk
    )


def _quoted(text: str) -> bytes:
    return quoteattr(text).encode()


def _too_large(size: int) -> StreamError:
    return StreamError("policy-violation", f"a stanza larger than {size} bytes")


def _stray_text() -> StreamError:
    return StreamError("bad-format", "text between stanzas")


def _misplaced(rest: bytes | bytearray) -> StreamError | None:
    """What is wrong when this, without leading blanks, comes behind a stanza."""
    if not rest or rest[0] != 60:
        return _stray_text() if rest else None
    if rest[1:2] == b"?" or rest[1:3] == b"!-":
        return _restricted()
    return _stray_text() if rest[1:3] == b"![" else None


def _has_text(text: str | None) -> bool:
    return text is not None and bool(text.strip(" \t\r\n"))


def _is_own(claimed: str, own: JID) -> bool:
    """May a client bound to `own` write this `from`: its full or its bare address (RFC 6120 8.1.2.1)."""
    try:
        return parse(claimed).full in (own.full, own.bare)
    except JidError:
        return False


def _syntax_error(exc: etree.XMLSyntaxError) -> StreamError:
    if getattr(exc, "code", 0) == _UNDECLARED_ENTITY:
        return StreamError("restricted-xml", "entity references are not allowed")
    return StreamError("not-well-formed", exc.msg or "")
