"""The delivery vectors over real TLS streams, with both profiles."""

import pytest

from tests.harness import vectors
from tests.harness.routing import address
from tests.harness.scene import Scene, together

PAYLOADS = {"any": "urn:example:any", "urn:unknown": "urn:example:unknown"}


@pytest.fixture
async def house(served, profile):
    """A server with the profile of the vector."""
    return await served(routing={"profile": profile})


async def populate(house: Scene, vector):
    """The sender, and the recipients by resource."""
    if vector.get("acct"):
        house.account("juliet")
    recipients = {}
    for name, priority in vector.get("res", []):
        recipients[name] = await house.raw_login("juliet", name, priority=priority, available=priority is not None)
    sender = await house.raw_login("romeo", "orchard")
    await together(*recipients.values())
    for client in recipients.values():
        client.forget()
    return sender, recipients


async def happened(house, sender, recipients, id):
    """What became of a stanza, in the words of the vectors."""
    await together(sender, *recipients.values())
    takers = []
    for name, client in recipients.items():
        stanzas = client.forget()
        assert [got.id for got in stanzas] in ([], [id])
        takers += [name] * len(stanzas)
    errors = [got for got in sender.forget() if got.type == "error"]
    assert [got.id for got in errors] in ([], [id])
    found = [f"E:{got.condition}" for got in errors] + ["off"] * await house.stored("juliet")
    found += [takers] if takers else []
    assert len(found) <= 1
    return found[0] if found else "S"


@vectors.each("messages")
async def test_message_vector(house, vector, profile):
    sender, recipients = await populate(house, vector)
    id = sender.send_message(address(vector["to"]), "Good night", type=vector["type"])
    assert await happened(house, sender, recipients, id) == vectors.expected(vector, profile)


@vectors.each("iqs")
async def test_iq_vector(house, vector, profile):
    sender, recipients = await populate(house, vector)
    namespace = vector.get("ns", "urn:example:any")
    payload = f"<query xmlns='{PAYLOADS.get(namespace, namespace)}'/>"
    if namespace == "vcard-temp":
        payload = "<vCard xmlns='vcard-temp'/>"
        for client in recipients.values():
            await client.query("set", "<vCard xmlns='vcard-temp'><FN>Juliet</FN></vCard>")

    sender.send_raw(
        f"<iq id='v1' type='{vector['type']}' to='{address(vector['to'])}'>{payload * vector.get('children', 1)}</iq>"
    )

    wanted = vectors.expected(vector, profile)
    if wanted == "handler":
        answer = await sender.next_stanza("iq")
        assert (answer.id, answer.sender) == ("v1", address(vector["to"]))
        assert answer.type == "result"
    else:
        assert await happened(house, sender, recipients, "v1") == wanted


@vectors.each("domains")
async def test_domain_vector(house, vector, profile):
    sender, _ = await populate(house, {})
    type = "" if vector["type"] == "available" else f" type='{vector['type']}'"
    sender.send_raw(f"<{vector['stanza']} id='v1' to='{address(vector['to'])}'{type}/>")
    assert await happened(house, sender, {}, "v1") == vectors.expected(vector, profile)


@vectors.each("presences")
async def test_presence_vector(house, vector, profile):
    if vector["type"] == "probe":
        await probe(house, vector, profile)
        return
    sender, recipients = await populate(house, vector)
    to = address(vector["to"])
    type = "" if vector["type"] == "available" else f" type='{vector['type']}'"

    sender.send_raw(f"<presence id='v1' to='{to}'{type}/>")

    assert await happened(house, sender, recipients, "v1") == vectors.expected(vector, profile)
    if "roster" in vector:
        await assert_roster(house, vector)


async def assert_roster(house, vector):
    """A request that waits ([none, in]) is shown at the next available presence, and no item in the roster yet."""
    assert vector["roster"] == ["none", "in"]
    name, priority = vector.get("later", ["later", 0])
    late = await house.raw_login("juliet", name, priority=priority)
    shown = await late.next_presence()
    assert (shown.type, shown.sender) == ("subscribe", "romeo@localhost")
    roster = await late.query("get", "<query xmlns='jabber:iq:roster'/>")
    assert len(roster.payload) == 0


async def probe(house, vector, profile):
    house.account("romeo")
    house.account("juliet")
    if vector["subscribed"]:
        house.node.quick("add_rosteritem", "juliet", "localhost", "romeo", "localhost", "", "", "from")
    sender, recipients = await populate(house, vector)
    if not vector["subscribed"]:
        # The answer is shown to those alone who believe that they are subscribed.
        house.node.quick("add_rosteritem", "romeo", "localhost", "juliet", "localhost", "", "", "to")
    sender.send_raw(f"<presence id='v1' to='{address(vector['to'])}' type='probe'/>")
    wanted = vectors.expected(vector, profile)
    answers = [await sender.next_presence() for _ in recipients if wanted == "reply"] or [await sender.next_presence()]

    if wanted == "reply":
        assert [(got.type, got.sender) for got in answers] == [
            ("available", f"juliet@localhost/{name}") for name in recipients
        ]
    else:
        assert [(got.type, got.sender) for got in answers] == [(wanted, "juliet@localhost")]
    await together(sender, *recipients.values())
    assert [got for client in (sender, *recipients.values()) for got in client.forget() if got.name == "presence"] == []


async def test_requests_of_strangers_do_not_reach_clients_when_presence_is_needed(private_server):
    [vector] = [vector for vector in vectors.load("iqs") if "strict_no_presence" in vector]
    sender, recipients = await populate(private_server, vector)
    request = f"<iq id='v1' type='get' to='{address(vector['to'])}'><query xmlns='urn:example:any'/></iq>"

    sender.send_raw(request)
    assert await happened(private_server, sender, recipients, "v1") == vector["strict_no_presence"]

    recipients["a"].send_presence(sender.jid)  # directed presence is a right to ask
    await recipients["a"].sync()
    sender.send_raw(request.replace("v1", "v2"))
    await together(sender, recipients["a"])
    sender.forget(lambda got: got.name == "presence")
    assert await happened(private_server, sender, recipients, "v2") == ["a"]
