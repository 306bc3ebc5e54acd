"""What one client sends to another arrives in the order in which it was sent, whatever sessions and nodes do."""

import asyncio
import time
from dataclasses import replace

import pytest
from lxml import etree

from tests.cluster import worlds
from tests.modules.world import HOST, Client, message
from xmppd import succession
from xmppd.c2s.handover import Handover
from xmppd.c2s.resumption import Resumption
from xmppd.c2s.session import Session
from xmppd.c2s.spooling import Spooling
from xmppd.chores import KeptMessage
from xmppd.delivery import ERROR, SAFE, Pending, Record
from xmppd.errors import StorageUnavailable
from xmppd.events import MessagesFreeing, SessionArrived, SessionClosed, SessionLeft
from xmppd.forward import Forwarded
from xmppd.protocol.jid import parse
from xmppd.protocol.stanza import Stanza
from xmppd.spool import Alone, Holder
from xmppd.storage import new_id, next_place

JULIET = f"juliet@{HOST}"
ENABLE = etree.fromstring("<enable xmlns='urn:xmpp:sm:3' resume='true'/>")


def equip(world):
    """With stream management, and sessions that go from node to node."""
    parts = replace(
        world.parts,
        resumption=Resumption(node=world.owner.member),
        spooling=Spooling(world.spool, world.hooks, world.owner, reroute=world.manager.reroute),
    )
    world.parts = parts
    world.manager.freeing = parts.spooling.freeing
    world.router.on_kept(parts.spooling.give_back)
    parts.resumption.handover = Handover(world.place.links, world.place.calls, world.forwarder, lambda: parts)


@pytest.fixture
async def nodes(databases, tmp_path):
    async with worlds.cluster(3, await databases.migrated("sqlite", tmp_path), tmp_path) as made:
        for world in made.worlds:
            equip(world)
        await made.load(offline={})
        await made[0].account("juliet", "romeo", "nurse")
        yield made
        for world in made.worlds:
            world.parts.spooling.stop()


class Resumed(Client):
    """A connection on which a session goes on."""

    def __init__(self, session):
        self.received, self.stalled, self.last_heard, self.session = [], False, time.monotonic(), session

    def carry(self, session): ...

    def write(self, data):
        if data.startswith(b"<message"):
            super().write(data)


def later(event, work):
    """What that gives, which begins when the event is set."""
    if event.is_set():
        return work()

    async def wait():
        await event.wait()
        return await work()

    return asyncio.ensure_future(wait())


async def row(world, body, holder=None):
    """Of a message from Romeo to Juliet; its id."""
    xml = message(JULIET, body).replace("<message", f"<message from='romeo@{HOST}'").encode()
    _, item = world.spool.keep_item(HOST, "juliet", f"romeo@{HOST}", xml, dedup=None, quota=None, holder=holder)
    await world.spool.submit(item)
    return item.id


async def say(client, *bodies, to=JULIET):
    return [await client.send(message(to, body, id=f"id-{body}")) for body in bodies]


def managed(client):
    """Its stream management, which is on from now on; it acknowledges nothing by itself."""
    client.write = lambda data: Client.write(client, data) if data.startswith(b"<message") else None
    client.session.parts.resumption.enable(client.session, ENABLE)
    return client.session.managed


def freeze(nodes, name):
    for other in worlds.NAMES:
        if other != name:
            nodes.net.hold(name, other)
            nodes.net.hold(other, name)


def thaw(nodes, name):
    for other in worlds.NAMES:
        if other != name:
            nodes.net.let_go(name, other)
            nodes.net.let_go(other, name)


async def test_what_is_on_its_way_to_a_session_that_ends_comes_before_what_is_sent_then(nodes):
    juliet, romeo = await nodes[1].online("juliet"), await nodes[0].online("romeo")
    await nodes.calm()
    nodes.net.hold("one", "two")
    await say(romeo, "1", "2", "3")
    juliet.session.close(clean=True)
    await nodes.net.until(lambda: not nodes[0].table.rows(JULIET))
    again = await nodes[0].online("juliet", "chamber")

    await say(romeo, "4", "5")
    await asyncio.sleep(0.05)
    assert again.bodies == []
    nodes.net.let_go("one", "two")
    await nodes.net.until(lambda: len(again.bodies) >= 5)

    assert again.bodies == ["1", "2", "3", "4", "5"]


async def test_they_are_stored_in_that_order_too(nodes):
    juliet, romeo = await nodes[1].online("juliet"), await nodes[0].online("romeo")
    await nodes.calm()
    nodes.net.hold("one", "two")
    first = await say(romeo, "1", "2")
    juliet.session.close(clean=True)
    await nodes.net.until(lambda: not nodes[0].table.rows(JULIET))
    then = await say(romeo, "3")
    nodes.net.let_go("one", "two")
    for outcome in [*first, *then]:
        await nodes[0].stored(outcome)

    again = await nodes[2].online("juliet")
    await nodes.net.until(lambda: len(again.bodies) >= 3)

    assert again.bodies == ["1", "2", "3"]


