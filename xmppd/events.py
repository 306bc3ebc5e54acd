"""Everything a module can hook, in one catalogue.

The tense says what a handler may do. Past: it happened, watch. `-ing` or `-able`: it is about to happen; return None
(go on), a changed copy (`dataclasses.replace`), or HANDLED (taken over, stop), or raise StanzaError (the sender is
told). docs/hooks.md maps them to ejabberd's hook names.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

from xmppd.errors import StanzaError
from xmppd.protocol.jid import JID
from xmppd.protocol.stanza import Stanza

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable

    from lxml.etree import _Element


class Handled:
    """The type of HANDLED."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "HANDLED"


HANDLED: Final = Handled()


class Session(Protocol):
    """What a module sees of a client's session. It outlives its connection."""

    jid: JID  # full
    user: JID  # bare
    priority: int | None  # None until it is available
    presence: Stanza | None  # the last available presence it broadcast
    state: dict[str, object]  # a module keeps what it knows about this session under its own name
    anonymous: bool  # its account ends with it: write nothing about it

    def guard(self, module: str, on: bool) -> None:
        """Whether the module wants to see every stanza to and from this client (GuardedSending, GuardedDelivering)."""
        ...

    def send(self, stanza: Stanza) -> object:
        """Write a stanza to this session's client; what became of it comes back (delivery.Outcome)."""
        ...

    def hold_messages(self, until: "asyncio.Future[Any]") -> None:
        """Have messages for this session wait, in order, until that is done; what is given to `send` does not."""
        ...

    @property
    def holds_messages(self) -> bool:
        """Whether messages for it wait; of one that has left for another node: whether they did."""
        ...

    @property
    def aside(self) -> bool:
        """Whether it gets no stored messages for now: it has no stream, and its client may be on a node that is not
        seen. It gets them when it is resumed."""
        ...

    @property
    def idle_seconds(self) -> float:
        """How long nothing has come from its client."""
        ...

    def unreachable(self) -> None:
        """Its client does not answer: the stream ends with `connection-timeout` (RFC 6120 4.9.3.4)."""
        ...


class PendingOutcome(Protocol):
    """The outcome of a stanza that somebody still works on (delivery.Pending)."""

    def follow(self, other: Any) -> None:
        """Become what a future or another outcome becomes."""
        ...

    def decide(self) -> None: ...


# -- stanzas on their way


@dataclass(slots=True)
class StanzaSending:
    """A client's stanza, stamped with its full JID, is about to be routed; on the node of the sender's session.
    Unhandled: it goes to the router."""

    session: Session
    stanza: Stanza


@dataclass(slots=True)
class GuardedSending:
    """As StanzaSending, and before it, but only for sessions that a module guards (`session.guard`).
    Unhandled: StanzaSending is next."""

    session: Session
    stanza: Stanza


@dataclass(slots=True)
class StanzaRouting:
    """Any stanza, whoever sent it, is about to be routed by its destination; on the node where it is.
    Unhandled: it is routed."""

    stanza: Stanza


@dataclass(slots=True)
class StanzaDelivering:
    """A stanza is about to be written to a session; on the node that holds the session.
    Unhandled: it is written."""

    session: Session
    stanza: Stanza


@dataclass(slots=True)
class GuardedDelivering:
    """As StanzaDelivering, and before it, but only for sessions that a module guards (`session.guard`).
    Unhandled: StanzaDelivering is next."""

    session: Session
    stanza: Stanza


@dataclass(slots=True)
class RequestReceiving:
    """An IQ request of somebody else for an account of ours (its bare JID), which the server answers for the user.
    Unhandled: the handler of its payload does."""

    user: JID
    stanza: Stanza


@dataclass(slots=True)
class HostStanzaReceiving:
    """A message for one of our hosts itself, or any stanza for a resource of one (`HOST/announce/online`); on the node
    where it is. Unhandled: the sender gets `item-not-found`."""

    host: str
    stanza: Stanza


