"""The batcher: group commit. Many rows, one transaction; each caller's future is resolved after the commit only."""

import asyncio
import math
import random
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol, TypeVar

from sqlalchemy.ext.asyncio import AsyncConnection

from xmppd.errors import StorageError, StorageUnavailable
from xmppd.log import get_logger
from xmppd.metrics import Histogram

log = get_logger("storage")
T = TypeVar("T")

Write = Callable[[AsyncConnection, list[Any]], Awaitable[list[Any]]]

_ITEM_BYTES: Final = 256  # what an item is taken to weigh when its kind does not say
_FIRST_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 1.0


class Runner(Protocol):
    def __call__(
        self, work: Callable[[AsyncConnection], Awaitable[T]], *, repeatable: bool = False
    ) -> Awaitable[T]: ...


@dataclass(frozen=True, slots=True, eq=False)
class _Kind:
    name: str
    write: Write
    size: Callable[[Any], int] | None
    committed: Callable[[Any, Any], None] | None
    rank: int  # place in a transaction; a name keeps it when it is defined again
    user: Callable[[Any], tuple[str, str]] | None = None


@dataclass(slots=True, eq=False)
class _Unit:
    """Items that commit together or not at all, unless they are `apart`."""

    items: list[tuple[_Kind, Any]]
    future: asyncio.Future[Any]
    single: bool  # the future gives the one result, not a list
    apart: bool  # they need not: the future gives a list of results and exceptions
    size: int
    deadline: float


class _LeaveOut(Exception):
    """Ends a transaction in which units with several items must not take part after all."""

    def __init__(self, failed: dict[_Unit, Exception]) -> None:
        self.failed = failed


