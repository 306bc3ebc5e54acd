"""What carries packets from node to node: our nats-server child, or an existing NATS cluster (`cluster.nats_url`).

It promises little (interfaces.Transport): at most once, one hop, no word about what is lost. What it adds is speed of
notice: `on_suspect` when another node's process or server seems to have gone, `on_gap` when packets for us may be lost.
"""

import asyncio
import json
import secrets
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

from xmppd.cluster import nats_config, pki, subjects
from xmppd.cluster.addresses import Resolver, split
from xmppd.cluster.child import Child, NatsServerError, find_nats_server
from xmppd.cluster.connection import Connection, Server
from xmppd.cluster.nats_config import NatsConfig, Observer, ObserverPort
from xmppd.cluster.nats_log import CookieRefused, DialFailed, RouteLost, Said
from xmppd.cluster.nats_url import parse_nats_url
from xmppd.cluster.probe import Probe, probe
from xmppd.cluster.routes import Routes
from xmppd.cluster.status import EngineState, RouteState, read_state
from xmppd.config.types import host_port
from xmppd.errors import NodeUnreachable
from xmppd.log import get_logger

_START_TIMEOUT: Final = 10.0  # seconds
_PATIENCE: Final = 1.0  # how long the start of a member is held up
_STATE_TIMEOUT: Final = 2.0
_LOOK: Final = 10.0  # seconds between two looks whether names have got other addresses
_HELLOS: Final = 16  # at a time; who asks beyond that gets no answer and asks again
_SAME_PEER: Final = 60.0  # seconds in which one peer is complained about once
_PEERS: Final = 1000

log = get_logger("cluster")

Hear = Callable[[str, str, bytes], None]  # subject, where an answer goes ("": nowhere), data
HelloHandler = Callable[[bytes], Awaitable[bytes | None]]


class Options(Protocol):
    """The part of the configuration under `cluster:` that is ours."""

    @property
    def listen(self) -> str: ...
    @property
    def advertise(self) -> str | None: ...
    @property
    def hosts(self) -> Mapping[str, str]: ...
    @property
    def nats_url(self) -> str | None: ...
    @property
    def nats_server(self) -> str | None: ...


def _ignore(*_: object) -> None:
    pass


