"""A simulated network with a clock of its own: nothing waits, and the same seed gives the same run."""

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from xmppd.cluster.interfaces import Kind, Peer
from xmppd.cluster.link_types import Settings
from xmppd.cluster.links import LinkSet
from xmppd.cluster.tables import Owner

CLUSTER = b"c" * 16


class Handle:
    """A timer."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class Clock:
    """Time that passes when it is told to; the part of an event loop that links need."""

    def __init__(self) -> None:
        self._now = 1000.0
        self._order = itertools.count()
        self._heap: list[tuple[float, int, Handle]] = []

    def time(self) -> float:
        return self._now

    def call_later(self, delay: float, callback: Callable[[], None]) -> Handle:
        handle = Handle(callback)
        heapq.heappush(self._heap, (self._now + max(0.0, delay), next(self._order), handle))
        return handle

    def call_soon(self, callback: Callable[[], None]) -> Handle:
        return self.call_later(0.0, callback)

    def run(self, seconds: float) -> None:
        """Everything that happens in the next so many seconds."""
        end = self._now + seconds
        while self._heap and self._heap[0][0] <= end:
            at, _, handle = heapq.heappop(self._heap)
            self._now = max(self._now, at)
            if handle.callback is not None:
                handle.callback()
        self._now = end

    def freeze(self, seconds: float) -> None:
        """Time passes and nobody runs, as when the machine sleeps."""
        self._now += seconds


@dataclass
class Weather:
    """What the network does to packets; times in seconds, chances from 0 to 1."""

    delay: float = 0.001
    jitter: float = 0.0
    loss: float = 0.0
    twice: float = 0.0


class SimTransport:
    """One process's hold on the network (interfaces.Transport)."""

    max_packet = 64 * 1024
    connected = True

    def __init__(self, net: "Sim", name: str) -> None:
        self.net, self.name = net, name
        self.on_packet: Callable[[bytes], None] = lambda packet: None
        self.on_gap: Callable[[], None] = lambda: None
        self.on_suspect: Callable[[bytes], None] = lambda node: None
        self.sent = 0

    def send(self, node: bytes, packet: bytes) -> None:
        assert isinstance(packet, bytes)
        assert len(packet) <= self.max_packet
        self.sent += 1
        self.net.carry(self, node, packet)


@dataclass
class Node:
    """One process: its links and what its handlers saw, epoch by epoch of each peer."""

    name: str
    links: LinkSet
    transport: SimTransport
    ups: list[str] = field(default_factory=list)
    downs: list[tuple[str, str]] = field(default_factory=list)
    got: dict[bytes, list[list[bytes]]] = field(default_factory=dict)  # peer -> per epoch the bodies in order
    sent: dict[bytes, list[list[bytes]]] = field(default_factory=dict)
    epochs: dict[bytes, list[str]] = field(default_factory=dict)

    def up(self, peer: Peer) -> None:
        self.ups.append(peer.name)
        self.got.setdefault(peer.node, []).append([])
        self.sent.setdefault(peer.node, []).append([])
        status = next(status for status in self.links.status() if status.node == peer.node)
        self.epochs.setdefault(peer.node, []).append(f"{peer.owner.incarnation}:{status.epoch}")

    def down(self, peer: Peer, reason: str) -> None:
        assert peer.node not in self.links.peers
        self.downs.append((peer.name, reason))

    def frame(self, peer: Peer, body: bytes) -> None:
        assert self.links.peers[peer.node] is peer
        self.got[peer.node][-1].append(body)

    def send(self, node: bytes, body: bytes) -> bool:
        if not self.links.send(node, Kind.STANZA, body):
            return False
        self.sent[node][-1].append(body)
        return True

    def seen(self, node: bytes) -> list[bytes]:
        """All bodies from that node."""
        return [body for epoch in self.got.get(node, []) for body in epoch]


class Sim:
    """Nodes by name on one network."""

    def __init__(self, seed: int = 0, *, settings: Settings | None = None, weather: Weather | None = None) -> None:
        self.clock = Clock()
        self.random = random.Random(seed)
        self.settings = settings or Settings()
        self.weather = weather or Weather()
        self.nodes: dict[str, Node] = {}
        self.cuts: set[tuple[str, str]] = set()  # from, to
        self.packets = 0
        self._incarnations: dict[str, int] = {}
        self._names: list[str] = []

    def id(self, name: str) -> bytes:
        return name.encode().ljust(16, b"\0")

    def add(self, *names: str, **changes: object) -> list[Node]:
        """Start these nodes; those that were there before come back with a newer incarnation. All are members."""
        added = []
        for name in names:
            self._incarnations[name] = self._incarnations.get(name, 0) + 1
            if name not in self._names:
                self._names.append(name)
            owner = Owner(self.id(name), 0, self._incarnations[name])
            links = LinkSet(owner, name, "0.1.0", CLUSTER, self.clock, settings=self.settings, **changes)
            node = Node(name, links, SimTransport(self, name))
            links.on(Kind.STANZA, node.frame)
            links.on_up(node.up)
            links.on_down(node.down)
            links.attach(node.transport)
            self.nodes[name] = node
            added.append(node)
        for node in self.nodes.values():
            node.links.set_members(self.id(name) for name in self._names)
        return added

    def kill(self, name: str, *, noticed: bool = True) -> Node:
        """The process is gone; `noticed`: the transport tells the others so."""
        node = self.nodes.pop(name)
        node.links.detach()
        node.links.stop()
        node.downs.clear()
        if noticed:
            for other in self.nodes.values():
                other.transport.on_suspect(self.id(name))
        return node

    def cut(self, one: str, other: str, *, both: bool = True) -> None:
        self.cuts.add((one, other))
        if both:
            self.cuts.add((other, one))

    def heal(self) -> None:
        self.cuts.clear()

    def carry(self, transport: SimTransport, to: bytes, packet: bytes) -> None:
        sender = self.nodes.get(transport.name)
        if sender is None or sender.transport is not transport:
            return  # the last words of a process that was killed
        name = to.rstrip(b"\0").decode()
        weather = self.weather
        self.packets += 1
        if (transport.name, name) in self.cuts or self.random.random() < weather.loss:
            return
        for _ in range(1 + (self.random.random() < weather.twice)):
            delay = weather.delay + self.random.random() * weather.jitter
            self.clock.call_later(delay, lambda: self._arrive(name, packet))

    def _arrive(self, name: str, packet: bytes) -> None:
        node = self.nodes.get(name)
        if node is not None:
            node.transport.on_packet(packet)

    def run(self, seconds: float) -> None:
        self.clock.run(seconds)

    def all_up(self) -> bool:
        return all(len(node.links.peers) == len(self.nodes) - 1 for node in self.nodes.values())

    def run_until(self, condition: Callable[[], object], limit: float = 60.0) -> float:
        """How long it took."""
        start = self.clock.time()
        while not condition():
            assert self.clock.time() - start < limit, "it never came true"
            self.clock.run(0.01)
        return self.clock.time() - start