async def test_the_place_of_a_message_is_that_at_which_it_was_received_not_stored(nodes):
    await nodes[1].online("juliet")
    romeo, nurse = await nodes[0].online("romeo"), await nodes[2].online("nurse")
    await nodes.calm()
    nodes.net.hold("one", "two")
    first = await say(romeo, "first")
    second = await say(nurse, "second")
    await nodes.net.until(lambda: nodes[1].forwarder.frames_received > 0)
    for session in list(nodes[1].manager.local()):
        session.close(clean=False)
    await nodes[2].stored(second[0])

    nodes.net.let_go("one", "two")
    await nodes[0].stored(first[0])

    assert [b"first" in stanza for _, stanza in await nodes[0].rows()] == [True, False]


async def test_what_a_frozen_node_holds_comes_before_what_is_sent_to_the_new_session(nodes, monkeypatch):
    monkeypatch.setattr(succession, "_UNDISPUTED", 0.05)
    juliet, romeo = await nodes[1].online("juliet"), await nodes[0].online("romeo")
    managed(juliet)
    await nodes.calm()
    held = await say(romeo, "1", "2")
    for outcome in held:
        await nodes[0].stored(outcome)  # in the database, held by her session
    freeze(nodes, "two")

    again = nodes[0].login("juliet")
    await again.session.bound()  # does not wait for ever
    coming = asyncio.create_task(again.available())
    await nodes.net.until(lambda: nodes[0].manager.is_available(parse(JULIET)))
    await say(romeo, "3")
    await asyncio.sleep(0.05)
    assert again.bodies == []
    thaw(nodes, "two")
    await nodes.net.until(lambda: len(again.bodies) >= 3)
    await coming

    assert again.bodies == ["1", "2", "3"]
    assert juliet.ended is not None


async def test_what_was_sent_to_a_node_that_dies_comes_before_what_is_sent_before_the_new_session_is_available(nodes):
    juliet, romeo = await nodes[1].online("juliet"), await nodes[0].online("romeo")
    managed(juliet)
    await nodes.calm()
    freeze(nodes, "two")
    await say(romeo, "1", "2")

    again = nodes[0].login("juliet")
    bound = asyncio.ensure_future(again.session.bound())
    await say(romeo, "3")
    await asyncio.sleep(0.05)
    assert await nodes[0].rows() == []
    nodes.net.kill("two")
    await bound
    await again.available()
    await nodes.net.until(lambda: len(again.bodies) >= 3)

    assert again.bodies == ["1", "2", "3"]


async def waits_until_free(nodes, writer, again, freed, first=lambda: None):
    """What is written to her now comes behind "1" and "2", which are not free before the event is set."""
    saying = asyncio.create_task(say(writer, "3"))
    await asyncio.sleep(0.1)
    assert again.bodies == []
    first()
    freed.set()
    await nodes.net.until(lambda: len(again.bodies) >= 3)
    await saying

    assert again.bodies == ["1", "2", "3"]


async def test_after_a_split_what_the_older_session_has_comes_before_what_is_new(nodes):
    juliet, romeo = await nodes[1].online("juliet"), await nodes[1].online("romeo")
    managed(juliet)
    await nodes.calm()
    nodes.net.cut("one", "two")
    nodes.net.cut("three", "two")
    await nodes.net.until(lambda: not nodes[0].table.rows(JULIET))
    again, elsewhere = await nodes[0].online("juliet"), await nodes[0].online("romeo", "elsewhere")
    freed, release = asyncio.Event(), nodes[1].spool.release
    for outcome in await say(romeo, "1", "2"):
        await nodes[1].stored(outcome)

    nodes[1].spool.release = lambda ids, holder: later(freed, lambda: release(ids, holder))
    nodes.net.heal()
    await nodes.net.until(lambda: juliet.ended is not None)
    await waits_until_free(nodes, elsewhere, again, freed)


async def two_sessions(nodes):
    """An older session of juliet's on the second node, which has messages that are in the database; and a newer one on
    the third, which has not met it yet. What the older one leaves is free when the event is set."""
    juliet, romeo = await nodes[1].online("juliet"), await nodes[0].online("romeo")
    managed(juliet)
    await nodes.calm()
    nodes.net.cut("one", "two")
    nodes.net.cut("three", "two")
    await nodes.net.until(lambda: not nodes[2].table.rows(JULIET))
    again = await nodes[2].online("juliet")
    nodes.net.heal("one", "two")
    nodes.net.cut("one", "three")
    await nodes.net.until(lambda: nodes[0].table.nodes_of(JULIET) == {nodes.node(1)})
    await nodes.calm()
    for outcome in await say(romeo, "1", "2"):
        await nodes[0].stored(outcome)
    freed, release = asyncio.Event(), nodes[1].spool.release
    nodes[1].spool.release = lambda ids, holder: later(freed, lambda: release(ids, holder))
    return juliet, romeo, again, freed


async def test_after_a_split_others_ask_for_what_the_older_session_has_left(nodes):
    """The newer one's node has not heard of it when they know that it has ended."""
    juliet, romeo, again, freed = await two_sessions(nodes)
    nodes.net.hold("two", "three")
    nodes.net.heal()
    await nodes.net.until(lambda: nodes[0].table.nodes_of(JULIET) == {nodes.node(2)})
    await nodes.net.until(lambda: juliet.ended is not None)

    await waits_until_free(nodes, romeo, again, freed, first=lambda: nodes.net.let_go("two", "three"))


