"""Tables over links: every node's own rows are on all nodes.

A node numbers the changes of its rows over all tables (its version) and sends each as a DELTA, in order, to all that
are up. To a node that comes up it sends all its rows as a snapshot, in pieces between which the loop turns and deltas
go on. From time to time it says how many rows it has and their digest; who has others asks for a snapshot again.

Bodies of the frames (numbers are varints; row: packed.py; bytes behind what is named here are not looked at):

    SNAPSHOT_BEGIN  snapshot number, version
    SNAPSHOT_ROWS   snapshot number, { table byte, row }       a delta since BEGIN is newer than what is here
    SNAPSHOT_END    snapshot number, frames, tallies           rows that the snapshot did not name are gone
    SNAPSHOT_SEEN   snapshot number, frames applied            of ROWS and END; the sender stays at most WINDOW ahead
    DELTA           version, 1 put or 0 deleted, table byte, row (without a value when deleted)
    DIGEST          tallies
    RESYNC          -                                          send me a snapshot again
    tallies         version, number of tables, { table byte, rows, digest (8 bytes) }

Deltas are applied when they come; pieces of a snapshot wait for their turn. So a barrier (calls.py) says that every
change before it is in the tables, unless the first snapshot is still under way (`synced`).
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from xmppd.cluster.frames import FrameError, read_varint, varint
from xmppd.cluster.interfaces import Kind, Links, Peer
from xmppd.cluster.packed import read_row
from xmppd.cluster.shared import Owner, Tally, tell
from xmppd.cluster.snapshots import ReplicatedTable, SnapshotSender
from xmppd.cluster.turns import Turns
from xmppd.log import get_logger

DIGEST_PERIOD: Final = 3.0  # seconds

_log = get_logger("cluster")


class Timer(Protocol):
    def cancel(self) -> object: ...


@dataclass(frozen=True, slots=True)
class PeerTables:
    """What we hold of another node."""

    owner: Owner
    name: str
    synced: bool  # its snapshot is complete and no repair is under way
    agrees: bool | None  # whether its last digest was ours; None until there was one
    knows_us: bool  # it has all of the last snapshot we sent
    version: int  # of its changes, the last one that was applied
    tables: Mapping[str, Tally]


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """The tables as this node sees them. Two nodes agree when, at one version of an owner, its tallies are equal."""

    owner: Owner
    version: int
    tables: Mapping[str, Tally]  # our own rows
    peers: tuple[PeerTables, ...]  # sorted by name
    deltas_sent: int  # each once, however many nodes it went to
    deltas_applied: int
    snapshots_sent: int  # complete, and seen by the other side
    snapshots_applied: int
    resyncs: int  # asked by us
    conflicts: int  # rows of ours that lost to the same full JID elsewhere

    @property
    def converged(self) -> bool:
        """Whether this node and every node it sees have each other's rows."""
        return all(peer.synced and peer.agrees and peer.knows_us for peer in self.peers)


class _Incoming:
    """What one node tells us: where we are in its changes, and its snapshot if one is under way."""

    __slots__ = (
        "agrees",
        "applied",
        "asked",
        "loading",
        "number",
        "peer",
        "progress",
        "queue",
        "started",
        "synced",
        "touched",
        "version",
    )

    def __init__(self, peer: Peer, now: float) -> None:
        self.peer = peer
        self.version = 0
        self.number: int | None = None  # of the snapshot
        self.loading = False
        self.queue: deque[tuple[Kind, bytes]] = deque()  # its frames that wait for their turn
        self.applied = 0  # of these frames
        self.touched: set[tuple[int, str, bytes]] = set()  # rows that deltas named since it began
        self.synced = False
        self.asked = False
        self.agrees: bool | None = None
        self.started = now
        self.progress = now


