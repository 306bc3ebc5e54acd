"""Several nodes without sockets on one database: the worlds of tests/modules, joined by links in memory."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from struct import Struct
from typing import Any

from tests.cluster.memory_net import MemoryLinks, Net
from tests.modules.friends import Friends
from tests.modules.world import Place
from xmppd.cluster.interfaces import Kind, Links, Peer
from xmppd.cluster.tables import Owner, SessionTable
from xmppd.storage import Storage

NAMES = ("one", "two", "three")
_DELTA = Struct("!HHH")
_GONE = 0xFFFF


class PlainReplica:
    """Session rows on every node, with nothing that repairs them."""

    def __init__(self, table: SessionTable, links: Links) -> None:
        self._table = table
        self._links = links
        table.announce = self._changed
        links.on(Kind.DELTA, self._delta)
        links.on_up(self._up)
        links.on_down(lambda peer, reason: table.drop(peer.owner))

    def _changed(self, number: int, group: str, item: bytes, value: bytes | None) -> None:
        self._links.send_all(Kind.DELTA, _pack(group, item, value))

    def _up(self, peer: Peer) -> None:
        self._table.begin(peer.owner)
        for row in list(self._table.own_rows()):
            self._links.send(peer.node, Kind.DELTA, _pack(*row))

    def _delta(self, peer: Peer, body: bytes) -> None:
        group, item, value = _unpack(body)
        if value is None:
            self._table.delete(peer.owner, group, item)
        else:
            self._table.put(peer.owner, group, item, value)


def _pack(group: str, item: bytes, value: bytes | None) -> bytes:
    name = group.encode()
    return _DELTA.pack(len(name), len(item), _GONE if value is None else len(value)) + name + item + (value or b"")


def _unpack(body: bytes) -> tuple[str, bytes, bytes | None]:
    name, item, value = _DELTA.unpack_from(body)
    at = _DELTA.size
    rest = body[at + name + item :]
    return body[at : at + name].decode(), body[at + name : at + name + item], None if value == _GONE else rest


class Wires(Net):
    """Links with a delay: what one node sends to another arrives in order, at a pace of its own. Frames are counted."""

    def __init__(self) -> None:
        super().__init__()
        self.frames: Counter[Kind] = Counter()
        self.delay: Callable[[], float] | None = None  # seconds
        self.held: set[tuple[str, str]] = set()  # (from, to): nothing arrives until it is let go
        self._arrivals: dict[tuple[str, str], float] = {}
        self._waiting: dict[tuple[str, str], list[tuple[Any, ...]]] = {}

    def carry(self, sender: MemoryLinks, target: Peer, kind: Kind, body: bytes) -> None:
        self.frames[kind] += 1
        way = (sender.me.name, target.name)
        if way in self.held:
            self._waiting.setdefault(way, []).append((sender, target, kind, body))
        elif self.delay is None:
            super().carry(sender, target, kind, body)
        else:
            loop = asyncio.get_running_loop()
            at = max(loop.time() + self.delay(), self._arrivals.get(way, 0.0) + 1e-6)
            self._arrivals[way] = at
            loop.call_at(at, super().carry, sender, target, kind, body)

    def hold(self, sender: str, target: str) -> None:
        """Let nothing from one node to another arrive for now."""
        self.held.add((sender, target))

    def let_go(self, sender: str, target: str) -> None:
        """Let all arrive that was held."""
        self.held.discard((sender, target))
        for sending, peer, kind, body in self._waiting.pop((sender, target), []):
            super().carry(sending, peer, kind, body)


class Cluster:
    """Nodes by number, from 0."""

    def __init__(self) -> None:
        self.net = Wires()
        self.worlds: list[Friends] = []
        self.storages: list[Storage] = []

    def __getitem__(self, index: int) -> Friends:
        return self.worlds[index]

    async def add(self, url: str, folder: Path, *, strict: bool = False) -> Friends:
        """One more node, with a storage of its own on the same database."""
        name = NAMES[len(self.worlds)]
        storage = Storage(url, data_dir=folder, commit_interval=0.001)
        await storage.open()
        self.storages.append(storage)
        links, calls = self.net.add(name)
        world = Friends(storage, Place(f"xmppd@{name}", self.net.owner(name), links, calls), strict=strict)
        PlainReplica(world.table, links)
        self.worlds.append(world)
        return world

    def node(self, index: int) -> bytes:
        return self.net.node(NAMES[index])

    def owner(self, index: int) -> Owner:
        return self.net.owner(NAMES[index])

    async def load(self, **modules: Any) -> None:
        """The same modules on all nodes."""
        for world in self.worlds:
            await world.load(**modules)

    async def calm(self) -> None:
        """Until nothing is on its way between nodes and no stanza waits on one."""
        quiet = 0
        while quiet < 3:
            before = sum(self.net.frames.values())
            for world in self.worlds:
                await world.quiet()
                await world.place.calls.barrier() if world.place else None
            for _ in range(5):
                await asyncio.sleep(0)
            after = sum(self.net.frames.values())
            # The barriers themselves: a question and an answer for each pair.
            barriers = 2 * len(self.worlds) * (len(self.worlds) - 1)
            quiet = quiet + 1 if after - before <= barriers else 0

    def sweep(self) -> None:
        for world in self.worlds:
            world.sweep()

    def alone_again(self) -> None:
        """Forget every session and account, so that another test can be run in the same place."""
        for world in self.worlds:
            for session in list(world.manager.local()):
                session.close(clean=True)  # type: ignore[attr-defined]

    async def close(self) -> None:
        self.net.held.clear()
        for world in self.worlds:
            await world.close()
        await self.net.close()
        for storage in self.storages:
            await storage.close()


@asynccontextmanager
async def cluster(count: int, url: str, folder: Path, *, strict: bool = False) -> AsyncIterator[Cluster]:
    """That many nodes which see each other."""
    made = Cluster()
    try:
        for _ in range(count):
            await made.add(url, folder, strict=strict)
        await made.net.all_up()
        yield made
    finally:
        await made.close()
