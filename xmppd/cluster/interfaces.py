"""What the parts of the cluster layer are to each other, from the wire up.

    Transport   packets between nodes: at most once, one hop, may be lost or late   (engine.py)
    Links       frames between members: each once, in order, while the link lives   (links.py)
    Replica     tables over links; Calls: questions and news over links              (replica.py, calls.py)

A link lives from `up` to `down`; what was sent and not acknowledged when it goes down may or may not have arrived.
The next `up` of the same node is a new epoch: nothing of the old one comes any more.
"""

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol

from xmppd.cluster.tables import Owner


class Kind(IntEnum):
    """What a frame carries (docs/cluster-protocol.md)."""

    SNAPSHOT_BEGIN = 1
    SNAPSHOT_ROWS = 2
    SNAPSHOT_END = 3
    DELTA = 4
    DIGEST = 5
    RESYNC = 6
    SNAPSHOT_SEEN = 7  # so much of your snapshot is in my tables
    STANZA = 16  # one stanza for sessions of the receiving node
    OUTCOMES = 17  # what became of such stanzas
    PRESENCE = 18  # one presence for many users
    CALL = 32
    REPLY = 33
    CAST = 34
    BARRIER = 35
    BARRIER_REPLY = 36


@dataclass(frozen=True, slots=True)
class Peer:
    """Another member: its identity, and what it says about itself."""

    owner: Owner
    name: str  # xmppd@node02: a label, may change
    version: str  # of xmppd
    protocol: int  # the newest version of the frames it understands

    @property
    def node(self) -> bytes:
        """The node's UUID, 16 bytes: what everything else is keyed by."""
        return self.owner.member


class Transport(Protocol):
    """Packets between nodes by their UUID. Nothing raises, nothing waits; what cannot be sent is lost."""

    on_packet: Callable[[bytes], None]
    on_gap: Callable[[], None]  # packets for us were dropped here
    on_suspect: Callable[[bytes], None]  # this node's process seems to have gone: ask it at once

    @property
    def connected(self) -> bool: ...

    @property
    def max_packet(self) -> int:
        """Bytes."""
        ...

    def send(self, node: bytes, packet: bytes) -> None: ...


class Links(Protocol):
    """The links to all members that are up."""

    @property
    def peers(self) -> Mapping[bytes, Peer]:
        """Those that are up, by node."""
        ...

    def on(self, kind: Kind, handler: Callable[[Peer, bytes], None]) -> None:
        """The one handler of a kind of frame. It is a plain function; a crash is logged and the frame is lost."""
        ...

    def on_up(self, handler: Callable[[Peer], None]) -> None: ...

    def on_down(self, handler: Callable[[Peer, str], None]) -> None:
        """Called once with the reason; the peer is no longer in `peers`."""
        ...

    def send(self, node: bytes, kind: Kind, body: bytes) -> bool:
        """Queue a frame; it leaves with all others of this loop tick. False when that node is not up."""
        ...

    def send_all(self, kind: Kind, body: bytes) -> None: ...


class Calls(Protocol):
    """Questions and news between nodes: JSON payloads, a closed list of names."""

    def on_call(self, name: str, handler: Callable[[Peer, Any], Awaitable[Any] | Any]) -> None: ...

    def on_cast(self, name: str, handler: Callable[[Peer, Any], None]) -> None: ...

    async def call(self, node: bytes, name: str, payload: Any, *, timeout: float = 5.0) -> Any:
        """The answer. NodeUnreachable when the node is or goes down or does not answer in time, CallRefused with the
        other side's text and code."""
        ...

    def cast(self, name: str, payload: Any, nodes: Iterable[bytes] | None = None) -> None:
        """Tell some nodes, or all that are up; in order with everything else on each link."""
        ...

    async def barrier(self, *, timeout: float = 5.0) -> None:
        """Wait until every peer that is up has seen all we sent so far and we have seen all it had sent by then.
        Peers that go down meanwhile, or do not answer in time, are not waited for."""
        ...
