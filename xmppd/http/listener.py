"""A listening socket for HTTP/1.1: limits, time-outs, and the choice of the handler by path.

aiohttp's low-level server is used, without its application: there are a handful of fixed paths, compared as they came,
so nothing is decoded, normalised or looked up in a file system. Every request is answered within bounds: a peer has
IDLE seconds to send the head of a request, and SEND seconds to take an answer.
"""

import asyncio
import contextlib
import itertools
import logging
import socket
import ssl
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from ipaddress import IPv4Network, IPv6Network
from typing import Any, Final

from aiohttp import web

from xmppd.c2s.listener import TurnedAway, bind
from xmppd.c2s.proxied import Caller, Client, Gate
from xmppd.c2s.tls import feed
from xmppd.errors import XmppdError
from xmppd.http.answers import Answer, Handler, Refused
from xmppd.log import get_logger

_log = get_logger("xmppd.http")

MAX_CONNECTIONS: Final = 256
IDLE: Final = 30.0  # seconds, from connecting or from the last answer to the end of a request's head
SEND: Final = 30.0  # seconds in which a peer must take an answer, or each piece of a long one
HANDSHAKE: Final = 10.0  # seconds for TLS
LINGER: Final = 2.0  # seconds in which the rest of a refused body is taken, so that the answer survives
_HEADERS: Final = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


class _Request(web.BaseRequest):
    async def _prepare_hook(self, response: web.StreamResponse) -> None:
        response.headers.popall("Server", None)  # whose and which version is nobody's business


class _Protocol(web.RequestHandler):
    __slots__ = ("client",)

    client: Client  # who it is, where the socket's other end is a balancer

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """A request that could not be parsed; aiohttp's own text would quote it."""
        refused = Refused(status, "this is no HTTP request" if status == 400 else "the request failed").answer()
        response = web.Response(status=status, body=refused.body, headers=_HEADERS)
        response.content_type = "application/json"
        response.force_close()
        return response


