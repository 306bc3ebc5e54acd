"""A message as a web server gets it: one line of JSON of our own. Its form is in docs/modules.md; no I/O."""

import json
from dataclasses import dataclass
from typing import Any, Final

from lxml.etree import _Element

from xmppd.protocol import ns
from xmppd.protocol.jid import JID
from xmppd.protocol.stanza import Stanza
from xmppd.sender.forms import XML_LANG, hidden, text_of, timestamp

_ENCODER: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))  # `dumps` would make one each time
_BODY: Final = f"{{{ns.CLIENT}}}body"
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

    @property
    def bodies(self) -> dict[str, str]:
        """By language, "" where none is named."""
        return {body.get(XML_LANG) or "": text_of(body) for body in self.element.iterchildren(_BODY)}

    @property
    def text(self) -> str:
        """One body: that without a language, or else the first."""
        bodies = self.bodies
        return bodies.get("") or next(iter(bodies.values()), "")

    @property
    def urls(self) -> list[str]:
        """What is sent along with it (XEP-0066)."""
        return [url.text or "" for url in self.element.iterfind(_OOB_URL)]

    @property
    def origin_id(self) -> str | None:
        origin = self.element.find(_ORIGIN_ID)
        return None if origin is None else origin.get("id")


def json_object(message: Message, *, id: str, host: str, node: str) -> bytes:
    """One line of JSON, version 1. `id`: that of the event; `host`: whose message it is; `node`: a label."""
    stanza, confidential = message.stanza, message.confidential
    bodies = message.bodies
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
        "origin_id": message.origin_id,
        "archive_id": None,
        "from": _address(message.sender),
        "to": _address(message.recipient),
        "body": {lang: hidden(text) for lang, text in bodies.items()} if confidential else bodies,
        "thread": message.element.findtext(_THREAD),
        "oob": [] if confidential else message.urls,
        "state": message.state,
        "xml": None if confidential else stanza.xml.decode(),
    }
    return to_json(value)


def to_json(value: object) -> bytes:
    """Compact, and not only ASCII."""
    return _ENCODER.encode(value).encode()


def _address(jid: JID) -> dict[str, str | None]:
    return {"jid": jid.full, "user": jid.local or None, "host": jid.domain, "resource": jid.resource or None}
