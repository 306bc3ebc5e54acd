"""An acknowledged message is not lost: what its sender is told, and what the spool has to do with it."""

import asyncio
import time

import pytest

from tests.harness.managed import Managed
from tests.harness.promise import session_info, spool_status, write_locked
from tests.harness.scene import PASSWORD, until

DELAY = "{urn:xmpp:delay}delay"


@pytest.fixture
async def enter(server):
    """`enter(user)`: a client with stream management."""
    before = spool_status(server.node)

    async def enter(user, resource=None, *, prompt=True, available=True, max=None, scene=server):
        scene.account(user)
        client = Managed(scene.node.certificate(), prompt=prompt)
        client.scene, client.before = scene, before
        scene.adopt(client)
        await client.login(scene.node.tls_port, user, PASSWORD, resource)
        if available:
            await client.become_available()
        await client.enable(max=max)
        return client

    yield enter
    await server.leave()
    for user, host in server.accounts:
        server.node.quick("kick_user", user, host)  # who still waits to be resumed
    await until(lambda: spool_status(server.node)["waiting"] == before["waiting"], "the end of the sessions")


async def come_back(client, **more):
    return await client.come_back(client.scene.node.tls_port, client.jid.partition("@")[0], PASSWORD, **more)


def say(client, *bodies, to="juliet@localhost", more=""):
    client.send_raw(
        "".join(f"<message to='{to}' type='chat' id='{b}'><body>{b}</body>{more}</message>" for b in bodies)
    )


async def heard(client, count):
    return [await client.next_message() for _ in range(count)]


def numbers(client):
    """`spool_status` of the node, as it has changed since the test began."""
    now = spool_status(client.scene.node)
    return {name: value - client.before[name] for name, value in now.items() if isinstance(value, int)}


def info(client, jid):
    [found] = session_info(client.scene.node, jid)
    return found


async def hold(enter, seconds):
    """Neither a commit nor an acknowledgement comes for so long."""
    romeo, juliet = await enter("romeo"), await enter("juliet", prompt=False)
    with write_locked(romeo.scene.node):
        say(romeo, "one", "two")
        romeo.request()
        await juliet.until_requested()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            romeo.request()
            await romeo.sync()
            await asyncio.sleep(0.1)
        assert set(romeo.acks) <= {0}
        assert info(romeo, "juliet@localhost")["unacknowledged"] >= 2
    return romeo, juliet


async def test_nothing_is_acknowledged_before_it_is_acknowledged_or_committed(enter):
    romeo, juliet = await hold(enter, 1.5)
    await romeo.until_acked(2)  # the commit is enough
    assert juliet.requests == 1
    assert numbers(romeo)["held"] == 2


async def test_prompt_clients_cost_no_write(enter):
    romeo, juliet = await enter("romeo"), await enter("juliet")
    for turn in range(10):
        say(romeo, *(f"{turn}.{number}" for number in range(20)))
        romeo.request()
        await romeo.until_acked(20 * (turn + 1))
    assert len(await heard(juliet, 200)) == 200
    assert (numbers(romeo)["spooled"], numbers(romeo)["held"]) == (0, 0)
    assert juliet.requests < 200


async def test_a_slow_acknowledgement_deletes_what_was_spooled(enter):
    romeo, juliet = await enter("romeo"), await enter("juliet", prompt=False)
    say(romeo, "one", "two", "three")
    romeo.request()
    await romeo.until_acked(3)
    await heard(juliet, 3)
    shown = info(romeo, juliet.jid)
    assert (shown["state"], shown["spooled"]) == ("connected", 3)
    juliet.acknowledge(2)
    await until(lambda: numbers(romeo)["held"] == 1, "deletion")
    juliet.acknowledge(3)
    await until(lambda: numbers(romeo)["held"] == 0, "deletion")
    await juliet.disconnect()
    other = await enter("juliet")
    await other.sync()
    assert other.forget(lambda got: got.name == "message") == []


async def test_a_client_with_a_long_way_is_given_time(enter):
    romeo, juliet = await enter("romeo"), await enter("juliet", prompt=False)
    for number in range(6):
        say(romeo, str(number))
        await juliet.until_requested(number + 1)
        await asyncio.sleep(0.25)
        juliet.acknowledge()
        romeo.request()
        await romeo.until_acked(number + 1)
    before = numbers(romeo)["spooled"]
    assert info(romeo, juliet.jid)["round_trip_ms"] >= 200
    for number in range(6, 9):
        say(romeo, str(number))
        await juliet.until_requested(number + 1)
        await asyncio.sleep(0.25)
        juliet.acknowledge()
        romeo.request()
        await romeo.until_acked(number + 1)
    assert numbers(romeo)["spooled"] == before


