"""No message waits in the spool while its recipient is available, on whatever node."""

import asyncio
import random
from types import SimpleNamespace

import pytest

from tests.cluster import worlds
from tests.cluster.test_presence import JULIET
from tests.modules.world import HOST, message
from xmppd.events import NodeDown, NodeUp
from xmppd.protocol.jid import parse
from xmppd.spool import Holder
from xmppd.spool_watch import Place, SpoolWatch

ROUNDS = 40


@pytest.fixture
async def nodes(databases, tmp_path):
    async with worlds.cluster(2, await databases.migrated("sqlite", tmp_path), tmp_path) as made:
        await made.load(roster={}, presence={}, offline={})
        await made[0].account("juliet", "romeo")
        yield made


class Links:
    """Each of `peers` is up, and sees all the others."""

    def __init__(self):
        self.peers = []

    def unseen(self, nodes):
        return {node for node in nodes if node not in self.peers}


def watch(world):
    """Its looks at the database, when they are wanted."""
    cluster = SimpleNamespace(
        me=SimpleNamespace(node=world.owner.member),
        skews={},
        joined=True,
        holds_lease=True,
        links=Links(),
        membership=SimpleNamespace(others=[SimpleNamespace(node=b"the other one")]),
    )
    manager = world.manager
    return SpoolWatch(
        world.spool,
        cluster,
        Place(cluster),
        world.hooks,
        manager.takes_messages_here,
        world.spawn,
        is_available=manager.is_available,
        hold=manager.hold_messages,
        set_aside=world.parts.resumption.set_aside,
    )


async def test_what_is_stored_while_its_recipient_appears_elsewhere_comes_at_once(nodes, monkeypatch):
    hits = 0
    keep = nodes[0].spool.keep

    def counting(*args, **options):
        future = keep(*args, **options)

        def committed(done):
            nonlocal hits
            hits += nodes[1].manager.is_available(parse(JULIET))

        future.add_done_callback(committed)
        return future

    monkeypatch.setattr(nodes[0].spool, "keep", counting)
    romeo = await nodes[0].come("romeo")
    await nodes.calm()
    chance = random.Random(6)
    nodes.net.delay = lambda: chance.uniform(0, 0.004)
    for turn in range(ROUNDS):

        async def write(turn=turn):
            await asyncio.sleep(chance.uniform(0, 0.012))
            for part in range(3):
                await romeo.send(message(JULIET, f"{turn}.{part}", id=f"m{turn}.{part}"))

        juliet = await nodes[1].enter("juliet")

        async def appear(juliet=juliet):
            await asyncio.sleep(chance.uniform(0, 0.012))
            await juliet.available()

        await asyncio.gather(write(), appear())
        await nodes[1].until(lambda juliet=juliet: len(juliet.bodies) >= 3)
        assert juliet.bodies == [f"{turn}.{part}" for part in range(3)]
        nodes.sweep()
        juliet.session.close(clean=True)
        await nodes[0].until(lambda: not nodes[0].table.rows(JULIET))
    assert hits > 0, "the race was never hit"


async def test_it_comes_although_no_node_has_told_the_other(nodes):
    looks = watch(nodes[1])
    romeo = await nodes[0].come("romeo")
    juliet = await nodes[1].enter("juliet")
    await nodes.calm()
    nodes.net.hold("two", "one")  # that she is there
    await juliet.available()
    for number in range(3):
        await nodes[0].stored(await romeo.send(message(JULIET, str(number), id=f"m{number}")))
    assert juliet.bodies == []

    await looks.look()

    await nodes[1].until(lambda: len(juliet.bodies) == 3)
    await looks.look()  # it sees them again, and they are not sent again
    await nodes[1].quiet()
    assert juliet.bodies == ["0", "1", "2"]

    # Rows do not show in the order of their times: this one was begun five seconds ago.
    nodes[0].advanced = -5.0
    await nodes[0].stored(await romeo.send(message(JULIET, "3", id="m3")))
    await looks.look()
    await nodes[1].until(lambda: len(juliet.bodies) == 4)

    # The next one is stored when the other node learns that she is there, and the one behind it goes to her directly.
    nodes[0].advanced = 0.0
    await nodes[0].stored(await romeo.send(message(JULIET, "4", id="m4")))
    nodes.net.let_go("two", "one")
    await nodes[0].until(lambda: nodes[0].manager.is_available(parse(JULIET)))
    await romeo.send(message(JULIET, "5", id="m5"))
    await nodes[1].until(lambda: len(juliet.bodies) == 6)
    assert juliet.bodies == [str(number) for number in range(6)]