async def test_after_a_split_the_newer_session_is_told_of_an_older_one_that_it_has_never_seen(nodes):
    juliet, _, again, freed = await two_sessions(nodes)
    elsewhere = await nodes[2].online("romeo", "elsewhere")
    nodes[2].table.on_displacing.clear()  # it had ended before the table came
    nodes.net.heal()
    await nodes.net.until(lambda: juliet.ended is not None and again.session.holds_messages)

    await waits_until_free(nodes, elsewhere, again, freed)


async def goes_on_elsewhere(nodes, juliet, romeo):
    """Her session ends, all know that, she logs in on the third node, and romeo writes "3" when his node knows it."""
    juliet.session.close(clean=False)
    await nodes.net.until(lambda: not nodes[2].table.rows(JULIET) and not nodes[0].table.rows(JULIET))
    coming = asyncio.create_task(nodes[2].online("juliet", "chamber"))
    await nodes.net.until(lambda: nodes[0].manager.is_available(parse(JULIET)))
    await say(romeo, "3")
    return coming


async def test_what_a_session_leaves_that_has_just_ended_elsewhere_is_waited_for(nodes):
    """Its row is in the database, and free a little later."""
    juliet, romeo = await nodes[1].online("juliet"), await nodes[0].online("romeo")
    managed(juliet)
    await nodes.calm()
    for outcome in await say(romeo, "1", "2"):
        await nodes[0].stored(outcome)
    freed = asyncio.Event()
    release = nodes[1].spool.release

    nodes[1].spool.release = lambda ids, holder: later(freed, lambda: release(ids, holder))
    coming = await goes_on_elsewhere(nodes, juliet, romeo)
    await asyncio.sleep(0.05)
    freed.set()
    again = await coming
    await nodes.net.until(lambda: len(again.bodies) >= 3)

    assert again.bodies == ["1", "2", "3"]


async def test_what_such_a_session_leaves_is_waited_for_until_it_is_free_not_only_until_it_is_stored(nodes):
    """It was on its way to that session when it ended, and the database was slow."""
    juliet, romeo = await nodes[1].online("juliet"), await nodes[0].online("romeo")
    managed(juliet)
    await nodes.calm()
    world, freed, committed = nodes[1], asyncio.Event(), asyncio.Event()
    release, write = world.spool.release, world.spool.submit_all

    world.spool.submit_all = lambda items: later(committed, lambda: write(items))
    world.spool.release = lambda ids, holder: later(freed, lambda: release(ids, holder))
    outcomes = await say(romeo, "1", "2")
    await nodes.net.until(lambda: len(juliet.bodies) == 2)
    coming = await goes_on_elsewhere(nodes, juliet, romeo)
    committed.set()
    for outcome in outcomes:
        await nodes[0].stored(outcome)
    await asyncio.sleep(0.05)
    freed.set()
    again = await coming
    await nodes.net.until(lambda: len(again.bodies) >= 3)

    assert again.bodies == ["1", "2", "3"]


async def test_who_writes_where_she_is_now_waits_for_what_is_being_stored_where_she_was(nodes):
    """Nothing of it is in the database yet when she has been given what is there."""
    juliet, romeo = await nodes[1].online("juliet"), await nodes[1].online("romeo")
    managed(juliet)
    elsewhere = await nodes[2].online("romeo", "elsewhere")
    await nodes.calm()
    world, committed = nodes[1], asyncio.Event()
    release, write = world.spool.release, world.spool.submit_all
    world.spool.submit_all = lambda items: later(committed, lambda: write(items))
    world.spool.release = lambda ids, holder: later(committed, lambda: release(ids, holder))
    await say(romeo, "1", "2")
    await nodes.net.until(lambda: len(juliet.bodies) == 2)
    juliet.session.close(clean=False)
    await nodes.net.until(lambda: not nodes[2].table.rows(JULIET))
    coming = asyncio.create_task(nodes[2].online("juliet", "chamber"))
    await nodes.net.until(lambda: nodes[1].manager.is_available(parse(JULIET)))
    await asyncio.sleep(0.5)
    again = nodes[2].manager.sessions(parse(JULIET))[0].carrier

    await waits_until_free(nodes, elsewhere, again, committed)
    await coming


async def test_what_could_not_go_where_its_session_went_is_waited_for_until_it_is_free(nodes):
    """The session is lost on its way; who asks whether all it had is where it belongs has to wait."""
    world, user = nodes[0], parse(JULIET)
    freed = asyncio.Event()

    async def free(ids, holder):
        await freed.wait()

    world.spool.release = lambda ids, holder: asyncio.ensure_future(free(ids, holder))
    kept = KeptMessage.from_bytes(message(JULIET, "1").encode())
    kept.row_id, kept.holder = new_id(), Holder(world.owner.member, world.owner.incarnation, "session")
    outcome = Pending()
    world.manager.reroute([Record(kept, outcome)])
    await world.settled(outcome)
    asked = asyncio.create_task(world.manager.settled_here(user))
    await asyncio.sleep(0.05)
    assert not asked.done()
    freed.set()
    await asyncio.wait_for(asked, 10)


