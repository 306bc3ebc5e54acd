"""`watch`: what happens in the cluster, as it happens.

Nothing is collected while nobody watches. The node that is asked tells the others that it wants their events; each
casts those of its own sessions to whoever wants them, once per turn of the loop. Nodes that come and go are seen from
the links of the node that is asked.

    watch.want   bool                                     from now on, or no more
    watch.event  [[time, event, node, jid, detail], ...]
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable
from datetime import UTC, datetime
from itertools import islice
from typing import Any, Final, NamedTuple

from xmppd.admin.registry import Arg, Call, UsageError, command
from xmppd.admin.results import List, Tuple, string
from xmppd.cluster.interfaces import Calls, Links, Peer
from xmppd.cluster.tables import Owner, SessionRow, SessionTable
from xmppd.errors import CommandError, JidError
from xmppd.events import SessionBound, SessionClosed
from xmppd.hooks import Hooks
from xmppd.protocol.jid import parse

ALIVE: Final = 10.0  # seconds of silence until a sign of life
WAITING: Final = 10_000  # events a slow watcher may be behind; then the oldest are lost, which it is told
BATCH: Final = 500  # events in one cast
LONGEST: Final = 30  # seconds that whoever cannot take an answer without an end may watch

_OWNER: Final = "watch"  # of its hooks
_WANT, _EVENT = "watch.want", "watch.event"


class Event(NamedTuple):
    """One line: when (RFC 3339, UTC), what, on which node, which full JID (or none), and more about it."""

    time: str
    event: str  # node_up, node_down, session_opened, session_closed, lost
    node: str
    jid: str = ""
    detail: str = ""


class Filter:
    """Events of a host, a user or one session; those without a JID always pass."""

    def __init__(self, text: str) -> None:
        """Raises JidError."""
        self._wanted = parse(text) if text else None

    def passes(self, event: Event) -> bool:
        wanted = self._wanted
        if wanted is None or not event.jid:
            return True
        bare, slash, _ = event.jid.partition("/")
        if wanted.resource or wanted.local:
            return event.jid == wanted.full if wanted.resource else bare == wanted.bare
        return bool(slash) and bare.partition("@")[2] == wanted.domain


class _Watcher:
    def __init__(self, passes: Callable[[Event], bool]) -> None:
        self.passes = passes
        self.events: deque[Event] = deque()
        self.lost = 0
        self.changed = asyncio.Event()

    def tell(self, event: Event) -> None:
        if not self.passes(event):
            return
        if len(self.events) >= WAITING:
            self.events.popleft()
            self.lost += 1
        self.events.append(event)
        self.changed.set()


class Watch:
    """The events of a node, and of the others while somebody here watches."""

    def __init__(self, *, node: str, hooks: Hooks, clock: Callable[[], float] = time.time) -> None:
        self._node = node
        self._hooks = hooks
        self._clock = clock
        self._watchers: list[_Watcher] = []
        self._wanted_by: set[bytes] = set()
        self._links: Links | None = None
        self._calls: Calls | None = None
        self._casting: list[Event] = []
        self._listening = False
        self._names: dict[bytes, str] = {}  # of nodes that are up or were
        self._sinks: list[Callable[[Event], None]] = []

    def connect(self, links: Links, calls: Calls, table: SessionTable) -> None:
        """Hand in the other nodes."""
        self._links, self._calls = links, calls
        self._names.update({node: peer.name for node, peer in links.peers.items()})
        links.on_up(self._up)
        links.on_down(self._down)
        calls.on_cast(_WANT, self._want)
        calls.on_cast(_EVENT, self._others)
        table.on_vanished.append(self._vanished)

    async def events(self, wanted: Filter) -> AsyncGenerator[Event | None, None]:
        """From now on, without end; None after ALIVE seconds in which nothing happened."""
        watcher = _Watcher(wanted.passes)
        self._watchers.append(watcher)
        self._changed()
        try:
            while True:
                try:
                    async with asyncio.timeout(ALIVE):
                        await watcher.changed.wait()
                except TimeoutError:
                    yield None
                watcher.changed.clear()
                if watcher.lost:
                    lost, watcher.lost = watcher.lost, 0
                    yield self._event("lost", self._node, "", f"{lost} events, because they were not taken in time")
                while watcher.events:
                    yield watcher.events.popleft()
        finally:
            self._watchers.remove(watcher)
            self._changed()

    def publish(self, sink: Callable[[Event], None], on: bool) -> None:
        """Give this node's own events to a sink, from now on or no more."""
        if on:
            self._sinks.append(sink)
        else:
            self._sinks.remove(sink)
        self._changed()

    # -- who wants to know

    def _changed(self) -> None:
        wants = bool(self._watchers)
        if self._calls is not None and wants != self._listening:
            self._calls.cast(_WANT, wants)
        self._listening = wants
        needed = wants or bool(self._wanted_by or self._sinks)
        if needed == self._hooks.wants_of(_OWNER):
            return
        if needed:
            self._hooks.add(_OWNER, SessionBound, self._opened)
            self._hooks.add(_OWNER, SessionClosed, self._closed)
        else:
            self._hooks.remove(_OWNER)

    def _want(self, peer: Peer, wants: Any) -> None:
        if wants:
            self._wanted_by.add(peer.node)
        else:
            self._wanted_by.discard(peer.node)
        self._changed()

    # -- what happens

    def _event(self, event: str, node: str, jid: str = "", detail: str = "") -> Event:
        when = datetime.fromtimestamp(self._clock(), UTC).isoformat(timespec="milliseconds")
        return Event(when.replace("+00:00", "Z"), event, node, jid, detail)

    def _opened(self, event: SessionBound) -> None:
        session: Any = event.session
        info = session.info()
        detail = f"{info.connection} {info.ip} {info.port}"
        self._own(self._event("session_opened", self._node, event.session.jid.full, detail))

    def _closed(self, event: SessionClosed) -> None:
        self._own(self._event("session_closed", self._node, event.session.jid.full))

    def _own(self, event: Event) -> None:
        self._seen(event)
        if self._wanted_by:
            if not self._casting:
                asyncio.get_running_loop().call_soon(self._cast)
            self._casting.append(event)

    def _cast(self) -> None:
        events, self._casting = iter(self._casting), []
        assert self._calls is not None
        while some := list(islice(events, BATCH)):
            self._calls.cast(_EVENT, some, list(self._wanted_by))

    def _others(self, peer: Peer, events: Any) -> None:
        for fields in events:
            self._show(Event(*map(str, fields[:5])))

    def _vanished(self, owner: Owner, rows: Iterable[SessionRow]) -> None:
        """The sessions of a node went with it, perhaps very many: in pieces, so that nothing else has to wait."""
        if not self._watchers:
            return
        node = self._names.get(owner.member, str(owner))
        rows = iter(rows)
        some = list(islice(rows, BATCH))
        for row in some:
            self._show(self._event("session_closed", node, row.jid.full, "its node is gone"))
        if len(some) == BATCH:
            asyncio.get_running_loop().call_soon(self._vanished, owner, rows)

    def _seen(self, event: Event) -> None:
        for sink in self._sinks:
            sink(event)
        self._show(event)

    def _show(self, event: Event) -> None:
        for watcher in self._watchers:
            watcher.tell(event)

    def _up(self, peer: Peer) -> None:
        self._names[peer.node] = peer.name
        if self._listening and self._calls is not None:
            self._calls.cast(_WANT, True, [peer.node])
        self._seen(self._event("node_up", peer.name, "", f"xmppd {peer.version}"))

    def _down(self, peer: Peer, reason: str) -> None:
        self._wanted_by.discard(peer.node)
        self._changed()
        self._seen(self._event("node_down", peer.name, "", reason))