class Engine:
    """One per node, from `start` to `stop`; may be started again after that.

    `node` is our UUID (16 bytes), `name` our `node:` option, `folder` the data folder; cookies: `set_cookies`.
    """

    def __init__(
        self,
        options: Options,
        *,
        node: bytes,
        name: str,
        cookie: str,
        folder: Path,
        also_trusted: Iterable[str] = (),
    ) -> None:
        self.on_packet: Callable[[bytes], None] = _ignore
        self.on_gap: Callable[[], None] = _ignore
        self.on_suspect: Callable[[bytes], None] = _ignore
        self.resolver = Resolver(options.hosts)
        # what status and metrics show
        self.gaps = 0
        self.dropped = 0  # packets that could not be sent
        self.sent = 0  # packets
        self.received = 0
        self.refused = 0  # connections between nodes of different cookies
        self._options = options
        self._node = node
        self._name = name
        self._cookies: tuple[str, ...] = (cookie, *also_trusted)
        self._folder = folder / "nats"
        self._password = ""
        self._observers: tuple[Observer, ...] = ()
        self._observer_port: ObserverPort | None = None
        self._bundle: pki.Bundle | None = None
        self._cluster: bytes | None = None
        self._routes = Routes(self.resolver)
        self._child: Child | None = None
        self._connection: Connection | None = None
        self._targets: dict[bytes, str] = {}
        self._hellos: dict[str, HelloHandler] = {}
        self._heard: dict[str, tuple[Hear, str]] = {}  # by subject, with the queue
        self._tasks: set[asyncio.Task[None]] = set()
        self._complained: dict[str, float] = {}
        self._changing = asyncio.Lock()
        self._look_again = asyncio.Event()

    # --------------------------------------------------------------------------------------------- Transport

    @property
    def connected(self) -> bool:
        """Whether packets can be sent at all."""
        return self._connection is not None and self._connection.client is not None

    @property
    def max_packet(self) -> int:
        """Bytes."""
        client = self._connection.client if self._connection is not None else None
        return client.max_payload if client is not None else nats_config.MAX_PACKET

    def send(self, node: bytes, packet: bytes) -> None:
        """Hand a packet over; it is lost when we are not connected, too much waits, or nobody is there."""
        target = self._targets.get(node)
        if target is None:
            if self._cluster is None:
                self.dropped += 1
                return
            target = self._targets[node] = subjects.packets(self._cluster, node)
        if self._connection is not None and self._connection.publish(target, packet):
            self.sent += 1
        else:
            self.dropped += 1

    # ------------------------------------------------------------------------------------------------ life

    @property
    def running(self) -> bool:
        """Between `start` and `stop`."""
        return self._connection is not None

    @property
    def child_pid(self) -> int | None:
        """The process id of our nats-server; None where there is none."""
        return self._child.pid if self._child is not None else None

    @property
    def route_port(self) -> int:
        """Where other nodes connect; 0 while that is not known."""
        return self._child.route_port if self._child is not None else 0

    async def start(self, routes: Iterable[str] = (), *, patient: bool = False) -> None:
        """Returns when packets can be sent. `routes` as in `set_routes`.

        Raises `NatsServerError` (no program, port in use, ...), `NodeUnreachable` where `nats_url` does not answer,
        `ConfigError` where it is wrong. If `patient`, for a member that starts, a port in use or a NATS that is down is
        logged and tried again and again; see `connected`.
        """
        if self.running:
            await self.set_routes(routes)
            return
        self._password = secrets.token_urlsafe(32)
        try:
            if self._options.nats_url is None:
                await self._start_child(routes, patient)
            else:
                parse_nats_url(self._options.nats_url)
            self._connection = Connection(
                self._node.hex(),
                self._servers,
                on_up=self._up,
                on_lost=self._lost,
                on_stuck=self._stuck,
            )
            await self._subscribe_all(self._connection)
            try:
                await self._connection.start(_PATIENCE if patient else _START_TIMEOUT)
            except NodeUnreachable as exc:
                if not patient:
                    raise
                log.warning("nats connection lost", error=str(exc))
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """End the child and the connection. The other nodes see us go at once."""
        tasks, self._tasks = self._tasks, set()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._connection is not None:
            await self._connection.stop()
            self._connection = None
        if self._child is not None:
            await self._child.stop()
            self._child = None

    async def set_cluster(self, cluster: bytes | None) -> None:
        """Take and send packets of this cluster (UUID, 16 bytes) from now on; None: of no cluster."""
        former, self._cluster = self._cluster, cluster
        self._targets.clear()
        if self._connection is None or former == cluster:
            return
        if former is not None:
            await self._connection.handle(subjects.packets(former, self._node), None)
        if cluster is not None:
            await self._connection.handle(subjects.packets(cluster, self._node), self._take)

    async def set_routes(self, routes: Iterable[str]) -> None:
        """The other members: node names, `host:port` or addresses. Those connected already stay so.

        One that cannot be resolved is logged and tried again. Without effect with `nats_url`.
        Raises `NatsServerError` when the child refuses the change.
        """
        async with self._changing:
            await self._routes.set(routes)
            if self._child is not None:
                await self._child.reload()

    async def set_cookies(self, current: str, also_trusted: Iterable[str] = ()) -> None:
        """Show a certificate of `current` from now on, and accept nodes of that cookie and of `also_trusted`.

        No route is dropped. To change the cookie of a cluster: on all nodes `(old, [new])`, then on all `(new, [old])`,
        then on all `(new)`. Raises `NatsServerError`.
        """
        async with self._changing:
            self._cookies = (current, *(other for other in also_trusted if other != current))
            if self._child is not None:
                self._write_bundle()
                await self._child.reload()

    async def set_observers(self, observers: Iterable[Observer], port: ObserverPort | None) -> None:
        """Who else may connect, and where. Another port takes effect when the child is started the next time."""
        async with self._changing:
            self._observers, self._observer_port = tuple(observers), port
            if self._child is not None:
                await self._child.reload()

    # --------------------------------------------------------------------------------------------- observers

    async def hear(self, subject: str, handler: Hear | None, *, queue: str = "") -> None:
        """Who hears what comes to a subject, which may hold `*` and `>`, also after a reconnection or a new start.
        None: nobody any more. Of all nodes that give the same `queue`, one hears each message."""
        if handler is None:
            self._heard.pop(subject, None)
        else:
            self._heard[subject] = handler, queue
        if self._connection is not None:
            await self._connection.handle(subject, None if handler is None else _calling(handler), queue=queue)

    def publish(self, subject: str, data: bytes) -> bool:
        """Say something to whoever listens; False when it is lost because we are not connected or too much waits."""
        return self._connection is not None and self._connection.publish(subject, data)

    # ------------------------------------------------------------------------------------ before membership

    async def serve(self, subject: str, handler: HelloHandler) -> None:
        """Answer requests to a subject, also after a reconnection. The handler may take its time; None is no answer."""
        self._hellos[subject] = handler
        if self._connection is not None:
            await self._connection.handle(subject, self._hello)

    async def unserve(self, subject: str) -> None:
        """No more answers."""
        self._hellos.pop(subject, None)
        if self._connection is not None:
            await self._connection.handle(subject, None)

    async def request(self, subject: str, payload: bytes, timeout: float = 2.0) -> bytes:
        """The answer of whoever serves the subject. Raises `NodeUnreachable`."""
        if self._connection is None:
            raise NodeUnreachable("the cluster engine does not run")
        return await self._connection.request(subject, payload, timeout)

    async def probe(self, name: str, *, timeout: float = 3.0) -> Probe:
        """Look at another node's route port; works without being started. Raises OSError (our own folder)."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return await probe(name, self.resolver, self._cookies, self._node, self._folder, timeout=timeout)

    # ----------------------------------------------------------------------------------------------- status

    async def state(self) -> EngineState:
        """What there is to say about the transport. Takes up to two seconds where the child does not answer."""
        child = self._child
        state = EngineState(
            connected=self.connected,
            external=self._options.nats_url is not None,
            child_pid=self.child_pid,
            route_port=self.route_port,
            restarts=child.restarts if child is not None else 0,
            gaps=self.gaps,
            sent=self.sent,
            received=self.received,
            dropped=self.dropped,
            refused=self.refused,
            unresolved=dict(self._routes.unresolved),
        )
        connection = self._connection
        if child is None or connection is None or not self.connected:
            return state
        ours = json.dumps({"server_name": self._node.hex(), "exact_match": True}).encode()  # the others keep silent
        answers: dict[str, Any] = {}
        try:
            for question in nats_config.QUESTIONS:
                answer = await connection.request(f"$SYS.REQ.SERVER.PING.{question}", ours, _STATE_TIMEOUT)
                answers[question] = json.loads(answer)["data"]
        except (NodeUnreachable, ValueError, LookupError):
            return state
        return read_state(state, answers)

    # ---------------------------------------------------------------------------------------------- inside

    async def _start_child(self, routes: Iterable[str], patient: bool) -> None:
        binary = find_nats_server(self._options.nats_server)
        self._write_bundle()
        await self._routes.set(routes)
        self._child = Child(
            binary, self._folder, self._configure, on_said=self._said, on_ready=lambda _: self._child_ready()
        )
        await self._child.start(patient=patient)
        self._spawn(self._keep_addresses(), "cluster addresses")

    def _configure(self, starting: bool) -> str:
        host, port = host_port(self._options.listen)
        child, bundle = self._child, self._bundle
        assert bundle is not None
        return NatsConfig(
            node=self._node,
            password=self._password,
            ports_folder=self._folder,
            route_host=host,
            route_port=port or (child.route_port if child is not None else 0),
            bundle=bundle,
            routes=self._routes.addresses,
            advertise=self._options.advertise,
            client_port=child.client_port if child is not None else 0,
            observers=self._observers,
            observer_port=self._observer_port,
        ).render(starting=starting)

    def _write_bundle(self) -> None:
        host = split(self._name)[0] if self._name else ""
        current, *others = self._cookies
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._folder.chmod(0o700)
            self._bundle = pki.Bundle.write(self._folder, self._node, current, others, [host])
        except OSError as exc:
            raise NatsServerError(f"cannot write {exc.filename or self._folder}: {exc.strerror}") from exc

    def _servers(self) -> list[Server]:
        if self._options.nats_url is not None:
            return parse_nats_url(self._options.nats_url)
        if self._child is None or not self._child.client_port:
            return []
        url = f"nats://127.0.0.1:{self._child.client_port}"
        return [Server(url, nats_config.USER, self._password)]

    async def _subscribe_all(self, connection: Connection) -> None:
        if self._cluster is not None:
            await connection.handle(subjects.packets(self._cluster, self._node), self._take)
        for subject in self._hellos:
            await connection.handle(subject, self._hello)
        for subject, (handler, queue) in self._heard.items():
            await connection.handle(subject, _calling(handler), queue=queue)
        if self._options.nats_url is None:
            await connection.handle(nats_config.DISCONNECTED, self._client_gone)

    def _take(self, subject: str, reply: str, data: bytes) -> None:
        self.received += 1
        try:
            self.on_packet(data)
        except Exception as exc:
            log.error("packet failed", exc=exc)

    def _hello(self, subject: str, reply: str, data: bytes) -> None:
        handler = self._hellos.get(subject)
        if handler is not None and len(self._tasks) < _HELLOS:
            self._spawn(self._answer(handler, reply, data), "cluster hello")

    async def _answer(self, handler: HelloHandler, reply: str, data: bytes) -> None:
        try:
            answer = await handler(data)
        except Exception as exc:
            log.error("hello failed", exc=exc)
            return
        if answer is not None and reply and self._connection is not None:
            self._connection.publish(reply, answer)

    def _client_gone(self, subject: str, reply: str, data: bytes) -> None:
        try:
            node = subjects.node_of(json.loads(data)["client"].get("name", ""))
        except (ValueError, LookupError, AttributeError, TypeError, RecursionError):
            return
        self._suspect(node)

    def _suspect(self, node: bytes | None) -> None:
        if node is None or node == self._node:
            return
        try:
            self.on_suspect(node)
        except Exception as exc:
            log.error("suspicion failed", exc=exc)

    def _said(self, said: Said) -> None:
        match said:
            case RouteLost():
                log.debug("route lost", node=said.node.hex(), why=said.why)
                self._suspect(said.node)
            case CookieRefused():
                self.refused += 1
                self._complain(said.peer)
            case DialFailed():
                if self._routes.failed(said.address):
                    self._look_again.set()

    def _complain(self, peer: str) -> None:
        """One line for each address and minute: a peer of another cookie tries every second."""
        host = peer.rpartition(":")[0]
        now = asyncio.get_running_loop().time()
        if now - self._complained.get(host, -_SAME_PEER) < _SAME_PEER:
            return
        if len(self._complained) >= _PEERS:
            self._complained.clear()
        self._complained[host] = now
        log.warning("peer refused, wrong cookie", peer=peer, count=self.refused)

    async def _keep_addresses(self) -> None:
        """Names are resolved again when a route cannot be dialled, and now and then."""
        while True:
            try:
                async with asyncio.timeout(_LOOK if self._routes.unresolved else None):
                    await self._look_again.wait()
            except TimeoutError:
                pass
            await asyncio.sleep(1.0)  # several fail at a time
            self._look_again.clear()
            try:
                async with self._changing:
                    if await self._routes.refresh() and self._child is not None:
                        await self._child.reload()
            except Exception as exc:
                log.error("routes not changed", exc=exc)

    def _child_ready(self) -> None:
        if self._connection is not None:
            self._connection.retry()

    def _up(self, first: bool) -> None:
        if not first:
            log.info("nats connection restored", gaps=self.gaps + 1)
            self._gap()

    def _lost(self) -> None:
        log.warning("nats connection lost", error=self._connection.last_error if self._connection else "")

    def _stuck(self) -> None:
        log.warning("nats server does not answer", pid=self.child_pid)
        if self._child is not None:
            self._child.kill()

    def _gap(self) -> None:
        self.gaps += 1
        try:
            self.on_gap()
        except Exception as exc:
            log.error("gap not handled", exc=exc)

    def _spawn(self, work: Any, name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _calling(handler: Hear) -> Hear:
    def heard(subject: str, reply: str, data: bytes) -> None:
        try:
            handler(subject, reply, data)
        except Exception as exc:
            log.error("observer's message failed", subject=subject, exc=exc)

    return heard


__all__ = ["Engine", "EngineState", "Observer", "ObserverPort", "Options", "Probe", "RouteState"]
