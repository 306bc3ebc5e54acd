"""A stream that is lost on one node and resumed on another one: real processes, real sockets."""

import asyncio
import signal
import sqlite3
from contextlib import closing

import pytest

from tests.harness.house import House
from tests.harness.promise import spool_status
from tests.harness.scene import until


@pytest.fixture
async def house(real_cluster):
    """`house.client(user)`: a client with stream management; `house.nodes`."""
    house = House(real_cluster(2))
    yield house
    await house.leave()


def say(client, to, *bodies):
    client.send_raw("".join(f"<message to='{to}' type='chat' id='{b}'><body>{b}</body></message>" for b in bodies))


async def seen_by(others, client):
    """The tables of their nodes show it, which takes a moment: it answers a request that goes from there."""
    for other in others:
        while True:
            id = other.send_message(client.jid, "are you there?", type="headline")
            await other.sync()
            await client.sync()
            if client.forget(lambda got, id=id: got.id == id):
                break
            await asyncio.sleep(0.05)


async def heard(client, count):
    return [(await client.next_message()).body for _ in range(count)]


async def test_a_stream_goes_on_elsewhere_again_and_again(house):
    romeos = [await house.client("romeo", 0, "a"), await house.client("nurse", 1, "b")]
    juliet = await house.client("juliet", 0, "balcony")
    watcher = await house.client("juliet", 1, "room")
    watcher.send_raw("<presence><priority>-1</priority></presence>")
    await watcher.sync()
    watcher.forget()
    for turn in range(6):  # there and back, and to the node where it is
        for number, romeo in enumerate(romeos):
            say(romeo, "juliet@localhost", f"{number}.{turn}a")
        assert sorted(await heard(juliet, 2)) == [f"0.{turn}a", f"1.{turn}a"]
        await juliet.cut()
        for number, romeo in enumerate(romeos):
            say(romeo, "juliet@localhost", f"{number}.{turn}b")
            say(romeo, juliet.jid, f"{number}.{turn}c")
            await romeo.sync()
        answer = await house.resume(juliet, (turn + 1) % 2 if turn < 4 else 1)
        assert (answer.name, answer.xml.get("h")) == ("resumed", str(2 * turn))
        got = await heard(juliet, 4)
        for number in range(2):
            assert [body for body in got if body[0] == str(number)] == [f"{number}.{turn}b", f"{number}.{turn}c"]
        for romeo in romeos:
            juliet.send_message(romeo.jid, "here")
            assert (await romeo.next_message()).body == "here"
        juliet.request()
        await juliet.until_acked(2 * turn + 2)
    for romeo in romeos:
        romeo.request()
        await romeo.until_acked(6 * 4)
    await watcher.sync()
    assert watcher.forget(lambda got: got.type == "unavailable") == []
    where = house.nodes[0].quick("user_resources", "juliet", "localhost").split()
    assert sorted(where) == ["balcony", "room"]
    # It ends as any other, seen by all.
    await juliet.disconnect()
    gone = await watcher.wait_for(lambda got: got.type == "unavailable", "unavailable")
    assert gone.sender == juliet.jid


async def test_messages_on_their_way_arrive_once_and_in_order(house):
    romeos = [await house.client("romeo", 0), await house.client("nurse", 1)]
    juliet = await house.client("juliet", 0, "balcony")
    await seen_by(romeos, juliet)
    before = [0, 0]
    for which, romeo in enumerate(romeos):
        romeo.request()
        await romeo.until(lambda romeo=romeo: len(romeo.acks) > 0, "an answer")
        before[which] = romeo.acked
    stop = asyncio.Event()
    sent = [0, 0]

    async def talk(which):
        while not stop.is_set():
            say(romeos[which], "juliet@localhost", *[f"{which}.{sent[which] + n}" for n in range(5)])
            sent[which] += 5
            await romeos[which].drain()
            await asyncio.sleep(0.01)
            romeos[which].request()
            # They are not far ahead: no more than this machine can take.
            await romeos[which].until_acked(sent[which] + before[which] - 200)

    talking = [asyncio.create_task(talk(which)) for which in range(2)]
    for node in (1, 0, 0, 1, 0, 1):
        await asyncio.sleep(0.2)
        await juliet.cut()
        assert (await house.resume(juliet, node)).name == "resumed"
    stop.set()
    await asyncio.gather(*talking)
    for which, romeo in enumerate(romeos):
        romeo.request()
        await romeo.until_acked(sent[which] + before[which])
    await juliet.sync()
    got = [message.body for message in juliet.forget(lambda got: got.name == "message")]
    for which in range(2):
        mine = [body for body in got if body.startswith(f"{which}.")]
        assert list(dict.fromkeys(mine)) == [f"{which}.{number}" for number in range(sent[which])]
    assert house.nodes[0].quick("get_offline_count", "juliet", "localhost") == "0"
    for node in house.nodes:
        await until(lambda node=node: spool_status(house.nodes[0], of=node)["held"] == 0, "deletion")


async def test_what_the_modules_know_goes_along(house):
    romeo = await house.client("romeo", 0, "orchard")
    juliet = await house.client("juliet", 1, "balcony")
    await romeo.query("get", "<query xmlns='jabber:iq:roster'/>")
    romeo.send_presence(juliet.jid)
    assert (await juliet.next_presence()).sender == romeo.jid
    await romeo.cut()
    assert (await house.resume(romeo, 1)).name == "resumed"
    # Interested in the roster as before ...
    await romeo.query("set", "<query xmlns='jabber:iq:roster'><item jid='nurse@localhost'/></query>")
    push = await romeo.next_stanza("iq")
    assert push.payload[0].get("jid") == "nurse@localhost"
    # ... and whoever got directed presence hears of the end.
    await romeo.disconnect()
    gone = await juliet.next_presence()
    assert (gone.sender, gone.type) == (romeo.jid, "unavailable")


async def test_it_is_nobody_elses_and_dies_with_its_node(house):
    house.nodes[0].expects_trouble = True
    juliet, romeo = await house.client("juliet", 0, "balcony"), await house.client("romeo", 0)
    await juliet.cut()
    await romeo.cut()
    assert (await house.resume(romeo, 1, id=juliet.id)).name == "failed"
    house.nodes[0].kill()
    answer = await house.resume(juliet, 1)
    assert (answer.name, answer.xml.get("h")) == ("failed", None)
    assert (await juliet.bind("balcony")).type == "result"


async def test_a_node_that_stops_is_seen_until_what_its_sessions_leave_is_stored(house):
    """Whoever goes to another node meanwhile has to get that first, and that one can only ask a node that it sees."""
    staying, leaving = house.nodes
    romeo, juliet = await house.client("romeo", 0), await house.client("juliet", 1, "balcony", prompt=False)
    say(romeo, "juliet@localhost", "1")
    assert await heard(juliet, 1) == ["1"]
    with closing(sqlite3.connect(house.cluster.folder / "shared.db", isolation_level=None)) as database:
        database.execute("BEGIN IMMEDIATE")
        leaving.send_signal(signal.SIGTERM)
        await juliet.assert_stream_error("system-shutdown")
        for _ in range(10):
            await asyncio.sleep(0.1)
            assert staying.quick("nodes") == leaving.name
        database.execute("ROLLBACK")
    assert await asyncio.to_thread(leaving.wait) == 0
    assert staying.quick("nodes") == ""
    again = await house.client("juliet", 0, "balcony")
    assert await heard(again, 1) == ["1"]
