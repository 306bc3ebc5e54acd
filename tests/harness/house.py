"""Real nodes of one cluster, and clients with stream management on them."""

from typing import Any

from tests.harness.cluster import RealCluster
from tests.harness.managed import Managed
from tests.harness.scene import PASSWORD, Scene


class House:
    """Whoever makes one ends it with `leave`. `counted`: the clients' own presence is among the stanzas that stream
    management counts."""

    def __init__(self, cluster: RealCluster, *, counted: bool = False) -> None:
        self._counted = counted
        self.cluster = cluster
        self.nodes = list(cluster)
        self.scenes = [Scene(node) for node in self.nodes]
        self.clients: list[Managed] = []
        self._users: set[str] = set()

    async def client(self, user: str, node: int, resource: str | None = None, *, prompt: bool = True) -> Managed:
        """One more, available."""
        if user not in self._users:
            self._users.add(user)
            self.nodes[0].register(user, PASSWORD)
        client = Managed(self.nodes[node].certificate(), prompt=prompt)
        self.clients.append(client)
        await client.login(self.nodes[node].tls_port, user, PASSWORD, resource)
        if self._counted:
            await client.enable()
            await client.become_available()
        else:
            await client.become_available()
            await client.enable()
        return client

    async def resume(self, client: Managed, node: int, **more: Any) -> Any:
        """It comes back on that node."""
        client.context.load_verify_locations(self.nodes[node].certificate())
        return await client.come_back(self.nodes[node].tls_port, client.jid.partition("@")[0], PASSWORD, **more)

    async def leave(self) -> None:
        for client in self.clients:
            await client.leave()
        for scene in self.scenes:
            await scene.leave()
