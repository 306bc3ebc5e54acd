"""The outbox as the server and the modules see it: sinks, events, and what operators do with them."""

import asyncio
import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from xmppd.errors import StorageError, StorageUnavailable
from xmppd.log import get_logger
from xmppd.outbox.event import Event
from xmppd.outbox.line import Item
from xmppd.outbox.rows import DEAD, MARK, PENDING, PUT, Listed, Mark, Put, Rows, Run, Tally
from xmppd.outbox.runner import Runner, Sends, Settings
from xmppd.storage import Storage, upsert
from xmppd.storage.tables import setting

log = get_logger("outbox")

Durability = Literal["none", "async", "commit"]
WhenFull = Literal["spill", "slow_sender", "drop_new", "drop_old"]

_LOOK: Final = 2.0  # seconds between two looks for rows of dead nodes
_MARKS: Final = 500  # at once
_SWEEP: Final = 60.0
_TALLY: Final = 10.0
_PAUSED: Final = "outbox paused"  # the setting: names of sinks, as JSON
_UNMARKED: Final = 100_000  # marks that wait for the database; past it events may be sent once more


@dataclass(frozen=True, slots=True)
class SinkStatus:
    """One sink on this node. `state`: open, broken (it does not take events), paused, none (no module serves it)."""

    name: str
    state: str
    queued: int
    in_flight: int
    dead: int
    oldest: float  # seconds
    sent: int
    failed: int


