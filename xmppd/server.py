"""Builds every part of a node, starts them in order, stops them in reverse.

Start: data folder → certificates → storage → tables, router, managers → outbox → modules → control socket → http →
listeners → ready.
Stop: not ready → stop listening → `system-shutdown` to each stream → wait `shutdown_grace` → what waits for storage →
http → control socket → modules in reverse → cluster → outbox → storage → data folder.
"""

import asyncio
import contextlib
import gc
import os
import time
from collections.abc import AsyncIterator, Coroutine
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

from xmppd import clustering, log, signals
from xmppd.access import Access, AccessRules
from xmppd.accountant import Accountant
from xmppd.admin import nodes as admin_nodes
from xmppd.admin.api_tokens import ApiTokens
from xmppd.admin.registry import Registry
from xmppd.admin.socket import ControlSocket
from xmppd.allocator import give_back
from xmppd.auth import Auth
from xmppd.c2s.handover import Handover
from xmppd.c2s.resumption import Resumption
from xmppd.c2s.session import Parts
from xmppd.c2s.spooling import Spooling
from xmppd.c2s.sweeper import RecordSweeper
from xmppd.c2s.ticks import Ticks
from xmppd.c2s.tls import Certificates
from xmppd.check import own_certfiles, validator
from xmppd.cluster.cookies import Cookies
from xmppd.cluster.tables import Route, RouteTable, SessionTable
from xmppd.commanding import Commanding
from xmppd.config import Config
from xmppd.delivery import Gate
from xmppd.errors import NodeIdTaken, StorageError, StorageUnavailable, XmppdError
from xmppd.events import ServerStarted
from xmppd.forward import Forwarder
from xmppd.hooks import Hooks
from xmppd.housekeeping import Housekeeping, Retentions
from xmppd.identity import DataFolder
from xmppd.iq import IqDispatcher, IqHandlers
from xmppd.local_router import LocalRouter
from xmppd.log import get_logger
from xmppd.login_limits import LoginLimits
from xmppd.metrics import Counters, LoopLag
from xmppd.module_api import Context
from xmppd.module_loader import ModuleLoader
from xmppd.nodes import NodeHandlers, Nodes
from xmppd.notify import Notifier
from xmppd.outbox import Outbox, Retry, Settings
from xmppd.outbox.rows import DEDUP_WINDOW
from xmppd.protocol import ns
from xmppd.reload import Plan, Reloader
from xmppd.removals import Removals
from xmppd.router import Router
from xmppd.s2s_manager import S2SManager
from xmppd.serving import Listeners
from xmppd.session_manager import SessionManager
from xmppd.spool import Spool
from xmppd.spool_watch import Place as SpoolPlace
from xmppd.spool_watch import SpoolWatch
from xmppd.storage import Accounts, Storage, clock

_log = get_logger("xmppd.server")
# With generation 0 at 700 objects, a busy node would spend its time looking for cycles it does not make.
_DATABASE_AGAIN: Final = 1.0  # seconds between two attempts to open one that was away at the start
_SUM_UP: Final = 10.0  # seconds between two looks at what the log has left out
_EXPIRED: Final = 60.0  # seconds for which a message that need not be delivered any more is left alone
_LAST: Final = 1.0  # seconds at the stop for what has waited for the database
_SYNC: Final = 3.0  # seconds a start waits for the tables of the other nodes
# Messages on their way are a second old, so that on a busy node the youngest generation is never garbage: it is looked
# at when it grows beyond what that makes, and not so late that one look takes long (some 20 ms on a slow machine).
_GC_THRESHOLDS: Final = (100_000, 20, 50)


def software_version() -> str:
    """The installed version, or the one of the source tree."""
    try:
        return version("xmppd")
    except PackageNotFoundError:
        return "0.1.0"


