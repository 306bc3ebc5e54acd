"""What became of a stanza: the answer the router owes the stream that sent it.

- SAFE: a recipient has it for certain, or it is committed to the database, or nobody was ever to be told about it.
- ERROR: its sender was sent an error.
- A `Pending`: not known yet. While it is not *decided* (a database look-up comes first) it also holds back the
  stanzas behind it on the same stream; once decided, it only holds back the stream's acknowledgement.

For a recipient whose client acknowledges nothing, "has it for certain" means: the bytes left this machine and the
connection lived on for a while. `Records` keeps what was written to such a session until then, so that a connection
that turns out to be dead loses nothing: the records are routed again.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from enum import Enum
from typing import Any, Final, Protocol, TypeVar

from xmppd.errors import StanzaError, StorageError
from xmppd.events import Handled
from xmppd.hooks import Hooks, Spawn
from xmppd.log import get_logger
from xmppd.protocol.stanza import Stanza

_log = get_logger("xmppd.delivery")
E = TypeVar("E")
T = TypeVar("T")


class Bounce(Protocol):
    """Tells a stanza's sender what went wrong, where that is allowed."""

    def __call__(self, stanza: Stanza, error: StanzaError) -> "Outcome": ...


class Settled(Enum):
    """The two final outcomes."""

    SAFE = "safe"
    ERROR = "error"


SAFE: Final = Settled.SAFE
ERROR: Final = Settled.ERROR


class Pending:
    """An outcome that is not known yet. `settle` once; callbacks run at once, in order, and must not raise."""

    __slots__ = ("_decided", "_deciders", "_failed", "_settlers", "result")

    def __init__(self, *, decided: bool = True, failed: Callable[[StanzaError], Any] | None = None) -> None:
        self.result: Settled | None = None
        self._decided = decided
        self._failed = failed
        # One alone stands for itself: there is an outcome or two for each message, and a list costs the collector.
        self._settlers: Settler | list[Settler] | None = None
        self._deciders: list[Callable[[], None]] | None = None

    @property
    def decided(self) -> bool:
        """Whether the stream may go on with its next stanza."""
        return self._decided

    def decide(self) -> None:
        """Let the stream go on."""
        if self._decided:
            return
        self._decided = True
        for callback in self._deciders or ():
            callback()
        self._deciders = None

    def settle(self, result: Settled) -> None:
        """The outcome; a second call changes nothing."""
        if self.result is not None:
            return
        self.result = result
        if not self._decided:
            self.decide()
        settlers = self._settlers
        if settlers is not None:
            self._settlers = None
            if type(settlers) is list:
                for callback in settlers:
                    callback(result)
            else:
                settlers(result)  # type: ignore[operator]

    def fail(self, error: StanzaError) -> None:
        """Tell the sender, and be settled."""
        if self.result is None:
            if self._failed is not None:
                self._failed(error)
            self.settle(ERROR)

    def then(self, callback: "Settler") -> None:
        """Call back with the outcome, at once when it is known."""
        settlers = self._settlers
        if self.result is not None:
            callback(self.result)
        elif settlers is None:
            self._settlers = callback
        elif isinstance(settlers, list):
            settlers.append(callback)
        else:
            self._settlers = [settlers, callback]

    def when_decided(self, callback: Callable[[], None]) -> None:
        """Call back when the stream may go on, at once when it may already."""
        if self._decided:
            callback()
        elif self._deciders is None:
            self._deciders = [callback]
        else:
            self._deciders.append(callback)

    def follow(self, other: "asyncio.Future[object] | Outcome") -> None:
        """Become what the other becomes: a future that succeeds makes this SAFE, one that fails tells the sender."""
        if isinstance(other, Settled):
            self.settle(other)
        elif isinstance(other, Pending):
            other.when_decided(self.decide)
            other.then(self.settle)
        else:
            self.decide()
            other.add_done_callback(self._future_done)

    def _future_done(self, future: "asyncio.Future[object]") -> None:
        if future.cancelled():
            self.fail(StanzaError("internal-server-error", "the server is stopping", type="wait"))
            return
        error = future.exception()
        if error is None:
            self.settle(SAFE)
        else:
            self.fail(as_stanza_error(error))


Outcome = Settled | Pending
Settler = Callable[[Settled], None]


class Unsettled(Pending):
    """The outcome of a stanza that is kept until it is known."""

    __slots__ = ("stanza",)

    def __init__(self, stanza: Stanza) -> None:
        # One for each message: spelled out, it takes half the time.
        self.result = None
        self._decided = True
        self._failed = None
        self._settlers = None
        self._deciders = None
        self.stanza = stanza


def as_stanza_error(error: BaseException) -> StanzaError:
    """What a sender is told about a failure: its own words for a StanzaError, "try later" when storage is in trouble,
    else an internal error, which is logged."""
    if isinstance(error, StanzaError):
        return error
    if isinstance(error, StorageError):
        return StanzaError("internal-server-error", "the server cannot store this now", type="wait")
    _log.error("stanza failed", exc=error)
    return StanzaError("internal-server-error")


def first_of(outcomes: list[Outcome]) -> Outcome:
    """The outcome of several copies of one stanza: safe as soon as one of them is, and then all of them are: none has
    to be sent again."""
    waiting = [outcome for outcome in outcomes if isinstance(outcome, Pending)]
    if any(outcome is SAFE for outcome in outcomes):
        for outcome in waiting:
            outcome.settle(SAFE)
        return SAFE
    if not waiting:
        return ERROR
    if len(waiting) == 1:
        return waiting[0]
    combined = Pending()
    left = len(waiting)

    def one(result: Settled) -> None:
        nonlocal left
        left -= 1
        if (result is SAFE or left == 0) and combined.result is None:
            combined.settle(result)
            for other in waiting:
                other.settle(result)

    for outcome in waiting:
        outcome.then(one)
    return combined


