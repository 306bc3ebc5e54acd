"""What a link needs to know, and what it says: settings, states, events, counts."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Final

from xmppd.cluster.frames import Beat
from xmppd.cluster.interfaces import Peer
from xmppd.cluster.tables import Owner

DOWN_KINDS: Final = ("goodbye", "silent", "gone", "renewed", "restarted", "overflow", "stuck", "local")


@dataclass(frozen=True, slots=True)
class Settings:
    """Times in seconds, sizes in bytes."""

    heartbeat: float = 1.0
    peer_timeout: float = 6.0
    suspect: float = 0.8  # a suspected node that does not answer for so long is down: a nats-server that starts again,
    # which looks the same at first, takes up to half of it
    max_packet: int = 256 * 1024
    max_frame: int = 16 * 1024 * 1024
    max_queue: int = 64 * 1024 * 1024  # not yet acknowledged; beyond, the link goes down

    def __post_init__(self) -> None:
        """A short `peer_timeout` needs quicker heartbeats, or a single one that is lost would end the link."""
        object.__setattr__(self, "heartbeat", min(self.heartbeat, self.peer_timeout / 6))


@dataclass(slots=True)
class Local:
    """What all links of a node share."""

    owner: Owner
    name: str
    version: str
    cluster: bytes  # cluster id
    settings: Settings
    max_packet: int  # bytes: the least of the settings' and the transport's
    emit: Callable[[bytes, bytes], None]  # (node to hand it to, packet)
    relays: Callable[[bytes], list[bytes]]  # members that we reach directly and that say they reach this one
    reaches: Callable[[], tuple[bytes, ...]]  # members we reach directly


class State(Enum):
    """TRYING sends heartbeats until the other end answers; BLOCKED neither sends nor listens for a while."""

    TRYING = "down"
    UP = "up"
    BLOCKED = "disconnected"


@dataclass(frozen=True, slots=True)
class Up:
    """The link is up; frames follow."""

    peer: Peer


@dataclass(frozen=True, slots=True)
class Down:
    """The link was up and is not any more."""

    peer: Peer
    reason: str
    kind: str  # one of DOWN_KINDS
    lasted: float  # seconds


@dataclass(frozen=True, slots=True)
class Way:
    """Packets go through another node from now on, or (None) directly again."""

    peer: Peer
    via: bytes | None


@dataclass(frozen=True, slots=True)
class Incompatible:
    """The other end and we have no version in common."""

    beat: Beat


@dataclass(frozen=True, slots=True)
class Farewell:
    """A goodbye that was sent. A packet of that node from another session shows that it has come."""

    session: tuple[int, int]  # incarnation and session of the other end
    packet: bytes


Event = Up | Down | Way | Incompatible


class Counts:
    """What went over one link since this process started, over all its lives."""

    __slots__ = (
        "duplicates",
        "malformed",
        "received_bytes",
        "received_frames",
        "received_packets",
        "retransmitted",
        "sent_bytes",
        "sent_frames",
        "sent_packets",
        "stale",
    )

    def __init__(self) -> None:
        self.sent_frames = self.sent_bytes = self.sent_packets = 0  # bytes: of packets, with their headers
        self.received_frames = self.received_bytes = self.received_packets = 0
        self.retransmitted = self.duplicates = 0  # batches
        self.stale = self.malformed = 0  # packets
