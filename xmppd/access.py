"""Who may do what, and how much: acl, access_rules and shaper_rules of the configuration, evaluated. No I/O.

An acl matches when any of its conditions does; a rule counts when all its acls match; of a list of rules the first that
counts decides. When none does: an access rule denies, a shaper rule does not limit, a number is the default of who
asks. `all` and `none` are acls, access rules and shapers of their own, and `loopback` is an acl unless the
configuration makes another of that name. The words are ejabberd's.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import translate
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final, Protocol

from xmppd.protocol.jid import JID
from xmppd.shaper import ShaperLimits

MAX_USER_SESSIONS: Final = "max_user_sessions"
DEFAULT_USER_SESSIONS: Final = 10  # where no rule counts, as in ejabberd
LOOPBACK: Final = "loopback"

Value = str | int
Networks = Sequence[IPv4Network | IPv6Network]


class AclOptions(Protocol):
    """One acl as the configuration has it; users and servers are prepared."""

    @property
    def user(self) -> Sequence[str]: ...
    @property
    def user_regexp(self) -> Sequence[str]: ...
    @property
    def user_glob(self) -> Sequence[str]: ...
    @property
    def server(self) -> Sequence[str]: ...
    @property
    def server_regexp(self) -> Sequence[str]: ...
    @property
    def server_glob(self) -> Sequence[str]: ...
    @property
    def resource(self) -> Sequence[str]: ...
    @property
    def resource_regexp(self) -> Sequence[str]: ...
    @property
    def resource_glob(self) -> Sequence[str]: ...
    @property
    def ip(self) -> Networks: ...


class Rule(Protocol):
    @property
    def value(self) -> Value: ...
    @property
    def acls(self) -> Sequence[str]: ...


class Scope(Protocol):
    """The options as they hold for one host, or for all."""

    @property
    def acl(self) -> Mapping[str, AclOptions]: ...
    @property
    def access_rules(self) -> Mapping[str, Sequence[Rule]]: ...
    @property
    def shaper_rules(self) -> Mapping[str, Sequence[Rule]]: ...


class Shaper(Protocol):
    @property
    def rate(self) -> float: ...
    @property
    def burst(self) -> float: ...


class Config(Scope, Protocol):
    @property
    def hosts(self) -> Sequence[str]: ...
    @property
    def shaper(self) -> Mapping[str, Shaper]: ...
    def for_host(self, host: str) -> Scope: ...


@dataclass(frozen=True, slots=True)
class Acl:
    """The conditions of one acl, ready to be compared.

    Conditions on users without a domain hold on our hosts. Regular expressions may match anywhere in the text, globs
    match all of it. Patterns and resources are compared with regard to case; users and domains come prepared.
    """

    accounts: frozenset[tuple[str, str]]  # user, domain
    users: frozenset[str]
    user_patterns: tuple[re.Pattern[str], ...]
    servers: frozenset[str]
    server_patterns: tuple[re.Pattern[str], ...]
    resources: frozenset[str]
    resource_patterns: tuple[re.Pattern[str], ...]
    networks: tuple[IPv4Network | IPv6Network, ...]

    @classmethod
    def of(cls, options: AclOptions) -> "Acl":
        pairs = [user.partition("@") for user in options.user]
        return cls(
            frozenset((user, domain) for user, at, domain in pairs if at),
            frozenset(user for user, at, _ in pairs if not at),
            _patterns(options.user_regexp, options.user_glob),
            frozenset(options.server),
            _patterns(options.server_regexp, options.server_glob),
            frozenset(options.resource),
            _patterns(options.resource_regexp, options.resource_glob),
            tuple(options.ip),
        )

    def matches(self, user: JID | None, ip: str, hosts: frozenset[str]) -> bool:
        """Whether somebody is in it. `user` may be a full JID, a bare one, or nobody yet; `ip` may be unknown: ""."""
        if user is not None and self._is_user(user, hosts):
            return True
        if self.networks and (address := _address(ip)) is not None:
            return any(address in network for network in self.networks)
        return False

    def _is_user(self, user: JID, hosts: frozenset[str]) -> bool:
        local, domain, resource = user.local, user.domain, user.resource
        if local and (
            (local, domain) in self.accounts
            or (domain in hosts and (local in self.users or _any(self.user_patterns, local)))
        ):
            return True
        if domain in self.servers or _any(self.server_patterns, domain):
            return True
        return bool(resource) and (resource in self.resources or _any(self.resource_patterns, resource))


_LOOPBACK: Final = Acl(
    frozenset(), frozenset(), (), frozenset(), (), frozenset(), (), (ip_network("127.0.0.0/8"), ip_network("::1/128"))
)


class AccessRules:
    """The rules of one configuration, by host. Never changes."""

    def __init__(self, config: Config) -> None:
        self._hosts = frozenset(config.hosts)
        self._shapers = {name: ShaperLimits(shaper.rate, shaper.burst) for name, shaper in config.shaper.items()}
        self._common = _Tables(config)
        self._by_host = {host: _Tables(config.for_host(host)) for host in config.hosts}

    def _tables(self, host: str, user: JID | None) -> "_Tables":
        return self._by_host.get(host or (user.domain if user is not None else ""), self._common)

    def in_acl(self, name: str, user: JID | None = None, ip: str = "", host: str = "") -> bool:
        """Whether somebody is in the acl of that name; nobody is in one that does not exist. `host`: whose acl, if it
        is not that of the user's domain."""
        return self._in(self._tables(host, user), name, user, ip)

    def _in(self, tables: "_Tables", name: str, user: JID | None, ip: str) -> bool:
        if name in ("all", "none"):
            return name == "all"
        acl = tables.acls.get(name)
        return acl is not None and acl.matches(user, ip, self._hosts)

    def _first(self, tables: "_Tables", rules: Iterable[Rule], user: JID | None, ip: str) -> Value | None:
        for rule in rules:
            if all(self._in(tables, acl, user, ip) for acl in rule.acls):
                return rule.value
        return None

    def has_rule(self, name: str) -> bool:
        """Whether there is an access rule of that name, on any host."""
        return name in ("all", "none") or any(name in t.access for t in (self._common, *self._by_host.values()))

    def has_limit(self, name: str) -> bool:
        """Whether there is a rule of that name that `limit` could look at, on any host."""
        return any(name in t.access or name in t.shapers for t in (self._common, *self._by_host.values()))

    def allowed(self, rule: str, user: JID | None = None, ip: str = "", host: str = "") -> bool:
        """Whether an access rule lets somebody in; a rule that does not exist lets nobody in."""
        if rule in ("all", "none"):
            return rule == "all"
        tables = self._tables(host, user)
        return self._first(tables, tables.access.get(rule, ()), user, ip) == "allow"

    def limit(self, rule: str, default: int | None, user: JID | None = None, ip: str = "") -> int | None:
        """The number that a rule of either kind has for somebody, None for `infinity`; `default` where it has none."""
        tables = self._tables("", user)
        rules = tables.shapers.get(rule) or tables.access.get(rule, ())
        value = self._first(tables, rules, user, ip)
        if isinstance(value, int):
            return value
        return None if value == "infinity" else default

    def shaper(self, rule: str, user: JID | None = None, ip: str = "") -> ShaperLimits | None:
        """How fast somebody may send, None: as fast as they can."""
        tables = self._tables("", user)
        value = self._first(tables, tables.shapers.get(rule, ()), user, ip)
        return self._shapers.get(value) if isinstance(value, str) else None


