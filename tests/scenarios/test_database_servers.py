"""A cluster of ours on databases that come in several: nothing acknowledged is lost, whichever of them dies."""

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests import mariadb, mariadb_clusters
from tests.harness.cluster import RealCluster, until
from tests.harness.house import House
from tests.harness.next_version import make_next_version

MODULES = {"roster": {}, "presence": {}, "offline": {"max_messages": 100_000}, "ping": {}, "vcard": {}}


class Load:
    """Each writer sends to somebody who is absent, and counts what the server has taken."""

    def __init__(self, house: House) -> None:
        self._house = house
        self._over = asyncio.Event()
        self.sent: dict[str, int] = {}
        self.acked: dict[str, int] = {}

    async def begin(self) -> None:
        house = self._house
        await (await house.client("nurse", 0)).leave()
        self._writers = [await house.client(f"writer{n}", n) for n in range(len(house.nodes))]
        self.acked = {f"writer{n}": 0 for n in range(len(self._writers))}
        self._tasks = [asyncio.create_task(self._write(n)) for n in range(len(self._writers))]

    async def _write(self, place: int) -> None:
        writer, name = self._writers[place], f"writer{place}"
        self.sent[name] = 0
        while not self._over.is_set():
            number = self.sent[name]
            self.sent[name] += 1
            writer.send_raw(
                f"<message to='nurse@localhost' type='chat' id='{name}-{number}'><body>{name} {number}</body></message>"
                "<r xmlns='urn:xmpp:sm:3'/>"
            )
            self.acked[name] = writer.acked - 1  # its presence was the first stanza
            await asyncio.sleep(0.02)
        writer.request()
        await writer.until_acked(self.sent[name] + 1)

    async def until_more(self, count: int) -> None:
        """So many more are acknowledged to each writer."""
        goals = {name: acked + count for name, acked in self.acked.items()}
        async with asyncio.timeout(60):
            while any(self.acked[name] < goal for name, goal in goals.items()):  # noqa: ASYNC110
                await asyncio.sleep(0.05)

    async def end(self) -> None:
        """Everything that was sent is acknowledged, and the nurse gets it, each writer's in order."""
        self._over.set()
        await asyncio.gather(*self._tasks)
        nurse = await self._house.client("nurse", len(self._house.nodes) - 1)
        got: dict[str, list[int]] = {name: [] for name in self.sent}
        returned = [error for writer in self._writers for error in writer.forget(lambda got: got.type == "error")]
        assert not returned, returned[:3]
        while any(len(set(got[name])) < count for name, count in self.sent.items()):
            message = await nurse.next_message()
            if message.type == "error" or message.body is None:
                raise AssertionError(message)
            name, _, number = message.body.partition(" ")
            got[name].append(int(number))
        for name, numbers in got.items():
            assert list(dict.fromkeys(numbers)) == list(range(self.sent[name]))


@pytest.fixture
async def housed(real_cluster: Callable[..., RealCluster]):
    """`housed(urls)`: as many nodes as URLs, in step, and clients."""
    houses: list[House] = []

    async def make(urls: list[str], **database: Any) -> House:
        cluster = real_cluster(len(urls), start=False, modules=MODULES)
        for node, url in zip(cluster, urls, strict=True):
            node.configure({**node.options, "database": {"url": url, **database}})
            node.expects_trouble = True
        await asyncio.to_thread(cluster.start)
        await asyncio.to_thread(cluster.join)
        await asyncio.to_thread(cluster.converged)
        houses.append(House(cluster, counted=True))
        return houses[-1]

    yield make
    for house in houses:
        await house.leave()


def rows(node: Any) -> list[dict[str, str]]:
    """What `sql_status` says of this node."""
    names = "node endpoint role state size used waiting round_trip_us statements slow errors retries lag_ms wsrep_size"
    lines = (line.split("\t") for line in node.quick("sql_status").splitlines())
    found = [dict(zip(names.split(), line, strict=False)) for line in lines]
    return [row for row in found if row["node"] == node.options["node"]]


