"""A client's session: a full JID, its presence, and what was sent to it. It is not the connection.

The session speaks to its connection through `Carrier` and to the rest of the server through the router and the session
manager, so that another carrier can take it over.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from xmppd.c2s.managed import Managed, Nobody
from xmppd.c2s.resumption import Resumption
from xmppd.c2s.spooling import Spooling
from xmppd.delivery import ERROR, SAFE, Gate, Outcome, Pending, Record, Records, Settled, as_stanza_error, in_place
from xmppd.errors import JidError, StanzaError, StreamError
from xmppd.events import (
    DirectedPresenceSending,
    GuardedDelivering,
    GuardedSending,
    MessageAccepted,
    MessageSent,
    PresenceChanged,
    PresenceSending,
    SessionBecameAvailable,
    SessionBecameUnavailable,
    SessionBound,
    SessionClosed,
    SessionLeft,
    StanzaDelivering,
    StanzaSending,
    SubscriptionSending,
)
from xmppd.hooks import Hooks, Spawn
from xmppd.log import Logger
from xmppd.metrics import Counters
from xmppd.protocol import ns
from xmppd.protocol.jid import JID, bare, parse
from xmppd.protocol.stanza import Stanza, build, error_reply
from xmppd.router import Router
from xmppd.session_manager import SUBSCRIPTIONS, SessionInfo, SessionManager, Waiting
from xmppd.storage.ids import next_place

_PRIORITY: Final = f"{{{ns.CLIENT}}}priority"
_SHOW: Final = f"{{{ns.CLIENT}}}show"
_STATUS: Final = f"{{{ns.CLIENT}}}status"
_IQ_TYPES: Final = frozenset({"get", "set", "result", "error"})
_HELD_MESSAGES: Final = 10_000


class Carrier(Protocol):
    """What carries a session: a TCP connection now, WebSocket and BOSH later."""

    name: str  # c2s, c2s_tls ...: as operators see it
    peer: tuple[str, int]  # the client's address

    @property
    def last_heard(self) -> float:
        """time.monotonic() of the last sign of life, within a second; ahead of now: not listened to."""

    def write(self, data: bytes) -> None:
        """Queue bytes; they leave with everything else of this loop tick."""
        ...

    def unsent(self) -> int:
        """Bytes the peer's machine has not taken yet."""
        ...

    def end(self, error: StreamError) -> None:
        """Close the stream with an error."""
        ...


class Sweeper(Protocol):
    """Looks after sessions with records about once a second."""

    def add(self, session: "Session") -> None: ...


@dataclass(frozen=True, slots=True)
class Parts:
    """What every session of a node is given."""

    node: str
    router: Router
    manager: SessionManager
    hooks: Hooks
    gate: Gate
    spawn: Spawn
    sweeper: Sweeper
    counters: Counters = field(default_factory=Counters)
    resumption: Resumption = field(default_factory=Resumption)
    spooling: Spooling = field(default_factory=Spooling)


