"""The time of the cluster, on which nodes agree whose own clocks do not: that of the database, which all of them ask.

It says which of two messages or sessions from different nodes is the newer one.
"""

import time
from collections.abc import Callable
from typing import Final

_STEP: Final = 0.001  # seconds: what the database says is cut to whole milliseconds


class Clock:
    """Seconds since 1970: this node's own until the database was asked, the database's from there on.

    A node whose wall clock is set meanwhile does not notice. While the database is away it goes on by itself.
    """

    def __init__(self, wall: Callable[[], float] = time.time, steady: Callable[[], float] = time.monotonic) -> None:
        self.steady = steady
        self._base = wall() - steady()
        self._asked = False

    def __call__(self) -> float:
        return self._base + self.steady()

    def ns(self) -> int:
        return int(self() * 1e9)

    def learn(self, now: float, asked_at: float) -> None:
        """The database has just said `now`, and was asked when `steady` said `asked_at`. A difference that may have
        been the way there and back changes nothing."""
        earliest, latest = now - self.steady(), now + _STEP - asked_at
        if not self._asked:
            self._asked = True
            self._base = (earliest + latest) / 2
        else:
            self._base = min(max(self._base, earliest), latest)


clock: Final = Clock()
