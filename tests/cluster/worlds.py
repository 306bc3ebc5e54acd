"""Several nodes without sockets on one database: the worlds of tests/modules, joined by links in memory."""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.cluster.memory_net import MemoryLinks, Net
from tests.modules.friends import Friends
from tests.modules.world import Place
from xmppd.cluster.interfaces import Kind, Links, Peer
from xmppd.cluster.replica import Replica
from xmppd.cluster.tables import Owner, SessionTable
from xmppd.events import NodeDown, NodeSynced, NodeUp
from xmppd.storage import Storage

NAMES = ("one", "two", "three")


def replicate(table: SessionTable, links: Links, owner: Owner) -> Replica:
    """Carry a table from and to the other nodes."""
    loop = asyncio.get_running_loop()
    replica = Replica(links, owner, [table], call_soon=loop.call_soon, call_later=loop.call_later)
    replica.start()
    return replica


class Wires(Net):
    """Links with a delay: what one node sends to another arrives in order, at a pace of its own. Frames are counted."""

    def __init__(self) -> None:
        super().__init__()
        self.frames: Counter[Kind] = Counter()
        self.delay: Callable[[], float] | None = None  # seconds
        self.held: set[tuple[str, str]] = set()  # (from, to): nothing arrives until it is let go
        self._arrivals: dict[tuple[str, str], float] = {}
        self._under_way: dict[tuple[str, str], deque[tuple[Any, ...]]] = {}
        self._waiting: dict[tuple[str, str], list[tuple[Any, ...]]] = {}

    def carry(self, sender: MemoryLinks, target: Peer, kind: Kind, body: bytes) -> None:
        self.frames[kind] += 1
        way = (sender.me.name, target.name)
        if way in self.held:
            self._waiting.setdefault(way, []).append((sender, target, kind, body))
        else:
            under_way = self._under_way.setdefault(way, deque())
            if self.delay is None and not under_way:  # what is due has not yet arrived while the loop is busy
                super().carry(sender, target, kind, body)
            else:
                loop = asyncio.get_running_loop()
                at = max(loop.time() + (self.delay() if self.delay else 0.0), self._arrivals.get(way, 0.0))
                self._arrivals[way] = at
                under_way.append((sender, target, kind, body))
                loop.call_at(at, self._arrive, under_way)

    def _arrive(self, under_way: deque[tuple[Any, ...]]) -> None:
        """The first that is under way, whichever timer it was."""
        super().carry(*under_way.popleft())

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
        self.replicas: list[Replica] = []

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
        replica = replicate(world.table, links, self.net.owner(name))
        links.on_up(lambda peer: world.hooks.notify(NodeUp(peer.name, peer.node)) and None)
        links.on_down(lambda peer, reason: world.hooks.notify(NodeDown(peer.name, peer.node, reason)) and None)
        replica.on_exchanged.append(lambda peer: world.hooks.notify(NodeSynced(peer.name, peer.node)) and None)
        self.replicas.append(replica)
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

    async def synced(self) -> None:
        """Until every node that lives has the rows of all others it sees."""
        await self.net.until(
            lambda: all(
                replica.synced(node)
                for world, replica in zip(self.worlds, self.replicas, strict=True)
                if world.place is not None and world.place.name.partition("@")[2] in self.net.nodes
                for node in world.place.links.peers
            )
        )

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
        """End every session, so that another test can be run in the same place."""
        for world in self.worlds:
            for session in list(world.manager.local()):
                session.close(clean=True)  # type: ignore[attr-defined]

    async def close(self) -> None:
        self.net.held.clear()
        for replica in self.replicas:
            replica.stop()
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
        await made.synced()
        yield made
    finally:
        await made.close()
