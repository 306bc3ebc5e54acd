"""Nodes that share a database and answer commands together: the worlds of tests/modules, with the core's commands."""

import asyncio
from typing import Any

from tests.cluster.memory_net import Net
from tests.cluster.worlds import replicate
from tests.golden.memory import Loader
from tests.modules.world import HOST, Place, World
from xmppd.admin.api_tokens import ApiTokenCommands, ApiTokens
from xmppd.admin.commands import register_core
from xmppd.admin.nodes import Nodes
from xmppd.admin.puppets import Puppet, Puppets
from xmppd.admin.registry import Call, Caller, commands_of
from xmppd.admin.request import Frame, answer
from xmppd.admin.results import Result
from xmppd.admin.selftest import SelfTest, SelfTestCommands
from xmppd.admin.talk import Speaker
from xmppd.admin.watch import Watch, WatchCommands
from xmppd.c2s.session import Session
from xmppd.log import get_logger
from xmppd.protocol.jid import JID
from xmppd.storage import Storage

CTL = Caller("ctl", "uid=0")


class ServerPart:
    """What commands ask of the server itself."""

    version = "1.2.3"
    status = "started"
    hosts = (HOST,)

    def __init__(self, node: str) -> None:
        self.node = node
        self.asked: list[str] = []
        self.report: list[str] = []

    def uptime(self) -> float:
        return 75.9

    async def reload_config(self) -> list[str]:
        self.asked.append("reload")
        return self.report

    def stop(self) -> None:
        self.asked.append("stop")

    def restart(self) -> None:
        self.asked.append("restart")


class Node(World):
    """One node of the net."""

    def __init__(self, storage: Storage, net: Net, name: str) -> None:
        self.links, self.calls = net.add(name)
        super().__init__(storage, Place(name, net.owner(name), self.links, self.calls))
        self.replica = replicate(self.table, self.links, net.owner(name))
        self.name = name
        self.part = ServerPart(name)
        self.modules = Loader()
        register_core(
            self.registry,
            server=self.part,
            accounts=self.accounts,
            auth=self.accountant,
            sessions=self.manager,
            router=self.router,
            loader=self.modules,
        )
        self.registry.register("core", commands_of(ApiTokenCommands(ApiTokens(storage, dict))))
        self.nodes = Nodes(name=name, member=self.owner.member, links=self.links, calls=self.calls, table=self.table)
        self.registry.connect(self.nodes)
        self.speaker = Speaker(self.registry, self.calls, self.spawn)
        self.watch = Watch(node=name, hooks=self.hooks)
        self.watch.connect(self.links, self.calls, self.table)
        self.puppets = Puppets(hooks=self.hooks, table=self.table, bind=self._bind)
        self.puppets.connect(self.calls)
        selftest = SelfTest(
            node=name,
            server=self.part,
            accounts=self.accounts,
            auth=self.accountant,
            hooks=self.hooks,
            puppets=self.puppets,
            nodes=self.nodes,
        )
        for source in (WatchCommands(self.watch), SelfTestCommands(selftest)):
            self.registry.register("core", commands_of(source))

    def _bind(self, jid: JID, carrier: Puppet) -> Session:
        return Session(jid, carrier, self.parts, get_logger("selftest"))

    async def close(self) -> None:
        self.puppets.close()
        self.replica.stop()
        await super().close()

    async def run(self, *argv: str, local: bool = False, **more: Any) -> Result:
        spec, args = self.registry.split(argv)
        return await self.registry.call(spec.name, args, caller=CTL, call=Call(CTL, local=local, **more))

    async def frames(self, frame: Frame, secret: str | None = None) -> list[Frame]:
        """What an operator's client is sent for a request, whichever node it names."""
        said: list[Frame] = []

        async def send(part: Frame) -> None:
            said.append(part)

        async def ask(name: str) -> str | None:
            return secret

        if frame.get("node", self.name) == self.name:
            await answer(self.registry, frame, CTL, send, ask)
        else:
            await self.nodes.relay(frame["node"], frame, CTL, send, ask)
        return said


class Cluster:
    """Nodes by name, over one database."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.net = Net()
        self.nodes: list[Node] = []

    async def add(self, *names: str) -> list[Node]:
        made = [Node(self.storage, self.net, name) for name in names]
        self.nodes += made
        await self.net.all_up()
        return made

    async def settle(self) -> None:
        """Every node has heard what happened so far."""
        for node in self.nodes:
            await node.calls.barrier()

    async def close(self) -> None:
        for node in self.nodes:
            await node.close()
        await self.net.close()
        await asyncio.sleep(0)
