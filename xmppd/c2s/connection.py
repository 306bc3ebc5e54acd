"""One TCP connection of a client: bytes in and out, TLS, time-outs, the closing handshake.

It carries a negotiation first and a session afterwards. Stanzas are processed in order: one that has to wait holds back
the ones behind it on this connection, and its reading, and nothing else. What comes in great pieces is dealt with in
slices (ticks.py).
"""

import asyncio
import fcntl
import socket
import ssl
import struct
import termios
import time
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final, Protocol, cast
from xml.sax.saxutils import quoteattr

from xmppd.c2s.managed import Managed
from xmppd.c2s.session import Session
from xmppd.c2s.stream_management import failed
from xmppd.c2s.ticks import Ticks
from xmppd.c2s.tls import feed
from xmppd.delivery import ERROR, SAFE, Pending
from xmppd.errors import StreamError
from xmppd.hooks import Spawn
from xmppd.log import Logger
from xmppd.metrics import Counters, add
from xmppd.protocol import ns
from xmppd.protocol.jid import JID
from xmppd.protocol.stanza import Stanza
from xmppd.protocol.stream import (
    Acknowledgement,
    AcknowledgementRequest,
    Event,
    Limits,
    Nonza,
    Stream,
    StreamClosed,
    StreamOpened,
    error_bytes,
)
from xmppd.shaper import ShaperLimits, TokenBucket

SECURE: Final = "c2s_tls"  # how operators are shown any connection with TLS
_STREAM_ERROR: Final = f"{{{ns.STREAMS}}}error"
_CLOSE: Final = b"</stream:stream>"
_CLOSING_TAG: Final = b"</stream:stream"
_CLOSE_PATIENCE: Final = 2.0  # seconds for the peer to answer our closing tag
_CLOSE_SIZE: Final = 256 * 1024  # bytes the peer may still send before it does
_SLICE: Final = 512  # bytes; what takes longest is a hundred stanzas of five bytes
_LEAST: Final = 128  # bytes that a stanza counts for the shaper: what it costs does not depend on its size alone
_HIGH_WATER: Final = 64 * 1024
_RESUMABLE: Final = frozenset({"connection-timeout"})  # stream errors that say nothing against the client
_BACKLOG: Final = 256 * 1024  # bytes read behind a stanza that waits, in search of acknowledgements
_ENABLE: Final = f"{{{ns.SM}}}enable"
_ACK: Final = f"{{{ns.SM}}}a"
_MANAGEMENT: Final = f"{{{ns.SM}}}"
_SIOCOUTQ: Final = termios.TIOCOUTQ
_TCP_CLOSE: Final = 7  # tcpi_state, the first byte of TCP_INFO
_UNKNOWN: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class Settings:
    """How connections of one listener behave."""

    name: str  # c2s, or c2s_tls for direct TLS, as the connections are called at first
    before: Limits  # until authentication
    after: Limits
    negotiation_timeout: float  # seconds
    idle_timeout: float  # seconds, 0: never
    max_write_queue: int  # bytes
    send_timeout: float  # seconds a peer may take nothing


class Negotiator(Protocol):
    """What happens before a session is bound."""

    def opened(self, event: StreamOpened) -> Coroutine[Any, Any, None] | None: ...

    def nonza(self, event: Nonza) -> Coroutine[Any, Any, None] | None: ...

    def stanza(self, event: Stanza) -> Coroutine[Any, Any, None] | None: ...


