"""The delivery vectors with the sender and each of the recipient's resources on whatever node, in every assignment.

Over three nodes, assignments that differ in the names of the nodes alone are tried once; with `-m long` all of them.
"""

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

    def assignments(self, ends):
        """The nodes of so many ends. Where names do not count, the nodes are in the order in which they occur."""
        for places in itertools.product(range(self.nodes), repeat=ends):
            new = [place <= max(places[:at], default=-1) + 1 for at, place in enumerate(places)]
            if self.named or all(new):
                yield places

    def attempts(self, name):
        """How many assignments a file's vectors have, counted in another way."""
        ends = [1 + len(vector.get("res", [])) for vector in vectors.load(name)]
        if self.named:
            return sum(self.nodes**count for count in ends)
        partitions = {1: 1, 2: 2, 3: 5, 4: 14}  # of so many ends into three parts or fewer
        return sum(partitions[count] for count in ends)


each_size = pytest.mark.parametrize(
    "size",
    [
        pytest.param(Size(2, True), id="2"),
        pytest.param(Size(3, False), id="3"),
        pytest.param(Size(3, True), id="3-named", marks=pytest.mark.long),
    ],
)
each_profile = pytest.mark.parametrize("profile", vectors.PROFILES)


class House:
    """A cluster in which one vector after the other is tried."""

    def __init__(self, made, profile, size):
        self.nodes = made
        self.size = size
        self.profile = profile
        self.wrong = []
        self.tried = 0

    def address(self, to, user):
        if to == "bare":
            return f"{user}@{HOST}"
        if to.startswith("full:"):
            return f"{user}@{HOST}/{to[5:]}"
        return HOST if to == "domain" else to.replace("domain/", f"{HOST}/")

    async def all(self, name, attempt):
        """Try every vector of a file in every assignment; how many attempts that were."""
        for vector in vectors.load(name):
            names = [resource for resource, _ in vector.get("res", [])]
            for places in self.size.assignments(1 + len(names)):
                await self.one(vector, places, attempt)
        assert self.wrong == []
        return self.tried

    async def one(self, vector, places, attempt):
        user = "juliet" if vector.get("acct", True) else "nobody"
        recipients = {
            resource: await self.enter(place, user, resource, priority)
            for (resource, priority), place in zip(vector.get("res", []), places[1:], strict=True)
        }
        sender = await self.enter(places[0], "romeo", "orchard", None)
        await self.nodes.calm()
        for client in (sender, *recipients.values()):
            client.received.clear()
        found, expected = await attempt(vector, user, sender, recipients), vectors.expected(vector, self.profile)
        self.tried += 1
        if found != expected:
            self.wrong.append((vector["id"], places, found, expected))
        await self.clean()

    async def enter(self, place, user, resource, priority):
        client = await self.nodes[place].enter(user, resource, interested=False)
        if priority is not None:
            await client.available(priority)
        return client

    async def clean(self):
        for world in self.nodes.worlds:
            for session in list(world.manager.local()):
                session.close(clean=True)
        await self.nodes.calm()
        assert all(world.table.count() == 0 for world in self.nodes.worlds)
        assert all(world.forwarder.pending == 0 for world in self.nodes.worlds)

    async def sql(self, text):
        async def work(connection):
            await connection.exec_driver_sql(text)

        await self.nodes.storages[0].run(work)

    async def happened(self, sender, recipients, outcome):
        """What became of a stanza, in the words of the vectors; its outcome agrees with it."""
        await self.nodes.calm()
        self.nodes.sweep()
        settled = await self.nodes[0].settled(outcome)
        takers = [name for name, client in recipients.items() for _ in client.received]
        errors = [f"E:{condition(stanza)}" for stanza in sender.received if stanza.type == "error"]
        assert (settled.value == "error") == bool(errors)
        stored = ["off"] * len(await self.nodes[0].rows("juliet"))
        if stored:
            await self.sql("DELETE FROM spool")
        found = errors + stored + ([takers] if takers else [])
        assert len(found) <= 1, found
        return found[0] if found else "S"


@pytest.fixture
async def house(databases, tmp_path, size, profile):
    url = await databases.migrated("sqlite", tmp_path)
    async with worlds.cluster(size.nodes, url, tmp_path, strict=profile == "rfc6121") as made:
        await made.load(roster={}, presence={}, offline={}, vcard={}, version={})
        await made[0].account("juliet", "romeo")
        yield House(made, profile, size)


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
