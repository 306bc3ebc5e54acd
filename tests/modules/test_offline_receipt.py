"""offline_receipt: who is answered by the server and when, what became of messages, and what web servers are told."""

import asyncio
import json
from dataclasses import replace
from typing import Any
from urllib.parse import parse_qsl

import pytest
from lxml import etree

from modules.offline_receipt import states
from tests.databases import opened
from tests.harness.sink import WebSink
from tests.modules.world import HOST, Client, World, condition, message
from xmppd.c2s.managed import Managed
from xmppd.c2s.spooling import Spooling
from xmppd.errors import CommandError, ConfigError
from xmppd.events import MessagesTakenOver
from xmppd.protocol.jid import parse
from xmppd.protocol.stanza import Stanza
from xmppd.spool import Holder

JULIET, ROMEO = f"juliet@{HOST}", f"romeo@{HOST}"
RECEIPTS = "urn:xmpp:receipts"
DELIVERY = "urn:xmppd:delivery:0"
DISCO_ITEMS = "<query xmlns='http://jabber.org/protocol/disco#items' node='http://jabber.org/protocol/offline'/>"
REQUEST = f"<request xmlns='{RECEIPTS}'/>"


async def ready(world: World, **options: Any) -> Client:
    """Loaded beside offline; romeo is online and juliet has an account."""
    await world.load(offline={}, offline_receipt=options)
    await world.account("romeo", "juliet")
    return await world.online("romeo", "orchard")


def receipts(client: Client) -> list[Stanza]:
    """What the server (or somebody) has answered, oldest first."""
    return [stanza for stanza in client.received if stanza.kind == "message" and stanza.type != "error"]


def received_ids(client: Client) -> list[str]:
    found = (stanza.child(RECEIPTS, "received") for stanza in receipts(client))
    return [element.get("id") for element in found if element is not None]


async def state(world: World, id: str = "m1", to: str = JULIET, from_: str = ROMEO) -> str:
    return (await world.command("message_state", from_, to, id))[0]


def ask(id: str | None = "m1", body: str | None = "O, speak again", inner: str = REQUEST, **more: Any) -> str:
    return message(JULIET, body, id, inner, **more)


async def test_or_01_a_stored_message_is_answered_after_its_commit(any_world):
    """OR-01"""
    world = any_world
    romeo = await ready(world)

    outcome = await romeo.send(ask())
    assert not receipts(romeo)  # the row is not committed yet
    await world.stored(outcome)

    (receipt,) = await world.found(lambda: receipts(romeo))
    assert received_ids(romeo) == ["m1"]
    assert (receipt.from_.full, receipt.to.full, receipt.type) == (JULIET, f"{ROMEO}/orchard", "chat")
    assert {child.tag for child in receipt.children} == {
        f"{{{RECEIPTS}}}received",
        "{urn:xmpp:hints}no-store",
        "{urn:xmpp:hints}no-copy",
    }
    assert len(await world.rows()) == 1
    assert await state(world) == "stored-offline"


@pytest.fixture
async def remote(mariadb_server, databases, tmp_path):
    """A world on a MariaDB that may be stopped."""
    url = await databases.migrated("mariadb", tmp_path)
    async with opened(url, tmp_path) as storage, World(storage) as world:
        yield world
    databases.drop(url)


@pytest.mark.mariadb
async def test_or_02_there_is_no_receipt_before_the_database_is_back(remote, mariadb_server):
    """OR-02: the message waits, and the receipt follows."""
    romeo = await ready(remote)
    await remote.stored(await romeo.send(ask("m0", "known to exist")))
    romeo.received.clear()
    await asyncio.to_thread(mariadb_server.stop)

    outcome = await romeo.send(ask())
    await remote.until(lambda: remote.storage.batcher.away)
    assert receipts(romeo) == []
    await asyncio.to_thread(mariadb_server.start)

    await remote.stored(outcome)
    assert received_ids(romeo) == ["m1"]
    assert len(await remote.rows()) == 2
    assert await state(remote) == "stored-offline"