async def test_what_such_a_session_had_not_stored_comes_behind_what_it_had(nodes):
    again = await nodes[1].online("juliet")
    await nodes.calm()
    world, freed, user = nodes[0], asyncio.Event(), parse(JULIET)
    holder = Holder(world.owner.member, world.owner.incarnation, "session")
    xml = message(JULIET, "1").encode()
    await world.spool.keep(
        user.domain, user.local, "", xml, dedup=None, quota=None, holder=holder, row_id=(row := new_id())
    )
    kept = KeptMessage.from_bytes(xml)
    kept.row_id, kept.holder = row, holder
    release = world.spool.release
    world.spool.release = lambda ids, holder: later(freed, lambda: release(ids, holder))
    rest = [
        Stanza.from_bytes(message(JULIET, "2").encode()),
        Forwarded.again(Stanza.from_bytes(message(JULIET, "3").encode())),
    ]

    world.manager.reroute([Record(stanza, Pending()) for stanza in (kept, *rest)])
    await asyncio.sleep(0.1)
    assert again.bodies == []
    freed.set()
    await nodes.net.until(lambda: len(again.bodies) >= 3)

    assert again.bodies == ["1", "2", "3"]


@pytest.mark.parametrize("slow", [False, True])
async def test_a_session_that_moves_gets_what_is_being_stored_before_what_it_was_sent_since(nodes, slow):
    """`slow`: another module takes its time over the session, before the one that knows of what is stored."""
    taken = asyncio.Event()
    if slow:

        async def take_time(event):
            await taken.wait()

        nodes[1].hooks.add("slow", SessionArrived, take_time, rank=-1)
    committed = asyncio.Event()
    keep = nodes[0].spool.keep

    romeo = await nodes[0].online("romeo")
    nodes[0].spool.keep = lambda *args, **options: later(committed, lambda: keep(*args, **options))
    await say(romeo, "1", "2")
    juliet = nodes[0].login("juliet")
    state = managed(juliet)
    arriving = asyncio.create_task(juliet.available())
    await nodes.net.until(lambda: juliet.session.holds_messages)
    await say(romeo, "3")
    session = await moved(nodes, juliet, state)
    session.managed.resume(there := Resumed(session))
    saying = asyncio.create_task(say(romeo, "4"))
    await asyncio.sleep(0.05)
    assert there.bodies == []
    taken.set()
    committed.set()
    await nodes.net.until(lambda: len(there.bodies) >= 4)
    await asyncio.gather(arriving, saying)

    assert there.bodies == ["1", "2", "3", "4"]


async def test_what_is_sent_to_where_somebody_was_does_not_pass_what_is_being_stored_there(nodes):
    juliet, romeo = await nodes[1].online("juliet"), await nodes[0].online("romeo")
    managed(juliet)
    await nodes.calm()
    committed, write, release = asyncio.Event(), nodes[1].spool.submit_all, nodes[1].spool.release
    nodes[1].spool.submit_all = lambda items: later(committed, lambda: write(items))
    nodes[1].spool.release = lambda ids, holder: later(committed, lambda: release(ids, holder))
    await say(romeo, "1")
    await nodes.net.until(lambda: juliet.bodies)
    nodes.net.hold("two", "one")  # romeo's node does not hear that she has moved
    nodes.net.hold("three", "one")
    juliet.session.close(clean=False)
    again = nodes[2].login("juliet", "chamber")
    coming = asyncio.create_task(again.available())
    await nodes.net.until(lambda: nodes[1].manager.is_available(parse(JULIET)))

    await say(romeo, "2")
    await asyncio.sleep(0.1)
    assert again.bodies == []
    committed.set()
    await nodes.net.until(lambda: len(again.bodies) == 2)
    nodes.net.let_go("two", "one")
    nodes.net.let_go("three", "one")
    await coming

    assert again.bodies == ["1", "2"]


async def moved(nodes, juliet, state):
    """Her session, on the second node."""
    juliet.session.lost(clean=False, resumable=True)
    await nodes.net.until(lambda: nodes[1].manager.is_bound(juliet.session.jid))
    session = await nodes[1].parts.resumption.handover.fetch(state.id, parse(JULIET), 0)
    assert isinstance(session, Session)
    return session


async def test_a_stored_message_that_goes_along_with_a_session_keeps_its_place(nodes):
    """There it may have to be stored anew: before what was stored since, as ever."""
    romeo = await nodes[0].online("romeo")
    for outcome in await say(romeo, "1"):
        await nodes[0].stored(outcome)
    juliet = nodes[0].login("juliet")
    state = managed(juliet)
    await juliet.available()
    await nodes.net.until(lambda: juliet.bodies)

    session = await moved(nodes, juliet, state)
    session.managed.resume(there := Resumed(session))
    await nodes.net.until(lambda: there.bodies)
    await say(romeo, "2")
    await nodes.net.until(lambda: len(there.bodies) == 2)

    places = [entry.stanza.place for entry in session.managed.outbound.entries()]
    assert len(places) == 2
    assert 0 < places[0] < places[1]


