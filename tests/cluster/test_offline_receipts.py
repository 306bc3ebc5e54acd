"""offline_receipt on several nodes: one receipt for each arrival, whichever node stores it."""

import asyncio
from collections import Counter

import pytest

from tests.cluster import worlds
from tests.modules.friends import JULIET, ROMEO
from tests.modules.test_offline_receipt import REQUEST, held, manage, receipts, received_ids, state
from tests.modules.world import message


async def prepared(made):
    await made.load(roster={}, presence={}, offline={}, offline_receipt={})
    await made[0].account("juliet", "romeo")
    return made


@pytest.fixture
async def nodes(databases, tmp_path):
    async with worlds.cluster(3, await databases.migrated("sqlite", tmp_path), tmp_path) as made:
        yield await prepared(made)


def ask(id, to=JULIET):
    return message(to, f"body of {id}", id, REQUEST)


async def test_or_09_the_node_that_stores_a_message_answers_it_alone(nodes):
    """OR-09: from the first node to the second, where its session was, to the third, where it has just ended."""
    romeo = await nodes[0].come("romeo", "orchard")
    juliet = await nodes[1].come("juliet", "balcony")
    await nodes.calm()
    nodes.net.hold("two", "one")  # the first goes on to believe in that session
    nodes.net.hold("three", "one")
    elsewhere = await nodes[2].come("juliet", "chamber")
    await nodes[1].until(lambda: nodes[1].table.rows(JULIET).get("chamber"))
    juliet.lose()
    nodes.net.hold("three", "two")  # and the second one in this
    elsewhere.lose()

    outcome = await romeo.send(ask("m1"))
    await nodes[2].until(lambda: nodes[2].spool.stored)
    for sender, target in (("two", "one"), ("three", "one"), ("three", "two")):
        nodes.net.let_go(sender, target)
    await nodes[0].stored(outcome)
    await nodes.calm()

    await nodes[0].until(lambda: receipts(romeo))
    await nodes.calm()
    assert received_ids(romeo) == ["m1"]
    assert [world.spool.stored for world in nodes.worlds] == [0, 0, 1]
    for world in nodes.worlds:  # whichever is asked, in a moment
        await world.until_true(lambda world=world: comes_to(world, "m1", "stored-offline"))


async def comes_to(world, id, expected):
    return await state(world, id) == expected


async def test_or_09_of_a_session_that_ends_elsewhere_each_message_is_answered_once(nodes):
    """OR-09: what it held becomes offline messages, on its own node, and every node would look."""
    romeo = await nodes[0].come("romeo", "orchard")
    juliet = await nodes[1].come("juliet", "balcony")
    manage(nodes[1], juliet, 300)
    await nodes.calm()
    for number in range(20):
        await romeo.send(ask(f"m{number}"))
    juliet.session.lost(clean=False, resumable=True)

    async def all_held():
        return await held(nodes[1]) == [True] * 20

    await nodes[1].until_true(all_held)
    assert receipts(romeo) == []

    juliet.session.close(clean=False)
    for _ in range(3):
        for world in nodes.worlds:
            world.loader._loaded["offline_receipt"].instance._freed.look()
        await asyncio.sleep(0.01)
    await nodes[0].until(lambda: len(receipts(romeo)) >= 20)
    await nodes.calm()

    assert Counter(received_ids(romeo)) == {f"m{number}": 1 for number in range(20)}


async def test_or_09_a_node_that_joins_meanwhile_makes_no_difference(databases, tmp_path):
    """OR-09: senders on all nodes, the new one among them, while it gets to know the others."""
    async with worlds.cluster(2, await databases.migrated("sqlite", tmp_path), tmp_path) as made:
        await prepared(made)
        romeo = await made[0].come("romeo", "orchard")
        sent = 0

        async def go_on(count):
            nonlocal sent
            for _ in range(count):
                outcome = await romeo.send(ask(f"m{sent}"))
                sent += 1
                await made[0].stored(outcome)

        await go_on(5)
        going = asyncio.create_task(go_on(30))
        third = await made.add(f"sqlite:///{tmp_path}/xmppd.db", tmp_path)
        await third.load(roster={}, presence={}, offline={}, offline_receipt={})
        await made.net.all_up()
        newcomer = await third.come("romeo", "new")
        early = await newcomer.send(ask("from-new"))  # the others may not know it yet
        await third.stored(early)
        await going
        await made.synced()
        await go_on(5)
        await made.calm()
        await made[0].until(lambda: len(receipts(romeo)) >= sent)
        await third.until(lambda: receipts(newcomer))
        await made.calm()

        assert Counter(received_ids(romeo)) == {f"m{number}": 1 for number in range(sent)}
        assert received_ids(newcomer) == ["from-new"]


async def test_the_sender_is_answered_on_another_node(nodes):
    romeo = await nodes[2].come("romeo", "orchard")
    juliet = await nodes[1].come("juliet", "balcony")
    await nodes.calm()

    outcome = await romeo.send(ask("m1", f"{JULIET}/balcony"))
    juliet.stalled = True
    juliet.lose()  # it had been written and had not arrived
    await nodes[2].stored(outcome)
    await nodes[2].until(lambda: receipts(romeo))
    await nodes.calm()

    assert received_ids(romeo) == ["m1"]
    (receipt,) = receipts(romeo)
    assert (receipt.from_.full, receipt.to.full) == (JULIET, f"{ROMEO}/orchard")