class _Server(web.Server):
    """Makes the protocol of each connection, up to MAX_CONNECTIONS."""

    def __call__(self) -> web.RequestHandler:
        return self.handler(None)

    def handler(self, client: Client) -> web.RequestHandler:
        """The protocol of a connection that comes from this client."""
        handler = _Protocol(self, loop=self._loop, **self._kwargs)
        handler.client = client
        return handler

    def connection_made(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        if len(self._connections) > MAX_CONNECTIONS:
            _log.warning("http connection refused", connections=MAX_CONNECTIONS)
            transport.abort()


class HttpListener:
    """Serves handlers on one address. `requests` counts answers by (handler, status)."""

    def __init__(
        self,
        ip: str,
        port: int,
        handlers: Mapping[str, Handler],
        *,
        tls: Callable[[], ssl.SSLContext] | None,
        requests: dict[tuple[str, int], int],
        proxies: Sequence[IPv4Network | IPv6Network] | None = None,
        refused: dict[str, int] | None = None,
    ) -> None:
        """`proxies`: the balancers that may connect, each connection with a PROXY header; None: clients come by
        themselves. `refused` counts those that did not, by reason."""
        self._ip = ip
        self._port = port
        self._tls = tls
        # The longest path first: /api/v2 before /api, and / last.
        self._handlers = sorted(((path.rstrip("/"), one) for path, one in handlers.items()), key=_longest)
        self._requests = requests
        self._gate = Gate(proxies, _log, {} if refused is None else refused) if proxies is not None else None
        self._handshakes: set[asyncio.Task[None]] = set()
        self._web: _Server | None = None
        self._server: asyncio.Server | None = None

    async def open(self) -> dict[str, Any]:
        """Bind and listen; the entry for ready.json comes back. XmppdError names the address when that fails."""
        loop = asyncio.get_running_loop()
        sock = bind(self._ip, self._port)
        self._web = _Server(
            self._answer,
            request_factory=_request,
            access_log=None,
            logger=logging.getLogger("xmppd.http"),
            keepalive_timeout=IDLE,
            lingering_time=LINGER,
            auto_decompress=False,  # a body that is a bomb
        )
        try:
            # Behind a balancer TLS begins after the header.
            tls = self._tls() if self._tls and self._gate is None else None
            self._server = await loop.create_server(
                self._web if self._gate is None else self._accept,
                sock=sock,
                ssl=tls,
                ssl_handshake_timeout=HANDSHAKE if tls else None,
            )
        except OSError as exc:
            sock.close()
            raise XmppdError(f"cannot listen on {self._ip} port {self._port}: {exc.strerror}") from exc
        port: int = sock.getsockname()[1]
        _log.info("listening", module="http", ip=self._ip, port=port, tls=self._tls is not None)
        return {"module": "http", "ip": self._ip, "port": port, "tls": self._tls is not None}

    def _accept(self) -> asyncio.Protocol:
        assert self._gate is not None
        if len(self._gate.waiting) + len(self._handshakes) >= MAX_CONNECTIONS:
            _log.warning("http connection refused", connections=MAX_CONNECTIONS)
            return TurnedAway()
        return self._gate.front(Caller(self._take_over, lambda: None))

    def _take_over(self, transport: asyncio.Transport, client: Client, rest: bytes) -> None:
        """The header has been read: TLS where it is due, and then the requests."""
        if self._web is None or self._server is None:
            transport.abort()
            return
        handler = self._web.handler(client)
        if self._tls is None:
            _begin(handler, transport, rest)
            return
        task = asyncio.get_running_loop().create_task(
            self._encrypt(transport, self._tls(), handler, rest), name="http tls"
        )
        self._handshakes.add(task)
        task.add_done_callback(self._handshakes.discard)

    async def _encrypt(
        self, transport: asyncio.Transport, context: ssl.SSLContext, handler: asyncio.Protocol, hello: bytes
    ) -> None:
        early = _Early()
        loop = asyncio.get_running_loop()
        loop.call_soon(_pass_on, transport, transport.get_protocol(), hello)  # when the handshake is there to take it
        try:
            encrypted = await loop.start_tls(
                transport, early, context, server_side=True, ssl_handshake_timeout=HANDSHAKE
            )
        except (OSError, asyncio.CancelledError):
            encrypted = None
        if encrypted is None or encrypted.is_closing():
            transport.abort()
        else:
            _begin(handler, encrypted, early.data)

    @property
    def listening(self) -> bool:
        return self._server is not None and self._server.is_serving()

    async def close(self, grace: float) -> None:
        """Take no more requests, let those that run end for `grace` seconds, then cut them off."""
        if self._server is None or self._web is None:
            return
        self._server.close()
        self._server = None
        if self._gate is not None:
            self._gate.close()
        for task in list(self._handshakes):
            task.cancel()
        self._web.pre_shutdown()
        await self._web.shutdown(grace)

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        name, answer = "none", Refused(404, "there is nothing here").answer()
        handler, rest = self._find(request.rel_url.raw_path)
        if handler is not None:
            name, answer = handler.name, await _asked(handler, request, rest)
        key = (name, answer.status)
        self._requests[key] = self._requests.get(key, 0) + 1
        try:
            if isinstance(answer.body, bytes):
                return await _send(request, answer, answer.body)
            return await _send_pieces(request, answer, answer.body)
        except TimeoutError:
            _log.info("http client takes nothing", ip=request.remote)
        except ConnectionError:
            raise
        except Exception as exc:
            # the head is out: only a broken connection can still say that the answer is not whole
            _log.error("http answer failed", exc=exc, handler=name)
        _cut(request)
        raise ConnectionResetError

    def _find(self, path: str) -> tuple[Handler | None, str]:
        for prefix, handler in self._handlers:
            if path == prefix or (not prefix and path == "/"):
                return handler, ""
            if not handler.exact and path.startswith(f"{prefix}/"):
                return handler, path[len(prefix) + 1 :]
        return None, ""


def _cut(request: web.BaseRequest) -> None:
    """End the connection, and have the kernel throw away what it still holds for the peer."""
    if request.transport is not None:
        sock = request.transport.get_extra_info("socket")
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.transport.abort()


class _Early(asyncio.Protocol):
    """Keeps what comes between the end of the handshake and the moment when we hear of that."""

    def __init__(self) -> None:
        self.data = b""

    def data_received(self, data: bytes) -> None:
        self.data += data


def _begin(handler: asyncio.Protocol, transport: asyncio.Transport, data: bytes) -> None:
    transport.set_protocol(handler)
    handler.connection_made(transport)
    if data:
        handler.data_received(data)


def _pass_on(transport: asyncio.Transport, before: asyncio.BaseProtocol, hello: bytes) -> None:
    if not transport.is_closing() and transport.get_protocol() is not before:
        feed(transport.get_protocol(), hello)


def _longest(item: tuple[str, Handler]) -> int:
    return -len(item[0])


def _request(message: Any, payload: Any, protocol: Any, writer: Any, task: Any) -> web.BaseRequest:
    remote = protocol.client[0] if protocol.client is not None else None
    return _Request(message, payload, protocol, writer, task, asyncio.get_running_loop(), remote=remote)


async def _asked(handler: Handler, request: web.BaseRequest, rest: str) -> Answer:
    try:
        return await handler(request, rest)
    except Refused as refused:
        return refused.answer()
    except Exception as exc:
        _log.error("http request failed", exc=exc, handler=handler.name)
        return Refused(500, "the request failed, see the log").answer()


async def _send(request: web.BaseRequest, answer: Answer, body: bytes) -> web.StreamResponse:
    headers = {**_HEADERS, **answer.headers, "Content-Type": answer.content_type}
    response = web.Response(status=answer.status, body=body, headers=headers)
    async with asyncio.timeout(SEND):
        await response.prepare(request)
        await response.write_eof()
    return response


async def _send_pieces(request: web.BaseRequest, answer: Answer, pieces: Iterator[bytes]) -> web.StreamResponse:
    """A long list, a part at a time, so that the streams of the node have their turn in between."""
    headers = {**_HEADERS, **answer.headers, "Content-Type": answer.content_type}
    piece, following = next(pieces), next(pieces, None)
    if following is None:
        return await _send(request, answer, piece)
    response = web.StreamResponse(status=answer.status, headers=headers)
    async with asyncio.timeout(SEND):
        await response.prepare(request)
        await response.write(piece)
    for piece in itertools.chain([following], pieces):
        async with asyncio.timeout(SEND):
            await response.write(piece)
        await asyncio.sleep(0)
    async with asyncio.timeout(SEND):
        await response.write_eof()
    return response