@pytest.mark.parametrize("seen_again", [False, True])
async def test_who_comes_from_a_node_that_was_not_seen_does_not_overtake_what_they_wrote_there(nodes, seen_again):
    looks = watch(nodes[1])
    romeo = await nodes[0].come("romeo")
    juliet = await nodes[1].enter("juliet")
    await nodes.calm()
    nodes.net.hold("two", "one")  # node one does not see her
    await juliet.available()
    await nodes[0].stored(await romeo.send(message(JULIET, "1", id="m1")))
    nodes[1].hooks.notify(NodeDown("one", nodes[0].owner.member, "silent"))
    if seen_again:
        looks._cluster.links.peers.append(b"the other one")
    romeo = await nodes[1].come("romeo", "elsewhere")
    await romeo.send(message(JULIET, "2", id="m2"))
    await nodes[1].until(lambda: len(juliet.bodies) == 2)
    assert juliet.bodies == ["1", "2"]


async def test_what_they_wrote_comes_first_to_somebody_on_another_node_too(nodes):
    """The node she is on has been frozen, say, and has not looked yet."""
    watch(nodes[0])
    juliet = await nodes[1].enter("juliet")
    await nodes.calm()
    nodes.net.hold("two", "one")
    await juliet.available()
    romeo = await nodes[0].come("romeo")
    await nodes[0].stored(await romeo.send(message(JULIET, "1", id="m1")))
    for node in nodes.worlds:  # none remembers it
        node.loader._loaded["offline"].instance._stored_lately.clear()
    nodes.net.let_go("two", "one")
    await nodes[0].until(lambda: nodes[0].manager.is_available(parse(JULIET)))
    assert juliet.bodies == []

    nodes[0].hooks.notify(NodeDown("three", b"the other one", "silent"))
    romeo = await nodes[0].come("romeo", "elsewhere")
    await romeo.send(message(JULIET, "2", id="m2"))
    await nodes[1].until(lambda: len(juliet.bodies) == 2)
    assert juliet.bodies == ["1", "2"]


async def test_what_a_node_holds_that_is_not_seen_comes_before_what_its_sender_writes_elsewhere(nodes):
    """It has a session of hers that others do not know of, and dies, say."""
    looks = watch(nodes[1])
    looks._cluster.membership.others = [SimpleNamespace(node=nodes[0].owner.member)]
    juliet = await nodes[1].come("juliet")
    holder = Holder(nodes[0].owner.member, nodes[0].owner.incarnation, "a session of hers")
    xml = f"<message from='romeo@{HOST}' to='{JULIET}' type='chat'><body>1</body></message>".encode()
    _, item = nodes[0].spool.keep_item(HOST, "juliet", f"romeo@{HOST}", xml, dedup=None, quota=None, holder=holder)
    await nodes[0].spool.submit(item)
    nodes[1].hooks.notify(NodeDown("one", nodes[0].owner.member, "killed"))

    romeo = await nodes[1].enter("romeo")
    writing = asyncio.create_task(romeo.send(message(JULIET, "2", id="m2")))
    await asyncio.sleep(0.3)
    assert juliet.bodies == []
    await nodes[0].spool.release((item.id,), holder)
    await nodes[1].until(lambda: len(juliet.bodies) == 2)
    await writing

    assert juliet.bodies == ["1", "2"]


async def test_when_all_is_found_a_login_looks_no_more(nodes):
    looks = watch(nodes[1])
    nodes[1].hooks.notify(NodeDown("one", nodes[0].owner.member, "silent"))
    await looks.look()
    looks._listen()
    assert looks._listens
    before = looks.looks
    await looks.look_first(parse(JULIET))
    assert looks.looks == before + 1
    looks._cluster.links.peers.append(b"the other one")
    await looks.look()
    looks._listen()
    assert not looks._listens
    assert looks.look_first(parse(JULIET)) is None
    nodes[1].hooks.notify(NodeUp("three", b"a third one"))  # which may not see all yet
    assert looks._listens


async def test_what_is_written_behind_stored_messages_does_not_overtake_them(nodes):
    """A message that another node sends directly, while those that it has stored are being fetched."""
    chance = random.Random(7)
    romeo = await nodes[0].come("romeo")
    await nodes.calm()
    nodes.net.delay = lambda: chance.uniform(0, 0.004)
    for turn in range(15):
        expected = [f"{turn}.{number}" for number in range(40)]

        async def write(expected=expected):
            for body in expected:
                await romeo.send(message(JULIET, body, id=body))
                await asyncio.sleep(chance.uniform(0, 0.001))

        juliet = await nodes[1].enter("juliet")
        writing = asyncio.create_task(write())
        await asyncio.sleep(chance.uniform(0, 0.02))
        await juliet.available()
        await writing
        await nodes[1].until(lambda juliet=juliet, expected=expected: len(juliet.bodies) >= len(expected))
        assert juliet.bodies == expected
        nodes.sweep()
        juliet.session.close(clean=True)
        await nodes[0].until(lambda: not nodes[0].table.rows(JULIET))
