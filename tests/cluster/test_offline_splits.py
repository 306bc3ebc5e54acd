"""No message waits while its recipient is available, even if it was stored on the other side of a split."""

import asyncio

import pytest

from tests.cluster import worlds
from tests.cluster.test_presence import JULIET
from tests.modules.world import message
from xmppd.errors import StorageUnavailable
from xmppd.events import NodeDown


@pytest.fixture
async def nodes(databases, tmp_path):
    async with worlds.cluster(2, await databases.migrated("sqlite", tmp_path), tmp_path) as made:
        for index, world in enumerate(made.worlds):
            made.net.nodes[worlds.NAMES[index]][0].on_down(
                lambda peer, reason, world=world: world.hooks.notify(NodeDown(peer.name, peer.node, reason))
            )
        await made.load(roster={}, presence={}, offline={})
        await made[0].account("juliet", "romeo")
        yield made


async def part_and_write(nodes):
    """Juliet is on the other side when romeo writes to her; long ago, when both see each other again."""
    juliet, romeo = await nodes[1].come("juliet"), await nodes[0].come("romeo")
    await nodes.calm()
    nodes.net.cut("one", "two")
    await nodes.calm()
    await nodes[0].stored(await romeo.send(message(JULIET, "hist")))
    assert juliet.bodies == []
    nodes[0].advanced = nodes[1].advanced = 3600.0
    offline = nodes[0].loader._loaded["offline"].instance
    offline._stored_lately.clear()
    offline._parted.clear()  # it was loaded again meanwhile
    return juliet


async def test_what_was_stored_in_a_split_comes_when_it_ends(nodes):
    juliet = await part_and_write(nodes)

    nodes.net.heal()
    await nodes[1].until(lambda: juliet.bodies)

    assert juliet.bodies == ["hist"]


async def test_it_comes_later_when_the_database_is_away_at_the_end_of_the_split(nodes, monkeypatch):
    juliet = await part_and_write(nodes)
    monkeypatch.setattr("modules.offline.RETRY_FIRST", 0.01)
    spool = nodes[1].spool
    look, asked = spool.freed_since, []

    async def away(since, **more):
        asked.append(since)
        if len(asked) < 3:
            raise StorageUnavailable("away")
        return await look(since, **more)

    monkeypatch.setattr(spool, "freed_since", away)
    nodes.net.heal()
    await nodes[1].until(lambda: juliet.bodies)

    assert juliet.bodies == ["hist"]
    assert len(asked) == 3


async def test_what_was_stored_in_a_split_comes_before_what_is_written_at_its_end(nodes, monkeypatch):
    juliet, romeo = await nodes[1].come("juliet"), await nodes[0].come("romeo")
    await nodes.calm()
    nodes.net.cut("one", "two")
    await nodes.calm()
    for number in range(5):
        await nodes[0].stored(await romeo.send(message(JULIET, str(number))))
    stored = await romeo.send(message(JULIET, "5"))  # still on its way to the database
    nodes.net.heal()
    await nodes[0].until(lambda: nodes[0].table.rows(JULIET))

    for number in range(6, 10):
        await romeo.send(message(JULIET, str(number)))
    await nodes[1].until(lambda: len(juliet.bodies) == 10)

    assert juliet.bodies == [str(number) for number in range(10)]
    await nodes[0].stored(stored)


async def test_messages_do_not_wait_for_a_node_that_does_not_answer(nodes, monkeypatch):
    monkeypatch.setattr("modules.offline._HELD", 0.05)
    juliet, romeo = await nodes[1].come("juliet"), await nodes[0].come("romeo")
    await nodes.calm()
    nodes.net.cut("one", "two")
    await nodes.calm()
    await nodes[0].stored(await romeo.send(message(JULIET, "1")))
    never = nodes[1].loader._loaded["offline"].instance
    monkeypatch.setattr(type(never), "_flush_whole", lambda self, user: asyncio.sleep(60))
    nodes.net.heal()
    await nodes[0].until(lambda: nodes[0].table.rows(JULIET))

    await romeo.send(message(JULIET, "2"))
    await nodes[1].until(lambda: "2" in juliet.bodies)