class Server:
    """One node. Fulfils the admin commands' Server and module_api.ServerInfo."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.version = software_version()
        self._started = time.monotonic()
        self._status = "starting"
        self._stopping = asyncio.Event()
        self._restart = False
        self._failure: XmppdError | None = None  # why it had to stop
        self._tasks: set[asyncio.Task[None]] = set()  # each ends by itself, soon
        self._services: set[asyncio.Task[None]] = set()  # each goes on until it is cancelled
        self.access = Access(AccessRules(config))
        self._notifier = Notifier.from_environment()
        self._reloader = Reloader(
            self,
            begins=lambda: self._notifier.reloading("reloading"),
            ends=lambda: self._notifier.ready(self._condition()[1]),
        )

    # -- what operators and modules ask

    @property
    def node(self) -> str:
        return self.config.node

    @property
    def hosts(self) -> tuple[str, ...]:
        return self.config.hosts

    @property
    def status(self) -> str:
        return self._status

    @property
    def routing(self) -> Any:
        return self.config.routing

    @property
    def loglevel(self) -> str:
        return log.get_level()

    def set_loglevel(self, level: str) -> None:
        """ValueError: there is no such level."""
        try:
            log.set_level(level)
        except KeyError as exc:
            raise ValueError(level) from exc

    @property
    def started_at(self) -> float:
        """Unix time, by the clock of the cluster."""
        return clock() - self.uptime()

    def uptime(self) -> float:
        """Seconds."""
        return time.monotonic() - self._started

    @property
    def nodes(self) -> admin_nodes.Nodes:
        return self.commanding.nodes

    @property
    def api_tokens(self) -> ApiTokens:
        return self.commanding.api_tokens

    def features(self) -> list[str]:
        return self.loader.features()

    def account_features(self) -> list[str]:
        return self.loader.account_features()

    def loaded(self, module: str) -> bool:
        return self.loader.loaded(module)

    # -- life

    async def run(self) -> bool:
        """Serve until told to stop; True when the process should start again."""
        self._notifier.beat(asyncio.get_running_loop(), self._condition)
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self._notifier.rest)
            stack.enter_context(
                signals.handled(
                    starting=lambda: self._status in ("starting", "syncing"),
                    stop=self.stop,
                    reload=lambda: self.spawn(self._reloader.after_signal(), name="reload"),
                )
            )
            for part in (
                self._data_folder,
                self._storage,
                self._routing_parts,
                self._cluster,
                self._outbox,
                self._modules,
                self._control,
            ):
                await stack.enter_async_context(part())
            await stack.enter_async_context(self._http())
            self._status = "syncing"
            await self.cluster.first_sync(_SYNC)
            await stack.enter_async_context(self._clients())
            self._ready()
            await self._stopping.wait()
            self._status = "stopping"
            self._tell_systemd_that_we_stop()
            _log.info("stopping", node=self.node)
        log.sum_up(all=True)
        _log.info("stopped", node=self.node)
        if self._failure is not None:
            raise self._failure
        return self._restart

    def stop(self) -> None:
        """Begin to stop, and return at once."""
        self._stopping.set()

    def restart(self) -> None:
        """Begin to stop, in order to start again."""
        self._restart = True
        self._stopping.set()

    def spawn(self, coroutine: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
        """Run a coroutine as a task of this node; a crash is logged."""
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def spawn_service(self, coroutine: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
        """Run a task that goes on as long as the node; it is cancelled when the node stops."""
        task = self.spawn(coroutine, name=name)
        self._tasks.discard(task)
        self._services.add(task)
        return task

    async def _finish_tasks(self) -> None:
        """What the ending sessions have set going gets its time, and messages on their way to storage: while the other
        nodes still see this one, whoever has gone there waits for these."""
        grace = self.config.shutdown_grace
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=grace)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace + 1):
                await self.storage.batcher.drain()
            if self._tasks:  # what has waited for that
                await asyncio.wait(list(self._tasks), timeout=_LAST)
        self.sessions.hold_no_more()  # for what they wait for there is no time any more
        await asyncio.sleep(0)
        for task in [*self._tasks, *self._services]:
            task.cancel()

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._services.discard(task)
        if not task.cancelled() and (exc := task.exception()) is not None:
            _log.error("task failed", task=task.get_name(), exc=exc)

    # -- the parts, in the order of their start; what follows a yield is their end

    @contextlib.asynccontextmanager
    async def _data_folder(self) -> AsyncIterator[None]:
        self.folder = DataFolder.open(self.config.data_dir)
        try:
            for warning in self.folder.warnings:
                _log.warning("data folder needs attention", problem=warning)
            for path in self.config.without_effect():
                _log.warning("option has no effect yet", option=path)
            config = self.config
            self.certificates = Certificates(config.hosts, config.certfiles, config.data_dir, own_certfiles(config))
            for warning in self.certificates.report.warnings:
                _log.warning("certificate needs attention", problem=warning)
            yield
        finally:
            self.folder.close()

    @contextlib.asynccontextmanager
    async def _storage(self) -> AsyncIterator[None]:
        database = self.config.database
        self.storage = Storage(
            database.url,
            data_dir=self.config.data_dir,
            pool_min=database.pool.min,
            pool_max=database.pool.max,
            pool_timeout=database.pool.timeout,
            pool_idle=database.pool.idle,
            pool_queue=database.pool.queue,
            read={server.url: server.weight for server in database.read},
            max_lag=database.max_lag,
            hint=database.hint,
            slow=database.slow,
            commit_interval=database.commit_interval,
        )
        try:
            self.accounts = Accounts(self.storage)
            self.spool = Spool(self.storage, clock=clock)
            self._place = clustering.Place(self.config, self.folder, self.storage, self.version)
            away = await self._place.open()
            self.owner = self._place.owner
            if away is None:
                await self._free_stale()
                with contextlib.suppress(StorageError):
                    await self.accounts.fake_salt_key()  # which the first login would have to ask for
            else:
                _log.warning("serving without the database", database=self.storage.where, error=away)
                self.spawn_service(self._await_database(), name="database at the start")
            yield
        finally:
            try:
                # A database that is away must not keep the node from stopping; nobody was told that these are stored.
                grace = 0 if self.storage.batcher.away else self.config.shutdown_grace
                async with asyncio.timeout(grace + 1):
                    await self.storage.close()
            except TimeoutError:
                _log.warning("writes given up", database=self.storage.where)

    async def _free_stale(self) -> None:
        freed = await self.spool.free_stale(self.owner.member, self.owner.incarnation)
        if freed:
            _log.info("messages of an earlier run are free again", messages=freed)

    async def _await_database(self) -> None:
        """It was away at the start: open it when it is back, and find out whether this node may serve from it."""
        while True:
            await asyncio.sleep(_DATABASE_AGAIN)
            try:
                await self._place.claim_late()
                await self._free_stale()
            except StorageUnavailable as exc:
                _log.debug("database still away", error=exc)
            except XmppdError as exc:
                return self._fail(exc)
            else:
                return _log.info("database is back", database=self.storage.where)

    def _fail(self, why: XmppdError) -> None:
        """Stop, and end the process with what that error is worth."""
        self._failure = why
        self.stop()

    @contextlib.asynccontextmanager
    async def _routing_parts(self) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        self.hooks = Hooks()
        self.iqs = IqHandlers()
        self.routes = RouteTable()
        self.table = SessionTable()
        self.counters = Counters()
        self.lag = LoopLag(loop)
        self.router = Router(self.routes, self.hooks, self.spawn, self.counters)
        self.router.connect(S2SManager(self.router.bounce))
        self.gate = Gate(self.hooks, self.spawn, self.router.bounce)
        dispatcher = IqDispatcher(self.iqs, send=self.router.route, bounce=self.router.bounce, gate=self.gate)
        self.sessions = SessionManager(
            table=self.table,
            owner=self.owner,
            accounts=self.accounts,
            hooks=self.hooks,
            iqs=dispatcher,
            bounce=self.router.bounce,
            spawn=self.spawn,
            strict=self.config.routing.profile == "rfc6121",
            clock_ns=clock.ns,
        )
        local = LocalRouter(self.sessions, dispatcher, self.gate)
        for host in self.config.hosts:
            self.routes.insert(Route(host, self.owner, local.route))
        # Old clients ask for a session behind bind (RFC 3921 3); there is nothing to it.
        for target in ("account", "host"):
            self.iqs.add("core", target, "set", ns.SESSION, "session", lambda request: None, anonymous=True)
        self.auth = Auth(self.accounts, self.config, limits=LoginLimits(lambda: self.config.login_limits))
        self.accountant = Accountant(self.auth, self.accounts, self.sessions, self.hooks)
        self.ticks = Ticks(loop)
        self.sweeper = RecordSweeper(loop)
        self.parts = Parts(
            self.config.node,
            self.router,
            self.sessions,
            self.hooks,
            self.gate,
            self.spawn,
            self.sweeper,
            self.counters,
            Resumption(lambda: self.config.stream_management, self.owner.member),
            Spooling(self.spool, self.hooks, self.owner, reroute=self.sessions.reroute),
        )
        self.sessions.freeing = self.parts.spooling.freeing
        self.router.on_kept(self.parts.spooling.give_back)
        try:
            yield
        finally:
            self.lag.stop()
            self.sweeper.stop()
            self.parts.spooling.stop()
            self.auth.close()

    @contextlib.asynccontextmanager
    async def _cluster(self) -> AsyncIterator[None]:
        """Everything is there before the first link comes up: the modules, which hear each other, are started first."""
        self.cluster = clustering.build(
            self.config,
            self.folder,
            self._place,
            tables=(self.routes, self.table),
            hooks=self.hooks,
            spawn=self.spawn,
            leave=self.stop,
            ousted=self._ousted,
        )
        links, calls = self.cluster.links, self.cluster.calls
        self.cookies = Cookies(self.cluster, self.folder, external=self.config.cluster.nats_url is not None)
        self.forwarder = Forwarder(links, calls, self.sessions, bounce=self.router.bounce)
        self.sessions.connect(self.forwarder)
        self.parts.resumption.handover = handover = Handover(links, calls, self.forwarder, lambda: self.parts)
        self._node_handlers = NodeHandlers()
        self._node_handlers.connect(calls, self.spawn)
        Removals(calls, self.accounts, self.hooks, self.spawn)
        self.spool.standing = place = SpoolPlace(self.cluster)
        watch = SpoolWatch(
            self.spool,
            self.cluster,
            place,
            self.hooks,
            self.sessions.takes_messages_here,
            self.spawn,
            clock,
            is_available=self.sessions.is_available,
            hold=self.sessions.hold_messages,
            set_aside=self.parts.resumption.set_aside,
        )
        handover.look_first = watch.look_first
        self.spawn_service(watch.run(), name="spool watch")
        try:
            yield
        finally:
            await self.cluster.stop()

    def _ousted(self) -> None:
        self._fail(
            NodeIdTaken(
                f"another process took the node id of {self.node} while this one could not reach the database: if its "
                "data folder is a copy of ours, `xmppd --new-identity` makes it a node of its own"
            )
        )

    @contextlib.asynccontextmanager
    async def _outbox(self) -> AsyncIterator[None]:
        """Before the modules, which have sinks, and after them."""
        options = self.config.outbox
        settings = Settings(
            retry=Retry(**options.retry.model_dump()),
            per_sink=options.concurrency.per_sink,
            open_after=options.breaker.open_after,
            probe_every=options.breaker.probe_every,
            max_events=options.memory.max_events,
            max_bytes=options.memory.max_bytes,
            batch_events=options.batch.max_events,
            batch_wait=options.batch.max_ms / 1000,
            dead_letter=options.dead_letter,
        )
        self.outbox = Outbox(
            self.storage,
            self.owner.member,
            self.owner.incarnation,
            name=self.node,
            settings=settings,
            durability=options.durability,
            when_full=options.memory.when_full,
        )
        await self.outbox.start()
        try:
            yield
        finally:
            await self.outbox.stop()

    @contextlib.asynccontextmanager
    async def _modules(self) -> AsyncIterator[None]:
        self.registry = Registry()
        self.loader = ModuleLoader(
            hooks=self.hooks,
            iqs=self.iqs,
            registry=self.registry,
            context=self._context,
            validate=lambda kind, options, path: validator(self.config)(kind, options, path),
            access=self.access,
            paths=self.config.module_paths,
            nodes=self._node_handlers,
            retentions=self._retentions(),
        )
        self.commanding = Commanding(self, self._info)
        try:
            await self.loader.start(self.config.modules)
            await self.cluster.engine.set_cookies(self.folder.cookie, self.folder.also_trusted)
            await self.commanding.start()
            await self.cluster.start()
            yield
        finally:
            await self.commanding.close()
            await self.loader.stop()

    def _retentions(self) -> Retentions:
        """What is deleted when it is old, the modules' own apart."""
        retentions = Retentions()
        spool, outbox = self.spool, self.outbox
        retentions.add("core", "offline messages", lambda: self.config.retention.offline_messages, spool.delete_older)
        retentions.add("core", "expired messages", lambda: _EXPIRED, spool.delete_expired)
        retentions.add("core", "dead events", lambda: self.config.retention.dead_events, outbox.delete_dead)
        retentions.add("core", "events that were sent", lambda: 2 * DEDUP_WINDOW, outbox.delete_done)
        keeper = Housekeeping(self.storage, retentions, self.node, lambda: self.config.retention)
        self.spawn_service(keeper.run(), name="housekeeping")
        return retentions

    def _info(self) -> tuple[str, int, int, int]:
        """Status, sessions, tasks, seconds: what `list_cluster_detailed` shows of a node."""
        return self._status, self.table.own.rows, len(asyncio.all_tasks()), int(self.uptime())

    def _context(self, name: str) -> Context:
        return Context(
            name=name,
            owner=self.owner,
            storage=self.storage,
            spool=self.spool,
            sessions=self.sessions,  # type: ignore[arg-type]
            accounts=self.accountant,
            access=self.access,
            server=self,
            log=get_logger(f"modules.{name}"),
            clock=clock,
            route=self.router.route,
            spawn=self.spawn_service,
            service=self.loader.service,
            nodes=Nodes(name, self.cluster.links, self.cluster.calls, self.sessions.nodes_of),
            outbox=self.outbox,
        )

    @contextlib.asynccontextmanager
    async def _control(self) -> AsyncIterator[None]:
        self.control = ControlSocket(
            self.config.data_dir / "xmppd.sock", self.registry, node=self.node, nodes=self.commanding.nodes
        )
        await self.control.start()
        try:
            yield
        finally:
            await self.control.close()

    @contextlib.asynccontextmanager
    async def _http(self) -> AsyncIterator[None]:
        self._listeners = Listeners(self)
        try:
            await self._listeners.open_http()
            yield
        finally:
            await self._listeners.close_http()

    def listening(self) -> bool:
        """Whether every listener of clients is open."""
        return self._listeners.listening()

    def connections(self) -> dict[str, int]:
        """How many client connections each kind of listener has."""
        return self._listeners.connections()

    @contextlib.asynccontextmanager
    async def _clients(self) -> AsyncIterator[None]:
        try:
            await self._listeners.open_clients()
            yield
        finally:
            self.folder.remove_ready()
            await self._listeners.close_clients(self.config.shutdown_grace)
            self.parts.resumption.close()
            await self._finish_tasks()

    def _ready(self) -> None:
        gc.collect()
        gc.freeze()
        gc.set_threshold(*_GC_THRESHOLDS)
        self._status = "started"
        ready = {"node": self.node, "pid": os.getpid(), "hosts": list(self.hosts), "listen": self._listeners.addresses}
        self.folder.write_ready(ready)
        self.hooks.notify_aside(ServerStarted(), self.spawn, name="server started")
        self.spawn_service(_sum_up(), name="what the log left out")
        self.spawn_service(give_back(self.counters), name="memory")
        self._notifier.ready(self._condition()[1])
        _log.info("serving", node=self.node, hosts=",".join(self.hosts), database=self.storage.where)

    # -- what systemd sees

    def _condition(self) -> tuple[bool, str]:
        """For `Notifier.beat`: whether the node is still on its way up, and what `systemctl status` shows."""
        if self._status != "started":
            return self._status in ("starting", "syncing"), self._status
        return False, f"serving {', '.join(self.hosts)}: {self.sessions.count()} sessions"

    def _tell_systemd_that_we_stop(self) -> None:
        # A service that said STOPPING may not become ready again, which a restart in the same process will.
        if self._restart:
            self._notifier.reloading("restarting")
        else:
            self._notifier.stopping("stopping")

    # -- reload

    async def reload_config(self) -> list[str]:
        """Read the file again; all or nothing. What was applied, and what needs a restart, comes back; ConfigError:
        nothing was applied."""
        return await self._reloader.reload()

    def commit(self, plan: Plan) -> None:
        """Put a new configuration into effect: what cannot fail."""
        if plan.config.loglevel != self.config.loglevel:
            log.set_level(plan.config.loglevel)
        log.limit(plan.config.log_burst_limit_count, plan.config.log_burst_limit_window_time)
        self.config = plan.config
        self.access.rules = plan.access
        self.auth.config = plan.config
        self.sessions.strict = plan.config.routing.profile == "rfc6121"
        self._listeners.shape()


async def _sum_up() -> None:
    """What was left out of the log is told of even when nothing else is logged any more."""
    while True:
        await asyncio.sleep(_SUM_UP)
        log.sum_up()
