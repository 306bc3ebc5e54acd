"""How often somebody may fail to log in: per address and per account, in bounded memory.

Only failures count. Whoever has none left is told to wait (`temporary-auth-failure` with the seconds in its text)
before any password is looked at, and hears the same whether the account exists or not.

A limit on an account must not lock its owner out while somebody guesses. So each address that has logged in to the
account before has an allowance of its own there; all other addresses share one. Only an owner who comes from a new
address in the middle of an attack has to wait, and streams that are open are never touched.

An allowance of `20/m` is twenty failures at once and one more every three seconds: a token bucket, of which one number
is kept (the time at which it will be full again). An IPv6 site has a whole /64 of addresses, which count as one. What
was idle longest is forgotten when the tables are full; to push somebody out one must fail with as many other names or
addresses as a table holds, between any two guesses. Each node keeps its own, and a restart forgets them.
"""

import hashlib
import math
import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Final, Protocol

from xmppd.config.types import Rate

SIZE: Final = 32_768  # entries of each table; some 8 MiB each when full
TRUSTED_FOR: Final = 30 * 86400.0  # seconds an address keeps its own allowance after a login


class Settings(Protocol):
    """`login_limits:`; a rate that is None is no limit."""

    @property
    def per_address(self) -> Rate | None: ...
    @property
    def per_account(self) -> Rate | None: ...
    @property
    def exempt(self) -> Iterable[IPv4Network | IPv6Network]: ...


@dataclass(frozen=True, slots=True)
class Unlimited:
    """No limits at all."""

    per_address: Rate | None = None
    per_account: Rate | None = None
    exempt: tuple[IPv4Network | IPv6Network, ...] = ()


@dataclass(frozen=True, slots=True)
class Refusal:
    """No attempt now: because of the `address` or of the `account`, for so many seconds."""

    because: str
    seconds: int

    @property
    def text(self) -> str:
        where = "from your address" if self.because == "address" else "to this account"
        return f"too many failed logins {where}; try again in {self.seconds} seconds"


class Allowances:
    """Token buckets by key, never more than `size` of them."""

    def __init__(self, size: int = SIZE) -> None:
        self._size = size
        self._full_at: OrderedDict[bytes, float] = OrderedDict()  # the longest idle first

    def __len__(self) -> int:
        return len(self._full_at)

    def wait(self, key: bytes, rate: Rate, now: float) -> float:
        """Seconds until the next attempt may fail; 0.0 when there is a token now."""
        full_at = self._full_at.get(key)
        if full_at is None:
            return 0.0
        if full_at <= now:
            del self._full_at[key]  # a full bucket and none are the same
            return 0.0
        self._full_at.move_to_end(key)
        each = rate.period / rate.count
        # Not further ahead than an empty bucket of this rate: it may have been a longer one when that was written.
        wait = min(full_at - now, rate.period) - (rate.period - each)
        return wait if wait > each * 1e-6 else 0.0

    def take(self, key: bytes, rate: Rate, now: float) -> None:
        """Use up a token; of an empty bucket there is nothing to take."""
        full_at = max(self._full_at.get(key, now), now) + rate.period / rate.count
        self._full_at[key] = min(full_at, now + rate.period)
        self._full_at.move_to_end(key)
        while len(self._full_at) > self._size:
            self._full_at.popitem(last=False)


class LoginLimits:
    """Asked before each attempt, told after it. For the event loop's thread alone.

    `counts` for metrics: succeeded, failed, limited_address, limited_account.
    """

    def __init__(
        self,
        settings: Callable[[], Settings] = Unlimited,
        *,
        clock: Callable[[], float] = time.monotonic,
        size: int = SIZE,
    ) -> None:
        """`settings` is called each time, so that a reload takes effect at once."""
        self.counts: Counter[str] = Counter(succeeded=0, failed=0, limited_address=0, limited_account=0)
        self._settings = settings
        self._clock = clock
        self._size = size
        self._addresses = Allowances(size)
        self._accounts = Allowances(size)
        self._trusted: OrderedDict[bytes, float] = OrderedDict()  # account and address -> the last login
        self._secret = secrets.token_bytes(16)  # so that nobody can choose names whose hashes collide

    @property
    def remembered(self) -> int:
        """How many addresses and accounts, at most three times `size`."""
        return len(self._addresses) + len(self._accounts) + len(self._trusted)

    def refusal(self, address: str, host: str, username: str) -> Refusal | None:
        """Why this attempt may not be made now. `username` is prepared, whether it exists or not; "" is not known."""
        settings = self._settings()
        network = _network(address, settings.exempt)
        if network is None:
            return None
        now = self._clock()
        if settings.per_address is not None:
            wait = self._addresses.wait(self._key(network), settings.per_address, now)
            if wait:
                return self._refused("address", wait)
        if settings.per_account is not None and username:
            wait = self._accounts.wait(self._account(network, host, username, now), settings.per_account, now)
            if wait:
                return self._refused("account", wait)
        return None

    def failed(self, address: str, host: str, username: str) -> None:
        """The attempt was made, and the password was wrong or the name nobody's."""
        self.counts["failed"] += 1
        settings = self._settings()
        network = _network(address, settings.exempt)
        if network is None:
            return
        now = self._clock()
        if settings.per_address is not None:
            self._addresses.take(self._key(network), settings.per_address, now)
        if settings.per_account is not None and username:
            self._accounts.take(self._account(network, host, username, now), settings.per_account, now)

    def succeeded(self, address: str, host: str, username: str) -> None:
        """Somebody with this account logged in. Forgives no failures: else an attacker's own account would."""
        self.counts["succeeded"] += 1
        network = _network(address, self._settings().exempt)
        if network is None:
            return
        key = self._key(network, host, username)
        self._trusted[key] = self._clock()
        self._trusted.move_to_end(key)
        if len(self._trusted) > self._size:
            self._trusted.popitem(last=False)

    def _refused(self, because: str, wait: float) -> Refusal:
        self.counts[f"limited_{because}"] += 1
        return Refusal(because, math.ceil(wait))

    def _account(self, network: str, host: str, username: str, now: float) -> bytes:
        """Whose allowance for this account it is."""
        own = self._key(network, host, username)
        last = self._trusted.get(own)
        if last is not None and now - last <= TRUSTED_FOR:
            return own
        return self._key(host, username)

    def _key(self, *parts: str) -> bytes:
        """Names may be long; their hashes are not. "\\0" is in no address and in no name."""
        return hashlib.blake2b("\0".join(parts).encode(), key=self._secret, digest_size=16).digest()


def _network(address: str, exempt: Iterable[IPv4Network | IPv6Network]) -> str | None:
    """The address as it is counted; None for one that is not."""
    try:
        ip: IPv4Address | IPv6Address = ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(ip, IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    if any(ip in network for network in exempt):
        return None
    return str(ip) if isinstance(ip, IPv4Address) else str(IPv6Address(int(ip) >> 64 << 64))
