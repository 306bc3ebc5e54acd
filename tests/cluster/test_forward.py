"""Stanzas between nodes: each arrives, in order, and its sender's node hears what became of it."""

import asyncio
import random

import pytest

from modules.offline.rules import repetition_key
from tests.cluster import worlds
from tests.modules.world import HOST, condition, message
from xmppd.cluster.interfaces import Kind
from xmppd.delivery import ERROR, SAFE, Pending, Record
from xmppd.errors import StanzaError
from xmppd.events import StanzaDelivering
from xmppd.protocol.jid import parse
from xmppd.protocol.stanza import Stanza, build
from xmppd.spool import Holder
from xmppd.storage import new_id

JULIET, ROMEO = f"juliet@{HOST}", f"romeo@{HOST}"
RESULT = "<iq type='result' id='r1' to='{}'/>"
REQUEST = "<iq type='get' id='q1' to='{}'><query xmlns='urn:x'/></iq>"


@pytest.fixture
async def three(databases, tmp_path):
    """Three nodes with two accounts and offline storage."""
    async with worlds.cluster(3, await databases.migrated("sqlite", tmp_path), tmp_path) as nodes:
        await nodes.load(offline={})
        await nodes[0].account("juliet", "romeo")
        yield nodes


async def settled(nodes, outcome):
    nodes.sweep()
    await nodes.calm()
    nodes.sweep()
    return await nodes[0].settled(outcome)


async def test_a_message_crosses_and_its_outcome_comes_back(three):
    juliet = await three[1].online("juliet")
    romeo = await three[0].online("romeo")
    await three.calm()

    outcome = await romeo.send(message(JULIET, "But soft"))
    await three.net.until(lambda: juliet.bodies)
    assert juliet.bodies == ["But soft"]
    assert isinstance(outcome, Pending)
    assert outcome.result is None
    three.sweep()
    await three.net.until(lambda: outcome.result is not None)

    assert outcome.result is SAFE
    assert three[0].forwarder.pending == 0
    assert three.net.frames[Kind.STANZA] == 1
    assert three.net.frames[Kind.OUTCOMES] == 1


async def test_chat_on_one_node_sends_no_frame(three):
    juliet = await three[0].online("juliet")
    romeo = await three[0].online("romeo")
    await three.calm()
    before = three.net.frames.total()

    for number in range(20):
        await romeo.send(message(JULIET, f"{number}"))
        await juliet.send(message(romeo.session.jid.full, f"{number}"))
    three[0].sweep()
    await asyncio.sleep(0.02)

    assert len(juliet.bodies) == len(romeo.bodies) == 20
    assert three.net.frames.total() == before


async def test_a_stanza_crosses_as_it_is(three):
    juliet = await three[1].online("juliet")
    romeo = await three[0].online("romeo")
    await three.calm()
    stanzas = [
        message(JULIET, "ünï 𝄞 &lt;b/&gt;", id="i" * 70_000),
        message(f"{JULIET}/balcony", None, id=None, type="headline", inner="<x xmlns='urn:y' a='&quot;'><z/></x>"),
        RESULT.format(f"{JULIET}/balcony"),
    ]

    for stanza in stanzas:
        await romeo.send(stanza)
    await three.calm()

    [first, second, third] = juliet.received[-3:]
    assert first.body == "ünï 𝄞 <b/>"
    assert first.id == "i" * 70_000
    assert (second.type, second.id, second.to.full) == ("headline", "", f"{JULIET}/balcony")
    assert second.child("urn:y", "x").get("a") == '"'
    assert (third.kind, third.type, third.id, third.from_) == ("iq", "result", "r1", romeo.session.jid)


async def test_each_of_several_nodes_gets_a_copy_and_one_is_enough(three):
    clients = [await world.online("juliet", f"r{number}", 5) for number, world in enumerate(three.worlds)]
    second = await three[2].online("juliet", "r9", 5)
    low = await three[1].online("juliet", "low", 1)
    romeo = await three[0].online("romeo")
    await three.calm()
    three[1].hooks.add("t", StanzaDelivering, refuse)

    outcome = await romeo.send(message(JULIET, "all of you"))

    assert await settled(three, outcome) is SAFE
    got = [client.bodies for client in (*clients, second, low)]
    assert got == [["all of you"], [], ["all of you"], ["all of you"], []]
    assert three.net.frames[Kind.STANZA] == 2  # one for each node, whatever the number of resources there
    assert [stanza for stanza in romeo.received if stanza.type == "error"] == []


def refuse(event):
    if event.stanza.kind == "message":
        raise StanzaError("not-acceptable", "no", application=b"<x xmlns='urn:app'/>")