def in_place(waiting: Iterable[tuple[Stanza, T]]) -> list[tuple[Stanza, T]]:
    """What has waited, in the order of places, which is not that in which it came when some took a longer way. What has
    none stays behind what it came behind."""
    entries = list(waiting)
    places, last = [], 0
    for stanza, _ in entries:
        last = stanza.place or last
        places.append(last)
    order = sorted(range(len(entries)), key=places.__getitem__)
    return [entries[index] for index in order]


class Record:
    """A stanza that was written to a session and may not have arrived."""

    __slots__ = ("outcome", "stanza")

    def __init__(self, stanza: Stanza, outcome: Pending) -> None:
        self.stanza = stanza
        self.outcome = outcome


class Records:
    """What was written to one session and is not yet certain to have arrived.

    Two generations: `ripen`, called about once a second while the peer has taken every byte, settles the records that
    were already there at the call before. So a record lives one to two such periods, without a time stamp each.
    """

    __slots__ = ("_fresh", "_ripe")

    def __init__(self) -> None:
        self._fresh: list[Unsettled] = []
        self._ripe: list[Unsettled] = []

    def __len__(self) -> int:
        return len(self._fresh) + len(self._ripe)

    def add(self, stanza: Stanza) -> Pending:
        """Remember a stanza that is being written."""
        outcome = Unsettled(stanza)
        self._fresh.append(outcome)
        return outcome

    def ripen(self) -> None:
        """The peer has taken all bytes and lives: settle what is older than the previous call."""
        ripe, self._ripe, self._fresh = self._ripe, self._fresh, []
        for outcome in ripe:
            outcome.settle(SAFE)

    def confirm_all(self) -> None:
        """The peer is known to have taken everything."""
        for record in self.take():
            record.outcome.settle(SAFE)

    def take(self) -> list[Record]:
        """All records, oldest first, which are forgotten here: the caller settles them or routes them again."""
        outcomes = self._ripe + self._fresh
        self._ripe, self._fresh = [], []
        return [Record(outcome.stanza, outcome) for outcome in outcomes]


class Turns:
    """Records that are routed again, those of one user one after the other: the next when the one before is decided.
    What else is for that user has to come behind.

    `route` may not raise.
    """

    __slots__ = ("_route", "_users")

    def __init__(self, route: Callable[[Record], Outcome]) -> None:
        self._route = route
        self._users: dict[str, _Turn] = {}

    def __contains__(self, user: str) -> bool:
        return user in self._users

    def __bool__(self) -> bool:
        return bool(self._users)

    def add(self, user: str, record: Record) -> None:
        """Now, or behind those that are there."""
        turn = self._users.get(user)
        if turn is not None:
            turn.records.append(record)
            return
        self._users[user] = turn = _Turn(record)
        self._go_on(user, turn)

    def _go_on(self, user: str, turn: "_Turn") -> None:
        while turn.records:
            record = turn.records.popleft()
            if record.outcome.result is not None:
                continue
            turn.stanza = record.stanza
            outcome = self._route(record)
            if isinstance(outcome, Pending) and not outcome.decided:
                outcome.when_decided(lambda: self._go_on(user, turn))
                return
        del self._users[user]
        if turn.done is not None:
            turn.done.set_result(None)

    def goes_on_as(self, user: str, stanza: Stanza, other: Stanza) -> None:
        """What is being routed is another stanza from now on."""
        turn = self._users.get(user)
        if turn is not None and turn.stanza is stanza:
            turn.stanza = other

    def ahead(self, user: str, stanza: Stanza | None) -> "asyncio.Future[None] | None":
        """What a message for that user has to wait for; None when nothing is, or it is its turn."""
        turn = self._users.get(user)
        if turn is None or turn.stanza is stanza:
            return None
        if turn.done is None:
            turn.done = asyncio.get_running_loop().create_future()
        return turn.done


class _Turn:
    """Of one user: what is being routed, and what follows."""

    __slots__ = ("done", "records", "stanza")

    def __init__(self, record: Record) -> None:
        self.records = deque((record,))
        self.stanza = record.stanza
        self.done: asyncio.Future[None] | None = None


class Gate:
    """Asks the deciders of an event about a stanza, then goes on; waits for those that are coroutines."""

    def __init__(self, hooks: Hooks, spawn: Spawn, bounce: Bounce) -> None:
        self._hooks = hooks
        self._spawn = spawn
        self._bounce = bounce

    def ask(self, event: E, stanza: Stanza, go: Callable[[E], Outcome], handled: Outcome = SAFE) -> Outcome:
        """`go(event as the handlers left it)`, or `handled` when one of them took it over. Raises StanzaError."""
        decision = self._hooks.decide(event)
        if isinstance(decision, Handled):
            return handled
        if isinstance(decision, type(event)):
            return go(decision)
        waiting: Any = decision

        async def decide() -> Outcome:
            decided = await waiting
            return handled if isinstance(decided, Handled) else go(decided)

        return self.wait(stanza, decide())

    def wait(self, stanza: Stanza, work: Coroutine[Any, Any, Outcome]) -> Outcome:
        """Run what has to wait, holding back the stanzas behind this one; its sender is told when it fails."""
        pending = Pending(decided=False, failed=lambda error: self._bounce(stanza, error))

        async def run() -> None:
            try:
                pending.follow(await work)
            except asyncio.CancelledError:
                pending.fail(StanzaError("internal-server-error", "the server is stopping", type="wait"))
                raise
            except Exception as exc:
                pending.fail(as_stanza_error(exc))

        self._spawn(run(), name=f"{stanza.kind} waits")
        return pending
