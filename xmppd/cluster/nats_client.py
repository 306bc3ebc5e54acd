"""One connection to one NATS server, from its first INFO to its end. What keeps one up all the time: connection.py.

Messages go to their handlers at once, out of the event loop's reading, and are written without waiting.
"""

import asyncio
import secrets
import ssl
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, cast
from urllib.parse import urlsplit

from xmppd.cluster import nats_protocol as protocol
from xmppd.cluster.nats_protocol import Event, Info, Message, NatsError, Parser, Ping, Pong, Refused
from xmppd.log import get_logger

MAX_WAITING: Final = 16 * 1024 * 1024  # bytes that wait to be written; beyond it packets are dropped
_CONNECT_TIMEOUT: Final = 2.0  # seconds
_CLOSE_TIMEOUT: Final = 1.0
_PORT: Final = 4222

log = get_logger("cluster")

Handler = Callable[[str, str, bytes], None]  # subject, where an answer goes ("": nowhere), data


@dataclass(frozen=True, slots=True)
class Server:
    """Where to connect, and as whom."""

    url: str  # nats://address:port or tls://...
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: ssl.SSLContext | None = None
    token: str | None = field(default=None, repr=False)


class NatsClient(asyncio.Protocol):
    """Made by `open`, of no use any more when `closed` is set; `error` says why."""

    def __init__(self) -> None:
        self.closed = asyncio.Event()
        self.error = ""
        self.max_payload = 0  # bytes
        self.sids: dict[str, int] = {}  # of the subjects we listen to
        self._transport: asyncio.Transport | None = None
        self._parser = Parser()
        self._handlers: dict[int, Handler] = {}
        self._last = 0  # the highest number of a subscription, or of a question
        self._inbox = f"_INBOX.{secrets.token_hex(16)}"
        self._questions: dict[str, asyncio.Future[bytes]] = {}  # by where the answer goes
        self._greeting: asyncio.Future[Info] | None = asyncio.get_running_loop().create_future()
        self._pings: deque[asyncio.Future[None]] = deque()
        self._in_clear = True  # nothing but one INFO may come before TLS

    @classmethod
    async def open(cls, server: Server, name: str) -> "NatsClient":
        """Connected and logged in. Raises NatsError, OSError (also of TLS) and TimeoutError."""
        client = cls()
        url = urlsplit(server.url)
        try:
            async with asyncio.timeout(2 * _CONNECT_TIMEOUT):
                await client._connect(url.hostname or "", url.port or _PORT, server, name)
        except BaseException:
            client.abort()
            raise
        return client

    async def _connect(self, host: str, port: int, server: Server, name: str) -> None:
        loop = asyncio.get_running_loop()
        greeting = self._greeting
        assert greeting is not None
        async with asyncio.timeout(_CONNECT_TIMEOUT):
            await loop.create_connection(lambda: self, host, port)
        info = await greeting
        if server.tls is None and info.tls_required:
            raise NatsError("the server wants TLS: tls://")
        if server.tls is not None:
            await self._start_tls(host, server.tls, info)
        self._in_clear = False
        tls = server.tls is not None
        self._write(protocol.connect(name, server.user, server.password, server.token, tls=tls))
        await self.flush()
        self._write(protocol.subscribe(0, f"{self._inbox}.*", ""))

    async def _start_tls(self, host: str, context: ssl.SSLContext, info: Info) -> None:
        if not (info.tls_required or info.tls_available):
            raise NatsError("the server does no TLS")
        if not self._parser.idle:
            raise NatsError("the server speaks in clear where TLS begins")
        if self._transport is None or self.closed.is_set():
            raise NatsError(self.error)
        self._in_clear = False
        loop = asyncio.get_running_loop()
        upgraded = await loop.start_tls(self._transport, self, context, server_hostname=host)
        if upgraded is None or self.closed.is_set():
            raise NatsError(self.error or "the server has closed the connection")
        self._transport = upgraded

    # ------------------------------------------------------------------------------------------------- to NATS

    def publish(self, subject: str, payload: bytes, reply: str = "") -> bool:
        """Hand a message over without waiting; False when it is lost."""
        transport = self._transport
        if (
            transport is None
            or self.closed.is_set()
            or transport.get_write_buffer_size() > MAX_WAITING
            or len(payload) > self.max_payload
        ):
            return False
        transport.write(protocol.publish(subject, payload, reply))
        return True

    def subscribe(self, subject: str, handler: Handler, queue: str = "") -> None:
        """In force once `flush` has returned. Again: another handler."""
        sid = self.sids.get(subject)
        if sid is None:
            self._last += 1
            sid = self.sids[subject] = self._last
            self._write(protocol.subscribe(sid, subject, queue))
        self._handlers[sid] = handler

    def unsubscribe(self, subject: str) -> None:
        """The handler is not called any more."""
        sid = self.sids.pop(subject, None)
        if sid is not None:
            del self._handlers[sid]
            self._write(protocol.unsubscribe(sid))

    async def request(self, subject: str, payload: bytes, timeout: float) -> bytes:
        """The first answer. Raises NatsError, and TimeoutError."""
        self._last += 1
        reply = f"{self._inbox}.{self._last}"
        question: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._questions[reply] = question
        try:
            if not self.publish(subject, payload, reply):
                raise NatsError("the connection takes nothing")
            async with asyncio.timeout(timeout):
                return await question
        finally:
            del self._questions[reply]

    async def flush(self) -> None:
        """Until the server has seen all that went before. Raises NatsError."""
        self._write(protocol.PING)
        if self.closed.is_set():
            raise NatsError(self.error)
        pong: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pings.append(pong)
        await pong

    async def close(self) -> None:
        """What waits is written, if that does not take long."""
        self._handlers.clear()
        if self._transport is not None and not self.closed.is_set():
            self._transport.close()
            try:
                async with asyncio.timeout(_CLOSE_TIMEOUT):
                    await self.closed.wait()
            except TimeoutError:
                pass
            finally:
                self.abort()

    def abort(self) -> None:
        """Close it at once; nothing comes of it any more."""
        self._handlers.clear()
        if self._transport is not None:
            self._transport.abort()
        self._end("closed")

    def _write(self, data: bytes) -> None:
        """A command, which is not dropped: a server that does not read them is cut off."""
        transport = self._transport
        if transport is None or self.closed.is_set():
            return
        if transport.get_write_buffer_size() > 2 * MAX_WAITING:
            self.error = "the server does not read"
            self.abort()
            return
        transport.write(data)

    # ----------------------------------------------------------------------------------------------- from NATS

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are of no common class

    def data_received(self, data: bytes) -> None:
        try:
            for event in self._parser.receive(data):
                if type(event) is not Message:
                    self._take(event)
                elif (handler := self._handlers.get(event.sid)) is not None:
                    handler(event.subject, event.reply, event.data)
                elif event.sid == 0:
                    self._answer(event)
        except NatsError as exc:
            self.error = str(exc)
            self.abort()
        except Exception as exc:  # handlers catch theirs
            log.error("nats connection failed", exc=exc)
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(str(exc or "") or "the server has closed the connection")

    def _take(self, event: Event) -> None:
        if self._in_clear and not (isinstance(event, Info) and self._greeting is not None):
            self._refuse_clear(event)
        match event:
            case Ping():
                self._write(protocol.PONG)
            case Pong() if self._pings:
                pong = self._pings.popleft()
                if not pong.done():
                    pong.set_result(None)
            case Info():
                self.max_payload = event.max_payload
                greeting, self._greeting = self._greeting, None
                if greeting is not None and not greeting.done():
                    greeting.set_result(event)
            case Refused():
                self.error = event.text
                log.debug("nats client", error=event.text)

    def _refuse_clear(self, event: Event) -> None:
        if isinstance(event, Refused):
            raise NatsError(event.text)  # such as too many connections
        raise NatsError("the server speaks before we have logged in")

    def _answer(self, message: Message) -> None:
        question = self._questions.get(message.subject)
        if question is None or question.done():
            return
        if message.status == "503":
            question.set_exception(NobodyAnswers("nobody answers to this name"))
        else:
            question.set_result(message.data)

    def _end(self, why: str) -> None:
        if self.closed.is_set():
            return
        self.error = self.error or why
        self.closed.set()
        waiting = [self._greeting, *self._pings, *self._questions.values()]
        self._greeting = None
        self._pings.clear()
        for future in waiting:
            if future is not None and not future.done():
                future.set_exception(NatsError(self.error))
                future.exception()  # asked for, so that nobody has to


class NobodyAnswers(NatsError):
    """Nobody listens to what we have asked."""
