"""Who asks, and what they may: bearer tokens, addresses, `api_permissions`. What nothing allows is refused."""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final

from aiohttp import web

from xmppd import access
from xmppd.admin.api_tokens import ApiTokens
from xmppd.admin.registry import Command
from xmppd.config import Config
from xmppd.config.api import Who, covers
from xmppd.errors import StorageError
from xmppd.http.answers import Refused
from xmppd.log import get_logger

_log = get_logger("xmppd.http")

Address = IPv4Address | IPv6Address

FAILURES: Final = 20  # tokens nobody knows from one address ...
PERIOD: Final = 60.0  # ... in so many seconds; then even a good one has to wait
ADDRESSES: Final = 4096  # remembered at most; the one that failed longest ago is forgotten first
_LONGEST_TOKEN: Final = 512
_CHALLENGE: Final = 'Bearer realm="xmppd"'
# Set by proxies. Whom such a request comes from is not known, so no acl by address fits it.
_FORWARDED: Final = ("Forwarded", "X-Forwarded-For", "X-Real-IP", "Via")


@dataclass(frozen=True, slots=True)
class Client:
    """Who asks. `address` is None where a proxy stands between us."""

    address: Address | None
    token: str | None = None  # its name
    what: tuple[str, ...] = ()  # what the token may do by itself

    def __str__(self) -> str:
        return self.token if self.token is not None else str(self.address or "proxy")


class FailureLimit:
    """How often an address may present a token that nobody knows; IPv6 addresses count by their /64."""

    def __init__(self, *, count: int = FAILURES, period: float = PERIOD, clock: Callable[[], float]) -> None:
        self._count = count
        self._rate = count / period
        self._clock = clock
        self._debts: OrderedDict[str, tuple[float, float]] = OrderedDict()  # failures not yet forgiven, and when

    def wait(self, address: Address) -> float:
        """Seconds until the address may try again; 0: at once."""
        debt = self._debt(_network(address))
        return 0.0 if debt <= self._count - 1 else (debt - self._count + 1) / self._rate

    def failed(self, address: Address) -> None:
        """One failure more."""
        key = _network(address)
        self._debts[key] = (self._debt(key) + 1, self._clock())
        self._debts.move_to_end(key)
        if len(self._debts) > ADDRESSES:
            self._debts.popitem(last=False)

    def _debt(self, key: str) -> float:
        debt, since = self._debts.get(key, (0.0, 0.0))
        return max(0.0, debt - (self._clock() - since) * self._rate)


def _network(address: Address) -> str:
    return str(address) if address.version == 4 else str(int(address) >> 64)


class Access:
    """Answers for one node; the configuration is asked each time, so a reload counts at once."""

    def __init__(
        self,
        config: Callable[[], Config],
        rules: access.Access,
        tokens: ApiTokens,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._rules = rules
        self._tokens = tokens
        self._limit = FailureLimit(clock=clock)

    async def identify(self, request: web.BaseRequest) -> Client:
        """Who asks. Refused: 401 for a token nobody knows, 429 after too many of them, 503 without a database."""
        peer = _address(request.remote)
        near = None if any(name in request.headers for name in _FORWARDED) else peer
        headers = request.headers.getall("Authorization", [])
        if not headers:
            return Client(near)
        pause = self._limit.wait(peer)
        if pause > 0:
            raise Refused(429, "too many tokens that nobody knows", Retry_After=str(int(pause) + 1))
        scheme, _, secret = headers[0].partition(" ")
        token = None
        if len(headers) == 1 and scheme.lower() == "bearer" and 0 < len(secret) <= _LONGEST_TOKEN:
            try:
                token = await self._tokens.find(secret.strip())
            except StorageError as exc:
                raise Refused(503, "tokens cannot be checked now", Retry_After="5") from exc
        if token is None:
            self._limit.failed(peer)
            _log.info("http token refused", ip=str(peer))
            raise unauthorized("this token is not valid", error='error="invalid_token"')
        return Client(near, token.name, token.what)

    def may(self, client: Client, command: Command) -> bool:
        """Whether the client may call the command."""
        return any(covers(what, command.name, command.tags) for what in self._rights(client))

    def may_anything(self, client: Client) -> bool:
        """Whether there is anything the client may call."""
        return bool(self._rights(client))

    def _rights(self, client: Client) -> list[tuple[str, ...]]:
        own = [client.what] if client.what else []
        return own + [
            permission.what
            for permission in self._config().api_permissions.values()
            if "http" in permission.from_ and any(self._is(client, who) for who in permission.who)
        ]

    def _is(self, client: Client, who: Who) -> bool:
        """An HTTP client has an address and no JID, so of an acl its `ip` counts."""
        address = "" if client.address is None else str(client.address)
        return (
            not who.observer
            and (not who.token or client.token in who.token)
            and (not who.ip or (client.address is not None and any(client.address in network for network in who.ip)))
            and (not who.acl or any(self._rules.in_acl(name, None, address) for name in who.acl))
        )


def unauthorized(message: str, *, error: str = "") -> Refused:
    """401, with the challenge of RFC 6750 3."""
    return Refused(401, message, WWW_Authenticate=f"{_CHALLENGE}, {error}" if error else _CHALLENGE)


def _address(text: str | None) -> Address:
    address = ip_address((text or "::").partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address
