"""A session with stream management (XEP-0198): acknowledgements both ways, and its time without a stream.

When the stream is lost the session waits for up to `max` seconds to be resumed: nobody sees it go, and what is sent to
it queues. Then, or when the queue is full, it ends, and what was not acknowledged goes to other sessions or is kept.

An acknowledgement is asked for behind the first stanza that is not acknowledged, in the same write; the next one when
the answer has come and something is left, but in the long run no more than one every `ASK_EVERY` seconds, unless much
is. So a client that is sent one message answers once, while its radio is awake anyway, and one that is sent many
answers for many at a time.
"""

import asyncio
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from xmppd.c2s.backlog import Backlog
from xmppd.c2s.stream_management import REQUEST, HandledTooHigh, Inbound, Outbound, Sent, resumed
from xmppd.delivery import SAFE, Outcome, Pending, Record, Unsettled
from xmppd.errors import StreamError
from xmppd.events import MessagesAcknowledged, MessageSent
from xmppd.protocol.stanza import Stanza

if TYPE_CHECKING:
    from xmppd.c2s.connection import Connection
    from xmppd.c2s.session import Session

ASK_EVERY: Final = 0.5  # seconds between two requests for an acknowledgement, in the long run
ASK_BURST: Final = 8  # that may be sent before this counts: who sends one message after the other does not wait
_AHEAD: Final = ASK_EVERY * (ASK_BURST - 1)
_RIDE: Final = 0.1  # seconds
_MUCH: Final = 64 * 1024  # bytes that are not acknowledged: it is asked for at once
WINDOW: Final = 256 * 1024  # bytes written again at once when a stream is resumed; the rest as they are acknowledged
_WHOLE: Final = 1.5  # seconds for what came before the stream was lost to be settled, so that it is not sent again
_SETTLING: Final = frozenset({"get", "set"})


class Nobody:
    """The carrier of a session that waits: what is written to it goes nowhere, being queued. Fulfils
    session.Carrier."""

    __slots__ = ("name", "peer")

    def __init__(self, name: str, peer: tuple[str, int]) -> None:
        self.name = name
        self.peer = peer

    @property
    def last_heard(self) -> float:
        """It is not listened to, so its silence means nothing."""
        return time.monotonic()

    def write(self, data: bytes) -> None: ...

    def unsent(self) -> int:
        return 1

    def end(self, error: StreamError) -> None: ...