class Outbox:
    """`submit` and `row` take events; a sink has to be added before. Everything that reads raises StorageError."""

    def __init__(
        self,
        storage: Storage,
        node: bytes,
        incarnation: int,
        *,
        name: str = "",
        settings: Settings | None = None,
        durability: Durability = "async",
        when_full: WhenFull = "spill",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.settings = settings or Settings()
        self.durability: Durability = durability
        self.when_full: WhenFull = when_full
        self.runners: dict[str, Runner] = {}
        self._storage = storage
        self._name = name
        self._clock = clock
        self._rows = Rows(storage, Run(node, incarnation), clock=clock, committed=self._committed)
        self._unmarked: dict[bytes, Mark] = {}
        self._kick = asyncio.Event()
        self._room = asyncio.Event()
        self._paused: set[str] = set()
        self._orphans: set[str] = set()  # sinks with rows that count as being in memory, and are not
        self.tallies: dict[str, Tally] = {}  # of a moment ago, for the metrics
        self._feeding: asyncio.Task[None] | None = None

    # -- life --------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin to send; sinks may be added before and after."""
        self._feeding = asyncio.get_running_loop().create_task(self._feed(), name="outbox")

    async def stop(self) -> None:
        """What has not been taken stays in the database, for the next run of this node, or another one."""
        if self._feeding is not None:
            self._feeding.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._feeding
            self._feeding = None
        for name in list(self.runners):
            await self._end(name)
        self._flush_marks()

    async def add_sink(self, name: str, sink: Sends, *, batched: bool = False) -> None:
        """A module serves this sink. ValueError when another one does."""
        if name in self.runners:
            raise ValueError(f"the sink {name} is there already")
        if name in self._orphans:
            with contextlib.suppress(StorageError):
                await self._rows.let_go(name)
                self._orphans.discard(name)
        runner = Runner(name, sink, self.settings, batched=batched, mark=self._mark, roomy=self._has_room)
        runner.paused = name in self._paused
        self.runners[name] = runner
        await runner.start()
        self._kick.set()

    async def remove_sink(self, name: str) -> None:
        """No module serves it any more; its events wait."""
        if name not in self.runners:
            return
        await self._end(name)
        with contextlib.suppress(StorageError):
            await self._rows.let_go(name)

    async def _end(self, name: str) -> None:
        await self.runners.pop(name).stop()
        self._room.set()

    # -- events ------------------------------------------------------------------------------------------------------

    def submit(self, event: Event) -> "asyncio.Future[Any] | None":
        """Take an event. The future, where there is one, ends when its row is committed, or raises StorageError: then
        the event is sent all the same if there is room in memory. Raises StorageUnavailable when the write queue is
        full and the durability is `commit`."""
        runner = self.runners.get(event.sink)
        roomy = runner is not None and runner.has_room(event.size)
        if runner is not None and not roomy and self.when_full == "drop_old" and (old := runner.line.drop_oldest()):
            runner.dropped += 1
            self._mark(old, Mark(old.event.id, "done"))
            roomy = runner.has_room(event.size)
        if runner is not None and self.durability == "none":
            if roomy:
                runner.add(Item(event, written=False))
            else:
                self._drop(runner)
            return None
        if runner is not None and not roomy and self.when_full in ("drop_new", "drop_old"):
            self._drop(runner)
            return None
        if runner is not None and roomy and self.durability == "async" and self._storage.batcher.away:
            runner.add(Item(event))  # it would wait for the database, while the sink may be well
            return None
        taken = runner is not None and roomy and not runner.more
        put = Put(event, taken, reserved=taken)
        try:
            future = self._storage.batcher.submit(PUT, put)
        except StorageUnavailable:
            if self.durability == "commit":
                raise
            self._unwritten(event, runner)
            return None
        if runner is not None:
            if taken:
                runner.reserve(event)
            else:
                self._spill(runner)
        future.add_done_callback(partial(self._put_ended, put, runner))
        return future

    def row(self, event: Event) -> tuple[str, Put]:
        """As `submit`, for `Batcher.submit_unit`: the event is there when what it is about is committed, and not
        otherwise."""
        runner = self.runners.get(event.sink)
        return PUT, Put(event, runner is not None and not runner.more and runner.has_room(event.size))

    async def room(self, sink: str) -> None:
        """Returns when there is room in memory for events of a sink: for who has to wait rather than spill."""
        while (runner := self.runners.get(sink)) is not None and not runner.has_room():
            self._room.clear()
            await self._room.wait()

    def _committed(self, put: Put, stored: bool) -> None:
        """After the commit of a row, whoever submitted it."""
        event = put.event
        runner = self.runners.get(event.sink)
        if put.state == DEAD:
            return
        if runner is None:
            if put.taken:
                self._orphans.add(event.sink)  # its module was unloaded a moment ago
            return
        if put.reserved and runner.reserved:
            runner.unreserve(event)
        if not stored:
            runner.duplicates += 1
        elif put.taken:
            runner.add(Item(event))
        else:
            runner.more = True
            runner.spilled += 1
            self._kick.set()

    def _put_ended(self, put: Put, runner: Runner | None, future: "asyncio.Future[Any]") -> None:
        """`runner` is the one that was there when it was submitted."""
        if runner is not None and not put.taken:
            runner.spilling -= 1
            if not runner.spilling:
                self._kick.set()
        if future.cancelled() or (exc := future.exception()) is None:
            return
        if runner is not None and put.reserved:
            runner.unreserve(put.event)
        log.debug("event not written", error=exc)
        if self.durability != "commit":
            self._unwritten(put.event, self.runners.get(put.event.sink))

    def _unwritten(self, event: Event, runner: Runner | None) -> None:
        """The database does not take it: it is sent from memory, if there is room."""
        if runner is not None and runner.has_room(event.size):
            runner.add(Item(event))
        elif runner is not None:
            self._drop(runner)

    def _spill(self, runner: Runner) -> None:
        runner.more = True
        runner.spilled += 1
        runner.spilling += 1

    def _drop(self, runner: Runner) -> None:
        runner.dropped += 1
        log.warning("event dropped", sink=runner.name, waiting=runner.held, dropped=runner.dropped)

    def _mark(self, item: Item, mark: Mark) -> None:
        unit: list[tuple[str, Any]] = [(MARK, mark)]
        if mark.state == DEAD:  # the event may be one that could not be written before
            unit.insert(0, (PUT, Put(item.event, taken=False, state=DEAD)))
        self._submit_marks(unit, mark)

    def _submit_marks(self, unit: list[tuple[str, Any]], mark: Mark) -> None:
        try:
            future = self._storage.batcher.submit_unit(unit)
        except StorageError:
            self._remember(mark)
        else:
            future.add_done_callback(partial(self._marked, mark))

    def _marked(self, mark: Mark, future: "asyncio.Future[Any]") -> None:
        if not future.cancelled() and future.exception() is not None:
            self._remember(mark)

    def _remember(self, mark: Mark) -> None:
        """Only the end of an event has to be written; how often it was tried may be forgotten."""
        if mark.state != PENDING and len(self._unmarked) < _UNMARKED:
            self._unmarked[mark.id] = mark

    def _flush_marks(self) -> None:
        for mark in list(self._unmarked.values())[:_MARKS]:
            del self._unmarked[mark.id]
            self._submit_marks([(MARK, mark)], mark)

    # -- what is in the database -------------------------------------------------------------------------------------

    def _has_room(self) -> None:
        self._room.set()
        if any(runner.more and runner.wants_rows for runner in self.runners.values()):
            self._kick.set()

    async def _feed(self) -> None:
        """Fetch into memory what is not there, take over the rows of dead nodes, tidy up."""
        loop = asyncio.get_running_loop()
        look = sweep = tally = loop.time()
        while True:
            self._kick.clear()
            if not self.runners:  # nobody needs anything
                self.tallies = {}
                await self._kick.wait()
                continue
            try:
                if loop.time() >= look:
                    look = loop.time() + _LOOK
                    await self._look()
                if loop.time() >= sweep:
                    sweep = loop.time() + _SWEEP
                    await self._tidy()
                if loop.time() >= tally:
                    tally = loop.time() + _TALLY
                    self.tallies = await self._rows.tally()
                for runner in list(self.runners.values()):
                    if runner.more and runner.wants_rows:
                        await self._load(runner)
            except StorageError as exc:
                log.debug("outbox waits for the database", error=exc)
            except Exception as exc:
                log.error("outbox failed", exc=exc)
            else:
                if any(runner.more and runner.wants_rows and not runner.spilling for runner in self.runners.values()):
                    await asyncio.sleep(0)
                    continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.05, look - loop.time())):
                    await self._kick.wait()

    async def _look(self) -> None:
        self._flush_marks()
        await self._read_paused()
        taken = await self._rows.take_over(self._name, self.runners)
        if taken:
            log.info("events of a dead node taken over", events=taken)
            for runner in self.runners.values():
                runner.more = True

    async def _tidy(self) -> None:
        await self._rows.sweep()
        for runner in self.runners.values():
            runner.more = True  # in case that one was passed over

    async def _load(self, runner: Runner) -> None:
        spilled, idle = runner.spilled, runner.spilling == 0
        limit = runner.room_for_rows
        loaded = await self._rows.load(runner.name, limit)
        if self.runners.get(runner.name) is not runner:
            with contextlib.suppress(StorageError):
                await self._rows.let_go(runner.name)
            return
        if len(loaded) < limit and idle and runner.spilled == spilled:
            runner.more = False
        loop_now, now = asyncio.get_running_loop().time(), self._clock()
        for row in loaded:
            due = 0.0 if row.next_at is None or row.next_at <= now else loop_now + row.next_at - now
            runner.add(Item(row.event, attempts=row.attempts), due=due)

    # -- for operators -----------------------------------------------------------------------------------------------

    async def status(self) -> list[SinkStatus]:
        """The sinks of this node, and those of which it has rows."""
        tallies = await self._rows.tally()
        found = []
        for name in sorted({*tallies, *self.runners}):
            tally, runner = tallies.get(name, Tally()), self.runners.get(name)
            if runner is None:
                state = "paused" if name in self._paused else "none"
            else:
                state = "paused" if runner.paused else "broken" if runner.breaker.is_open else "open"
            oldest = 0.0 if tally.oldest is None else max(0.0, self._clock() - tally.oldest)
            if runner is None:
                found.append(SinkStatus(name, state, tally.pending, 0, tally.dead, oldest, 0, 0))
            else:
                queued = max(tally.pending, runner.line.events)
                done = (runner.sent, runner.failed)
                found.append(SinkStatus(name, state, queued, runner.in_flight, tally.dead, oldest, *done))
        return found

    def age(self, sink: str) -> float:
        """Seconds since the oldest event that waits was made, as far as it is known here."""
        runner, tally = self.runners.get(sink), self.tallies.get(sink, Tally())
        known = [made for made in (runner.line.oldest() if runner else None, tally.oldest) if made is not None]
        return max(0.0, self._clock() - min(known)) if known else 0.0

    async def listed(self, sink: str, state: str, limit: int) -> list[Listed]:
        """Events of all nodes, the oldest first."""
        return await self._rows.listed(sink, state, limit)

    async def retry(self, sink: str) -> int:
        """Dead events of this node live again, and nothing waits for its next attempt; how many were dead."""
        revived = await self._rows.revive(sink)
        for name, runner in self.runners.items():
            if sink in ("", name):
                runner.more = True
                runner.hurry()
        self._kick.set()
        return revived

    async def delete_dead(self, before: float, limit: int) -> int:
        """Events that were given up and made before that time, of all nodes; how many went, at most `limit`."""
        return await self._rows.delete_dead(before, limit)

    async def delete_done(self, before: float, limit: int) -> int:
        """What is left of events that were taken, made before that time; how many went, at most `limit`."""
        return await self._rows.delete_done(before, limit)

    async def purge(self, sink: str, state: str) -> int:
        """Events of this node are given up; how many."""
        await self._rows.take_over(self._name)  # of sinks that no module serves any more, too
        gone = await self._rows.purge(sink, state)
        if state == PENDING:
            for name, runner in self.runners.items():
                if sink in ("", name):
                    runner.line.clear()
        return gone

    async def pause(self, sink: str, paused: bool) -> None:
        """A sink stops, or goes on; on every node, and after a restart too."""

        async def work(connection: AsyncConnection) -> set[str]:
            names = await _paused_in(connection)
            names = names | {sink} if paused else names - {sink}
            value = json.dumps(sorted(names)).encode()
            await connection.execute(upsert(setting, connection.dialect), {"name": _PAUSED, "value": value})
            return names

        self._set_paused(await self._storage.run(work, repeatable=True))

    async def _read_paused(self) -> None:
        self._set_paused(await self._storage.read(_paused_in))

    def _set_paused(self, names: set[str]) -> None:
        self._paused = names
        for name, runner in self.runners.items():
            if runner.paused and name not in names:
                runner.resume()
            runner.paused = name in names


async def _paused_in(connection: AsyncConnection) -> set[str]:
    query = select(setting.c.value).where(setting.c.name == _PAUSED)
    value = (await connection.execute(query)).scalar_one_or_none()
    return set() if value is None else set(json.loads(value))