@dataclass(slots=True)
class MessageUndeliverable:
    """A chat or normal message for an existing account that no available session takes, on whatever node; on the
    sender's node, or on the one where its session was until a moment ago.
    Unhandled: the sender gets `service-unavailable`. A handler that takes it settles or follows with `outcome`."""

    user: JID
    message: Stanza
    outcome: PendingOutcome


@dataclass(slots=True)
class MessageSpooling:
    """The client of a session has not acknowledged a message for a while, or has no stream, or has gone: the message is
    about to be written to the spool, after which its sender need not keep it; on the node of the session. The one plain
    function that decides what may be kept says so in `keep`. Unhandled: it is not written, and its sender is not told
    before its recipient's client has acknowledged it."""

    user: JID  # bare: whose session it is
    message: Stanza
    keep: bool | None = None
    stanza: bytes = b""  # what is kept
    dedup: bytes | None = None  # the same for a repetition; None: it has none
    expires_at: float | None = None  # seconds since 1970


@dataclass(frozen=True, slots=True)
class MessagesFreeing:
    """A session has ended whose client had not acknowledged messages that are in the spool: when `done` is, they are
    offline messages; on its node. Or a resource was bound that another node had a session of: when `done` is, that node
    has given up what it had; on the new node."""

    user: JID  # bare
    done: "asyncio.Future[None]"


@dataclass(frozen=True, slots=True)
class MessagesFound:
    """Offline messages wait in the spool for a user who has a session here, as a look at the database once a second
    shows: another node stored them while it did not know, or took them from a node that died; on every node with such a
    session, and more than once for the same messages. After a split, when somebody logs in, also for users who have
    none here."""

    user: JID  # bare


@dataclass(slots=True)
class MessageStoring:
    """A message is about to be stored for a user who is absent; on the node where that is done. Handlers are plain
    functions and append to `rows` what commits with it, or not at all: (kind, item) as for `Batcher.submit_unit`, from
    `outbox.row` for example. Unhandled: it is stored."""

    user: JID
    message: Stanza
    rows: list[tuple[str, Any]] = field(default_factory=list)
    expires_at: float | None = None  # seconds since 1970
    replayed: bool = False  # it has been an offline message before


@dataclass(frozen=True, slots=True)
class MessageStored:
    """A message for a user who is absent is committed to the database, or is there already (`repeated`: sent again); on
    the node that stored it. Handlers are plain functions."""

    user: JID
    message: Stanza
    repeated: bool
    replayed: bool = False  # it has been an offline message before


@dataclass(frozen=True, slots=True)
class MessagesFreed:
    """Messages that sessions of a user had held are offline messages now, which is committed, or somebody else has
    taken them already; on the node that freed them. Handlers are plain functions."""

    user: JID


@dataclass(frozen=True, slots=True)
class MessagesTakenOver:
    """What a node had held that has died is offline messages now, which is committed; on the node that did it."""

    count: int


@dataclass(frozen=True, slots=True)
class MessagesRemoved:
    """A user has removed offline messages without being sent them; on the node of the request. Handlers are plain
    functions."""

    user: JID
    messages: tuple[Stanza, ...] | None  # None: all of them


@dataclass(frozen=True, slots=True)
class MessageAccepted:
    """A message that a client has sent is safe: a recipient has it, or it is in the database; on the node of the
    sender's session. Handlers are plain functions."""

    session: Session
    message: Stanza


@dataclass(frozen=True, slots=True)
class MessageSent:
    """A message was written to the stream of a session, whoever wrote it; again where a stream is resumed. On the node
    of the session. Handlers are plain functions."""

    session: Session
    message: Stanza


@dataclass(frozen=True, slots=True)
class MessagesAcknowledged:
    """A client has acknowledged messages (XEP-0198); on the node of its session. Handlers are plain functions."""

    session: Session
    messages: "Iterable[Stanza]"


@dataclass(frozen=True, slots=True)
class StanzaBounced:
    """The sender of a stanza is told that it could not be delivered; on the node that decided that. Not told of what is
    refused before it is routed. Handlers are plain functions."""

    stanza: Stanza
    error: StanzaError