@pytest.mark.mariadb
async def test_or_02_what_cannot_wait_any_longer_is_refused_for_now(remote, mariadb_server):
    """OR-02: no receipt, and an error of type `wait`."""
    romeo = await ready(remote)
    await remote.stored(await romeo.send(ask("m0", "known to exist")))
    romeo.received.clear()
    remote.storage.batcher._deadline = 0.3
    await asyncio.to_thread(mariadb_server.stop)

    await remote.settled(await romeo.send(ask()))

    (error,) = [stanza for stanza in romeo.received if stanza.type == "error"]
    assert error.element.find("{jabber:client}error").get("type") == "wait"
    assert receipts(romeo) == []
    remote.storage.batcher._deadline = 30.0
    await asyncio.to_thread(mariadb_server.start)

    async def known() -> bool:
        return await state(remote) == "bounced"

    await remote.until_true(known)  # what was noted meanwhile is written now
    assert len(await remote.rows()) == 1


async def test_or_03_who_is_there_answers_for_themselves(world):
    """OR-03"""
    romeo = await ready(world)
    juliet = await world.online("juliet")

    await romeo.send(ask())
    assert juliet.bodies == ["O, speak again"]
    await juliet.send(message(f"{ROMEO}/orchard", None, "r1", f"<received xmlns='{RECEIPTS}' id='m1'/>"))

    assert received_ids(romeo) == ["m1"]
    assert receipts(romeo)[0].from_.full == f"{JULIET}/balcony"
    assert await state(world) == "delivered"


async def test_or_04_a_negative_priority_is_absence(world):
    """OR-04"""
    romeo = await ready(world)
    juliet = await world.online("juliet", priority=-1)

    await world.stored(await romeo.send(ask()))

    await world.until(lambda: received_ids(romeo) == ["m1"])
    assert juliet.bodies == []


def manage(world: World, client: Client, seconds: float) -> None:
    """Stream management: the session waits so long for a stream that is lost."""
    spooling = Spooling(world.spool, world.hooks, world.owner, reroute=world.manager.reroute)
    client.session.parts = replace(client.session.parts, spooling=spooling)
    client.session.managed = Managed(client.session)
    client.session.managed.max = seconds


async def held(world: World, name: str = "juliet") -> list[bool]:
    return [holder is not None for holder, _ in await world.rows(name)]


async def stored_for_the_session(world: World, count: int = 1) -> None:
    async def there() -> bool:
        return await held(world) == [True] * count

    await world.until_true(there)


async def test_or_05_a_stream_that_may_be_resumed_is_waited_for(any_world):
    """OR-05"""
    world = any_world
    romeo = await ready(world)
    juliet = await world.online("juliet")
    manage(world, juliet, 300)
    juliet.session.lost(clean=False, resumable=True)

    await world.stored(await romeo.send(ask()))  # safe, as it is in the database
    await stored_for_the_session(world)
    await world.loader._loaded["offline_receipt"].instance._states.flush()
    assert receipts(romeo) == []
    assert await state(world) == "accepted"
    juliet.session.close(clean=False)  # its time is over

    await world.until(lambda: receipts(romeo))
    assert received_ids(romeo) == ["m1"]
    assert await held(world) == [False]
    assert await state(world) == "stored-offline"
    await world.command("get_offline_count", "juliet", HOST)


async def test_what_a_session_leaves_to_another_one_is_not_answered_by_the_server(world):
    romeo = await ready(world)
    juliet = await world.online("juliet", "balcony", 5)
    manage(world, juliet, 300)
    await romeo.send(ask())  # written, and never acknowledged
    await stored_for_the_session(world)
    chamber = await world.online("juliet", "chamber")

    juliet.session.close(clean=False)

    await world.until(lambda: chamber.bodies)
    await world.until_true(lambda: is_empty(world))
    assert receipts(romeo) == []


async def is_empty(world: World) -> bool:
    world.sweep()
    return not await world.rows()