class Batcher:
    """What is queued goes into one transaction: at once when nothing was written lately, else within `interval`.

    Items of one kind are written in the order of `submit`. Kinds take their place in a transaction in the order in
    which they were first defined, so that of two items about the same row the earlier kind's is written first.

    The queue is bounded in rows and bytes; when it is full `submit` raises StorageUnavailable. While the database is
    away the queue waits, at most `deadline` seconds per item, then the futures fail with StorageUnavailable. A failure
    may come too for rows whose COMMIT was done but never answered; success comes only for rows that are there.
    Cancelling a future takes nothing back. A unit is judged with the units ahead of it in its transaction in place:
    where one of these is left out, a quota may refuse one message early.
    """

    def __init__(
        self,
        run: Runner,
        *,
        interval: float,
        rows: int = 1000,
        size: int = 2 << 20,
        queue_rows: int = 100_000,
        queue_size: int = 128 << 20,
        deadline: float = 30.0,
        wrote: Callable[[tuple[str, str]], None] | None = None,
    ) -> None:
        """`rows` and `size` (bytes) bound one transaction, `queue_rows` and `queue_size` all that waits. `wrote` is
        told whose rows were committed."""
        self._run = run
        self._wrote = wrote
        self._interval = interval
        self._max_rows, self._max_size = rows, size
        self._queue_rows, self._queue_size = queue_rows, queue_size
        self._deadline = deadline
        self._kinds: dict[str, _Kind] = {}
        self._ranks: dict[str, int] = {}
        self._queue: deque[_Unit] = deque()
        self._rows = 0  # queued and in the transaction under way
        self._size = 0
        self._flusher: asyncio.Task[None] | None = None
        self._last_start = -interval
        self._away_since: float | None = None
        self._back_at = -math.inf  # by the loop's clock
        self._closed = False
        self.batch_rows = Histogram((1, 2, 5, 10, 20, 50, 100, 200, 500, 1000))
        self.commit_seconds = Histogram((0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 15.0))
        self.rows_failed = 0  # their callers were told

    @property
    def rows_waiting(self) -> int:
        """Rows submitted and not yet committed or failed."""
        return self._rows

    @property
    def closed(self) -> bool:
        """True from the call of `close` on: nothing is taken any more."""
        return self._closed

    @property
    def away(self) -> bool:
        """True while the database has not taken the last transaction."""
        return self._away_since is not None

    def was_away(self, seconds: float) -> bool:
        """Whether it is, or was so many seconds ago or less."""
        return self._away_since is not None or asyncio.get_running_loop().time() - self._back_at <= seconds

    @property
    def bytes_waiting(self) -> int:
        """What these rows are taken to weigh."""
        return self._size

    def define(
        self,
        kind: str,
        write: Callable[[AsyncConnection, list[Any]], Awaitable[list[Any]]],
        *,
        size: Callable[[Any], int] | None = None,
        committed: Callable[[Any, Any], None] | None = None,
        user: Callable[[Any], tuple[str, str]] | None = None,
    ) -> None:
        """`write` gets the items of one transaction and answers with one result for each.

        An Exception in the answer says that this item was not written and fails it alone; its unit, if it has other
        items, is left out as a whole. Raising fails the transaction. `write` may be called again for items whose COMMIT
        failed or was not answered, so doing it twice must be the same as doing it once: row ids made by the node and
        `insert_new`. `size` tells an item's bytes. `committed` is called with each item and its result
        after the commit; it must not raise. `user` tells whose item it is, host and user name, where the rows are read
        by a kind of the loader that may be late. Defining again replaces; what is queued keeps the old one.
        """
        rank = self._ranks.setdefault(kind, len(self._ranks))
        self._kinds[kind] = _Kind(kind, write, size, committed, rank, user)

    def undefine(self, kind: str) -> None:
        """No more of this kind; what is queued is still written."""
        self._kinds.pop(kind, None)

    def submit(self, kind: str, item: Any) -> asyncio.Future[Any]:
        """The future gives the item's result after the commit. Raises StorageUnavailable when the queue is full."""
        return self._enqueue([(kind, item)], single=True)

    def submit_unit(self, items: Sequence[tuple[str, Any]]) -> asyncio.Future[list[Any]]:
        """(kind, item) pairs that commit together or not at all; the future gives their results in order."""
        if not items:
            raise ValueError("a unit without items")
        return self._enqueue(items, single=False)

    def submit_all(self, kind: str, items: Sequence[Any]) -> asyncio.Future[list[Any]]:
        """As `submit` of each, cheaper: one future for all, which gives what their own would have given, or raised, in
        order. No more items than should be in one transaction."""
        if not items:
            raise ValueError("nothing to submit")
        return self._enqueue([(kind, item) for item in items], single=False, apart=True)

    async def drain(self) -> None:
        """Returns when nothing is queued any more; bounded by the items' deadlines."""
        while self._flusher is not None:
            await asyncio.wait([self._flusher])

    async def close(self) -> None:
        """Refuses new items and drains. When this is cancelled, what is left fails with StorageUnavailable."""
        self._closed = True
        try:
            await self.drain()
        finally:
            if self._flusher is not None:
                self._flusher.cancel()

    # -- the queue ---------------------------------------------------------------------------------------------------

    def _enqueue(self, items: Sequence[tuple[str, Any]], *, single: bool, apart: bool = False) -> asyncio.Future[Any]:
        if self._closed:
            raise StorageUnavailable("the storage is closed")
        known = []
        size = 0
        for name, item in items:
            kind = self._kinds.get(name)
            if kind is None:
                raise StorageError(f"nobody writes {name}: its module is not running")
            known.append((kind, item))
            size += kind.size(item) if kind.size else _ITEM_BYTES
        if self._rows + len(known) > self._queue_rows or self._size + size > self._queue_size:
            raise StorageUnavailable(f"the write queue is full: {self._rows} rows, {self._size} bytes")
        loop = asyncio.get_running_loop()
        unit = _Unit(known, loop.create_future(), single, apart, size, loop.time() + self._deadline)
        self._queue.append(unit)
        self._rows += len(known)
        self._size += size
        if self._flusher is None:
            self._flusher = asyncio.create_task(self._flush(), name="group commit")
        return unit.future

    async def _flush(self) -> None:
        loop = asyncio.get_running_loop()
        batch: list[_Unit] = []
        try:
            while self._queue:
                pause = self._last_start + self._interval - loop.time()
                if pause > 0:
                    await asyncio.sleep(pause)
                self._last_start = loop.time()
                batch = self._cut()
                await self._commit(batch)
        finally:
            self._flusher = None
            for unit in (*batch, *self._queue):  # none, unless this task was cancelled
                self._fail(unit, StorageUnavailable("the storage is closing"))
            self._queue.clear()

    def _cut(self) -> list[_Unit]:
        """The oldest units that fit into one transaction, at least one."""
        batch: list[_Unit] = []
        rows = size = 0
        while self._queue:
            unit = self._queue[0]
            rows += len(unit.items)
            size += unit.size
            if batch and (rows > self._max_rows or size > self._max_size):
                break
            batch.append(self._queue.popleft())
        return batch

    # -- one transaction ---------------------------------------------------------------------------------------------

    async def _commit(self, batch: list[_Unit]) -> None:
        """Returns when every unit of the batch is committed or has failed."""
        pause = _FIRST_PAUSE
        loop = asyncio.get_running_loop()
        while batch:
            began = loop.time()
            try:
                results = await self._run(partial(_write, batch), repeatable=True)
            except _LeaveOut as exc:
                for unit, cause in exc.failed.items():
                    self._fail(unit, cause)
                batch = [unit for unit in batch if unit not in exc.failed]
            except StorageUnavailable as exc:
                self._note_away(exc)
                batch = self._drop_overdue(batch, exc)
                await asyncio.sleep(pause * random.uniform(0.5, 1.5))
                pause = min(pause * 2, _LONGEST_PAUSE)
            except Exception as exc:
                await self._find_culprit(batch, exc)
                return
            else:
                self._note_back()
                self.commit_seconds.observe(loop.time() - began)
                self.batch_rows.observe(sum(len(unit.items) for unit in batch))
                for unit in batch:
                    self._succeed(unit, results[unit])
                return

    async def _find_culprit(self, batch: list[_Unit], exc: Exception) -> None:
        """One item that cannot be written must not fail the others: halve, in order, until it is alone."""
        if len(batch) > 1:
            middle = len(batch) // 2
            await self._commit(batch[:middle])
            await self._commit(batch[middle:])
            return
        if batch[0].apart and len(batch[0].items) > 1:
            await self._commit_apart(batch[0])
            return
        kinds = ",".join(sorted({kind.name for kind, _ in batch[0].items}))
        if not isinstance(exc, StorageError):
            log.error("write failed", kinds=kinds, exc=exc)
            error = StorageError(f"writing {kinds} failed: {exc!r}")
            error.__cause__ = exc
            exc = error
        self._fail(batch[0], exc)

    async def _commit_apart(self, unit: _Unit) -> None:
        """Each item of a unit as one of its own, whose results then are the unit's."""
        loop = asyncio.get_running_loop()
        size = unit.size // len(unit.items)
        parts = [_Unit([one], loop.create_future(), False, True, size, unit.deadline) for one in unit.items]
        parts[0].size += unit.size - size * len(parts)
        unit.size = -1  # they are what is counted
        try:
            middle = len(parts) // 2
            await self._commit(parts[:middle])
            await self._commit(parts[middle:])
        finally:
            for part in parts:  # none is left, unless this task was cancelled
                self._fail(part, StorageUnavailable("the storage is closing"))
            if not unit.future.done():
                unit.future.set_result([result for part in parts for result in part.future.result()])

    def _drop_overdue(self, batch: list[_Unit], exc: StorageUnavailable) -> list[_Unit]:
        """Fails what has waited long enough, in this batch and in the queue behind it."""
        now = asyncio.get_running_loop().time()
        while self._queue and self._queue[0].deadline <= now:
            self._fail(self._queue.popleft(), exc)
        left = []
        for unit in batch:
            if unit.deadline <= now:
                self._fail(unit, exc)
            else:
                left.append(unit)
        return left

    def _succeed(self, unit: _Unit, results: list[Any]) -> None:
        self._count_out(unit)
        for (kind, item), result in zip(unit.items, results, strict=True):
            if kind.user is not None and self._wrote is not None:
                self._wrote(kind.user(item))
            if kind.committed is not None:
                kind.committed(item, result)
        if unit.future.done():
            return
        if not unit.single:
            unit.future.set_result(results)
        elif isinstance(results[0], Exception):
            unit.future.set_exception(results[0])
        else:
            unit.future.set_result(results[0])

    def _fail(self, unit: _Unit, exc: Exception) -> None:
        if unit.size < 0:
            return  # it has ended before
        self.rows_failed += len(unit.items)
        self._count_out(unit)
        if not unit.future.done():
            own = exc
            if isinstance(exc, StorageUnavailable):  # shared by many futures; each gets its own object
                own = StorageUnavailable(str(exc))
                own.__cause__ = exc
            if unit.apart:
                unit.future.set_result([own] * len(unit.items))
            else:
                unit.future.set_exception(own)

    def _count_out(self, unit: _Unit) -> None:
        self._rows -= len(unit.items)
        self._size -= unit.size
        unit.size = -1

    def _note_away(self, exc: StorageUnavailable) -> None:
        if self._away_since is None:
            self._away_since = asyncio.get_running_loop().time()
            log.warning("writes wait for the database", rows=self._rows, reason=exc)

    def _note_back(self) -> None:
        if self._away_since is not None:
            away = asyncio.get_running_loop().time() - self._away_since
            self._away_since, self._back_at = None, asyncio.get_running_loop().time()
            log.info("database takes writes again", away_s=round(away, 1), rows=self._rows)


async def _write(batch: list[_Unit], connection: AsyncConnection) -> dict[_Unit, list[Any]]:
    """Each kind's items by its own function, once. Raises _LeaveOut when units have to go before the commit."""
    places: dict[_Kind, list[tuple[_Unit, int]]] = {}
    results: dict[_Unit, list[Any]] = {}
    for unit in batch:
        results[unit] = [None] * len(unit.items)
        for index, (kind, _) in enumerate(unit.items):
            places.setdefault(kind, []).append((unit, index))
    failed: dict[_Unit, Exception] = {}
    for kind in sorted(places, key=lambda kind: kind.rank):  # stable: a replaced definition goes before the new one
        where = places[kind]
        answers = await kind.write(connection, [unit.items[index][1] for unit, index in where])
        if len(answers) != len(where):
            raise StorageError(f"writing {kind.name}: {len(answers)} results for {len(where)} items")
        for (unit, index), answer in zip(where, answers, strict=True):
            results[unit][index] = answer
            if isinstance(answer, Exception) and not unit.single and not unit.apart:
                failed.setdefault(unit, answer)
    if failed:
        raise _LeaveOut(failed)
    return results
