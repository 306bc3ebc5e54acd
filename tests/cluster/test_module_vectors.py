"""The vectors of blocking and of offline messages with the two users on whatever of two nodes, in every assignment."""

import itertools
from pathlib import Path

import pytest
import yaml

from tests.cluster import worlds
from tests.modules.test_offline import of_vector
from tests.modules.world import HOST, condition, message

FOLDER = Path(__file__).parents[1] / "vectors"
BLOCKING = yaml.safe_load((FOLDER / "blocking.yaml").read_text())["blocking_vectors"]
OFFLINE = [v for v in yaml.safe_load((FOLDER / "offline.yaml").read_text())["offline_vectors"] if "due" not in v]
JULIET, ROMEO = f"juliet@{HOST}", f"romeo@{HOST}"
BLOCK = "<block xmlns='urn:xmpp:blocking'><item jid='{}'/></block>"
INNER = {"iq": "<vCard xmlns='vcard-temp'/>", "message": "<body>hear me</body>", "presence": ""}
INVITATION = "<x xmlns='http://jabber.org/protocol/muc#user'><invite/></x>"
PLACES = list(itertools.product(range(2), repeat=2))


@pytest.fixture
async def nodes(databases, tmp_path):
    async with worlds.cluster(2, await databases.migrated("sqlite", tmp_path), tmp_path) as made:
        yield made


def errors(client):
    return [condition(stanza) for stanza in client.received if stanza.type == "error"]


async def leave(nodes, *clients):
    for client in clients:
        client.session.close(clean=True)
    await nodes.calm()


async def test_blocking_vectors(nodes):
    await nodes.load(roster={}, presence={}, offline={}, vcard={}, disco={}, blocking={})
    await nodes[0].account("juliet", "romeo")
    await nodes[0].befriend("juliet", "romeo")
    blocker = await nodes[0].come("juliet")
    assert (await blocker.ask("set", BLOCK.format(ROMEO))).type == "result"
    await leave(nodes, blocker)
    wrong, tried = [], 0

    for vector, places in itertools.product(BLOCKING, PLACES):
        juliet, romeo = await nodes[places[0]].come("juliet"), await nodes[places[1]].come("romeo")
        await nodes.calm()
        sender, receiver, to = (romeo, juliet, JULIET) if "in" in vector else (juliet, romeo, ROMEO)
        juliet.received.clear()
        romeo.received.clear()
        to += "/balcony" if vector.get("in", vector.get("out")) == "full" else ""
        kind = "" if vector["type"] == "available" else f" type='{vector['type']}'"
        inner = INNER[vector["stanza"]] + (INVITATION if vector.get("with") == "invitation" else "")

        outcome = await sender.send(f"<{vector['stanza']}{kind} to='{to}' id='x1'>{inner}</{vector['stanza']}>")
        await nodes.calm()
        await nodes[0].settled(outcome)

        expected = [] if vector["result"] == "S" else [vector["result"].removeprefix("E:")]
        kept = await nodes[0].spool.count(HOST, "juliet") + await nodes[0].spool.count(HOST, "romeo")
        if (errors(sender), receiver.received, kept) != (expected, [], 0):
            wrong.append((vector["id"], places, errors(sender), receiver.received, kept))
        tried += 1
        await leave(nodes, juliet, romeo)

    assert wrong == []
    assert tried == len(BLOCKING) * 4 == 108


async def test_offline_vectors(nodes):
    await nodes.load(roster={}, presence={}, blocking={}, offline={"max_messages": 3})
    wrong, tried = [], 0

    for number, (vector, places) in enumerate(itertools.product(OFFLINE, PLACES)):
        host, world = nodes[places[0]], nodes[places[1]]
        await host.account("juliet", "romeo")
        romeo = await host.online("romeo")
        await prepare(vector, world, nodes, romeo)

        count = vector.get("count", 1)
        for index in range(count):
            outcome = await romeo.send(of_vector(vector, number * 10 + index))
            await nodes.calm()
            await host.settled(outcome)
        told, kept = errors(romeo), await world.spool.count(HOST, "juliet")
        if vector.get("quota") == "full":
            kept -= 3
        for each in nodes.worlds:
            each.advanced += vector.get("after", 0)
        juliet = world.login("juliet", "later")
        for priority in vector.get("login_priority", [0]):
            await juliet.available(priority)
        await nodes.calm()

        found = f"E:{told[0]}" if told else "stored" if kept == count else "S" if kept == 0 else kept
        flushed = len(juliet.bodies) if found == "stored" else vector.get("flushed")
        if (found, flushed) != (vector.get("ours", vector["compat"]), vector.get("flushed")):
            wrong.append((vector["id"], places, found, flushed))
        tried += 1
        await leave(nodes, romeo, juliet)
        for name in ("juliet", "romeo"):
            await host.accountant.remove(HOST, name)
        await nodes.calm()

    assert wrong == []
    assert tried == len(OFFLINE) * 4 == 44


async def prepare(vector, world, nodes, romeo):
    if vector.get("blocked"):
        juliet = await world.enter("juliet", interested=False)
        await juliet.ask("set", BLOCK.format(ROMEO))
        await leave(nodes, juliet)
    if vector.get("quota") == "full":
        for number in range(3):
            await world.stored(await romeo.send(message(JULIET, "filler", f"f{number}")))
    romeo.received.clear()
