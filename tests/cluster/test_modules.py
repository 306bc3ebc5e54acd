"""What modules do when a user is on another node: offline messages, announcements, removed accounts, last activity."""

import asyncio

import pytest

from tests.cluster import worlds
from tests.databases import BOTH
from tests.modules.world import HOST, message
from xmppd.events import UserDeleted, UserForgotten
from xmppd.module_api import RosterService
from xmppd.protocol.jid import parse

JULIET = f"juliet@{HOST}"
LAST = "<query xmlns='jabber:iq:last'/>"
FETCH = "<offline xmlns='http://jabber.org/protocol/offline'><fetch/></offline>"
COUNT = "<query xmlns='http://jabber.org/protocol/disco#info' node='http://jabber.org/protocol/offline'/>"


@pytest.fixture
async def nodes(databases, tmp_path):
    """Three nodes with everything that remembers something."""
    async with worlds.cluster(3, await databases.migrated("sqlite", tmp_path), tmp_path) as made:
        await made.load(roster={}, presence={}, offline={}, blocking={}, last={}, disco={}, announce={"access": "all"})
        await made[0].account("juliet", "romeo")
        yield made


# -- offline


async def test_what_was_stored_while_the_user_came_on_another_node_is_delivered(nodes):
    """The node that stores has not heard yet that she is there, and hers looked before it was stored."""
    romeo = await nodes[0].online("romeo")
    await nodes.calm()
    nodes.net.hold("two", "one")
    juliet = await nodes[1].online("juliet")

    outcome = await romeo.send(message(JULIET, "between two looks"))
    await nodes[0].stored(outcome)
    assert juliet.bodies == []
    nodes.net.let_go("two", "one")
    await nodes.net.until(lambda: juliet.bodies)

    assert juliet.bodies == ["between two looks"]


async def test_what_was_just_being_stored_when_the_user_came_on_another_node_is_delivered(nodes, monkeypatch):
    """The node that stores hears of her in time, and hers looks again, or has not looked yet."""
    romeo = await nodes[0].online("romeo")
    await nodes.calm()
    gate, keep = asyncio.Event(), nodes[0].spool.keep

    def slowly(*args, **options):
        async def work():
            await gate.wait()
            return await keep(*args, **options)

        return asyncio.ensure_future(work())

    monkeypatch.setattr(nodes[0].spool, "keep", slowly)
    outcome = await romeo.send(message(JULIET, "being written"))
    juliet = nodes[1].login("juliet")
    coming = asyncio.create_task(juliet.available())
    await nodes.net.until(lambda: nodes[0].manager.is_available(parse(JULIET)))
    assert juliet.bodies == []
    gate.set()
    await nodes.net.until(lambda: juliet.bodies)
    await coming

    assert juliet.bodies == ["being written"]
    await nodes[0].stored(outcome)


async def test_a_kept_message_that_did_not_arrive_goes_to_the_other_node(nodes):
    outcome = await (await nodes[0].online("romeo")).send(message(JULIET, "kept"))
    await nodes[0].stored(outcome)
    first = await nodes[0].online("juliet", "a")
    first.stalled = True
    await nodes.net.until(lambda: first.bodies)
    second = await nodes[1].online("juliet", "b")
    await nodes.calm()

    first.lose()
    await nodes.net.until(lambda: second.bodies)
    nodes.sweep()
    await nodes.calm()

    assert second.bodies == ["kept"]
    await nodes.net.until(lambda: nodes[1].spool.flushed == 1)
    assert await nodes[0].rows() == []


async def test_who_looks_through_the_messages_on_one_node_keeps_them_from_the_others(nodes):
    outcome = await (await nodes[0].online("romeo")).send(message(JULIET, "waits"))
    await nodes[0].stored(outcome)
    looking = nodes[0].login("juliet", "a")
    await looking.query("get", COUNT)
    await nodes.calm()
    other = await nodes[1].online("juliet", "b")
    await nodes.calm()
    assert other.bodies == []

    looking.session.close(clean=True)
    await nodes.net.until(lambda: other.bodies)

    assert other.bodies == ["waits"]


# -- announcements


async def test_an_announcement_reaches_the_sessions_of_all_nodes_once(nodes):
    clients = [await world.online("juliet", f"r{number}") for number, world in enumerate(nodes.worlds)]
    await nodes.calm()

    await nodes[1].command("announce_send_online", HOST, "Hark", "The watch is coming")
    await nodes.calm()

    assert [client.bodies for client in clients] == [["The watch is coming"]] * 3