class Replica:
    """Carries tables from and to all nodes that are up."""

    def __init__(
        self,
        links: Links,
        owner: Owner,
        tables: Iterable[ReplicatedTable],
        *,
        call_soon: Callable[[Callable[[], None]], Any],
        call_later: Callable[[float, Callable[[], None]], Timer],
        clock: Callable[[], float] = time.monotonic,
        digest_period: float = DIGEST_PERIOD,
    ) -> None:
        self._links = links
        self._owner = owner
        self._tables = {table.number: table for table in tables}
        self._call_later = call_later
        self._clock = clock
        self._period = digest_period
        self._turns = Turns(call_soon, clock)
        self._timer: Timer | None = None
        self._version = 0
        self._incoming: dict[bytes, _Incoming] = {}
        self._snapshots = SnapshotSender(
            links, self._turns, self._tables, lambda: self._version, self._tallies, self._exchanged
        )
        self.deltas_sent = 0
        self.deltas_applied = 0
        self.snapshots_applied = 0
        self.resyncs = 0
        self.on_synced: list[Callable[[Peer], None]] = []  # a first snapshot, or a repair, is complete
        # Both of us have all rows of the other: whatever either of us does from here on, it knows of them. Again after
        # each repair.
        self.on_exchanged: list[Callable[[Peer], None]] = []
        for kind, handler in (
            (Kind.SNAPSHOT_BEGIN, self._snapshot_begins),
            (Kind.SNAPSHOT_ROWS, self._snapshot_goes_on),
            (Kind.SNAPSHOT_END, self._snapshot_ends),
            (Kind.SNAPSHOT_SEEN, self._snapshots.seen),
            (Kind.DELTA, self._delta),
            (Kind.DIGEST, self._digest),
            (Kind.RESYNC, self._resync),
        ):
            links.on(kind, handler)
        links.on_up(self._up)
        links.on_down(self._down)
        for table in self._tables.values():
            table.announce = self._announce

    def start(self) -> None:
        """Begin to send digests."""
        self._timer = self._call_later(self._period, self._tick)

    def stop(self) -> None:
        """Say nothing any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for table in self._tables.values():
            table.announce = None

    def synced(self, node: bytes) -> bool:
        """Whether we have all rows of a node that is up."""
        incoming = self._incoming.get(node)
        return incoming is not None and incoming.synced

    def known_to(self, node: bytes) -> bool:
        """Whether a node that is up has all our rows."""
        return self._snapshots.known_to(node)

    def status(self) -> ReplicaStatus:
        """For operators."""
        tables = self._tables.values()
        peers = [
            PeerTables(
                owner=incoming.peer.owner,
                name=incoming.peer.name,
                synced=incoming.synced,
                agrees=incoming.agrees,
                knows_us=self.known_to(node),
                version=incoming.version,
                tables={table.name: table.held(incoming.peer.owner) for table in tables},
            )
            for node, incoming in self._incoming.items()
        ]
        return ReplicaStatus(
            owner=self._owner,
            version=self._version,
            tables={table.name: table.own for table in tables},
            peers=tuple(sorted(peers, key=lambda peer: (peer.name, peer.owner.member))),
            deltas_sent=self.deltas_sent,
            deltas_applied=self.deltas_applied,
            snapshots_sent=self._snapshots.completed,
            snapshots_applied=self.snapshots_applied,
            resyncs=self.resyncs,
            conflicts=sum(table.conflicts for table in tables),
        )

    # -- our rows

    def _announce(self, table: int, put: bool, row: bytes) -> None:
        self._version += 1
        if self._links.peers:
            self.deltas_sent += 1
            self._links.send_all(Kind.DELTA, varint(self._version) + bytes((put, table)) + row)

    def _tallies(self) -> bytes:
        parts = [varint(self._version), varint(len(self._tables))]
        for number, table in self._tables.items():
            parts += (bytes((number,)), varint(table.own.rows), table.own.digest.to_bytes(8, "big"))
        return b"".join(parts)

    def _tick(self) -> None:
        self._timer = self._call_later(self._period, self._tick)
        if self._links.peers:
            self._links.send_all(Kind.DIGEST, self._tallies())

    def _resync(self, peer: Peer, body: bytes) -> None:
        if peer.node in self._incoming:
            self._snapshots.begin(peer.node)

    # -- rows of others

    def _up(self, peer: Peer) -> None:
        before = self._incoming.get(peer.node)
        if before is not None:
            self._forget(before.peer)
        self._incoming[peer.node] = _Incoming(peer, self._clock())
        self._snapshots.begin(peer.node)

    def _down(self, peer: Peer, reason: str) -> None:
        if self._from(peer) is not None:
            self._forget(peer)

    def _forget(self, peer: Peer) -> None:
        self._incoming.pop(peer.node, None)
        self._snapshots.forget(peer.node)
        for table in self._tables.values():
            table.drop(peer.owner)

    def _from(self, peer: Peer) -> _Incoming | None:
        """What we know of a node that speaks; None when it is an earlier start of one that we know."""
        incoming = self._incoming.get(peer.node)
        return incoming if incoming is not None and incoming.peer.owner == peer.owner else None

    def _delta(self, peer: Peer, body: bytes) -> None:
        incoming = self._from(peer)
        if incoming is None or incoming.number is None:
            return  # the snapshot that is to come has it
        version, at = read_varint(body, 0)
        put, number = body[at], body[at + 1]
        group, item, value, _ = read_row(body, at + 2)
        gap = version != incoming.version + 1
        incoming.version = version
        table = self._tables.get(number)
        if table is not None:
            if incoming.loading:
                incoming.touched.add((number, group, item))
            if put:
                table.put(peer.owner, group, item, value)
            else:
                table.delete(peer.owner, group, item)
            self.deltas_applied += 1
        if gap:
            self._ask(incoming, "gap")

    def _snapshot_begins(self, peer: Peer, body: bytes) -> None:
        incoming = self._from(peer)
        if incoming is None:
            return
        number, at = read_varint(body, 0)
        version, _ = read_varint(body, at)
        for table in self._tables.values():
            if not table.begin(peer.owner):
                return
        incoming.number, incoming.version, incoming.applied = number, version, 0
        incoming.synced, incoming.asked, incoming.agrees, incoming.loading = False, False, None, True
        incoming.queue.clear()
        incoming.touched = set()
        incoming.started = incoming.progress = self._clock()

    def _snapshot_goes_on(self, peer: Peer, body: bytes) -> None:
        self._enqueue(peer, Kind.SNAPSHOT_ROWS, body)

    def _snapshot_ends(self, peer: Peer, body: bytes) -> None:
        self._enqueue(peer, Kind.SNAPSHOT_END, body)

    def _enqueue(self, peer: Peer, kind: Kind, body: bytes) -> None:
        incoming = self._from(peer)
        if incoming is None or not incoming.loading:
            return
        incoming.queue.append((kind, body))
        if len(incoming.queue) == 1:
            self._turns.add(lambda: self._apply_piece(incoming))

    def _apply_piece(self, incoming: _Incoming) -> bool:
        """Take one frame of a snapshot from its queue; whether there are more."""
        if self._incoming.get(incoming.peer.node) is not incoming or not incoming.queue:
            return False
        kind, body = incoming.queue[0]
        try:
            number, at = read_varint(body, 0)
            if number == incoming.number:
                self._apply(incoming, kind, body, at)
                incoming.progress = self._clock()
                self._say_seen(incoming)
        finally:
            # Applying may have told somebody who did something that began another snapshot.
            if incoming.queue and incoming.queue[0][1] is body:
                incoming.queue.popleft()
        return bool(incoming.queue)

    def _say_seen(self, incoming: _Incoming) -> None:
        if incoming.number is not None:
            seen = varint(incoming.number) + varint(incoming.applied)
            self._links.send(incoming.peer.node, Kind.SNAPSHOT_SEEN, seen)

    def _apply(self, incoming: _Incoming, kind: Kind, body: bytes, at: int) -> None:
        if kind is Kind.SNAPSHOT_END:
            self._end(incoming, body, at)
            return
        incoming.applied += 1
        owner, touched = incoming.peer.owner, incoming.touched
        while at < len(body):
            number = body[at]
            group, item, value, at = read_row(body, at + 1)
            table = self._tables.get(number)
            if table is not None and (not touched or (number, group, item) not in touched):
                table.put(owner, group, item, value)

    def _end(self, incoming: _Incoming, body: bytes, at: int) -> None:
        incoming.applied, at = read_varint(body, at)
        for table in self._tables.values():
            table.end(incoming.peer.owner)
        incoming.loading, incoming.synced = False, not incoming.asked
        incoming.touched = set()
        self.snapshots_applied += 1
        rows = sum(table.held(incoming.peer.owner).rows for table in self._tables.values())
        seconds = round(self._clock() - incoming.started, 3)
        _log.info("tables synced", node=incoming.peer.name, rows=rows, seconds=seconds)
        self._compare(incoming, body, at)
        if incoming.synced:
            tell(self.on_synced, incoming.peer)
            self._exchanged(incoming.peer.node)

    def _exchanged(self, node: bytes) -> None:
        incoming = self._incoming.get(node)
        if incoming is not None and incoming.synced and self.known_to(node):
            tell(self.on_exchanged, incoming.peer)

    # -- digests

    def _digest(self, peer: Peer, body: bytes) -> None:
        incoming = self._from(peer)
        if incoming is None:
            return
        if incoming.synced:
            self._compare(incoming, body, 0)
            self._say_seen(incoming)  # once more, should that have been lost
        elif self._clock() - incoming.progress >= 2 * self._period:
            self._ask(incoming, "stalled")

    def _compare(self, incoming: _Incoming, body: bytes, at: int) -> None:
        """Hold what a node says about its rows against what we have of them."""
        version, at = read_varint(body, at)
        if version < incoming.version:
            return  # said before changes that we have already
        if version > incoming.version:
            self._ask(incoming, "gap")
            return
        count, at = read_varint(body, at)
        for _ in range(count):
            number = body[at]
            rows, at = read_varint(body, at + 1)
            if at + 8 > len(body):
                raise FrameError("a digest is cut off")
            said = Tally(rows, int.from_bytes(body[at : at + 8], "big"))
            at += 8
            table = self._tables.get(number)
            if table is not None and table.held(incoming.peer.owner) != said:
                self._ask(incoming, table.name)
                return
        incoming.agrees = True

    def _ask(self, incoming: _Incoming, cause: str) -> None:
        """Ask for a snapshot, once until it begins or nothing has come for a while."""
        now = self._clock()
        if incoming.asked and now - incoming.progress < 2 * self._period:
            return
        incoming.asked, incoming.synced, incoming.agrees, incoming.progress = True, False, False, now
        self.resyncs += 1
        _log.warning("tables differ", node=incoming.peer.name, cause=cause)
        self._links.send(incoming.peer.node, Kind.RESYNC, b"")
