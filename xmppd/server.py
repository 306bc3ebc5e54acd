"""Builds every part of a node, starts them in order, stops them in reverse.

Start: data folder → certificates → storage → tables, router, managers → modules → control socket → http → listeners →
ready.
Stop: not ready → stop listening → `system-shutdown` to each stream → wait `shutdown_grace` → http → control socket →
modules in reverse → storage → data folder.
"""

import asyncio
import contextlib
import functools
import gc
import os
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

from xmppd import log, reload
from xmppd.access import Access, AccessRules
from xmppd.admin.api_tokens import ApiTokenCommands, ApiTokens
from xmppd.admin.commands import register_core
from xmppd.admin.registry import Registry, commands_of
from xmppd.admin.socket import ControlSocket
from xmppd.auth import Auth
from xmppd.c2s.connection import Settings
from xmppd.c2s.listener import ClientListener
from xmppd.c2s.negotiation import Rules
from xmppd.c2s.session import Parts
from xmppd.c2s.sweeper import RecordSweeper
from xmppd.c2s.ticks import Ticks
from xmppd.c2s.tls import Certificates
from xmppd.check import own_certfiles, validator
from xmppd.cluster.tables import Owner, Route, RouteTable, SessionTable
from xmppd.config import Config
from xmppd.config.schema import C2SListen, HttpListen
from xmppd.delivery import Gate
from xmppd.errors import CommandError, ConfigError, XmppdError
from xmppd.events import ConfigReloaded, ServerStarted, UserDeleted, UserRegistered
from xmppd.hooks import Hooks
from xmppd.http.node import HttpServers
from xmppd.identity import DataFolder
from xmppd.iq import IqDispatcher, IqHandlers
from xmppd.local_router import LocalRouter
from xmppd.log import get_logger
from xmppd.login_limits import LoginLimits
from xmppd.metrics import Counters, LoopLag
from xmppd.module_api import Context
from xmppd.module_loader import ModuleLoader
from xmppd.notify import Notifier
from xmppd.protocol import ns
from xmppd.protocol.jid import make
from xmppd.protocol.stream import Limits
from xmppd.router import Router
from xmppd.s2s_manager import S2SManager
from xmppd.session_manager import SessionManager
from xmppd.spool import Spool
from xmppd.storage import Accounts, Storage

_log = get_logger("xmppd.server")
# With generation 0 at 700 objects, a busy node would spend its time looking for cycles it does not make.
_HTTP_GRACE: Final = 2.0  # seconds for requests that run at stop
_GC_THRESHOLDS: Final = (50_000, 20, 50)


def software_version() -> str:
    """The installed version, or the one of the source tree."""
    try:
        return version("xmppd")
    except PackageNotFoundError:
        return "0.1.0"


class Accountant:
    """Accounts with their passwords and their sessions: what admin commands and modules work on."""

    def __init__(self, auth: Auth, accounts: Accounts, sessions: SessionManager, hooks: Hooks) -> None:
        self._auth = auth
        self._accounts = accounts
        self._sessions = sessions
        self._hooks = hooks

    async def exists(self, host: str, username: str) -> bool:
        """Also an anonymous account, for as long as its session lives."""
        return self._sessions.is_anonymous(make(username, host)) or await self._accounts.exists(host, username)

    async def names(self, host: str, *, limit: int, after: str | None) -> list[str]:
        return await self._accounts.names(host, limit=limit, after=after)

    async def register(self, host: str, user: str, password: str) -> bool:
        """Make an account; False when there is one."""
        if not await self._auth.register(host, user, password):
            return False
        await self._tell(UserRegistered(make(user, host)))
        return True

    async def set_password(self, host: str, user: str, password: str) -> bool:
        return await self._auth.set_password(host, user, password)

    async def check_password(self, host: str, user: str, password: str) -> bool:
        return await self._auth.check_password(host, user, password)

    async def remove(self, host: str, user: str, *, removed: Callable[[], None] | None = None) -> bool:
        """Remove an account, end its sessions, let the modules forget it; False when there was none. `removed` is
        called before the sessions end."""
        jid = make(user, host)
        if not await self._auth.remove(host, user):
            return False
        if removed is not None:
            removed()
        self._sessions.kick(jid.local, jid.domain, None, "User removed", condition="conflict")
        await self._tell(UserDeleted(jid))
        return True

    async def _tell(self, event: object) -> None:
        waiting = self._hooks.notify(event)
        if waiting is not None:
            await waiting


