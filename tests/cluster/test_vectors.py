"""The delivery vectors with the sender and each of the recipient's resources on whatever node, in every assignment.

Over three nodes the assignments that differ in the names of the nodes alone are tried once; with `-m long` all are."""

import itertools
from typing import NamedTuple

import pytest

from tests.cluster import worlds
from tests.harness import vectors
from tests.modules.world import HOST, condition, message
from xmppd.s2s_manager import S2SManager

PAYLOADS = {"any": "urn:example:any", "urn:unknown": "urn:example:unknown"}
SENDER = f"romeo@{HOST}"


class Size(NamedTuple):
    """How many nodes, and whether assignments that differ in their names alone count as different."""

    nodes: int
    named: bool

    @each_size
@each_profile
async def test_message_vectors(house, size):
    async def attempt(vector, user, sender, recipients):
        outcome = await sender.send(message(house.address(vector["to"], user), "Good night", type=vector["type"]))
        return await house.happened(sender, recipients, outcome)

    assert await house.all("messages", attempt) == size.attempts("messages") > 53


@each_size
@each_profile
async def test_iq_vectors(house, size):
    async def attempt(vector, user, sender, recipients):
        namespace = vector.get("ns", "urn:example:any")
        payload = f"<query xmlns='{PAYLOADS.get(namespace, namespace)}'/>"
        if namespace == "vcard-temp":
            payload = "<vCard xmlns='vcard-temp'/>"
            for client in recipients.values():
                await client.ask("set", "<vCard xmlns='vcard-temp'><FN>Juliet</FN></vCard>")
                client.received.clear()
        to = house.address(vector["to"], user)
        inner = payload * vector.get("children", 1)
        outcome = await sender.send(f"<iq id='v1' type='{vector['type']}' to='{to}'>{inner}</iq>")
        found = await house.happened(sender, recipients, outcome)
        answers = [stanza for stanza in sender.received if stanza.type == "result"]
        if not answers:
            return found
        assert [(answer.id, answer.from_.full) for answer in answers] == [("v1", to)]
        return "handler"

    assert await house.all("iqs", attempt) == size.attempts("iqs") > 15


@each_size
@each_profile
async def test_domain_vectors(house, size):
    async def attempt(vector, user, sender, recipients):
        type = "" if vector["type"] == "available" else f" type='{vector['type']}'"
        for world in house.nodes.worlds:
            world.router.connect(S2SManager(world.router.bounce))  # nobody knows unknown.invalid
        outcome = await sender.send(f"<{vector['stanza']} id='v1' to='{house.address(vector['to'], user)}'{type}/>")
        return await house.happened(sender, recipients, outcome)

    assert await house.all("domains", attempt) == size.attempts("domains") >= 6


@each_size
@each_profile
async def test_presence_vectors(house, size):
    async def attempt(vector, user, sender, recipients):
        type = "" if vector["type"] == "available" else f" type='{vector['type']}'"
        to = house.address(vector["to"], user)
        if vector["type"] == "probe":
            return await probe(vector, to, sender, recipients)
        outcome = await sender.send(f"<presence id='v1' to='{to}'{type}/>")
        found = await house.happened(sender, recipients, outcome)
        if "roster" in vector:
            await assert_request_waits(vector)
        return found

    async def probe(vector, to, sender, recipients):
        await sender.available()
        ends = ("juliet", HOST, "romeo", HOST, "", "", "from")
        if not vector["subscribed"]:  # the answer is shown to those alone who believe that they are subscribed
            ends = ("romeo", HOST, "juliet", HOST, "", "", "to")
        await house.nodes[0].command("add_rosteritem", *ends)
        await house.nodes.calm()
        sender.received.clear()
        await sender.send(f"<presence id='v1' to='{to}' type='probe'/>")
        await house.nodes.calm()
        await house.sql("DELETE FROM roster_item")
        presences = [stanza for stanza in sender.received if stanza.kind == "presence"]
        got = [(stanza.type, stanza.from_.full) for stanza in presences]
        if got == [("available", f"{to}/{name}") for name in recipients]:
            return "reply"
        # An absent user's last presence is told, from the resource that sent it.
        return got[0][0] if [stanza.from_.bare for stanza in presences] == [to] else str(got)

    async def assert_request_waits(vector):
        """A request that waits ([none, in]) is shown at the next available presence, on whatever node."""
        assert vector["roster"] == ["none", "in"]
        for place in range(size.nodes):
            late = await house.nodes[place].enter("juliet", "late", interested=False)
            await late.available()
            [shown] = [stanza for stanza in late.received if stanza.type == "subscribe"]
            assert shown.from_.full == SENDER
            late.session.close(clean=True)
            await house.nodes.calm()
        await house.sql("DELETE FROM roster_item")

    assert await house.all("presences", attempt) == size.attempts("presences") > 10
