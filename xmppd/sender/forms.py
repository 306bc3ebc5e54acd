"""What events say, where that is made as late as can be: in the process that makes the requests, or in the node when
the event has to be written down. A message as ejabberd's XML, and what all forms of messages share. No I/O."""

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from lxml.etree import QName, _Element

from xmppd.protocol import ns
from xmppd.protocol.libxml import read_neutral

XML_LANG: Final = f"{{{ns.XML}}}lang"
Headers = tuple[tuple[str, str], ...]
# A message that is to be posted: its neutral bytes, `to` and `from` for one without, Unix time.
Raw = tuple[bytes, str, str, float]
_LANGUAGE: Final = "en"  # ejabberd's own, which it writes where the client has not named one
_BODY: Final = f"{{{ns.CLIENT}}}body"
_SUBJECT: Final = f"{{{ns.CLIENT}}}subject"
_THREAD: Final = f"{{{ns.CLIENT}}}thread"
# What nearly every message is: attributes of these names, as in b' to="', and one body.
_ATTRIBUTES: Final = frozenset((b" xml:lang=", b" to=", b" from=", b" type=", b" id=", b" xmlns=", b""))
_START: Final = b"<message"
_FIRST: Final = b"><body>"
_LAST: Final = b"</body></message>"


@dataclass(frozen=True, slots=True)
class Form:
    """Messages as ejabberd's module mod_post_log posts them. `headers`: those that are the same for all; `at`, `from_`,
    `to`: the names of those that are not; `hides`: the text is left out."""

    headers: Headers
    at: str
    from_: str
    to: str
    hides: bool = False

    def make(self, raw: Raw) -> tuple[Headers, bytes]:
        """Headers and body. Raises ValueError."""
        xml, to, from_, at = raw
        body, to, from_ = ejabberd_xml(xml, to, from_, hides=self.hides)
        return (*self.headers, (self.at, timestamp(at)), (self.from_, from_), (self.to, to)), body


def timestamp(at: float, between: str = " ") -> str:
    """`2026-11-21 09:00:00.123456Z`"""
    seconds, micros = divmod(round(at * 1_000_000), 1_000_000)
    return f"{_second(seconds, between)}.{micros:06}Z"


@lru_cache(maxsize=4)
def _second(seconds: int, between: str) -> str:
    return time.strftime(f"%Y-%m-%d{between}%H:%M:%S", time.gmtime(seconds))


def text_of(element: _Element) -> str:
    """All text directly in it."""
    text = element.text or ""
    return text + "".join(child.tail or "" for child in element) if len(element) else text


def hidden(text: str) -> dict[str, str | int]:
    """What is told of a text that is confidential."""
    return {"length": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}


def ejabberd_xml(xml: bytes, to: str, from_: str, *, hides: bool = False) -> tuple[bytes, str, str]:
    """A message's neutral bytes as ejabberd 23.01 writes them: single quotes, its order of attributes and children,
    `from` and `xml:lang` always there, and of the message's own children the bodies, subjects and threads last. With
    them its `to` and `from` as they are written there; those given are for a message without. `hides`: the text is
    left out. Raises ValueError."""
    if not hides and (simple := _simple(xml, to, from_)) is not None:
        return simple
    element = read_neutral(xml)
    attributes = element.attrib
    to, from_ = attributes.get("to") or to, attributes.get("from") or from_
    head = _head(attributes.get(XML_LANG) or _LANGUAGE, to, from_).decode()
    for name in ("type", "id"):
        value = attributes.get(name)
        if value is not None:
            head += f" {name}='{_escape(value)}'"
    others: list[str] = []
    own: dict[str, list[str]] = {_BODY: [], _SUBJECT: [], _THREAD: []}
    for child in element:
        kind = own.get(child.tag)
        if kind is not None:
            if not hides or child.tag == _BODY:
                kind.append(_own_child(child, hides))
        elif not hides:
            others.extend(_foreign(child, ns.CLIENT))
    parts = (head, " xmlns='jabber:client'>", *others, *own[_BODY], *own[_SUBJECT], *own[_THREAD], "</message>")
    return "".join(parts).encode(), to, from_