class WatchCommands:
    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    @command(
        "watch",
        args=(Arg("jid", optional=True), Arg("seconds", "integer", optional=True)),
        result=List("events", Tuple("event", tuple(map(string, Event._fields)))),
        tags=("session", "cluster"),
        reads=True,
        scope="node",
        doc="Show what happens in the cluster as it happens, one line an event, until Ctrl-C or for some seconds: nodes"
        " that come and go, sessions that are opened and closed (of one host, user or full JID, if one is given)",
    )
    async def watch(self, call: Call, jid: str = "", seconds: int = 0) -> Any:
        try:
            events = self._watch.events(Filter(jid))
        except JidError as exc:
            raise CommandError(f"malformed JID: {exc}") from exc
        if seconds < 0 or (not call.patient and not 1 <= seconds <= LONGEST):
            raise UsageError(f"argument 'seconds': expected a number from 1 to {LONGEST}, got {seconds}")
        if call.patient:
            return _until(events, seconds) if seconds else events
        return [event async for event in _until(events, seconds) if event is not None]


async def _until(events: AsyncGenerator[Event | None, None], seconds: int) -> AsyncGenerator[Event | None, None]:
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    waiting: asyncio.Future[Event | None] | None = None
    try:
        while True:
            waiting = waiting or asyncio.ensure_future(anext(events))
            done, _ = await asyncio.wait((waiting,), timeout=max(0.0, end - loop.time()))
            if not done:
                return
            yield waiting.result()
            waiting = None
    finally:
        if waiting is not None:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        await events.aclose()