# -- presence and subscriptions


@dataclass(slots=True)
class PresenceSending:
    """A session changes its own presence (available or unavailable, no `to`); on its node, before anything changed.
    Unhandled: its row in the presence table changes and nobody is told."""

    session: Session
    presence: Stanza


@dataclass(frozen=True, slots=True)
class PresenceChanged:
    """A session's own available presence took effect: `session.presence` and its row have changed; on its node, before
    SessionBecameAvailable. The stream waits for the handlers."""

    session: Session
    presence: Stanza
    previous: Stanza | None  # what it replaced; None when the session was not available


@dataclass(slots=True)
class DirectedPresenceSending:
    """A client sends available or unavailable presence to somebody; on its node. Unhandled: it is routed."""

    session: Session
    presence: Stanza


@dataclass(slots=True)
class SubscriptionSending:
    """A client sends subscribe, subscribed, unsubscribe or unsubscribed (RFC 6121 3); on its node, `from` already
    bare. Unhandled: it is routed, and no roster changes."""

    session: Session
    stanza: Stanza


@dataclass(slots=True)
class SubscriptionReceiving:
    """The same four, arriving for an account of ours; on the node where the stanza is. Unhandled: silence."""

    user: JID
    stanza: Stanza


@dataclass(slots=True)
class ProbeReceiving:
    """A presence probe for an account of ours (RFC 6121 4.3). Unhandled: silence."""

    user: JID
    stanza: Stanza


@dataclass(frozen=True, slots=True)
class PresenceBounced:
    """A presence of type error has come for an address of one of our hosts, and is about to be delivered; on the node
    where it came in, and on those of the sessions that get it."""

    to: JID
    error: Stanza


# -- sessions


@dataclass(frozen=True, slots=True)
class SessionBound:
    """A resource was bound; on its node, before the client is told."""

    session: Session


@dataclass(frozen=True, slots=True)
class SessionBecameAvailable:
    """A session sent its first available presence, or raised its priority from negative; on its node, after its row
    changed. The stream waits for the handlers, so what they send comes before live messages."""

    session: Session
    priority: int
    old_priority: int | None


@dataclass(frozen=True, slots=True)
class SessionBecameUnavailable:
    """A session that was available sent unavailable presence or ended; on its node, after its row changed."""

    session: Session
    presence: Stanza


@dataclass(frozen=True, slots=True)
class SessionAppeared:
    """A session on another node is available now, or its priority is no longer negative; on every node but its own,
    when the table here shows it. A whole node's sessions come one after the other: return soon."""

    user: JID
    node: bytes  # the UUID of the node it is on


@dataclass(frozen=True, slots=True)
class LostSession:
    """One of SessionsLost."""

    jid: JID  # full
    guarded: bool  # not everybody may have seen it (`Session.guard`)


@dataclass(frozen=True, slots=True)
class SessionsLost:
    """Available sessions of another node have gone and nobody there says so: the node died or was cut off, or its table
    was repaired; on every node, each for itself. They may be many: read them in pieces, at any later time; a full JID
    that is available again by then is not among them."""

    node: bytes  # the UUID of the node they were on
    sessions: "Iterable[LostSession]"


@dataclass(frozen=True, slots=True)
class DirectedPresenceArrived:
    """An available or unavailable presence for one user, or one resource, has come from another node: directed
    presence, or the answer to a probe; on this node, before it is delivered."""

    presence: Stanza


@dataclass(frozen=True, slots=True)
class SessionClosed:
    """A session has ended and its row is gone; on its node. `last` says that it was the user's last one in the
    cluster."""

    session: Session
    last: bool


@dataclass(frozen=True, slots=True)
class _Luggage:
    session: Session
    luggage: dict[str, Any]  # by the modules' names: JSON


@dataclass(frozen=True, slots=True)
class SessionLeft(_Luggage):
    """A session goes on on another node, where its stream was resumed; on the node where it was. It is not closed and
    nobody is told of an end. A module puts what it needs there into `luggage`, under its own name, as JSON."""


