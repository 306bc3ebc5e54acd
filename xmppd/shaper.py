"""How fast a stream may send: a token bucket. No I/O; the clock is handed in."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ShaperLimits:
    """`rate` bytes a second, `burst` bytes at once after a pause; both at least 1."""

    rate: float
    burst: float


class TokenBucket:
    """Full at first. It may be overdrawn (what has been read is there), and must then be given time to recover."""

    __slots__ = ("_at", "_tokens", "limits")

    def __init__(self, limits: ShaperLimits, now: float) -> None:
        self.limits = limits
        self._tokens = limits.burst
        self._at = now

    def take(self, amount: int, now: float) -> float:
        """So many bytes were read at `now` (seconds, of a clock that never goes back). The seconds until the next
        ones may be read: 0 while there are tokens."""
        limits = self.limits
        tokens = self._tokens + (now - self._at) * limits.rate
        if tokens > limits.burst:
            tokens = limits.burst
        self._tokens = tokens = tokens - amount
        self._at = now
        return 0.0 if tokens >= 0 else -tokens / limits.rate
