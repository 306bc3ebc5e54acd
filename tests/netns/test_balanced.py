"""Clients, a balancer, two nodes and MariaDB, each a host of its own (harness/namespaces.py): chat goes on through the
balancer while a node is stopped, killed, cut off and brought back. What is asserted comes from the ledger.

The kernel need not have LVS: nftables (etc/balancer/nft-balancer) forwards packets as LVS with NAT does, nodes see the
clients' addresses, answers go back through the balancer. HAProxy runs with etc/balancer/haproxy.cfg.
"""

import asyncio
import os
import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.harness import namespaces
from tests.harness.cluster import ClusterNode, RealCluster, until
from tests.harness.ledger import PASSWORD, Ledger
from tests.harness.namespaces import Network
from tests.harness.server import PATIENCE
from tests.harness.traveller import Traveller
from tests.harness.watcher import Watcher
from tests.mariadb import MariaDB
from tests.mariadb import missing as no_mariadb
from xmppd.c2s.certificate import self_signed

pytestmark = [pytest.mark.long, pytest.mark.mariadb]

EXAMPLES = Path(__file__).parents[2] / "etc" / "balancer"
NAMES = ("juliet", "romeo", "nurse", "tybalt")
C2S = {"module": "c2s", "ip": "0.0.0.0"}
PROXIED = {"use_proxy_protocol": True, "trusted_proxies": [Network.INNER]}