class Connection(asyncio.Protocol):
    """Fulfils session.Carrier. With `tls`, the context, it begins with TLS (XEP-0368)."""

    def __init__(
        self,
        settings: Settings,
        ticks: Ticks,
        spawn: Spawn,
        log: Logger,
        *,
        tls: ssl.SSLContext | None = None,
        counters: Counters,
        client: tuple[str, int] | None = None,
    ) -> None:
        """`client`: who it is, where the socket's other end is a balancer."""
        self.settings = settings
        self.name = settings.name
        self.log = log
        self.secure = False
        self.peer: tuple[str, int] = client or ("", 0)
        self.last_heard = time.monotonic()
        self.session: Session | None = None
        self.negotiator: Negotiator | None = None
        self._managed: Managed | None = None  # the session's stream management
        self.on_lost: Callable[[Connection], None] | None = None
        self.counters = counters
        self.choose_shaper: Callable[[JID | None, str], ShaperLimits | None] = _unlimited  # by user and address
        self._tls = tls  # what comes next is a TLS handshake
        self._ticks = ticks
        self._spawn = spawn
        self._stream = Stream(settings.before)
        self._transport: asyncio.Transport | None = None
        self._socket: socket.socket | None = None
        self._out: list[bytes] = []
        self._waiting: deque[Event] = deque()
        self._unread = b""  # what was read and waits for its turn, from `_read_to` on
        self._read_to = 0
        self._queued = False  # for a turn
        self._busy = False  # a stanza waits for something; the next ones wait behind it
        self._backlog = 0  # bytes read while they do
        self._bucket: TokenBucket | None = None  # how fast the peer may send
        self._throttled: asyncio.TimerHandle | None = None  # the peer has sent too fast; reading goes on then
        self._paused = False  # the peer does not take our bytes
        self._header_sent = False
        self._handshaking = False
        self._closing = False  # our closing tag is written
        self._behind = b""  # the last that came behind it
        self._ignored = 0  # how much that was
        self._peer_closed = False  # theirs has come
        self._lost = False
        self._deadline: asyncio.TimerHandle | None = None
        self._stuck: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=_HIGH_WATER)
        sock = transport.get_extra_info("socket")
        if sock is not None:
            self._socket = sock
            _tune(sock, self.settings.send_timeout)
        address = transport.get_extra_info("peername")
        if address and not self.peer[0]:
            self.peer = (_plain_ip(address[0]), address[1])
        self.shape()
        loop = asyncio.get_running_loop()
        self._deadline = loop.call_later(self.settings.negotiation_timeout, self._too_slow)

    def data_received(self, data: bytes) -> None:
        self.last_heard = time.monotonic()
        if self._closing:
            self._ignore(data)
        elif self._unread or len(data) > _SLICE or self._tls is not None:
            self._put_by(data)
        else:
            self._read(data)

    def _read(self, data: bytes) -> None:
        events: list[Event] = []
        try:
            events = self._stream.receive(data)
            for event in events:
                if self._busy:
                    self._keep(event)
                else:
                    self._handle(event)
        except Exception as exc:
            self._crashed(exc)
        if self._busy and self._managed is not None:
            self._backlog += len(data)
            if self._backlog >= _BACKLOG:
                self._pause()
        bucket = self._bucket
        if bucket is not None:
            now = time.monotonic()
            wait = bucket.take(max(len(data), len(events) * _LEAST), now)
            if wait > 0:
                self._throttle(wait, now)

    def _keep(self, event: Event) -> None:
        """A stanza waits. Acknowledgements pass: what it waits for may be waiting for them."""
        if self._managed is not None and isinstance(event, Acknowledgement | AcknowledgementRequest):
            self._manage(event)
        else:
            self._waiting.append(event)

    def _reads(self) -> bool:
        return not self._busy or (self._managed is not None and self._backlog < _BACKLOG)

    def _pause(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def _put_by(self, data: bytes) -> None:
        """Too much for this tick."""
        self._unread, self._read_to = self._unread[self._read_to :] + data, 0
        self._pause()
        self._queue()

    def _queue(self) -> None:
        if not self._queued and self._throttled is None and self._reads():
            self._queued = True
            self._ticks.queue(self)

    def take_turn(self) -> bool:
        """Fulfils ticks.Reader."""
        if self._tls is not None:
            self._queued = False
            self._shake_hands(self._tls)
            return False
        start = self._read_to
        self._read_to = start + _SLICE
        self._read(self._unread[start : start + _SLICE])
        if self._read_to >= len(self._unread):
            self._unread = b""
            self._read_on()
        self._queued = bool(self._unread) and self._throttled is None and self._reads()
        return self._queued

    def eof_received(self) -> bool:
        return False

    def pause_writing(self) -> None:
        self._paused = True
        self.counters.stalled.add(self)
        loop = asyncio.get_running_loop()
        self._stuck = loop.call_later(self.settings.send_timeout, self._cut_off, "takes nothing")

    def resume_writing(self) -> None:
        self._paused = False
        self.counters.stalled.discard(self)
        if self._stuck is not None:
            self._stuck.cancel()
            self._stuck = None

    def connection_lost(self, exc: Exception | None) -> None:
        if self._lost:
            return
        self._lost = True
        if self._paused and isinstance(exc, TimeoutError):  # the kernel's patience (TCP_USER_TIMEOUT) ended before ours
            self._note_slow("takes nothing")
        for timer in (self._deadline, self._stuck, self._throttled):
            if timer is not None:
                timer.cancel()
        self.counters.stalled.discard(self)
        self._closing = True
        self._waiting.clear()
        self._unread = b""
        self._out.clear()
        self._leave_session(exc or "connection lost", clean=False, resumable=True)
        self.negotiator = None
        self._stream.release()
        self._transport = None
        self._socket = None
        for task in self._tasks:
            task.cancel()
        if self.on_lost is not None:
            self.on_lost(self)
            self.on_lost = None

    # -- in order

    def _handle(self, event: Event) -> None:
        if type(event) is Stanza and self.session is not None:
            try:
                outcome = self.session.receive(event) if self._managed is None else self._managed.receive(event)
            except StreamError as error:
                self.end(error)
                return
            count = self.counters.stanzas[event.kind]
            count.received += 1
            if outcome is SAFE:
                count.safe += 1
            elif outcome is ERROR:
                count.error += 1
            else:
                assert isinstance(outcome, Pending)
                outcome.then(count.settle)
                if not outcome.decided:
                    self._hold()
                    outcome.when_decided(self._go_on_soon)
            return
        if type(event) is Acknowledgement and self._managed is not None and not self._closing:  # there may be many
            self._acknowledged(self._managed, event)
            return
        work = self._other(event)
        if work is not None:
            self._hold()
            self._run(work)

    def _other(self, event: Event) -> Coroutine[Any, Any, None] | None:
        if isinstance(event, StreamError):
            self.end(event)
        elif isinstance(event, StreamClosed) or (isinstance(event, Nonza) and event.element.tag == _STREAM_ERROR):
            self._peer_closes()
        elif self._closing:
            pass
        elif self.session is not None or isinstance(event, Acknowledgement | AcknowledgementRequest):
            self._manage(event)
        elif self.negotiator is not None:
            if isinstance(event, StreamOpened):
                return self.negotiator.opened(event)
            if isinstance(event, Nonza):
                return self.negotiator.nonza(event)
            if isinstance(event, Stanza):
                return self.negotiator.stanza(event)
        return None

    def _manage(self, event: Event) -> None:
        """Stream management (XEP-0198)."""
        managed = self._managed
        if isinstance(event, Nonza) and not str(event.element.tag).startswith(_MANAGEMENT):
            self.end(StreamError("unsupported-stanza-type", "this element has no meaning here"))
        elif isinstance(event, Nonza) and event.element.tag == _ENABLE and managed is None and self.session is not None:
            self.write(self.session.parts.resumption.enable(self.session, event.element))
            self._managed = self.session.managed
        elif isinstance(event, Nonza) and event.element.tag == _ACK:
            self.end(StreamError("bad-format", "an acknowledgement has a count"))
        elif managed is None or isinstance(event, Nonza):
            self.write(failed("unexpected-request"))
            if isinstance(event, Nonza) and event.element.tag == _ENABLE and managed is not None:  # XEP-0198 3
                self.end(StreamError("policy-violation", "stream management is on already"))
        elif isinstance(event, Acknowledgement):
            self._acknowledged(managed, event)
        else:
            managed.requested(sum(type(each) is Stanza for each in self._waiting))

    def _acknowledged(self, managed: Managed, event: Acknowledgement) -> None:
        try:
            managed.acknowledged(event.h)
        except StreamError as error:
            self.end(error)

    def _hold(self) -> None:
        self._busy = True
        if self._managed is None:
            self._pause()

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        async def run() -> None:
            try:
                await work
            except StreamError as error:
                self.end(error)
            except Exception as exc:
                self._crashed(exc)
            finally:
                self._go_on_soon()

        task = self._spawn(run(), name="negotiation")
        if isinstance(task, asyncio.Task):
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _go_on_soon(self) -> None:
        asyncio.get_running_loop().call_soon(self._go_on)

    def _go_on(self) -> None:
        self._busy = False
        try:
            while self._waiting and not self._busy:
                self._handle(self._waiting.popleft())
        except Exception as exc:
            self._crashed(exc)
        if not self._waiting:
            self._backlog = 0
        if self._unread:
            self._queue()
        self._read_on()

    def _read_on(self) -> None:
        if not self._reads() or self._unread or self._throttled is not None:
            return
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    # -- how fast the peer may send

    def shape(self) -> None:
        """Choose the shaper anew: the peer is known better, or the rules have changed."""
        limits = self.choose_shaper(self.session.jid if self.session is not None else None, self.peer[0])
        if limits is None:
            self._bucket = None
        elif self._bucket is None or self._bucket.limits != limits:
            self._bucket = TokenBucket(limits, time.monotonic())

    def _throttle(self, wait: float, now: float) -> None:
        """Read nothing for so long: the peer's own machine will hold it back (TCP), and nothing is lost."""
        if self._closing or self._transport is None or self._transport.is_closing():
            return
        # Its silence counts from when it may be heard again, or a client would be taken for dead that was not listened
        # to.
        self.last_heard = now + wait
        if self._throttled is not None:
            self._throttled.cancel()
        self._throttled = asyncio.get_running_loop().call_later(wait, self._unthrottle)
        self._transport.pause_reading()

    def _unthrottle(self) -> None:
        self._throttled = None
        if self._unread:
            self._queue()
        self._read_on()

    # -- writing

    def write(self, data: bytes) -> None:
        """Queue bytes; they leave with everything else of this loop tick."""
        if self._closing:
            return
        out = self._out
        if not out:
            self._ticks.mark(self)
        out.append(data)

    def flush(self) -> None:
        """Hand what is queued to the transport; a peer that lets too much pile up is cut off."""
        out = self._out
        transport = self._transport
        if not out or transport is None:
            return
        self._out = []
        if self._managed is not None:
            out.append(self._managed.tail())
        data = out[0] if len(out) == 1 else b"".join(out)
        if data:
            transport.write(data)
        if self._paused and transport.get_write_buffer_size() > self.settings.max_write_queue:
            self._cut_off("reads too slowly")

    def unsent(self) -> int:
        """Bytes the peer's machine has not acknowledged: ours, the transport's and the kernel's. Where the connection
        is over that cannot be told, and it is more than any that count."""
        if self._transport is None:
            return _UNKNOWN
        queued = self.queued()
        if self._socket is None:
            return queued
        try:
            answer = fcntl.ioctl(self._socket.fileno(), _SIOCOUTQ, b"\0\0\0\0")
            state = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
        except (OSError, ValueError):  # closed a moment ago, and we are about to be told
            return _UNKNOWN
        if state == _TCP_CLOSE:  # the peer has reset it, and the kernel has thrown away what was not taken
            return _UNKNOWN
        unacknowledged: int = struct.unpack("i", answer)[0]
        return queued + unacknowledged

    def queued(self) -> int:
        """Bytes that wait in this process."""
        waiting = sum(map(len, self._out))
        return waiting + self._transport.get_write_buffer_size() if self._transport is not None else waiting

    # -- for the negotiation

    def send_header(self, host: str, stream_id: str, to: str | None) -> None:
        """Our stream header (RFC 6120 4.2)."""
        recipient = f" to={quoteattr(to)}" if to else ""
        self.write(
            f"<?xml version='1.0'?><stream:stream xmlns='{ns.CLIENT}' xmlns:stream='{ns.STREAMS}'"
            f" from={quoteattr(host)}{recipient} id='{stream_id}' version='1.0' xml:lang='en'>".encode()
        )
        self._header_sent = True

    def restart_stream(self, limits: Limits | None = None) -> None:
        """Expect a new stream header from the peer (RFC 6120 4.3.3); anything it pipelined before is thrown away."""
        self._waiting.clear()
        self._unread = b""
        self._stream.restart()
        if limits is not None:
            self._stream.set_limits(limits)
        self._header_sent = False

    def start_tls(self, context: ssl.SSLContext) -> None:
        """What comes next is TLS; what came in clear behind <starttls/> is void (RFC 6120 5.4.2.3)."""
        self.flush()
        self.restart_stream()
        self._tls = context

    def _shake_hands(self, context: ssl.SSLContext) -> None:
        """The client has begun. A handshake costs a millisecond or so: one in a tick of the loop."""
        hello, self._unread, self._tls = self._unread, b"", None
        self._ticks.end_turns()
        self._handshaking = True
        self._run(self._handshake(context))
        asyncio.get_running_loop().call_soon(self._pass_on, hello)  # when the handshake is there to take it

    def _pass_on(self, hello: bytes) -> None:
        transport = self._transport
        protocol: Any = transport.get_protocol() if transport is not None and not transport.is_closing() else None
        if protocol is None or protocol is self:
            return  # it has not come to that
        feed(protocol, hello)

    async def _handshake(self, context: ssl.SSLContext) -> None:
        assert self._transport is not None
        loop = asyncio.get_running_loop()
        try:
            transport = await loop.start_tls(
                self._transport,
                self,
                context,
                server_side=True,
                ssl_handshake_timeout=2 * self.settings.negotiation_timeout,  # `_too_slow` comes first
                ssl_shutdown_timeout=_CLOSE_PATIENCE,
            )
        except (OSError, ssl.SSLError, asyncio.CancelledError) as exc:
            self._handshake_failed(exc)
            return
        if transport is None or transport.is_closing():
            self._handshake_failed("connection lost")
            return
        self._handshaking = False
        self._transport = transport
        transport.set_write_buffer_limits(high=_HIGH_WATER)
        self.secure = True
        self.name = SECURE

    def _handshake_failed(self, why: object) -> None:
        if self._handshaking:
            self._handshaking = False
            self.counters.tls_failures += 1
            self.log.info("tls handshake failed", peer=self.peer[0], error=str(why) or type(why).__name__)
        self.abort()
        # The loop does not tell whoever has never had a TLS connection of its end.
        asyncio.get_running_loop().call_soon(self.connection_lost, None)

    @property
    def ssl_object(self) -> ssl.SSLObject | None:
        """The TLS state, for its version and channel bindings."""
        found: ssl.SSLObject | None = self._transport.get_extra_info("ssl_object") if self._transport else None
        return found

    @property
    def is_open(self) -> bool:
        """Whether what is written may still arrive."""
        return not self._closing and self._transport is not None

    def carry(self, session: Session) -> None:
        """The resource is bound: stanzas go to the session from here on."""
        self.session = session
        self._managed = session.managed
        self.negotiator = None
        self._stream.bind(session.jid)
        self.shape()
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if self.settings.idle_timeout:
            self._watch_idle()

    # -- its end

    def end(self, error: StreamError) -> None:
        """Close with a stream error (RFC 6120 4.9)."""
        if self._closing or self._transport is None:
            return
        if self._tls is not None or self._handshaking:
            self._handshaking = False  # it has not failed
            self.abort()
            return
        if self.session is not None or error.condition not in ("conflict", "system-shutdown"):
            self.log.info("stream error", condition=error.condition, text=error.text, peer=self.peer[0])
        add(self.counters.stream_errors, error.condition)
        if not self._header_sent:
            self.send_header("", "0", None)
        self._acknowledge_last()
        self.write(error_bytes(error) + _CLOSE)
        self._close(clean=False, resumable=error.condition in _RESUMABLE)

    def _acknowledge_last(self) -> None:
        """What the client has not been told yet; behind the closing tag nothing may come."""
        managed, self._managed = self._managed, None
        if managed is not None:
            self.write(managed.inbound.last_word())

    def _peer_closes(self) -> None:
        self._peer_closed = True
        if not self._closing:
            if self._header_sent:
                self._acknowledge_last()
                self.write(_CLOSE)
            self._close(clean=True)
        elif self._transport is not None:
            self._transport.close()

    def _leave_session(self, why: object, *, clean: bool, resumable: bool = False) -> None:
        session, self.session = self.session, None
        self._managed = None
        if session is None or session.carrier is not self:
            return
        if session.lost(clean=clean, resumable=resumable):
            self.log.info("session waits", jid=session.jid.full, reason=why)
        else:
            self.log.info("session closed", jid=session.jid.full, reason=why)

    def _close(self, *, clean: bool, resumable: bool = False) -> None:
        taken = clean and self.unsent() <= len(_CLOSE)
        self.flush()
        self._closing = True
        self._bucket = None
        if self._throttled is not None:
            self._throttled.cancel()
            self._throttled = None
        self.negotiator = None
        self._unread = b""
        self._stream.release()
        self._leave_session("closed by the client" if clean else "ended", clean=taken, resumable=resumable)
        if self._transport is None:
            return
        if self._deadline is not None:
            self._deadline.cancel()
        loop = asyncio.get_running_loop()
        if clean:
            self._deadline = loop.call_later(_CLOSE_PATIENCE, self.abort)
            self._transport.close()
        else:
            # Closing now could destroy the error in the peer's hands (unread input makes TCP reset): read on, heed
            # nothing, until it closes too (RFC 6120 4.4).
            self._deadline = loop.call_later(_CLOSE_PATIENCE, self._hang_up)
            if not self._transport.is_closing():
                self._transport.resume_reading()

    def _ignore(self, data: bytes) -> None:
        """After our closing tag nothing is heeded but theirs, and after an error nobody parses any more."""
        behind = self._behind + data
        self._behind = behind[-len(_CLOSING_TAG) :]
        self._ignored += len(data)
        if _CLOSING_TAG in behind:
            self._peer_closes()
        elif self._ignored > _CLOSE_SIZE:
            self._hang_up()

    def _hang_up(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            if self._deadline is not None:
                self._deadline.cancel()
            self._transport.close()
            self._deadline = asyncio.get_running_loop().call_later(_CLOSE_PATIENCE, self.abort)

    def abort(self) -> None:
        """Drop the connection without a word."""
        self._closing = True
        if self._transport is not None:
            self._transport.abort()

    def _too_slow(self) -> None:
        self._deadline = None
        if self._handshaking:
            self._handshake_failed("took too long")
        elif self._header_sent:
            self.end(StreamError("connection-timeout", "the negotiation took too long"))
        else:
            # Nothing was ever said on this stream: there is nobody to explain it to.
            self.counters.silent += 1
            self.log.info("negotiation timed out", peer=self.peer[0])
            self.abort()

    def _cut_off(self, why: str) -> None:
        self._note_slow(why)
        self.abort()

    def _note_slow(self, why: str) -> None:
        self.counters.cut_off += 1
        self.log.warning("slow reader cut off", why=why, peer=self.peer[0], queued=self.queued())

    def _watch_idle(self) -> None:
        silent = time.monotonic() - self.last_heard
        left = self.settings.idle_timeout - silent
        if left <= 0:
            self.end(StreamError("connection-timeout", "idle for too long"))
        else:
            self._deadline = asyncio.get_running_loop().call_later(left, self._watch_idle)

    def _crashed(self, exc: Exception) -> None:
        self.log.error("connection crashed", exc=exc, peer=self.peer[0])
        self.end(StreamError("internal-server-error"))


def _unlimited(user: JID | None, address: str) -> ShaperLimits | None:
    return None


def _tune(sock: socket.socket, send_timeout: float) -> None:
    """Small writes leave at once; a peer that vanished is noticed by keepalives and by unacknowledged data."""
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 120)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(send_timeout * 1000))
    except OSError:
        pass  # the connection is gone already; reading will tell


def _plain_ip(text: str) -> str:
    """IPv4 addresses that came through an IPv6 socket as people write them."""
    return text.removeprefix("::ffff:") if text.startswith("::ffff:") and "." in text else text