def _simple(xml: bytes, to: str, from_: str) -> tuple[bytes, str, str] | None:
    """The same for what nearly every message is, out of its bytes: what was escaped stays so. None for others, and
    where a parser would have to say what the bytes mean."""
    end = xml.find(_FIRST)
    if end < 0 or xml.find(b"<", 1) != end + 1 or not xml.endswith(_LAST):
        return None
    start, body = xml[len(_START) : end], xml[end + len(_FIRST) : -len(_LAST)]
    if not body or body.find(b"<") >= 0 or xml.find(b"&#") >= 0 or xml.find(b"\r") >= 0:
        return None
    said = _simple_start(start)
    if said is None:
        return None
    to, from_ = said.get(b" to=", b"").decode() or to, said.get(b" from=", b"").decode() or from_
    parts = [_head(said.get(b" xml:lang=", b"").decode() or _LANGUAGE, to, from_)]
    for name in (b" type=", b" id="):
        if name in said:
            parts += (name, b"'", said[name].replace(b">", b"&gt;"), b"'")
    body = body.replace(b">", b"&gt;").replace(b'"', b"&quot;").replace(b"'", b"&apos;")
    return b"".join((*parts, b" xmlns='jabber:client'><body>", body, _LAST)), to, from_


def _simple_start(start: bytes) -> dict[bytes, bytes] | None:
    """Attributes that are all written with the same quotes, which none of them has in it then; else None. (`find` since
    `in` tries a number first, and takes three times as long.)"""
    quote, other = (b'"', b"'") if start.endswith(b'"') else (b"'", b'"')
    if start.find(other) >= 0 or start.find(b"&") >= 0 or start.find(b"\n") >= 0 or start.find(b"\t") >= 0:
        return None
    parts = iter(start.split(quote))
    said = dict(zip(parts, parts, strict=False))
    return said if said.keys() <= _ATTRIBUTES else None


@lru_cache(maxsize=4096)  # who talks does so for a while
def _head(lang: str, to: str, from_: str) -> bytes:
    return f"<message xml:lang='{_escape(lang)}' to='{_escape(to)}' from='{_escape(from_)}'".encode()


def _own_child(child: _Element, hides: bool) -> str:
    """A body, a subject or a thread."""
    name, text = child.tag.rpartition("}")[2], text_of(child)
    attrs = ""
    if child.attrib:
        known = (("parent", child.get("parent")),) if name == "thread" else (("xml:lang", child.get(XML_LANG)),)
        attrs = _attributes({key: value for key, value in known if value is not None})
    if hides:
        attrs += _attributes({key: str(value) for key, value in hidden(text).items()})
        text = ""
    return f"<{name}{attrs}>{_escape(text)}</{name}>" if text else f"<{name}{attrs}/>"


def _escape(text: str) -> str:
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return text.replace('"', "&quot;").replace("'", "&apos;")


def _attributes(attrs: dict[str, str]) -> str:
    return "".join(f" {name}='{_escape(value)}'" for name, value in attrs.items())


def _foreign(element: _Element, outer: str) -> Iterator[str]:
    """An element of somebody else's, whose surroundings are in the namespace `outer`; prefixes of names go."""
    name = QName(element)
    own = name.namespace or ""
    attrs: dict[str, str] = {"xmlns": own} if own != outer else {}
    for key, value in element.attrib.items():
        attr = QName(key)
        if key == XML_LANG or attr.namespace == "http://www.w3.org/XML/1998/namespace":
            attrs[f"xml:{attr.localname}"] = str(value)
        elif attr.namespace is None:
            attrs[attr.localname] = str(value)
        else:
            prefix = next(p for p, uri in element.nsmap.items() if p and uri == attr.namespace)
            attrs |= {f"xmlns:{prefix}": attr.namespace, f"{prefix}:{attr.localname}": str(value)}
    yield f"<{name.localname}{_attributes(attrs)}"
    if not element.text and not len(element):
        yield "/>"
        return
    yield ">"
    yield _escape(element.text or "")
    for child in element:
        if isinstance(child.tag, str):
            yield from _foreign(child, own)
        yield _escape(child.tail or "")
    yield f"</{name.localname}>"