class Verona:
    """All of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.network = Network()
        self.database: MariaDB | None = None
        self.cluster = RealCluster(folder, 0)
        self.ledger = Ledger(self.cluster)
        self.people: list[Traveller] = []
        self.balancer: subprocess.Popen[bytes] | None = None
        self.watcher: Watcher | None = None
        self.certificate = folder / "localhost.pem"

    def begin(self) -> None:
        host = self.network.database
        self.database = MariaDB(prefix=host.prefix, address=host.address)
        self.cluster.database = self.database.new_database()
        self.certificate.touch(mode=0o600)
        self.certificate.write_bytes(self_signed("localhost", datetime.now(UTC)))
        places = {f"node0{number}": each.address for number, each in enumerate(self.network.nodes, 1)}
        for host in self.network.nodes:
            self.cluster.add(
                cluster={"listen": f"{host.address}:4369", "hosts": places, "peer_timeout": 2},
                certfiles=[str(self.certificate)],
                listen=[
                    {**C2S, "port": 5222},
                    {**C2S, "port": 5223, "tls": True},
                    {**C2S, **PROXIED, "port": 5322},
                    {**C2S, **PROXIED, "port": 5323, "tls": True},
                    {"module": "http", "ip": host.address, "port": 5281, "request_handlers": {"/readyz": "ready"}},
                ],
            )
        for node in self.cluster:
            self.launch(node)
        for node in self.cluster:
            node.wait_until_ready()
        self.cluster.join()
        self.cluster.converged()

    def launch(self, node: ClusterNode) -> None:
        node.launch(*self.host(node).prefix)

    def host(self, node: ClusterNode) -> namespaces.Host:
        return self.network.nodes[self.cluster.nodes.index(node)]

    def other(self, node: ClusterNode) -> ClusterNode:
        return next(each for each in self.cluster if each is not node)

    # -- the balancer

    def balance(self, *argv: str | Path) -> None:
        """Start this on the balancer."""
        environment = {
            **os.environ,
            "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin",
            "XMPPD_INTERVAL": "0.5",
        }
        with (self.folder / "balancer.log").open("ab") as log:
            self.balancer = subprocess.Popen(
                [*self.network.balancer.prefix, *map(str, argv)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
            )
        self.watcher = Watcher(self.balancer.pid)

    def balance_with_nftables(self) -> None:
        addresses = [host.address for host in self.network.nodes]
        self.balance(EXAMPLES / "nft-balancer", Network.SERVICE, "5222,5223", *addresses)

    def balance_with_haproxy(self) -> None:
        text = (EXAMPLES / "haproxy.cfg").read_text()
        for number, host in enumerate(self.network.nodes, 1):
            text = re.sub(rf"10\.0\.0\.1{number}:52", f"{host.address}:53", text)
        file = self.folder / "haproxy.cfg"
        text = text.replace("/run/haproxy/admin.sock", str(self.folder / "admin.sock"))
        file.write_text(
            text.replace("maxconn 100000", "maxconn 1000")
        )  # or it asks for more open files than there may be
        self.balance("haproxy", "-db", "-f", file)

    # -- people

    async def populate(self) -> None:
        first = self.cluster[0]
        for name in NAMES:
            first.register(name, PASSWORD)
        for one in NAMES:
            for other in NAMES:
                if one != other:
                    first.quick("add_rosteritem", one, "localhost", other, "localhost", "", "", "both")
        for name, source in zip(NAMES, Network.CLIENTS, strict=False):
            person = Traveller(self.ledger, name, first, self.certificate, self._dialler(source))
            self.people.append(person)
            self.ledger.people[name] = person
            person.set_out()
        await self.ledger.until(self.all_there, "everybody is there", PATIENCE)
        await self.ledger.until(lambda: all(self.ledger.truth()), "everybody sees everybody", PATIENCE)

    def _dialler(self, source: str) -> Callable[[], Any]:
        return lambda: self.network.clients.connect((Network.SERVICE, 5223), source=source, patience=2.0)

    def all_there(self) -> bool:
        return all(person.client is not None for person in self.people)

    def sessions(self, node: ClusterNode) -> dict[str, tuple[str, str]]:
        """Where each person is, and from which address, as one node sees it."""
        found = {}
        for name in NAMES:
            for line in node.quick("user_sessions_info", name, "localhost").splitlines():
                if "\t" not in line:  # that the other node does not answer
                    continue
                connection, ip, *rest = line.split("\t")
                assert connection == "c2s_tls"
                found[name] = (next(each for each in rest if each.startswith("xmppd@")), ip)
        return found

    async def on(self, node: ClusterNode, seen_from: ClusterNode) -> list[str]:
        """The names of those who are there."""
        sessions = await asyncio.to_thread(self.sessions, seen_from)
        return [name for name, (where, _) in sessions.items() if where == node.name]

    async def gather_on(self, node: ClusterNode) -> None:
        """Wait until everybody is there, connected, and gets messages."""

        async def there() -> bool:
            return self.all_there() and len(await self.on(node, node)) == len(NAMES)

        await self._until(there, f"everybody is on {node.name}")
        await self.some_chat()

    async def spread(self) -> None:
        """Interrupt people until there are some on both nodes: the balancer decides where they come back."""

        async def spread() -> bool:
            if not self.all_there():
                return False
            numbers = [len(await self.on(node, node)) for node in self.cluster]
            if min(numbers) > 0 and sum(numbers) == len(NAMES):
                return True
            for person in self.people[::2]:
                person.interrupt()
            await asyncio.sleep(0.5)
            return False

        await self._until(spread, "people are on both nodes")
        await self.ledger.until(lambda: all(self.ledger.truth()), "everybody sees everybody", PATIENCE)

    async def some_chat(self) -> None:
        """Everybody has heard something new from everybody."""
        accounts = self.ledger._accounts
        before = {pair: len(account.arrived) for pair, account in accounts.items()}

        def heard() -> bool:
            self.ledger.missing()  # looks into every inbox
            return all(len(accounts[pair].arrived) > count for pair, count in before.items())

        await self.ledger.until(heard, "everybody hears from everybody", PATIENCE)

    async def _until(self, reached: Callable[[], Any], what: str) -> None:
        deadline = asyncio.get_running_loop().time() + PATIENCE
        while not await reached():
            assert asyncio.get_running_loop().time() < deadline, f"{what}: not in time\n{self.ledger.state()}"
            await asyncio.sleep(0.1)

    async def in_step(self) -> None:
        await asyncio.to_thread(self.cluster.converged)
        for node in self.cluster:
            check = (*self.network.balancer.prefix, str(EXAMPLES / "check_xmppd"), self.host(node).address)
            await asyncio.to_thread(
                until,
                lambda check=check: subprocess.run(check, capture_output=True).returncode == 0,
                f"{node.name} is ready",
            )

    # -- what happens to a node

    async def stop(self, node: ClusterNode) -> None:
        await asyncio.to_thread(node.stop)

    async def kill(self, node: ClusterNode) -> None:
        await asyncio.to_thread(node.kill)

    async def cut_off(self, node: ClusterNode) -> None:
        self.network.unplug(self.host(node))

    async def bring_back(self, node: ClusterNode) -> None:
        if node.process is None:
            self.launch(node)
            await asyncio.to_thread(node.wait_until_ready)
        else:
            self.network.plug_in(self.host(node))
        await self.in_step()

    async def happen(self, what: Callable[[ClusterNode], Any], node: ClusterNode) -> None:
        """To a node with people on it, who go to the other one; then it comes back, and people with it."""
        await self.spread()
        await what(node)
        await self.gather_on(self.other(node))
        await self.bring_back(node)

    async def go_through(self) -> None:
        """Everybody writes to everybody all the time, and all of it happens to a node."""
        self.ledger.begin(self.people, every=0.1)
        await self.happen(self.stop, self.cluster[0])
        await self.happen(self.kill, self.cluster[1])
        await self.happen(self.cut_off, self.cluster[0])
        await self.spread()
        await self.some_chat()
        await self.ledger.pause()
        await self.ledger.settle(PATIENCE)
        # Whether in order is not asked: people who move to another node while one dies or is cut off are now and then
        # given newer messages before some that the lost node had.
        self.ledger.check(ordered=False)

    async def end(self) -> None:
        try:
            await self.ledger.end()
        finally:
            await asyncio.to_thread(self._end)

    def _end(self) -> None:
        if self.balancer is not None and self.watcher is not None:
            self.watcher.dismiss()
            self.balancer.terminate()
            self.balancer.wait(PATIENCE)
        self.cluster.end()
        if self.database is not None:
            self.database.destroy()
        self.network.close()


@pytest.fixture
async def verona(tmp_path: Path) -> AsyncIterator[Verona]:
    why = namespaces.missing("nft") or no_mariadb()
    if why is not None:
        pytest.skip(why)
    verona = Verona(tmp_path)
    try:
        await asyncio.to_thread(verona.begin)
        yield verona
    finally:
        await verona.end()
    for node in verona.cluster:
        node.judge()


def addresses(verona: Verona) -> dict[str, str]:
    return {name: ip for name, (_, ip) in verona.sessions(verona.cluster[0]).items()}


OWN = dict(zip(NAMES, Network.CLIENTS, strict=False))


async def test_behind_dnat_chat_goes_on_while_a_node_is_stopped_killed_cut_off_and_brought_back(verona):
    verona.balance_with_nftables()
    await verona.populate()
    assert addresses(verona) == OWN

    await verona.go_through()

    assert addresses(verona) == OWN


async def test_behind_haproxy_the_same_and_nodes_know_the_clients_addresses_from_its_headers(verona):
    if shutil.which("haproxy", path=f"{os.environ.get('PATH', '')}:/usr/sbin") is None:
        pytest.skip("haproxy is not installed")
    verona.balance_with_haproxy()
    await verona.populate()
    assert addresses(verona) == OWN

    await verona.go_through()

    assert addresses(verona) == OWN
    for node in verona.cluster:
        assert "proxied connection refused" not in node.log
        logins = re.findall(r"session bound .* ip=(\S+)", node.log)
        assert set(logins) <= set(OWN.values())
