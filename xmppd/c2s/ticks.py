"""What all connections of a node share of one tick of the event loop: time for reading, and the writing.

Whoever sends much at once must not keep the loop from everybody else. A connection that has read more than a slice puts
it by and queues here; a tick deals with slices, one of each connection in turn, until its time is up. Then the loop
looks at its sockets again, where those are served who have a word to say.
"""

import asyncio
import time
from collections import deque
from typing import Final, Protocol

_BUDGET: Final = 0.002  # seconds of a tick for slices


class Reader(Protocol):
    """A connection that has put by what it read."""

    def take_turn(self) -> bool:
        """Deal with a slice. Whether there is more that could be dealt with now; else it queues again when it can."""
        ...


class Writer(Protocol):
    """A connection with bytes to write."""

    def flush(self) -> None: ...


class Ticks:
    """One per node."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._dirty: list[Writer] = []
        self._readers: deque[Reader] = deque()
        self._until = 0.0

    def mark(self, connection: Writer) -> None:
        """This connection has bytes to write: all of this tick leave at once."""
        if not self._dirty:
            self._loop.call_soon(self._flush)
        self._dirty.append(connection)

    def _flush(self) -> None:
        dirty, self._dirty = self._dirty, []
        for connection in dirty:
            connection.flush()

    def queue(self, connection: Reader) -> None:
        """This connection has put something by. Once, until `take_turn` has said that there is no more."""
        if not self._readers:
            self._loop.call_soon(self._take_turns)
        self._readers.append(connection)

    def end_turns(self) -> None:
        """What this connection has begun takes all that is left of this tick."""
        self._until = 0.0

    def _take_turns(self) -> None:
        readers = self._readers
        self._until = time.monotonic() + _BUDGET
        while readers:
            connection = readers[0]
            if connection.take_turn():
                readers.append(connection)
            readers.popleft()  # last: who queues meanwhile must see that we are at it
            if readers and time.monotonic() >= self._until:
                self._loop.call_soon(self._take_turns)
                return