@dataclass(frozen=True, slots=True)
class SessionArrived(_Luggage):
    """A session has come from another node, and is available if it was there; on its new node. It was not bound and did
    not become available: modules take up what they had put into `luggage`."""


# -- blocking


@dataclass(frozen=True, slots=True)
class AddressesBlocked:
    """A user has blocked addresses (XEP-0191), which is in force; each a user, a resource or a whole domain."""

    user: JID
    addresses: tuple[JID, ...]


@dataclass(frozen=True, slots=True)
class AddressesUnblocked:
    """A user has unblocked addresses, which is in force."""

    user: JID
    addresses: tuple[JID, ...]


# -- service discovery


@dataclass(slots=True)
class DiscoNodeAsking:
    """A node was asked for in the service discovery of a host or an account (XEP-0030 3.2). Whoever has it puts the
    payload of the answer into `answer` and returns HANDLED. Unhandled: `item-not-found`."""

    asker: JID
    target: JID  # the host, or the account
    kind: str  # info or items
    node: str
    answer: bytes = b""


# -- accounts


@dataclass(frozen=True, slots=True)
class UserRegistered:
    """An account was made."""

    user: JID


@dataclass(frozen=True, slots=True)
class UserDeleted:
    """An account was removed and its sessions were ended; on the node where that was done, once in the cluster. Modules
    remove what they keep about it."""

    user: JID


@dataclass(frozen=True, slots=True)
class UserForgotten:
    """An account was removed on another node: modules drop what they remember about it on this one. What is kept in the
    database is the business of UserDeleted."""

    user: JID


@dataclass(slots=True)
class UserExporting:
    """What there is of an account is about to be written into a file (XEP-0227); on the node that writes it. A module
    appends what it keeps to `parts`, one element each, as the XEP has it, with its namespaces. StanzaError and
    StorageError say that something is missing, which is reported. Nobody handles it: the account goes alone."""

    user: JID
    parts: list[bytes] = field(default_factory=list)


@dataclass(slots=True)
class UserImporting:
    """An element of an account in such a file is about to be taken up; the account exists; on the node that reads it.
    The module it belongs to stores it so that doing it again changes nothing, and returns HANDLED when that is
    committed; `count` says how many things were new, `problems` what was left out. StanzaError and StorageError refuse
    all of it, and are reported, too. Unhandled: the element is reported as unknown."""

    user: JID
    element: "_Element"
    count: int = 0
    problems: list[str] = field(default_factory=list)


# -- streams


@dataclass(slots=True)
class FeaturesOffering:
    """The stream features of a client stream are about to be sent; append neutral XML to `features`."""

    host: str
    authenticated: bool
    encrypted: bool
    features: list[bytes] = field(default_factory=list)


@dataclass(slots=True)
class UnauthenticatedIq:
    """An IQ request on a client stream that has not authenticated (registration, XEP-0077).
    Unhandled: the stream ends with `not-authorized`."""

    host: str
    address: str
    encrypted: bool
    stanza: Stanza
    reply: "Callable[[Stanza], None]"


# -- the cluster


@dataclass(frozen=True, slots=True)
class NodeUp:
    """Another member of the cluster is up, seen from here; its rows of the shared tables follow. On every node."""

    name: str  # xmppd@node02: a label
    node: bytes  # the node's UUID, 16 bytes


@dataclass(frozen=True, slots=True)
class NodeDown:
    """Another member is no longer up, seen from here: it stopped, died or was cut off; its rows have gone. Once for
    each NodeUp. On every node."""

    name: str
    node: bytes
    reason: str  # for people


@dataclass(frozen=True, slots=True)
class NodeSynced:
    """Another member and this node have each other's rows of the shared tables: what either of them missed while they
    did not see each other can be made up for. After each NodeUp, and again after a repair. On every node."""

    name: str
    node: bytes


# -- the server


@dataclass(frozen=True, slots=True)
class ConfigReloaded:
    """A new configuration took effect."""


@dataclass(frozen=True, slots=True)
class ServerStarted:
    """All listeners are open."""
