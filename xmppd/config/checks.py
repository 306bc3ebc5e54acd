"""What no single option can know: names that must exist elsewhere, values that contradict each other."""

from collections.abc import Callable, Iterable, Iterator
from ipaddress import ip_address
from typing import Final

from .per_host import HostConfig, Rules, host_config
from .problems import key, suggest
from .rules import BUILT_IN_ACLS, INFINITY
from .schema import SCRAM_MECHANISMS, AppendHostOptions, C2SListen, Schema
from .types import each_server, format_size, host_port

Problem = tuple[str, str]  # path, words
Check = Callable[[Schema], Iterator[Problem]]


def _hosts(config: Schema) -> Iterator[Problem]:
    if not config.hosts:
        yield "hosts", "expected at least one domain to serve"
    for index, host in enumerate(config.hosts):
        if host in config.hosts[:index]:
            yield f"hosts[{index}]", f"{host} is listed twice"


def _covers(one: str, other: str) -> bool:
    """Whether two sockets on these addresses would be in each other's way (`::` takes IPv4 too)."""
    return one == other or "::" in (one, other) or ("0.0.0.0" in (one, other) and ":" not in one + other)


def _ports(config: Schema) -> Iterator[Problem]:
    for index, listener in enumerate(config.listen):
        for number, earlier in enumerate(config.listen[:index]):
            if listener.port and listener.port == earlier.port and _covers(listener.ip, earlier.ip):
                yield f"listen[{index}].port", f"{listener.port} is already used by listen[{number}] on {earlier.ip}"
                break


def _proxies(config: Schema) -> Iterator[Problem]:
    for index, listener in enumerate(config.listen):
        if listener.use_proxy_protocol and not listener.trusted_proxies:
            at = f"listen[{index}].use_proxy_protocol"
            yield at, "needs trusted_proxies, the addresses of the proxies that may speak it"


def _c2s_listeners(config: Schema) -> Iterator[Problem]:
    for index, listener in enumerate(config.listen):
        if not isinstance(listener, C2SListen):
            continue
        at = f"listen[{index}]"
        if listener.tls and (listener.starttls or listener.starttls_required):
            yield f"{at}.tls", "a listener is either tls: true (direct TLS) or starttls: true, not both"
        elif listener.starttls_required and not listener.starttls:
            yield f"{at}.starttls_required", "needs starttls: true"
        if listener.pre_auth_max_stanza_size > listener.max_stanza_size:
            limit = format_size(listener.max_stanza_size)
            yield f"{at}.pre_auth_max_stanza_size", f"expected at most max_stanza_size, {limit}"
        if listener.pre_auth_max_elements > listener.max_elements:
            yield f"{at}.pre_auth_max_elements", f"expected at most max_elements, {listener.max_elements}"
        if listener.max_write_queue < listener.max_stanza_size:
            limit = format_size(listener.max_stanza_size)
            yield f"{at}.max_write_queue", f"expected at least max_stanza_size, {limit}"


def _unknown(kind: str, name: str, known: list[str]) -> str:
    return f"there is no {kind} {name!r}.{suggest(name, known)}"


def listener_rules(config: Schema) -> Iterator[Problem]:
    """Listeners whose access rule or shaper rule does not exist for everybody, or is of another kind."""
    found: dict[Problem, None] = {}
    scopes: list[Schema | HostConfig] = [config, *(host_config(config, host) for host in config.hosts)]
    for scope in scopes:
        for index, listener in enumerate(config.listen):
            if isinstance(listener, C2SListen):
                problems = _rules_of(listener, f"listen[{index}]", scope.access_rules, scope.shaper_rules)
                found |= dict.fromkeys(problems)
    yield from found


def _rules_of(listener: C2SListen, at: str, access: Rules, shapers: Rules) -> Iterator[Problem]:
    names = ["all", "none", *access]
    if listener.access not in names:
        yield f"{at}.access", _unknown("access rule", listener.access, names)
    elif any(rule.value not in ("allow", "deny") for rule in access.get(listener.access, ())):
        yield f"{at}.access", f"the access rule {listener.access!r} has other values than allow and deny"
    names = ["none", *shapers]
    if listener.shaper not in names:
        yield f"{at}.shaper", _unknown("shaper rule", listener.shaper, names)
    elif any(isinstance(rule.value, int) for rule in shapers.get(listener.shaper, ())):
        yield f"{at}.shaper", f"the shaper rule {listener.shaper!r} has numbers where shapers are expected"


def _scopes(config: Schema) -> Iterator[tuple[str, Schema | AppendHostOptions, Schema | HostConfig]]:
    """Each place where rules are written, and all that may be named there."""
    yield "", config, config
    for section in ("host_config", "append_host_config"):
        for host, own in getattr(config, section).items():
            yield f"{section}.{host}.", own, host_config(config, host)


def _acl_names(config: Schema) -> Iterator[Problem]:
    for prefix, own, scope in _scopes(config):
        known = [*BUILT_IN_ACLS, *scope.acl]
        for group in ("access_rules", "shaper_rules"):
            rules: Rules = dict(getattr(own, group))
            for name, entries in rules.items():
                for index, rule in enumerate(entries):
                    for acl in rule.acls:
                        if acl not in known:
                            yield f"{prefix}{group}.{key(name)}[{index}]", _unknown("acl", acl, known)


