"""A cluster on paper: links that keep their promise and nothing more, one event at a time in an order that a seed says.

A link is up at one end before it is at the other. When it goes down, what was sent last may have arrived or not, and
one end hears of it long before the other. Time passes when the test says so.
"""

import heapq
import random
from collections import deque
from collections.abc import Callable, Mapping
from itertools import count

from xmppd.cluster.interfaces import Kind, Peer
from xmppd.cluster.shared import Owner

TICK = 0.0005  # seconds between two looks at the clock


class SimLinks:
    """One process's end of all its links."""

    def __init__(self, net: "SimNet", peer: Peer) -> None:
        self.net, self.me, self.alive = net, peer, True
        self._peers: dict[bytes, Peer] = {}
        self.handlers: dict[Kind, Callable[[Peer, bytes], None]] = {}
        self.ups: list[Callable[[Peer], None]] = []
        self.downs: list[Callable[[Peer, str], None]] = []

    @property
    def peers(self) -> Mapping[bytes, Peer]:
        return self._peers

    def on(self, kind: Kind, handler: Callable[[Peer, bytes], None]) -> None:
        assert kind not in self.handlers
        self.handlers[kind] = handler

    def on_up(self, handler: Callable[[Peer], None]) -> None:
        self.ups.append(handler)

    def on_down(self, handler: Callable[[Peer, str], None]) -> None:
        self.downs.append(handler)

    def send(self, node: bytes, kind: Kind, body: bytes) -> bool:
        if node not in self._peers:
            return False
        self.net.link(self.me.node, node).send(self, kind, body)
        return True

    def send_all(self, kind: Kind, body: bytes) -> None:
        for node in list(self._peers):
            self.send(node, kind, body)


class Link:
    """Both ends of one epoch between two processes."""

    def __init__(self, one: SimLinks, other: SimLinks) -> None:
        self.ends = (one, other)
        self.frames: dict[SimLinks, deque[tuple[Kind, bytes]]] = {one: deque(), other: deque()}  # by receiver
        self.up: set[SimLinks] = set()
        self.down: set[SimLinks] = set()
        self.cut = False

    def other(self, end: SimLinks) -> SimLinks:
        return self.ends[1] if end is self.ends[0] else self.ends[0]

    def send(self, sender: SimLinks, kind: Kind, body: bytes) -> None:
        if not self.cut:
            self.frames[self.other(sender)].append((kind, body))

    def events(self) -> list[Callable[[], None]]:
        found: list[Callable[[], None]] = []
        for end in self.ends:
            if not end.alive or end in self.down:
                continue
            if end not in self.up:
                found.append((lambda end=end: self._go_down(end)) if self.cut else (lambda end=end: self._go_up(end)))
            else:
                if self.frames[end]:
                    found.append(lambda end=end: self._deliver(end))
                if self.cut:
                    found.append(lambda end=end: self._go_down(end))
        return found

    @property
    def over(self) -> bool:
        return self.cut and all(end in self.down or not end.alive for end in self.ends)

    def _go_up(self, end: SimLinks) -> None:
        self.up.add(end)
        peer = self.other(end).me
        end._peers[peer.node] = peer
        for handler in end.ups:
            handler(peer)

    def _go_down(self, end: SimLinks) -> None:
        self.down.add(end)
        if end in self.up:
            peer = end._peers.pop(self.other(end).me.node)
            for handler in end.downs:
                handler(peer, "silent")

    def _deliver(self, end: SimLinks) -> None:
        kind, body = self.frames[end].popleft()
        try:
            end.handlers[kind](self.other(end).me, body)
        except Exception as exc:  # as links do: the frame is lost
            end.net.crashes.append(exc)


