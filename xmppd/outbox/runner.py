"""One sink's part of the outbox: sends what is in memory, a few requests at a time, and says what became of it."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Literal, Protocol

from xmppd.log import get_logger
from xmppd.metrics import Histogram
from xmppd.outbox.backoff import Breaker, Retry
from xmppd.outbox.event import Event
from xmppd.outbox.line import Item, Line
from xmppd.outbox.rows import DEAD, DONE, PENDING, Mark
from xmppd.outbox.sink import HttpSink
from xmppd.sender.target import DONE as ARRIVED
from xmppd.sender.target import Answer

log = get_logger("outbox")

_BATCH_BYTES: Final = 4 << 20  # in one request
_AHEAD: Final = 64  # as many times the requests that may be under way are handed to the process that makes them,
_AHEAD_BYTES: Final = 4 << 20  # up to so much, while the sink is well: so that neither process waits for the other
_CHAIN: Final = 16  # events of a conversation that are handed over at once
_LAST: Final = 1.0  # seconds for requests under way at the end
_COMMIT: Final = 30.0  # seconds that one may take
_DEATHS: Final = 3  # of the process that makes an event's request, until the event is taken for the reason
_LOAD: Final = 500  # rows fetched at once
_ROW_BYTES: Final = 64 << 10  # what a row that is not seen yet is taken to weigh
_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0, 60.0, 300.0, 3600.0)


class Sends(Protocol):
    """A sink in this process; HttpSink is one of another kind."""

    async def open(self) -> None: ...
    async def close(self) -> None: ...
    async def send(self, events: Sequence[Event]) -> Answer: ...


@dataclass(frozen=True, slots=True)
class Settings:
    """The `outbox:` section, as far as sending is concerned. Times in seconds."""

    retry: Retry = field(default_factory=Retry)
    per_sink: int = 8
    open_after: int = 5
    probe_every: float = 10.0
    max_events: int = 10_000  # in memory, of one sink
    max_bytes: int = 64 << 20
    batch_events: int = 100
    batch_wait: float = 0.02
    dead_letter: Literal["keep", "drop"] = "keep"


class Runner:
    """`mark(item, mark)` writes down what became of an item; `roomy()` is called when there is room in memory again."""

    def __init__(
        self,
        name: str,
        sink: Sends | HttpSink,
        settings: Settings,
        *,
        batched: bool,
        mark: Callable[[Item, Mark], None],
        keep: Callable[[Item], None],
        roomy: Callable[[], None],
    ) -> None:
        self.name = name
        self.sink = sink
        self.line = Line()
        self.breaker = Breaker(settings.open_after, settings.probe_every)
        self.paused = False
        self.reserved = 0  # events whose rows are being written
        self.reserved_bytes = 0
        self.more = True  # there may be rows that are not in memory: what is new goes behind them
        self.spilled = 0  # events that were written without a place in memory, ever
        self.spilling = 0  # those of them whose commit is under way
        self.sent = self.failed = self.dead = self.dropped = self.duplicates = 0
        self.dropped_told = 0
        self._committing: dict[bytes, tuple[int, float]] = {}  # partitions whose rows are: how many, until when
        self.seconds = Histogram(_SECONDS)  # from an event's making to its arrival
        self._settings = settings
        self._batched = batched
        self._mark = mark
        self._keep = keep
        self._roomy = roomy
        self._tasks: set[asyncio.Task[Answer]] = set()
        self._out = 0  # requests that are on their way
        self._out_bytes = 0
        self._empty = asyncio.Event()  # nothing is on its way
        self._pump_due = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = 0.0
        self._open = False
        self._http = sink if isinstance(sink, HttpSink) else None
        self._loop = asyncio.get_running_loop()

    async def start(self) -> None:
        await self.sink.open()
        self._open = True
        self.pump()

    async def stop(self) -> None:
        """What is in memory goes, and what is on its way too after a moment: then it may be sent again."""
        self._open = False
        self._cancel_timer()
        if self._out:
            self._empty.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LAST):
                    await self._empty.wait()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        await self.sink.close()
        self.line = Line()

    # -- memory ------------------------------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """Requests that are on their way, or wait in the process that makes them."""
        return self._out

    @property
    def held(self) -> int:
        """Events in memory."""
        return self.line.events + self.reserved

    def has_room(self, size: int = 0) -> bool:
        settings = self._settings
        held = self.line.bytes + self.reserved_bytes + size
        return self.held < settings.max_events and (held <= settings.max_bytes or self.held == 0)

    @property
    def room_for_rows(self) -> int:
        """How many rows may be fetched from the database at once; 0: none."""
        settings = self._settings
        if not self.has_room():
            return 0
        bytes_left = settings.max_bytes - self.line.bytes - self.reserved_bytes
        return max(1, min(_LOAD, settings.max_events - self.held, bytes_left // _ROW_BYTES))

    @property
    def wants_rows(self) -> bool:
        """Not for every single one that there is room for."""
        room = self.room_for_rows
        return room == _LOAD or (room > 0 and self.held <= self._settings.max_events // 2)

    def reserve(self, event: Event) -> None:
        self.reserved += 1
        self.reserved_bytes += event.size

    def unreserve(self, event: Event) -> None:
        self.reserved -= 1
        self.reserved_bytes -= event.size

    def add(self, item: Item, *, due: float = 0.0) -> None:
        """`due` by the loop's clock."""
        self.line.add(item, self._loop.time(), due=due)
        if self._batched and self.line.events < self._settings.batch_events:
            self._wake_at(self._loop.time() + self._settings.batch_wait)
        elif not self._pump_due:
            self._pump_soon()

    def commits(self, partition: bytes) -> None:
        """An event of it comes when its row is committed: what is newer may not overtake it."""
        count, _ = self._committing.get(partition, (0, 0.0))
        self._committing[partition] = count + 1, self._loop.time() + _COMMIT

    def committed(self, partition: bytes) -> None:
        count, until = self._committing.pop(partition, (0, 0.0))
        if count > 1:
            self._committing[partition] = count - 1, until

    def forget_commits(self) -> None:
        """Those that nobody has tried after all, or that have failed."""
        now = self._loop.time()
        self._committing = {key: one for key, one in self._committing.items() if one[1] > now}

    def is_direct(self, event: Event) -> bool:
        """It need not wait for rows that were written before it, nor be compared with others."""
        if self.more or event.dedup is not None:
            return False
        return event.partition not in self._committing or self._committing[event.partition][1] < self._loop.time()

    @property
    def is_quick(self) -> bool:
        """What is added now may well have arrived in a moment."""
        return self._open and not self.paused and self.breaker.is_well

    # -- sending -----------------------------------------------------------------------------------------------------

    def resume(self) -> None:
        self.paused = False
        self.pump()

    def hurry(self) -> None:
        """Try again now what waits for another attempt."""
        self.line.hurry(self._loop.time())
        self.pump()

    def pump(self) -> None:
        """Begin as many requests as may be under way."""
        now = self._loop.time()
        if self._http is not None and self.breaker.is_well:
            self._hand_over(now)
            return
        while self._open and not self.paused and self._out < self._settings.per_sink:
            wait = self.breaker.wait(now)
            if wait is None:
                return
            if wait > 0:
                return self._wake_at(now + wait)
            probe = self.breaker.is_open
            if self._batched:
                limit = 1 if probe else self._settings.batch_events
                items = self.line.take(now, limit=limit, size=_BATCH_BYTES, early=probe)
            else:
                items = self.line.take(now, limit=1, early=probe)
            if not items:
                self._wake_when_due(now)
                return
            self.breaker.begin()
            self._begin(items, probe)

    def _hand_over(self, now: float) -> None:
        """To the process that makes requests, while the sink is well, and not for more than it can do soon."""
        most = _AHEAD * self._settings.per_sink
        while self._open and not self.paused and self._out < most and self._out_bytes < _AHEAD_BYTES:
            if self._batched:
                items = self.line.take(now, limit=self._settings.batch_events, size=_BATCH_BYTES)
            else:
                items = self.line.take_chain(now, limit=_CHAIN)
            if not items:
                self._wake_when_due(now)
                return
            self._begin(items)

    def _wake_when_due(self, now: float) -> None:
        due = self.line.next_due(now)
        if due is not None:
            self._wake_at(due)

    def _pump_soon(self) -> None:
        """Once for all that happens in this turn of the loop."""
        self._pump_due = True
        self._loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        self._pump_due = False
        if self._open:
            self.pump()
            if self.has_room():
                self._roomy()

    def _begin(self, items: list[Item], probe: bool = False) -> None:
        """One request with all of them, where the sink is batched, else one for each."""
        http = self._http
        for item in items:
            item.handed = http is not None
            self._out_bytes += item.event.size
        self._out += 1 if self._batched else len(items)
        if http is not None:
            http.begin(items, self._probed if probe else self._answered)
            return
        assert not isinstance(self.sink, HttpSink)
        task = self._loop.create_task(self._send(self.sink, items), name=f"outbox {self.name}")
        self._tasks.add(task)
        task.add_done_callback(partial(self._sent, items, probe))

    async def _send(self, sink: Sends, items: list[Item]) -> Answer:
        try:
            return await sink.send([item.event for item in items])
        except Exception as exc:  # a bug; the events stay, or one of them would stop the sink
            log.error("event not sent", sink=self.name, exc=exc)
            return Answer("retry", f"{type(exc).__name__}")

    def _sent(self, items: list[Item], probe: bool, task: "asyncio.Task[Answer]") -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            self._answered(items, task.result(), probe)

    def _probed(self, items: list[Item], answer: Answer) -> None:
        self._answered(items, answer, True)

    def _answered(self, items: list[Item], answer: Answer, probe: bool = False) -> None:
        """Of one request."""
        self._out -= 1
        for item in items:
            self._out_bytes -= item.event.size
        if not self._out:
            self._empty.set()
        if not self._pump_due:
            self._pump_soon()
        if answer is ARRIVED and self.breaker.is_well:
            self.line.done(items, self._loop.time())
            self._count_sent(items)
        else:
            self._judge(items, answer, probe)

    def _judge(self, items: list[Item], answer: Answer, probe: bool) -> None:
        now = self._loop.time()
        if answer.verdict in ("untried", "lost"):
            self._not_answered(items, answer, probe)
            return
        if answer.verdict == "retry":
            self._again(items, answer, probe)
            return
        if self.breaker.succeeded():
            log.info("sink takes events again", sink=self.name, waiting=self.held)
            self.line.hurry(now)
        if answer.verdict == "dead" and len(items) > 1:
            for item in items:
                item.alone = True  # one of them is to blame: let it be found
            self._put_back(items, now, due=0.0)
            return
        self.line.done(items, now)
        if answer.verdict == "done":
            self._count_sent(items)
        else:
            self._bury(items, answer.reason)

    def _count_sent(self, items: list[Item]) -> None:
        now = time.time()
        self.sent += len(items)
        for item in items:
            self.seconds.observe(max(0.0, now - item.event.created_at))
            if item.written:
                self._mark(item, Mark(item.event.id, DONE, keep=item.event.dedup is not None))

    def _not_answered(self, items: list[Item], answer: Answer, probe: bool) -> None:
        """It says nothing of the sink; but one of the events may be what the process that makes requests dies of."""
        if answer.verdict == "lost":
            for item in items:
                item.attempts += 1
            if max(item.attempts for item in items) > _DEATHS:
                self._again(items, answer, probe)
                return
        if probe:
            self.breaker.forget()
        self._put_back(items, self._loop.time(), due=0.0)

    def _again(self, items: list[Item], answer: Answer, probe: bool) -> None:
        """`probe`: it was known that the sink is down, so that these events have to wait no longer because of it."""
        retry, now = self._settings.retry, self._loop.time()
        self.failed += 1
        if self.breaker.failed(now, not_before=answer.not_before):
            log.warning("sink does not take events", sink=self.name, reason=answer.reason, waiting=self.held)
        wall = time.time()
        old = [item for item in items if wall - item.event.created_at >= retry.give_up_after]
        if old and len(old) == len(items):
            self.line.done(items, now)
            self._bury(items, f"given up: {answer.reason}")
            return
        if probe:
            self._put_back(items, now, due=now + answer.not_before)
            return
        for item in items:
            item.attempts += 1
        wait = max(retry.wait(max(item.attempts for item in items)), answer.not_before)
        for item in items:
            if item.written:
                self._mark(item, Mark(item.event.id, PENDING, item.attempts, wall + wait, answer.reason))
        self._put_back(items, now, due=now + wait)
        log.debug("event tried in vain", sink=self.name, reason=answer.reason, wait_s=round(wait, 1))

    def _put_back(self, items: list[Item], now: float, *, due: float) -> None:
        """Nobody else has them any more."""
        for item in items:
            item.handed = False
            self._keep(item)
        self.line.put_back(items, now, due=due)

    def _bury(self, items: list[Item], reason: str) -> None:
        """Nobody tries again but an operator."""
        keep = self._settings.dead_letter == "keep"
        for item in items:
            self.dead += 1
            log.warning(
                "event is dead", sink=self.name, event_id=item.event.ulid, attempts=item.attempts, reason=reason
            )
            self._mark(item, Mark(item.event.id, DEAD if keep else DONE, item.attempts, error=reason))

    # -- the clock ---------------------------------------------------------------------------------------------------

    def _wake_at(self, when: float) -> None:
        if not self._open or (self._timer is not None and self._timer_due <= when):
            return
        self._cancel_timer()
        self._timer_due = when
        self._timer = self._loop.call_at(when, self._wake)

    def _wake(self) -> None:
        self._timer = None
        self.pump()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
