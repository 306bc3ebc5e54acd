"""A node dies, freezes or is cut off with messages that nobody has acknowledged: they arrive, in order."""

import asyncio
import os
import signal

import pytest

from tests.harness.house import House
from tests.harness.promise import spool_status
from tests.harness.scene import until

MESSAGES = 500


@pytest.fixture
async def house(real_cluster):
    """Two nodes, and clients with stream management on them."""
    house = House(real_cluster(2), counted=True)
    yield house
    await house.leave()


def say(client, numbers, to="juliet@localhost"):
    client.send_raw("".join(f"<message to='{to}' type='chat' id='m{n}'><body>{n}</body></message>" for n in numbers))


async def acknowledged(romeo, sent):
    """All that was sent is safe, so it counts."""
    romeo.sent = getattr(romeo, "sent", 1) + sent  # behind its presence
    romeo.request()
    await romeo.until_acked(romeo.sent)


async def bodies(juliet, count):
    return [int((await juliet.next_message()).body) for _ in range(count)]


async def test_what_a_killed_node_had_in_its_hands_arrives_in_the_new_session_in_order(house):
    house.nodes[1].expects_trouble = True
    romeo = await house.client("romeo", 0)
    juliet = await house.client("juliet", 1, "balcony", prompt=False)
    await until(lambda: house.nodes[0].quick("user_resources", "juliet", "localhost") != "", "her row")
    say(romeo, range(MESSAGES))
    await acknowledged(romeo, MESSAGES)
    assert juliet.requests == 1
    held = spool_status(house.nodes[0], of=house.nodes[1])["held"]
    assert held == MESSAGES

    house.nodes[1].kill()
    say(romeo, range(MESSAGES, MESSAGES + 50))  # on the way to a node that is dead
    again = await house.client("juliet", 0, "balcony")
    say(romeo, range(MESSAGES + 50, MESSAGES + 100))

    got = await bodies(again, MESSAGES + 100)
    assert list(dict.fromkeys(got)) == list(range(MESSAGES + 100))
    await acknowledged(romeo, 100)
    status = spool_status(house.nodes[0])
    assert status["taken_over"] == MESSAGES
    assert "messages of a dead node are free" in house.nodes[0].log
    await until(lambda: spool_status(house.nodes[0])["held"] == 0, "deletion")
    assert spool_status(house.nodes[0])["offline"] == 0


@pytest.mark.long
async def test_a_frozen_node_neither_loses_nor_keeps_what_it_holds(house):
    """It is taken for dead while it still lives."""
    for node in house.nodes:
        node.expects_trouble = True
    romeo = await house.client("romeo", 0)
    await house.client("juliet", 1, "balcony", prompt=False)
    await until(lambda: house.nodes[0].quick("user_resources", "juliet", "localhost") != "", "her row")
    say(romeo, range(100))
    await acknowledged(romeo, 100)
    pid = house.nodes[1].process.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        await until(lambda: house.nodes[0].quick("user_resources", "juliet", "localhost") == "", "its death")
        again = await house.client("juliet", 0, "chamber")
        assert await bodies(again, 100) == list(range(100))
    finally:
        os.kill(pid, signal.SIGCONT)
    await asyncio.to_thread(house.cluster.converged)
    say(romeo, range(100, 110), to="juliet@localhost/chamber")
    assert await bodies(again, 10) == list(range(100, 110))
    await again.sync()
    assert again.forget(lambda got: got.name == "message") == []  # nothing twice
    await until(lambda: spool_status(house.nodes[0])["offline"] == 0, "deletion")


@pytest.mark.long
async def test_a_split_with_one_database_delivers_nothing_twice(house):
    for node in house.nodes:
        node.expects_trouble = True
    romeo, nurse = await house.client("romeo", 0), await house.client("nurse", 1)
    absent = await house.client("juliet", 0, "balcony")
    await absent.disconnect()
    done = house.nodes[0].ctl("disconnect", house.nodes[1].name, "--for", "8")
    assert done.returncode == 0, done.stderr
    say(romeo, range(50))
    say(nurse, range(50, 100))
    for sender in (romeo, nurse):
        await acknowledged(sender, 50)
    juliets = await asyncio.gather(house.client("juliet", 0, "balcony"), house.client("juliet", 1, "chamber"))

    def all_there():
        return sum(client.handled for client in juliets) >= 100

    for _ in range(300):
        if all_there():
            break
        await asyncio.gather(*(client.sync() for client in juliets))
        await asyncio.sleep(0.1)
    await asyncio.to_thread(house.cluster.converged)
    got = []
    for client in juliets:
        await client.sync()
        got += [int(message.body) for message in client.forget(lambda got: got.name == "message")]
    assert sorted(got) == list(range(100))
