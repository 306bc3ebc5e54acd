"""Presence when nodes die, are cut off and come back: every contact hears once who has gone, and sees who is back."""

import asyncio
import random

import pytest

from tests.cluster import worlds
from tests.cluster.test_presence import BLOCK, JULIET, NAMES, NURSE, ROMEO, say, seen
from tests.modules.world import HOST
from xmppd.cluster.interfaces import Kind
from xmppd.cluster.tables import Owner, SessionRow, pack_session
from xmppd.errors import StorageUnavailable
from xmppd.protocol.jid import parse


@pytest.fixture
async def nodes(databases, tmp_path):
    """Three nodes, three friends, and two strangers."""
    async with worlds.cluster(3, await databases.migrated("sqlite", tmp_path), tmp_path) as made:
        await made.load(roster={}, presence={}, blocking={})
        await made[0].account(*NAMES, "tybalt", "paris")
        for one, other in (("juliet", "romeo"), ("juliet", "nurse"), ("romeo", "nurse")):
            await made[0].befriend(one, other)
        yield made


def split(nodes, alone="one"):
    """One node sees the others no more."""
    for other in {"one", "two", "three"} - {alone}:
        nodes.net.cut(alone, other)


async def heal(nodes):
    nodes.net.heal()
    await nodes.net.all_up()
    await nodes.synced()
    await nodes.calm()


async def calm_after_death(nodes, index):
    """The dead one takes no part any more."""
    world = nodes.worlds[index]
    nodes.replicas[index].stop()
    for _ in range(3):
        for other in nodes.worlds:
            if other is not world:
                await other.quiet()
        await asyncio.sleep(0.01)


def ways(client, user):
    return [(resource, type) for resource, type, _ in seen(client, user)]


# -- death


async def test_of_a_dead_node_every_contact_hears_once_for_each_session(nodes):
    romeo, nurse = await nodes[1].come("romeo"), await nodes[2].come("nurse")
    second = await nodes[2].come("nurse", "kitchen")
    own = await nodes[1].come("juliet", "hall")
    stranger = await nodes[1].come("paris")
    await nodes[0].come("juliet")
    await nodes[0].come("juliet", "chamber")
    await nodes[0].enter("juliet", "silent")
    await nodes.calm()
    for client in (romeo, nurse, second, own, stranger):
        client.received.clear()

    nodes.net.kill("one")
    await calm_after_death(nodes, 0)

    gone = [("balcony", "unavailable"), ("chamber", "unavailable")]
    for client in (romeo, nurse, second, own):
        assert sorted(ways(client, JULIET)) == gone
    assert stranger.received == []


async def test_of_two_nodes_that_die_at_once_every_contact_hears_once(nodes):
    romeo = await nodes[2].come("romeo")
    await nodes[0].come("juliet")
    await nodes[1].come("nurse")
    await nodes.calm()
    romeo.received.clear()

    nodes.net.kill("one")
    nodes.net.kill("two")
    await calm_after_death(nodes, 0)

    assert ways(romeo, JULIET) == ways(romeo, NURSE) == [("balcony", "unavailable")]


async def test_who_logs_out_in_order_is_not_told_of_again_when_the_node_goes(nodes):
    juliet, romeo = await nodes[0].come("juliet"), await nodes[1].come("romeo")
    await nodes.calm()
    romeo.received.clear()

    juliet.session.close(clean=True)
    await nodes.calm()
    nodes.net.kill("one")
    await calm_after_death(nodes, 0)

    assert ways(romeo, JULIET) == [("balcony", "unavailable")]


async def test_directed_presence_is_taken_back_for_who_is_no_contact(nodes):
    tybalt, paris = await nodes[1].come("tybalt"), await nodes[1].come("paris")
    juliet = await nodes[0].come("juliet")
    await juliet.send(f"<presence to='{tybalt.session.jid}'/>")
    await juliet.send(f"<presence to='paris@{HOST}'/>")
    await juliet.send(f"<presence to='paris@{HOST}' type='unavailable'/>")
    await nodes.calm()

    nodes.net.kill("one")
    await calm_after_death(nodes, 0)

    assert [type for _, type, _ in seen(tybalt, JULIET)] == ["available", "unavailable"]
    assert len(seen(paris, JULIET)) == 2