class Server:
    """One node. Fulfils the admin commands' Server and module_api.ServerInfo."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.started_at = time.time()
        self.version = software_version()
        self._started = time.monotonic()
        self._status = "starting"
        self._stopping = asyncio.Event()
        self._restart = False
        self._interrupted = False  # told to stop while starting
        self._tasks: set[asyncio.Task[None]] = set()  # each ends by itself, soon
        self._services: set[asyncio.Task[None]] = set()  # each goes on until it is cancelled
        self._listeners: list[ClientListener] = []
        self._reloading = asyncio.Lock()
        self._applying = asyncio.Lock()
        self.access = Access(AccessRules(config))
        self._notifier = Notifier.from_environment()

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

    def uptime(self) -> float:
        """Seconds."""
        return time.monotonic() - self._started

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
            stack.enter_context(self._signals())
            for part in (self._data_folder, self._storage, self._routing_parts, self._modules, self._control):
                await stack.enter_async_context(part())
            await stack.enter_async_context(self._http())
            await stack.enter_async_context(self._clients())
            self._ready()
            await self._stopping.wait()
            self._status = "stopping"
            self._tell_systemd_that_we_stop()
            _log.info("stopping", node=self.node)
        _log.info("stopped", node=self.node)
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
        """What the ending sessions have set going (messages on their way to storage) gets its time."""
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=self.config.shutdown_grace)
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
            commit_interval=database.commit_interval,
        )
        await self.storage.open()
        try:
            self.accounts = Accounts(self.storage)
            self.spool = Spool(self.storage)
            self.owner = Owner(uuid.UUID(self.folder.node_id).bytes, 0, self.folder.incarnation)
            freed = await self.spool.free_stale(self.owner.member, self.owner.incarnation)
            if freed:
                _log.info("messages of an earlier run are free again", messages=freed)
            yield
        finally:
            try:
                # A database that is away must not keep the node from stopping; nobody was told that these are stored.
                async with asyncio.timeout(self.config.shutdown_grace + 1):
                    await self.storage.close()
            except TimeoutError:
                _log.warning("writes given up", database=self.storage.where)

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
        )
        try:
            yield
        finally:
            self.lag.stop()
            self.sweeper.stop()
            self.auth.close()

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
        )
        register_core(
            self.registry,
            server=self,
            accounts=self.accounts,
            auth=self.accountant,
            sessions=self.sessions,
            router=self.router,
            loader=self.loader,
        )
        self.api_tokens = ApiTokens(self.storage, lambda: self.config.api_tokens)
        self.registry.register("core", commands_of(ApiTokenCommands(self.api_tokens)))
        try:
            await self.loader.start(self.config.modules)
            yield
        finally:
            await self.loader.stop()

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
            clock=time.time,
            route=self.router.route,
            spawn=self.spawn_service,
            service=self.loader.service,
        )

    @contextlib.asynccontextmanager
    async def _control(self) -> AsyncIterator[None]:
        self.control = ControlSocket(self.config.data_dir / "xmppd.sock", self.registry, node=self.node)
        await self.control.start()
        try:
            yield
        finally:
            await self.control.close()

    @contextlib.asynccontextmanager
    async def _http(self) -> AsyncIterator[None]:
        # Before the clients' listeners and after their end: a balancer that asks whether we are ready gets its answer.
        self._addresses: list[dict[str, Any]] = []
        http = HttpServers(self)
        try:
            for listen in self.config.listen:
                if isinstance(listen, HttpListen):
                    self._addresses.append(await http.open(listen))
            yield
        finally:
            await http.close(_HTTP_GRACE)

    def listening(self) -> bool:
        """Whether every listener of clients is open."""
        return all(listener.listening for listener in self._listeners)

    def connections(self) -> dict[str, int]:
        """How many client connections each kind of listener has."""
        found: dict[str, int] = {}
        for listener in self._listeners:
            found[listener.settings.name] = found.get(listener.settings.name, 0) + listener.connections
        return found

    @contextlib.asynccontextmanager
    async def _clients(self) -> AsyncIterator[None]:
        try:
            for listen in self.config.listen:
                if isinstance(listen, C2SListen):
                    await self._listen(listen)
            yield
        finally:
            self.folder.remove_ready()
            for listener in self._listeners:
                listener.stop_listening()
            await asyncio.gather(*(listener.close(self.config.shutdown_grace) for listener in self._listeners))
            await self._finish_tasks()

    async def _listen(self, listen: C2SListen) -> None:
        listener = ClientListener(
            listen.ip,
            listen.port,
            direct_tls=listen.tls,
            settings=_settings(listen),
            rules=Rules(
                self.config.hosts,
                listen.starttls,
                listen.starttls_required,
                lambda host: self.config.for_host(host).resource_conflict,
                self.access.max_sessions,
                functools.partial(self.access.allowed, listen.access),
                functools.partial(self.access.shaper, listen.shaper),
            ),
            auth=self.auth,
            tls=self.certificates,
            parts=lambda: self.parts,
            ticks=self.ticks,
            spawn=self.spawn,
        )
        address = await listener.open()
        self._listeners.append(listener)
        self._addresses.append({"module": "c2s", "ip": address.ip, "port": address.port, "tls": address.tls})

    @contextlib.contextmanager
    def _signals(self) -> Any:
        """From the first moment to the last, so that a signal never finds the default handler, which kills."""
        loop = asyncio.get_running_loop()
        main = asyncio.current_task()
        assert main is not None

        def stop() -> None:
            if self._status == "starting":
                self._interrupted = True
                main.cancel()
            self.stop()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop)
        loop.add_signal_handler(signal.SIGHUP, self._hang_up, sys.stdin is not None and sys.stdin.isatty())
        try:
            yield
        except asyncio.CancelledError:
            if not self._interrupted:
                raise
            main.uncancel()
        finally:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                loop.remove_signal_handler(number)
                signal.signal(number, signal.SIG_IGN)  # nothing is left but to exit

    def _ready(self) -> None:
        gc.collect()
        gc.freeze()
        gc.set_threshold(*_GC_THRESHOLDS)
        self._status = "started"
        ready = {"node": self.node, "pid": os.getpid(), "hosts": list(self.hosts), "listen": self._addresses}
        self.folder.write_ready(ready)
        waiting = self.hooks.notify(ServerStarted())
        if waiting is not None:
            self.spawn(_await(waiting), name="server started")
        self._notifier.ready(self._condition()[1])
        _log.info("serving", node=self.node, hosts=",".join(self.hosts), database=self.storage.where)

    # -- what systemd sees

    def _condition(self) -> tuple[bool, str]:
        """For `Notifier.beat`: whether the node is still on its way up, and what `systemctl status` shows."""
        if self._status != "started":
            return self._status == "starting", self._status
        return False, f"serving {', '.join(self.hosts)}: {self.sessions.count()} sessions"

    def _tell_systemd_that_we_stop(self) -> None:
        # A service that said STOPPING may not become ready again, which a restart in the same process will.
        if self._restart:
            self._notifier.reloading("restarting")
        else:
            self._notifier.stopping("stopping")

    # -- reload

    def _hang_up(self, had_terminal: bool) -> None:
        """SIGHUP: the terminal we were started in has gone, or somebody wants the log and configuration read anew."""
        if had_terminal and not _terminal_lives():
            self.stop()
        else:
            self.spawn(self._reload(), name="reload")

    async def _reload(self) -> None:
        async with self._reloading:
            self._notifier.reloading("reloading")
            try:
                log.reopen()
                await self.reload_config()
            except (XmppdError, OSError) as exc:
                _log.error("not reloaded", problem=exc)
            finally:
                self._notifier.ready(self._condition()[1])

    async def reload_config(self) -> list[str]:
        """Read the file again; all or nothing. What was applied, and what needs a restart, comes back; ConfigError:
        nothing was applied."""
        if self.config.path is None:
            raise CommandError("there is no configuration file: the node runs with the built-in defaults")
        # To its end, even if whoever asked for it has left meanwhile.
        done: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()
        self.spawn(self._reload_into(done), name="reload of the configuration")
        return await asyncio.shield(done)

    async def _reload_into(self, done: "asyncio.Future[list[str]]") -> None:
        try:
            done.set_result(await self._reload_whole())
        except BaseException as exc:
            done.set_exception(exc if isinstance(exc, Exception) else CommandError("the node stops"))
            done.exception()  # somebody has looked
            if not isinstance(exc, XmppdError):
                raise

    async def _reload_whole(self) -> list[str]:
        async with self._applying:
            try:
                plan = await reload.prepare(self.config, self.loader, self.certificates)
                await reload.carry_out(plan, self.config, self.loader, self.certificates, self._commit)
            except ConfigError as exc:
                _log.warning("configuration refused", problems=len(exc.problems), first=exc.problems[0])
                raise
            for warning in self.certificates.report.warnings:
                _log.warning("certificate needs attention", problem=warning)
            waiting = self.hooks.notify(ConfigReloaded())
            if waiting is not None:
                await waiting
            report = plan.report()
            _log.info("configuration reloaded", changes=len(report))
            return report

    def _commit(self, plan: reload.Plan) -> None:
        """What cannot fail."""
        if plan.config.loglevel != self.config.loglevel:
            log.set_level(plan.config.loglevel)
        self.config = plan.config
        self.access.rules = plan.access
        self.auth.config = plan.config
        self.sessions.strict = plan.config.routing.profile == "rfc6121"
        for listener in self._listeners:
            listener.shape()


def _settings(listen: C2SListen) -> Settings:
    return Settings(
        name="c2s_tls" if listen.tls else "c2s",
        before=Limits(
            size=listen.pre_auth_max_stanza_size,
            depth=listen.max_depth,
            elements=listen.pre_auth_max_elements,
            names=min(listen.max_novel_names, listen.pre_auth_max_elements),
            total=listen.pre_auth_max_elements,
        ),
        after=Limits(
            size=listen.max_stanza_size,
            depth=listen.max_depth,
            elements=listen.max_elements,
            names=listen.max_novel_names,
        ),
        negotiation_timeout=listen.negotiation_timeout,
        idle_timeout=listen.idle_timeout,
        max_write_queue=listen.max_write_queue,
        send_timeout=listen.send_timeout,
    )


def _terminal_lives() -> bool:
    try:
        os.tcgetpgrp(0)
    except OSError:
        return False
    return True


async def _await(waiting: Any) -> None:
    await waiting