async def test_who_comes_along_with_a_session_writes_nothing_before_the_look_at_the_spool(nodes):
    juliet = await nodes[0].online("juliet")
    state = managed(juliet)
    looked = asyncio.Event()
    nodes[1].parts.resumption.handover.look_first = lambda user: looked.wait()

    moving = asyncio.create_task(moved(nodes, juliet, state))
    await nodes.net.until(lambda: not list(nodes[0].manager.sessions(parse(JULIET))))
    await asyncio.sleep(0.05)
    assert not moving.done()
    looked.set()
    await moving


@pytest.mark.parametrize("again", [False, True], ids=["new", "routed again"])
async def test_what_a_node_has_not_looked_at_yet_comes_before_what_is_stored_for_a_session_that_is_not_available(
    nodes, again
):
    """She binds the same resource anew on a node that lets all wait that comes from another one."""
    await nodes[1].online("juliet")
    romeo = await nodes[0].online("romeo")
    await nodes.calm()
    looked = asyncio.get_running_loop().create_future()
    nodes[1].manager.hold_arrivals(nodes.node(0), looked)
    await say(romeo, "1", "2")
    juliet = nodes[1].login("juliet")
    await nodes.net.until(lambda: not nodes[0].manager.is_available(parse(JULIET)))
    if again:
        stanzas = [Stanza.from_bytes(message(JULIET, body).encode()) for body in ("3", "4")]
        nodes[0].manager.reroute([Record(stanza, Pending()) for stanza in stanzas])
    else:
        await say(romeo, "3", "4")
    await asyncio.sleep(0.05)
    await juliet.available()

    assert await nodes[0].rows() == []
    looked.set_result(None)
    await nodes.net.until(lambda: len(juliet.bodies) >= 4)

    assert juliet.bodies == ["1", "2", "3", "4"]


class Parted(Alone):
    """The Standing of a node that does not see all the others."""

    def sees_all(self):
        return False


async def without_a_stream(nodes):
    """Romeo, and a session of juliet's that has no stream and 2 of 3 messages which she has not acknowledged, on a node
    that sees no other one."""
    juliet, romeo = await nodes[1].online("juliet"), await nodes[1].online("romeo")
    state = managed(juliet)
    await nodes.calm()
    for outcome in await say(romeo, "1", "2", "3"):
        await nodes[1].stored(outcome)
    state.acknowledged(1)
    nodes.net.cut("one", "two")
    nodes.net.cut("three", "two")
    await nodes.net.until(lambda: not nodes[0].table.rows(JULIET))
    juliet.session.lost(clean=False, resumable=True)
    nodes[1].spool.standing = Parted()
    nodes[1].parts.resumption.set_aside()
    return romeo, juliet.session


async def test_a_node_that_does_not_see_all_holds_nothing_for_a_session_without_a_stream(nodes):
    """Its client is where the sender goes as well."""
    romeo, session = await without_a_stream(nodes)
    for outcome in await say(romeo, "4"):
        await nodes[1].stored(outcome)
    again, elsewhere = await nodes[0].online("juliet"), await nodes[0].online("romeo", "elsewhere")
    await say(elsewhere, "5")
    await nodes.net.until(lambda: len(again.bodies) >= 4)

    assert again.bodies == ["2", "3", "4", "5"]
    nodes[1].spool.standing = Alone()
    nodes.net.heal()
    await nodes.net.until(lambda: session.closed)
    await nodes.calm()
    assert again.bodies == ["2", "3", "4", "5"]


async def four_and_five(nodes, romeo):
    """ "4" is in the database too, and "5" will be when the event is set."""
    for outcome in await say(romeo, "4"):
        await nodes[1].stored(outcome)
    await nodes.net.until(lambda: not nodes[1].parts.spooling.freeing)
    assert await nodes[1].spool.count(HOST, "juliet") == 3
    committed, write, release = asyncio.Event(), nodes[1].spool.submit_all, nodes[1].spool.release
    nodes[1].spool.submit_all = lambda items: later(committed, lambda: write(items))
    nodes[1].spool.release = lambda ids, holder: later(committed, lambda: release(ids, holder))
    [fifth] = await say(romeo, "5")
    return fifth, committed


async def until_acknowledged(nodes, session, there, count):
    """All is as if nothing had been, when she has."""
    session.managed.acknowledged(count)
    await nodes.net.until(lambda: not session.managed.backlog.rows and not len(session.managed.outbound))
    async with asyncio.timeout(10):
        rows = await nodes[1].rows()
        while rows:
            await asyncio.sleep(0.02)
            rows = await nodes[1].rows()
    assert not any(node.parts.spooling.unacknowledged for node in nodes.worlds)


@pytest.mark.parametrize("late", [False, True])
async def test_such_a_session_gets_it_all_from_the_spool_when_it_is_resumed(nodes, late):
    """`late`: what is not in the database yet is committed after that."""
    romeo, session = await without_a_stream(nodes)
    fifth, committed = await four_and_five(nodes, romeo)
    coming = asyncio.create_task(session.managed.come_back(2))
    if not late:
        committed.set()
    assert await coming
    session.managed.resume(there := Resumed(session))
    [sixth] = await say(romeo, "6")
    if late:
        await asyncio.sleep(0.1)
        assert there.bodies == []
        committed.set()
    await nodes.net.until(lambda: len(there.bodies) >= 4)

    assert there.bodies == ["3", "4", "5", "6"]
    await until_acknowledged(nodes, session, there, 6)
    assert [fifth.result, sixth.result] == [SAFE, SAFE]