async def test_when_all_copies_are_refused_the_sender_is_told_once(three):
    for number, world in enumerate(three.worlds):
        await world.online("juliet", f"r{number}", 5)
        world.hooks.add("t", StanzaDelivering, refuse)
    romeo = three[0].login("romeo")
    three[0].hooks.remove("t")
    for world in three.worlds:
        world.hooks.remove("t")
        world.hooks.add("t", StanzaDelivering, lambda event: refuse(event) if event.stanza.type == "chat" else None)
    await three.calm()

    outcome = await romeo.send(message(JULIET, "anybody?"))

    assert await settled(three, outcome) is ERROR
    [error] = romeo.received
    assert condition(error) == "not-acceptable"
    assert error.element.find("*/{urn:app}x") is not None


async def test_a_copy_for_somebody_who_has_gone_is_no_loss(three):
    """All who were to get one leave at the same moment: then it is stored, once."""
    clients = [await three[number].online("juliet", f"r{number}", 5) for number in (1, 2)]
    romeo = await three[0].online("romeo")
    await three.calm()
    three.net.hold("two", "one")
    three.net.hold("three", "one")
    for client in clients:
        client.session.close(clean=True)

    outcome = await romeo.send(message(JULIET, "still there?"))
    await asyncio.sleep(0.01)
    three.net.let_go("two", "one")
    three.net.let_go("three", "one")

    assert await settled(three, outcome) is SAFE
    assert len(await three[0].rows()) == 1


async def test_what_is_routed_again_and_reaches_no_node_does_not_wait_for_itself(three):
    clients = [await three[number].online("juliet", f"r{number}", 5) for number in (1, 2)]
    await three.calm()
    three[0].forwarder._channels.clear()  # as when links have gone down, and the rows behind them are about to
    outcomes = [Pending(), Pending()]

    three[0].manager.reroute(
        [
            Record(Stanza.from_bytes(message(JULIET, str(number)).encode()), outcome)
            for number, outcome in enumerate(outcomes)
        ]
    )

    assert [await settled(three, outcome) for outcome in outcomes] == [SAFE, SAFE]
    await three.net.until(lambda: any(client.bodies == ["0", "1"] for client in clients))


async def test_a_session_that_moved_meanwhile_gets_it_on_the_other_node(three):
    juliet = await three[1].online("juliet")
    romeo = await three[0].online("romeo")
    await three.calm()
    three.net.hold("two", "one")
    three.net.hold("three", "one")  # node one knows nothing of what follows
    juliet.session.close(clean=True)
    moved = await three[2].online("juliet")
    await three.net.until(lambda: three[1].manager.is_bound(moved.session.jid))

    outcome = await romeo.send(message(f"{JULIET}/balcony", "where are you"))
    await three.net.until(lambda: moved.bodies)
    three.net.let_go("two", "one")
    three.net.let_go("three", "one")

    assert await settled(three, outcome) is SAFE
    assert moved.bodies == ["where are you"]


async def test_nodes_that_point_at_each_other_do_not_play_ball(three):
    """One thinks that she is on two, two that she is on three, three that she is on two."""
    romeo = await three[0].online("romeo")
    first = await three[1].online("juliet", "a")
    second = await three[2].online("juliet", "b")
    await three.calm()
    first.session.close(clean=True)  # noted by three only behind the message
    three.net.hold("two", "three")
    three.net.hold("two", "one")
    three.net.hold("three", "one")
    three.net.hold("three", "two")
    second.session.close(clean=True)
    frames = three.net.frames[Kind.STANZA]

    outcome = await romeo.send(message(f"{JULIET}/a", "whose ball"))
    await asyncio.sleep(0.02)
    for sender, target in list(three.net.held):
        three.net.let_go(sender, target)

    assert await settled(three, outcome) is SAFE
    assert three.net.frames[Kind.STANZA] - frames <= 2
    assert len(await three[0].rows()) == 1


async def test_without_storage_the_node_that_decides_tells_the_sender(three):
    juliet = await three[1].online("juliet")
    romeo = await three[0].online("romeo")
    await three.calm()
    three.net.hold("two", "one")
    juliet.session.close(clean=True)

    outcome = await romeo.send(message(f"{JULIET}/balcony", None, type="groupchat"))
    request = await romeo.send(REQUEST.format(f"{JULIET}/balcony"))
    await asyncio.sleep(0.01)
    three.net.let_go("two", "one")

    assert await settled(three, outcome) is ERROR
    assert await settled(three, request) is ERROR
    errors = [stanza for stanza in romeo.received if stanza.type == "error"]
    assert [(error.kind, condition(error)) for error in errors] == [
        ("message", "service-unavailable"),
        ("iq", "service-unavailable"),
    ]


