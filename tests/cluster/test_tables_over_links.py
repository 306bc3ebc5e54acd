"""Session managers of several nodes that share their tables: what users notice."""

import asyncio

from tests.cluster.memory_net import Net
from tests.harness.routing import FakeSession
from tests.harness.routing import Node as Routing
from xmppd.cluster.replica import Replica
from xmppd.protocol.jid import parse

JULIET = parse("juliet@localhost")


class Served:
    """One node: links, the four managers, a replica."""

    def __init__(self, net: Net, name: str) -> None:
        loop = asyncio.get_running_loop()
        self.links, _ = net.add(name)
        self.owner = net.owner(name)
        self.routing = Routing()
        self.manager, self.table = self.routing.manager, self.routing.table
        self.manager.close(next(iter(self.table.own_sessions())))  # romeo is on every node
        self.manager._owner = self.owner
        self.replica = Replica(
            self.links,
            self.owner,
            [self.table, self.routing.routes],
            call_soon=loop.call_soon,
            call_later=loop.call_later,
            digest_period=0.05,
        )
        self.replica.start()

    def bind(self, jid: str, priority: int | None = 0) -> FakeSession:
        return self.routing.bind(jid, priority)[0]


async def test_a_session_is_known_on_all_nodes_and_its_address_is_nobody_elses():
    async with Net() as net:
        one, two, three = (Served(net, name) for name in ("one", "two", "three"))
        await net.all_up()
        first = one.bind("juliet@localhost/balcony", 3)
        other = one.bind("juliet@localhost/garden", 3)
        await net.until(lambda: three.manager.is_available(JULIET) and two.manager.count() == 2)

        second = two.bind("juliet@localhost/balcony", 5)
        await net.until(lambda: first.was_replaced)
        await net.until(lambda: all(node.replica.status().converged for node in (one, two, three)))

        assert not second.was_replaced
        assert not other.was_replaced
        for node in (one, two, three):
            rows = node.table.rows(JULIET.bare)
            assert {resource: (row.owner, row.priority) for resource, row in rows.items()} == {
                "balcony": (two.owner, 5),
                "garden": (one.owner, 3),
            }
            assert node.manager.count("localhost") == 2
        assert list(one.manager.local()) == [other]
        assert one.replica.status().conflicts == 1
        assert set(one.routing.routes.elsewhere("localhost")) == {two.owner, three.owner}
        for node in (one, two, three):
            node.replica.stop()


async def test_after_a_cut_the_later_of_two_equal_addresses_stays():
    async with Net() as net:
        one, two = Served(net, "one"), Served(net, "two")
        await net.all_up()
        net.cut("one", "two")
        await net.until(lambda: not one.links.peers and not two.links.peers)
        first, second = one.bind("juliet@localhost/r"), two.bind("juliet@localhost/r")

        net.heal()
        await net.until(lambda: all(node.replica.status().converged and node.links.peers for node in (one, two)))

        assert (first.was_replaced, second.was_replaced) == (True, False)
        assert one.manager.count() == two.manager.count() == 1
        for node in (one, two):
            node.replica.stop()