async def test_such_a_session_gets_it_when_it_is_resumed_on_another_node(nodes):
    romeo, session = await without_a_stream(nodes)
    nodes.net.heal()
    await nodes.net.until(lambda: nodes[0].manager.is_bound(session.jid))
    _, committed = await four_and_five(nodes, romeo)
    await romeo.send(message(JULIET, "not to be kept", inner="<no-store xmlns='urn:xmpp:hints'/>"))
    moved = await nodes[0].parts.resumption.handover.fetch(session.managed.id, parse(JULIET), 2)
    moved.managed.resume(there := Resumed(moved))
    await say(romeo, "6")
    committed.set()
    await nodes.net.until(lambda: len(there.bodies) >= 5)

    assert there.bodies == ["3", "4", "5", "not to be kept", "6"]
    await until_acknowledged(nodes, moved, there, 7)


async def test_a_session_that_was_given_away_ends_here_when_the_other_node_says_so_before_its_row_is_known(nodes):
    romeo, juliet = await nodes[0].online("romeo"), await nodes[0].online("juliet")
    state, handover = managed(juliet), nodes[0].parts.resumption.handover
    await say(romeo, "1")
    juliet.session.lost(clean=False, resumable=True)
    await nodes.net.until(lambda: nodes[1].manager.is_bound(juliet.session.jid))
    give = handover._give

    def give_and_hear_no_more(*args):
        nodes.net.hold("two", "one")
        return give(*args)

    handover._give = give_and_hear_no_more
    session = await nodes[1].parts.resumption.handover.fetch(state.id, parse(JULIET), 0)
    session.managed.resume(there := Resumed(session))
    [second] = await say(romeo, "2")

    nodes[0].manager.succession.yield_to(session.jid, session.row.bound_at)
    [third] = await say(romeo, "3")
    nodes.net.let_go("two", "one")
    await nodes.net.until(lambda: len(there.bodies) >= 3)

    assert there.bodies == ["1", "2", "3"]
    await until_acknowledged(nodes, session, there, 3)
    assert [second.result, third.result] == [SAFE, SAFE]


async def test_what_is_passed_on_to_a_session_that_was_bound_anew_comes_behind_what_is_being_stored_there(nodes):
    """The older session was to go to the same node, and its row has not come yet that would tell of it."""
    romeo, committed, keep = await nodes[0].online("romeo"), asyncio.Event(), nodes[0].spool.keep
    nodes[0].spool.keep = lambda *args, **options: later(committed, lambda: keep(*args, **options))
    await say(romeo, "1")
    nodes.net.hold("two", "one")
    juliet = nodes[1].login("juliet")
    await juliet.available()
    second = Stanza.from_bytes(message(JULIET, "2").encode())

    nodes[0].forwarder.pass_on(nodes.node(1), second, "balcony", behind=True)
    await asyncio.sleep(0.1)
    assert juliet.bodies == []
    nodes.net.let_go("two", "one")
    await asyncio.sleep(0.1)
    assert juliet.bodies == []
    committed.set()
    await nodes.net.until(lambda: len(juliet.bodies) >= 2)

    assert juliet.bodies == ["1", "2"]


async def test_an_error_waits_for_nothing(nodes):
    """Its sender has been told by an acknowledgement that all is well, or that the error has come before it."""
    romeo = await nodes[0].online("romeo")
    romeo.session.hold_messages(asyncio.get_running_loop().create_future())
    nodes[0].manager.hold_messages(romeo.session.user, asyncio.get_running_loop().create_future())

    (outcome,) = await say(romeo, "O", to=f"nobody@{HOST}")

    assert await nodes[0].settled(outcome) is ERROR
    assert [stanza.type for stanza in romeo.received if stanza.kind == "message"] == ["error"]


async def test_what_has_waited_comes_in_its_order_whichever_way_it_came(nodes):
    juliet, romeo = await nodes[0].online("juliet"), await nodes[0].online("romeo", "elsewhere")
    done = asyncio.get_running_loop().create_future()
    first = next_place()
    juliet.session.hold_messages(done)
    await say(romeo, "2")
    rerouted = Stanza.from_bytes(message(JULIET, "1").encode())
    rerouted.place = first
    juliet.session.deliver(rerouted)

    done.set_result(None)
    await nodes.net.until(lambda: len(juliet.bodies) >= 2)

    assert juliet.bodies == ["1", "2"]


async def test_what_waits_for_a_session_that_ends_is_stored_at_once(nodes):
    juliet, romeo = await nodes[0].online("juliet"), await nodes[0].online("romeo")
    juliet.session.hold_messages(asyncio.get_running_loop().create_future())
    outcomes = await say(romeo, "1", "2")
    assert juliet.bodies == []

    juliet.session.close(clean=False)

    for outcome in outcomes:
        await nodes[0].stored(outcome)
    again = await nodes[1].online("juliet")
    await nodes.net.until(lambda: len(again.bodies) >= 2)
    assert again.bodies == ["1", "2"]
    assert outcomes[0].result is SAFE


