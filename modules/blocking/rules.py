"""Whom a block list matches, and what becomes of a stanza that it stops. No I/O."""

from typing import Final

from xmppd.errors import StanzaError
from xmppd.protocol import ns
from xmppd.protocol.jid import JID
from xmppd.protocol.stanza import Stanza

_BLOCKED: Final = f"<blocked xmlns='{ns.BLOCKING_ERRORS}'/>".encode()
_WITHOUT_ERROR: Final = frozenset({"groupchat", "headline", "error"})


class BlockedJids:
    """A user's block list: addresses as text. Fulfils module_api.Blocklist."""

    __slots__ = ("_user", "items")

    def __init__(self, user: JID, items: frozenset[str]) -> None:
        self._user = user
        self.items = items

    def __bool__(self) -> bool:
        return bool(self.items)

    def blocks(self, other: JID) -> bool:
        """XEP-0191 section 5: that resource, that user or room, that domain with all in it."""
        items = self.items
        if other.bare not in items and other.domain not in items and other.full not in items:
            return False
        return not exempt(self._user, other)


def exempt(user: JID, other: JID) -> bool:
    """The user's own account (XEP-0191 section 4), and the host itself, on whose answers the user's client depends: a
    user who blocks the own domain blocks the other users of it."""
    return other.bare == user.bare or (not other.local and other.domain == user.domain)


def outgoing(stanza: Stanza) -> StanzaError:
    """What a user is told who sends to somebody blocked (XEP-0191 3.3)."""
    who = stanza.to.bare if stanza.to is not None else ""
    return StanzaError("not-acceptable", f"you have blocked {who}", type="cancel", application=_BLOCKED)


def incoming(stanza: Stanza) -> StanzaError | None:
    """What somebody is told who is blocked: what they would be told about a user who is not there. None: nothing."""
    if stanza.kind == "presence":
        return None
    if stanza.kind == "message":
        if stanza.type in _WITHOUT_ERROR:
            return None
        if stanza.child(ns.MUC_USER) is not None or stanza.child(ns.CONFERENCE) is not None:
            return None  # a room must not take an invitation that is refused for a person who is not there
    return StanzaError("service-unavailable")


def unknown() -> StanzaError:
    """Nobody knows whether it may pass."""
    return StanzaError("internal-server-error", "the block list cannot be read now", type="wait")