async def test_what_a_dead_node_held_is_answered_by_who_takes_it_over(any_world):
    world = any_world
    romeo = await ready(world)
    dead = Holder(b"d" * 16, 1, "s")
    stanza = Stanza.from_bytes(ask().replace("<message ", f"<message from='{ROMEO}/orchard' ").encode())
    await world.spool.keep(HOST, "juliet", ROMEO, stanza.xml, dedup=None, quota=None, holder=dead)

    await world.spool.free_stale(b"d" * 16, 2)
    await world.tell(MessagesTakenOver(1))

    await world.until(lambda: receipts(romeo))
    assert received_ids(romeo) == ["m1"]
    assert await state(world) == "stored-offline"


NOT_ANSWERED = {
    "one blank": ask(" "),
    "no id": ask(None),
    "error": ask(inner=REQUEST + "<error type='cancel'><gone xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/></error>",
                 type="error"),
    "no-store": ask(inner=REQUEST + "<no-store xmlns='urn:xmpp:hints'/>"),
    "store and no-permanent-store": ask(
        inner=REQUEST + "<store xmlns='urn:xmpp:hints'/><no-permanent-store xmlns='urn:xmpp:hints'/>"
    ),
    "no request": ask(inner=""),
    "a receipt itself": ask(inner=REQUEST + f"<received xmlns='{RECEIPTS}' id='x'/>"),
    "request of another namespace": ask(inner="<request xmlns='urn:other'/><x xmlns='urn:xmpp:receipts'/>"),
    "carbon": ask(inner=REQUEST + "<received xmlns='urn:xmpp:carbons:2'/>"),
    "forwarded copy": ask(inner=REQUEST + "<forwarded xmlns='urn:xmpp:forward:0'/>"),
    "replay": ask(inner=REQUEST + f"<delay xmlns='urn:xmpp:delay' from='{HOST}'>Offline Storage</delay>"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NOT_ANSWERED)
async def test_or_06_what_is_not_answered(world, kind):
    """OR-06"""
    romeo = await ready(world, style=["received", "marked", "p1", "xep0022"])

    outcome = await romeo.send(NOT_ANSWERED[kind].replace(f"to='{JULIET}'", f"to='{JULIET}/x'", 1))
    await world.settled(outcome)
    await world.stored(await romeo.send(ask("last")))  # which comes behind

    await world.until(lambda: "last" in received_ids(romeo))
    assert set(received_ids(romeo)) == {"last"}
    assert len(receipts(romeo)) == 4


async def test_or_07_a_message_that_is_sent_again_is_answered_again(any_world):
    """OR-07"""
    world = any_world
    async with WebSink() as sink:
        await world.outbox.start()
        romeo = await ready(world, http={"url": sink.url})

        for _ in range(3):
            await world.stored(await romeo.send(ask()))

        await world.until(lambda: len(receipts(romeo)) == 3)
        assert received_ids(romeo) == ["m1"] * 3
        assert len(await world.rows()) == 1
        await world.stored(await romeo.send(ask("m2", "another")))
        posts = await sink.wait(2)
        assert [json.loads(post.body)["stanza_id"] for post in posts] == ["m1", "m2"]


async def test_or_11_what_was_stored_is_delivered_when_its_client_has_it(any_world):
    """OR-11"""
    world = any_world
    romeo = await ready(world)
    await world.stored(await romeo.send(ask()))
    await world.until(lambda: receipts(romeo))
    romeo.received.clear()

    juliet = world.login("juliet")
    manage(world, juliet, 300)
    await juliet.available()
    await world.until(lambda: juliet.bodies)
    assert await state(world) == "sent"
    juliet.session.managed.acknowledged(len(juliet.session.managed.outbound))
    assert await state(world) == "delivered"
    await juliet.send(message(f"{ROMEO}/orchard", None, "r1", f"<received xmlns='{RECEIPTS}' id='m1'/>"))

    assert received_ids(romeo) == ["m1"]
    assert receipts(romeo)[0].from_.full == f"{JULIET}/balcony"
    times = await world.command("message_state", ROMEO, JULIET, "m1")
    assert times[0] == "delivered"
    assert all(times[3:8])  # accepted, stored, sent, acknowledged, received
    await juliet.send(message(ROMEO, None, "r2", "<displayed xmlns='urn:xmpp:chat-markers:0' id='m1'/>"))
    assert await state(world) == "displayed"


async def test_or_12_a_refused_message_is_bounced(any_world):
    """OR-12"""
    world = any_world
    await world.load(offline={"max_messages": 1}, offline_receipt={})
    await world.account("romeo", "juliet")
    romeo = await world.online("romeo", "orchard")
    await world.stored(await romeo.send(ask("first")))

    await world.settled(await romeo.send(ask("m1")))

    (error,) = await world.found(lambda: [stanza for stanza in romeo.received if stanza.type == "error"])
    assert condition(error) == "resource-constraint"
    assert received_ids(romeo) == ["first"]
    assert (await world.command("message_state", ROMEO, JULIET, "m1"))[::2][:2] == ("bounced", "resource-constraint")


# -- how, and to whom


STYLES = {
    "p1": {f"{{{RECEIPTS}}}offline": {"server": HOST, "id": "m1"}},
    "xep0022": {"{jabber:x:event}x": {}},
    "received": {f"{{{RECEIPTS}}}received": {"id": "m1"}},
    "marked": {f"{{{RECEIPTS}}}received": {"id": "m1"}, "{urn:xmppd:delivery:0}state": {"value": "stored-offline"}},
    "none": None,
}


@pytest.mark.parametrize("style", STYLES)
async def test_each_style_has_its_own_words(world, style):
    romeo = await ready(world, style=style)

    await world.stored(await romeo.send(ask()))
    await world.stored(await romeo.send(ask("m2")))

    expected = STYLES[style]
    if expected is None:
        assert receipts(romeo) == []
        return
    first = receipts(romeo)[0]
    found = {child.tag: dict(child.attrib) for child in first.children if "hints" not in child.tag}
    if style == "marked":
        assert found["{urn:xmppd:delivery:0}state"].pop("stamp").endswith("Z")
    if style == "xep0022":
        assert b"<offline/><id>m1</id>" in first.xml
    assert found == expected


async def test_old_clients_are_answered_in_their_words_alone(world):
    romeo = await ready(world, style=["xep0022", "received"])
    event = "<x xmlns='jabber:x:event'><offline/><delivered/></x>"

    await world.stored(await romeo.send(ask("m1", inner=event)))
    await world.stored(await romeo.send(ask("m2", inner=event.replace("<offline/>", ""))))
    await world.stored(await romeo.send(ask("m3", inner=event.replace("</x>", "<id>m0</id></x>"))))

    (receipt,) = receipts(romeo)
    assert b'<x xmlns="jabber:x:event"><offline/><id>m1</id></x>' in receipt.xml


@pytest.mark.parametrize(
    ("from_", "to", "sender"),
    [
        ("bare", f"{JULIET}/balcony", JULIET),
        ("full", f"{JULIET}/balcony", f"{JULIET}/balcony"),
        ("full", JULIET, JULIET),
        ("prefix:ack.", f"{JULIET}/balcony", f"juliet@ack.{HOST}/balcony"),
    ],
)
async def test_a_receipt_comes_from_where_it_is_asked_to(world, from_, to, sender):
    romeo = await ready(world, **{"from": from_})

    await world.stored(await romeo.send(ask().replace(JULIET, to)))

    assert [receipt.from_.full for receipt in receipts(romeo)] == [sender]


@pytest.mark.parametrize(
    "options", [{"from": "prefix:"}, {"from": "sideways"}, {"from": "prefix:no such host "}, {"style": ["none", "p1"]}]
)
async def test_options_that_cannot_be_are_named(world, options):
    with pytest.raises(ConfigError, match="offline_receipt"):
        await world.load(offline={}, offline_receipt=options)


async def test_only_types_that_are_listed_are_answered(world):
    romeo = await ready(world, types="normal")

    await world.stored(await romeo.send(ask("m1")))
    await world.stored(await romeo.send(ask("m2", type="normal")))

    assert received_ids(romeo) == ["m2"]
    assert receipts(romeo)[0].type == "normal"


async def test_strangers_are_not_told_who_is_absent_where_that_is_said(world):
    romeo = await ready(world, who="presence_subscribed")
    await world.account("nurse")
    nurse = await world.online("nurse")
    world.rosters.let_see(JULIET, f"nurse@{HOST}")

    await world.stored(await romeo.send(ask()))
    await world.stored(await nurse.send(ask()))

    await world.until(lambda: receipts(nurse))
    assert receipts(romeo) == []
    assert (await state(world), await state(world, from_=f"nurse@{HOST}")) == ("stored-offline", "stored-offline")


async def test_whoever_asks_is_told_that_the_server_has_a_message(world):
    romeo = await ready(world, when=["accepted"], style=["p1", "marked"])
    juliet = await world.online("juliet")

    outcome = await romeo.send(ask())
    assert receipts(romeo) == []
    world.sweep()  # her machine has it

    await world.stored(outcome)
    p1, marked = receipts(romeo)
    assert p1.child(RECEIPTS, "on-sender-server").get("id") == "m1"
    assert marked.child("urn:xmppd:delivery:0", "state").get("value") == "accepted"
    assert juliet.bodies == ["O, speak again"]


async def test_a_bounced_message_is_answered_where_that_is_asked_for(world):
    await world.load(offline={"max_messages": 0}, offline_receipt={"when": ["stored", "bounced"], "style": "marked"})
    await world.account("romeo", "juliet")
    romeo = await world.online("romeo", "orchard")

    await world.settled(await romeo.send(ask()))

    (receipt,) = await world.found(lambda: receipts(romeo))
    marked = receipt.child("urn:xmppd:delivery:0", "state")
    assert (marked.get("value"), marked.get("reason")) == ("bounced", "resource-constraint")
    assert sum(stanza.type == "error" for stanza in romeo.received) == 1


async def test_a_receipt_for_somebody_who_has_gone_goes_nowhere(world, monkeypatch):
    monkeypatch.setattr("modules.offline_receipt._NOT_SEEN", (0.001, 0.001))
    romeo = await ready(world)
    other = await world.online("romeo", "elsewhere")

    outcome = await romeo.send(ask())
    romeo.lose()
    await world.stored(outcome)
    await world.until(lambda: not any(task.get_name() == "receipt" for task in world.tasks))

    assert receipts(other) == []
    assert await world.rows("romeo") == []


async def test_a_receipt_is_never_stored(world):
    """It was on its way when its session ended."""
    await ready(world, style=["received", "p1", "xep0022", "marked"])
    nurse = await world.online("juliet")
    for inner in (
        f"<offline xmlns='{RECEIPTS}' server='{HOST}' id='m1'/>",
        "<x xmlns='jabber:x:event'><offline/><id>m1</id></x>",
        f"<received xmlns='{RECEIPTS}' id='m1'/><state xmlns='urn:xmppd:delivery:0' value='stored-offline'/>",
    ):
        hints = "<no-store xmlns='urn:xmpp:hints'/><no-copy xmlns='urn:xmpp:hints'/>"
        await world.account(f"gone{len(inner)}")
        await world.settled(await nurse.send(message(f"gone{len(inner)}@{HOST}/x", None, "r", inner + hints)))
        assert await world.rows(f"gone{len(inner)}") == []
    assert [stanza.type for stanza in nurse.received if stanza.kind == "message"] == []


# -- states


async def test_users_ask_what_became_of_their_own_messages(any_world):
    world = any_world
    romeo = await ready(world)
    for id in ("m1", "m2"):
        await world.stored(await romeo.send(ask(id)))
    asked = "".join(f"<message to='{JULIET}' id='{id}'/>" for id in ("m2", "unknown", "m1"))

    answer = await romeo.query("get", f"<query xmlns='{DELIVERY}'>{asked}</query>")

    assert [(item.get("id"), item.get("to"), item.get("state")) for item in answer] == [
        ("m2", JULIET, "stored-offline"),
        ("m1", JULIET, "stored-offline"),
    ]
    assert [etree.QName(time).localname for time in answer[0]] == ["accepted", "stored-offline"]
    everything = await romeo.query("get", f"<query xmlns='{DELIVERY}' since='2020-01-01T00:00:00Z'/>")
    assert sorted(item.get("id") for item in everything) == ["m1", "m2"]
    later = await romeo.query("get", f"<query xmlns='{DELIVERY}' since='2199-01-01T00:00:00Z'/>")
    assert len(later) == 0


async def test_many_messages_are_told_page_by_page(any_world, monkeypatch):
    monkeypatch.setattr("modules.offline_receipt.AT_ONCE", 4)
    world = any_world
    romeo = await ready(world)
    kept = world.loader._loaded["offline_receipt"].instance._states
    times = [1000.0, 1000.5, 1000.5, 1001.0, 1001.0, 1001.0, 1001.0, 1001.0, 1001.0, 1002.0]
    for number, at in enumerate(times):
        kept.note(states.key_of(parse(ROMEO), parse(JULIET), f"m{number}"), accepted_at=at)

    since, pages = "1970-01-01T00:00:00Z", []
    while since:
        answer = await romeo.query("get", f"<query xmlns='{DELIVERY}' since='{since}'/>")
        pages.append(sorted(item.get("id") for item in answer))
        since = answer.get("next")

    assert pages == [["m0", "m1", "m2"], [f"m{number}" for number in range(3, 9)], ["m9"]]


@pytest.mark.parametrize(
    ("inner", "to", "refusal"),
    [
        (f"<query xmlns='{DELIVERY}' since='2020-01-01T00:00:00Z'/>", JULIET, "forbidden"),
        (f"<query xmlns='{DELIVERY}'/>", None, "bad-request"),
        (f"<query xmlns='{DELIVERY}' since='yesterday'/>", None, "bad-request"),
        (f"<query xmlns='{DELIVERY}' since='2020-01-01T00:00:00'/>", None, "bad-request"),
        (f"<query xmlns='{DELIVERY}'><message to='{JULIET}' id=' '/></query>", None, "bad-request"),
        (f"<query xmlns='{DELIVERY}'><message to='@' id='a'/></query>", None, "jid-malformed"),
        (
            f"<query xmlns='{DELIVERY}'>" + f"<message to='{JULIET}' id='a'/>" * 101 + "</query>",
            None,
            "policy-violation",
        ),
    ],
)
async def test_questions_that_are_refused(world, inner, to, refusal):
    romeo = await ready(world)

    assert await romeo.refusal("get", inner, to) == refusal


async def test_a_message_without_a_request_is_followed_from_its_storing_on(world):
    romeo = await ready(world)
    await world.stored(await romeo.send(ask("m1", inner="")))
    assert await state(world) == "stored-offline"
    juliet = await world.online("juliet")
    assert await state(world) == "sent"

    await romeo.send(ask("m2", inner=""))  # she is there

    assert len(juliet.bodies) == 2
    with pytest.raises(CommandError, match="nothing is known"):
        await state(world, "m2")


async def test_what_comes_back_from_a_dead_connection_is_stored_again_and_not_answered_again(world):
    romeo = await ready(world)
    await world.stored(await romeo.send(ask()))
    juliet = await world.online("juliet")
    assert await state(world) == "sent"
    juliet.stalled = True
    juliet.lose()

    async def free_again() -> bool:
        return await held(world) == [False]

    await world.until_true(free_again)
    assert received_ids(romeo) == ["m1"]


async def test_a_message_that_expires_is_so(world):
    romeo = await ready(world)
    await world.stored(await romeo.send(ask(inner=REQUEST + "<x xmlns='jabber:x:expire' seconds='60'/>")))
    assert await state(world) == "stored-offline"

    world.advanced = 61.0

    assert await state(world) == "expired"


async def test_what_its_recipient_removes_is_removed(any_world):
    world = any_world
    romeo = await ready(world)
    await world.load(disco={})
    for id in ("m1", "m2", "m3"):
        await world.stored(await romeo.send(ask(id)))
    juliet = world.login("juliet")
    items = (await juliet.query("get", DISCO_ITEMS)).findall("{*}item")
    space = "http://jabber.org/protocol/offline"

    first = f"<offline xmlns='{space}'><item action='remove' node='{items[0].get('node')}'/></offline>"
    await juliet.ask("set", first)
    assert [await state(world, id) for id in ("m1", "m2", "m3")] == ["removed", "stored-offline", "stored-offline"]
    await juliet.ask("set", f"<offline xmlns='{space}'><purge/></offline>")

    assert [await state(world, id) for id in ("m1", "m2", "m3")] == ["removed"] * 3


async def test_the_messages_of_a_removed_account_are_forgotten(any_world):
    world = any_world
    romeo = await ready(world)
    await world.stored(await romeo.send(ask()))

    await world.accountant.remove(HOST, "romeo")

    with pytest.raises(CommandError, match="nothing is known"):
        await state(world)


async def test_old_states_are_deleted_a_few_at_a_time(any_world):
    world = any_world
    romeo = await ready(world)
    for number in range(3):
        await world.stored(await romeo.send(ask(f"m{number}")))
    kept = world.loader._loaded["offline_receipt"].instance._states
    await kept.flush()

    assert await kept.delete_older(world.clock() - 60, 2) == 0
    assert [await kept.delete_older(world.clock() + 60, 2) for _ in range(3)] == [2, 1, 0]


async def test_a_chat_between_people_who_are_there_costs_hardly_a_write(world):
    romeo = await ready(world)
    juliet = await world.online("juliet")
    kept = world.loader._loaded["offline_receipt"].instance._states
    await kept.flush()
    commits = world.storage.batcher.commit_seconds
    before = sum(commits.counts)

    for number in range(200):
        await romeo.send(ask(f"plain{number}", inner=""))
    await kept.flush()
    assert sum(commits.counts) == before  # nobody wants to know
    for number in range(200):
        await romeo.send(ask(f"m{number}"))
        await juliet.send(message(ROMEO, None, f"r{number}", f"<received xmlns='{RECEIPTS}' id='m{number}'/>"))
    await kept.flush()

    assert sum(commits.counts) - before <= 10  # a few a second
    assert {await state(world, f"m{number}") for number in (0, 100, 199)} == {"delivered"}


async def test_nothing_is_written_where_states_are_not_kept(world):
    romeo = await ready(world, track=False)

    await world.stored(await romeo.send(ask()))

    assert received_ids(romeo) == ["m1"]
    with pytest.raises(CommandError, match="track is false"):
        await state(world)
    assert await romeo.refusal("get", f"<query xmlns='{DELIVERY}' since='2020-01-01T00:00:00Z'/>") == (
        "feature-not-implemented"
    )


async def test_an_endless_id_is_not_kept_track_of_and_answered_all_the_same(any_world):
    world = any_world
    romeo = await ready(world)
    id = "ö" * 600

    await world.stored(await romeo.send(ask(id)))

    assert received_ids(romeo) == [id]


async def test_states_wait_for_a_database_that_is_away_and_are_bounded(world, monkeypatch, caplog):
    monkeypatch.setattr(states, "ROOM", 2)
    await ready(world)
    kept = world.loader._loaded["offline_receipt"].instance._states
    keys = [states.key_of(parse(ROMEO), parse(JULIET), f"m{number}") for number in range(4)]

    for key in keys:
        kept.note(key, accepted_at=1.0)

    assert kept.lost == 2
    assert "delivery states lost" in caplog.text
    await kept.flush()
    assert {found.id for found in await kept.find(keys)} == {"m0", "m1"}


async def test_a_change_that_comes_late_or_twice_makes_no_difference(any_world):
    world = any_world
    await ready(world)
    kept = world.loader._loaded["offline_receipt"].instance._states
    key = states.key_of(parse(ROMEO), parse(JULIET), "m1")
    for times in ({"sent_at": 20.0}, {"stored_at": 10.0}, {"sent_at": 15.0}, {"accepted_at": 9.0}, {"stored_at": 10.0}):
        kept.note(key, **times)
        await kept.flush()

    (found,) = await kept.find([key])

    assert (found.state, found.at) == ("sent", 20.0)
    assert found.times == {"accepted_at": 9.0, "stored_at": 10.0, "sent_at": 20.0}


async def test_a_url_that_is_none_stops_the_hook_alone(world, caplog):
    romeo = await ready(world, http={"url": "loaclhost"})

    await world.stored(await romeo.send(ask()))

    assert received_ids(romeo) == ["m1"]
    assert "option=modules.offline_receipt.http.url" in caplog.text


# -- for web servers


@pytest.mark.parametrize("profile", ["json", "codepond", "rbt"])
async def test_or_10_a_web_server_gets_what_it_knows(world, profile):
    """OR-10"""
    async with WebSink() as sink:
        await world.outbox.start()
        hook = {"url": sink.url, "token": "t0ken", "headers": [["X-Site", "verona"]]}
        romeo = await ready(world, http=hook, http_profile=profile)

        await world.stored(await romeo.send(ask("m1", "a=1 & b=2").replace("& b", "&amp; b")))

        (post,) = await sink.wait(1)
        assert post["X-Site"] == "verona"
        assert post["Authorization"] == ("Bearer t0ken" if profile == "json" else "t0ken")
        if profile == "json":
            assert json.loads(post.body)["body"] == {"": "a=1 & b=2"}
            return
        assert post["Content-Type"] == "application/x-www-form-urlencoded"
        said = dict(parse_qsl(post.body.decode()))
        assert (said["from"], said["to"], said["body"]) == ("romeo", "juliet", "a=1 & b=2")
        assert said["messageId" if profile == "codepond" else "message_id"] == "m1"


async def test_a_web_server_hears_only_of_what_is_stored(world):
    async with WebSink() as sink:
        await world.outbox.start()
        await world.load(offline={"max_messages": 1}, offline_receipt={"http": {"url": sink.url}})
        await world.account("romeo", "juliet")
        romeo = await world.online("romeo", "orchard")
        await world.online("romeo", "elsewhere")

        await romeo.send(message(f"{ROMEO}/elsewhere", "to somebody who is there", "m0", REQUEST))
        await world.settled(await romeo.send(ask("m1", None, "<subject>no text</subject>")))
        await world.settled(await romeo.send(ask("m2")))  # past the quota
        await (await world.online("juliet")).send("<presence type='unavailable'/>")
        await world.until_true(lambda: is_empty(world))
        await world.stored(await romeo.send(ask("m3", inner="")))

        (post,) = await sink.wait(1)
        assert json.loads(post.body)["stanza_id"] == "m3"


async def test_what_a_session_leaves_is_told_to_a_web_server_once(world):
    async with WebSink() as sink:
        await world.outbox.start()
        romeo = await ready(world, http={"url": sink.url})
        juliet = await world.online("juliet")
        manage(world, juliet, 300)
        await romeo.send(ask())
        await stored_for_the_session(world)
        assert sink.posts == []

        juliet.session.close(clean=False)
        await sink.wait(1)
        await world.stored(await romeo.send(ask()))  # once more
        await world.stored(await romeo.send(ask("m2")))

        posts = await sink.wait(2)
        assert [json.loads(post.body)["stanza_id"] for post in posts] == ["m1", "m2"]
