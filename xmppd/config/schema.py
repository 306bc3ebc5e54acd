"""Every option of xmppd.yml: name, type, default and bounds. What each is for stands in docs/configuration.md.

The models are frozen values; attribute names are the options' names. Checks that need more than one option are in
checks.py, the reading of files and the wording of faults in files of their own.
"""

import re
from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Final, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    SerializerFunctionWrapHandler,
    WrapSerializer,
    model_serializer,
)

from xmppd.errors import JidError
from xmppd.protocol.jid import make

from .api import ApiPermission, ObserverName, TokenHash, TokenName
from .hosts import normalise_host
from .includes import Include, parse_includes
from .rules import AccessRules, ShaperRules
from .types import (
    Duration,
    HostPort,
    IpAddress,
    Network,
    OptionalRate,
    Port,
    Rate,
    Size,
    between,
    lasting,
    several,
    sized,
)

LogLevel = Literal["none", "emergency", "alert", "critical", "error", "warning", "notice", "info", "debug"]
LogFormat = Literal["text", "json"]
AuthMethod = Literal["sql", "anonymous"]
ResourceConflict = Literal["acceptnew", "setresource", "closeold", "closenew"]
ScramHash = Literal["sha1", "sha256", "sha512"]

SCRAM_MECHANISMS: Final[dict[str, str]] = {"sha1": "SCRAM-SHA-1", "sha256": "SCRAM-SHA-256", "sha512": "SCRAM-SHA-512"}
MECHANISMS: Final = (
    *(name + plus for name in SCRAM_MECHANISMS.values() for plus in ("", "-PLUS")),
    *("PLAIN", "ANONYMOUS", "EXTERNAL", "DIGEST-MD5", "X-OAUTH2"),  # the last two: ejabberd's files name them
)

# Validated, but nothing acts on them yet. `listen[]` stands for each listener; a name covers what is below it.
NO_EFFECT_YET: Final = ("database.read",)


def _freeze(value: Mapping[str, Any]) -> Mapping[str, Any]:
    return MappingProxyType(dict(value))


frozen: Final = AfterValidator(_freeze)


def _thaw(value: Mapping[str, Any], handler: SerializerFunctionWrapHandler) -> Any:
    return handler(dict(value))


as_dict: Final = WrapSerializer(_thaw)


def _absolute(value: object) -> Path:
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise ValueError("expected a path")
    try:
        return Path(value).expanduser().absolute()
    except RuntimeError as exc:  # ~nobody
        raise ValueError(f"expected a path: {exc}") from None


def _node_name(value: object) -> str:
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_-]{1,64}@[A-Za-z0-9._-]{1,253}", value, re.ASCII):
        return value
    raise ValueError("expected a node name such as xmppd@node01")


def _mechanism(value: object) -> str:
    from .problems import suggest

    name = value.upper() if isinstance(value, str) else ""
    if name not in MECHANISMS:
        raise ValueError(f"{str(value)[:40]!r} is no SASL mechanism.{suggest(name, MECHANISMS)}")
    return name


