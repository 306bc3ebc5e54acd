"""The session manager: what arrives for a user goes to the right sessions, to those who keep it, or back.

The rules are the tables of requirements 3.4: MAX is every available resource of the highest priority, if that is not
negative; NONNEG all that are not negative; OFF means MessageUndeliverable, where storage for absent users listens.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Final, Protocol

from xmppd.cluster.tables import Lost, Owner, SessionRow, SessionTable
from xmppd.delivery import (
    ERROR,
    SAFE,
    Bounce,
    Gate,
    Outcome,
    Pending,
    Record,
    Settled,
    Turns,
    as_stanza_error,
    first_of,
)
from xmppd.errors import StanzaError
from xmppd.events import (
    DirectedPresenceArrived,
    LostSession,
    MessageUndeliverable,
    PresenceBounced,
    ProbeReceiving,
    RequestReceiving,
    SessionAppeared,
    SessionsLost,
    SubscriptionReceiving,
)
from xmppd.forward import HOPS, Copy, Forwarded
from xmppd.hooks import Hooks, Spawn
from xmppd.iq import IqDispatcher
from xmppd.protocol.jid import JID, bare
from xmppd.protocol.stanza import Stanza
from xmppd.succession import Holds, Others, Succession

Rows = Mapping[str, SessionRow]
_STORING: Final = 10.0  # seconds that a message which came from another node waits for what is being stored here
SUBSCRIPTIONS = frozenset({"subscribe", "subscribed", "unsubscribe", "unsubscribed"})


class LiveSession(Protocol):
    """A session of this process, as its manager sees it."""

    jid: JID
    anonymous: bool

    @property
    def awaits_older(self) -> bool:
        """Whether messages for it wait for older ones already."""
        ...

    def deliver(self, stanza: Stanza) -> Outcome:
        """Write to its client, behind what was stored for it. Raises StanzaError."""
        ...

    def hold_messages(self, until: "asyncio.Future[None]") -> None:
        """Have messages for it wait until that is done."""
        ...

    def replaced(self) -> None:
        """Another stream bound the same resource: end with `conflict`."""
        ...

    def kick(self, reason: str, condition: str) -> None:
        """An operator ends it."""
        ...

    def info(self) -> "SessionInfo": ...

    def waiting(self) -> "Waiting": ...


class KnownAccounts(Protocol):
    """Which accounts exist."""

    def known(self, host: str, username: str) -> bool:
        """Whether it is remembered to exist; False means: ask."""
        ...

    async def exists(self, host: str, username: str) -> bool: ...


class Remote(Others, Protocol):
    """The forwarder: what leads to sessions of other nodes, which are named by their UUIDs."""

    def is_up(self, node: bytes) -> bool: ...

    def send(self, node: bytes, stanza: Stanza, resources: Sequence[str], *, copy: bool = False) -> Outcome | None:
        """None when the node is not up. The outcome of a copy is SAFE or a `Copy`."""
        ...

    def send_extra(self, node: bytes, stanza: Stanza, resources: Sequence[str]) -> None:
        """To sessions that wait for resumption there: nothing is told of what becomes of it."""
        ...

    def spread(self, node: bytes, stanza: Stanza, users: Sequence[str]) -> None: ...

    def hold(self, node: bytes, until: "asyncio.Future[None]") -> None: ...

    def kick(self, nodes: Sequence[bytes], jid: JID, reason: str, condition: str) -> None: ...


class ExtraCopy(Stanza):
    """Of a message that others have: it is not sent again when its session ends."""

    __slots__ = ()
    copy: ClassVar[bool] = True

    @classmethod
    def of(cls, stanza: Stanza) -> "ExtraCopy":
        copy = cls(stanza.kind, stanza.type, stanza.id, stanza.to, stanza.from_, stanza.xml)
        copy.place = stanza.place
        return copy


class _Unreachable(Exception):
    """A row belongs to a node that is not up: it is about to go."""


@dataclass(frozen=True, slots=True)
class Resource:
    """A bound resource of a user, wherever in the cluster."""

    jid: JID  # full
    priority: int | None  # None until it is available
    node: bytes | None  # the UUID of the other node it is on; None: on this one


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """One session for an operator's eyes."""

    user: str
    host: str
    resource: str
    connection: str  # c2s, c2s_tls
    ip: str
    port: int
    priority: int | None
    node: str
    uptime_seconds: int
    show: str  # available, chat, away, xa, dnd; "" before presence
    status_text: str


