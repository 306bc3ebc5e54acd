"""A listening socket for clients (RFC 6120 3, XEP-0368 for direct TLS)."""

import asyncio
import contextlib
import secrets
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from typing import Final, cast

from xmppd.auth import Auth
from xmppd.c2s.connection import Connection, Settings
from xmppd.c2s.negotiation import Negotiation, Rules, TlsContexts
from xmppd.c2s.proxied import PATIENCE, Caller, Client, Gate
from xmppd.c2s.session import Parts
from xmppd.c2s.ticks import Ticks
from xmppd.errors import StreamError, XmppdError
from xmppd.hooks import Spawn
from xmppd.log import get_logger

_BACKLOG: Final = 1024
_log = get_logger("xmppd.c2s")


@dataclass(frozen=True, slots=True)
class Address:
    """Where a listener listens, as it is written to ready.json."""

    ip: str
    port: int
    tls: bool


class TurnedAway(asyncio.Protocol):
    """A client there is no room for. It is not told why: that would take a file while it listens."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).abort()


class ClientListener:
    """Accepts clients on one address; knows its connections until they are gone."""

    def __init__(
        self,
        ip: str,
        port: int,
        *,
        direct_tls: bool,
        settings: Settings,
        rules: Rules,
        auth: Auth,
        tls: TlsContexts,
        parts: Callable[[], Parts],
        ticks: Ticks,
        spawn: Spawn,
        room: int,
        proxies: Sequence[IPv4Network | IPv6Network] | None = None,
    ) -> None:
        """`room`: how many clients the node takes, those of other listeners included. `proxies`: the balancers that may
        connect, each connection with a PROXY header; None: clients come by themselves."""
        self._ip = ip
        self._port = port
        self._direct_tls = direct_tls
        self.settings = settings
        self.rules = rules
        self._auth = auth
        self._tls = tls
        self._parts = parts
        self._ticks = ticks
        self._spawn = spawn
        self._room = room
        self._proxies = proxies
        self._gate: Gate | None = None
        self._server: asyncio.Server | None = None
        self._connections: set[Connection] = set()
        self._gone: asyncio.Event | None = None

    async def open(self) -> Address:
        """Bind and listen; XmppdError names the address when that fails. Port 0 picks a free one."""
        loop = asyncio.get_running_loop()
        sock = bind(self._ip, self._port)
        if self._proxies is not None:
            patience = min(PATIENCE, self.settings.negotiation_timeout)
            self._gate = Gate(self._proxies, _log, self._parts().counters.proxies_refused, patience=patience)
        # TLS is the connections' own affair: the loop would forget, without a word, those whose handshake fails.
        self._server = await loop.create_server(self._accept, sock=sock, backlog=_BACKLOG)
        port: int = sock.getsockname()[1]
        _log.info("listening", module="c2s", ip=self._ip, port=port, tls=self._direct_tls)
        return Address(self._ip, port, self._direct_tls)

    def _accept(self) -> asyncio.Protocol:
        parts = self._parts()
        if parts.counters.open >= self._room:
            parts.counters.refused += 1
            _log.warning("client connection refused", connections=parts.counters.open)
            return TurnedAway()
        parts.counters.accepted += 1
        parts.counters.open += 1
        if self._gate is None:
            return self._connection(parts, None)
        return self._gate.front(Caller(self._take_over, self._lost_early))

    def _take_over(self, transport: asyncio.Transport, client: Client, rest: bytes) -> None:
        connection = self._connection(self._parts(), client)
        transport.set_protocol(connection)
        connection.connection_made(transport)
        if rest:
            connection.data_received(rest)

    def _lost_early(self) -> None:
        self._parts().counters.open -= 1
        self._look_whether_gone()

    def _connection(self, parts: Parts, client: Client) -> Connection:
        log = _log.bind(secrets.token_hex(2))
        connection = Connection(
            self.settings,
            self._ticks,
            self._spawn,
            log,
            tls=self._tls.context(True) if self._direct_tls else None,
            counters=parts.counters,
            client=client,
        )
        connection.negotiator = Negotiation(connection, self.rules, self._auth, self._tls, parts)
        connection.on_lost = self._forget
        connection.choose_shaper = self.rules.shaper
        self._connections.add(connection)
        return connection

    def _forget(self, connection: Connection) -> None:
        self._connections.discard(connection)
        connection.counters.open -= 1
        self._look_whether_gone()

    def _look_whether_gone(self) -> None:
        if self._gone is not None and not self.connections:
            self._gone.set()

    @property
    def listening(self) -> bool:
        return self._server is not None and self._server.is_serving()

    @property
    def connections(self) -> int:
        """How many there are, those that negotiate included."""
        return len(self._connections) + (len(self._gate.waiting) if self._gate is not None else 0)

    def shape(self) -> None:
        """The shapers have changed: choose anew for every connection."""
        for connection in self._connections:
            connection.shape()

    def stop_listening(self) -> None:
        """Take no new connections; those that are there go on."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def close(self, grace: float) -> None:
        """`system-shutdown` to each stream, wait until they are gone or `grace` seconds are over, then cut."""
        self.stop_listening()
        self._gone = asyncio.Event()
        if self._gate is not None:
            self._gate.close()
        for connection in list(self._connections):
            connection.end(StreamError("system-shutdown"))
        if self.connections:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._gone.wait(), grace)
        for connection in list(self._connections):
            connection.abort()


def bind(ip: str, port: int) -> socket.socket:
    """A bound socket; "::" serves IPv4 too, and falls back to it where the machine has no IPv6.

    XmppdError names the address when it is taken or not ours.
    """
    attempts: Iterable[tuple[socket.AddressFamily, str]] = (
        [(socket.AF_INET6, "::"), (socket.AF_INET, "0.0.0.0")]
        if ip == "::"
        else [(socket.AF_INET6 if ":" in ip else socket.AF_INET, ip)]
    )
    failure: OSError | None = None
    for family, address in attempts:
        try:
            sock = socket.socket(family, socket.SOCK_STREAM)
        except OSError as exc:
            failure = exc
            continue
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if address == "::" else 1)
            sock.bind((address, port))
        except OSError as exc:
            sock.close()
            failure = exc
            continue
        sock.setblocking(False)
        return sock
    raise XmppdError(f"cannot listen on {ip} port {port}: {failure.strerror if failure else 'no address'}") from failure
