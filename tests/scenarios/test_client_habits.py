"""What clients are like: quick and slow to acknowledge, without stream management, flooding, reading slowly, giving the
same id to everything. Each gets every message once and in order, and costs the server a bounded amount."""

import asyncio
import random
from collections import Counter

import pytest

from tests.chaos.book import ARRIVED, Book
from tests.chaos.client import Client, Habits
from tests.chaos.main import OPTIONS
from tests.harness.scene import until

COUNT = 300
QUEUE = 1000  # stanzas a client may leave unacknowledged
READERS = {
    "without stream management": Habits(managed=False),
    "0 ms": Habits(),
    "50 ms": Habits(delay=0.05),
    "300 ms": Habits(delay=0.3),
    "flooded": Habits(floods=True),
    "flooded, 300 ms": Habits(delay=0.3, floods=True),
}
WRITERS = {
    "acknowledged": Habits(),
    "not acknowledged": Habits(managed=False),
    "the same id for all": Habits(same_id=True),
}


@pytest.fixture
async def crowd(served):
    """`crowd.pair(one, other)`: two clients with such habits, who write to each other, logged in; `crowd.server`."""
    limits = {"max_ack_queue": QUEUE, "resume_timeout": "30s"}
    crowd = Crowd(await served(**OPTIONS | {"stream_management": limits}))
    yield crowd
    await crowd.end()


class Crowd:
    def __init__(self, server) -> None:
        self.server = server
        self.book = Book()
        self.clients: list[Client] = []
        self.lives: list[asyncio.Task[None]] = []
        self.counts: Counter[str] = Counter()

    async def pair(self, one: Habits, other: Habits) -> tuple[Client, Client]:
        number = len(self.clients) // 2
        romeo, juliet = f"romeo{number}", f"juliet{number}"
        for name, peer, habits in ((romeo, juliet, one), (juliet, romeo, other)):
            self.server.account(name, password="secret")
            places = {0: self.server.node.port}
            client = Client(name, peer, habits, self.book, places.copy, random.Random(name), self.counts)
            self.clients.append(client)
            self.lives.append(asyncio.create_task(client.live()))
        await until(lambda: all(client.up for client in self.clients), "both of them")
        return self.clients[-2], self.clients[-1]

    async def write(self, client: Client, count: int, at_once: int) -> None:
        """As fast as the client's window lets it."""
        while count:
            count -= client.write(min(count, at_once))
            await asyncio.sleep(0.002)

    async def arrived(self, client: Client, count: int) -> None:
        await until(lambda: client.account.count(ARRIVED) == count, f"{count} messages of {client.name}")

    async def end(self) -> None:
        for life in self.lives:
            life.cancel()
        for client in self.clients:
            client.leave()
        await asyncio.gather(*self.lives, return_exceptions=True)
        await until(lambda: all(client.stream is None or client.stream.lost for client in self.clients), "their end")


async def test_everything_comes_once_and_in_order_whatever_clients_are_like(crowd):
    pairs = [await crowd.pair(one, other) for one in WRITERS.values() for other in READERS.values()]

    writing = []
    for romeo, juliet in pairs:
        at_once = 300 if juliet.habits.floods else 10
        writing += [crowd.write(client, COUNT, at_once) for client in (romeo, juliet)]
    await asyncio.gather(*writing)
    for client in crowd.clients:
        await crowd.arrived(client, COUNT)
        await until(lambda client=client: not client.unacknowledged, f"the last acknowledgement of {client.name}")

    verdict = crowd.book.verdict()
    assert verdict["good"], verdict["named"]
    assert verdict["duplicates"] == verdict["given_back"] == 0
    assert verdict["acknowledged"] == COUNT * sum(client.habits.managed for client in crowd.clients)
    assert crowd.counts["logins"] == len(crowd.clients)  # nobody was cut off


async def test_who_reads_slowly_gets_everything_all_the_same(crowd):
    romeo, juliet = await crowd.pair(Habits(floods=True), Habits(delay=0.05, slow=True))
    before = crowd.server.node.memory

    for _ in range(5):
        juliet.pause(0.3)
        await crowd.write(romeo, QUEUE, 100)
    await crowd.arrived(romeo, 5 * QUEUE)

    verdict = crowd.book.verdict()
    assert verdict["good"], verdict["named"]
    assert verdict["duplicates"] == 0
    assert crowd.server.node.memory - before < 32 * 1024  # KiB


async def test_who_reads_nothing_costs_no_more_than_the_queue(crowd):
    romeo, juliet = await crowd.pair(Habits(managed=False), Habits(resume=30))
    before = crowd.server.node.memory
    juliet.pause(1000)

    for _ in range(8):
        await crowd.write(romeo, QUEUE, 100)
    await until(lambda: crowd.server.node.quick("connected_users_number") == "1", "the reader's end")

    assert crowd.server.node.memory - before < 64 * 1024  # KiB
    juliet.vanish()  # it sees that it has lost its stream, comes back, and has lost nothing
    await crowd.arrived(romeo, 8 * QUEUE)
    verdict = crowd.book.verdict()
    assert verdict["good"], verdict["named"]
