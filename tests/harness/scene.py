"""One test on one server: its accounts and its clients, all gone at the end."""

import asyncio
from collections.abc import Callable
from typing import Any

from tests.harness.client import Client
from tests.harness.inbox import PATIENCE, Inbox
from tests.harness.node_client import NodeClient
from tests.harness.raw import Raw
from tests.harness.server import Server

PASSWORD = "O, be some other name!"


class Scene:
    """What the `server` fixture is: `login`, `ctl`, and the server behind it as `node`."""

    def __init__(self, node: Server) -> None:
        self.node = node
        self._clients: list[Client | Raw | NodeClient] = []
        self._accounts: set[tuple[str, str]] = set()

    # -- accounts

    def account(self, user: str, host: str = "localhost", password: str = PASSWORD) -> None:
        """Make sure that it exists; it goes with the test."""
        if (user, host) not in self._accounts:
            self._accounts.add((user, host))
            self.node.register(user, password, host)

    @property
    def accounts(self) -> list[tuple[str, str]]:
        return sorted(self._accounts)

    def forget_accounts(self) -> None:
        """They go with the server."""
        self._accounts.clear()

    async def stored(self, user: str) -> int:
        """How many messages wait for a user, once everything that was sent before has been written."""
        self.account("sink")
        before = self.stored_now("sink")
        self.node.quick("send_message", "chat", "localhost", "sink@localhost", "", "flush")
        await until(lambda: self.stored_now("sink") > before, "a commit")
        return self.stored_now(user)

    def stored_now(self, user: str) -> int:
        answer = self.node.quick("get_offline_count", user, "localhost")
        return int(answer) if answer.isdigit() else 0

    # -- clients

    async def login(
        self,
        user: str,
        resource: str | None = None,
        *,
        priority: int | None = None,
        available: bool = True,
        direct_tls: bool = False,
        mechanism: str | None = None,
        host: str = "localhost",
    ) -> Client:
        """A slixmpp client, connected and (unless told otherwise) available."""
        self.account(user, host)
        jid = f"{user}@{host}" + (f"/{resource}" if resource else "")
        client = Client(jid, PASSWORD, self.node.certificate(host), mechanism=mechanism)
        self._clients.append(client)
        await client.connect(self.node.tls_port if direct_tls else self.node.port, direct_tls=direct_tls)
        if available:
            await client.become_available(priority)
        return client

    async def raw_login(
        self, user: str, resource: str | None = None, *, priority: int | None = None, available: bool = True
    ) -> Raw:
        """The same with the raw client, over direct TLS."""
        self.account(user)
        client = self.raw()
        await client.login(self.node.tls_port, user, PASSWORD, resource)
        if available:
            await client.become_available(priority)
        return client

    def raw(self, host: str = "localhost") -> Raw:
        """A raw client that has not connected yet."""
        client = Raw(self.node.certificate(host), host)
        self._clients.append(client)
        return client

    def adopt(self, client: NodeClient) -> None:
        """See to its end, too."""
        self._clients.append(client)

    async def connected(self) -> Raw:
        """A raw client on an unencrypted connection."""
        client = self.raw()
        await client.connect(self.node.port)
        return client

    async def encrypted(self) -> Raw:
        """A raw client over direct TLS that has said nothing yet."""
        client = self.raw()
        await client.connect_tls(self.node.tls_port)
        return client

    # -- the server

    def ctl(self, *argv: str, stdin: str | None = None) -> Any:
        return self.node.ctl(*argv, stdin=stdin)

    def asked(self, *argv: str) -> str:
        return self.node.asked(*argv)

    async def leave(self) -> None:
        """Log out the clients."""
        for client in self._clients:
            await client.leave()
        self._clients.clear()

    async def end(self) -> None:
        """Log out the clients and remove the accounts. Of several nodes of a cluster all `leave` first."""
        await self.leave()
        node = self.node
        if node.process is None or node.process.poll() is not None:
            return
        await until(lambda: node.quick("connected_users_number") == "0", "the last session to end")
        for user, host in self._accounts:
            node.unregister(user, host)


async def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for something that can only be looked at."""
    deadline = asyncio.get_running_loop().time() + PATIENCE
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, f"waited in vain for {what}"
        await asyncio.sleep(0.01)


async def together(*clients: Inbox) -> None:
    """A round trip of each, twice: what any of them sent has reached all of them."""
    for _ in range(2):
        for client in clients:
            await client.sync()
