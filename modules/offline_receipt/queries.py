"""The IQ with which users ask what became of their own messages; docs/offline_receipt.md shows it. No I/O."""

import time
from collections.abc import Iterable
from datetime import datetime
from typing import Final
from xml.sax.saxutils import escape

from lxml.etree import _Element

from xmppd.errors import JidError, StanzaError
from xmppd.protocol import ns
from xmppd.protocol.jid import JID, parse
from xmppd.protocol.stanza import attributes

from .states import Key, State, key_of

AT_ONCE: Final = 100  # messages in one request or answer
_MESSAGE: Final = f"{{{ns.DELIVERY}}}message"
_SHOWN: Final = {  # times, by the names they have in answers
    "accepted_at": "accepted",
    "stored_at": "stored-offline",
    "sent_at": "sent",
    "acknowledged_at": "acknowledged",
    "received_at": "received",
    "displayed_at": "displayed",
    "bounced_at": "bounced",
    "removed_at": "removed",
}


def asked_for(query: _Element, sender: JID) -> list[Key]:
    """The messages that a request names. StanzaError."""
    found = []
    for item in query.iterchildren(_MESSAGE):
        try:
            recipient = parse(item.get("to") or "")
        except JidError as exc:
            raise StanzaError("jid-malformed", str(exc)) from exc
        key = key_of(sender, recipient, item.get("id") or "")
        if key is None:
            raise StanzaError("bad-request", "a message has an id")
        found.append(key)
    if len(found) > AT_ONCE:
        raise StanzaError("policy-violation", f"at most {AT_ONCE} messages at once")
    return found


def since(query: _Element) -> float | None:
    """From when on, in seconds since 1970; None where the request does not say. StanzaError."""
    text = query.get("since")
    if text is None:
        return None
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        raise StanzaError("bad-request", "since: expected a time such as 2026-11-21T09:00:00Z") from None
    if when.tzinfo is None:
        raise StanzaError("bad-request", "since: expected a time with a zone")
    return when.timestamp()


def answer(states: Iterable[State], go_on: float | None = None) -> bytes:
    """The payload of a result; `go_on`: since when there is more."""
    items = []
    for state in states:
        attrs = {
            "to": state.recipient,
            "id": state.id,
            "state": state.state,
            "stamp": stamp(state.at),
            "reason": state.reason or None,
        }
        times = "".join(
            f"<{name}>{escape(stamp(state.times[column]))}</{name}>"
            for column, name in _SHOWN.items()
            if column in state.times
        )
        items.append(f"<message{attributes(attrs)}>{times}</message>")
    attrs = {"xmlns": ns.DELIVERY, "next": None if go_on is None else stamp(go_on)}
    return f"<query{attributes(attrs)}>{''.join(items)}</query>".encode()


def stamp(when: float) -> str:
    """A XEP-0082 date and time in UTC, with milliseconds."""
    seconds, millis = divmod(round(when * 1000), 1000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{millis:03}Z"