async def test_who_came_after_the_loss_hears_nothing_of_it(nodes):
    await nodes[0].come("juliet")
    await nodes.calm()
    nodes.net.kill("one")
    romeo = await nodes[1].come("romeo")
    await calm_after_death(nodes, 0)

    assert ways(romeo, JULIET) == []


async def test_who_is_blocked_hears_nothing_even_of_a_death(nodes, monkeypatch):
    """The roster here says that romeo sees juliet; that she has blocked him only her node knew, and the database."""
    juliet = await nodes[0].come("juliet")
    romeo, nurse = await nodes[1].come("romeo"), await nodes[1].come("nurse")
    await juliet.ask("set", BLOCK.format(ROMEO))
    await nodes.calm()
    for client in (romeo, nurse):
        client.received.clear()

    nodes.net.kill("one")
    await calm_after_death(nodes, 0)

    assert ways(nurse, JULIET) == [("balcony", "unavailable")]
    assert romeo.received == []


async def test_with_the_database_away_the_blocked_hear_nothing_and_the_others_later(nodes, monkeypatch):
    juliet = await nodes[0].come("juliet")
    romeo, nurse = await nodes[1].come("romeo"), await nodes[1].come("nurse")
    await juliet.ask("set", BLOCK.format(ROMEO))
    await nodes.calm()
    for client in (romeo, nurse):
        client.received.clear()
    presence = nodes[1].loader._loaded["presence"].instance
    monkeypatch.setattr("modules.presence.losses._RETRY", 0.01)
    newest, asked = presence._blocks.newest, []

    async def away(user):
        asked.append(user)
        if len(asked) < 4:
            raise StorageUnavailable("away")
        return await newest(user)

    monkeypatch.setattr(presence._blocks, "newest", away)
    nodes.net.kill("one")
    await nodes[1].until(lambda: len(asked) == 2)
    assert nurse.received == []

    await calm_after_death(nodes, 0)
    assert ways(nurse, JULIET) == [("balcony", "unavailable")]
    assert romeo.received == []


async def test_who_is_back_elsewhere_before_the_death_was_noticed_is_not_told_to_be_gone(nodes):
    romeo, nurse = await nodes[1].come("romeo"), await nodes[2].come("nurse")
    await nodes[0].come("juliet")
    await nodes.calm()
    nodes.net.hold("one", "two")
    nodes.net.hold("one", "three")

    back = asyncio.create_task(nodes[1].come("juliet"))  # it asks the dead node, which does not answer
    await nodes[1].until(lambda: nodes[1].table.rows(JULIET)["balcony"].session is not None)
    nodes.net.kill("one")
    await back
    await calm_after_death(nodes, 0)

    for client in (romeo, nurse):
        assert ways(client, JULIET)[-1] == ("balcony", "available")


async def test_who_is_bound_elsewhere_but_silent_is_gone_for_the_contacts(nodes):
    romeo, nurse = await nodes[1].come("romeo"), await nodes[2].come("nurse")
    await nodes[0].come("juliet")
    await nodes.calm()
    nodes.net.hold("one", "two")
    nodes.net.hold("one", "three")

    back = asyncio.create_task(nodes[1].enter("juliet"))
    await nodes[1].until(lambda: nodes[1].table.rows(JULIET)["balcony"].session is not None)
    nodes.net.kill("one")
    silent = await back
    await calm_after_death(nodes, 0)
    for client in (romeo, nurse):
        assert ways(client, JULIET)[-1] == ("balcony", "unavailable")

    await silent.available()
    await calm_after_death(nodes, 0)
    for client in (romeo, nurse):
        assert ways(client, JULIET)[-1] == ("balcony", "available")


