"""A cluster in one event loop: links and calls of several nodes, with cuts and deaths on demand.

async with Net() as net:
    links, calls = net.add("one")
    net.add("two")
    await net.all_up()
    net.cut("one", "two")
"""

import asyncio
import uuid
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from xmppd.cluster.calls import NodeCalls
from xmppd.cluster.interfaces import Kind, Links, Peer
from xmppd.cluster.tables import Owner

VERSION = "0.1.0"


class MemoryLinks:
    """Frames go by call_soon, each once and in order, while both ends see each other."""

    def __init__(self, net: "Net", peer: Peer) -> None:
        self.net, self.me = net, peer
        self._peers: dict[bytes, Peer] = {}
        self._handlers: dict[Kind, Callable[[Peer, bytes], None]] = {}
        self._on_up: list[Callable[[Peer], None]] = []
        self._on_down: list[Callable[[Peer, str], None]] = []

    @property
    def peers(self) -> Mapping[bytes, Peer]:
        return self._peers

    def on(self, kind: Kind, handler: Callable[[Peer, bytes], None]) -> None:
        assert kind not in self._handlers
        self._handlers[kind] = handler

    def on_up(self, handler: Callable[[Peer], None]) -> None:
        self._on_up.append(handler)

    def on_down(self, handler: Callable[[Peer, str], None]) -> None:
        self._on_down.append(handler)

    def send(self, node: bytes, kind: Kind, body: bytes) -> bool:
        peer = self._peers.get(node)
        if peer is None:
            return False
        asyncio.get_running_loop().call_soon(self.net.carry, self, peer, kind, bytes(body))
        return True

    def send_all(self, kind: Kind, body: bytes) -> None:
        for node in list(self._peers):
            self.send(node, kind, body)

    def up(self, peer: Peer) -> None:
        if peer.node not in self._peers:
            self._peers[peer.node] = peer
            for handler in self._on_up:
                handler(peer)

    def down(self, peer: Peer, reason: str) -> None:
        if self._peers.pop(peer.node, None) is not None:
            for handler in self._on_down:
                handler(peer, reason)

    def receive(self, peer: Peer, kind: Kind, body: bytes) -> None:
        if self._peers.get(peer.node) is peer and kind in self._handlers:
            self._handlers[kind](peer, body)


class Net:
    """Nodes by name. A pair that is cut is joined through a third node that sees both, if there is one."""

    def __init__(self) -> None:
        self.nodes: dict[str, tuple[Any, NodeCalls]] = {}
        self._ids: dict[str, uuid.UUID] = {}
        self._incarnations: dict[str, int] = {}
        self._cuts: set[frozenset[str]] = set()

    def add(self, name: str) -> tuple[Links, NodeCalls]:
        """A node that sees the others from the next turn of the loop on: register handlers before. The same name
        again, after `kill`, is the same node with a newer incarnation."""
        assert name not in self.nodes
        node = self._ids.setdefault(name, uuid.uuid4())
        self._incarnations[name] = self._incarnations.get(name, 0) + 1
        owner = Owner(node.bytes, 0, self._incarnations[name])
        links = self.make_links(owner, name)
        calls = NodeCalls(links)
        self.nodes[name] = (links, calls)
        asyncio.get_running_loop().call_soon(self.look)
        return links, calls

    def make_links(self, owner: Owner, name: str) -> MemoryLinks:
        return MemoryLinks(self, Peer(owner, name, VERSION, 1))

    def owner(self, name: str) -> Owner:
        return self.nodes[name][0].me.owner

    def node(self, name: str) -> bytes:
        """The UUID of a node, alive or not."""
        return self._ids[name].bytes

    def cut(self, one: str, other: str) -> None:
        """Nothing goes between these two directly any more."""
        self._cuts.add(frozenset((one, other)))
        asyncio.get_running_loop().call_soon(self.look)

    def heal(self, one: str | None = None, other: str | None = None) -> None:
        """The cut between two, or all cuts, end."""
        if one is None or other is None:
            self._cuts.clear()
        else:
            self._cuts.discard(frozenset((one, other)))
        asyncio.get_running_loop().call_soon(self.look)

    def kill(self, name: str) -> None:
        """The process is gone, without a word."""
        links, _ = self.nodes.pop(name)
        for other, _ in self.nodes.values():
            other.down(links.me, "killed")

    async def all_up(self, timeout: float = 10.0) -> None:
        """Wait until all who live see each other."""
        await self.until(
            lambda: all(len(links.peers) == len(self.nodes) - 1 for links, _ in self.nodes.values()), timeout
        )

    async def until(self, condition: Callable[[], Any], timeout: float = 10.0) -> None:
        """Wait until it holds."""
        async with asyncio.timeout(timeout):
            while not condition():  # noqa: ASYNC110 - nothing tells us
                await asyncio.sleep(0.002)

    async def close(self) -> None:
        for _, calls in self.nodes.values():
            await calls.close()

    async def __aenter__(self) -> "Net":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    def carry(self, sender: MemoryLinks, target: Peer, kind: Kind, body: bytes) -> None:
        found = self.nodes.get(target.name)
        if found is not None and found[0].me is target:
            found[0].receive(sender.me, kind, body)

    def look(self) -> None:
        for links, _ in list(self.nodes.values()):
            for other, _ in list(self.nodes.values()):
                if links is other:
                    continue
                if self._joined(links.me.name, other.me.name):
                    links.up(other.me)
                else:
                    links.down(other.me, "silent")

    def _joined(self, one: str, other: str) -> bool:
        def direct(a: str, b: str) -> bool:
            return frozenset((a, b)) not in self._cuts

        return direct(one, other) or any(
            direct(one, third) and direct(third, other) for third in self.nodes if third not in (one, other)
        )
