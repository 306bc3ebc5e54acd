"""The commands' way to the other nodes, put together: commands over several nodes, `watch`, `selftest`."""

import asyncio
from collections.abc import Coroutine
from typing import Any, Protocol

from xmppd.admin.nodes import Nodes
from xmppd.admin.puppets import Bind, Puppets
from xmppd.admin.registry import Registry, commands_of
from xmppd.admin.selftest import Accounts, Auth, SelfTest, SelfTestCommands
from xmppd.admin.selftest import Server as Hosts
from xmppd.admin.talk import Speaker
from xmppd.admin.watch import Watch, WatchCommands
from xmppd.cluster.interfaces import Calls, Links
from xmppd.cluster.tables import SessionTable
from xmppd.hooks import Hooks


class Server(Hosts, Protocol):
    """The node, as far as it is needed here."""

    @property
    def node(self) -> str: ...
    def spawn(self, coroutine: Coroutine[Any, Any, None], *, name: str) -> "asyncio.Task[None]": ...


class ClusterWide:
    """Makes the commands of a registry answer for the cluster, and adds `watch` and `selftest` to it.

    `bind` makes a session for a full JID and a carrier (c2s.session.Session). `nodes` is for the control socket and the
    HTTP API: it passes requests on.
    """

    def __init__(
        self,
        *,
        server: Server,
        member: bytes,
        registry: Registry,
        links: Links,
        calls: Calls,
        table: SessionTable,
        hooks: Hooks,
        accounts: Accounts,
        auth: Auth,
        bind: Bind,
    ) -> None:
        self.nodes = Nodes(name=server.node, member=member, links=links, calls=calls, table=table)
        self.watch = Watch(node=server.node, hooks=hooks)
        self.watch.connect(links, calls, table)
        self.puppets = Puppets(hooks=hooks, table=table, bind=bind)
        self.puppets.connect(calls)
        self.speaker = Speaker(registry, calls, server.spawn)
        registry.connect(self.nodes)
        test = SelfTest(
            node=server.node,
            server=server,
            accounts=accounts,
            auth=auth,
            hooks=hooks,
            puppets=self.puppets,
            nodes=self.nodes,
        )
        for source in (WatchCommands(self.watch), SelfTestCommands(test)):
            registry.register("core", commands_of(source))

    def close(self) -> None:
        """Before the modules stop."""
        self.puppets.close()
