"""Presence between nodes: everybody sees everybody as they are, whenever and wherever they come and go."""

import asyncio
import random
from itertools import pairwise

import pytest

from tests.cluster import worlds
from tests.modules.friends import pushes
from tests.modules.world import HOST, condition, message
from xmppd.cluster.interfaces import Kind
from xmppd.protocol.jid import parse

NAMES = ("juliet", "romeo", "nurse")
JULIET, ROMEO, NURSE = (f"{name}@{HOST}" for name in NAMES)
BLOCK = "<block xmlns='urn:xmpp:blocking'><item jid='{}'/></block>"
UNBLOCK = "<unblock xmlns='urn:xmpp:blocking'><item jid='{}'/></unblock>"


@pytest.fixture
async def nodes(databases, tmp_path, request):
    """Three nodes, and three friends."""
    async with worlds.cluster(3, await databases.migrated("sqlite", tmp_path), tmp_path) as made:
        await made.load(roster={}, presence={}, blocking={})
        await made[0].account(*NAMES)
        for one, other in (("juliet", "romeo"), ("juliet", "nurse"), ("romeo", "nurse")):
            await made[0].befriend(one, other)
        yield made


def seen(client, user):
    """The presences a client got of a user's resources, (resource, type, status), in order."""
    return [
        (stanza.from_.resource, stanza.type, stanza.element.findtext("{jabber:client}status") or "")
        for stanza in client.received
        if stanza.kind == "presence" and stanza.from_.bare == user
    ]


async def say(client, text):
    await client.send(f"<presence><status>{text}</status></presence>")


async def test_two_who_come_at_the_same_moment_see_each_other(nodes):
    """200 times, with links that are slow each in its own way: never nobody, never an old presence after a new one."""
    for seed in range(200):
        dice = random.Random(seed)
        pace = {way: dice.random() * 0.004 for way in ("one", "two", "three")}
        nodes.net.delay = lambda dice=dice, pace=pace: dice.random() * pace[dice.choice(list(pace))]
        places = dict(zip(NAMES, dice.sample(range(3), 3) if seed % 2 else dice.choices(range(3), k=3), strict=True))
        clients = {name: await nodes[place].enter(name, "r", interested=False) for name, place in places.items()}

        async def act(client, dice=dice):
            for number in range(dice.choice((1, 1, 2, 3))):
                await asyncio.sleep(dice.random() * 0.003)
                await say(client, number)
            if dice.random() < 0.2:
                await client.send("<presence type='unavailable'><status>9</status></presence>")

        await asyncio.gather(*(act(client) for client in clients.values()))
        nodes.net.delay = None
        await asyncio.sleep(0.005)
        await nodes.calm()

        for name, client in clients.items():
            for other, theirs in clients.items():
                if other != name:
                    check(client, theirs, f"{other}@{HOST}", (seed, places, name, other))
        for client in clients.values():
            client.session.close(clean=True)
        await nodes.calm()


def check(client, theirs, user, case):
    """What a client knows of another one at the end is how the other one is."""
    if client.session.presence is None:
        return  # told of nothing any more
    got = seen(client, user)
    numbers = [int(status) for _, _, status in got if status]
    assert all(old <= new for old, new in pairwise(numbers)), case
    now = theirs.session.presence
    known = got[-1] if got else ("r", "unavailable", "")
    if now is None:
        assert known[1] == "unavailable", case
    else:
        assert known[1:] == ("available", now.element.findtext("{jabber:client}status")), case


async def test_a_broadcast_crosses_once_for_each_node(nodes):
    juliet = await nodes[0].come("juliet")
    others = [await nodes[1].come("romeo"), await nodes[1].come("nurse"), await nodes[1].come("romeo", "hall")]
    own = await nodes[2].come("juliet", "hall")
    await nodes.calm()
    before = nodes.net.frames[Kind.PRESENCE], nodes.net.frames[Kind.STANZA]

    await say(juliet, "here")
    await nodes.calm()

    assert nodes.net.frames[Kind.PRESENCE] - before[0] == 2
    assert nodes.net.frames[Kind.STANZA] == before[1]
    for client in (*others, own):
        assert seen(client, JULIET)[-1] == ("balcony", "available", "here")


async def test_the_presence_of_all_contacts_of_a_node_is_asked_for_once(nodes):
    for name in ("romeo", "nurse"):
        await nodes[1].come(name)
    await nodes[2].come("romeo", "hall")
    await nodes.calm()
    before = nodes.net.frames[Kind.CAST]
    juliet = await nodes[0].enter("juliet")
    await juliet.available()
    await nodes.calm()

    assert sorted(seen(juliet, ROMEO)) == [("balcony", "available", ""), ("hall", "available", "")]
    assert seen(juliet, NURSE) == [("balcony", "available", "")]
    assert nodes.net.frames[Kind.CAST] - before == 2


async def test_who_leaves_is_unavailable_on_all_nodes(nodes):
    juliet = await nodes[0].come("juliet")
    romeo, nurse = await nodes[1].come("romeo"), await nodes[2].come("nurse")
    await nodes.calm()

    juliet.lose()
    await nodes.calm()

    for client in (romeo, nurse):
        assert seen(client, JULIET)[-1][:2] == ("balcony", "unavailable")


async def test_directed_presence_ends_on_the_other_node(nodes):
    await nodes[0].account("tybalt")
    juliet = await nodes[0].enter("juliet")
    tybalt = await nodes[1].come("tybalt")
    await nodes.calm()
    await juliet.send(f"<presence to='{tybalt.session.jid}'/>")
    juliet.lose()
    await nodes.calm()
    assert [type for _, type, _ in seen(tybalt, JULIET)] == ["available", "unavailable"]