async def test_what_nobody_waits_for_is_safe_at_once(three):
    await three[1].online("juliet")
    romeo = await three[0].online("romeo")
    await three.calm()
    outcomes = three.net.frames[Kind.OUTCOMES]

    for stanza in (
        message(JULIET, type="headline"),
        f"<message type='error' to='{JULIET}/balcony'/>",
        RESULT.format(f"{JULIET}/balcony"),
        f"<presence to='{JULIET}'/>",
    ):
        assert await romeo.send(stanza) is SAFE
    await three.calm()

    assert three.net.frames[Kind.STANZA] == 4
    assert three.net.frames[Kind.OUTCOMES] == outcomes
    assert three[0].forwarder.pending == 0


# -- order


async def test_the_order_of_a_sender_is_kept(three):
    juliet = await three[1].online("juliet")
    romeo = await three[0].online("romeo")
    dice = random.Random(4)
    three.net.delay = lambda: dice.random() * 0.003

    for number in range(200):
        await romeo.send(message(JULIET if number % 3 else f"{JULIET}/balcony", f"{number}"))
        if number % 20 == 0:
            await asyncio.sleep(0.001)
    await three.net.until(lambda: len(juliet.bodies) == 200)

    assert juliet.bodies == [f"{number}" for number in range(200)]


async def test_what_waits_on_the_other_node_holds_back_what_comes_behind_it(three):
    juliet = await three[1].online("juliet")
    romeo, nurse = await three[0].online("romeo"), await three[0].online("nurse")
    gate = asyncio.Event()

    async def slow(event):
        if event.stanza.body == "first":
            await gate.wait()

    three[1].hooks.add("t", StanzaDelivering, slow)
    await three.calm()

    outcomes = [await romeo.send(message(JULIET, body)) for body in ("first", "second", "third")]
    await nurse.send(message(JULIET, "from another"))
    await three.net.until(lambda: juliet.bodies)
    assert juliet.bodies == ["from another"]
    gate.set()
    await three.net.until(lambda: len(juliet.bodies) == 4)

    assert juliet.bodies == ["from another", "first", "second", "third"]
    assert [await settled(three, outcome) for outcome in outcomes] == [SAFE] * 3


# -- nodes that go


async def test_a_node_that_dies_loses_nothing(three):
    juliet = await three[1].online("juliet")
    romeo = await three[0].online("romeo")
    await three.calm()
    outcomes = [await romeo.send(message(JULIET, f"{number}", id=f"m{number}")) for number in range(10)]
    await three.net.until(lambda: len(juliet.bodies) == 10)  # they have arrived there, and nobody has acknowledged them
    outcomes += [await romeo.send(message(JULIET, f"{number}", id=f"m{number}")) for number in range(10, 20)]

    three.net.kill("two")
    for outcome in outcomes:
        assert await three[0].settled(outcome) is SAFE
    later = await three[2].online("juliet")
    await three[2].until(lambda: len(later.bodies) == 20)

    assert later.bodies == [f"{number}" for number in range(20)]
    assert three[0].forwarder.rerouted == 20


@pytest.mark.parametrize("available", [True, False])
async def test_what_a_node_has_that_nobody_knows_to_be_dead_comes_first(three, available):
    """Juliet is back elsewhere before romeo's node has heard that hers is dead; with or without presence."""
    juliet = await three[1].online("juliet")
    romeo = await three[0].online("romeo")
    await three.calm()
    for other in ("one", "three"):
        three.net.hold("two", other)
    outcomes = [await romeo.send(message(JULIET, f"{number}", id=f"m{number}")) for number in range(5)]
    await three.net.until(lambda: len(juliet.bodies) == 5)

    later = await three[2].online("juliet") if available else three[2].login("juliet")
    await three.net.until(lambda: three[0].table.rows(JULIET)["balcony"].owner == three.owner(2))
    outcomes.append(await romeo.send(message(JULIET, "5", id="m5")))
    await asyncio.sleep(0.1)
    assert later.bodies == []
    assert outcomes[-1].result is None
    three.net.kill("two")
    if not available:
        await three.net.until(lambda: not three[0].manager.succession.holds(JULIET))
        await later.available()
    await three[2].until(lambda: len(later.bodies) == 6)

    assert later.bodies == [f"{number}" for number in range(6)]
    three[2].sweep()
    await three.net.until(lambda: all(outcome.result is SAFE for outcome in outcomes))


