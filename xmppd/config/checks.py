"""What no single option can know: names that must exist elsewhere, values that contradict each other."""

from collections.abc import Callable, Iterable, Iterator
from typing import Final

from .problems import key, suggest
from .rules import Rule
from .schema import SCRAM_MECHANISMS, C2SListen, Schema
from .types import format_size

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
        if listener.use_proxy_protocol and not listener.trusted_proxies:
            yield f"{at}.use_proxy_protocol", "needs trusted_proxies, the addresses of the proxies that may speak it"


def _unknown(kind: str, name: str, known: list[str]) -> str:
    return f"there is no {kind} {name!r}.{suggest(name, known)}"


def _listener_rules(config: Schema) -> Iterator[Problem]:
    access, shapers = ["all", "none", *config.access_rules], ["none", *config.shaper_rules]
    for index, listener in enumerate(config.listen):
        if isinstance(listener, C2SListen):
            if listener.access not in access:
                yield f"listen[{index}].access", _unknown("access rule", listener.access, access)
            if listener.shaper not in shapers:
                yield f"listen[{index}].shaper", _unknown("shaper rule", listener.shaper, shapers)


def _acl_names(config: Schema) -> Iterator[Problem]:
    known = ["all", "none", *config.acl]
    for group in ("access_rules", "shaper_rules"):
        rules: dict[str, tuple[Rule, ...]] = dict(getattr(config, group))
        for name, entries in rules.items():
            for index, rule in enumerate(entries):
                if rule.acl not in known:
                    yield f"{group}.{key(name)}[{index}]", _unknown("acl", rule.acl, known)


def _api_permissions(config: Schema) -> Iterator[Problem]:
    known = ["all", "none", "loopback", *config.acl]
    for name, permission in config.api_permissions.items():
        for acl in dict.fromkeys(acl for who in permission.who for acl in who.acl):
            if acl not in known:
                yield f"api_permissions.{key(name)}.who", _unknown("acl", acl, known)


def _shaper_names(config: Schema) -> Iterator[Problem]:
    known = ["none", "infinity", *config.shaper]
    for name, entries in config.shaper_rules.items():
        for index, rule in enumerate(entries):
            if isinstance(rule.value, str) and rule.value not in known:
                yield f"shaper_rules.{key(name)}[{index}]", _unknown("shaper", rule.value, known)


def _mechanisms(config: Schema) -> Iterator[Problem]:
    if _locked_out(config.auth_method, config.auth_scram.hashes, set(config.disable_sasl_mechanisms)):
        yield "disable_sasl_mechanisms", "no mechanism is left with which anybody could log in"


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


# Each check with the top-level options it looks at: it is left out when one of those is already at fault.
CHECKS: Final[tuple[tuple[frozenset[str], Check], ...]] = (
    (frozenset({"hosts"}), _hosts),
    (frozenset({"listen"}), _ports),
    (frozenset({"listen"}), _c2s_listeners),
    (frozenset({"listen", "access_rules", "shaper_rules"}), _listener_rules),
    (frozenset({"acl", "access_rules", "shaper_rules"}), _acl_names),
    (frozenset({"acl", "api_permissions"}), _api_permissions),
    (frozenset({"shaper", "shaper_rules"}), _shaper_names),
    (frozenset({"auth_method", "auth_scram", "disable_sasl_mechanisms"}), _mechanisms),
    (frozenset({"database", "data_dir"}), _database),
)


def contradictions(config: Schema, *, broken: set[str]) -> list[Problem]:
    """Every contradiction between options, apart from those that touch an option known to be broken."""
    return [problem for needs, check in CHECKS if not needs & broken for problem in check(config)]
