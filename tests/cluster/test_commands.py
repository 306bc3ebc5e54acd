"""Commands answer for the cluster, from any node; a node that does not answer is named."""

import pytest

from tests.cluster.command_net import Cluster
from tests.modules.world import HOST
from xmppd.errors import CommandError

ONE, TWO, THREE = "xmppd@node01", "xmppd@node02", "xmppd@node03"


async def test_the_sessions_of_all_nodes_are_listed_by_any(cluster: Cluster) -> None:
    one, two = await cluster.add(ONE, TWO)
    await two.online("juliet", "phone", 3)
    await one.online("romeo", "orchard")
    await one.online("juliet", "balcony")

    rows = [(await node.run("connected_users_info")).text().splitlines() for node in (one, two)]

    assert rows[0] == rows[1]
    found = [row.split("\t") for row in rows[0]]
    assert [(row[0], row[5]) for row in found] == [
        (f"juliet@{HOST}/balcony", ONE),
        (f"juliet@{HOST}/phone", TWO),
        (f"romeo@{HOST}/orchard", ONE),
    ]
    assert found[1][4] == "3"
    assert (await two.run("connected_users_info", local=True)).text().splitlines() == [rows[0][1]]