class Session:
    """One bound resource. Fulfils events.Session for modules and LiveSession for the session manager."""

    __slots__ = (
        "_arriving",
        "_flushes",
        "_held",
        "_leaving",
        "anonymous",
        "bound_at",
        "carrier",
        "closed",
        "guards",
        "jid",
        "log",
        "managed",
        "parts",
        "presence",
        "priority",
        "records",
        "row",
        "state",
        "user",
    )

    def __init__(
        self,
        jid: JID,
        carrier: Carrier,
        parts: Parts,
        log: Logger,
        *,
        anonymous: bool = False,
        presence: Stanza | None = None,
        later_than: int = 0,
    ) -> None:
        """`anonymous`: the account is this session's alone and ends with it. The rest is for a session that was on
        another node: its presence, and the `bound_at` of its row there."""
        self.jid = jid
        self.anonymous = anonymous
        self.user = bare(jid)
        self.priority: int | None = None if presence is None else _priority(presence)
        self.presence = presence
        self.state: dict[str, Any] = {}
        self.records = Records()
        self.closed = False
        self.guards: frozenset[str] = frozenset()  # the modules that want to see every stanza of this one
        self.managed: Managed | None = None  # with stream management
        self.carrier = carrier
        self.parts = parts
        self.log = log
        self.bound_at = time.time()
        self._held: list[tuple[Stanza, Pending]] | None = None  # messages that wait for the offline flush
        self._flushes = 0  # how many of these go on
        # What waits until the session has left, or until all that comes from its old node has come.
        self._leaving: list[tuple[Stanza, Pending | None]] | None = None
        self._arriving: list[tuple[Stanza, Pending]] | None = None
        self.row = parts.manager.open(self, priority=self.priority, later_than=later_than)

    def bound(self) -> Awaitable[None] | None:
        """Tell the modules; what comes back must be awaited before the client is told."""
        told, undisputed = (
            self.parts.hooks.notify(SessionBound(self)),
            self.parts.manager.succession.undisputed(self.row),
        )
        return told if undisputed is None else _both(told, undisputed)

    # -- from the client

    def receive(self, stanza: Stanza) -> Outcome:
        """A stanza of this client. Never raises but StreamError; an error goes to the client as a stanza."""
        parts = self.parts
        if stanza.from_ is not self.jid:
            stanza = self._stamp(stanza)
        if stanza.kind == "message":
            stanza.place = next_place()
        try:
            if stanza.malformed:
                raise StanzaError("jid-malformed")
            if self.guards:
                return parts.gate.ask(GuardedSending(self, stanza), stanza, lambda event: self._let_out(event.stanza))
            if parts.hooks.wants(StanzaSending):
                return self._let_out(stanza)
            return self._route(stanza)
        except Exception as exc:
            return self._refuse(stanza, as_stanza_error(exc))

    def _refuse(self, stanza: Stanza, error: StanzaError) -> Outcome:
        """Straight to the client: as a stanza from the address it was meant for, a guard would stop it."""
        reply = error_reply(stanza, error)
        if reply is None:
            return SAFE
        self.send(reply)
        return ERROR

    def _let_out(self, stanza: Stanza) -> Outcome:
        if self.parts.hooks.wants(StanzaSending):
            event = StanzaSending(self, stanza)
            return self.parts.gate.ask(event, stanza, lambda decided: self._route(decided.stanza))
        return self._route(stanza)

    def guard(self, module: str, on: bool) -> None:
        """Whether a module wants to see every stanza of this session."""
        self.guards = self.guards | {module} if on else self.guards - {module}
        if self.priority is not None:  # else the others hear of it when it becomes available
            self.parts.manager.set_priority(self.row, self.priority, guarded=bool(self.guards))

    def _stamp(self, stanza: Stanza) -> Stanza:
        """A stanza that was parsed before the resource was bound (pipelined behind the bind request)."""
        claimed = stanza.element.get("from")
        if claimed is not None:
            try:
                if parse(claimed).full not in (self.jid.full, self.user.full):
                    raise StreamError("invalid-from")
            except JidError:
                raise StreamError("invalid-from") from None
        element = stanza.editable()
        element.set("from", self.jid.full)
        if stanza.malformed:
            del element.attrib["to"]
        stamped = Stanza.from_element(element)
        stamped.malformed = stanza.malformed
        return stamped

    def _route(self, stanza: Stanza) -> Outcome:
        if stanza.kind == "presence":
            return self._presence(stanza)
        if stanza.kind == "iq" and (stanza.type not in _IQ_TYPES or not stanza.id):
            raise StanzaError("bad-request", "an IQ has an id and a type of get, set, result or error")
        if stanza.to is None:
            stanza = stanza.addressed(self.user)
        outcome = self.parts.router.route(stanza)
        if stanza.kind == "message" and self.parts.hooks.wants(MessageAccepted):
            self._tell_when_safe(stanza, outcome)
        return outcome

    def _tell_when_safe(self, stanza: Stanza, outcome: Outcome) -> None:
        def settled(result: Settled) -> None:
            if result is SAFE:
                self.parts.hooks.notify(MessageAccepted(self, stanza))

        if isinstance(outcome, Pending):
            outcome.then(settled)
        else:
            settled(outcome)

    def _presence(self, stanza: Stanza) -> Outcome:
        kind = stanza.type
        to = stanza.to
        if kind in ("available", "unavailable"):
            if to is None or to.full == self.user.full:
                # A wrong one is refused before anybody is told.
                priority = _priority(stanza) if kind == "available" else None
                return self.parts.gate.ask(
                    PresenceSending(self, stanza),
                    stanza,
                    lambda event: self._own_presence(event.presence, priority if event.presence is stanza else None),
                )
            return self.parts.gate.ask(
                DirectedPresenceSending(self, stanza),
                stanza,
                lambda event: self.parts.router.route(event.presence),
            )
        if to is None:
            if kind in ("error", "probe"):
                return SAFE
            raise StanzaError("bad-request", f"presence of type {kind[:20]!r} needs a recipient")
        if kind in SUBSCRIPTIONS:
            if self.anonymous:
                raise StanzaError("not-allowed", "an anonymous account has no roster")
            plain = stanza.replace(from_=self.user.full, to=to.bare)
            # A refusal is for this resource: with the stanza as it came, not as it goes out.
            return self.parts.gate.ask(
                SubscriptionSending(self, plain), stanza, lambda event: self.parts.router.route(event.stanza)
            )
        if kind not in ("error", "probe"):
            raise StanzaError("bad-request", f"{kind[:20]!r} is no presence type")
        return self.parts.router.route(stanza)

    def _own_presence(self, presence: Stanza, priority: int | None) -> Outcome:
        """`priority`: None where it has to be read once more, because a module has changed the presence."""
        if self.closed:
            return SAFE
        if presence.type == "unavailable":
            self._become_unavailable(presence)
            return SAFE
        old, hooks = self.priority, self.parts.hooks
        new = _priority(presence) if priority is None else priority
        previous, self.priority, self.presence = self.presence, new, presence
        presence.forget_element()
        self.parts.manager.set_priority(self.row, new, guarded=bool(self.guards))
        changed = hooks.notify(PresenceChanged(self, presence, previous))
        came = None
        if old is None or (old < 0 <= new):
            came = hooks.notify(SessionBecameAvailable(self, new, old))
        if came is None:
            return SAFE if changed is None else self.parts.gate.wait(presence, self._until_told(changed))
        # What was kept for the user comes before what arrives from here on.
        self._held = self._held or []
        self._flushes += 1
        if self.managed is None:
            return self.parts.gate.wait(presence, self._until_flushed(changed, came, lambda: None))
        # What was kept waits for acknowledgements, which may be behind other stanzas of this client: they are not held
        # back until it has gone out.
        told = Pending(decided=False)
        self.parts.gate.wait(presence, self._until_flushed(changed, came, lambda: told.settle(SAFE)))
        return told

    async def _until_told(self, changed: Awaitable[None]) -> Outcome:
        await changed
        return SAFE

    async def _until_flushed(
        self, changed: Awaitable[None] | None, came: Awaitable[None], told: Callable[[], None]
    ) -> Outcome:
        try:
            if changed is not None:
                await changed
            told()
            await came
        finally:
            told()
            self._flushed()
        return SAFE

    def hold_messages(self, until: "asyncio.Future[Any]") -> None:
        """Have messages for it wait, behind those that wait already, until that is done."""
        if self.closed:
            return
        self._held = self._held or []
        self._flushes += 1
        until.add_done_callback(lambda done: self._flushed())

    @property
    def holds_messages(self) -> bool:
        """Whether messages for it wait; of one that has left: whether they did."""
        return self._flushes > 0

    @property
    def awaits_older(self) -> bool:
        """Whether what comes for it waits for what is older already."""
        return self._held is not None or self._arriving is not None

    @property
    def aside(self) -> bool:
        """Whether what is for it is left in the spool, for whoever comes."""
        return self.managed is not None and self.managed.backlog.aside

    def _flushed(self) -> None:
        self._flushes -= 1
        if not self._flushes:
            self._release_held()

    def _release_held(self) -> None:
        held, self._held = self._held or [], None
        self._release(in_place(held))

    def _release(self, held: list[tuple[Stanza, Pending]]) -> None:
        _deliver_all(held, self._deliver)

    def _become_unavailable(self, presence: Stanza) -> None:
        if self.priority is None:
            return
        self.priority = None
        self.parts.manager.set_priority(self.row, None)
        self._notify(SessionBecameUnavailable(self, presence))
        self.presence = None

    def _notify(self, event: object, afterwards: Callable[[], None] = lambda: None) -> None:
        waiting = self.parts.hooks.notify(event)
        if waiting is None:
            afterwards()
            return

        async def finish(rest: Awaitable[None]) -> None:
            await rest
            afterwards()

        self.parts.spawn(finish(waiting), name=type(event).__name__)

    # -- to the client

    def deliver(self, stanza: Stanza) -> Outcome:
        """A stanza the session manager chose this session for. Raises StanzaError."""
        held, arriving = self._held, self._arriving
        if (held is not None or arriving is not None) and stanza.type == "error" and stanza.kind == "message":
            return self._deliver(stanza)  # what it answers is acknowledged: it must not be lost with the session
        if arriving is not None and not stanza.moved:
            return self._hold(arriving, stanza)
        if held is not None and stanza.kind == "message" and (not stanza.moved or stanza.behind):
            return self._hold(held, stanza)
        return self._deliver(stanza)

    def deliver_again(self, behind: list[tuple[Stanza, Pending]]) -> None:
        """What waited for a stream, and comes behind what is stored."""
        _deliver_all(behind, self.deliver)

    def _hold(self, held: list[tuple[Stanza, Pending]], stanza: Stanza) -> Outcome:
        if len(held) >= _HELD_MESSAGES:
            raise StanzaError("resource-constraint", "too many messages wait for this recipient")
        pending = Pending(failed=lambda error: self.parts.router.bounce(stanza, error))
        held.append((stanza, pending))
        return pending

    def _deliver(self, stanza: Stanza) -> Outcome:
        if self.guards:
            event = GuardedDelivering(self, stanza)
            return self.parts.gate.ask(event, stanza, lambda decided: self._let_in(decided.stanza))
        if self.parts.hooks.wants(StanzaDelivering):
            return self._let_in(stanza)
        return self.send(stanza)

    def _let_in(self, stanza: Stanza) -> Outcome:
        if self.parts.hooks.wants(StanzaDelivering):
            event = StanzaDelivering(self, stanza)
            return self.parts.gate.ask(event, stanza, lambda decided: self.send(decided.stanza))
        return self.send(stanza)

    def send(self, stanza: Stanza) -> Outcome:
        """Write to the client, or queue for it. SAFE for what nobody waits for; a message or an IQ request is pending
        until it is certain that the client has it, and is routed again (or bounced) when it turns out that it will
        not."""
        if self.closed:
            return self._too_late(stanza)
        kind = stanza.kind
        self.parts.counters.stanzas[kind].sent += 1
        if self.managed is not None:
            return self.managed.send(stanza)
        self.carrier.write(stanza.xml)
        if kind == "message" and self.parts.hooks.wants(MessageSent):
            self.parts.hooks.notify(MessageSent(self, stanza))
        if (
            kind == "presence"
            or (kind == "message" and stanza.type in ("headline", "error"))
            or (kind == "iq" and stanza.type not in ("get", "set"))
        ):
            return SAFE
        records = self.records
        if not records:
            self.parts.sweeper.add(self)
        stanza.forget_element()
        return records.add(stanza)

    def _too_late(self, stanza: Stanza) -> Outcome:
        if self._leaving is not None:
            waited_for = Pending(failed=lambda error: self.parts.router.bounce(stanza, error))
            self._leaving.append((stanza, waited_for))
            return waited_for
        # The row is gone, so routing cannot come back here.
        return self.parts.router.route(stanza) if stanza.to is not None and stanza.kind != "presence" else ERROR

    def sweep(self) -> bool:
        """Called about once a second while there are records: settle what is certain. False: none left."""
        if not self.closed and self.carrier.unsent() == 0:
            self.records.ripen()
        return bool(self.records)

    # -- from node to node (handover.py)

    def leave(self, event: SessionLeft) -> list[tuple[Stanza, Pending | None]]:
        """It goes on on another node: until it shows up there, what comes for it waits. What was not acknowledged."""
        self.closed = True
        waiting = in_place([*(self._held or ()), *(self._arriving or ())])
        self._leaving = [*waiting]
        self._held = self._arriving = None
        managed, self.managed = self.managed, None
        entries: list[tuple[Stanza, Pending | None]] = []
        if managed is not None:
            self.parts.resumption.forget(managed)
            aside = managed.backlog.aside
            entries = managed.leave()
            if aside:  # what is stored for it comes first
                self._flushes += 1
                messages = [entry for entry in entries if entry[0].kind == "message"]
                entries = [entry for entry in entries if entry[0].kind != "message"]
                self._leaving = in_place(messages + self._leaving)
        self._notify(event, self.state.clear)
        self.priority = self.presence = None  # whoever is at work for it stops
        return entries

    def left(self) -> list[tuple[Stanza, Pending | None]]:
        """What has come for it meanwhile; from now on it is routed."""
        waiting, self._leaving = self._leaving or [], None
        return waiting

    def end_leaving(self) -> None:
        """It has not shown up on the other node: it is over."""
        self.closed = False
        self.close(clean=False)

    @classmethod
    def arrived(cls, state: Mapping[str, Any], parts: Parts, log: Logger) -> "Session":
        """From another node; it waits for its stream, and messages wait for `settled_in`."""
        presence = None if state["presence"] is None else Stanza.from_bytes(state["presence"].encode())
        nobody = Nobody(state["name"], ("", 0))
        session = cls(parse(state["jid"]), nobody, parts, log, presence=presence, later_than=state["bound_at"])
        session.bound_at = state["since"]
        session._arriving = []
        return session

    def settled_in(self) -> None:
        """All that was on its way through the old node has come."""
        arriving, self._arriving = self._arriving or [], None
        held = self._held
        arriving = in_place(arriving)
        if held is None:
            self._release(arriving)
            return
        self._release([each for each in arriving if each[0].kind != "message"])
        held += [each for each in arriving if each[0].kind == "message"]

    # -- its end

    def lost(self, *, clean: bool, resumable: bool) -> bool:
        """The stream is over. `clean`: the client closed it properly and had taken every byte. Whether the session
        waits for another one: where it is `resumable`, and the client asked for that."""
        if self.closed:
            return False
        managed = self.managed
        if resumable and managed is not None and managed.wait():
            return True
        self.close(clean=clean)
        return False

    def leave_carrier(self, error: StreamError) -> None:
        """Wait for another stream, and end this one."""
        carrier = self.carrier
        if self.managed is not None and self.managed.wait():
            carrier.end(error)

    def set_waiting(self, on: bool) -> None:
        """Whether it has no stream, for those who choose sessions."""
        self.parts.manager.set_waiting(self.row, on)
        if on:
            # What was written before stream management began is in no queue of it.
            self.parts.manager.reroute(self.records.take())

    def close(self, *, clean: bool) -> None:
        """The session is over. `clean`: the client closed the stream properly and had taken every byte."""
        if self.closed:
            return
        self.closed = True
        self._become_unavailable(build("presence", {"type": "unavailable", "from": self.jid.full}))
        last = self.parts.manager.close(self.row)
        self._notify(SessionClosed(self, last), self.state.clear)
        if clean:
            self.records.confirm_all()
        left = self.records.take()
        managed, self.managed = self.managed, None
        if managed is not None:
            self.parts.resumption.leave(managed, self.user.bare)
            left += managed.close()
        # What waited comes behind, and waits no longer: whoever comes next is to find all in its order.
        waiting = in_place([*(self._held or ()), *(self._arriving or ())])
        self._held = self._arriving = None
        for stanza, pending in waiting:
            if stanza.kind == "presence":
                pending.settle(ERROR)
            else:
                left.append(Record(stanza, pending))
        self.parts.manager.reroute(left)

    def replaced(self) -> None:
        """Another stream bound this resource (requirements ST-01), or it is where the session has gone."""
        if self._leaving is not None:
            if self.parts.resumption.handover is not None:
                self.parts.resumption.handover.displaced(self)
            return
        self._end(StreamError("conflict", "Replaced by new connection"))

    def kick(self, reason: str, condition: str) -> None:
        """An operator ends the session, with the stream error condition that goes with the reason."""
        self._end(StreamError(condition, reason or "Kicked"))

    def overflowed(self) -> None:
        """The client has not acknowledged as much as is kept for one."""
        self._end(StreamError("policy-violation", "too many stanzas without an acknowledgement"))

    def unreachable(self, why: str = "no answer to a ping") -> None:
        """The client does not answer: it may come back on another stream; if not, what it has not acknowledged goes
        elsewhere."""
        carrier = self.carrier
        taken = carrier.unsent() == 0
        carrier.end(StreamError("connection-timeout", why))
        if self.carrier is carrier:
            self.lost(clean=taken, resumable=True)

    def _end(self, error: StreamError) -> None:
        if self.managed is not None:
            self.managed.max = 0  # it is over
        carrier = self.carrier
        taken = carrier.unsent() == 0
        carrier.end(error)
        self.close(clean=taken)

    @property
    def idle_seconds(self) -> float:
        """How long the client has been silent."""
        return max(0.0, time.monotonic() - self.carrier.last_heard)

    def waiting(self) -> Waiting:
        """What operators are shown of what it waits for."""
        managed = self.managed
        if managed is None:
            return Waiting(self.jid, "plain", 0.0, len(self.records), 0, 0, 0, 0.0)
        outbound, backlog = managed.outbound, managed.backlog
        return Waiting(
            self.jid,
            "waiting" if managed.waiting else "connected",
            managed.resume_left,
            len(outbound),
            outbound.size,
            backlog.rows,
            managed.inbound.unsettled,
            backlog.round_trip,
        )

    def info(self) -> SessionInfo:
        """What operators are shown."""
        show, text = "", ""
        if self.presence is not None:
            show = self.presence.element.findtext(_SHOW) or "available"
            text = self.presence.element.findtext(_STATUS) or ""
            self.presence.forget_element()
        ip, port = self.carrier.peer
        uptime = int(time.time() - self.bound_at)
        jid = self.jid
        return SessionInfo(
            jid.local,
            jid.domain,
            jid.resource,
            self.carrier.name,
            ip,
            port,
            self.priority,
            self.parts.node,
            uptime,
            show,
            text,
        )


def _deliver_all(waiting: list[tuple[Stanza, Pending]], deliver: Callable[[Stanza], Outcome]) -> None:
    for stanza, pending in waiting:
        try:
            pending.follow(deliver(stanza))
        except Exception as exc:
            pending.fail(as_stanza_error(exc))


async def _both(told: Awaitable[None] | None, undisputed: Awaitable[None]) -> None:
    if told is not None:
        await told
    await undisputed


def _priority(presence: Stanza) -> int:
    """RFC 6121 4.7.2.3: an integer from -128 to 127, 0 when absent."""
    text = presence.element.findtext(_PRIORITY)
    if text is None or not text.strip():
        return 0
    try:
        value = int(text)
    except ValueError:
        raise StanzaError("bad-request", "a presence priority is an integer") from None
    if not -128 <= value <= 127:
        raise StanzaError("bad-request", "a presence priority lies between -128 and 127")
    return value