class Managed:
    """What a session has in addition. `max`: seconds for which it may wait; 0: it cannot be resumed, and has no id."""

    __slots__ = (
        "_ack_timeout",
        "_ack_timer",
        "_ask_at",
        "_attempt",
        "_full",
        "_limit",
        "_limit_size",
        "_requested",
        "_session",
        "_spooling",
        "_timer",
        "backlog",
        "id",
        "inbound",
        "max",
        "outbound",
    )

    def __init__(self, session: "Session") -> None:
        options = session.parts.resumption.options()
        self.id = ""
        self.max = 0
        self.inbound = Inbound(self._nudge)
        self.outbound = Outbound()
        self.backlog = Backlog(session, self.outbound)
        self._session = session
        self._spooling = session.parts.spooling
        self._limit = options.max_ack_queue
        self._limit_size = options.max_ack_queue_size
        self._ack_timeout = options.ack_timeout
        self._requested: float | None = None  # when an acknowledgement was asked for that has not come
        self._ask_at = -_RIDE  # not before
        self._ack_timer: asyncio.TimerHandle | None = None
        self._timer: asyncio.TimerHandle | None = None  # of a session that waits
        self._attempt = 0  # the last one to resume it
        self._full = False

    @classmethod
    def arrived(cls, session: "Session", id: str, state: Mapping[str, Any]) -> "Managed":
        """Of a session that was on another node; it waits for its stream."""
        self = cls(session)
        self.id, self.max = id, state["max"]
        self.inbound.handled = state["handled"]
        self.inbound.refused = state["refused"]
        self.inbound.rewind()
        self.outbound.acknowledged = state["acknowledged"]
        self.outbound.shut()
        self._await_resumption()
        return self

    @property
    def waiting(self) -> bool:
        """Whether it has no stream."""
        return self._timer is not None

    @property
    def resume_left(self) -> float:
        """Seconds it may go on waiting."""
        return 0.0 if self._timer is None else max(0.0, self._timer.when() - asyncio.get_running_loop().time())

    # -- to the client

    def send(self, stanza: Stanza) -> Outcome:
        """Write, now or when there is a stream again. SAFE for what nobody waits for."""
        stanza.forget_element()
        outcome: Outcome = SAFE
        entry: Stanza | Unsettled = stanza
        kind, type = stanza.kind, stanza.type
        if (kind == "message" and type not in ("headline", "error")) or (kind == "iq" and type in _SETTLING):
            outcome = entry = Sent(stanza)
        xml = stanza.xml
        outbound = self.outbound
        if outbound.add(entry, len(xml)):
            self._session.carrier.write(xml)
            self._sent(stanza)
        self._spooling.unacknowledged += 1
        if outcome is not SAFE:
            if self._timer is not None:
                asyncio.get_running_loop().call_soon(self.backlog.at_once)
            elif not self.backlog.watched:
                self.backlog.watch()
        if (len(outbound) > self._limit or outbound.size > self._limit_size) and not self._full:
            self._full = True
            # Not now: whoever sends is in the midst of looking through sessions.
            asyncio.get_running_loop().call_soon(self._overflow)
        return outcome

    def _sent(self, stanza: Stanza) -> None:
        hooks = self._session.parts.hooks
        if stanza.kind == "message" and hooks.wants(MessageSent):
            hooks.notify(MessageSent(self._session, stanza))

    def _overflow(self) -> None:
        session = self._session
        if not session.closed:
            session.log.info("client acknowledges too little", jid=session.jid.full, stanzas=len(self.outbound))
            session.overflowed()

    def tail(self) -> bytes:
        """What goes out behind all else of a tick."""
        out = self.inbound.tail()
        if self._requested is None and self.outbound.written:
            now = time.monotonic()
            if not self._may_ask(now):
                return out
            self._requested = now
            self._ask_at = max(self._ask_at, now - _AHEAD) + ASK_EVERY
            if self._ack_timer is None:
                self._watch(now + self._ack_timeout, now)
            return out + REQUEST
        return out

    def _may_ask(self, now: float) -> bool:
        """Else the next visit to the backlog asks."""
        outbound = self.outbound
        if now >= self._ask_at or outbound.size >= _MUCH or not outbound.open:
            return True
        if not self.backlog.watched:
            self.backlog.watch()
        return False

    def ask(self, now: float) -> float:
        """Ask for an acknowledgement of all that was sent, if it is time to. When that is: a moment is left for the
        request to go out with another stanza, since a packet of its own costs as much as one of those."""
        if self._requested is None and self.outbound.written:
            if now < self._ask_at + _RIDE:
                return self._ask_at + _RIDE
            self._nudge()
        return now

    def _nudge(self) -> None:
        self._session.carrier.write(b"")

    # -- from the client

    def acknowledged(self, h: int) -> None:
        """<a/>. StreamError when it is too high."""
        if self._requested is not None:
            self.backlog.answered(time.monotonic() - self._requested)
            self._requested = None
        self._settle(h)
        outbound = self.outbound
        if not outbound.open and not self.waiting:
            self._pump()
        if outbound.written and self._may_ask(time.monotonic()):
            self._nudge()

    def _settle(self, h: int) -> None:
        outbound = self.outbound
        before = len(outbound)
        try:
            done = outbound.acknowledge(h)
        except HandledTooHigh as exc:
            raise StreamError("undefined-condition", str(exc), application=exc.xml) from None
        self._spooling.unacknowledged -= before - len(outbound)
        if not outbound:
            self.inbound.refused = False  # it has all errors
        for entry in done:
            entry.settle(SAFE)
            if type(entry) is Sent and entry.row is not None:
                self.backlog.acknowledged(entry)
        hooks = self._session.parts.hooks
        if hooks.wants(MessagesAcknowledged) and (
            messages := [entry.stanza for entry in done if entry.stanza.kind == "message"]
        ):
            hooks.notify(MessagesAcknowledged(self._session, messages))

    def requested(self, behind: int) -> None:
        """<r/>, in front of which so many stanzas wait for their turn."""
        self._session.carrier.write(self.inbound.requested(behind))

    def receive(self, stanza: Stanza) -> Outcome:
        """A stanza, counted."""
        inbound = self.inbound
        outcome = inbound.repeated(stanza)
        if outcome is None:
            outcome = self._session.receive(stanza)
        inbound.add(outcome, stanza)
        return outcome

    # -- silence

    def _watch(self, due: float, now: float) -> None:
        self._ack_timer = asyncio.get_running_loop().call_later(due - now, self._look)

    def _look(self) -> None:
        """One timer for many requests: it looks whether the one of now is old."""
        self._ack_timer = None
        if self._requested is None:
            return
        now = time.monotonic()
        # Who is not listened to (shapers) cannot answer: their silence counts from when they are.
        since = max(self._requested, heard) if (heard := self._session.carrier.last_heard) > now else self._requested
        if since + self._ack_timeout > now:
            self._watch(since + self._ack_timeout, now)
            return
        self._session.unreachable("no acknowledgement")

    # -- without a stream

    def wait(self) -> bool:
        """The stream is lost. False when the session cannot be resumed."""
        if not self.max:
            return False
        session = self._session
        carrier = session.carrier
        session.carrier = Nobody(carrier.name, carrier.peer)
        self._rest()
        self.inbound.rest()
        self.outbound.shut()
        self._await_resumption()
        session.set_waiting(True)
        if self._spooling.is_apart():
            self.backlog.set_aside()
        self.backlog.at_once()
        return True

    def _rest(self) -> None:
        self._requested = None
        if self._ack_timer is not None:
            self._ack_timer.cancel()
            self._ack_timer = None

    def _await_resumption(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(self.max, self._expire)

    def _expire(self) -> None:
        session = self._session
        session.log.info("session closed", jid=session.jid.full, reason="not resumed in time")
        session.close(clean=False)

    async def come_back(self, h: int) -> bool:
        """The client asks for it on a new stream, having handled `h`: leave the old one, and wait a little for what
        came on it to be settled. False when it has ended meanwhile, or was asked for once more. StreamError."""
        self._settle(h)
        self._attempt = attempt = self._attempt + 1
        if not self.waiting:
            self._session.leave_carrier(StreamError("conflict", "the stream was resumed elsewhere"))
        self._await_resumption()
        whole: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.inbound.when_whole(lambda: None if whole.done() else whole.set_result(None))
        wanted: list[asyncio.Future[Any]] = [whole, *self.backlog.flying()]
        waiting = [one for one in wanted if not one.done()]
        if waiting:
            await asyncio.wait(waiting, timeout=_WHOLE)
        return not self._session.closed and attempt == self._attempt

    def resume(self, connection: "Connection") -> Pending | None:
        """Go on with this stream. What its next stanza has to wait for comes back."""
        undecided = self.inbound.undecided()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._session.carrier = connection
        self._session.set_waiting(False)
        connection.carry(self._session)
        connection.write(resumed(self.id, self.inbound.rewind()))
        before = len(self.outbound)
        behind = self.backlog.resume()
        self._spooling.unacknowledged -= before - len(self.outbound)
        self._session.parts.resumption.redelivered += self.outbound.written
        self.outbound.rewind()
        self._pump()
        self._session.deliver_again(behind)
        return undecided

    def _pump(self) -> None:
        for stanza in self.outbound.writable(WINDOW):
            self._session.carrier.write(stanza.xml)
            self._sent(stanza)

    def close(self) -> list[Record]:
        """The session has ended: what was not acknowledged."""
        self._rest()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.inbound.close()
        self._spooling.unacknowledged -= len(self.outbound)
        return self.backlog.end(self.outbound.take())

    def leave(self) -> list[tuple[Stanza, Pending | None]]:
        """The session goes on on another node: what was not acknowledged, to be passed on."""
        self._rest()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.inbound.close()
        self._spooling.unacknowledged -= len(self.outbound)
        left = self.backlog.leaving()
        self.outbound.take()
        return left