async def test_what_waits_on_a_node_that_stops_goes_where_it_can(nodes):
    juliet, romeo = await nodes[1].online("juliet"), await nodes[0].online("romeo")
    await nodes.calm()
    until = asyncio.get_running_loop().create_future()
    nodes[0].manager.hold_messages(parse(JULIET), until)
    await say(romeo, "1", "2")
    assert juliet.bodies == []

    nodes[0].manager.hold_no_more()
    await nodes.net.until(lambda: len(juliet.bodies) >= 2)
    until.set_result(None)
    await nodes.calm()

    assert juliet.bodies == ["1", "2"]


async def test_what_is_about_to_be_free_comes_before_what_a_flush_has_just_taken(nodes):
    """As when a session of theirs that was sent some of it loses its stream, and is resumed."""
    world, user = nodes[0], parse(JULIET)
    romeo, holder = await world.online("romeo"), Holder(world.owner.member, world.owner.incarnation, "session")
    held = await row(world, "1", holder)
    for outcome in await say(romeo, "2"):
        await world.stored(outcome)
    take, taking, taken = world.spool.take, asyncio.Event(), asyncio.Event()

    async def slow(*args, **options):
        rows = await take(*args, **options)
        taking.set()
        await taken.wait()
        return rows

    world.spool.take = slow
    juliet = world.login("juliet")
    coming = asyncio.create_task(juliet.available())
    await taking.wait()
    free = asyncio.get_running_loop().create_future()
    world.hooks.notify(MessagesFreeing(user, free))
    taken.set()
    await asyncio.sleep(0.05)
    assert juliet.bodies == []
    await world.spool.release((held,), holder)
    free.set_result(None)
    await coming
    await nodes.net.until(lambda: len(juliet.bodies) >= 2)

    assert juliet.bodies == ["1", "2"]


@pytest.mark.parametrize("away", [False, True], ids=["slow", "database was away"])
async def test_a_flush_lets_what_another_node_is_still_storing_come_first(nodes, away):
    """Of a session that has ended there. It says so when hers appears here; who has logged in after the database was
    away asks before anything is taken, since there may be much to store then."""
    juliet, romeo = await nodes[1].online("juliet"), await nodes[0].online("romeo")
    managed(juliet)
    await nodes.calm()
    committed, write, release = asyncio.Event(), nodes[1].spool.submit_all, nodes[1].spool.release
    nodes[1].spool.submit_all = lambda items: later(committed, lambda: write(items))
    nodes[1].spool.release = lambda ids, holder: later(committed, lambda: release(ids, holder))
    await say(romeo, "1")
    await nodes.net.until(lambda: juliet.bodies)
    nodes[0].manager.succession._others = None  # or romeo's messages would wait
    juliet.session.close(clean=False)
    await nodes.net.until(lambda: not nodes[0].manager.is_bound(juliet.session.jid))
    for outcome in await say(romeo, "2"):
        await nodes[0].stored(outcome)
    take, taken = nodes[0].spool.take, asyncio.Event()
    if away:
        nodes[0].spool.was_away = lambda seconds: True
    else:
        nodes[0].spool.take = lambda *args, **options: later(taken, lambda: take(*args, **options))

    again = nodes[0].login("juliet", "chamber")
    coming = asyncio.create_task(again.available())
    await asyncio.sleep(0.1)
    taken.set()
    await asyncio.sleep(0.1)
    assert again.bodies == []
    committed.set()
    await nodes.net.until(lambda: len(again.bodies) >= 2)
    await coming

    assert again.bodies == ["1", "2"]


async def test_a_flush_of_a_session_that_has_left_and_comes_to_nothing_ends_once(nodes):
    world, romeo, trouble = nodes[0], await nodes[0].online("romeo"), []
    for outcome in await say(romeo, "1"):
        await world.stored(outcome)
    take, taken = world.spool.take, asyncio.Event()
    world.spool.take = lambda *args, **options: later(taken, lambda: take(*args, **options))
    juliet = world.login("juliet")
    coming = asyncio.create_task(juliet.available())
    await nodes.net.until(lambda: juliet.session.holds_messages)
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: trouble.append(context))

    juliet.session.leave(SessionLeft(juliet.session, {}))
    juliet.session.left()
    juliet.session.end_leaving()
    taken.set()
    await coming
    await asyncio.sleep(0.05)

    assert trouble == []
    assert len(await world.rows()) == 1


async def test_what_a_session_holds_that_does_not_know_yet_of_a_newer_one_comes_first(nodes):
    """Of the same full JID, on a node that is cut off for a moment."""
    world, older = nodes[0], nodes[2]
    await older.online("juliet")
    holder = Holder(older.owner.member, older.owner.incarnation, "session")
    await nodes.calm()
    held = await row(world, "1", holder)
    await row(world, "2")
    freeze(nodes, "three")

    again = world.login("juliet")
    coming = asyncio.create_task(again.available())
    await asyncio.sleep(0.1)
    assert again.bodies == []
    await world.spool.release((held,), holder)
    await nodes.net.until(lambda: len(again.bodies) >= 2)
    await coming
    thaw(nodes, "three")

    assert again.bodies == ["1", "2"]