@dataclass(frozen=True, slots=True)
class Waiting:
    """What waits for one client, for an operator's eyes."""

    jid: JID  # full
    state: str  # connected; waiting: to be resumed; plain: without stream management
    resume_left: float  # seconds a session that waits has
    unacknowledged: int  # stanzas
    bytes: int
    spooled: int  # of these
    unsettled: int  # stanzas that came from it, and what became of them is not known yet
    round_trip: float  # seconds an acknowledgement takes


class SessionManager:
    """One per node; the table behind it is the cluster's."""

    def __init__(
        self,
        *,
        table: SessionTable,
        owner: Owner,
        accounts: KnownAccounts,
        hooks: Hooks,
        iqs: IqDispatcher,
        bounce: Bounce,
        spawn: Spawn,
        strict: bool = False,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        """`clock_ns`: a time on which all nodes agree, in nanoseconds since 1970."""
        self._table = table
        self._owner = owner
        self._accounts = accounts
        self._hooks = hooks
        self._iqs = iqs
        self._bounce = bounce
        self._clock_ns = clock_ns
        self._spawn = spawn
        self._gate = Gate(hooks, spawn, bounce)
        self._turns = Turns(self._reroute_one)
        self.strict = strict  # routing.profile: rfc6121
        self.rerouted = 0  # stanzas whose session turned out to be dead
        self._remote: Remote | None = None
        self.freeing: Mapping[str, set[asyncio.Future[None]]] = {}  # what ended sessions leave in the spool
        self._holds = Holds(bounce, self._turns.add)
        self.succession = Succession(table, self._holds, hooks, spawn)
        self._keeping: dict[str, deque[Pending]] = {}  # by bare JID: being stored
        table.on_appeared.append(self._appeared)
        table.on_vanished.append(self._vanished)

    def connect(self, remote: Remote) -> None:
        """Hand in the way to the sessions of other nodes."""
        self._remote = remote
        self.succession.connect(remote)

    def open(self, session: LiveSession, *, priority: int | None = None, later_than: int = 0) -> SessionRow:
        """Enter a session that was just bound; one with the same full JID, here or elsewhere, ends with `conflict`
        (requirements ST-01). One that was on another node, with a row bound at `later_than`, has a priority already."""
        bound_at = max(self._clock_ns(), later_than + 1)
        row = SessionRow(session.jid, self._owner, bound_at, session, anonymous=session.anonymous)
        row.priority = priority
        displaced = self._table.insert(row)
        if displaced is not None:
            if displaced.session is not None:
                displaced.session.replaced()
            else:
                self.succession.displaces(row, displaced.owner.member)
        return row

    def _appeared(self, user: str, row: SessionRow) -> None:
        if self._hooks.wants(SessionAppeared):
            appeared = SessionAppeared(bare(row.jid), row.owner.member)
            self._hooks.notify_aside(appeared, self._spawn, name="session appeared")

    def _vanished(self, owner: Owner, rows: Lost) -> None:
        if self._hooks.wants(SessionsLost):
            lost = SessionsLost(owner.member, _LostSessions(rows))
            self._hooks.notify_aside(lost, self._spawn, name="sessions lost")

    def close(self, row: SessionRow) -> bool:
        """Take a session's row out; True when it was the user's last one in the cluster."""
        self._table.remove(row)
        row.session = None
        return not self._table.rows(row.jid.bare)

    def set_priority(self, row: SessionRow, priority: int | None, *, guarded: bool = False) -> None:
        """The priority of its presence, or None when it is no longer available; and whether a module guards it."""
        self._table.set_priority(row, priority, guarded=guarded)

    def set_waiting(self, row: SessionRow, waiting: bool) -> None:
        """Whether it has lost its stream and may be resumed."""
        self._table.set_waiting(row, waiting)

    def end_oldest(self, user: JID, keep: int) -> None:
        """End the user's oldest sessions beyond `keep`, on whatever node (requirements ST-02)."""
        rows = sorted(self._table.rows(user.bare).values(), key=lambda row: row.bound_at)
        for row in rows[: max(0, len(rows) - keep)]:
            if row.session is not None:
                row.session.replaced()
            else:
                self._kick_elsewhere([row], row.jid, "Replaced by new connection", "conflict")

    def sessions(self, user: JID) -> list[LiveSession]:
        """The live sessions of a bare JID on this node."""
        return [row.session for row in self._table.rows(user.bare).values() if row.session is not None]

    def resources(self, user: JID) -> list[Resource]:
        """What a user has bound, on whatever node."""
        return [
            Resource(row.jid, row.priority, row.owner.member if row.session is None else None)
            for row in self._table.rows(user.bare).values()
        ]

    def on_node(self, node: bytes) -> Iterator[Resource]:
        """What is bound on another node, of which there may be much."""
        return (Resource(row.jid, row.priority, node) for row in self._table.rows_on(node))

    def nodes_of(self, user: JID) -> set[bytes]:
        """The other nodes on which a user has sessions."""
        return self._table.nodes_of(user.bare)

    def local(self) -> Iterator[LiveSession]:
        """Every live session of this node."""
        return (row.session for row in self._table.own_sessions() if row.session is not None)

    def is_bound(self, jid: JID) -> bool:
        return self._table.is_bound(jid)

    def is_available(self, user: JID) -> bool:
        """Whether a resource is there that takes messages (priority not negative)."""
        return bool(_not_negative(self._table.rows(user.bare)))

    def takes_messages_here(self, user: JID) -> bool:
        """The same, on this node."""
        return bool(_not_negative(_here(self._table.rows(user.bare))))

    async def settled_here(self, user: JID) -> None:
        """Wait until what sessions of a user have left here is in the spool and free for others, or on its way to
        where the user is."""
        while waiting := [*self.freeing.get(user.bare, ()), *self._unfinished(user.bare)]:
            await asyncio.wait(waiting)

    def _unfinished(self, user: str) -> "Iterator[asyncio.Future[None]]":
        if (turn := self._turns.ahead(user, None)) is not None:
            yield turn
        yield from self._being_kept(user)

    def _being_kept(self, user: str) -> "Iterator[asyncio.Future[None]]":
        if keeping := self._keeping.get(user):
            done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

            def end(result: Settled) -> None:
                if not done.done():
                    done.set_result(None)

            keeping[-1].then(end)
            yield done

    def _kept(self, user: str, pending: Pending, result: Settled) -> None:
        keeping = self._keeping[user]
        keeping.remove(pending)
        if not keeping:
            del self._keeping[user]

    def is_anonymous(self, user: JID) -> bool:
        """Whether this account exists for its session alone: nothing is kept for it, here or on any node."""
        return any(row.anonymous for row in self._table.rows(user.bare).values())

    # -- routing

    def route(self, stanza: Stanza) -> Outcome:
        """Deliver a stanza for a user of one of our hosts. Raises StanzaError."""
        to = stanza.to
        assert to is not None
        rows = self._table.rows(to.bare)
        if stanza.hops >= HOPS or stanza.kept:
            # It has come far enough; or it is a row of the database, which whoever takes it finds there.
            rows = _here(rows)
        try:
            return self._by_kind(stanza, to, rows)
        except _Unreachable:
            return self._by_kind(stanza, to, self._reachable(rows))

    def _by_kind(self, stanza: Stanza, to: JID, rows: Rows) -> Outcome:
        if stanza.kind == "message":
            return self._message(stanza, to, rows)
        if stanza.kind == "iq":
            return self._iq(stanza, to, rows)
        return self._presence(stanza, to, rows)

    def reroute(self, records: Iterable[Record]) -> None:
        """What was written to a session that died, or sent to a node that went down, goes to another session, or is
        kept, or (IQ) back to its sender."""
        for record in records:
            if record.outcome.result is not None:
                continue
            self.rerouted += 1
            stanza = record.stanza
            if stanza.copy:
                record.outcome.settle(SAFE)
            elif stanza.kind == "message" and stanza.to is not None:
                self._turns.add(stanza.to.bare, record)
            else:
                self._reroute_one(record)

    def _reroute_one(self, record: Record) -> Outcome:
        stanza = record.stanza
        try:
            if stanza.kind == "iq":
                outcome = self._bounce(stanza, StanzaError("service-unavailable"))
            else:
                outcome = self.route(stanza)
        except Exception as exc:  # the others have to go on
            outcome = self._bounce(stanza, as_stanza_error(exc))
        record.outcome.follow(outcome)
        return outcome

    def multicast(self, stanza: Stanza, users: Iterable[JID], *, only: bytes | None = None) -> None:
        """Give one presence to every available resource of many users of our hosts; `to` becomes each user's bare JID.
        `only`: to those on that other node.

        The table is asked once per user and the bytes are made once; what crosses to another node does so once."""
        if only is not None:
            if self._remote is not None:
                self._remote.spread(only, stanza, [user.bare for user in users])
            return
        elsewhere: dict[bytes, list[str]] = {}
        for user in users:
            rows = self._table.rows(user.bare)
            if rows:
                self._spread(stanza, user, rows, elsewhere)
        if self._remote is not None:
            for node, there in elsewhere.items():
                self._remote.spread(node, stanza, there)

    def _spread(self, stanza: Stanza, user: JID, rows: Rows, elsewhere: dict[bytes, list[str]]) -> None:
        """`elsewhere` gets the user's bare JID, once for each other node it has to go to."""
        addressed: Stanza | None = None
        for row in rows.values():
            if row.priority is None:
                continue
            if row.session is None:
                there = elsewhere.setdefault(row.owner.member, [])
                if not there or there[-1] != user.bare:
                    there.append(user.bare)
                continue
            if addressed is None:
                addressed = stanza.addressed(user)
            with suppress(StanzaError):  # this one may not see it; the others may
                row.session.deliver(addressed)

    # -- from other nodes

    def arrived(self, stanza: Stanza, resources: Sequence[str]) -> Outcome:
        """Deliver what another node has sent to some resources of a user; where they have gone meanwhile it is routed
        from here. Raises StanzaError."""
        to = stanza.to
        assert to is not None
        if len(resources) == 1 and stanza.kind != "presence":  # by far the most
            row = self._table.rows(to.bare).get(resources[0])
            if row is not None and row.session is not None:
                outcome: Outcome = row.session.deliver(stanza)
                return outcome
        if stanza.kind == "presence":
            if stanza.type == "error":
                self._hooks.notify(PresenceBounced(to, stanza))
            elif stanza.type in ("available", "unavailable"):
                self._hooks.notify(DirectedPresenceArrived(stanza))
        rows = self._named(to, resources)
        return self._deliver_all(rows, stanza) if rows else self.route(stanza)

    def comes_behind(self, node: bytes, stanza: Stanza, resources: Sequence[str]) -> None:
        """What another node is storing for some resources of a user is older than this. A session that has come from
        there knows; one that was bound anew has to wait, too."""
        assert stanza.to is not None
        for row in self._named(stanza.to, resources):
            if not row.session.awaits_older:
                self.succession.take_over(node, row.jid)

    def arrived_copy(self, stanza: Stanza, resources: Sequence[str]) -> Outcome | None:
        """The same for one of several copies; None when none of the resources is there. Raises StanzaError."""
        assert stanza.to is not None
        rows = self._named(stanza.to, resources)
        return self._deliver_all(rows, stanza) if rows else None

    def arrived_extra(self, stanza: Stanza, resources: Sequence[str]) -> None:
        """A copy for sessions that wait for resumption."""
        assert stanza.to is not None
        for row in self._named(stanza.to, resources):
            with suppress(StanzaError):
                row.session.deliver(ExtraCopy.of(stanza))

    def _named(self, to: JID, resources: Sequence[str]) -> list[SessionRow]:
        rows = self._table.rows(to.bare)
        found = [rows[resource] for resource in resources if resource in rows]
        return [row for row in found if row.session is not None]

    def spread(self, stanza: Stanza, users: Iterable[JID]) -> None:
        """Give a presence to the available resources that users have on this node."""
        for user in users:
            self._spread(stanza, user, self._table.rows(user.bare), {})

    # -- to sessions

    def _deliver(self, row: SessionRow, stanza: Stanza) -> Outcome:
        if row.session is None:
            return self._send_on(row.owner.member, stanza, (row.jid.resource,))
        outcome: Outcome = row.session.deliver(stanza)
        return outcome

    def _deliver_all(self, rows: list[SessionRow], stanza: Stanza) -> Outcome:
        if len(rows) == 1:
            return self._deliver(rows[0], stanza)
        if not rows:
            return SAFE
        here = [row for row in rows if row.session is not None]
        if len(here) == len(rows):
            return first_of([row.session.deliver(stanza) for row in here])
        elsewhere: dict[bytes, list[str]] = {}
        for row in rows:
            if row.session is None:
                elsewhere.setdefault(row.owner.member, []).append(row.jid.resource)
        if not here and len(elsewhere) == 1:
            [(node, resources)] = elsewhere.items()
            return self._send_on(node, stanza, resources)
        return self._deliver_copies(here, elsewhere, stanza)

    def _send_on(self, node: bytes, stanza: Stanza, resources: Sequence[str]) -> Outcome:
        outcome = None if self._remote is None else self._remote.send(node, stanza, resources)
        if outcome is None:
            raise _Unreachable
        return outcome

    def _deliver_copies(
        self, here: list[SessionRow], elsewhere: Mapping[bytes, Sequence[str]], stanza: Stanza
    ) -> Outcome:
        """The same stanza for resources on several nodes: safe as soon as one has it, and told once when none has."""
        outcomes: list[Outcome] = []
        refusals: list[StanzaError] = []
        for row in here:
            try:
                outcomes.append(self._deliver(row, stanza))
            except StanzaError as error:
                refusals.append(error)
        gone = False
        for node, resources in elsewhere.items():
            outcome = None if self._remote is None else self._remote.send(node, stanza, resources, copy=True)
            if outcome is None:
                gone = True
            else:
                outcomes.append(outcome)
        first = first_of(outcomes) if outcomes else ERROR
        if first is SAFE:
            return SAFE
        combined = Pending(decided=False, failed=lambda error: self._bounce(stanza, error))

        def end(result: Settled) -> None:
            copies = [outcome for outcome in outcomes if isinstance(outcome, Copy)]
            errors = refusals + [copy.error for copy in copies if copy.error is not None]
            if result is SAFE:
                combined.settle(SAFE)
            elif errors:
                combined.fail(errors[0])
            elif gone or copies:
                self._route_again(stanza, combined)
            else:
                combined.settle(ERROR)

        if isinstance(first, Pending):
            first.when_decided(combined.decide)
            first.then(end)
        else:
            end(first)
        return combined

    def _route_again(self, stanza: Stanza, outcome: Pending) -> None:
        """None of those it was sent to was there any more."""
        self.rerouted += 1
        again = Forwarded.again(stanza)
        if stanza.to is not None:
            self._turns.goes_on_as(stanza.to.bare, stanza, again)
        try:
            outcome.follow(self.route(again))
        except StanzaError as error:
            outcome.fail(error)

    def _reachable(self, rows: Rows) -> Rows:
        remote = self._remote
        return {
            resource: row
            for resource, row in rows.items()
            if row.session is not None or (remote is not None and remote.is_up(row.owner.member))
        }

    # -- the rules

    def hold_messages(self, user: JID, until: "asyncio.Future[None]") -> None:
        """Have messages for a user that are routed on this node wait until that is done. Their streams go on: others
        are not to wait for this user."""
        self._holds.add(user.bare, until)

    def hold_no_more(self) -> None:
        """The node stops: what has waited goes where it can."""
        self._holds.end()

    def hold_arrivals(self, node: bytes, until: "asyncio.Future[None]") -> None:
        """Have messages that come from another node wait until that is done."""
        if self._remote is not None:
            self._remote.hold(node, until)

    def _goes_past_stored(self, stanza: Stanza, user: str, rows: Rows) -> bool:
        """Whether it was sent here, where the user has been, or is routed again, while what came before it is being
        stored."""
        being_stored = user in self.freeing or user in self._keeping
        return being_stored and not stanza.moved and not stanza.kept and not _here(rows)

    async def _message_held(self, stanza: Stanza, until: "asyncio.Future[None]") -> Outcome:
        await asyncio.wait((until,))
        return self.route(stanza)

    async def _message_stored(self, stanza: Stanza, user: str) -> Outcome:
        waiting = [*self.freeing.get(user, ()), *self._being_kept(user)]
        if waiting:
            await asyncio.wait(waiting, timeout=_STORING)
        return self.route(stanza)

    def _message(self, stanza: Stanza, to: JID, rows: Rows) -> Outcome:
        user, succession = to.bare, self.succession
        if stanza.type != "error":  # what that answers is acknowledged: it must not be lost while it waits
            again = user in self._turns  # whoever waits for what this node has, waits for these too
            if again and (ahead := self._turns.ahead(user, stanza)) is not None:
                return self._gate.wait(stanza, self._message_held(stanza, ahead))
            if not stanza.kept and not stanza.hops:
                for one in rows.values():
                    asked = None if one.hides is None else succession.ask_hidden(one)
                    if asked is not None and again:
                        return self._gate.wait(stanza, self._message_held(stanza, asked))
                if not again and (self._holds.users or succession.made_way) and succession.holds(user):
                    return self._holds.wait(user, stanza)
            if (again or stanza.hops) and rows and self._goes_past_stored(stanza, user, rows):
                return self._gate.wait(stanza, self._message_stored(stanza, user))
        if to.resource:
            row = rows.get(to.resource)
            if row is not None:
                return self._deliver(row, stanza)
        kind = stanza.type
        if kind == "error":
            return SAFE
        takers = _not_negative(rows)
        if takers:
            return self._message_to_some(stanza, to, takers, kind)
        if rows and not stanza.hops and not stanza.kept:
            asked = succession.asks_first(user, rows.values())
            if asked is not None and user in self._turns:
                return self._gate.wait(stanza, self._message_held(stanza, asked))
            if asked is not None and user in self._holds:
                return self._holds.wait(user, stanza)
        if rows or self._accounts.known(to.domain, to.local):
            return self._message_to_none(stanza, to, kind)
        return self._gate.wait(stanza, self._message_to_stranger(stanza, to, kind))

    def _message_to_some(self, stanza: Stanza, to: JID, takers: list[SessionRow], kind: str) -> Outcome:
        if kind == "headline":
            return SAFE if to.resource else self._deliver_all(takers, stanza)
        if kind == "groupchat" or (self.strict and kind == "normal" and to.resource):
            raise StanzaError("service-unavailable")
        if len(takers) == 1:
            return self._deliver(takers[0], stanza)
        connected = [row for row in takers if not row.waiting] or takers
        highest = max(row.priority or 0 for row in connected)
        outcome = self._deliver_all([row for row in connected if row.priority == highest], stanza)
        if len(connected) < len(takers):
            self._copy_to_waiting([row for row in takers if row.waiting and (row.priority or 0) >= highest], stanza)
        return outcome

    def _copy_to_waiting(self, rows: list[SessionRow], stanza: Stanza) -> None:
        """Who has no stream at the moment finds it when it is resumed; if it never is, the others had it."""
        elsewhere: dict[bytes, list[str]] = {}
        for row in rows:
            if row.session is None:
                elsewhere.setdefault(row.owner.member, []).append(row.jid.resource)
            else:
                with suppress(StanzaError):  # it may not see it
                    row.session.deliver(ExtraCopy.of(stanza))
        if self._remote is not None:
            for node, resources in elsewhere.items():
                self._remote.send_extra(node, stanza, resources)

    def _message_to_none(self, stanza: Stanza, to: JID, kind: str) -> Outcome:
        if kind == "headline":
            return SAFE
        if kind == "groupchat" or (self.strict and kind == "normal" and to.resource):
            raise StanzaError("service-unavailable")
        return self._undeliverable(stanza, to)

    async def _message_to_stranger(self, stanza: Stanza, to: JID, kind: str) -> Outcome:
        exists = await self._accounts.exists(to.domain, to.local)
        # Somebody may have logged in meanwhile.
        rows = self._table.rows(to.bare)
        if _here(rows) if stanza.hops >= HOPS or stanza.kept else rows:
            return self.route(stanza)
        if exists:
            return self._message_to_none(stanza, to, kind)
        if kind == "headline" and (to.resource or self.strict):
            return SAFE
        raise StanzaError("service-unavailable")

    def _undeliverable(self, stanza: Stanza, to: JID) -> Outcome:
        if stanza.kept or self.is_anonymous(to):  # the first is kept already
            raise StanzaError("service-unavailable")
        pending = Pending(failed=lambda error: self._bounce(stanza, error))

        def nobody(event: MessageUndeliverable) -> Outcome:
            raise StanzaError("service-unavailable")

        outcome = self._gate.ask(MessageUndeliverable(bare(to), stanza, pending), stanza, nobody, handled=pending)
        if outcome is pending and pending.result is None:
            self._keeping.setdefault(to.bare, deque()).append(pending)
            pending.then(partial(self._kept, to.bare, pending))
        return outcome

    def _iq(self, stanza: Stanza, to: JID, rows: Rows) -> Outcome:
        request = stanza.type in ("get", "set")
        if to.resource:
            row = rows.get(to.resource)
            if row is not None:
                return self._deliver(row, stanza)
            if request:
                raise StanzaError("service-unavailable")
            return SAFE
        if not request:
            return SAFE
        if rows or self._accounts.known(to.domain, to.local):
            return self._ask_account(stanza, to, anonymous=any(row.anonymous for row in rows.values()))
        return self._gate.wait(stanza, self._iq_for_absent(stanza, to))

    async def _iq_for_absent(self, stanza: Stanza, to: JID) -> Outcome:
        # No account, no handler: else accounts could be told apart from names that are free.
        if not await self._accounts.exists(to.domain, to.local):
            raise StanzaError("service-unavailable")
        return self._ask_account(stanza, to)

    def _ask_account(self, stanza: Stanza, to: JID, *, anonymous: bool = False) -> Outcome:
        own = stanza.from_ is not None and stanza.from_.bare == to.bare
        if own or not self._hooks.wants(RequestReceiving):
            return self._iqs.dispatch("account", stanza, anonymous=anonymous)
        event = RequestReceiving(bare(to), stanza)
        return self._gate.ask(
            event, stanza, lambda decided: self._iqs.dispatch("account", decided.stanza, anonymous=anonymous)
        )

    def _presence(self, stanza: Stanza, to: JID, rows: Rows) -> Outcome:
        if stanza.type in SUBSCRIPTIONS:
            if self.is_anonymous(to):
                return SAFE  # as for an account that does not exist
            return self._gate.ask(SubscriptionReceiving(bare(to), stanza), stanza, lambda event: SAFE)
        if stanza.type == "probe":
            return self._gate.ask(ProbeReceiving(bare(to), stanza), stanza, lambda event: SAFE)
        if stanza.type == "error":
            self._hooks.notify(PresenceBounced(to, stanza))
        if to.resource:
            row = rows.get(to.resource)
            return SAFE if row is None else self._deliver(row, stanza)
        return self._deliver_all([row for row in rows.values() if row.priority is not None], stanza)

    # -- for operators

    def count(self, host: str | None = None) -> int:
        """How many sessions are bound in the cluster."""
        return self._table.count(host)

    def infos(self, host: str | None = None, user: str | None = None) -> list[SessionInfo]:
        """All sessions of this node, of one host or one of its users, sorted by JID."""
        if user is not None and host is not None:
            rows: Iterable[SessionRow] = self._table.rows(f"{user}@{host}").values()
        else:
            rows = (row for row in self._table.own_sessions() if host is None or row.jid.domain == host)
        return [row.session.info() for row in sorted(rows, key=lambda row: row.jid.full) if row.session is not None]

    def waiting(self, user: JID) -> list[Waiting]:
        """What waits for the sessions of a user on this node."""
        return [session.waiting() for session in self.sessions(user)]

    def kick(
        self, user: str, host: str, resource: str | None, reason: str, *, condition: str = "policy-violation"
    ) -> int:
        """End sessions of a user (one resource, or None for all) with a stream error, on whatever node; how many there
        were."""
        rows = list(self._table.rows(f"{user}@{host}").values())
        chosen = [row for row in rows if resource is None or row.jid.resource == resource]
        elsewhere = [row for row in chosen if row.session is None]
        if elsewhere:
            jid = elsewhere[0].jid
            self._kick_elsewhere(elsewhere, bare(jid) if resource is None else jid, reason, condition)
        for row in chosen:
            if row.session is not None:
                row.session.kick(reason, condition)
        return len(chosen)

    def kick_here(self, jid: JID, reason: str, condition: str) -> int:
        """End the session of a full JID, or all of a bare one, as far as they are on this node; how many there were."""
        rows = list(self._table.rows(jid.bare).values())
        chosen = [row.session for row in rows if row.session is not None and jid.resource in ("", row.jid.resource)]
        for session in chosen:
            session.kick(reason, condition)
        return len(chosen)

    def _kick_elsewhere(self, rows: list[SessionRow], jid: JID, reason: str, condition: str) -> None:
        if self._remote is not None:
            self._remote.kick(sorted({row.owner.member for row in rows}), jid, reason, condition)


class _LostSessions:
    """Those of the rows that were available."""

    def __init__(self, rows: Lost) -> None:
        self._rows = rows

    def __iter__(self) -> Iterator[LostSession]:
        return (LostSession(row.jid, row.guarded) for row in self._rows if row.priority is not None)


def _here(rows: Rows) -> Rows:
    return {resource: row for resource, row in rows.items() if row.session is not None}


def _not_negative(rows: Rows) -> list[SessionRow]:
    found = []
    for row in rows.values():  # a comprehension would be a call, for one row as a rule
        priority = row.priority
        if priority is not None and priority >= 0:
            found.append(row)
    return found