@pytest.mark.long
async def test_a_hundred_thousand_lost_sessions_do_not_hold_up_the_loop(nodes):
    world, dead = nodes[1], Owner(b"d" * 16, 0, 1)
    romeo = await world.come("romeo")
    world.table.on_appeared.clear()
    world.table.begin(dead)
    row = SessionRow(parse(f"{JULIET}/r"), dead, 1)
    row.priority = 0
    for name in ("juliet", *(f"u{number}" for number in range(100_000))):
        world.table.put(dead, f"{name}@{HOST}", b"r", pack_session(row))
    world.table.end(dead)
    turns = 0

    world.table.drop(dead)
    while world.tasks:
        await asyncio.sleep(0)
        turns += 1

    assert ways(romeo, JULIET) == [("r", "unavailable")]
    assert len(romeo.received) == 1
    assert turns > 20


# -- splits


async def test_after_a_split_everybody_sees_everybody_as_they_are(nodes):
    here, there = await nodes[0].come("juliet"), await nodes[1].come("romeo")
    own, nurse = await nodes[2].come("juliet", "hall"), await nodes[2].come("nurse")
    await nodes[1].come("nurse", "kitchen")
    await nodes.calm()
    for client in (here, there, own, nurse):
        client.received.clear()

    split(nodes)
    await nodes.calm()
    for client in (there, nurse, own):
        assert ways(client, JULIET)[0] == ("balcony", "unavailable")
    assert sorted(ways(here, NURSE)) == [("balcony", "unavailable"), ("kitchen", "unavailable")]
    assert ways(here, ROMEO) == [("balcony", "unavailable")]
    await say(here, "alone")
    await say(there, "sad")
    nurse.lose()
    await nodes.calm()
    for client in (here, there, own):
        client.received.clear()
    await heal(nodes)

    for client in (there, own):
        assert seen(client, JULIET) == [("balcony", "available", "alone")]
    assert seen(here, ROMEO) == [("balcony", "available", "sad")]
    assert ways(here, NURSE) == [("kitchen", "available")]
    assert ways(here, JULIET) == [("hall", "available")]
    assert seen(there, NURSE) == []  # nothing has changed between those two


async def test_after_a_split_each_presence_crosses_once_however_many_see_it(nodes):
    await nodes[0].come("juliet")
    await nodes[0].enter("juliet", "silent")
    for name in ("romeo", "nurse"):
        for resource in "abc":
            await nodes[1].come(name, resource)
    await nodes.calm()
    split(nodes)
    await nodes.calm()
    before = nodes.net.frames[Kind.PRESENCE], nodes.net.frames[Kind.STANZA]

    await heal(nodes)

    assert nodes.net.frames[Kind.PRESENCE] - before[0] == 1 + 6
    assert nodes.net.frames[Kind.STANZA] == before[1]


async def test_directed_presence_is_shown_again_after_a_split(nodes):
    tybalt, paris = await nodes[1].come("tybalt"), await nodes[1].come("paris")
    juliet = await nodes[0].come("juliet")
    await juliet.send(f"<presence to='{tybalt.session.jid}'/>")
    await juliet.send(f"<presence to='paris@{HOST}'/>")
    await nodes.calm()

    split(nodes)
    await nodes.calm()
    await heal(nodes)

    for client in (tybalt, paris):
        assert [type for _, type in ways(client, JULIET)] == ["available", "unavailable", "available"]
    juliet.lose()
    await nodes.calm()
    for client in (tybalt, paris):
        assert ways(client, JULIET)[-1] == ("balcony", "unavailable")


async def test_who_is_blocked_is_not_shown_after_a_split(nodes):
    juliet, romeo = await nodes[0].come("juliet"), await nodes[1].come("romeo")
    await juliet.ask("set", BLOCK.format(ROMEO))
    await nodes.calm()
    romeo.received.clear()

    split(nodes)
    await nodes.calm()
    await heal(nodes)

    assert seen(romeo, JULIET) == []


