"""What every shared table is: rows of our own, and those of other nodes, which live and die with their owner.

A table changes rows of its own and says so (`announce`); a Replica (replica.py) carries that to the other nodes and
calls `begin`, `put`, `delete`, `end`, `drop` there. Nothing else writes rows of others.
"""

import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ParamSpec

from xmppd.cluster.packed import PackedRows, digest_of, items_in, row_bytes
from xmppd.log import get_logger

P = ParamSpec("P")
_log = get_logger("cluster")


@dataclass(frozen=True, slots=True)
class Owner:
    """Who holds a row or a message: node UUID, worker number on that node, and which start of that worker.

    A node's name is a label and may change; this does not.
    """

    member: bytes  # 16 bytes, the node's UUID
    worker: int
    incarnation: int  # grows with every start

    def __str__(self) -> str:
        return f"{uuid.UUID(bytes=self.member)}/{self.worker}#{self.incarnation}"


@dataclass(frozen=True, slots=True)
class Tally:
    """How many rows, and the XOR of their digests: equal on both sides when the rows are."""

    rows: int = 0
    digest: int = 0


# (table number, whether it is there, the row's bytes: without a value when it has gone)
Announce = Callable[[int, bool, bytes], None]


class Held:
    """The rows of one other owner. The first layer is what the owner has said since the last snapshot began; below it,
    while that lasts, what it had said before and may no longer be true. A row is in one layer only."""

    __slots__ = ("layers", "owner")

    def __init__(self, owner: Owner) -> None:
        self.owner = owner
        self.layers = [PackedRows()]

    def put(self, group: str, item: bytes, value: bytes) -> bytes | None:
        before = self._forget(self.layers[1:], group, item) if len(self.layers) > 1 else None
        old = self.layers[0].put(group, item, value)
        return before if old is None else old

    def delete(self, group: str, item: bytes) -> bytes | None:
        return self._forget(self.layers, group, item)

    def items(self, group: str) -> Iterator[tuple[bytes, bytes]]:
        """(item, value) of a group's rows."""
        for layer in self.layers:
            packed = layer.groups.get(group)
            if packed is not None:
                yield from items_in(packed)

    def has(self, group: str) -> bool:
        return any(group in layer.groups for layer in self.layers)

    @property
    def tally(self) -> Tally:
        digest = 0
        for layer in self.layers:
            digest ^= layer.digest
        return Tally(sum(layer.count for layer in self.layers), digest)

    def count(self, host: str | None) -> int:
        return sum(layer.count if host is None else layer.hosts.get(host, 0) for layer in self.layers)

    @staticmethod
    def _forget(layers: list[PackedRows], group: str, item: bytes) -> bytes | None:
        for layer in layers:
            old = layer.delete(group, item)
            if old is not None:
                return old
        return None


class SharedTable:
    """The part of a table that a Replica sees. A table has a number of its own, for ever, and a name for operators."""

    number: int
    name: str

    def __init__(self) -> None:
        self.announce: Announce | None = None  # set by the replica
        self.conflicts = 0  # rows of ours that lost to a newer one elsewhere
        self._own_count = 0
        self._own_digest = 0
        self._held: dict[bytes, Held] = {}  # by member
        self._groups: tuple[dict[str, bytes], ...] = ()  # those of every layer of all of them

    @property
    def own(self) -> Tally:
        """The rows of this process."""
        return Tally(self._own_count, self._own_digest)

    # -- for the replica

    def own_rows(self) -> Iterator[tuple[str, bytes, bytes]]:
        """Every row of this process as it is when it is reached. Rows may come and go between two steps."""
        raise NotImplementedError

    def begin(self, owner: Owner) -> bool:
        """A snapshot of this owner comes: what was held of it counts until `end`, unless it is confirmed or changed.

        False, and nothing is done, when a later start of the same node is known."""
        held = self._held.get(owner.member)
        if held is not None and held.owner != owner:
            if held.owner.incarnation > owner.incarnation:
                return False
            self.drop(held.owner)
            held = None
        if held is None:
            self._held[owner.member] = Held(owner)
        else:
            held.layers.insert(0, PackedRows())
        self._layers_changed()
        return True

    def put(self, owner: Owner, group: str, item: bytes, value: bytes) -> bool:
        """A row of another node, new or changed; False when that owner is not (or no longer) held."""
        held = self._held_by(owner)
        if held is None:
            return False
        old = held.put(group, item, value)
        if old != value:
            self._changed(held, group, item, old, value)
        return True

    def delete(self, owner: Owner, group: str, item: bytes) -> bool:
        """A row of another node has gone; False when that owner is not (or no longer) held."""
        held = self._held_by(owner)
        if held is None:
            return False
        old = held.delete(group, item)
        if old is not None:
            self._changed(held, group, item, old, None)
        return True

    def end(self, owner: Owner) -> int:
        """The snapshot is complete: what it did not confirm goes. How many rows that were."""
        held = self._held_by(owner)
        if held is None:
            return 0
        held.layers, stale = held.layers[:1], [layer for layer in held.layers[1:] if layer.count]
        self._layers_changed()
        if stale:
            self._vanished(owner, stale)
        return sum(layer.count for layer in stale)

    def drop(self, owner: Owner) -> int:
        """An owner has gone and takes its rows along. How many there were."""
        held = self._held_by(owner)
        if held is None:
            return 0
        del self._held[owner.member]
        self._layers_changed()
        rows = held.count(None)
        if rows:
            self._vanished(owner, held.layers)
        return rows

    def held(self, owner: Owner) -> Tally:
        """What we have of another owner's rows."""
        held = self._held_by(owner)
        return Tally() if held is None else held.tally

    # -- for the table

    def _held_by(self, owner: Owner) -> Held | None:
        held = self._held.get(owner.member)
        return held if held is not None and (held.owner is owner or held.owner == owner) else None

    def _layers_changed(self) -> None:
        self._groups = tuple(layer.groups for held in self._held.values() for layer in held.layers)

    def _is_elsewhere(self, group: str) -> bool:
        """Whether another node has rows of a group."""
        for groups in self._groups:  # noqa: SIM110 - a generator would cost more than the look-ups
            if group in groups:
                return True
        return False

    def _own_changed(self, group: str, item: bytes, old: bytes | None, new: bytes | None) -> None:
        """A row of our own came (no `old`), changed, or went (no `new`)."""
        row = row_bytes(group, item, b"" if new is None else new)
        if old is not None:
            self._own_count -= 1
            self._own_digest ^= digest_of(row_bytes(group, item, old))
        if new is not None:
            self._own_count += 1
            self._own_digest ^= digest_of(row)
        if self.announce is not None:
            self.announce(self.number, new is not None, row)

    def _changed(self, held: Held, group: str, item: bytes, old: bytes | None, new: bytes | None) -> None:
        """A row of another node came, changed or went."""

    def _vanished(self, owner: Owner, layers: list[PackedRows]) -> None:
        """These rows are no longer held."""


def tell(observers: list[Callable[P, None]], *args: P.args, **kwargs: P.kwargs) -> None:
    """Call every observer; one that crashes does not keep the others from hearing it."""
    for observer in observers:
        try:
            observer(*args, **kwargs)
        except Exception as exc:
            _log.error("table observer failed", exc=exc, observer=getattr(observer, "__qualname__", str(observer)))