def _api_permissions(config: Schema) -> Iterator[Problem]:
    known = [*BUILT_IN_ACLS, *config.acl]
    for name, permission in config.api_permissions.items():
        for acl in dict.fromkeys(acl for who in permission.who for acl in who.acl):
            if acl not in known:
                yield f"api_permissions.{key(name)}.who", _unknown("acl", acl, known)


def _observers(config: Schema) -> Iterator[Problem]:
    observers = config.cluster.observers
    if observers.listen is None:
        return
    if config.cluster.nats_url is not None:
        yield (
            "cluster.observers.listen",
            "with nats_url observers connect to that NATS cluster, whose users are its own",
        )
    host, port = host_port(observers.listen)
    if port == 0:
        yield "cluster.observers.listen", "expected a port from 1 to 65535, got 0"
    if observers.certfile is None and not _loopback(host):
        yield "cluster.observers.certfile", f"secrets would go to {host} in clear: name a certificate with its key"


def _loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _shaper_names(config: Schema) -> Iterator[Problem]:
    known = ["none", "infinity", *config.shaper]
    for prefix, own, _ in _scopes(config):
        for name, entries in own.shaper_rules.items():
            for index, rule in enumerate(entries):
                if isinstance(rule.value, str) and rule.value not in known:
                    yield f"{prefix}shaper_rules.{key(name)}[{index}]", _unknown("shaper", rule.value, known)


def _limits(config: Schema) -> Iterator[Problem]:
    for prefix, own, _ in _scopes(config):
        for group, name in LIMITS:
            for index, rule in enumerate(getattr(own, group).get(name, ())):
                if not isinstance(rule.value, int) and rule.value != INFINITY:
                    yield f"{prefix}{group}.{name}[{index}]", f"expected a number or infinity, got {rule.value!r}"


def _host_sections(config: Schema) -> Iterator[Problem]:
    for section in ("host_config", "append_host_config"):
        for host in getattr(config, section):
            if host not in config.hosts:
                yield f"{section}.{host}", f"{host} is not one of the hosts.{suggest(host, config.hosts)}"


def _mechanisms(config: Schema) -> Iterator[Problem]:
    for host in config.hosts:
        own = host_config(config, host)
        if _locked_out(own.auth_method, own.auth_scram.hashes, set(own.disable_sasl_mechanisms)):
            special = host in config.host_config or host in config.append_host_config
            where = f" at {host}" if special else ""
            yield "disable_sasl_mechanisms", f"no mechanism is left with which anybody could log in{where}"
            if not special:
                return


def _locked_out(methods: Iterable[str], hashes: Iterable[str], disabled: set[str]) -> bool:
    """Whether one of the methods has no mechanism left. Those with channel binding are enough for `sql`."""
    offered = {"anonymous": {"ANONYMOUS"}, "sql": {"PLAIN"}}
    offered["sql"] |= {SCRAM_MECHANISMS[name] + plus for name in hashes for plus in ("", "-PLUS")}
    return any(offered[method] <= disabled for method in methods)


def _database(config: Schema) -> Iterator[Problem]:
    pool = config.database.pool
    if pool.min > pool.max:
        yield "database.pool.min", f"expected at most pool.max, {pool.max}, got {pool.min}"
    if "{data_dir}" in config.database.url and set(str(config.data_dir)) & set("?#"):
        yield "data_dir", "may not contain ? or # while database.url refers to it"
    if config.database.read and config.database.url.startswith("sqlite:"):
        yield "database.read", "replicas are of MySQL or MariaDB, and database.url is an SQLite file"
    for number, server in enumerate(config.database.read):
        if server.url.startswith("sqlite:"):
            yield f"database.read[{number}].url", "expected a URL that starts with mysql://"
        elif len(each_server(server.url)) > 1:
            yield f"database.read[{number}].url", "expected one host: each replica is an entry of its own"


_BY_HOST: Final = ("host_config", "append_host_config")
# Rules whose values are numbers. ejabberd has max_user_sessions among the shaper rules, which is understood too.
LIMITS: Final = (
    ("access_rules", "max_user_sessions"),
    ("shaper_rules", "max_user_sessions"),
    ("shaper_rules", "max_user_offline_messages"),
)

# Each check with the top-level options it looks at: it is left out when one of those is already at fault.
CHECKS: Final[tuple[tuple[frozenset[str], Check], ...]] = (
    (frozenset({"hosts"}), _hosts),
    (frozenset({"listen"}), _ports),
    (frozenset({"listen"}), _proxies),
    (frozenset({"listen"}), _c2s_listeners),
    (frozenset({"hosts", *_BY_HOST}), _host_sections),
    (frozenset({"listen", "access_rules", "shaper_rules", *_BY_HOST}), listener_rules),
    (frozenset({"acl", "access_rules", "shaper_rules", *_BY_HOST}), _acl_names),
    (frozenset({"acl", "api_permissions"}), _api_permissions),
    (frozenset({"cluster"}), _observers),
    (frozenset({"access_rules", "shaper_rules", *_BY_HOST}), _limits),
    (frozenset({"shaper", "shaper_rules", *_BY_HOST}), _shaper_names),
    (frozenset({"hosts", "auth_method", "auth_scram", "disable_sasl_mechanisms", *_BY_HOST}), _mechanisms),
    (frozenset({"database", "data_dir"}), _database),
)


def contradictions(config: Schema, *, broken: set[str]) -> list[Problem]:
    """Every contradiction between options, apart from those that touch an option known to be broken."""
    return [problem for needs, check in CHECKS if not needs & broken for problem in check(config)]
