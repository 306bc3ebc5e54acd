"""The one door for plug-ins.

A module is a page: a docstring, a frozen `Config` dataclass, one subclass of `Module` whose decorated methods are
hooks, IQ handlers and admin commands, and the tables it needs. It declares; the loader registers and, on unload,
unregisters.

    class Pong(Module[Config]):
        xeps = {199: "2.0"}
        features = ("urn:xmpp:ping",)

        @iq("get", "urn:xmpp:ping", "ping", at="both")
        def ping(self, request: IqRequest) -> None:
            return None  # an empty result
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Protocol, TypeVar

from xmppd.access import Access, AccessRules
from xmppd.admin.registry import Arg, command
from xmppd.admin.results import List, Rescode, Tuple, integer, string
from xmppd.chores import Chores, KeptMessage
from xmppd.cluster.tables import Owner
from xmppd.config.types import Duration, OptionalRate, Rate, Size, between, lasting, several, sized
from xmppd.delivery import ERROR, SAFE, Outcome, Pending, as_stanza_error
from xmppd.errors import CommandError, JidError
from xmppd.events import Handled, Session
from xmppd.housekeeping import Delete
from xmppd.iq import NO_REPLY, IqRequest, NoReply
from xmppd.nodes import Nodes
from xmppd.outbox import (
    DONE,
    PROFILES,
    XML_LANG,
    About,
    Answer,
    Event,
    FileSink,
    Form,
    HttpSink,
    HttpTarget,
    Outbox,
    Posted,
    Profile,
    TableSink,
    conversation,
    hidden,
    json_object,
    posted,
    repetition,
    text_of,
    timestamp,
    ulid,
    wrong_with,
)
from xmppd.outbox import Message as PostedMessage
from xmppd.protocol.jid import JID, make
from xmppd.protocol.stanza import Stanza
from xmppd.session_manager import Resource
from xmppd.spool import FreedRow, Holder, Kept, NoAccount, NotToTell, QuotaReached, SpoolRow, Standing
from xmppd.storage import Storage
from xmppd.storage.ids import new_id
from xmppd.storage.sql import User, by_host, insert_new, read_per_user, upsert, write_per_user
from xmppd.storage.tables import (
    BARE_BYTES,
    FULL_BYTES,
    PART_BYTES,
    Stamp,
    Utf8,
    fixed_bytes,
    host_column,
    key_hash,
    long_bytes,
    long_text,
    module_table,
    user_column,
)

if TYPE_CHECKING:
    from sqlalchemy import Table

    from xmppd.log import Logger
    from xmppd.spool import Spool

__all__ = [
    "BARE_BYTES",
    "DONE",
    "ERROR",
    "FULL_BYTES",
    "NO_REPLY",
    "PART_BYTES",
    "PROFILES",
    "SAFE",
    "XML_LANG",
    "About",
    "Access",
    "AccessRules",
    "Answer",
    "Arg",
    "BlockingService",
    "Blocklist",
    "Chores",
    "Contact",
    "DiscoInfo",
    "DiscoService",
    "Duration",
    "Event",
    "FileSink",
    "Form",
    "FreedRow",
    "Holder",
    "HttpSink",
    "HttpTarget",
    "IqRequest",
    "Kept",
    "KeptMessage",
    "List",
    "Module",
    "NoAccount",
    "NoReply",
    "Nodes",
    "NotToTell",
    "OptionalRate",
    "Outbox",
    "Outcome",
    "Owner",
    "Pending",
    "Posted",
    "PostedMessage",
    "Profile",
    "QuotaReached",
    "Rate",
    "Rescode",
    "Resource",
    "RosterService",
    "Routing",
    "ServerInfo",
    "Session",
    "Sessions",
    "Size",
    "SpoolRow",
    "Stamp",
    "Standing",
    "Storage",
    "TableSink",
    "Tuple",
    "User",
    "Utf8",
    "as_stanza_error",
    "between",
    "by_host",
    "command",
    "conversation",
    "fixed_bytes",
    "from_node",
    "hidden",
    "hook",
    "host_column",
    "insert_new",
    "integer",
    "iq",
    "json_object",
    "key_hash",
    "lasting",
    "long_bytes",
    "long_text",
    "module_table",
    "new_id",
    "posted",
    "read_per_user",
    "repetition",
    "several",
    "sized",
    "string",
    "text_of",
    "timestamp",
    "ulid",
    "upsert",
    "user_column",
    "write_per_user",
    "wrong_with",
]

C = TypeVar("C")
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class HookMark:
    event: type
    after: tuple[str, ...]
    optional: bool
    switched: bool


@dataclass(frozen=True, slots=True)
class IqMark:
    type: Literal["get", "set"]
    namespace: str
    name: str
    targets: tuple[Literal["account", "host"], ...]
    anonymous: bool


@dataclass(frozen=True, slots=True)
class NodeMark:
    topic: str


def hook(event: type, *, after: Sequence[str] = (), optional: bool = False, switched: bool = False) -> Callable[[F], F]:
    """Mark a method as a handler of an event (xmppd/events.py), behind those of the modules named in `after`.

    optional: when the handler of an `-ing` event crashes, the stanza goes on (it fails closed otherwise).
    switched: it listens only while the module wants it to (`Module.switch`), for events of every stanza."""

    def mark(function: F) -> F:
        marks = function.__dict__.setdefault("_xmppd_hooks", [])
        marks.append(HookMark(event, tuple(after), optional, switched))
        return function

    return mark


def iq(
    type: Literal["get", "set"],
    namespace: str,
    name: str = "",
    *,
    at: Literal["account", "host", "both"] = "account",
    anonymous: bool = False,
) -> Callable[[F], F]:
    """Mark a method as the handler of IQ requests with that payload, sent to accounts (a bare JID, or no `to`), to the
    hosts themselves, or both. It takes an IqRequest and returns the payload of the result (bytes or an element), None
    for an empty one, a whole Stanza, or NO_REPLY; StanzaError becomes the error. A coroutine holds the stream back.

    anonymous: a set that anonymous accounts may make too, because it is forgotten with their session."""
    targets: tuple[Literal["account", "host"], ...] = ("account", "host") if at == "both" else (at,)

    def mark(function: F) -> F:
        marks = function.__dict__.setdefault("_xmppd_iqs", [])
        marks.append(IqMark(type, namespace, name, targets, anonymous))
        return function

    return mark


def from_node(topic: str) -> Callable[[F], F]:
    """Mark a method as the one that hears what the same module says on another node (`self.nodes.cast`), or answers
    what it asks (`self.nodes.call`). It takes the node's UUID and the payload, and returns the answer, which is JSON,
    or an awaitable of it. A plain function hears casts in the order in which they were made."""

    def mark(function: F) -> F:
        function.__dict__.setdefault("_xmppd_nodes", []).append(NodeMark(topic))
        return function

    return mark


# -- what a module gets


class Sessions(Protocol):
    """The session manager as a module sees it."""

    def sessions(self, user: JID) -> Sequence[Session]:
        """The live sessions of a bare JID on this node."""
        ...

    def resources(self, user: JID) -> Sequence[Resource]:
        """What a bare JID has bound, on whatever node."""
        ...

    def local(self) -> Iterable[Session]:
        """Every live session of this node, of which there may be many: for background work, in pieces."""
        ...

    def is_available(self, user: JID) -> bool:
        """Whether a session takes messages (priority not negative), on whatever node."""
        ...

    def is_anonymous(self, user: JID) -> bool:
        """Whether the account ends with its session (SASL ANONYMOUS): write nothing about it."""
        ...

    def multicast(self, stanza: Stanza, users: Iterable[JID], *, only: bytes | None = None) -> None:
        """One presence without `to` for every available resource of many users of our hosts, on whatever node or only
        on that other one."""
        ...

    def spread(self, stanza: Stanza, users: Iterable[JID]) -> None:
        """The same for the resources that they have on this node."""
        ...

    def on_node(self, node: bytes) -> Iterable[Resource]:
        """What is bound on another node, of which there may be much: read it in pieces."""
        ...

    def hold_messages(self, user: JID, until: "asyncio.Future[None]") -> None:
        """Have messages for a user that are routed on this node wait, each with its stream, until that is done."""
        ...

    def hold_arrivals(self, node: bytes, until: "asyncio.Future[None]") -> None:
        """Have messages that come from another node wait until that is done."""
        ...

    def count(self, host: str | None = None) -> int: ...


class Routing(Protocol):
    """The `routing:` section of the configuration."""

    @property
    def profile(self) -> str:
        """compat or rfc6121."""
        ...

    @property
    def iq_needs_presence(self) -> bool: ...

    @property
    def presence_coalesce(self) -> float:
        """Seconds."""
        ...


class ServerInfo(Protocol):
    """What a module may know about the server."""

    version: str

    @property
    def started_at(self) -> float:
        """By the clock that modules are given."""
        ...

    @property
    def node(self) -> str:
        """The name of this node, a label."""
        ...

    @property
    def hosts(self) -> tuple[str, ...]: ...

    @property
    def routing(self) -> Routing: ...

    def features(self) -> list[str]:
        """Service discovery features that the loaded modules declare, sorted."""
        ...

    def account_features(self) -> list[str]: ...

    def loaded(self, module: str) -> bool: ...


class AccountsInfo(Protocol):
    """Accounts as a module sees them; passwords go in, never out. Raise StorageUnavailable."""

    async def exists(self, host: str, username: str) -> bool: ...

    async def names(self, host: str, *, limit: int, after: str | None) -> list[str]:
        """User names in the order of their bytes, in pages; `after` the last one of the page before."""
        ...

    async def register(self, host: str, username: str, password: str) -> bool: ...

    async def set_password(self, host: str, username: str, password: str) -> bool: ...

    async def remove(self, host: str, username: str, *, removed: Callable[[], None] | None = None) -> bool:
        """False when there is no such account. `removed` is called when it is gone and before its sessions end."""
        ...


@dataclass(slots=True)
class Context:
    """Everything the loader hands to a module."""

    name: str
    owner: Owner
    storage: Storage
    spool: "Spool"
    sessions: Sessions
    accounts: AccountsInfo
    access: Access
    server: ServerInfo
    log: "Logger"
    clock: Callable[[], float]
    route: Callable[[Stanza], Outcome]
    spawn: Callable[..., object]
    service: Callable[[type], Any]
    nodes: Nodes = field(default_factory=lambda: Nodes(""))  # alone
    outbox: Outbox | None = None
    # The loader puts in its own:
    switch: Callable[[type, bool], None] = lambda event, on: None
    retention: Callable[[str, Callable[[], float], Delete], None] = lambda name, older_than, delete: None
    notify: Callable[[object], Awaitable[None] | None] = lambda event: None
    decide: Callable[[Any], Any] = lambda event: event


class Module(Generic[C]):
    """Base of every plug-in. Class attributes declare; override `start` and `stop` only when there is more to do."""

    xeps: ClassVar[Mapping[int, str]] = {}  # number -> version implemented
    features: ClassVar[tuple[str, ...]] = ()  # service discovery, of the hosts
    account_features: ClassVar[tuple[str, ...]] = ()  # service discovery, of accounts
    requires: ClassVar[tuple[str, ...]] = ()  # modules that must be loaded too, before this one
    provides: ClassVar[tuple[type, ...]] = ()  # service protocols (below) that this module fulfils
    tables: "ClassVar[tuple[Table, ...]]" = ()

    def __init__(self, context: Context, config: C) -> None:
        self.config = config
        self.name = context.name
        self.owner = context.owner
        self.storage = context.storage
        self.spool = context.spool
        self.sessions = context.sessions
        self.nodes = context.nodes
        self.accounts = context.accounts
        self.access = context.access
        self.server = context.server
        self.log = context.log
        self.clock = context.clock
        self._context = context
        self.table = SimpleNamespace(**{table.name: table for table in self.tables})

    @classmethod
    def check_options(cls, config: C, access: AccessRules) -> Iterable[str]:
        """What is wrong with options in a way their types cannot know, such as rules that do not exist: lines like
        `access: there is no access rule 'x'`. Asked before anything starts, or stops for a reload."""
        return ()

    async def start(self) -> None:
        """Called after its hooks are registered and before it is used by others."""

    async def stop(self) -> None:
        """Called at unload, after its hooks, handlers, commands and tasks are gone."""

    def route(self, stanza: Stanza) -> Outcome:
        """Send a stanza of the server's own making on its way."""
        return self._context.route(stanza)

    @property
    def outbox(self) -> Outbox:
        """Durable events for web servers."""
        assert self._context.outbox is not None
        return self._context.outbox

    def spawn(self, coroutine: Coroutine[Any, Any, None], *, name: str) -> None:
        """Run a task that ends with the module; a crash is logged."""
        self._context.spawn(coroutine, name=name)

    def switch(self, event: type, on: bool) -> None:
        """Let the module's `switched` handlers of an event listen, or not."""
        self._context.switch(event, on)

    def retention(self, name: str, older_than: float, delete: Delete) -> None:
        """Have rows of the module deleted that are older than so many seconds; 0: none. To be said in `start`.

        `await delete(before, limit)` deletes at most `limit` rows from before that time (seconds since 1970), and says
        how many it was: fewer than `limit` when no more are left. It is called now and then, again and again until that
        is so, on one node of the cluster at a time, and may be broken off between two calls."""
        self._context.retention(name, lambda: older_than, delete)

    def own_host(self, name: str) -> str:
        """One of our hosts, as an operator has written it; CommandError when it is none."""
        try:
            host = make("", name).full
        except JidError as exc:
            raise CommandError(str(exc)) from exc
        if host not in self.server.hosts:
            raise CommandError(f"unknown host: {name}")
        return host

    def tell_at_once(self, event: object) -> None:
        """Tell those who watch an event by plain functions; a coroutine among them is a mistake (TypeError)."""
        if self._context.notify(event) is not None:
            raise TypeError(f"handlers of {type(event).__name__} are plain functions")

    async def tell(self, event: object) -> None:
        """Tell whoever watches an event that this module has made happen."""
        waiting = self._context.notify(event)
        if waiting is not None:
            await waiting

    async def ask(self, event: T) -> T | Handled:
        """Ask the other modules about what this one is about to do. Raises StanzaError."""
        decision: Any = self._context.decide(event)
        if isinstance(decision, Awaitable):
            decision = await decision
        decided: T | Handled = decision
        return decided

    def service(self, protocol: type[T]) -> T:
        """The loaded module that provides a service; LookupError when none does."""
        found: T = self._context.service(protocol)
        return found

    async def sees_presence(self, asker: JID, user: JID) -> bool:
        """Whether `asker` is the user, or gets the user's presence (subscription from or both); StorageUnavailable."""
        if asker.bare == user.bare:
            return True
        try:
            roster = self.service(RosterService)  # type: ignore[type-abstract]
        except LookupError:
            return False
        contacts = roster.cached(user)
        if contacts is None:
            contacts = await roster.contacts(user)
        contact = contacts.get(asker.bare)
        return contact is not None and contact.sees_user


