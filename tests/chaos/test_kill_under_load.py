"""One of two nodes is killed under load: what was acknowledged to a sender is at its recipient in the end, every time.

Each pair writes across the nodes, whoever loses the connection goes to the node that is left, and nothing else happens:
no fault hides what this one does.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from tests.chaos.book import Book
from tests.chaos.client import Client, Habits
from tests.chaos.main import OPTIONS
from tests.harness.cluster import RealCluster

PAIRS, RATE, SECONDS, KILL_AT = 50, 1000, 10.0, 5.0
PATIENCE = 90.0  # seconds for all to come back, and for what is missing to arrive
HABITS = Habits(resume=30)

pytestmark = [pytest.mark.long, pytest.mark.alone]


class Crowd:
    """Pairs with their ends on different nodes."""

    def __init__(self, cluster: RealCluster) -> None:
        self.cluster = cluster
        self.book = Book()
        self.counts: Counter[str] = Counter()
        self.clients: list[Client] = []
        self._next = 0
        for pair in range(PAIRS):
            for place in (0, 1):
                name, peer = f"u{pair}{'ab'[place]}", f"u{pair}{'ba'[place]}"
                cluster[0].register(name, "secret")
                dice = random.Random(name)
                self.clients.append(Client(name, peer, HABITS, self.book, self._ways(place), dice, self.counts))

    def _ways(self, home: int) -> Callable[[], dict[int, int]]:
        def ways() -> dict[int, int]:
            """The node of the client, or the others when that one is dead."""
            ports = {place: node.port for place, node in enumerate(self.cluster) if node.process is not None}
            return {home: ports[home]} if home in ports else ports

        return ways

    @asynccontextmanager
    async def online(self) -> AsyncIterator[None]:
        lives = [asyncio.create_task(client.live()) for client in self.clients]
        try:
            await self.until(self.all_up, "everybody has logged in")
            yield
        finally:
            for life in lives:
                life.cancel()
            await asyncio.gather(*lives, return_exceptions=True)
            for client in self.clients:
                client.end()

    def all_up(self) -> bool:
        return all(client.up for client in self.clients)

    @property
    def unacknowledged(self) -> int:
        return sum(client.unacknowledged for client in self.clients)

    async def until(self, reached: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + PATIENCE
        while not reached():
            assert time.monotonic() < end, f"{what}: not within {PATIENCE} s; {self.counts}, {self.book.verdict()}"
            for client in self.clients:
                client.look(asyncio.get_running_loop().time())
            await asyncio.sleep(0.1)

    async def write(self, seconds: float) -> None:
        """In turn, by the clock; who is not online misses his turn."""
        began = time.monotonic()
        written = 0
        while (passed := time.monotonic() - began) < seconds:
            while written < passed * RATE:
                self.clients[self._next % len(self.clients)].write(1)
                self._next += 1
                written += 1
            await asyncio.sleep(0.002)

    async def settle(self) -> None:
        """Everybody is there and nothing is on its way; then, for what waits in the database, a new session for all."""
        for client in self.clients:
            client.calm = True
        await self.until(lambda: self.all_up() and not self.unacknowledged, "everything is acknowledged")
        for client in self.clients:
            client.leave()
        await asyncio.sleep(1)
        await self.until(lambda: self.all_up() and not self.book.owed(), "what is acknowledged arrives")


async def killed_under_load(cluster: RealCluster) -> None:
    crowd = Crowd(cluster)
    async with crowd.online():
        await crowd.write(KILL_AT)
        on_their_way = crowd.unacknowledged
        cluster[1].kill()
        await crowd.write(SECONDS - KILL_AT)
        await crowd.settle()

    verdict = crowd.book.verdict()
    assert (verdict["lost"], verdict["wrong"], verdict["given_back"]) == (0, 0, 0), verdict
    assert verdict["acknowledged"] == verdict["sent"] == verdict["arrived"]
    assert on_their_way > 0, "nobody was at risk"
    assert verdict["sent"] > RATE * SECONDS / 2, "the machine is too slow for this to say anything"
    assert crowd.counts["resumptions that failed"] >= PAIRS / 2  # whose sessions died with their node


@pytest.mark.parametrize("run", range(3))
async def test_nothing_acknowledged_is_lost_when_a_node_is_killed(real_cluster, run):
    await killed_under_load(real_cluster(2, **OPTIONS))


@pytest.mark.mariadb
async def test_nothing_acknowledged_is_lost_when_a_node_is_killed_on_mariadb(real_cluster, databases, tmp_path):
    url = await databases.migrated("mariadb", tmp_path)
    try:
        cluster = real_cluster(2, database=url, **OPTIONS)
        await killed_under_load(cluster)
        cluster.end()
    finally:
        databases.drop(url)