class Access:
    """The rules in force. Those who hold this see each new configuration; `rules` is replaced at a reload."""

    __slots__ = ("rules",)

    def __init__(self, rules: AccessRules) -> None:
        self.rules = rules

    def in_acl(self, name: str, user: JID | None = None, ip: str = "", host: str = "") -> bool:
        """As AccessRules.in_acl."""
        return self.rules.in_acl(name, user, ip, host)

    def allowed(self, rule: str, user: JID | None = None, ip: str = "", host: str = "") -> bool:
        """As AccessRules.allowed."""
        return self.rules.allowed(rule, user, ip, host)

    def limit(self, rule: str, default: int | None, user: JID | None = None, ip: str = "") -> int | None:
        """As AccessRules.limit."""
        return self.rules.limit(rule, default, user, ip)

    def shaper(self, rule: str, user: JID | None = None, ip: str = "") -> ShaperLimits | None:
        """As AccessRules.shaper."""
        return self.rules.shaper(rule, user, ip)

    def max_sessions(self, user: JID, ip: str = "") -> int | None:
        """How many sessions a user may have at once (requirements ST-02); None: any number."""
        return self.rules.limit(MAX_USER_SESSIONS, DEFAULT_USER_SESSIONS, user, ip)


class _Tables:
    """The rules of one scope."""

    __slots__ = ("access", "acls", "shapers")

    def __init__(self, scope: Scope) -> None:
        self.acls = {LOOPBACK: _LOOPBACK} | {name: Acl.of(options) for name, options in scope.acl.items()}
        self.access = scope.access_rules
        self.shapers = scope.shaper_rules


def _patterns(regexps: Sequence[str], globs: Sequence[str]) -> tuple[re.Pattern[str], ...]:
    return tuple(re.compile(text) for text in (*regexps, *(rf"\A{translate(glob)}" for glob in globs)))


def _any(patterns: tuple[re.Pattern[str], ...], text: str) -> bool:
    return any(pattern.search(text) for pattern in patterns)


def _address(text: str) -> IPv4Address | IPv6Address | None:
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address