async def test_a_node_tells_of_its_one_database(server):
    (row,) = await asyncio.to_thread(rows, server.node)

    assert (row["role"], row["state"], row["lag_ms"], row["wsrep_size"]) == ("write*", "up", "-1", "-1")
    assert int(row["statements"]) > 0
    answer = await asyncio.to_thread(server.node.ctl, "sql_endpoint", row["endpoint"], "down")
    assert answer.returncode == 1
    assert "the only server that takes writes" in answer.stderr + answer.stdout


@pytest.mark.long
@pytest.mark.mariadb
async def test_a_database_gone_for_half_a_minute_costs_a_cluster_nothing_it_has_acknowledged(housed, mariadb_server):
    house = await housed([mariadb_server.new_database()] * 2)
    romeo, juliet = await house.client("romeo", 0), await house.client("juliet", 1)
    romeo.send_message("juliet@localhost", "art thou there?")
    assert (await juliet.next_message()).body == "art thou there?"
    load = Load(house)
    await load.begin()
    await load.until_more(50)

    await asyncio.to_thread(mariadb_server.kill)
    romeo.send_message("juliet@localhost", "how late is it?")
    assert (await juliet.next_message()).body == "how late is it?"  # who is online goes on
    await asyncio.sleep(25)
    await asyncio.to_thread(mariadb_server.start)
    await load.until_more(50)

    await load.end()


@pytest.fixture(scope="module")
def galera_cluster() -> Iterator[mariadb_clusters.Galera]:
    if why := mariadb.missing() or mariadb_clusters.missing():
        pytest.skip(why)
    cluster = mariadb_clusters.Galera()
    yield cluster
    cluster.destroy()


@pytest.mark.long
@pytest.mark.mariadb
async def test_a_galera_node_killed_under_load_takes_nothing_with_it(galera_cluster, housed):
    assert [node.status("wsrep_cluster_size") for node in galera_cluster.nodes] == ["3", "3", "3"]
    name = galera_cluster.new_database()
    house = await housed([galera_cluster.url(name, first) for first in range(3)])
    for node, own in zip(house.nodes, galera_cluster.nodes, strict=True):
        (writer,) = [row for row in rows(node) if row["role"] == "write*"]
        assert writer["endpoint"] == f"127.0.0.1:{own.port}"
        until(lambda node=node: {row["wsrep_size"] for row in rows(node)} == {"3"}, "each server counts three")
    load = Load(house)
    await load.begin()
    await load.until_more(50)

    dead = galera_cluster.nodes[1]
    await asyncio.to_thread(dead.kill)
    await load.until_more(100)
    await load.end()

    assert "writes go to another database server" in house.nodes[1].log
    (writer,) = [row for row in rows(house.nodes[1]) if row["role"] == "write*"]
    assert writer["endpoint"] != f"127.0.0.1:{dead.port}"
    assert [node.status("wsrep_cluster_size") for node in galera_cluster.nodes if node is not dead] == ["2", "2"]


@pytest.mark.long
async def test_a_node_of_the_version_before_goes_on_beside_one_that_has_migrated(real_cluster, tmp_path):
    cluster = real_cluster(2, start=False, modules=MODULES)
    older, newer = cluster
    newer.environment["PYTHONPATH"] = str(make_next_version(tmp_path / "next", expands=True))
    newer.from_nothing = True
    await asyncio.to_thread(older.start)
    await asyncio.to_thread(newer.start)
    assert "migration done" in newer.log
    await asyncio.to_thread(cluster.join)
    await asyncio.to_thread(cluster.converged)
    house = House(cluster, counted=True)
    romeo, juliet = await house.client("romeo", 0), await house.client("juliet", 1)
    await (await house.client("nurse", 0)).leave()

    for place, (sender, recipient) in enumerate(((romeo, juliet), (juliet, romeo))):
        sender.send_message(recipient.jid, f"{place}")
        assert (await recipient.next_message()).body == f"{place}"
        sender.send_message("nurse@localhost", f"{place}")
        sender.request()
        await sender.until_acked(3)
    await house.leave()
    await asyncio.to_thread(older.restart)
    await asyncio.to_thread(cluster.converged)
    again = House(cluster, counted=True)
    again._users.add("nurse")
    nurse = await again.client("nurse", 0)
    assert {(await nurse.next_message()).body for _ in range(2)} == {"0", "1"}
    await again.leave()

    assert "schema is newer than this version" in older.log
    assert "revision=9999" in older.log
