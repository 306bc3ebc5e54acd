"""Row ids made by the node: 16 bytes that sort in the order in which this node made them."""

import itertools
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from typing import Final

from xmppd.storage.clock import Clock, clock

ID_BYTES: Final = 16
_COUNTER_LIMIT: Final = 1 << 24
_PLACE_BITS: Final = 20  # of a place, below the milliseconds
_ID_BITS: Final = 24  # of an id, below the milliseconds and above the random part
_RANDOM_BYTES: Final = 7  # of an id
_RANDOM_AT_ONCE: Final = 128  # ids
_FRESH: Final = 0.001  # seconds for which places count on from one look at the clock


class _Random:
    """The random part of ids. One call of the system for many: that takes longer than all the rest."""

    def __init__(self) -> None:
        self._some: list[bytes] = []
        os.register_at_fork(after_in_child=self._some.clear)

    def __call__(self) -> bytes:
        try:
            return self._some.pop()  # a worker thread may do the same
        except IndexError:
            many = secrets.token_bytes(_RANDOM_BYTES * _RANDOM_AT_ONCE)
            self._some += [many[at : at + _RANDOM_BYTES] for at in range(_RANDOM_BYTES, len(many), _RANDOM_BYTES)]
            return many[:_RANDOM_BYTES]


_random = _Random()


class IdMaker:
    """48 bits of milliseconds since 1970, a 24-bit counter within the millisecond, 56 random bits.

    Ids of one maker rise strictly, also when the clock is set back: the last millisecond then goes on until the clock
    has caught up. Ids of several nodes differ by their random part, and are in order as far as these agree on the time
    (clock.py).
    """

    def __init__(self, clock: Callable[[], float] = clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()  # ids may be asked for by a worker thread
        self._millis = 0
        self._counter = 0

    def __call__(self) -> bytes:
        now = int(self._clock() * 1000)
        with self._lock:
            if now > self._millis:
                self._millis, self._counter = now, 0
            else:
                self._counter += 1
                if self._counter == _COUNTER_LIMIT:
                    self._millis, self._counter = self._millis + 1, 0
            millis, counter = self._millis, self._counter
        return millis.to_bytes(6, "big") + counter.to_bytes(3, "big") + _random()


new_id = IdMaker()


class Places:
    """Places in the order in which stanzas come in, whatever becomes of each and when: integers that rise strictly, the
    milliseconds since 1970 by the clock of the cluster above 20 bits that count. `id_of` makes the id of a row of one.

    There is one for each message, so that has to be cheap: the clock is looked at once a millisecond.
    """

    __slots__ = ("_clock", "_count", "_due")

    def __init__(self, clock: Clock = clock) -> None:
        self._clock = clock
        self._due = 0.0
        self._count: Iterator[int] = itertools.count(1)

    def __call__(self) -> int:
        if (now := self._clock.steady()) >= self._due:
            self._due = now + _FRESH
            first = int(self._clock() * 1000) << _PLACE_BITS
            self._count = itertools.count(max(first, next(self._count)))
        return next(self._count)


next_place = Places()


def id_of(place: int) -> bytes:
    """An id that sorts by the place, and among those that `new_id` made at that time. Two of one place differ."""
    return (place << _ID_BITS - _PLACE_BITS).to_bytes(9, "big") + _random()


def place_of(row_id: bytes) -> int:
    """The place whose id that is; of one that `new_id` made, about the same."""
    return int.from_bytes(row_id[:9], "big") >> _ID_BITS - _PLACE_BITS


def id_at(when: float) -> bytes:
    """An id as if it were made at that time, of which no two should be given the same millisecond."""
    return max(0, int(when * 1000)).to_bytes(6, "big") + secrets.token_bytes(ID_BYTES - 6)


def id_time(row_id: bytes) -> float:
    """When the id was made, in seconds since 1970 by the clock of the cluster."""
    return int.from_bytes(row_id[:6], "big") / 1000


def first_id(when: float) -> bytes:
    """What sorts in front of every id that is made from then on, and behind all that were made before."""
    return max(0, int(when * 1000)).to_bytes(6, "big") + bytes(ID_BYTES - 6)
