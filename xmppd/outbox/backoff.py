"""When to try again: waits that grow, and a breaker that spares a sink which is down. No clock of their own."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Retry:
    """Seconds. `give_up_after` counts from the event's making."""

    base: float = 1.0
    factor: float = 2.0
    max: float = 900.0
    jitter: Literal["full", "none"] = "full"
    give_up_after: float = 259200.0

    def wait(self, attempts: int, *, chance: Callable[[], float] = random.random) -> float:
        """After so many attempts; with full jitter anything up to that, so that many do not come at once."""
        longest = min(self.max, self.base * self.factor ** min(attempts - 1, 64))
        return longest * (chance() if self.jitter == "full" else 1.0)


class Breaker:
    """Closed: everything goes. Open after `open_after` failures in a row: one request every `probe_every` seconds."""

    def __init__(self, open_after: int, probe_every: float) -> None:
        self._open_after = open_after
        self._probe_every = probe_every
        self._failures = 0
        self._next_probe = 0.0
        self._probing = False

    @property
    def is_open(self) -> bool:
        return self._failures >= self._open_after

    @property
    def is_well(self) -> bool:
        """The last request succeeded, or there was none."""
        return not self._failures

    def wait(self, now: float) -> float | None:
        """Seconds until a request may go; None: not before the one under way has ended."""
        if not self.is_open:
            return 0.0
        return None if self._probing else max(0.0, self._next_probe - now)

    def begin(self) -> None:
        """A request goes."""
        self._probing = self.is_open

    def succeeded(self) -> bool:
        """Whether it was open until now."""
        was_open = self.is_open
        self._failures, self._probing = 0, False
        return was_open

    def forget(self) -> None:
        """Nobody knows how the request that was under way has ended."""
        self._probing = False

    def failed(self, now: float, *, not_before: float = 0.0) -> bool:
        """`not_before`: seconds the sink has asked for. Whether it has opened by this."""
        self._failures += 1
        self._probing = False
        if not self.is_open:
            return False
        self._next_probe = now + max(self._probe_every, not_before)
        return self._failures == self._open_after