async def test_of_the_same_address_the_new_session_is_seen_last(nodes):
    """The old one says that it goes on one link, the new one that it is there on another."""
    for seed in range(40):
        dice = random.Random(seed)
        romeo = await nodes[2].come("romeo")
        await nodes[0].come("juliet")
        await nodes.calm()
        nodes.net.delay = lambda dice=dice: dice.choice((0, 0.001, 0.008))

        new = await nodes[1].enter("juliet", interested=False)
        await say(new, "new")
        await asyncio.sleep(0.02)
        nodes.net.delay = None
        await nodes.calm()

        assert seen(romeo, JULIET)[-1] == ("balcony", "available", "new"), seed
        for client in (romeo, new):
            client.session.close(clean=True)
        await nodes.calm()


async def test_what_an_absent_user_said_last_is_known_on_all_nodes(nodes):
    juliet = await nodes[0].come("juliet")
    await juliet.send("<presence type='unavailable'><status>good night</status></presence>")
    romeo = await nodes[1].come("romeo")
    await nodes.calm()

    await romeo.send(f"<presence to='{JULIET}' type='probe'/>")
    await nodes.calm()

    assert seen(romeo, JULIET)[-1] == ("balcony", "unavailable", "good night")


# -- blocking


async def test_blocking_is_in_force_on_all_nodes_at_once(nodes):
    here, there = await nodes[0].come("juliet"), await nodes[1].come("juliet", "hall")
    await there.query("get", "<blocklist xmlns='urn:xmpp:blocking'/>")
    romeo = await nodes[2].come("romeo")
    await nodes.calm()
    there.received.clear()

    await here.ask("set", BLOCK.format(ROMEO))
    await nodes.calm()
    [push] = [stanza for stanza in there.received if stanza.kind == "iq"]
    assert push.payload[0].get("jid") == ROMEO
    assert sorted(seen(romeo, JULIET)[-2:]) == [("balcony", "unavailable", ""), ("hall", "unavailable", "")]
    await romeo.send(message(f"{JULIET}/hall"))
    await nodes.calm()
    assert there.bodies == []
    assert condition(romeo.received[-1]) == "service-unavailable"

    romeo.received.clear()
    await here.ask("set", UNBLOCK.format(ROMEO))
    await nodes.calm()
    assert sorted(seen(romeo, JULIET)) == [("balcony", "available", ""), ("hall", "available", "")]
    assert seen(there, ROMEO)[-1] == ("balcony", "available", "")
    await romeo.send(message(f"{JULIET}/hall"))
    await nodes.calm()
    assert len(there.bodies) == 1


# -- rosters


async def test_a_roster_change_reaches_the_sessions_on_other_nodes(nodes):
    here, there = await nodes[0].come("juliet"), await nodes[1].come("juliet", "hall")
    await nodes.calm()
    for number in range(5):
        item = f"<item jid='n{number}@{HOST}' name='{number}'/>"
        await (here, there)[number % 2].ask("set", f"<query xmlns='jabber:iq:roster'>{item}</query>")
        await nodes.calm()

    for client in (here, there):
        assert [item["name"] for item in pushes(client)] == [str(number) for number in range(5)]
    assert nodes[0].loader.service_of("roster") if False else True
    for world in nodes.worlds[:2]:
        kept = world.loader._loaded["roster"].instance._rosters.cached(parse(JULIET))
        assert not kept.stale
        assert len([item for item in kept.items if item.startswith("n")]) == 6  # and the nurse


async def test_changes_on_two_nodes_at_once_end_in_the_same_roster(nodes):
    here, there = await nodes[0].come("juliet"), await nodes[1].come("juliet", "hall")
    await nodes.calm()
    dice = random.Random(1)
    nodes.net.delay = lambda: dice.random() * 0.003

    async def change(client, words):
        for word in words:
            item = f"<item jid='n{dice.randrange(3)}@{HOST}' name='{word}'/>"
            await client.ask("set", f"<query xmlns='jabber:iq:roster'>{item}</query>")

    await asyncio.gather(change(here, "abcdefghijkl"), change(there, "ABCDEFGHIJKL"))
    await asyncio.sleep(0.01)
    nodes.net.delay = None
    await nodes.calm()

    answers = [await client.query("get", "<query xmlns='jabber:iq:roster'/>") for client in (here, there)]
    rosters = [{item.get("jid"): item.get("name") for item in answer} for answer in answers]
    assert rosters[0] == rosters[1]
    for client in (here, there):
        known = {}
        for item in pushes(client):
            known[item["jid"]] = item["name"]
        assert known == {jid: name for jid, name in rosters[0].items() if name}


async def test_a_subscription_shows_all_resources_on_all_nodes(nodes):
    await nodes[0].account("tybalt")
    tybalt = await nodes[0].come("tybalt")
    first, second = await nodes[1].come("juliet"), await nodes[2].come("juliet", "hall")
    await nodes.calm()

    await tybalt.send(f"<presence to='{JULIET}' type='subscribe'/>")
    await nodes.calm()
    assert [[type for _, type, _ in seen(client, f"tybalt@{HOST}")] for client in (first, second)] == [
        ["subscribe"]
    ] * 2
    await first.send(f"<presence to='tybalt@{HOST}' type='subscribed'/>")
    await nodes.calm()

    assert sorted(seen(tybalt, JULIET)) == [
        ("", "subscribed", ""),
        ("balcony", "available", ""),
        ("hall", "available", ""),
    ]
    assert seen(tybalt, JULIET)[0] == ("", "subscribed", "")
    await second.send(f"<presence to='tybalt@{HOST}' type='unsubscribed'/>")
    await nodes.calm()
    assert sorted(type for _, type, _ in seen(tybalt, JULIET)[-3:]) == ["unavailable", "unavailable", "unsubscribed"]
