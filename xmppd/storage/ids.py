"""Row ids made by the node: 16 bytes that sort in the order in which this node made them."""

import secrets
import threading
from collections.abc import Callable
from typing import Final

from xmppd.storage.clock import clock

ID_BYTES: Final = 16
_COUNTER_LIMIT: Final = 1 << 24


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
        return millis.to_bytes(6, "big") + counter.to_bytes(3, "big") + secrets.token_bytes(7)


new_id = IdMaker()


def id_at(when: float) -> bytes:
    """An id as if it were made at that time, of which no two should be given the same millisecond."""
    return max(0, int(when * 1000)).to_bytes(6, "big") + secrets.token_bytes(ID_BYTES - 6)


def id_time(row_id: bytes) -> float:
    """When the id was made, in seconds since 1970 by the clock of the cluster."""
    return int.from_bytes(row_id[:6], "big") / 1000


def first_id(when: float) -> bytes:
    """What sorts in front of every id that is made from then on, and behind all that were made before."""
    return max(0, int(when * 1000)).to_bytes(6, "big") + bytes(ID_BYTES - 6)