async def test_what_waited_elsewhere_is_no_repetition_of_the_row_it_leaves_there(three):
    """That row is deleted as soon as the message is safe on the node that it was passed on to."""
    stanza = build("message", {"type": "chat", "id": "m1", "from": f"{ROMEO}/orchard", "to": JULIET}, b"<body>1</body>")
    row = new_id()
    holder = Holder(three.node(0), 1, "a session that has left")
    key = repetition_key(stanza, parse(JULIET))
    await three[0].spool.keep(
        HOST, "juliet", ROMEO, stanza.xml, dedup=key, quota=None, holder=holder, row_id=row, for_account=True
    )

    outcome = three[0].forwarder.pass_on(three.node(1), stanza, "balcony")  # where the session has ended meanwhile
    assert await three[0].settled(outcome) is SAFE
    await three[0].spool.delete([row])
    juliet = await three[2].online("juliet")

    await three[2].until(lambda: juliet.bodies)
    assert juliet.bodies == ["1"]


async def test_a_request_to_a_node_that_dies_is_answered(three):
    await three[1].online("juliet")
    romeo = await three[0].online("romeo")
    await three.calm()
    outcome = await romeo.send(REQUEST.format(f"{JULIET}/balcony"))

    three.net.kill("two")

    assert await three[0].settled(outcome) is ERROR
    assert condition(romeo.received[-1]) == "service-unavailable"


async def test_copies_of_a_node_that_dies_are_covered_by_the_others(three):
    await three[1].online("juliet", "dies", 5)
    alive = await three[2].online("juliet", "lives", 5)
    romeo = await three[0].online("romeo")
    await three.calm()

    outcome = await romeo.send(message(JULIET, "to both"))
    three.net.kill("two")
    await three.net.until(lambda: alive.bodies)
    three[2].sweep()

    assert await three[0].settled(outcome) is SAFE
    assert alive.bodies == ["to both"]
    assert await three[0].rows() == []


async def test_both_copies_lost_is_one_message_kept(three):
    await three[1].online("juliet", "a", 5)
    await three[2].online("juliet", "b", 5)
    romeo = await three[0].online("romeo")
    await three.calm()
    outcome = await romeo.send(message(JULIET, "to both"))

    three.net.kill("two")
    three.net.kill("three")

    assert await three[0].settled(outcome) is SAFE
    assert len(await three[0].rows()) == 1


# -- sessions


async def test_the_same_address_on_two_nodes_ends_the_older_session(three):
    romeo = await three[2].online("romeo")
    old = await three[0].online("juliet")
    await three.calm()
    old.stalled = True
    unsure = await romeo.send(message(f"{JULIET}/balcony", "not yet taken"))
    await three.net.until(lambda: old.bodies)

    new = three[1].login("juliet")
    await asyncio.wait_for(new.session.bound(), 5)

    assert old.ended is not None
    assert old.ended.condition == "conflict"
    assert new.ended is None
    for world in three.worlds:
        [row] = world.table.rows(JULIET).values()
        assert row.owner == three.owner(1)
    await three.net.until(lambda: new.bodies)
    assert new.bodies == ["not yet taken"]
    assert await settled(three, unsure) is SAFE


async def test_of_two_who_bind_at_once_one_stays(three):
    clients = [three[number].login("juliet") for number in (0, 1)]
    await three.calm()
    assert sorted(client.ended is None for client in clients) == [False, True]
    assert all(len(world.table.rows(JULIET)) == 1 for world in three.worlds)


async def test_sessions_on_other_nodes_are_kicked(three):
    clients = [await world.online("juliet", f"r{number}") for number, world in enumerate(three.worlds)]
    await three.calm()

    assert three[0].manager.kick("juliet", HOST, "r1", "out", condition="policy-violation") == 1
    await three.calm()
    assert [client.ended and client.ended.condition for client in clients] == [None, "policy-violation", None]
    assert three[0].manager.kick("juliet", HOST, None, "out") == 2
    await three.calm()

    assert all(client.ended is not None for client in clients)
    assert three[1].table.count() == 0


async def test_the_oldest_session_ends_on_whatever_node(three):
    clients = [await world.online("juliet", f"r{number}") for number, world in enumerate(three.worlds)]
    await three.calm()

    three[2].manager.end_oldest(parse(JULIET), 1)
    await three.calm()

    assert [client.ended and client.ended.condition for client in clients] == ["conflict", "conflict", None]


async def test_the_last_session_is_the_last_of_the_cluster(three):
    first = await three[0].online("juliet", "a")
    second = await three[1].online("juliet", "b")
    await three.calm()
    assert three[0].manager.close(first.session.row) is False
    await three.calm()
    assert three[1].manager.close(second.session.row) is True
