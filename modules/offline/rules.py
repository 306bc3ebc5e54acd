"""Which messages are kept for an absent user, for how long, and what tells one from its repetition. No I/O.

The rules are O-1 to O-13 of the delivery rules, in their order.
"""

import hashlib
import time
from enum import Enum
from functools import lru_cache
from typing import Final, Literal

from lxml.etree import QName

from xmppd.protocol import ns
from xmppd.protocol.jid import JID
from xmppd.protocol.stanza import Stanza, delay_element

REASON: Final = "Offline Storage"
LONGEST: Final = 10 * 365 * 86400  # seconds; whoever asks for more asks for "never"

# What says nothing by itself: a message of these and a chat state is still only a chat state.
_SILENT_SPACES: Final = frozenset({ns.HINTS, ns.DELAY, ns.STANZA_ID})
_THREAD: Final = f"{{{ns.CLIENT}}}thread"

EmptyBody = bool | Literal["unless_chat_state"]


class Verdict(Enum):
    """What becomes of a message nobody is there to take."""

    KEEP = "keep"
    REFUSE = "refuse"  # its sender is told
    DROP = "drop"  # nobody is told: a client shows an error for a chat state as a message that failed


def judge(message: Stanza, store_empty_body: EmptyBody) -> Verdict:
    """Keep it or not (O-1 to O-8, O-11)."""
    if message.type in ("error", "groupchat", "headline"):
        return Verdict.REFUSE
    if message.child(ns.OFFLINE) is not None:
        return Verdict.REFUSE
    if message.names(ns.HINTS):
        if message.child(ns.HINTS, "store") is not None:
            return Verdict.KEEP
        if message.child(ns.HINTS, "no-store") is not None or message.child(ns.HINTS, "no-storage") is not None:
            return _not_kept(message)
    if message.has_body:
        return Verdict.KEEP
    event = message.child(ns.MESSAGE_EVENTS)
    if event is not None and event.find(f"{{{ns.MESSAGE_EVENTS}}}id") is not None:
        return Verdict.DROP  # "is composing", or no longer: news that are old when they are read
    if store_empty_body is True or (store_empty_body == "unless_chat_state" and not _says_only(message, ns.CHATSTATES)):
        return Verdict.KEEP
    return _not_kept(message)


def _not_kept(message: Stanza) -> Verdict:
    return Verdict.DROP if _says_only(message, ns.CHATSTATES, ns.RECEIPTS) else Verdict.REFUSE


def _says_only(message: Stanza, *namespaces: str) -> bool:
    """Whether what a message says is in these namespaces, a word at least."""
    said = False
    for child in message.children:
        namespace = QName(child).namespace
        if namespace in namespaces:
            said = True
        elif namespace not in _SILENT_SPACES and child.tag != _THREAD:
            return False
    return said


def expiry(message: Stanza, now: float) -> float | None:
    """When the message is no longer worth delivering (jabber:x:expire), in seconds since 1970; None: never."""
    asked = message.child(ns.EXPIRE, "x")
    text = "" if asked is None else asked.get("seconds") or ""
    if not (text.isascii() and text.isdigit() and len(text) < 12):
        return None
    seconds = int(text)
    return now + seconds if seconds <= LONGEST else None


def repetition_key(message: Stanza, user: JID) -> bytes | None:
    """The same for a message that is sent again: sender, recipient, id, content. None where it has no id (XEP-0359)."""
    origin = message.child(ns.STANZA_ID, "origin-id")
    sent_as = (origin.get("id") if origin is not None else None) or message.id
    if not sent_as:
        return None
    told = f"{sender_of(message)}\0{user.bare}\0{sent_as}\0".encode()
    return hashlib.sha256(told + message.inner).digest()


def sender_of(message: Stanza) -> str:
    """The bare JID of the sender."""
    return message.from_.bare if message.from_ is not None else ""


@lru_cache(maxsize=64)
def delay_in(second: int, host: str) -> bytes:
    """The stamp of what is stored in that second, with %03d for the milliseconds: many are stored in each."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
    before, _, behind = delay_element(f"{stamp}.000Z", host, REASON).rpartition(b"000Z")
    return before.replace(b"%", b"%%") + b"%03dZ" + behind.replace(b"%", b"%%")


def bears_our_stamp(message: Stanza) -> bool:
    """Whether it seems to come out of the offline storage; a sender may have written that too."""
    return message.names(ns.DELAY) and any(
        child.get("from") == (message.to.domain if message.to else None) and child.text == REASON
        for child in message.element.iterchildren(f"{{{ns.DELAY}}}delay")
    )