async def test_what_a_lost_session_had_not_acknowledged_comes_once_in_order_with_its_time(enter):
    romeo, juliet = await enter("romeo"), await enter("juliet", "balcony", prompt=False, max=1)
    say(romeo, *map(str, range(3)))
    romeo.request()
    await romeo.until_acked(3)
    await juliet.cut()
    say(romeo, *map(str, range(3, 6)))
    romeo.request()
    await romeo.until_acked(6)
    await until(lambda: numbers(romeo)["offline"] == 6, "the end of the session")
    say(romeo, *map(str, range(6, 9)))
    other = await enter("juliet", "room")
    say(romeo, *map(str, range(9, 12)))
    got = await heard(other, 12)
    assert [message.body for message in got] == [str(number) for number in range(12)]
    assert all(message.xml.find(DELAY) is not None for message in got[:9])
    await until(lambda: numbers(romeo)["offline"] == numbers(romeo)["held"] == 0, "deletion")


async def test_another_session_gets_what_was_not_acknowledged_before_what_is_new(enter):
    romeo, juliet = await enter("romeo"), await enter("juliet", "balcony", prompt=False)
    other = await enter("juliet", "room", available=False)
    say(romeo, *map(str, range(20)))
    romeo.request()
    await romeo.until_acked(20)
    other.send_raw("<presence><priority>0</priority></presence>")
    await other.sync()
    other.forget()
    await juliet.disconnect()
    say(romeo, *map(str, range(20, 40)))
    got = [message.body for message in await heard(other, 40)]
    assert got == [str(number) for number in range(40)]


async def test_what_may_not_be_kept_waits_for_nobody(enter):
    romeo, juliet = await enter("romeo"), await enter("juliet", "balcony", prompt=False)
    say(romeo, "secret", more="<no-store xmlns='urn:xmpp:hints'/>")
    romeo.send_raw(f"<iq type='get' id='q' to='{juliet.jid}'><query xmlns='jabber:iq:version'/></iq>")
    romeo.request()
    await romeo.until_acked(2)
    assert numbers(romeo)["held"] == 0
    await juliet.disconnect()
    answer = await romeo.wait_for(lambda got: got.id == "q", "an answer")
    assert answer.type == "error"


async def test_a_node_that_is_killed_has_lost_nothing(enter, fresh):
    scene = fresh()
    romeo, juliet = await enter("romeo", scene=scene), await enter("juliet", prompt=False, scene=scene)
    assert juliet.handled == 0
    say(romeo, *map(str, range(50)))
    romeo.request()
    await romeo.until_acked(50)
    scene.node.kill()
    scene.node.start()
    again = await enter("juliet", scene=scene)
    assert [message.body for message in await heard(again, 50)] == [str(number) for number in range(50)]


async def test_resumed_streams_get_what_is_spooled_and_it_is_deleted_then(enter):
    romeo, juliet = await enter("romeo"), await enter("juliet", prompt=False)
    say(romeo, "one", "two")
    romeo.request()
    await romeo.until_acked(2)
    await heard(juliet, 2)
    await juliet.cut()
    say(romeo, "three")
    juliet.prompt = True
    assert (await come_back(juliet, h=0)).name == "resumed"
    got = await heard(juliet, 3)
    assert [message.body for message in got] == ["one", "two", "three"]
    await until(lambda: numbers(romeo)["held"] == 0, "deletion")
    assert numbers(romeo)["redelivered"] >= 2


async def test_the_same_message_again_is_one_row(enter):
    romeo, juliet = await enter("romeo"), await enter("juliet", prompt=False)
    say(romeo, "one")
    say(romeo, "one")
    romeo.send_raw("<message to='juliet@localhost' type='chat'><body>none</body></message>" * 2)
    romeo.request()
    await romeo.until_acked(4)
    assert (numbers(romeo)["held"], numbers(romeo)["duplicates"]) == (3, 1)
    await juliet.disconnect()
    again = await enter("juliet")
    assert [message.body for message in await heard(again, 3)] == ["one", "none", "none"]
