"""Snapshots: all rows of this node for one other node, in pieces, some of them on their way at a time."""

from collections.abc import Callable, Iterator, Mapping
from typing import Final, Protocol

from xmppd.cluster.frames import read_varint, varint
from xmppd.cluster.interfaces import Kind, Links, Peer
from xmppd.cluster.packed import row_bytes
from xmppd.cluster.shared import Announce, Owner, Tally
from xmppd.cluster.turns import Turns

PIECE_ROWS: Final = 200
PIECE_BYTES: Final = 64 * 1024
WINDOW: Final = 32  # frames of a snapshot on their way: a link's queue has an end

Row = tuple[int, str, bytes, bytes]  # table number, group, item, value


class ReplicatedTable(Protocol):
    """A table whose rows are to be on all nodes (shared.py: SharedTable)."""

    number: int  # 1 to 255, its own for ever
    name: str
    announce: Announce | None
    conflicts: int

    @property
    def own(self) -> Tally: ...
    def own_rows(self) -> Iterator[tuple[str, bytes, bytes]]: ...
    def begin(self, owner: Owner) -> bool: ...
    def put(self, owner: Owner, group: str, item: bytes, value: bytes) -> bool: ...
    def delete(self, owner: Owner, group: str, item: bytes) -> bool: ...
    def end(self, owner: Owner) -> int: ...
    def drop(self, owner: Owner) -> int: ...
    def held(self, owner: Owner) -> Tally: ...


class _Snapshot:
    """One on its way."""

    __slots__ = ("asleep", "node", "number", "rows", "seen", "sent")

    def __init__(self, node: bytes, number: int, rows: Iterator[Row]) -> None:
        self.node = node
        self.number = number
        self.rows: Iterator[Row] | None = rows  # None when END has been sent
        self.sent = 0  # ROWS and END
        self.seen = 0
        self.asleep = False  # the window is full


class SnapshotSender:
    """Sends this node's rows to those who need all of them. The frames are described in replica.py."""

    def __init__(
        self,
        links: Links,
        turns: Turns,
        tables: Mapping[int, ReplicatedTable],
        version: Callable[[], int],
        tallies: Callable[[], bytes],
        on_known: Callable[[bytes], None] = lambda node: None,
    ) -> None:
        """`on_known` is told of a node that has got all of a snapshot."""
        self._links = links
        self._turns = turns
        self._tables = tables
        self._version = version
        self._tallies = tallies
        self._on_known = on_known
        self._snapshots: dict[bytes, _Snapshot] = {}  # by node, the last one
        self._numbers = 0
        self.completed = 0  # seen to their end by the other side

    def begin(self, node: bytes) -> None:
        """Send all rows; a snapshot that is still on its way there is given up."""
        self._numbers += 1
        snapshot = self._snapshots[node] = _Snapshot(node, self._numbers, self._own_rows())
        self._links.send(node, Kind.SNAPSHOT_BEGIN, varint(snapshot.number) + varint(self._version()))
        self._turns.add(lambda: self._step(snapshot))

    def forget(self, node: bytes) -> None:
        """That node is no longer up."""
        self._snapshots.pop(node, None)

    def known_to(self, node: bytes) -> bool:
        """Whether a node that is up has all of the last snapshot in its tables."""
        snapshot = self._snapshots.get(node)
        return snapshot is not None and snapshot.rows is None and snapshot.seen >= snapshot.sent

    def seen(self, peer: Peer, body: bytes) -> None:
        """SNAPSHOT_SEEN."""
        number, at = read_varint(body, 0)
        seen, _ = read_varint(body, at)
        snapshot = self._snapshots.get(peer.node)
        if snapshot is None or snapshot.number != number or not snapshot.seen < seen <= snapshot.sent:
            return
        snapshot.seen = seen
        if self.known_to(peer.node):
            self.completed += 1
            self._on_known(peer.node)
        elif snapshot.asleep:
            snapshot.asleep = False
            self._turns.add(lambda: self._step(snapshot))

    def _own_rows(self) -> Iterator[Row]:
        for number, table in self._tables.items():
            for group, item, value in table.own_rows():
                yield number, group, item, value

    def _step(self, snapshot: _Snapshot) -> bool:
        """Send one frame; whether there is more to send at once."""
        if self._snapshots.get(snapshot.node) is not snapshot or snapshot.rows is None:
            return False
        if snapshot.sent - snapshot.seen >= WINDOW:
            snapshot.asleep = True
            return False
        parts, size = [varint(snapshot.number)], 0
        for table, group, item, value in snapshot.rows:
            row = row_bytes(group, item, value)
            parts += (bytes((table,)), row)
            size += len(row)
            if len(parts) > 2 * PIECE_ROWS or size > PIECE_BYTES:
                break
        snapshot.sent += 1
        if len(parts) > 1:
            return self._links.send(snapshot.node, Kind.SNAPSHOT_ROWS, b"".join(parts))
        snapshot.rows = None
        self._links.send(snapshot.node, Kind.SNAPSHOT_END, parts[0] + varint(snapshot.sent) + self._tallies())
        return False
