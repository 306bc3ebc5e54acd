"""Stanzas between nodes: each arrives, once, in order, and its sender's node hears what became of it."""

import pytest

from tests.cluster.worlds import cluster
from tests.modules.world import HOST, message
from xmppd.cluster.interfaces import Kind
from xmppd.delivery import SAFE, Pending

JULIET, ROMEO = f"juliet@{HOST}", f"romeo@{HOST}"


@pytest.fixture
async def three(databases, tmp_path):
    """Three nodes with two accounts and no modules."""
    url = await databases.migrated("sqlite", tmp_path)
    async with cluster(3, url, tmp_path) as nodes:
        await nodes[0].account("juliet", "romeo")
        yield nodes


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
