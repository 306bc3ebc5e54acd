"""What absent users said last: their last unavailable presence, while this node runs and not of too many."""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, Final

from xmppd.protocol.jid import JID
from xmppd.protocol.stanza import Stanza

_USERS: Final = 10_000
_SIZE: Final = 1024  # bytes; a longer one is not kept

Last = tuple[Stanza, float]  # the presence, and when it came, in seconds since 1970


class LastKnown:
    """By user."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._last: OrderedDict[str, Last] = OrderedDict()

    def remember(self, user: JID, presence: Stanza) -> None:
        if len(presence.xml) <= _SIZE:
            self._last[user.bare] = (presence, self._clock())
            self._last.move_to_end(user.bare)
            if len(self._last) > _USERS:
                self._last.popitem(last=False)

    def forget(self, user: JID) -> None:
        self._last.pop(user.bare, None)

    def told(self, user: str) -> list[Any] | None:
        """As other nodes are told: [when, presence]."""
        last = self._last.get(user)
        return None if last is None else [last[1], last[0].xml.decode()]

    def newest(self, user: JID, heard: Iterable[list[Any] | None]) -> Last | None:
        """Of what is known here and what other nodes told."""
        found = [(Stanza.from_bytes(told[1].encode()), told[0]) for told in heard if told is not None]
        if user.bare in self._last:
            found.append(self._last[user.bare])
        return max(found, key=lambda last: last[1], default=None)