async def test_the_message_of_the_day_is_the_same_on_all_nodes_at_once(nodes):
    await nodes[2].online("romeo")  # which looks for it, and remembers that there is none
    await nodes.calm()
    await nodes[0].command("announce_motd_update", HOST, "", "Keep the peace")
    await nodes.calm()
    juliet = await nodes[2].online("juliet")
    await nodes.net.until(lambda: juliet.bodies)
    assert juliet.bodies == ["Keep the peace"]


# -- accounts


async def test_a_removed_account_is_forgotten_on_all_nodes(nodes):
    clients = [await world.come("juliet", f"r{number}") for number, world in enumerate(nodes.worlds)]
    await nodes.calm()
    told = []
    for number, world in enumerate(nodes.worlds):
        world.hooks.add("t", UserDeleted, lambda event, number=number: told.append((number, "deleted")))
        world.hooks.add("t", UserForgotten, lambda event, number=number: told.append((number, "forgotten")))
        assert await world.accounts.exists(HOST, "juliet")

    await nodes[1].accountant.remove(HOST, "juliet")
    await nodes.calm()

    assert all(client.ended is not None for client in clients)
    assert sorted(told) == [(0, "forgotten"), (1, "deleted"), (2, "forgotten")]
    for world in nodes.worlds:
        assert not world.accounts.known(HOST, "juliet")
        assert world.service(RosterService).cached(parse(JULIET)) is None
    await nodes[2].account("juliet")  # somebody else, of whom nothing is known
    again = await nodes[0].come("juliet")
    assert again.bodies == []


# -- what is said of those who are on other nodes


async def test_who_is_on_another_node_is_online(nodes):
    await nodes[0].befriend("juliet", "romeo")
    await nodes[1].come("juliet", priority=-5)
    romeo = await nodes[0].come("romeo")
    await nodes.calm()

    last = await romeo.query("get", LAST, JULIET)
    items = await romeo.query("get", "<query xmlns='http://jabber.org/protocol/disco#items'/>", JULIET)

    assert last.get("seconds") == "0"
    assert [item.get("jid") for item in items] == [f"{JULIET}/balcony"]


async def test_last_activity_is_that_of_the_last_session_anywhere(nodes):
    await nodes[0].befriend("juliet", "romeo")
    first, second = await nodes[0].come("juliet", "a"), await nodes[1].come("juliet", "b")
    await nodes.calm()
    await first.send("<presence type='unavailable'><status>not yet</status></presence>")
    await nodes.calm()
    await second.send("<presence type='unavailable'><status>now</status></presence>")
    await nodes.calm()
    first.lose()
    second.lose()
    await nodes.calm()
    romeo = await nodes[2].come("romeo")

    async def written():
        answer = await romeo.ask("get", LAST, JULIET)
        return answer.type == "result"

    await nodes[2].until_true(written)
    assert (await romeo.query("get", LAST, JULIET)).text == "now"


# -- one roster changed on two nodes


@pytest.mark.parametrize("kind", BOTH)
async def test_two_nodes_that_change_one_roster_at_once_lose_no_change(databases, tmp_path, kind):
    url = await databases.migrated(kind, tmp_path)
    async with worlds.cluster(2, url, tmp_path) as made:
        await made.load(roster={"max_items": 24}, presence={})
        await made[0].account("juliet")
        clients = [await world.enter("juliet", f"r{number}") for number, world in enumerate(made.worlds)]

        async def add(client, numbers):
            answers = []
            for number in numbers:
                item = f"<item jid='n{number}@{HOST}'><group>{client.session.jid.resource}</group></item>"
                answers.append(await client.ask("set", f"<query xmlns='jabber:iq:roster'>{item}</query>"))
            return [answer.type for answer in answers]

        # The tenth to fifteenth are set by both; the limit is reached by the two together.
        results = await asyncio.gather(add(clients[0], range(15)), add(clients[1], range(9, 30)))
        await made.calm()

        assert results[0] + results[1] != ["result"] * 36
        rosters = []
        for client in clients:
            roster = await client.query("get", "<query xmlns='jabber:iq:roster' ver=''/>")
            rosters.append((roster.get("ver"), sorted((item.get("jid"), item[0].text) for item in roster)))
        assert rosters[0] == rosters[1]
        assert len(rosters[0][1]) == 24
        assert set(await made[0].roster("juliet")) == {jid for jid, _ in rosters[0][1]}
    databases.drop(url)
