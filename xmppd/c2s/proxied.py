"""Connections that come through a balancer with a PROXY header in front (`use_proxy_protocol`).

Nothing else is taken from a client until it is known who the client is: the limits, the access rules and the log go by
its address. Only the balancers that the listener trusts may say one; whoever else connects is cut off at once.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Final, cast

from xmppd.log import Logger
from xmppd.metrics import add
from xmppd.protocol.proxy_protocol import ProxyHeader, ProxyHeaderError

PATIENCE: Final = 5.0  # seconds for the header, which comes with the first packet: time to send it again once
_SAME_PEER: Final = 60.0  # seconds between two log lines about one address
_PEERS: Final = 1024  # addresses remembered for that

Client = tuple[str, int] | None  # None: what the connection itself says
Begin = Callable[[asyncio.Transport, Client, bytes], None]


@dataclass(frozen=True, slots=True)
class Caller:
    """What becomes of one connection: `begin` takes it over with the client's address and the bytes behind the header;
    `lost` is told when it has ended before."""

    begin: Begin
    lost: Callable[[], None]


class Gate:
    """Where the connections of one listener wait for their headers. `refused` counts by reason: `untrusted`,
    `malformed`, `timeout`, `incomplete`."""

    def __init__(
        self,
        trusted: Sequence[IPv4Network | IPv6Network],
        log: Logger,
        refused: dict[str, int],
        *,
        patience: float = PATIENCE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.patience = patience
        self._trusted = tuple(trusted)
        self._log = log
        self._refused = refused
        self._clock = clock
        self._complained: dict[str, float] = {}
        self.waiting: set[Front] = set()

    def front(self, caller: Caller) -> asyncio.Protocol:
        """The protocol of a new connection."""
        return Front(self, caller)

    def close(self) -> None:
        """Cut off those that wait."""
        for front in list(self.waiting):
            front.abort()

    def trusts(self, ip: str) -> bool:
        """Whether this is the address of one of our balancers."""
        address = ip_address(ip.partition("%")[0])
        plain = (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address
        return any(plain in network for network in self._trusted)

    def refuse(self, ip: str, reason: str, why: str) -> None:
        """Count it, and say so once a minute for each address: some try every second."""
        add(self._refused, reason)
        now = self._clock()
        if now - self._complained.get(ip, -_SAME_PEER) < _SAME_PEER:
            return
        if len(self._complained) >= _PEERS:
            self._complained.clear()
        self._complained[ip] = now
        self._log.warning("proxied connection refused", peer=ip, reason=reason, why=why)


class Front(asyncio.Protocol):
    """A connection until its header has been read."""

    def __init__(self, gate: Gate, caller: Caller) -> None:
        self._gate = gate
        self._caller = caller
        self._header = ProxyHeader()
        self._transport: asyncio.Transport | None = None
        self._peer = ""
        self._judged = False
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._gate.waiting.add(self)
        address = transport.get_extra_info("peername")
        if not address:  # gone already
            self._transport.abort()
            return
        self._peer = address[0]
        if not self._gate.trusts(self._peer):
            self._refuse("untrusted", "it is not one of trusted_proxies")
            return
        self._deadline = asyncio.get_running_loop().call_later(self._gate.patience, self._too_slow)

    def data_received(self, data: bytes) -> None:
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        try:
            whole = self._header.receive(data)
        except ProxyHeaderError as error:
            self._refuse("malformed", str(error))
            return
        if whole:
            self._leave()
            self._caller.begin(transport, self._header.client, self._header.rest)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._transport is None:
            return
        if self._header.begun and not self._judged:
            self._gate.refuse(self._peer, "incomplete", "it ended within the header")
        self._leave()
        self._caller.lost()

    def abort(self) -> None:
        """Drop it without a word."""
        self._judged = True
        if self._transport is not None:
            self._transport.abort()

    def _leave(self) -> None:
        self._gate.waiting.discard(self)
        self._transport = None
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        self._deadline = None
        self._refuse("timeout", f"no whole header within {self._gate.patience:g} s")

    def _refuse(self, reason: str, why: str) -> None:
        self._gate.refuse(self._peer, reason, why)
        self.abort()