def _database_url(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("expected a URL such as mysql://user:password@host/database")
    try:
        parts = urlsplit(value)
        valid_port = parts.port != 0
    except ValueError:
        words = "the host or the port of this URL is not valid (in a password / is written %2F, @ is %40)"
        raise ValueError(words) from None
    if parts.scheme == "sqlite":
        if parts.netloc or not parts.path.strip("/") or ":memory:" in value:
            raise ValueError("expected a file: sqlite:///{data_dir}/xmppd.db")
    elif parts.scheme not in ("mysql", "mariadb"):
        raise ValueError("expected a URL that starts with sqlite:// or mysql://")
    elif not (parts.hostname or "unix_socket=" in parts.query) or not parts.path.strip("/") or not valid_port:
        raise ValueError("expected mysql://user:password@host[:port]/database")
    return value


def _regexp(value: object) -> str:
    try:
        if not isinstance(value, str):
            raise ValueError("expected a regular expression")
        re.compile(value)
    except re.error as exc:
        raise ValueError(f"{str(value)[:60]!r} is no regular expression: {exc}") from None
    return value


def _acl_user(value: object) -> str:
    """A bare JID or a user name, as the addresses of stanzas are prepared."""
    if isinstance(value, str) and re.fullmatch(r"[^@/\s]+(@[^@/\s]+)?", value):
        name, at, host = value.partition("@")
        try:
            user = make(name, host or "localhost")
        except JidError as exc:
            raise ValueError(f"expected a user such as admin@example.net: {exc}") from None
        return user.bare if at else user.local
    raise ValueError("expected a user such as admin@example.net")


def _acl_server(value: object) -> str:
    """A domain as the addresses of stanzas are prepared; any domain, not only ours."""
    try:
        if isinstance(value, str):
            return make("", value).domain
    except JidError:
        pass
    raise ValueError("expected a domain such as example.net")


AbsolutePath = Annotated[Path, PlainValidator(_absolute), PlainSerializer(str, when_used="json")]
NodeName = Annotated[str, PlainValidator(_node_name)]
Host = Annotated[str, PlainValidator(normalise_host)]
Mechanism = Annotated[str, PlainValidator(_mechanism)]
DatabaseUrl = Annotated[str, PlainValidator(_database_url)]
Regexp = Annotated[str, PlainValidator(_regexp)]
AclUser = Annotated[str, PlainValidator(_acl_user)]
AclServer = Annotated[str, PlainValidator(_acl_server)]
Word = Annotated[str, Field(min_length=1)]
Texts = Annotated[tuple[Word, ...], several]
Regexps = Annotated[tuple[Regexp, ...], several]
Networks = Annotated[tuple[Network, ...], several]


Includes = Annotated[
    tuple[Include, ...],
    PlainValidator(parse_includes),
    PlainSerializer(lambda found: [include.as_data() for include in found], when_used="json"),
]


class Options(BaseModel):
    """Base of all groups of options."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class _Listener(Options):
    port: Port
    ip: IpAddress
    use_proxy_protocol: bool = False
    trusted_proxies: Networks = ()


class C2SListen(_Listener):
    """Clients connect here. With `tls` the first byte is TLS (XEP-0368); otherwise STARTTLS as the options say."""

    port: Port = 5222
    ip: IpAddress = "::"  # IPv4 too; the listener falls back to 0.0.0.0 where the machine has no IPv6
    module: Literal["c2s"]
    tls: bool = False
    starttls: bool = Field(default_factory=lambda data: not data.get("tls", False))
    starttls_required: bool = Field(default_factory=lambda data: bool(data.get("starttls", True)))
    max_stanza_size: Annotated[Size, sized(10_000, 8 << 20)] = 256 << 10  # RFC 6120 13.12: not below 10000 bytes
    pre_auth_max_stanza_size: Annotated[Size, sized(1 << 10, 8 << 20)] = 16 << 10
    max_elements: Annotated[int, between(16, 1_000_000)] = 10_000
    pre_auth_max_elements: Annotated[int, between(16, 1_000_000)] = 100
    max_depth: Annotated[int, between(4, 250)] = 64  # libxml2 gives up at 256
    max_novel_names: Annotated[int, between(16, 1_000_000)] = 1000
    negotiation_timeout: Annotated[Duration, lasting(0.1, 3600)] = 30.0
    idle_timeout: Duration = 0.0
    max_write_queue: Annotated[Size, sized(10_000, 1 << 30)] = 1 << 20
    send_timeout: Annotated[Duration, lasting(0.1, 3600)] = 30.0
    access: Word = "c2s"
    shaper: Word = "c2s_shaper"


class HttpListen(_Listener):
    """Health, metrics and the admin API; loopback unless told otherwise."""

    port: Port = 5280
    ip: IpAddress = "127.0.0.1"
    module: Literal["http"]
    tls: bool = False
    request_handlers: Annotated[
        Mapping[Annotated[str, Field(pattern=r"^/[!-~]*$")], Literal["live", "ready", "metrics", "api"]],
        frozen,
        as_dict,
    ] = Field(
        default_factory=lambda: _freeze({"/livez": "live", "/readyz": "ready", "/metrics": "metrics", "/api": "api"})
    )


Listen = Annotated[C2SListen | HttpListen, Field(discriminator="module")]


class AuthScram(Options):
    """Keys kept for each account and mechanisms offered for them."""

    hashes: Annotated[tuple[ScramHash, ...], several, Field(min_length=1)] = ("sha1", "sha256")
    iterations: Annotated[int, between(4096, 1_000_000)] = 4096  # RFC 5802 5.1: not below 4096


def _loopback() -> tuple[IPv4Network | IPv6Network, ...]:
    return (IPv4Network("127.0.0.0/8"), IPv6Network("::1/128"))


class LoginLimits(Options):
    """How often somebody may fail to log in before being told to wait."""

    per_address: OptionalRate = Rate(20, 60.0)
    per_account: OptionalRate = Rate(10, 60.0)
    exempt: Networks = Field(default_factory=_loopback)


class Pool(Options):
    """Connections to the database."""

    min: Annotated[int, between(0, 1000)] = 1
    max: Annotated[int, between(1, 1000)] = 8
    timeout: Annotated[Duration, lasting(0.1, 300)] = 5.0


class Database(Options):
    """Where accounts, rosters and messages are kept. The URL may hold a password, so it is not in `repr`."""

    url: DatabaseUrl = Field(default="sqlite:///{data_dir}/xmppd.db", repr=False)
    pool: Pool = Field(default_factory=Pool)
    read: Annotated[tuple[DatabaseUrl, ...], several] = Field(default=(), repr=False)
    commit_interval: Annotated[Duration, lasting(0, 1)] = 0.01


class Observer(Options):
    """A program that is no node: its secret is the first line of a file."""

    secret_file: Word
    may: Annotated[tuple[Literal["events", "tables", "api"], ...], several] = ("events", "tables")


class Observers(Options):
    """Programs that look at the cluster, and call commands, over NATS (docs/cluster-protocol.md)."""

    listen: HostPort | None = None
    certfile: Word | None = None
    users: Annotated[Mapping[ObserverName, Observer], frozen, as_dict] = Field(default_factory=lambda: _freeze({}))


class Cluster(Options):
    """How the nodes of a cluster find and watch each other."""

    listen: HostPort = "0.0.0.0:4369"
    advertise: HostPort | None = None
    hosts: Annotated[Mapping[str, Word], frozen, as_dict] = Field(default_factory=lambda: _freeze({}))
    peer_timeout: Annotated[Duration, lasting(1, 600)] = 6.0
    nats_url: Word | None = Field(default=None, repr=False)
    nats_server: Word | None = None
    observers: Observers = Field(default_factory=Observers)


class StreamManagement(Options):
    """XEP-0198: acknowledgements, and streams that go on after a lost connection."""

    max_ack_queue: Annotated[int, between(10, 1_000_000)] = 5000
    max_ack_queue_size: Annotated[Size, sized(64 << 10, 1 << 30)] = 2 << 20
    resume_timeout: Annotated[Duration, lasting(0, 86400)] = 300.0
    max_resume_timeout: Annotated[Duration, lasting(0, 86400)] = Field(
        default_factory=lambda data: data.get("resume_timeout", 0.0)
    )
    ack_timeout: Annotated[Duration, lasting(1, 3600)] = 60.0
    location: HostPort | None = None


class OutboxBatch(Options):
    """Several events in one request, for sinks that take them so."""

    max_events: Annotated[int, between(1, 10_000)] = 100
    max_ms: Annotated[int, between(0, 10_000)] = 20


class OutboxRetry(Options):
    """Waits that grow from `base` by `factor` up to `max`."""

    base: Annotated[Duration, lasting(0.01, 3600)] = 1.0
    factor: Annotated[float, Field(ge=1, le=10)] = 2.0
    max: Annotated[Duration, lasting(0.01, 86400)] = 900.0
    jitter: Literal["full", "none"] = "full"
    give_up_after: Annotated[Duration, lasting(1, 365 * 86400)] = 259200.0


class OutboxBreaker(Options):
    """A sink that is down is asked now and then."""

    open_after: Annotated[int, between(1, 1_000_000)] = 5
    probe_every: Annotated[Duration, lasting(0.01, 3600)] = 10.0


class OutboxMemory(Options):
    """Events of one sink in the memory of one node."""

    max_events: Annotated[int, between(10, 10_000_000)] = 10_000
    max_bytes: Annotated[Size, sized(1 << 20, 1 << 40)] = 64 << 20
    when_full: Literal["spill", "slow_sender", "drop_new", "drop_old"] = "spill"


class OutboxConcurrency(Options):
    """Requests under way to one sink; of one conversation it is always one at a time."""

    per_sink: Annotated[int, between(1, 1000)] = 8


class Outbox(Options):
    """Events for web servers, kept until they are taken."""

    durability: Literal["none", "async", "commit"] = "async"
    batch: OutboxBatch = Field(default_factory=OutboxBatch)
    retry: OutboxRetry = Field(default_factory=OutboxRetry)
    concurrency: OutboxConcurrency = Field(default_factory=OutboxConcurrency)
    breaker: OutboxBreaker = Field(default_factory=OutboxBreaker)
    memory: OutboxMemory = Field(default_factory=OutboxMemory)
    dead_letter: Literal["keep", "drop"] = "keep"


class Retention(Options):
    """How long rows are kept; 0: until somebody deletes them."""

    every: Annotated[Duration, lasting(1, 7 * 86400)] = 3600.0
    offline_messages: Annotated[Duration, lasting(0, 100 * 365 * 86400)] = 0.0
    dead_events: Annotated[Duration, lasting(0, 100 * 365 * 86400)] = 90 * 86400.0


class Routing(Options):
    """Where the RFC and ejabberd's habits differ."""

    profile: Literal["compat", "rfc6121"] = "compat"
    iq_needs_presence: bool = False
    presence_coalesce: Duration = 60.0


class Acl(Options):
    """Somebody matches when any of these does."""

    user: Annotated[tuple[AclUser, ...], several] = ()
    user_regexp: Regexps = ()
    user_glob: Texts = ()
    server: Annotated[tuple[AclServer, ...], several] = ()
    server_regexp: Regexps = ()
    server_glob: Texts = ()
    resource: Texts = ()
    resource_regexp: Regexps = ()
    resource_glob: Texts = ()
    ip: Networks = ()


class Shaper(Options):
    """How fast a stream may send: `rate` bytes a second, and `burst` bytes (default: one second's worth) at once."""

    rate: Annotated[Size, sized(1, 1 << 40)]
    burst: Annotated[Size, sized(1, 1 << 40)] = Field(default_factory=lambda data: data.get("rate", 1))


NamedAcls = Annotated[Mapping[str, Acl], frozen, as_dict]
NamedAccessRules = Annotated[Mapping[str, AccessRules], frozen, as_dict]
NamedShaperRules = Annotated[Mapping[str, ShaperRules], frozen, as_dict]


class AppendHostOptions(Options):
    """What may be added for one host. Only what the file says counts, hence `model_fields_set`."""

    certfiles: Annotated[tuple[AbsolutePath, ...], several] = ()
    auth_method: Annotated[tuple[AuthMethod, ...], several] = ()
    disable_sasl_mechanisms: Annotated[tuple[Mechanism, ...], several] = ()
    acl: NamedAcls = Field(default_factory=lambda: _freeze({}))
    access_rules: NamedAccessRules = Field(default_factory=lambda: _freeze({}))
    shaper_rules: NamedShaperRules = Field(default_factory=lambda: _freeze({}))

    @model_serializer(mode="wrap")
    def _only_what_was_said(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if name in self.model_fields_set}


class HostOptions(AppendHostOptions):
    """What may differ for one host."""

    auth_method: Annotated[tuple[AuthMethod, ...], several, Field(min_length=1)] = ("sql",)
    auth_scram: AuthScram = Field(default_factory=AuthScram)
    resource_conflict: ResourceConflict = "acceptnew"


class Schema(Options):
    """All options as they stand in the file."""

    MERGED: ClassVar[tuple[str, ...]] = ("acl", "access_rules", "shaper", "shaper_rules")

    node: NodeName = "xmppd@localhost"
    data_dir: AbsolutePath = Field(default_factory=lambda: _absolute("var"))
    hosts: tuple[Host, ...] = ("localhost",)
    loglevel: LogLevel = "info"
    log_file: AbsolutePath | None = None
    log_format: LogFormat = "text"
    log_burst_limit_count: Annotated[int, between(10, 1_000_000)] = 500
    log_burst_limit_window_time: Annotated[Duration, lasting(1, 86400)] = 60.0
    certfiles: Annotated[tuple[AbsolutePath, ...], several] = ()
    listen: tuple[Listen, ...] = Field(
        default_factory=lambda: (
            C2SListen(module="c2s"),
            C2SListen(module="c2s", port=5223, tls=True),
            HttpListen(module="http"),
        )
    )
    auth_method: Annotated[tuple[AuthMethod, ...], several, Field(min_length=1)] = ("sql",)
    auth_scram: AuthScram = Field(default_factory=AuthScram)
    disable_sasl_mechanisms: Annotated[tuple[Mechanism, ...], several] = ()
    login_limits: LoginLimits = Field(default_factory=LoginLimits)
    resource_conflict: ResourceConflict = "acceptnew"
    database: Database = Field(default_factory=Database)
    cluster: Cluster = Field(default_factory=Cluster)
    routing: Routing = Field(default_factory=Routing)
    outbox: Outbox = Field(default_factory=Outbox)
    retention: Retention = Field(default_factory=Retention)
    stream_management: StreamManagement = Field(default_factory=StreamManagement)
    acl: NamedAcls = Field(default_factory=lambda: _freeze({}))
    access_rules: NamedAccessRules = Field(default_factory=lambda: _freeze({}))
    shaper: Annotated[Mapping[str, Shaper], frozen, as_dict] = Field(default_factory=lambda: _freeze({}))
    shaper_rules: NamedShaperRules = Field(default_factory=lambda: _freeze({}))
    api_tokens: Annotated[Mapping[TokenName, TokenHash], frozen, as_dict] = Field(
        default_factory=lambda: _freeze({}), repr=False
    )
    api_permissions: Annotated[Mapping[str, ApiPermission], frozen, as_dict] = Field(
        default_factory=lambda: _freeze({})
    )
    host_config: Annotated[Mapping[Host, HostOptions], frozen, as_dict] = Field(default_factory=lambda: _freeze({}))
    append_host_config: Annotated[Mapping[Host, AppendHostOptions], frozen, as_dict] = Field(
        default_factory=lambda: _freeze({})
    )
    include_config_file: Includes = ()
    shutdown_grace: Annotated[Duration, lasting(0, 600)] = 5.0
    module_paths: Annotated[tuple[AbsolutePath, ...], several] = ()
    modules: Annotated[Mapping[str, Mapping[str, Any]], frozen, as_dict] = Field(
        default_factory=lambda: _freeze({}), repr=False
    )


# Names that are there even if the file does not define them; a file that defines one replaces that one.
DEFAULT_NAMES: Final[dict[str, dict[str, Any]]] = {
    "acl": {"admin": {}, "blocked": {}},
    "access_rules": {
        "announce": [{"allow": "admin"}],
        "c2s": [{"deny": "blocked"}, {"allow": "all"}],
        "max_user_sessions": [{"10": "all"}],
    },
    "shaper": {"normal": {"rate": "64KiB", "burst": "256KiB"}},
    "shaper_rules": {
        "c2s_shaper": [{"none": "admin"}, {"normal": "all"}],
        "max_user_offline_messages": [{"5000": "admin"}, {"100": "all"}],
    },
}
DEFAULT_MODULES: Final = (
    *("roster", "presence", "offline", "disco", "caps", "ping", "version", "time", "last", "private", "vcard"),
)
