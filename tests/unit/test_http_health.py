"""Readiness: one word, and a database that is asked by one at a time."""

import asyncio

import pytest

from xmppd.errors import StorageUnavailable
from xmppd.http.health import Ready


class Database:
    """Answers when it is let; counts who asks."""

    def __init__(self):
        self.asked = 0
        self.away = False
        self.answers = asyncio.Event()
        self.answers.set()

    async def ping(self):
        self.asked += 1
        await self.answers.wait()
        if self.away:
            raise StorageUnavailable("gone")


@pytest.fixture
async def database():
    return Database()


async def test_a_node_that_serves_is_ready(database):
    assert await Ready(lambda: "started", database.ping, lambda: True).word() == "ready"


@pytest.mark.parametrize("status", ["starting", "stopping"])
async def test_a_node_that_does_not_serve_says_so_and_asks_nobody(database, status):
    assert await Ready(lambda: status, database.ping, lambda: True).word() == status
    assert database.asked == 0


async def test_a_closed_listener_is_not_ready(database):
    assert await Ready(lambda: "started", database.ping, lambda: False).word() == "unavailable"


async def test_readiness_goes_and_comes_with_the_database(database):
    ready = Ready(lambda: "started", database.ping, lambda: True, cache=0)

    words = []
    for database.away in (False, True, False):
        words.append(await ready.word())

    assert words == ["ready", "unavailable", "ready"]


async def test_the_database_is_asked_once_however_many_ask(database):
    ready = Ready(lambda: "started", database.ping, lambda: True, cache=3600)
    database.answers.clear()

    asking = [asyncio.create_task(ready.word()) for _ in range(50)]
    await asyncio.sleep(0)
    asking[0].cancel()
    await asyncio.sleep(0)
    database.answers.set()

    assert await asyncio.gather(*asking[1:]) == ["ready"] * 49
    assert await ready.word() == "ready"
    assert database.asked == 1


async def test_a_database_that_never_answers_is_away(database):
    ready = Ready(lambda: "started", database.ping, lambda: True, patience=0.01)
    database.answers.clear()

    assert await ready.word() == "unavailable"


async def test_a_stop_while_the_database_is_asked_counts(database):
    status = "started"
    ready = Ready(lambda: status, database.ping, lambda: True)
    database.answers.clear()
    asking = asyncio.create_task(ready.word())
    await asyncio.sleep(0)

    status = "stopping"
    database.answers.set()

    assert await asking == "stopping"
