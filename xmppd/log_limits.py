"""How often the log may say the same thing: a client that repeats itself must not be able to fill the disk.

Each phrase has an allowance: so many lines at once, and as many again in a window of time. Past it lines are left out
and counted, and one line a window says how many. No I/O; the clock is handed in.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

_PHRASES: Final = 1000  # ours are fixed, and fewer; whatever libraries and plug-ins make up beyond it shares one


@dataclass(slots=True)
class _Allowance:
    tokens: float
    at: float
    left_out: int = 0
    since: float = 0.0  # the first of them


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Lines of one phrase that were not written."""

    phrase: str
    count: int
    seconds: int  # since the first of them


class LogLimits:
    """`count` lines of each phrase in `window` seconds."""

    def __init__(self, count: int, window: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.count = count
        self.window = window
        self._clock = clock
        self._phrases: dict[str, _Allowance] = {}
        self._due = float("inf")  # when there is something to tell

    def admit(self, phrase: str) -> bool:
        """Whether this line may be written; else it is counted."""
        now = self._clock()
        known = self._phrases
        allowance = known.get(phrase)
        if allowance is None:
            if len(known) >= _PHRASES:
                phrase = ""
            allowance = known.setdefault(phrase, _Allowance(self.count, now))
        tokens = allowance.tokens + (now - allowance.at) * self.count / self.window
        allowance.tokens = tokens = min(tokens, float(self.count))
        allowance.at = now
        if tokens >= 1:
            allowance.tokens -= 1
            return True
        if not allowance.left_out:
            allowance.since = now
            self._due = min(self._due, now + self.window)
        allowance.left_out += 1
        return False

    @property
    def due(self) -> bool:
        """Whether `left_out` has something that has waited for a window."""
        return self._clock() >= self._due

    def left_out(self, *, all: bool = False) -> list[LeftOut]:
        """What has not been told yet: where the first of it is a window old, or all."""
        now = self._clock()
        found = []
        self._due = float("inf")
        for phrase, allowance in self._phrases.items():
            if not allowance.left_out:
                continue
            if all or now - allowance.since >= self.window:
                found.append(LeftOut(phrase, allowance.left_out, round(now - allowance.since)))
                allowance.left_out = 0
            else:
                self._due = min(self._due, allowance.since + self.window)
        return found