@pytest.mark.parametrize("seed", range(12))
async def test_of_one_address_on_both_sides_the_newer_one_stays_and_is_seen(nodes, seed):
    """Whoever hears of the end of the older one must not take the newer one for gone."""
    dice = random.Random(seed)
    await nodes[0].come("juliet")
    romeo, nurse, first = await nodes[2].come("romeo"), await nodes[1].come("nurse"), await nodes[0].come("nurse", "a")
    await nodes.calm()
    split(nodes)
    await nodes.calm()
    newer = await nodes[1].come("juliet")
    await say(newer, "new")
    await nodes.calm()
    nodes.net.delay = lambda: dice.random() * 0.004

    nodes.net.heal()
    await nodes.net.all_up()
    await nodes.synced()
    await asyncio.sleep(0.02)
    nodes.net.delay = None
    await nodes.calm()

    for client in (romeo, nurse, first):
        assert seen(client, JULIET)[-1] == ("balcony", "available", "new"), client.session.jid
    assert [row.owner for row in nodes[2].table.rows(JULIET).values()] == [nodes.owner(1)]
    assert len(list(nodes[0].manager.sessions(parse(JULIET)))) == 0


async def both_sides(nodes):
    """romeo on the third node sees juliet on the second; an older session of hers is cut off on the first."""
    await nodes[0].come("juliet")
    romeo = await nodes[2].come("romeo")
    await nodes.calm()
    split(nodes)
    await nodes.calm()
    await say(await nodes[1].come("juliet"), "new")
    await nodes.calm()
    romeo.received.clear()
    return romeo


async def test_the_older_session_ends_in_silence_when_its_node_is_asked_before_it_has_read_of_the_newer_one(nodes):
    romeo = await both_sides(nodes)
    nodes.net.hold("two", "one")
    nodes.net.heal()
    await nodes.net.until(lambda: nodes.replicas[0].synced(nodes.node(2)) and seen(romeo, JULIET))

    nodes.replicas[0]._turns._call_soon = lambda turn: asyncio.get_running_loop().call_later(0.1, turn)
    nodes.net.let_go("two", "one")
    await nodes.synced()
    await nodes.net.until(lambda: not list(nodes[0].manager.sessions(parse(JULIET))))
    await nodes.calm()

    assert ("balcony", "unavailable") not in ways(romeo, JULIET)
    assert seen(romeo, JULIET)[-1] == ("balcony", "available", "new")


async def test_the_newer_session_is_seen_though_the_older_one_was_shown_after_it(nodes):
    """Its node came back to others before it heard of the newer one."""
    romeo = await both_sides(nodes)
    nodes.net.hold("two", "one")

    nodes.net.heal()
    await nodes.net.until(lambda: seen(romeo, JULIET))
    assert seen(romeo, JULIET) == [("balcony", "available", "")]
    nodes.net.let_go("two", "one")
    await nodes.synced()
    await nodes.net.until(lambda: not list(nodes[0].manager.sessions(parse(JULIET))))
    await nodes.calm()

    assert seen(romeo, JULIET)[-1] == ("balcony", "available", "new")


async def test_twenty_splits_end_with_everybody_seeing_the_truth(nodes):
    dice = random.Random(7)
    clients = {}
    for place, name in enumerate(("juliet", "romeo", "nurse", "juliet", "nurse")):
        client = clients[name, place] = await nodes[place % 3].enter(name, f"r{place}")
        await client.available()
    await nodes.calm()
    for number in range(20):
        split(nodes, dice.choice(("one", "two", "three")))
        for client in dice.sample(list(clients.values()), 2):
            if client.session.presence is not None and dice.random() < 0.4:
                await client.send("<presence type='unavailable'/>")
            else:
                if client.session.presence is None:
                    client.received.clear()  # it begins anew
                await say(client, number)
        if dice.random() < 0.5:
            await nodes.calm()
        await heal(nodes)

        for client in clients.values():
            if client.session.presence is None:
                continue
            for other in clients.values():
                if other is client:
                    continue
                user, resource = other.session.user.full, other.session.jid.resource
                told = [each for each in seen(client, user) if each[0] == resource]
                now = other.session.presence
                if now is not None:
                    status = now.element.findtext("{jabber:client}status") or ""
                    assert told[-1][1:] == ("available", status), number
                else:
                    assert not told or told[-1][1] == "unavailable", number