class SimNet:
    """Processes by node, the links between them, and what else is to happen."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.crashes: list[Exception] = []  # of handlers
        self.processes: dict[bytes, SimLinks] = {}
        self._links: dict[frozenset[bytes], Link] = {}
        self._separate: set[frozenset[bytes]] = set()
        self._soon: list[tuple[SimLinks, deque[Callable[[], None]]]] = []
        self._timers: list[tuple[float, int, SimLinks, Callable[[], None]]] = []
        self._numbers = count()

    # -- what a process is handed in

    def start(self, owner: Owner, name: str) -> SimLinks:
        links = SimLinks(self, Peer(owner, name, "0.1.0", 1))
        self.processes[owner.member] = links
        self._soon.append((links, deque()))
        return links

    def clock(self) -> float:
        self.now += TICK
        return self.now

    def call_soon(self, links: SimLinks, function: Callable[[], None]) -> None:
        next(queue for process, queue in self._soon if process is links).append(function)

    def call_later(self, links: SimLinks, delay: float, function: Callable[[], None]) -> "SimTimer":
        timer = SimTimer(function)
        heapq.heappush(self._timers, (self.now + delay, next(self._numbers), links, timer.run))
        return timer

    def link(self, one: bytes, other: bytes) -> Link:
        return self._links[frozenset((one, other))]

    # -- what happens to it

    def kill(self, node: bytes) -> None:
        links = self.processes.pop(node)
        links.alive = False
        for pair, link in self._links.items():
            if node in pair:
                self._break(link)

    def cut(self, one: bytes, other: bytes) -> None:
        pair = frozenset((one, other))
        self._separate.add(pair)
        if pair in self._links:
            self._break(self._links[pair])

    def heal(self, one: bytes, other: bytes) -> None:
        self._separate.discard(frozenset((one, other)))

    def heal_all(self) -> None:
        self._separate.clear()

    def lose(self) -> None:
        """One frame is lost: its handler crashed, as far as anybody can tell."""
        queues = [queue for link in self._links.values() for queue in link.frames.values() if queue]
        if queues:
            queue = self.random.choice(queues)
            del queue[self.random.randrange(len(queue))]

    def steps(self, most: int) -> None:
        """So many events, or fewer when nothing is left to happen now."""
        for _ in range(most):
            events = self._events()
            if not events:
                return
            self.random.choice(events)()

    def settle(self) -> None:
        """Everything that happens without more time."""
        while events := self._events():
            self.random.choice(events)()

    def wait(self, seconds: float) -> None:
        """Let time pass, and everything happen that is due by then."""
        end = self.now + seconds
        self.settle()
        while self._timers and self._timers[0][0] <= end:
            self.now = max(self.now, self._timers[0][0])
            self._run_timers()
            self.settle()
        self.now = max(self.now, end)

    def _events(self) -> list[Callable[[], None]]:
        self._connect()
        found = [queue.popleft for links, queue in self._soon if queue and links.alive]
        events: list[Callable[[], None]] = [lambda take=take: take()() for take in found]
        for link in self._links.values():
            events += link.events()
        return events

    def _run_timers(self) -> None:
        while self._timers and self._timers[0][0] <= self.now:
            _, _, links, run = heapq.heappop(self._timers)
            if links.alive:
                run()

    def _connect(self) -> None:
        for pair in [pair for pair, link in self._links.items() if link.over]:
            del self._links[pair]
        nodes = list(self.processes)
        for index, one in enumerate(nodes):
            for other in nodes[index + 1 :]:
                pair = frozenset((one, other))
                if pair not in self._links and pair not in self._separate:
                    self._links[pair] = Link(self.processes[one], self.processes[other])

    def _break(self, link: Link) -> None:
        if not link.cut:
            link.cut = True
            for queue in link.frames.values():
                arrived = self.random.randint(0, len(queue))
                while len(queue) > arrived:
                    queue.pop()


class SimTimer:
    def __init__(self, function: Callable[[], None]) -> None:
        self._function: Callable[[], None] | None = function

    def cancel(self) -> None:
        self._function = None

    def run(self) -> None:
        if self._function is not None:
            self._function()
