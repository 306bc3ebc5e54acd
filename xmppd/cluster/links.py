"""All links of this node over one transport: timers, batches per turn of the loop, relaying for others, handlers.

`LinkSet` fulfils interfaces.Links. Times come from the clock and the timers that are handed in, so that tests run it
on a simulated network.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from math import inf
from types import MappingProxyType
from typing import Any, Final, Protocol

from xmppd.cluster.frames import FrameError, Header, read_header, relayed, strange_version
from xmppd.cluster.interfaces import Kind, Peer, Transport
from xmppd.cluster.link import Link
from xmppd.cluster.link_status import LinkCounters, LinkStatus, status_of
from xmppd.cluster.link_types import Down, Event, Farewell, Incompatible, Local, Settings, State, Up, Way
from xmppd.cluster.tables import Owner
from xmppd.cluster.ways import Ways
from xmppd.log import get_logger
from xmppd.metrics import add

MAX_HOPS: Final = 2
_PAUSE: Final = 0.5  # seconds a timer may be late before it means that this process stood still
_MAX_KIND: Final = 127
_HOLD: Final = 0.005  # seconds that frames wait for company while every turn of the loop brings more of them
_SHORTEST: Final = 0.001  # seconds of a timer: event loops count in milliseconds

_log = get_logger("cluster")


class Timer(Protocol):
    """What `call_later` gives back."""

    def cancel(self) -> None: ...


class Timers(Protocol):
    """The part of an event loop that links need."""

    def time(self) -> float: ...
    def call_later(self, delay: float, callback: Callable[[], None], /) -> Timer: ...
    def call_soon(self, callback: Callable[[], None], /) -> Any: ...


class LinkSet:
    """The links to all other members (interfaces.Links).

    Without a transport, or while no member is named, there are simply no peers. `is_member` is asked for nodes that
    send to us or through us and were not named with `set_members` (yet).
    """

    def __init__(
        self,
        owner: Owner,
        name: str,
        version: str,
        cluster: bytes,
        loop: Timers,
        *,
        is_member: Callable[[bytes], bool] = lambda node: False,
        settings: Settings | None = None,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.counters = LinkCounters()
        self._settings = settings or Settings()
        self._local = Local(
            owner,
            name,
            version,
            cluster,
            self._settings,
            self._settings.max_packet,
            self._lost,
            self._relays,
            self._reaches,
        )
        self._loop = loop
        self._wall = wall
        self._is_member = is_member
        self._transport: Transport | None = None
        self._links: dict[bytes, Link] = {}
        self._up: dict[bytes, Link] = {}
        self._peers: dict[bytes, Peer] = {}
        self._ways = Ways(loop, lambda node: self._peers[node].name if node in self._peers else node.hex())
        self._handlers: list[Callable[[Peer, bytes], None] | None] = [None] * (_MAX_KIND + 1)
        self._on_up: list[Callable[[Peer], None]] = []
        self._on_down: list[Callable[[Peer, str], None]] = []
        self._dirty: list[Link] = []
        self._soon = False  # a flush is scheduled
        self._frames = 0  # queued since the start
        self._frames_seen = 0  # of them, when we last looked
        self._flush_by = 0.0  # whatever comes meanwhile
        self._timer: Timer | None = None
        self._due = inf  # when the timer goes off
        self._told: set[tuple[bytes, int]] = set()  # (node, version) of which the log knows that we cannot talk
        self._stopped = False
        self._farewells: dict[bytes, Farewell] = {}  # that may not have come yet

    # interfaces.Links

    @property
    def peers(self) -> Mapping[bytes, Peer]:
        """Those that are up, by node."""
        return MappingProxyType(self._peers)

    def on(self, kind: Kind, handler: Callable[[Peer, bytes], None]) -> None:
        """The one handler of a kind of frame: a plain function; a crash is logged and the frame is lost."""
        if self._handlers[kind] is not None:
            raise ValueError(f"somebody handles {kind.name} already")
        self._handlers[kind] = handler

    def on_up(self, handler: Callable[[Peer], None]) -> None:
        """Called before any frame of that peer comes; the peer is in `peers`."""
        self._on_up.append(handler)

    def on_down(self, handler: Callable[[Peer, str], None]) -> None:
        """Called once with the reason; the peer is no longer in `peers`."""
        self._on_down.append(handler)

    def send(self, node: bytes, kind: Kind, body: bytes) -> bool:
        """Queue a frame. It leaves when a turn of the loop brings no more of them, in quiet times the next one, so that
        a busy node makes few large packets: each of them wakes up to four processes. False when that node is not up.
        ValueError when the frame is longer than the settings' `max_frame`."""
        link = self._up.get(node)
        if link is None:
            return False
        link.send(kind, body)
        self._frames += 1
        if not link.dirty:
            self._flush_soon(link)
        return True

    def send_all(self, kind: Kind, body: bytes) -> None:
        """The same to all that are up."""
        self._frames += 1
        for link in self._up.values():
            link.send(kind, body)
            if not link.dirty:
                self._flush_soon(link)

    # Who there is

    @property
    def owner(self) -> Owner:
        """This node."""
        return self._local.owner

    @property
    def transport(self) -> Transport | None:
        """What packets go over."""
        return self._transport

    def attach(self, transport: Transport) -> None:
        """Use this transport from now on."""
        self._transport = transport
        self._local.emit = transport.send
        self._local.max_packet = min(self._settings.max_packet, transport.max_packet)
        transport.on_packet = self._packet
        transport.on_gap = self._gap
        transport.on_suspect = self._suspected
        self._arm()

    def detach(self) -> None:
        """The transport is gone: nothing is sent or heard any more; peers go down when their time is over."""
        self._transport = None
        self._local.emit = self._lost

    def set_cluster(self, cluster: bytes) -> None:
        """This node belongs to another cluster now (16 bytes); links of the former one go down."""
        if cluster != self._local.cluster:
            self._close_all("it changed to another cluster")
            self._local.cluster = cluster

    def set_members(self, nodes: Iterable[bytes]) -> None:
        """The other members: those are kept in touch with. Links to others go down."""
        wanted = set(nodes) - {self._local.owner.member}
        now = self._loop.time()
        for node in [node for node in self._links if node not in wanted]:
            link = self._links[node]
            link.close("no longer a member", now)
            self._happened(link)
            del self._links[node]
        for node in wanted - self._links.keys():
            self._links[node] = Link(self._local, node, now)
        self._arm()

    def disconnect(self, node: bytes, seconds: float) -> bool:
        """Cut the link for so long, on purpose. False for a node that is no member."""
        link = self._links.get(node)
        if link is None:
            return False
        link.block(seconds, "disconnected by an operator", self._loop.time())
        self._happened(link)
        self._arm()
        return True

    def stop(self, reason: str = "stopped") -> None:
        """Say goodbye to all; nothing else is sent or heard afterwards. See `queued` for what should go out before, and
        `farewells` for how long the transport is still needed."""
        self._flush()
        self._stopped = True
        self._farewells = self._close_all(reason)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    @property
    def farewells(self) -> int:
        """Nodes that have not shown yet that they know of our stop. Some never will: do not wait long."""
        return len(self._farewells)

    @property
    def queued(self) -> int:
        """Bytes that peers which are up have not acknowledged yet."""
        return sum(link.queue_bytes for link in self._up.values())

    def queue_bytes(self, node: bytes) -> int:
        """Bytes that wait for one node: 0 when it is not up. Whoever sends much waits until this is small."""
        link = self._up.get(node)
        return 0 if link is None else link.queue_bytes

    def status(self) -> list[LinkStatus]:
        """All members by name, whether they are up or not."""
        found = [status_of(link) for link in self._links.values()]
        return sorted(found, key=lambda status: (status.peer.name if status.peer else "", status.node))

    # What the transport brings

    def _packet(self, data: bytes) -> None:
        try:
            header = read_header(data)
        except FrameError:
            return self._unreadable(data)
        if self._stopped:
            return self._after_goodbye(header)
        local = self._local
        if header.cluster != local.cluster:
            self.counters.foreign += 1
            return
        if header.target != local.owner.member:
            return self._pass_on(header, data)
        link = self._links.get(header.sender)
        now = self._loop.time()
        if link is None:
            if header.sender == local.owner.member or not self._is_member(header.sender):
                self.counters.foreign += 1
                return
            link = self._links[header.sender] = Link(local, header.sender, now)
        frames = link.receive(header, data, now)
        if link.events:
            self._happened(link)
        if frames:
            self._dispatch(link, frames)
        if not link.dirty and link.wants_flush(now):
            self._flush_soon(link)
        self._arm_for(link)

    def _after_goodbye(self, header: Header) -> None:
        farewell = self._farewells.get(header.sender)
        if farewell is not None and header.target == self._local.owner.member:
            if (header.sender_incarnation, header.sender_session) == farewell.session:
                self._local.emit(header.sender, farewell.packet)  # it was lost
            else:
                del self._farewells[header.sender]

    def _dispatch(self, link: Link, frames: list[tuple[int, bytes]]) -> None:
        peer, handlers = link.peer, self._handlers
        assert peer is not None
        for kind, body in frames:
            handler = handlers[kind]
            if handler is None:
                self.counters.unknown_frames += 1
                continue
            if self._peers.get(link.node) is not peer:
                return  # a handler cut the link: nothing of this epoch comes any more
            try:
                handler(peer, body)
            except Exception as exc:
                self.counters.handler_failures += 1
                _log.error("frame handler failed", exc=exc, kind=kind, node=peer.name)

    def _pass_on(self, header: Header, data: bytes) -> None:
        """A packet that another member cannot hand over itself."""
        target = self._up.get(header.target)
        if header.hops + 1 >= MAX_HOPS or target is None or header.sender not in self._links:
            self.counters.foreign += 1
            return
        self.counters.relayed += 1
        self._local.emit(header.target, relayed(data))

    def _unreadable(self, data: bytes) -> None:
        strange = strange_version(data)
        if strange is None or strange[0] != self._local.cluster:
            self.counters.malformed += 1
            return
        self._cannot_talk(strange[1], strange[2], "")

    def _cannot_talk(self, node: bytes, protocol: int, name: str) -> None:
        self.counters.incompatible += 1
        if (node, protocol) not in self._told and (node in self._links or self._is_member(node)):
            self._told.add((node, protocol))
            _log.warning("node speaks another protocol", node=name or node.hex(), protocol=protocol)

    def _gap(self) -> None:
        now = self._loop.time()
        for link in self._up.values():
            link.lost(now)

    def _suspected(self, node: bytes) -> None:
        link = self._up.get(node)
        # without a connection of our own no answer could come: whom to believe then?
        if link is not None and self._transport is not None and self._transport.connected:
            link.suspect(self._loop.time())
            self._arm_for(link)

    # What links ask

    def _lost(self, node: bytes, packet: bytes) -> None:
        """There is no transport."""

    def _relays(self, target: bytes) -> list[bytes]:
        now = self._loop.time()
        return [
            link.node
            for link in self._up.values()
            if target in link.reaches and link.node != target and link.direct(now)
        ]

    def unseen(self, nodes: Iterable[bytes]) -> set[bytes]:
        """Those of the nodes that are not up, or that one of the others does not reach, as far as it says. One that is
        reached through another one is not counted as reached."""
        wanted = frozenset(nodes)
        missing = set(wanted - self._peers.keys())
        for link in self._up.values():
            if link.node in wanted:
                missing |= wanted - link.reaches - {link.node}
        return missing

    def _reaches(self) -> tuple[bytes, ...]:
        now = self._loop.time()
        return tuple(link.node for link in self._up.values() if link.direct(now))

    # What happened

    def _happened(self, link: Link) -> None:
        while link.events:
            events, link.events = link.events, []
            for event in events:
                self._tell(link, event)

    def _tell(self, link: Link, event: Event) -> None:
        match event:
            case Up(peer):
                self.counters.ups += 1
                link.up_since = self._wall()
                self._up[link.node] = link
                self._peers[link.node] = peer
                _log.info("node up", node=peer.name, id=link.node.hex(), version=peer.version, epoch=link.epoch)
                self._each(self._on_up, peer)
            case Down(peer, reason, kind, lasted):
                self._went_down(link, peer, reason, kind, lasted)
            case Way(peer):
                self._ways.changed(link, peer)
            case Incompatible(beat):
                self._cannot_talk(link.node, beat.protocol, beat.name)

    def _went_down(self, link: Link, peer: Peer, reason: str, kind: str, lasted: float) -> None:
        add(self.counters.downs, kind)
        self._up.pop(link.node, None)
        self._peers.pop(link.node, None)
        self._ways.went_down(link.node)
        id, lasted_s = link.node.hex(), round(lasted, 1)
        if kind in ("goodbye", "local"):
            _log.info("node down", node=peer.name, id=id, reason=reason, lasted_s=lasted_s)
        else:
            _log.warning("node down", node=peer.name, id=id, reason=reason, lasted_s=lasted_s)
        self._each(self._on_down, peer, reason)

    def _each(self, handlers: list[Callable[..., None]], *arguments: Any) -> None:
        for handler in handlers:
            try:
                handler(*arguments)
            except Exception as exc:
                self.counters.handler_failures += 1
                _log.error("link handler failed", exc=exc, node=arguments[0].name)

    def _close_all(self, reason: str) -> dict[bytes, Farewell]:
        now = self._loop.time()
        farewells = {}
        for link in list(self._links.values()):
            if (farewell := link.close(reason, now)) is not None:
                farewells[link.node] = farewell
            self._happened(link)
        return farewells

    # Time

    def _flush_soon(self, link: Link) -> None:
        link.dirty = True
        self._dirty.append(link)
        if not self._soon:
            self._soon = True
            self._frames_seen = -1
            self._flush_by = self._loop.time() + _HOLD
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        """A turn of the loop is over."""
        if self._frames != self._frames_seen and self._loop.time() < self._flush_by and not self._stopped:
            self._frames_seen = self._frames
            self._loop.call_soon(self._turn)
        else:
            self._flush()

    def _flush(self) -> None:
        self._soon = False
        if self._stopped:
            return
        dirty, self._dirty = self._dirty, []
        now = self._loop.time()
        for link in dirty:
            link.dirty = False
            if link.state is State.UP:
                link.flush(now)
            if link.events:
                self._happened(link)
            self._arm_for(link)

    def _arm_for(self, link: Link) -> None:
        due = link.deadline()
        if due < self._due:
            self._set_timer(due)

    def _arm(self) -> None:
        self._set_timer(min((link.deadline() for link in self._links.values()), default=inf))

    def _set_timer(self, due: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._due = due
        if due < inf and not self._stopped:
            self._timer = self._loop.call_later(max(_SHORTEST, due - self._loop.time()), self._tick)

    def _tick(self) -> None:
        now = self._loop.time()
        late = now - self._due
        self._timer = None
        self._due = inf
        for link in list(self._links.values()):
            if late > _PAUSE:
                link.paused(late)
            if link.deadline() <= now:
                link.tick(now)
            if link.events:
                self._happened(link)
        self._arm()