@pytest.mark.parametrize("late", [False, True], ids=["while the next one looks", "before the next one looks"])
async def test_what_was_being_taken_for_a_session_that_has_ended_comes_first(nodes, late):
    world, romeo = nodes[0], await nodes[0].online("romeo")
    for outcome in await say(romeo, "1"):
        await world.stored(outcome)
    take, taken, holders, told = world.spool.take, asyncio.Event(), world.spool.holders, asyncio.Event()
    release, freed = world.spool.release, asyncio.Event()
    world.spool.release = lambda ids, holder: later(freed, lambda: release(ids, holder))

    async def slow(*args, **options):
        rows = await take(*args, **options)
        await taken.wait()
        return rows

    world.spool.take = slow
    juliet = world.login("juliet")
    coming = asyncio.create_task(juliet.available())
    async with asyncio.timeout(10):
        rows = await world.spool.holders(HOST, "juliet")
        while None in rows:
            await asyncio.sleep(0.01)
            rows = await world.spool.holders(HOST, "juliet")
    world.spool.take = take
    if late:
        juliet.session.close(clean=False)
    else:
        world.spool.holders = lambda *args: later(told, lambda: holders(*args))
        world.hooks.remove("offline", SessionClosed)  # as if it had known nothing of its end
        juliet.session.close(clean=False)

    again = world.login("juliet", "chamber")
    coming_again = asyncio.create_task(again.available())
    await asyncio.sleep(0.05)
    await say(romeo, "2")
    taken.set()
    await asyncio.sleep(0.05)
    told.set()
    await asyncio.sleep(0.05)
    freed.set()
    await nodes.net.until(lambda: len(again.bodies) >= 2)
    await asyncio.gather(coming, coming_again)

    assert again.bodies == ["1", "2"]


async def test_what_waits_on_a_node_that_stops_comes_behind_what_that_is_storing(nodes):
    world, committed = nodes[0], asyncio.Event()
    romeo, keep = await world.online("romeo"), world.spool.keep
    world.spool.keep = lambda *args, **options: later(committed, lambda: keep(*args, **options))
    await say(romeo, "1")
    juliet = nodes[1].login("juliet")
    coming = asyncio.create_task(juliet.available())
    await nodes.net.until(lambda: world.manager.succession.holds(JULIET))
    await say(romeo, "2")

    await world.loader.unload("offline")
    await asyncio.sleep(0.1)
    assert juliet.bodies == []
    committed.set()
    await nodes.net.until(lambda: len(juliet.bodies) >= 2)
    await coming

    assert juliet.bodies == ["1", "2"]


async def test_who_joins_a_flush_that_fails_does_not_let_later_messages_pass(nodes):
    romeo = await nodes[0].online("romeo")
    for outcome in await say(romeo, "1", "2"):
        await nodes[0].stored(outcome)
    take, away = nodes[0].spool.take, True

    async def sometimes(*args, **options):
        await asyncio.sleep(0.02)
        if away:
            raise StorageUnavailable("away")
        return await take(*args, **options)

    nodes[0].spool.take = sometimes
    juliet = nodes[0].login("juliet")
    coming = asyncio.create_task(juliet.available())
    await nodes.net.until(lambda: juliet.session.holds_messages)
    await nodes[1].place.calls.call(nodes.node(0), "module", ["offline", "flush", [JULIET]])  # as after a split
    await coming
    await say(romeo, "3")
    await asyncio.sleep(0.1)
    assert juliet.bodies == []
    away = False
    await nodes.net.until(lambda: len(juliet.bodies) >= 3)

    assert juliet.bodies == ["1", "2", "3"]


async def test_what_was_stored_for_a_node_that_was_away_comes_before_what_others_send_it(nodes, monkeypatch):
    """The sender was on another node then, so its own knows nothing of what is stored."""
    juliet, romeo = await nodes[1].online("juliet"), await nodes[0].online("romeo")
    await nodes.calm()
    nodes.net.cut("one", "two")
    nodes.net.cut("three", "two")
    await nodes.net.until(lambda: not nodes[0].table.rows(JULIET) and not nodes[2].table.rows(JULIET))
    for outcome in await say(romeo, "1", "2"):
        await nodes[0].stored(outcome)
    romeo.session.close(clean=True)
    romeo = await nodes[2].online("romeo")
    look, begun, go_on = nodes[1].spool.freed_since, asyncio.Event(), asyncio.Event()

    async def slow_look(*args, **options):
        begun.set()
        await go_on.wait()
        return await look(*args, **options)

    monkeypatch.setattr(nodes[1].spool, "freed_since", slow_look)
    nodes.net.heal()
    await nodes.net.until(lambda: nodes[2].table.rows(JULIET))
    await say(romeo, "3")
    await begun.wait()
    for _ in range(50):
        await asyncio.sleep(0.001)
    assert "3" not in juliet.bodies
    go_on.set()
    await nodes.net.until(lambda: len(juliet.bodies) >= 3)

    assert juliet.bodies == ["1", "2", "3"]
