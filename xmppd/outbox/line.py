"""The events of one sink that are in memory: in order within a partition, many partitions at a time."""

import heapq
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from itertools import islice

from xmppd.outbox.event import Event


@dataclass(slots=True, eq=False)
class Item:
    """An event in memory. `written`: there may be a row of it; `alone`: not in one request with others; `handed`: the
    process that makes requests has it; `done`: it has arrived, or been given up."""

    event: Event
    written: bool = True
    attempts: int = 0
    alone: bool = False
    handed: bool = False
    done: bool = False


@dataclass(slots=True, eq=False)
class _Partition:
    key: bytes
    items: deque[Item] = field(default_factory=deque)
    due: float = 0.0  # not before, by the loop's clock
    busy: int = 0  # so many of its first items are on their way; none of the others may be until they have come back
    queued: bool = False  # in `ready`, or in `later`
    serial: int = 0  # of its entry in `later`; an older one means nothing


class Line:
    """No I/O and no clock: times are given. The first event of a partition bars those behind it."""

    def __init__(self) -> None:
        self._partitions: dict[bytes, _Partition] = {}
        self._ready: OrderedDict[bytes, None] = OrderedDict()
        self._later: list[tuple[float, int, bytes]] = []
        self._serial = 0
        self.events = 0
        self.bytes = 0

    def add(self, item: Item, now: float, *, due: float = 0.0) -> None:
        """Behind what is there, or, when it is older (it comes from another node), in front of what is younger."""
        key = item.event.partition
        partition = self._partitions.get(key)
        if partition is None:
            partition = self._partitions[key] = _Partition(key)
        self.events += 1
        self.bytes += item.event.size
        items = partition.items
        place = len(items)
        # What is on its way cannot be overtaken.
        while place > partition.busy and items[place - 1].event.id > item.event.id:
            place -= 1
        items.insert(place, item)
        if place == 0:
            partition.due = due
        self._queue(partition, now)

    def take_chain(self, now: float, *, limit: int, size: int = 1 << 20) -> list[Item]:
        """As `take`, of one partition."""
        if self._later:
            self._ripen(now)
        if not self._ready:
            return []
        key, _ = self._ready.popitem(last=False)
        partition = self._partitions[key]
        partition.queued, partition.due = False, 0.0
        items = partition.items
        if len(items) == 1 or items[0].alone:  # nearly always
            partition.busy = 1
            return [items[0]]
        chain: list[Item] = []
        weight = 0
        for item in islice(items, limit):
            weight += item.event.size
            if chain and (weight > size or item.alone):
                break
            chain.append(item)
        partition.busy = len(chain)
        return chain

    def take(self, now: float, *, limit: int = 1, size: int = 1 << 20, early: bool = False) -> list[Item]:
        """The next items to send, none when nothing is due. They stay in the line, and their partitions are busy, until
        `done` or `put_back`. `early`: if nothing is due, what is due next."""
        if self._later:
            self._ripen(now)
            if not self._ready and early:
                self._ripen_next()
        taken: list[Item] = []
        weight = 0
        while self._ready and len(taken) < limit:
            key = next(iter(self._ready))
            partition = self._partitions[key]
            if partition.items[0].alone and taken:
                break
            del self._ready[key]
            partition.queued, partition.due = False, 0.0
            for item in partition.items:
                weight += item.event.size
                if taken and (weight > size or len(taken) >= limit or item.alone or taken[0].alone):
                    break
                taken.append(item)
                partition.busy += 1
            if weight > size or taken[0].alone:
                break
        return taken

    def done(self, items: list[Item], now: float) -> None:
        """They have arrived, or been given up: the first of their partitions that are on their way."""
        for item in items:
            item.done = True
            partition = self._partitions[item.event.partition]
            if partition.items[0] is item:
                partition.items.popleft()
            else:  # those in front of it have to be sent again
                partition.items.remove(item)
            self.events -= 1
            self.bytes -= item.event.size
            self._came_back(partition, now)

    def put_back(self, items: list[Item], now: float, *, due: float) -> None:
        """They stay first; their partitions wait until `due`."""
        for item in items:
            partition = self._partitions[item.event.partition]
            partition.due = max(partition.due, due)
            self._came_back(partition, now)

    def _came_back(self, partition: _Partition, now: float) -> None:
        partition.busy -= 1
        if partition.busy:
            return
        if partition.items:
            self._queue(partition, now)
        else:
            del self._partitions[partition.key]

    def drop_oldest(self) -> Item | None:
        """One of the oldest events, which is not on its way, out of the line."""
        partition = next((each for each in self._partitions.values() if not each.busy), None)
        if partition is None:
            return None
        item = partition.items.popleft()
        item.done = True
        self.events -= 1
        self.bytes -= item.event.size
        if not partition.items:
            self._ready.pop(partition.key, None)
            del self._partitions[partition.key]
        return item

    def hurry(self, now: float) -> None:
        """Nothing waits for its time any more."""
        for partition in self._partitions.values():
            if not partition.busy and partition.due > now:
                partition.due, partition.queued = 0.0, False
                self._queue(partition, now)

    def clear(self) -> None:
        """Forget what is not on its way."""
        for key, partition in list(self._partitions.items()):
            while len(partition.items) > partition.busy:
                item = partition.items.pop()
                item.done = True
                self.events -= 1
                self.bytes -= item.event.size
            if not partition.items:
                del self._partitions[key]
        self._ready.clear()
        self._later.clear()

    def oldest(self) -> float | None:
        """When the oldest event was made."""
        return min((p.items[0].event.created_at for p in self._partitions.values()), default=None)

    def next_due(self, now: float) -> float | None:
        """When something can be taken: now or earlier, later, or None: not before something is added or released."""
        self._ripen(now)
        if self._ready:
            return now
        return self._later[0][0] if self._later else None

    def _queue(self, partition: _Partition, now: float) -> None:
        if partition.busy or partition.queued:
            return
        partition.queued = True
        if partition.due <= now:
            self._ready[partition.key] = None
            return
        self._serial += 1
        partition.serial = self._serial
        heapq.heappush(self._later, (partition.due, self._serial, partition.key))

    def _ripen(self, now: float) -> None:
        while self._later and (self._later[0][0] <= now or not self._is_valid(self._later[0])):
            self._pop_later()

    def _ripen_next(self) -> None:
        while self._later and not self._ready:
            self._pop_later()

    def _pop_later(self) -> None:
        entry = heapq.heappop(self._later)
        if self._is_valid(entry):
            self._ready[entry[2]] = None

    def _is_valid(self, entry: tuple[float, int, bytes]) -> bool:
        partition = self._partitions.get(entry[2])
        waiting = partition is not None and partition.queued and partition.serial == entry[1]
        return waiting and entry[2] not in self._ready
