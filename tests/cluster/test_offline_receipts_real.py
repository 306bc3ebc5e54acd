"""offline_receipt when a node dies that holds messages: real processes."""

import json
from collections import Counter

import pytest

from tests.harness.house import House
from tests.harness.promise import spool_status
from tests.harness.scene import until
from xmppd.config.schema import DEFAULT_MODULES

MODULES = {**{name: {} for name in DEFAULT_MODULES}, "offline_receipt": {}}
REQUEST = "<request xmlns='urn:xmpp:receipts'/>"
RECEIVED = "{urn:xmpp:receipts}received"
MESSAGES = 20


@pytest.mark.long
async def test_or_05_what_a_dead_node_held_is_answered_once_by_the_living(real_cluster):
    """OR-05, OR-09"""
    house = House(real_cluster(3, modules=MODULES), counted=True)
    first, second, _ = house.nodes
    second.expects_trouble = True
    romeo = await house.client("romeo", 0, "orchard")
    await house.client("juliet", 1, "balcony", prompt=False)  # acknowledges nothing
    await until(lambda: first.quick("user_resources", "juliet", "localhost") != "", "her row")
    for number in range(MESSAGES):
        romeo.send_raw(
            f"<message to='juliet@localhost' type='chat' id='m{number}'><body>{number}</body>{REQUEST}</message>"
        )
    romeo.request()
    await romeo.until_acked(1 + MESSAGES)  # its presence too
    assert spool_status(first, of=second)["held"] == MESSAGES

    second.kill()

    ids = []
    for _ in range(MESSAGES):
        got = await romeo.wait_for(lambda got: got.xml.find(RECEIVED) is not None, "a receipt")
        ids.append(got.xml.find(RECEIVED).get("id"))
    await romeo.sync()
    assert romeo.forget(lambda got: got.xml.find(RECEIVED) is not None) == []
    assert Counter(ids) == {f"m{number}": 1 for number in range(MESSAGES)}
    for node in (house.nodes[0], house.nodes[2]):
        told = json.loads(node.ctl("--json", "message_state", "romeo@localhost", "juliet@localhost", "m7").stdout)
        assert told["state"] == "stored-offline"
    await house.leave()
