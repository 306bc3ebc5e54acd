"""Which messages are answered by the server, and how. No I/O."""

import secrets
from collections.abc import Iterable
from typing import Final, Literal
from xml.sax.saxutils import escape

from lxml.etree import QName, _Element

from xmppd.errors import JidError
from xmppd.protocol import ns
from xmppd.protocol.jid import JID, make
from xmppd.protocol.stanza import Stanza, attributes, build

Style = Literal["received", "p1", "xep0022", "marked", "none"]
When = Literal["stored", "accepted", "bounced"]

_SPACE: Final = ns.RECEIPTS.encode()
_EVENTS: Final = ns.MESSAGE_EVENTS.encode()
_OFFLINE: Final = f"{{{ns.MESSAGE_EVENTS}}}offline"
_NO_STORE: Final = ("no-store", "no-storage", "no-permanent-store")
_HINTS: Final = f'<no-store xmlns="{ns.HINTS}"/><no-copy xmlns="{ns.HINTS}"/>'
_STATES: Final[dict[When, str]] = {"stored": "stored-offline", "accepted": "accepted", "bounced": "bounced"}
_P1: Final[dict[When, str]] = {"stored": "offline", "accepted": "on-sender-server"}
_WORDS: Final = frozenset({ns.RECEIPTS, ns.DELIVERY})


def may_ask(stanza: Stanza) -> bool:
    """A quick look: False when the message certainly asks for no receipt."""
    return _SPACE in stanza.xml


def asks(message: Stanza) -> bool:
    """Whether its sender's client waits for a receipt: it asks for one, under an id, and the message is itself none."""
    return (
        may_ask(message)
        and message.kind == "message"
        and message.type != "error"
        and bool(message.id.strip())
        and message.child(ns.RECEIPTS, "request") is not None
        and message.child(ns.RECEIPTS, "received") is None
    )


def answered(message: Stanza, types: Iterable[str], style: Style) -> bool:
    """Whether the server may answer it in that style: also no carbon, forwarded copy or replay, and not one that says
    that it is not to be kept."""
    return (
        message.type in types
        and (asks(message) or (style == "xep0022" and _wants_event(message)))
        and message.child(ns.CARBONS) is None
        and message.child(ns.FORWARD, "forwarded") is None
        and not any(message.child(ns.HINTS, name) is not None for name in _NO_STORE)
    )


def _wants_event(message: Stanza) -> bool:
    """Whether it asks to be told when it is stored (XEP-0022 3.1); with an <id/> it would be the answer."""
    event = message.child(ns.MESSAGE_EVENTS, "x") if _EVENTS in message.xml else None
    return (
        event is not None
        and message.type != "error"
        and bool(message.id.strip())
        and event.find(_OFFLINE) is not None
        and event.find(f"{{{ns.MESSAGE_EVENTS}}}id") is None
    )


def names(message: Stanza, namespace: str, name: str) -> str:
    """The id that a receipt (XEP-0184) or a marker (XEP-0333) is about; "" when it is none."""
    element = None if message.type == "error" else message.child(namespace, name)
    return "" if element is None else element.get("id") or ""


def is_receipt_of_ours(message: Stanza) -> bool:
    """Whether it looks like what `receipt` makes: nothing that anybody would miss."""
    said = [child for child in message.children if QName(child).namespace != ns.HINTS]
    return message.child(ns.HINTS, "no-store") is not None and bool(said) and all(map(_is_word, said))


def _is_word(element: _Element) -> bool:
    namespace = QName(element).namespace
    return namespace in _WORDS or (namespace == ns.MESSAGE_EVENTS and element.find(_OFFLINE) is not None)


def receipt(
    message: Stanza, user: JID, style: Style, when: When, *, from_: str, stamp: str, reason: str = ""
) -> Stanza | None:
    """The answer in one style, to the full JID of the message's sender; None where the style has no word for it.
    `from_`: `bare`, `full` (as the message was addressed), or `prefix:` and what comes before the recipient's domain.
    """
    assert message.from_ is not None
    inner = _inner(style, when, message.id, user.domain, stamp, reason)
    sender = _sender(message, user, from_)
    if not inner or sender is None:
        return None
    attrs = {
        "type": message.type,
        "id": f"receipt-{secrets.token_hex(8)}",
        "to": message.from_.full,
        "from": sender.full,
    }
    return build("message", attrs, f"{inner}{_HINTS}".encode())


def _sender(message: Stanza, user: JID, from_: str) -> JID | None:
    to = message.to if message.to is not None else user
    if from_ == "full":
        return to
    if not from_.startswith("prefix:"):
        return user
    try:
        return make(user.local, from_.removeprefix("prefix:") + user.domain, to.resource)
    except JidError:
        return None


def _inner(style: Style, when: When, id: str, server: str, stamp: str, reason: str) -> str:
    received = f"<received{attributes({'xmlns': ns.RECEIPTS, 'id': id})}/>"
    if style == "received":
        return received
    if style == "marked":
        state = {"xmlns": ns.DELIVERY, "value": _STATES[when], "stamp": stamp, "reason": reason or None}
        return f"{received}<state{attributes(state)}/>"
    if style == "p1" and when in _P1:
        return f"<{_P1[when]}{attributes({'xmlns': ns.RECEIPTS, 'server': server, 'id': id})}/>"
    if style == "xep0022" and when == "stored":
        text = attributes({"xmlns": ns.MESSAGE_EVENTS})
        return f"<x{text}><offline/><id>{escape(id)}</id></x>"
    return ""
