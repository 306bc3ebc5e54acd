"""What a message looks like to a web server: ejabberd's XML, or JSON. No I/O."""

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from lxml.etree import QName, _Element

from xmppd.protocol import ns
from xmppd.protocol.jid import JID
from xmppd.protocol.stanza import Stanza

XML_LANG: Final = "{http://www.w3.org/XML/1998/namespace}lang"
_LANGUAGE: Final = "en"  # ejabberd's own, which it writes where the client has not named one
_BODY: Final = f"{{{ns.CLIENT}}}body"
_SUBJECT: Final = f"{{{ns.CLIENT}}}subject"
_THREAD: Final = f"{{{ns.CLIENT}}}thread"
_OOB_URL: Final = "{jabber:x:oob}x/{jabber:x:oob}url"
_ORIGIN_ID: Final = f"{{{ns.STANZA_ID}}}origin-id"


@dataclass(slots=True)
class Message:
    """A message and what is known about it beside its own words."""

    stanza: Stanza
    element: _Element
    sender: JID
    recipient: JID
    to: str  # as the client has written it
    direction: str
    state: str
    at: float  # Unix time
    confidential: bool

    @property
    def from_(self) -> str:
        return self.element.get("from") or self.sender.full


def timestamp(at: float, between: str = " ") -> str:
    """`2026-11-21 09:00:00.123456Z`"""
    seconds, micros = divmod(round(at * 1_000_000), 1_000_000)
    return f"{_second(seconds, between)}.{micros:06}Z"


@lru_cache(maxsize=4)
def _second(seconds: int, between: str) -> str:
    return time.strftime(f"%Y-%m-%d{between}%H:%M:%S", time.gmtime(seconds))


def has_text(element: _Element) -> bool:
    """Whether a message has a body that is not empty."""
    return any(child.tag == _BODY and child.text for child in element)


# -- ejabberd's XML


def ejabberd_xml(message: Message) -> bytes:
    """The element as ejabberd 23.01 writes it: single quotes, its order of attributes and children, `from` and
    `xml:lang` always there, and of the message's own children the bodies, subjects and threads last."""
    element, hidden = message.element, message.confidential
    lang = element.get(XML_LANG) or _LANGUAGE
    head = f"<message xml:lang='{_escape(lang)}' to='{_escape(message.to)}' from='{_escape(message.from_)}'"
    for name in ("type", "id"):
        value = element.get(name)
        if value is not None:
            head += f" {name}='{_escape(value)}'"
    others: list[str] = []
    own: dict[str, list[str]] = {_BODY: [], _SUBJECT: [], _THREAD: []}
    for child in element:
        kind = own.get(child.tag)
        if kind is not None:
            if not hidden or child.tag == _BODY:
                kind.append(_own_child(child, hidden))
        elif not hidden:
            others.extend(_foreign(child, ns.CLIENT))
    parts = (head, " xmlns='jabber:client'>", *others, *own[_BODY], *own[_SUBJECT], *own[_THREAD], "</message>")
    return "".join(parts).encode()


def _own_child(child: _Element, hidden: bool) -> str:
    """A body, a subject or a thread."""
    name, text = child.tag.rpartition("}")[2], _text(child)
    attrs = ""
    if child.attrib:
        known = (("parent", child.get("parent")),) if name == "thread" else (("xml:lang", child.get(XML_LANG)),)
        attrs = _attributes({key: value for key, value in known if value is not None})
    if hidden:
        attrs += _attributes({key: str(value) for key, value in _hidden(text).items()})
        text = ""
    return f"<{name}{attrs}>{_escape(text)}</{name}>" if text else f"<{name}{attrs}/>"


def _escape(text: str) -> str:
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return text.replace('"', "&quot;").replace("'", "&apos;")


def _attributes(attrs: dict[str, str]) -> str:
    return "".join(f" {name}='{_escape(value)}'" for name, value in attrs.items())


def _text(element: _Element) -> str:
    """All text directly in it."""
    text = element.text or ""
    return text + "".join(child.tail or "" for child in element) if len(element) else text


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


# -- JSON


def json_object(message: Message, *, id: str, host: str, node: str) -> bytes:
    """One line of JSON, version 1; documented in docs/modules.md."""
    stanza, element, hidden = message.stanza, message.element, message.confidential
    origin = element.find(_ORIGIN_ID)
    bodies = {body.get(XML_LANG) or "": _text(body) for body in element.iterchildren(_BODY)}
    value: dict[str, Any] = {
        "v": 1,
        "id": id,
        "ts": timestamp(message.at, "T"),
        "kind": "message",
        "direction": message.direction,
        "host": host,
        "node": node,
        "type": stanza.type,
        "stanza_id": stanza.id or None,
        "origin_id": None if origin is None else origin.get("id"),
        "archive_id": None,
        "from": _address(message.sender),
        "to": _address(message.recipient),
        "body": {lang: _hidden(text) for lang, text in bodies.items()} if hidden else bodies,
        "thread": element.findtext(_THREAD),
        "oob": [] if hidden else [url.text or "" for url in element.iterfind(_OOB_URL)],
        "state": message.state,
        "xml": None if hidden else stanza.xml.decode(),
    }
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _address(jid: JID) -> dict[str, str | None]:
    return {"jid": jid.full, "user": jid.local or None, "host": jid.domain, "resource": jid.resource or None}


def _hidden(text: str) -> dict[str, str | int]:
    """What is told of a text that is confidential."""
    return {"length": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
