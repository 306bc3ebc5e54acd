"""What of the events in memory goes into the database: rows of those that do not arrive in a moment, and their ends."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from xmppd.errors import StorageError
from xmppd.log import get_logger
from xmppd.outbox.line import Item
from xmppd.outbox.rows import DEAD, DONE, MARK, PENDING, PUT, Mark, Put
from xmppd.outbox.runner import Runner
from xmppd.storage.batcher import Batcher

log = get_logger("outbox")

_SOON: Final = 0.02  # seconds: an event that is not on its way when it is between this and twice this old is written
_LATE: Final = 0.5  # seconds: the same of one that is on its way
_MARKS: Final = 500  # at once
_UNMARKED: Final = 100_000  # marks that wait for the database; past it events may be sent once more


class Writing:
    """`holder` gives the runner of a sink, which has its events in memory."""

    def __init__(self, batcher: Batcher, holder: Callable[[str], Runner | None]) -> None:
        self._batcher = batcher
        self._holder = holder
        self._soon = _Ripening(lambda: _SOON, self._write_unless_handed)
        self._late = _Ripening(lambda: _LATE, self.write)
        self._done: list[Mark] = []  # to be written at the end of this turn of the loop
        self._unmarked: dict[bytes, Mark] = {}

    def close(self) -> None:
        """What is still to be written is given to the group commit."""
        self._soon.close()
        self._late.close()
        self._write_done()
        self.flush()

    # -- rows --------------------------------------------------------------------------------------------------------

    def in_a_moment(self, item: Item) -> None:
        """A row, unless it has arrived before. One that the process which makes requests has may take longer: that
        goes on when this node dies."""
        self._soon.add(item)

    def write(self, item: Item) -> None:
        """A row, in the next commit; where it cannot be, the event stays in memory."""
        if item.written or item.done:
            return
        put = Put(item.event, taken=True, item=item, holder=self._holder(item.event.sink))
        try:
            future = self._batcher.submit(PUT, put)
        except StorageError:
            return
        item.written = True
        future.add_done_callback(_not_written)

    def write_all(self, sink: str) -> None:
        """It is going to be closed."""
        for item in (*self._late.items, *self._soon.items):
            if item.event.sink == sink:
                self.write(item)

    def _write_unless_handed(self, item: Item) -> None:
        if not item.handed:
            self.write(item)
        elif not item.done:
            self._late.add(item)

    # -- marks -------------------------------------------------------------------------------------------------------

    def mark(self, item: Item, mark: Mark) -> None:
        """What became of an item; all that are done at the same time share a write."""
        if mark.state == DONE:
            if not self._done:
                asyncio.get_running_loop().call_soon(self._write_done)
            self._done.append(mark)
            return
        unit: list[tuple[str, Any]] = [(MARK, mark)]
        if mark.state == DEAD:  # the event may be one that could not be written before
            unit.insert(0, (PUT, Put(item.event, taken=False, state=DEAD)))
        self._submit(unit, [mark])

    def flush(self) -> None:
        """Try again what could not be written."""
        marks = list(self._unmarked.values())[:_MARKS]
        for mark in marks:
            del self._unmarked[mark.id]
            self._submit([(MARK, mark)], [mark])

    def _write_done(self) -> None:
        marks, self._done = self._done, []
        if marks:
            self._submit([(MARK, mark) for mark in marks], marks)

    def _submit(self, unit: list[tuple[str, Any]], marks: list[Mark]) -> None:
        try:
            future = self._batcher.submit_unit(unit)
        except StorageError:
            self._remember(marks)
        else:
            future.add_done_callback(partial(self._marked, marks))

    def _marked(self, marks: list[Mark], future: "asyncio.Future[Any]") -> None:
        if not future.cancelled() and future.exception() is not None:
            self._remember(marks)

    def _remember(self, marks: list[Mark]) -> None:
        """Only the end of an event has to be written; how often it was tried may be forgotten."""
        for mark in marks:
            if mark.state != PENDING and len(self._unmarked) < _UNMARKED:
                self._unmarked[mark.id] = mark


class _Ripening:
    """Items that wait until they are between once and twice `seconds()` old: two lists and one timer for all."""

    def __init__(self, seconds: Callable[[], float], ripe: Callable[[Item], None]) -> None:
        self._seconds = seconds
        self._ripe = ripe
        self._young: list[Item] = []
        self._older: list[Item] = []
        self._timer: asyncio.TimerHandle | None = None

    @property
    def items(self) -> list[Item]:
        """The oldest first."""
        return self._older + self._young

    def add(self, item: Item) -> None:
        self._young.append(item)
        if self._timer is None:
            self._wind_up()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wind_up(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._seconds(), self._turn)

    def _turn(self) -> None:
        ripe, self._older, self._young = self._older, self._young, []
        for item in ripe:
            self._ripe(item)
        self._timer = None
        if self._older:
            self._wind_up()


def _not_written(future: "asyncio.Future[Any]") -> None:
    """The event is in memory, and is sent from there."""
    if not future.cancelled() and (exc := future.exception()) is not None:
        log.debug("event not written", error=exc)
