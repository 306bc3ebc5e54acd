"""Who has written lately: what they read next must have it, so a replica is not asked."""

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final

_REMEMBERED: Final = 100_000

User = tuple[str, str]  # server_host, username


class RecentWrites:
    """Users whose rows were written on this node within the last `window` seconds.

    With more of them than there is room for, the oldest are forgotten, and nobody is believed until their time is over.
    """

    def __init__(self, window: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._window = window
        self._clock = clock
        self._until: OrderedDict[User, float] = OrderedDict()
        self._everybody_until = 0.0

    def note(self, user: User) -> None:
        """Something of this user was committed."""
        self._until[user] = self._clock() + self._window
        self._until.move_to_end(user)
        if len(self._until) > _REMEMBERED:
            self._everybody_until = self._until.popitem(last=False)[1]

    def may_read_late(self, key: Any) -> bool:
        """Whether a replica has what this user has written; `key` begins with host and user name."""
        now = self._clock()
        until = self._until.get((key[0], key[1]))
        if until is not None and until > now:
            return False
        if until is not None:
            del self._until[key[0], key[1]]
        return now >= self._everybody_until
