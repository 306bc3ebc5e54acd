"""The same as memory_net.Net with the real links: LinkSets over packets in memory, in one event loop.

Times are short, so that a silent cut is noticed within a second.
"""

import asyncio
from collections.abc import Callable

from tests.cluster.memory_net import VERSION, Net
from xmppd.cluster.calls import NodeCalls
from xmppd.cluster.link_types import Settings
from xmppd.cluster.links import LinkSet
from xmppd.cluster.tables import Owner

CLUSTER = b"c" * 16
SETTINGS = Settings(heartbeat=0.1, peer_timeout=0.6, suspect=0.2)


class MemoryTransport:
    """One process's hold on the network (interfaces.Transport). `eats`: packets it loses of those that come."""

    max_packet = 1024 * 1024

    def __init__(self, net: "LinkNet", name: str) -> None:
        self.net, self.name = net, name
        self.connected = True
        self.eats: Callable[[bytes], bool] = lambda packet: False
        self.on_packet: Callable[[bytes], None] = lambda packet: None
        self.on_gap: Callable[[], None] = lambda: None
        self.on_suspect: Callable[[bytes], None] = lambda node: None

    def send(self, node: bytes, packet: bytes) -> None:
        if self.connected:
            asyncio.get_running_loop().call_soon(self.net.hand, self.name, node, packet)


class LinkNet(Net):
    """Nodes by name; what goes through a third is relayed by it."""

    def __init__(self, settings: Settings = SETTINGS) -> None:
        super().__init__()
        self.settings = settings
        self.transports: dict[bytes, MemoryTransport] = {}

    def add(self, name: str) -> tuple[LinkSet, NodeCalls]:
        links, calls = super().add(name)
        assert isinstance(links, LinkSet)
        members = [node.bytes for node in self._ids.values()]
        transport = self.transports[links.owner.member] = MemoryTransport(self, name)
        links.attach(transport)
        for other, _ in self.nodes.values():
            other.set_members(members)
        return links, calls

    def make_links(self, owner: Owner, name: str) -> LinkSet:
        return LinkSet(owner, name, VERSION, CLUSTER, asyncio.get_running_loop(), settings=self.settings)

    def owner(self, name: str) -> Owner:
        return self.nodes[name][0].owner

    def kill(self, name: str) -> None:
        """The process is gone, without a word; the transport of the others notices."""
        links, _ = self.nodes.pop(name)
        node = links.owner.member
        self.transports.pop(node).connected = False
        links.detach()
        for transport in self.transports.values():
            transport.on_suspect(node)

    def hand(self, sender: str, node: bytes, packet: bytes) -> None:
        transport = self.transports.get(node)
        if transport is None or not transport.connected or transport.eats(packet):
            return
        if frozenset((sender, transport.name)) not in self._cuts:
            transport.on_packet(packet)

    async def close(self) -> None:
        await super().close()
        for links, _ in self.nodes.values():
            links.stop()

    def look(self) -> None:
        """Links find out by themselves."""
