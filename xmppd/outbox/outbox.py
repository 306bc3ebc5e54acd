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
from xmppd.outbox.process import Sender
from xmppd.outbox.rows import DEAD, DONE, PENDING, PUT, Listed, Mark, Put, Rows, Run, Tally
from xmppd.outbox.runner import Runner, Sends, Settings
from xmppd.outbox.sink import HttpSink
from xmppd.outbox.writing import Writing
from xmppd.storage import Storage, upsert
from xmppd.storage.tables import setting

log = get_logger("outbox")

Durability = Literal["none", "async", "commit"]
WhenFull = Literal["spill", "slow_sender", "drop_new", "drop_old"]

_LOOK: Final = 2.0  # seconds between two looks for rows of dead nodes
_SWEEP: Final = 60.0
_TALLY: Final = 10.0
_PAUSED: Final = "outbox paused"  # the setting: names of sinks, as JSON
_SAY_DROPPED: Final = 5.0  # seconds between two lines about events that were dropped


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
        self._writing = Writing(storage.batcher, self.runners.get)
        self._telling: asyncio.TimerHandle | None = None
        self.sender = Sender()
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
        await self.sender.stop()
        self._writing.close()
        self._tell_dropped()
        if self._telling is not None:
            self._telling.cancel()
            self._telling = None

    async def add_sink(self, name: str, sink: Sends | HttpSink, *, batched: bool = False) -> None:
        """A module serves this sink. ValueError when another one does."""
        if name in self.runners:
            raise ValueError(f"the sink {name} is there already")
        if name in self._orphans:
            with contextlib.suppress(StorageError):
                await self._rows.let_go(name)
                self._orphans.discard(name)
        runner = Runner(
            name,
            sink,
            self.settings,
            batched=batched,
            mark=self._writing.mark,
            keep=self._keep,
            roomy=self._has_room,
        )
        if isinstance(sink, HttpSink):
            sink.through(self.sender)
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
        runner = self.runners[name]
        self._writing.write_all(name)
        del self.runners[name]
        await runner.stop()
        self._room.set()

    # -- events ------------------------------------------------------------------------------------------------------

    def submit(self, event: Event) -> "asyncio.Future[Any] | None":
        """Take an event. The future, where there is one, ends when its row is committed, or raises StorageError: then
        the event is sent all the same if there is room in memory. Raises StorageUnavailable when the write queue is
        full and the durability is `commit`."""
        runner = self.runners.get(event.sink)
        if runner is None:
            return self._put(event, None, taken=False)
        roomy = runner.has_room(event.size)
        if not roomy and self.when_full == "drop_old" and (old := runner.line.drop_oldest()):
            runner.dropped += 1
            if old.written:
                self._writing.mark(old, Mark(old.event.id, DONE))
            roomy = runner.has_room(event.size)
        if not roomy and (self.durability == "none" or self.when_full in ("drop_new", "drop_old")):
            self._drop(runner)
        elif self.durability == "none":
            runner.add(Item(event, written=False))
        elif roomy and self.durability == "async" and (self._storage.batcher.away or runner.is_direct(event)):
            self._take(event, runner)
        else:
            return self._put(event, runner, taken=roomy and not runner.more)
        return None

    def _take(self, event: Event, runner: Runner) -> None:
        """It is sent at once, and written only if that does not succeed in a moment: a row that is deleted when it has
        just been written is the dearest part of an event. While the database is away it would wait, with the sink well.
        """
        item = Item(event, written=False)
        if not self._storage.batcher.away:
            if runner.is_quick:
                self._writing.in_a_moment(item)
            else:
                self._writing.write(item)
        runner.add(item)

    def _keep(self, item: Item) -> None:
        if self.durability != "none":
            self._writing.write(item)

    def _put(self, event: Event, runner: Runner | None, *, taken: bool) -> "asyncio.Future[Any] | None":
        """First the row, then the sending."""
        put = Put(event, taken, reserved=taken)
        try:
            future = self._storage.batcher.submit(PUT, put)
        except StorageUnavailable:
            if self.durability == "commit":
                raise
            self._unwritten(event, runner)
            return None
        if runner is not None:
            runner.commits(event.partition)
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
        if runner is not None:
            runner.commits(event.partition)
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
        if put.item is not None and (put.holder is runner or put.item.done):
            return
        runner.committed(event.partition)
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
        if runner is not None:
            runner.committed(put.event.partition)
            if put.reserved:
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
        """Nothing is said of each: there may be thousands a second."""
        runner.dropped += 1
        if self._telling is None:
            self._tell_dropped()
            self._telling = asyncio.get_running_loop().call_later(_SAY_DROPPED, self._tell_again)

    def _tell_again(self) -> None:
        self._telling = None
        if self._tell_dropped():
            self._telling = asyncio.get_running_loop().call_later(_SAY_DROPPED, self._tell_again)

    def _tell_dropped(self) -> bool:
        """Whether there was something to tell."""
        said = False
        for runner in self.runners.values():
            if runner.dropped > runner.dropped_told:
                runner.dropped_told = runner.dropped
                log.warning("events dropped", sink=runner.name, waiting=runner.held, dropped=runner.dropped)
                said = True
        return said

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
        self._writing.flush()
        await self._read_paused()
        taken = await self._rows.take_over(self._name, self.runners)
        if taken:
            log.info("events of a dead node taken over", events=taken)
            for runner in self.runners.values():
                runner.more = True

    async def _tidy(self) -> None:
        await self._rows.sweep()
        for runner in self.runners.values():
            runner.forget_commits()
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
