"""Sessions of one user that follow each other on several nodes: what is new waits for what older ones leave.

A place (Stanza.place) orders what is stored, not what is written to a client at once. So while an older message may
still come another way, on its way to a session that has ended elsewhere or in the hands of one that is about to, new
ones wait: here, for a user, or at the session that came last. The other node is asked, with the call that takes a full
JID back; its answer comes behind all it had.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Final, Protocol, TypeVar

from xmppd.cluster.tables import Owner, SessionRow, SessionTable
from xmppd.delivery import Bounce, Pending, Record, in_place
from xmppd.errors import StanzaError
from xmppd.events import MessagesFound, MessagesFreeing
from xmppd.hooks import Hooks, Spawn
from xmppd.protocol.jid import JID, bare, parse
from xmppd.protocol.stanza import Stanza

_MADE_WAY: Final = 10.0  # seconds for which it is remembered that a session made way for a newer one
_HIDDEN: Final = 30.0  # seconds for which it is remembered that a node was asked for what it has of one
_ASKED: Final = 1.0  # seconds until a node is asked once more what it has for somebody who is not available there
_MOST: Final = 10_000  # messages for one user that wait; more are refused
_UNDISPUTED: Final = 2.0  # seconds a client waits for that when it binds
_K = TypeVar("_K")
_V = TypeVar("_V")


class Others(Protocol):
    """The forwarder: the other nodes, which are named by their UUIDs."""

    def owes(self, node: bytes, user: str) -> bool:
        """Whether a message was sent there for a bare JID of which nothing is known yet."""
        ...

    def hand_over(self, node: bytes, jid: JID, bound_at: int) -> Coroutine[object, object, bool]: ...

    def yielded(self, node: bytes, jid: JID) -> None:
        """Say there that an older session of a full JID has ended here, and leaves something."""
        ...


class Holds:
    """Messages that are routed on this node, by the bare JID of whom they are for, which wait until all is done that is
    waited for; `let_go` gets them then. Their senders' streams go on: others are not to wait for this user."""

    def __init__(self, bounce: Bounce, let_go: Callable[[str, Record], None]) -> None:
        self._bounce = bounce
        self._let_go = let_go
        self.users: dict[str, _Held] = {}  # looked at for every message, so that it is asked nothing else as a rule

    def __contains__(self, user: str) -> bool:
        return user in self.users

    def add(self, user: str, until: "asyncio.Future[None]") -> None:
        """Have messages for a user wait until that is done, too."""
        held = self.users.setdefault(user, _Held())
        held.futures.append(until)

        def done(until: "asyncio.Future[None]") -> None:
            held.futures.remove(until)
            if not held.futures and self.users.get(user) is held:
                del self.users[user]
                self._end(user, held)

        until.add_done_callback(done)

    def wait(self, user: str, stanza: Stanza) -> Pending:
        """One of those that wait. Raises StanzaError when there are too many."""
        held = self.users[user]
        if len(held.behind) >= _MOST:
            raise StanzaError("resource-constraint", "too many messages wait for this recipient")
        pending = Pending(failed=lambda error: self._bounce(stanza, error))
        held.behind.append((stanza, pending))
        return pending

    def end(self) -> None:
        """The node stops: what has waited goes where it can."""
        for user, held in list(self.users.items()):
            del self.users[user]  # else what is let go would wait again
            self._end(user, held)

    def _end(self, user: str, held: "_Held") -> None:
        behind, held.behind = in_place(held.behind), []
        for stanza, pending in behind:
            self._let_go(user, Record(stanza, pending))


class _Held:
    """What is waited for on behalf of a user, and the messages that wait."""

    __slots__ = ("behind", "futures")

    def __init__(self) -> None:
        self.futures: list[asyncio.Future[None]] = []
        self.behind: list[tuple[Stanza, Pending]] = []


