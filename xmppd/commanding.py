"""The commands of the core, put together: of this node, of the cluster, and what carries them to other nodes."""

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from xmppd.access import Access
from xmppd.accountant import Accountant
from xmppd.admin.api_tokens import ApiTokenCommands, ApiTokens
from xmppd.admin.cluster_commands import ClusterCommands, CookieCommands
from xmppd.admin.commands import register_core
from xmppd.admin.nodes import Nodes
from xmppd.admin.observers import Observers
from xmppd.admin.outbox_commands import OutboxCommands
from xmppd.admin.piefxis_commands import PiefxisCommands
from xmppd.admin.promise_commands import Numbers, PromiseCommands
from xmppd.admin.puppets import Puppet, Puppets
from xmppd.admin.registry import Registry, commands_of
from xmppd.admin.selftest import SelfTest, SelfTestCommands
from xmppd.admin.storage_commands import BackupCommands, OldMessageCommands
from xmppd.admin.talk import Speaker
from xmppd.admin.watch import Watch, WatchCommands
from xmppd.c2s.session import Parts, Session
from xmppd.cluster.cluster import Cluster
from xmppd.cluster.cookies import Cookies
from xmppd.cluster.tables import RouteTable, SessionTable
from xmppd.config import Config
from xmppd.hooks import Hooks
from xmppd.log import get_logger
from xmppd.module_loader import ModuleLoader
from xmppd.outbox import Outbox
from xmppd.piefxis import Exporter, Importer
from xmppd.protocol.jid import JID
from xmppd.router import Router
from xmppd.session_manager import SessionManager
from xmppd.spool import Spool
from xmppd.storage import Accounts, Storage
from xmppd.storage.members import Members


class Node(Protocol):
    """The server, as far as its commands concern it."""

    config: Config
    version: str
    cluster: Cluster
    cookies: Cookies
    registry: Registry
    loader: ModuleLoader
    storage: Storage
    spool: Spool
    accounts: Accounts
    accountant: Accountant
    sessions: SessionManager
    table: SessionTable
    routes: RouteTable
    access: Access
    router: Router
    hooks: Hooks
    parts: Parts
    outbox: Outbox

    @property
    def node(self) -> str: ...
    @property
    def hosts(self) -> tuple[str, ...]: ...
    @property
    def status(self) -> str: ...
    def uptime(self) -> float: ...
    async def reload_config(self) -> list[str]: ...
    def stop(self) -> None: ...
    def restart(self) -> None: ...
    def spawn(self, coroutine: Any, *, name: str) -> Any: ...


class Commanding:
    """Fills a node's registry; `nodes` leads to the other ones, `api_tokens` are those that commands make."""

    def __init__(self, node: Node, info: Callable[[], tuple[str, int, int, int]]) -> None:
        cluster = node.cluster
        links, calls = cluster.links, cluster.calls
        self.nodes = Nodes(name=node.node, member=cluster.me.node, links=links, calls=calls, table=node.table)
        self.api_tokens = ApiTokens(node.storage, lambda: node.config.api_tokens)
        register_core(
            node.registry,
            server=node,
            accounts=node.accounts,
            auth=node.accountant,
            sessions=node.sessions,
            router=node.router,
            loader=node.loader,
        )
        watch = Watch(node=node.node, hooks=node.hooks)
        watch.connect(links, calls, node.table)
        self._cluster = cluster
        self._observers = Observers(
            node=node.node,
            version=node.version,
            transport=cluster.engine,
            registry=node.registry,
            nodes=self.nodes,
            watch=watch,
            table=node.table,
            routes=node.routes,
            config=lambda: node.config,
            rules=node.access,
            spawn=node.spawn,
        )
        self._puppets = Puppets(hooks=node.hooks, table=node.table, bind=_bind(node))
        self._puppets.connect(calls)
        selftest = SelfTest(
            node=node.node,
            server=node,
            accounts=node.accounts,
            auth=node.accountant,
            hooks=node.hooks,
            puppets=self._puppets,
            nodes=self.nodes,
        )
        for source in (
            ApiTokenCommands(self.api_tokens),
            ClusterCommands(cluster, info),
            CookieCommands(node.cookies),
            OutboxCommands(node.outbox, node.node),
            WatchCommands(watch),
            SelfTestCommands(selftest),
            OldMessageCommands(node.spool, node.storage),
            BackupCommands(node.storage, node.config.data_dir, node.sessions, _others(node), node.restart),
            PiefxisCommands(
                Exporter(node.accounts, node.hooks),
                Importer(node.accountant, node.hooks, lambda: node.hosts),
                node.config.data_dir,
                lambda: node.hosts,
            ),
            PromiseCommands(node.node, cluster.me.node, node.sessions, node.spool, _numbers(node)),
        ):
            node.registry.register("core", commands_of(source))
        node.registry.connect(self.nodes)
        self._speaker = Speaker(node.registry, calls, node.spawn)

    async def start(self) -> None:
        """Before the cluster starts. Raises ConfigError where an observer's secret cannot be read."""
        self._cluster.observed = self._observers.wanted
        await self._observers.apply(self._cluster.membership.copy.cluster)

    async def close(self) -> None:
        """The node stops."""
        self._puppets.close()
        await self._observers.stop()


def _bind(node: Node) -> Callable[[JID, Puppet], Session]:
    return lambda jid, carrier: Session(jid, carrier, node.parts, get_logger("selftest"))


def _others(node: Node) -> Callable[[], Awaitable[list[str]]]:
    """The other nodes that run on the same database, members or not."""

    async def others() -> list[str]:
        rows = await Members(node.storage).all()
        return [row.name for row in rows if row.running and row.node != node.cluster.me.node]

    return others


def _numbers(node: Node) -> Callable[[], Numbers]:
    def numbers() -> Numbers:
        spooling, resumption = node.parts.spooling, node.parts.resumption
        return Numbers(
            spooling.holds_lease(),
            resumption.waiting,
            spooling.unacknowledged,
            spooling.spooled,
            spooling.acknowledged_late,
            spooling.ended,
            node.spool.taken_over,
            resumption.redelivered,
            node.spool.duplicates,
        )

    return numbers