# -- services that modules offer each other


@dataclass(frozen=True, slots=True)
class Contact:
    """One roster item (RFC 6121 2.1). `ask` is none, in, out or both: pending requests as in requirements 3.6."""

    jid: JID
    subscription: str  # none, to, from, both
    ask: str
    name: str
    groups: tuple[str, ...]
    approved: bool = False

    @property
    def sees_user(self) -> bool:
        """Whether the contact gets the user's presence."""
        return self.subscription in ("from", "both")

    @property
    def is_seen(self) -> bool:
        """Whether the user gets the contact's presence."""
        return self.subscription in ("to", "both")


class RosterService(Protocol):
    """Who knows a user's contacts: the roster module."""

    def cached(self, user: JID) -> Mapping[str, Contact] | None:
        """The roster by contact JID (as text) while the user has a session here, without waiting."""
        ...

    async def contacts(self, user: JID) -> Mapping[str, Contact]:
        """The roster of any account; StorageUnavailable."""
        ...


class Blocklist(Protocol):
    """Whom a user has blocked (XEP-0191); false when that is nobody."""

    def blocks(self, other: JID) -> bool: ...

    def __bool__(self) -> bool: ...


class BlockingService(Protocol):
    """Who knows whom users have blocked: the blocking module."""

    def cached(self, user: JID) -> Blocklist | None:
        """While the user has a session here, without waiting; None when it is not known: then ask `blocklist`."""
        ...

    async def blocklist(self, user: JID) -> Blocklist:
        """Of any account; StorageUnavailable."""
        ...


@dataclass(frozen=True, slots=True)
class DiscoInfo:
    """What service discovery says about an entity (XEP-0030 3.1, XEP-0128)."""

    identities: tuple[tuple[str, str, str], ...]  # category, type, name
    features: tuple[str, ...]
    forms: tuple[
        tuple[str, tuple[tuple[str, tuple[str, ...]], ...]], ...
    ] = ()  # FORM_TYPE, its fields with their values


class DiscoService(Protocol):
    """Who answers for the hosts: the disco module."""

    def host_info(self) -> DiscoInfo: ...

    def info_xml(self, info: DiscoInfo, node: str = "") -> bytes:
        """The payload of an answer."""
        ...
