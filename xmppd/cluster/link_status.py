"""What operators and metrics see of the links."""

from dataclasses import dataclass

from xmppd.cluster.interfaces import Peer
from xmppd.cluster.link import Link
from xmppd.cluster.link_types import DOWN_KINDS, State


@dataclass(frozen=True, slots=True)
class LinkStatus:
    """One link as an operator sees it."""

    node: bytes  # UUID
    peer: Peer | None  # as it last said; None: never heard of
    state: str  # up, down, disconnected
    rtt_ms: float | None
    epoch: str  # our session and theirs
    up_since: float | None  # seconds since 1970
    via: bytes | None  # the node our packets go through
    queue_frames: int  # that wait or are not acknowledged
    queue_bytes: int
    sent_frames: int
    sent_bytes: int
    sent_packets: int
    received_frames: int
    received_bytes: int
    received_packets: int
    retransmitted: int  # batches
    duplicates: int  # batches


class LinkCounters:
    """What happened on all links since the start."""

    __slots__ = (
        "downs",
        "foreign",
        "handler_failures",
        "incompatible",
        "malformed",
        "relayed",
        "unknown_frames",
        "ups",
    )

    def __init__(self) -> None:
        self.ups = 0
        self.downs = dict.fromkeys(DOWN_KINDS, 0)
        self.malformed = 0  # packets that could not be read at all; what a link refused stands with the link
        self.foreign = 0  # packets of another cluster, of no member, for nobody we know
        self.incompatible = 0  # packets of nodes with which we have no version in common
        self.relayed = 0  # packets of others passed on
        self.unknown_frames = 0  # of a kind nobody here handles
        self.handler_failures = 0


def status_of(link: Link) -> LinkStatus:
    """One link as it is now."""
    up, counts = link.state is State.UP, link.counts
    return LinkStatus(
        node=link.node,
        peer=link.peer,
        state=link.state.value,
        rtt_ms=link.rtt * 1000 if up and link.rtt else None,
        epoch=link.epoch,
        up_since=link.up_since if up else None,
        via=link.via if up else None,
        queue_frames=link.queue_frames,
        queue_bytes=link.queue_bytes,
        sent_frames=counts.sent_frames,
        sent_bytes=counts.sent_bytes,
        sent_packets=counts.sent_packets,
        received_frames=counts.received_frames,
        received_bytes=counts.received_bytes,
        received_packets=counts.received_packets,
        retransmitted=counts.retransmitted,
        duplicates=counts.duplicates,
    )
