"""A node's part in its cluster: when the engine runs, who the members are, and what follows when that changes.

A node that is no member runs no engine and opens no port. Once a second it looks whether somebody who shares the
database wants to reach it, and if so opens its port for a while. A member renews its lease at the same beat and sees
there that the members have changed, if nobody told it before.
"""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from xmppd.cluster import subjects
from xmppd.cluster.calls import NodeCalls
from xmppd.cluster.engine import Engine
from xmppd.cluster.hello import LOOK, REFRESH, SKEW, Card
from xmppd.cluster.interfaces import Peer
from xmppd.cluster.links import LinkSet
from xmppd.cluster.membership import MEMBER, REMOVED, Identity, Membership, Node, Store
from xmppd.cluster.replica import Replica
from xmppd.errors import NodeUnreachable, StorageError, StorageUnavailable, XmppdError
from xmppd.events import NodeDown, NodeSynced, NodeUp
from xmppd.hooks import Hooks
from xmppd.log import get_logger

log = get_logger("cluster")

BEAT: Final = 1.0  # seconds
LEASE: Final = 5.0  # of a member, renewed at every beat
SINGLE_LEASE: Final = 15.0  # of a node alone
SINGLE_BEATS: Final = 5  # so many beats between its renewals
AWAKE: Final = 60.0  # seconds for which a node that is wanted keeps its port open
DATABASE_TIMEOUT: Final = 3.0  # seconds for a look at the database, so that one that hangs is noticed
ENGINE_PAUSE: Final = 5.0  # seconds between attempts to start an engine that does not start
FLUSH: Final = 1.0  # seconds for the others to acknowledge our last words
HELLO: Final = 3.0  # seconds for an answer
_MEMBERS: Final = "cluster.members"  # cast: the members have changed
_CARD: Final = "cluster.card"  # call: who are you?


@dataclass(frozen=True, slots=True)
class Myself:
    """What this process is and says about itself."""

    node: bytes
    name: str
    address: str  # host:port
    instance: bytes
    version: str
    protocol: int
    hosts: tuple[str, ...]
    node_local: bool
    machine: bytes