class _Lately(dict[_K, tuple[float, _V]]):
    """What is remembered for some seconds: since when (time.monotonic()), and what; the oldest first."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds

    def remember(self, key: _K, value: _V) -> None:
        self.pop(key, None)
        self[key] = time.monotonic(), value
        self.forget_old()

    def forget_old(self) -> None:
        before = time.monotonic() - self._seconds
        while self and next(iter(self.values()))[0] < before:
            del self[next(iter(self))]


class Succession:
    """One per node."""

    def __init__(self, table: SessionTable, holds: Holds, hooks: Hooks, spawn: Spawn) -> None:
        self._table = table
        self._holds = holds
        self._hooks = hooks
        self._spawn = spawn
        self._others: Others | None = None
        # Full JIDs, bound here when, on other nodes: done when these have given them up.
        self._taking: dict[tuple[str, int, bytes], asyncio.Future[None]] = {}
        self._displacing: dict[str, bytes] = {}  # the node that held a full JID which was just bound here
        # By bare JID: the node where a session made way for a newer one, and its full JID.
        self.made_way: _Lately[str, tuple[bytes, JID]] = _Lately(_MADE_WAY)
        # As in _taking: when a node is asked.
        self._hidden: _Lately[tuple[str, int, bytes], asyncio.Future[None]] = _Lately(_HIDDEN)
        self._asked: _Lately[str, asyncio.Future[None]] = _Lately(_ASKED)  # bare JIDs: a node was asked what it has
        table.on_conflict.append(self._lost)
        table.on_left.append(self._left)
        table.on_displacing.append(lambda row, owner: self._displaces(row, owner.member))

    def connect(self, others: Others) -> None:
        """Hand in the way to the other nodes."""
        self._others = others

    # -- a session that comes

    def displaces(self, row: SessionRow, node: bytes) -> None:
        """A session was bound here whose full JID a node had, as far as is known here; see `undisputed`."""
        self._displacing[row.jid.full] = node

    def undisputed(self, row: SessionRow) -> Awaitable[None] | None:
        """What must be awaited before the client is told that it is bound: another node takes back what it has said of
        the session that was displaced there. Where that node does not answer soon the client is told, but gets no
        messages before it has answered, or is known to be dead: what waited there comes first."""
        node = self._displacing.pop(row.jid.full, None) if self._displacing else None
        if node is None or self._others is None or row.session is None:
            return None
        taken_back = self._take_over(self._others, node, row)
        return None if taken_back is None else self._soon(taken_back)

    def take_over(self, node: bytes, jid: JID) -> None:
        """An older session of that full JID has ended on a node: what it leaves comes first."""
        row = self._table.rows(jid.bare).get(jid.resource)
        if row is not None:
            self._displaces(row, node)

    def _displaces(self, row: SessionRow, node: bytes) -> None:
        """After a split: the other node's session ends, and what it leaves is older than what comes from here on."""
        if self._others is not None and row.session is not None and row.jid.full not in self._displacing:
            self._take_over(self._others, node, row)

    def _take_over(self, others: Others, node: bytes, row: SessionRow) -> "asyncio.Future[None] | None":
        """Done when a node has given up what it had for this full JID; None: that is waited for already."""
        key = (row.jid.full, row.bound_at, node)
        if key in self._taking:
            return None
        self._taking[key] = taken_back = self._until_handed_over(others, node, row.jid, row.bound_at)
        taken_back.add_done_callback(lambda done: self._taking.pop(key))
        row.session.hold_messages(taken_back)
        self._hooks.notify_aside(MessagesFreeing(bare(row.jid), taken_back), self._spawn, name="messages freeing")
        return taken_back

    @staticmethod
    async def _soon(taken_back: "asyncio.Future[None]") -> None:
        await asyncio.wait((taken_back,), timeout=_UNDISPUTED)

    def _until_handed_over(self, others: Others, node: bytes, jid: JID, bound_at: int) -> "asyncio.Future[None]":
        """Done when a node has nothing more for a full JID that was bound elsewhere at that time (0: it has ended)."""
        until: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        async def ask() -> None:
            # That it is safe is not enough: what is stored there may not be free yet.
            try:
                await others.hand_over(node, jid, bound_at)
                # It may not know where the user is now.
                self._hooks.notify_aside(MessagesFound(bare(jid)), self._spawn, name="messages found")
            finally:
                if not until.done():
                    until.set_result(None)

        self._spawn(ask(), name="session of another node taken back")
        return until

    # -- a session that goes

    def is_older(self, jid: JID, bound_at: int) -> bool:
        """Whether a session of that full JID is here that was bound before that time, and no newer one is known."""
        row = self._table.rows(jid.bare).get(jid.resource)
        return row is not None and row.session is not None and row.bound_at < bound_at

    def yield_to(self, jid: JID, bound_at: int) -> None:
        """A session of that full JID was bound at that time on another node: end ours, if it is older."""
        if self.is_older(jid, bound_at):
            self._table.rows(jid.bare)[jid.resource].session.replaced()

    def _lost(self, row: SessionRow) -> None:
        """The table says that this row of ours was displaced by another node, which has not seen it, perhaps."""
        session = row.session
        if session is None:
            return
        newer = self._table.rows(row.jid.bare).get(row.jid.resource)
        if self._others is not None and newer is not None and session.waiting().unacknowledged:
            self._others.yielded(newer.owner.member, row.jid)
        session.replaced()

    def _left(self, owner: Owner, user: str, resource: str) -> None:
        """A session has gone from another node. What is on its way to it is stored there, or sent on; what is new waits
        until it is where it belongs, or known to have arrived. One that made way for a newer session, after a split,
        may have been sent messages that are stored there by now: that is asked when the next one comes."""
        if self._others is None:
            return
        if self._others.owes(owner.member, user):
            self._hold(self._others, owner.member, parse(f"{user}/{resource}"))
        elif (newer := self._table.rows(user).get(resource)) is not None and newer.owner != owner:
            self.made_way.remember(user, (owner.member, parse(f"{user}/{resource}")))

    # -- messages

    def _hold(self, others: Others, node: bytes, jid: JID) -> None:
        self._holds.add(jid.bare, self._until_handed_over(others, node, jid, 0))

    def holds(self, user: str) -> bool:
        """Whether new messages for a user wait; a node whose session made way is asked first what that has left."""
        self.made_way.forget_old()
        if (way := self.made_way.pop(user, None)) is not None and self._others is not None:
            self._hold(self._others, *way[1])
        return user in self._holds

    def asks_first(self, user: str, rows: Iterable[SessionRow]) -> "asyncio.Future[None] | None":
        """Of somebody who is bound, but not available: done when it is known what became of messages that were sent to
        them on another node, as when that has not looked at them since the link came up. None: it is known. It is asked
        for these before others are stored, which would come before them: new ones wait."""
        others = self._others
        if others is None:
            return None

        def ask() -> "asyncio.Future[None] | None":
            for row in rows:
                if row.session is None and others.owes(row.owner.member, user):
                    return self._until_handed_over(others, row.owner.member, row.jid, 0)
            return None

        return self._ask_once(self._asked, user, user, ask)

    def ask_hidden(self, row: SessionRow) -> "asyncio.Future[None] | None":
        """Another node has, as far as is known here, an older session of this one's full JID: new messages for the user
        wait until it has ended and what it leaves is where it belongs, which the future tells; None: that is known. As
        a rule it takes milliseconds."""
        others, node = self._others, row.hides
        if others is None or node is None:
            return None
        key = (row.jid.full, row.bound_at, node)

        def ask() -> "asyncio.Future[None]":
            return self._taking.get(key) or self._until_handed_over(others, node, row.jid, row.bound_at)

        return self._ask_once(self._hidden, key, row.jid.bare, ask)

    def _ask_once(
        self,
        lately: "_Lately[_K, asyncio.Future[None]]",
        key: _K,
        user: str,
        ask: "Callable[[], asyncio.Future[None] | None]",
    ) -> "asyncio.Future[None] | None":
        """What has been asked lately, or is asked now: new messages for the user wait until it is answered. None: there
        is nothing to ask, or it is answered."""
        lately.forget_old()
        if key not in lately:
            asked = ask()
            if asked is None:
                return None
            lately.remember(key, asked)
            self._holds.add(user, asked)
        _, answer = lately[key]
        return None if answer.done() else answer
