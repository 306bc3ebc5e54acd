"""Links in a real event loop: over memory, and over real nats-server processes."""

import asyncio
import os
import signal

import pytest

from tests.cluster.link_net import LinkNet
from tests.cluster.nats_nodes import CLUSTER, Node, mesh, until
from xmppd.cluster.calls import NodeCalls
from xmppd.cluster.interfaces import Kind
from xmppd.cluster.link_types import Settings
from xmppd.cluster.links import LinkSet
from xmppd.cluster.tables import Owner
from xmppd.errors import NodeUnreachable


@pytest.fixture
async def net():
    async with LinkNet() as net:
        yield net


def watch(links):
    """(names that came up, (name, reason) of those that went down)."""
    ups, downs = [], []
    links.on_up(lambda peer: ups.append(peer.name))
    links.on_down(lambda peer, reason: downs.append((peer.name, reason)))
    return ups, downs


async def test_frames_arrive_in_order_while_every_third_packet_is_lost(net):
    links, _ = net.add("one")
    other, _ = net.add("two")
    _, downs = watch(other)
    got = []
    other.on(Kind.STANZA, lambda peer, body: got.append(body))
    await net.all_up()
    count = iter(range(1_000_000))
    net.transports[net.node("two")].eats = lambda packet: next(count) % 3 == 0

    sent = [b"%d" % number for number in range(500)]
    for body in sent:
        links.send(net.node("two"), Kind.STANZA, body)
        if len(body) == 3:
            await asyncio.sleep(0)

    await net.until(lambda: len(got) == len(sent))
    assert got == sent
    assert downs == []


async def test_a_killed_process_comes_back_as_a_new_one(net):
    links, calls = net.add("one")
    net.add("two")
    ups, downs = watch(links)
    await net.all_up()

    net.kill("two")
    await net.until(lambda: downs)
    with pytest.raises(NodeUnreachable):
        await calls.call(net.node("two"), "x", None)
    net.add("two")
    await net.all_up()

    assert ups == ["two", "two"]
    assert downs == [("two", "its process has gone")]
    assert links.peers[net.node("two")].owner.incarnation == 2


async def test_a_cut_pair_goes_on_through_a_third(net):
    _, one = net.add("one")
    links, three = net.add("three")
    net.add("two")
    _, downs = watch(links)
    three.on_call("echo", lambda peer, payload: payload)
    await net.all_up()
    await asyncio.sleep(0.3)  # until each has heard whom the others reach

    net.cut("one", "three")

    for number in range(20):
        assert await one.call(net.node("three"), "echo", number) == number
        await asyncio.sleep(0.05)
    assert downs == []


async def test_a_cut_pair_alone_goes_down_and_comes_back(net):
    links, _ = net.add("one")
    net.add("two")
    ups, downs = watch(links)
    await net.all_up()

    net.cut("one", "two")
    await net.until(lambda: downs)
    net.heal()
    await net.all_up()

    assert ups == ["two", "two"]
    assert downs[0][1].startswith("silent for 0.")


class NatsLinks:
    """A node with an engine of its own and links on it."""

    def __init__(self, node: Node, number: int) -> None:
        self.node = node
        owner = Owner(node.id, 0, number)
        # A nats-server that starts again may take its time on a busy machine.
        self.links = LinkSet(
            owner, node.name, "0.1.0", CLUSTER, asyncio.get_running_loop(), settings=Settings(suspect=5.0)
        )
        self.calls = NodeCalls(self.links)
        self.got: list[bytes] = []
        self.links.on(Kind.STANZA, lambda peer, body: self.got.append(body))
        self.ups, self.downs = watch(self.links)


@pytest.fixture
async def nats_links(make_node):
    """`nats_links(n)`: so many nodes, all up."""
    made: list[NatsLinks] = []

    async def make(count: int) -> list[NatsLinks]:
        nodes = [make_node() for _ in range(count)]
        await mesh(*nodes)
        for number, node in enumerate(nodes):
            made.append(NatsLinks(node, number + 1))
            made[-1].links.attach(node.engine)
            made[-1].links.set_members(each.id for each in nodes)
        await until(lambda: all(len(each.links.peers) == count - 1 for each in made))
        return made

    yield make
    for each in made:
        await each.calls.close()
        each.links.stop()


async def test_links_over_nats_carry_calls_of_any_size(nats_links):
    one, two = await nats_links(2)
    two.calls.on_call("long", lambda peer, payload: "x" * payload)

    assert await one.calls.call(two.node.id, "long", 20_000_000) == "x" * 20_000_000


async def test_a_restarted_nats_child_loses_no_frame_and_takes_no_link_down(nats_links):
    one, two = await nats_links(2)
    sent = []

    async def talk(seconds: float) -> None:
        end = asyncio.get_running_loop().time() + seconds
        while asyncio.get_running_loop().time() < end:
            sent.append(b"%d" % len(sent))
            assert one.links.send(two.node.id, Kind.STANZA, sent[-1])
            await asyncio.sleep(0.002)

    await talk(0.3)
    os.kill(two.node.engine.child_pid, signal.SIGKILL)
    await talk(2.0)

    await until(lambda: one.links.queued == 0)
    assert two.got == sent
    assert one.downs == two.downs == []


async def test_a_node_that_stops_over_nats_says_goodbye(nats_links):
    one, two = await nats_links(2)

    two.links.stop("stopped")
    await until(lambda: not two.links.farewells)
    await two.node.engine.stop()

    await until(lambda: one.downs == [(two.node.name, "stopped")])
