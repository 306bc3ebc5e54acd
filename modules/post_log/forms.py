"""What a message looks like to a web server: ejabberd's XML, or JSON. No I/O."""

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
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
_KNOWN: Final = (_BODY, _SUBJECT, _THREAD)
_OOB_URL: Final = "{jabber:x:oob}x/{jabber:x:oob}url"
_ORIGIN_ID: Final = f"{{{ns.STANZA_ID}}}origin-id"
_ESCAPES: Final = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&apos;"})


@dataclass(frozen=True, slots=True)
class Message:
    """A message and what is known about it beside its own words."""

    stanza: Stanza
    sender: JID
    recipient: JID
    to: str  # as the client has written it
    direction: str
    state: str
    at: float  # Unix time
    confidential: bool

    @property
    def from_(self) -> str:
        return self.stanza.element.get("from") or self.sender.full


def timestamp(at: float, between: str = " ") -> str:
    """`2026-11-21 09:00:00.123456Z`"""
    micros = round(at * 1_000_000)
    return f"{time.strftime(f'%Y-%m-%d{between}%H:%M:%S', time.gmtime(micros // 1_000_000))}.{micros % 1_000_000:06}Z"


def has_text(stanza: Stanza) -> bool:
    """Whether there is a body that is not empty."""
    return any(body.text for body in stanza.element.iterchildren(_BODY))


# -- ejabberd's XML


def ejabberd_xml(message: Message) -> bytes:
    """The element as ejabberd 23.01 writes it: single quotes, its order of attributes and children, `from` and
    `xml:lang` always there, and of the message's own children the bodies, subjects and threads last."""
    element = message.stanza.element
    attrs = {
        "xml:lang": element.get(XML_LANG) or _LANGUAGE,
        "to": message.to,
        "from": message.from_,
        "type": element.get("type"),
        "id": element.get("id"),
        "xmlns": ns.CLIENT,
    }
    parts = ["<message", _attributes(attrs), ">"]
    if not message.confidential:
        for child in element.iterchildren(tag="*"):
            if child.tag not in _KNOWN:
                parts += _foreign(child, ns.CLIENT)
    for body in element.iterchildren(_BODY):
        own: dict[str, str | None] = {"xml:lang": body.get(XML_LANG)}
        if message.confidential:
            own |= {name: str(value) for name, value in _hidden(_text(body)).items()}
        parts.append(_with_text("body", own, "" if message.confidential else _text(body)))
    if not message.confidential:
        for subject in element.iterchildren(_SUBJECT):
            parts.append(_with_text("subject", {"xml:lang": subject.get(XML_LANG)}, _text(subject)))
        for thread in element.iterchildren(_THREAD):
            parts.append(_with_text("thread", {"parent": thread.get("parent")}, _text(thread)))
    parts.append("</message>")
    return "".join(parts).encode()


def _attributes(attrs: dict[str, str | None]) -> str:
    return "".join(f" {name}='{value.translate(_ESCAPES)}'" for name, value in attrs.items() if value is not None)


def _with_text(name: str, attrs: dict[str, str | None], text: str) -> str:
    head = f"<{name}{_attributes(attrs)}"
    return f"{head}>{text.translate(_ESCAPES)}</{name}>" if text else f"{head}/>"


def _text(element: _Element) -> str:
    """All text directly in it."""
    return (element.text or "") + "".join(child.tail or "" for child in element)


def _foreign(element: _Element, outer: str) -> Iterator[str]:
    """An element of somebody else's, whose surroundings are in the namespace `outer`; prefixes of names go."""
    name = QName(element)
    own = name.namespace or ""
    attrs: dict[str, str | None] = {"xmlns": own} if own != outer else {}
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
    yield (element.text or "").translate(_ESCAPES)
    for child in element:
        if isinstance(child.tag, str):
            yield from _foreign(child, own)
        yield (child.tail or "").translate(_ESCAPES)
    yield f"</{name.localname}>"


# -- JSON


def json_object(message: Message, *, id: str, host: str, node: str) -> bytes:
    """One line of JSON, version 1; documented in docs/modules.md."""
    stanza, element, hidden = message.stanza, message.stanza.element, message.confidential
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
