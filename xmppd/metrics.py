"""Numbers about the running node, counted where things happen and read when somebody asks (http/metrics_page.py).

What is counted per stanza or connection is a plain int attribute, incremented in place: no lock, no label look-up, no
call into a metrics library. Label values come from fixed sets (conditions, mechanisms, kinds), never from a peer.
"""

import asyncio
from bisect import bisect_left
from collections.abc import Sequence
from enum import Enum
from typing import Final, Protocol

KINDS: Final = ("message", "presence", "iq")
_LAG_PERIOD: Final = 0.5  # seconds between two looks at the event loop


class Queue(Protocol):
    """A connection whose peer takes its bytes too slowly."""

    def queued(self) -> int:
        """Bytes that wait in this process."""
        ...


class StanzaCount:
    """Stanzas of one kind: what clients sent, what became of it, what was written to clients."""

    __slots__ = ("error", "received", "safe", "sent", "settle")

    def __init__(self) -> None:
        self.received = 0
        self.safe = 0
        self.error = 0  # the sender was told
        self.sent = 0
        self.settle = self.settled  # bound once, and not for each stanza that waits for its outcome

    @property
    def pending(self) -> int:
        """Received, and not yet known to be safe or refused."""
        return self.received - self.safe - self.error

    def settled(self, result: Enum) -> None:
        """The outcome (delivery.Settled) of a stanza that was received before."""
        if result._value_ == "safe":  # `.value` is a descriptor, several times slower
            self.safe += 1
        else:
            self.error += 1


class Histogram:
    """How often a value fell into each of a few buckets; `bounds` are their upper ends, ascending."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value; a value on a bound belongs below it."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def buckets(self) -> list[tuple[str, float]]:
        """(upper end, how many were at or below it), the last one `+Inf`, as Prometheus wants them."""
        found, total = [], 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            total += count
            found.append((bound, float(total)))
        return found


class Counters:
    """What the streams of one node count."""

    __slots__ = (
        "accepted",
        "cut_off",
        "given_back",
        "login_failures",
        "logins",
        "open",
        "proxies_refused",
        "refused",
        "silent",
        "stalled",
        "stanza_errors",
        "stanzas",
        "stream_errors",
        "tls_failures",
    )

    def __init__(self) -> None:
        self.stanzas = {kind: StanzaCount() for kind in KINDS}
        self.accepted = 0  # connections
        self.open = 0  # connections of clients now
        self.refused = 0  # connections there was no room for
        self.proxies_refused: dict[str, int] = {}  # without a PROXY header of a trusted balancer, by reason
        self.cut_off = 0  # connections of peers that read too slowly
        self.given_back = 0  # times that freed memory was given back to the system
        self.tls_failures = 0
        self.silent = 0  # connections that ended without ever having begun a stream in time
        self.logins: dict[str, int] = {}  # by mechanism
        self.login_failures: dict[str, int] = {}  # by SASL condition, or `limited`
        self.stream_errors: dict[str, int] = {}  # by condition, sent by us
        self.stanza_errors: dict[str, int] = {}  # by condition, sent by us
        self.stalled: set[Queue] = set()


def add(counts: dict[str, int], name: str) -> None:
    """One more of this name."""
    counts[name] = counts.get(name, 0) + 1


class LoopLag:
    """How late the event loop gets to what is due: everything a client waits for is late by as much."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.histogram = Histogram((0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0))
        self.last = 0.0
        self._loop = loop
        self._due = loop.time() + _LAG_PERIOD
        self._timer: asyncio.TimerHandle | None = loop.call_at(self._due, self._look)

    def _look(self) -> None:
        now = self._loop.time()
        self.last = max(0.0, now - self._due)
        self.histogram.observe(self.last)
        self._due = now + _LAG_PERIOD
        self._timer = self._loop.call_at(self._due, self._look)

    def stop(self) -> None:
        """No more looks."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