class Cluster:
    """Between `start` and `stop`; `removed` and `ousted` are called once, when the node has to stop."""

    def __init__(
        self,
        me: Myself,
        membership: Membership,
        store: Store,
        *,
        engine: Engine,
        links: LinkSet,
        calls: NodeCalls,
        replica: Replica,
        hooks: Hooks,
        spawn: Callable[..., Any],
        removed: Callable[[], None],
        ousted: Callable[[], None],
        claim: Callable[[], Awaitable[None]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.me = me
        self.membership = membership
        self.store = store
        self.engine = engine
        self.links = links
        self.calls = calls
        self.replica = replica
        self.skews: dict[bytes, float] = {}  # seconds by which other clocks are ahead
        self.lease_until = 0.0  # by the loop's clock; what only a living member may do must end before it
        self._hooks = hooks
        self._spawn = spawn
        self._removed = removed
        self._ousted = ousted
        self._claim = claim
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._running = False  # the engine and the links
        self.observed = False  # observers are served: the engine runs, alone or not
        self._awake_until = 0.0
        self._retry_at = 0.0
        self._turning = asyncio.Lock()
        self._refreshing = asyncio.Lock()
        self._syncing = False
        self._beating: asyncio.Task[None] | None = None
        self._database_away = False
        self._done = False
        self._changed = asyncio.Event()  # links, tables or members
        self._extra: dict[bytes, str] = {}  # routes to nodes that are no members yet
        links.on_up(self._up)
        links.on_down(self._down)
        replica.on_synced.append(lambda peer: self._changed.set())
        replica.on_exchanged.append(lambda peer: self._notify(NodeSynced(peer.name, peer.node)))
        calls.on_cast(_MEMBERS, self._told)
        calls.on_call(_CARD, lambda peer, payload: self.card().as_json())

    # -- life

    async def start(self) -> None:
        """Begin to take part; nobody is waited for."""
        self.replica.start()
        self._beating = self._loop.create_task(self._beat(), name="cluster beat")
        await self._turn()

    async def first_sync(self, patience: float) -> None:
        """Wait for the tables of the members that run, for at most `patience` seconds."""
        self._syncing = True
        try:
            async with asyncio.timeout(patience):
                while self._running and not self.synced:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            log.info("serving before all tables are here", nodes=",".join(sorted(n.name for n in self.running_others)))
        finally:
            self._syncing = False

    async def stop(self) -> None:
        """Leave the others in order; the membership stays."""
        self._done = True
        if self._beating is not None:
            self._beating.cancel()
        await self._until(lambda: not self.links.queued)  # what the ending sessions have said goes out first
        self.links.stop()
        await self._until(lambda: not self.links.farewells)
        self.replica.stop()
        async with self._turning:
            await self._stop_engine()
        try:
            async with asyncio.timeout(DATABASE_TIMEOUT):
                await self.store.release(self.me.node, self.me.instance)
        except (StorageError, TimeoutError):
            log.debug("lease not released")

    async def _until(self, condition: Callable[[], bool]) -> None:
        deadline = self._loop.time() + FLUSH
        while not condition() and self._loop.time() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    @property
    def holds_lease(self) -> bool:
        """Whether nobody else may believe yet that this process is dead."""
        return self._loop.time() < self.lease_until

    @property
    def joined(self) -> bool:
        return self.membership.state == MEMBER

    @property
    def awake(self) -> bool:
        """Whether the engine runs."""
        return self._running

    @property
    def running_others(self) -> list[Node]:
        """Other members that hold a lease, as the database said last."""
        nodes = self.membership.nodes
        return [each for each in nodes if each.state == MEMBER and each.running and each.node != self.me.node]

    @property
    def synced(self) -> bool:
        """Whether every other member that runs is up and we have its rows."""
        return all(self.replica.synced(each.node) for each in self.running_others)

    def card(self) -> Card:
        """What this node says about itself now."""
        me, copy = self.me, self.membership.copy
        return Card(
            me.node,
            me.name,
            me.address,
            me.version,
            me.protocol,
            me.hosts,
            copy.cluster,
            copy.database,
            me.node_local,
            me.machine,
            copy.state,
            self._clock(),
        )

    # -- the engine

    async def wake(self) -> None:
        """Run the engine for a while, also when this node is no member. Raises XmppdError when it does not start."""
        self._awake_until = self._loop.time() + AWAKE
        self._retry_at = 0.0
        async with self._turning:
            await self._start_engine()

    async def route_to(self, node: bytes, address: str) -> None:
        """Hold a route to a node that is no member yet, until the engine stops or it has become one."""
        self._extra[node] = address
        await self._set_routes()

    async def _turn(self) -> None:
        """Run the engine or let it rest, as the state of things asks; what goes wrong is logged and tried again."""
        async with self._turning:
            now = self._loop.time()
            wanted = self.joined or self.observed or now < self._awake_until
            if wanted and not self._running and now >= self._retry_at:
                try:
                    await self._start_engine()
                except XmppdError as exc:
                    self._retry_at = self._loop.time() + ENGINE_PAUSE
                    log.error("cluster engine does not start", problem=exc)
            elif not wanted and self._running:
                await self._stop_engine()
                log.info("cluster port closed again", node=self.me.name)

    async def _start_engine(self) -> None:
        if self._running or self._done:
            return
        await self.engine.set_cluster(self.membership.copy.cluster)
        await self.engine.serve(subjects.hello(self.me.name), self._answer)
        await self.engine.start(self._routes())
        self._running = True
        self.links.attach(self.engine)
        self.links.set_members([each.node for each in self.membership.others])

    async def _stop_engine(self) -> None:
        if self._running:
            self._running = False
            self._extra.clear()
            self.links.set_members(())
            self.links.detach()
            await self.engine.stop()

    def _routes(self) -> list[str]:
        found = self._extra | {each.node: each.address for each in self.membership.others if each.address}
        return list(found.values())

    async def _set_routes(self) -> None:
        if not self._running:
            return
        try:
            await self.engine.set_routes(self._routes())
        except XmppdError as exc:
            log.error("cluster routes not set", problem=exc)

    # -- the members

    async def refresh(self) -> None:
        """Read the members from the database, now. Raises StorageError when it is away."""
        async with self._refreshing:  # one that has begun may have read too early for whoever asks now
            try:
                async with asyncio.timeout(DATABASE_TIMEOUT):
                    identity = await self.store.identity()
                    pulse = await self.store.look(self.me.node, self.me.instance)
                    nodes = await self.store.all()
            except TimeoutError as exc:
                raise StorageUnavailable(f"the database did not answer within {DATABASE_TIMEOUT:g} s") from exc
            await self._take(identity, nodes, pulse.revision)

    async def _take(self, identity: Identity, nodes: Sequence[Node], revision: int) -> None:
        if identity.cluster != self.membership.copy.cluster:
            return  # a database under this URL that is another one than at the start
        changed = self.membership.take(identity, nodes, revision)
        self._changed.set()
        if changed:
            await self._members_changed()

    async def _members_changed(self) -> None:
        self._changed.set()
        members = self.membership.members
        log.info("members changed", members=",".join(member.name for member in members))
        if self.membership.state == REMOVED:
            self._leave()
            return
        self.links.set_members([each.node for each in self.membership.others])
        await self._set_routes()

    def _leave(self) -> None:
        removed = self.membership.copy.removed
        if removed is not None and not self._done:
            self._done = True
            log.warning("removed from the cluster", by=removed.by, at=time.strftime("%F %T", time.gmtime(removed.at)))
            self._removed()

    def tell_members(self) -> None:
        """Make the others look at the database now instead of at their next beat."""
        self.calls.cast(_MEMBERS, None)

    def _told(self, peer: Peer, payload: Any) -> None:
        self._spawn(self._refresh_quietly(), name="cluster members")

    async def _refresh_quietly(self) -> None:
        try:
            await self.refresh()
        except StorageError:
            pass  # the next beat does it

    # -- the beat

    async def _beat(self) -> None:
        beats = 0
        while True:
            await asyncio.sleep(BEAT)
            try:
                await self._look(renew=self.joined or beats % SINGLE_BEATS == 0 or not self.holds_lease)
                self._database(away=False)
            except (StorageError, TimeoutError) as exc:
                self._database(away=True, error=exc)
            except Exception as exc:
                log.error("cluster beat failed", exc=exc)
            beats += 1
            await self._turn()

    async def _look(self, *, renew: bool) -> None:
        me, began = self.me, self._loop.time()
        lease = LEASE if self.joined else SINGLE_LEASE
        async with asyncio.timeout(DATABASE_TIMEOUT):
            if renew:
                pulse = await self.store.renew(me.node, me.instance, lease=lease)
            else:
                pulse = await self.store.look(me.node, me.instance)
        if renew and pulse.ours:
            self.lease_until = began + lease
        if not pulse.ours:
            await self._lost(pulse.state)
        elif pulse.revision != self.membership.revision or pulse.state != self.membership.state:
            await self.refresh()
        elif self._syncing:
            await self.refresh()  # who runs is what we wait for
        if pulse.wanted_ago is not None and pulse.wanted_ago < AWAKE:
            if not self._running:
                log.info("cluster port opened", node=me.name, address=me.address)
            self._awake_until = max(self._awake_until, began + AWAKE - pulse.wanted_ago)

    async def _lost(self, state: str) -> None:
        """The row does not name this process: it has gone, or it names another one."""
        if not state:
            await self._claim()
        elif (
            self.membership.revision and not self._done
        ):  # without one: we have not claimed it yet, the database was away
            self._done = True
            log.error("another process serves with this node id", node=self.me.name)
            self._ousted()

    def _database(self, *, away: bool, error: BaseException | None = None) -> None:
        if away and not self._database_away:
            log.warning("members not readable", error=str(error or "") or "no answer in time")
        elif self._database_away and not away:
            log.info("members readable again")
        self._database_away = away

    # -- other nodes

    async def ask(self, name: str, *, word: str = LOOK, timeout: float = HELLO) -> Card:
        """Ask a node that need not be a member who it is. Raises NodeUnreachable."""
        began, at = self._loop.time(), self._clock()
        question = json.dumps({**self.card().as_json(), "word": word}).encode()
        answer = await self.engine.request(subjects.hello(name), question, timeout)
        try:
            card = Card.from_json(json.loads(answer))
        except ValueError as exc:
            raise NodeUnreachable(f"{name}: {exc}") from exc
        self._compare_clocks(card, at + (self._loop.time() - began) / 2)
        return card

    async def _answer(self, data: bytes) -> bytes | None:
        try:
            question = json.loads(data)
            card = Card.from_json(question)
        except ValueError as exc:
            log.warning("hello not understood", problem=exc)
            return None
        if not self.joined:
            self._awake_until = self._loop.time() + AWAKE
        if question.get("word") == REFRESH:
            await self._refresh_quietly()
            self.tell_members()
        log.debug("hello", node=card.name, address=card.address)
        return json.dumps(self.card().as_json()).encode()

    def _compare_clocks(self, card: Card, here: float) -> None:
        skew = self.skews[card.node] = card.time - here
        if abs(skew) > SKEW:
            log.warning("clocks differ", node=card.name, seconds=round(skew, 1))

    def _up(self, peer: Peer) -> None:
        self._changed.set()
        self._extra.pop(peer.node, None)
        self._notify(NodeUp(peer.name, peer.node))
        self._spawn(self._look_at_clock(peer), name="cluster clock")

    def _down(self, peer: Peer, reason: str) -> None:
        self._changed.set()
        self.skews.pop(peer.node, None)
        self._notify(NodeDown(peer.name, peer.node, reason))

    async def _look_at_clock(self, peer: Peer) -> None:
        began, at = self._loop.time(), self._clock()
        try:
            card = Card.from_json(await self.calls.call(peer.node, _CARD, None))
        except (XmppdError, ValueError):
            return
        self._compare_clocks(card, at + (self._loop.time() - began) / 2)

    def _notify(self, event: object) -> None:
        self._hooks.notify_aside(event, self._spawn, name="node up or down")
