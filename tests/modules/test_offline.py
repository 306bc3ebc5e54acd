"""Offline messages: kept once, delivered once, in order, whatever happens to the connection meanwhile."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import yaml

from modules import offline
from tests.modules.world import HOST, World, condition, message
from xmppd.delivery import ERROR
from xmppd.errors import CommandError, StorageUnavailable
from xmppd.protocol.jid import parse
from xmppd.protocol.stanza import Stanza
from xmppd.spool import Alone, Holder
from xmppd.storage import new_id

JULIET = f"juliet@{HOST}"
VECTORS = yaml.safe_load((Path(__file__).parents[1] / "vectors" / "offline.yaml").read_text())["offline_vectors"]
CHATSTATE = "<composing xmlns='http://jabber.org/protocol/chatstates'/>"
RECEIPT = "<received xmlns='urn:xmpp:receipts' id='m0'/>"


async def prepare(world: World, **options: Any) -> Any:
    await world.load(offline=options)
    await world.account("romeo", "juliet")
    return await world.online("romeo")


def of_vector(vector: dict[str, Any], number: int) -> str:
    inner = ""
    if vector.get("only") == "chatstate":
        inner += CHATSTATE
    if vector.get("other"):
        inner += "<x xmlns='urn:example:other'/>"
    if "expire" in vector:
        inner += f"<x xmlns='jabber:x:expire' seconds='{vector['expire']}'/>"
    inner += "".join(f"<{hint} xmlns='urn:xmpp:hints'/>" for hint in vector.get("hints", ()))
    return message(JULIET, f"line {number}" if vector["body"] else None, f"m{number}", inner)


@pytest.mark.parametrize("vector", [v for v in VECTORS if "due" not in v], ids=lambda v: v["id"])
async def test_offline_vector(any_world, vector):
    world = any_world
    romeo = await prepare(world, max_messages=3)
    if vector.get("blocked"):
        await world.loader.load("blocking")
        await world.until(lambda: not romeo.session.guards)  # that romeo blocks nobody is known
        juliet = world.login("juliet")
        await juliet.ask("set", f"<block xmlns='urn:xmpp:blocking'><item jid='romeo@{HOST}'/></block>")
        juliet.lose()
    if vector.get("quota") == "full":
        for number in range(3):
            await world.stored(await romeo.send(message(JULIET, "filler", f"f{number}")))
    count = vector.get("count", 1)
    expected = vector.get("ours", vector["compat"])

    outcomes = [await world.settled(await romeo.send(of_vector(vector, number))) for number in range(count)]

    errors = [condition(stanza) for stanza in romeo.received if stanza.type == "error"]
    kept = await world.spool.count(HOST, "juliet")
    if expected == "stored":
        assert (errors, kept) == ([], count)
    elif expected == "S":
        assert (errors, kept) == ([], 0)
    else:
        assert outcomes == [ERROR]
        assert errors == [expected.removeprefix("E:")]
        assert kept == (3 if vector.get("quota") == "full" else 0)

    world.advanced += vector.get("after", 0)
    juliet = world.login("juliet")
    for priority in vector.get("login_priority", [0]):
        await juliet.available(priority)
    flushed = [stanza for stanza in juliet.received if stanza.kind == "message"]
    if "flushed" in vector:
        assert [stanza.id for stanza in flushed] == [f"m{number}" for number in range(vector["flushed"])]
        for stanza in flushed:
            delay = stanza.child("urn:xmpp:delay", "delay")
            assert delay is not None
            assert (delay.get("from"), delay.text) == (HOST, "Offline Storage")


async def test_a_row_stays_until_its_message_is_known_to_have_arrived(any_world):
    world = any_world
    romeo = await prepare(world)
    await world.stored(await romeo.send(message(JULIET)))

    juliet = await world.online("juliet")

    assert juliet.bodies == ["O, speak again"]
    assert len(await world.rows()) == 1
    assert await world.command("get_offline_count", "juliet", HOST) == 0  # it is on its way
    world.sweep()
    await world.until_true(lambda: no_rows(world))


async def no_rows(world: World) -> bool:
    return not await world.rows()


async def free_rows(world: World, count: int) -> bool:
    return [holder for holder, _ in await world.rows()] == [None] * count


async def test_what_a_dying_connection_lost_waits_for_the_next_login_in_order(any_world):
    world = any_world
    romeo = await prepare(world)
    for number in range(5):
        await world.stored(await romeo.send(message(JULIET, f"line {number}", f"m{number}")))
    world.advanced += 3600  # long after repetitions are no longer looked for
    phone = world.login("juliet", "phone")
    phone.stalled = True
    await phone.available()
    assert len(phone.bodies) == 5

    phone.lose()
    await world.until_true(lambda: free_rows(world, 5))
    laptop = await world.online("juliet", "laptop")

    assert laptop.bodies == [f"line {number}" for number in range(5)]
    assert all(len(list(stanza.element.iterfind("{urn:xmpp:delay}delay"))) == 1 for stanza in laptop.received)
    world.sweep()
    await world.until_true(lambda: no_rows(world))


async def test_what_a_dying_connection_lost_goes_to_another_available_one(any_world):
    world = any_world
    romeo = await prepare(world)
    await world.stored(await romeo.send(message(JULIET)))
    phone = world.login("juliet", "phone")
    phone.stalled = True
    await phone.available()
    laptop = await world.online("juliet", "laptop")
    assert laptop.bodies == []

    phone.lose()

    assert laptop.bodies == ["O, speak again"]
    assert len(await world.rows()) == 1
    world.sweep()
    await world.until_true(lambda: no_rows(world))


async def test_messages_without_an_id_are_not_taken_for_repetitions(world):
    romeo = await prepare(world)

    for _ in range(2):
        await world.stored(await romeo.send(message(JULIET, id=None)))

    assert len(await world.rows()) == 2


async def test_a_repetition_is_stored_once(any_world):
    world = any_world
    romeo = await prepare(world)

    for _ in range(2):
        await world.stored(await romeo.send(message(JULIET, id="m1")))
    await world.stored(await romeo.send(message(JULIET, "another text", id="m1")))

    assert len(await world.rows()) == 2


async def test_a_repetition_is_known_by_its_origin_id(world):
    romeo = await prepare(world)
    origin = "<origin-id xmlns='urn:xmpp:sid:0' id='o1'/>"

    for id in ("m1", "m2"):
        await world.stored(await romeo.send(message(JULIET, id=id, inner=origin)))

    assert len(await world.rows()) == 1


async def test_a_forged_stamp_does_not_hide_the_true_one(world):
    romeo = await prepare(world)
    forged = f"<delay xmlns='urn:xmpp:delay' from='{HOST}' stamp='1999-01-01T00:00:00Z'>Offline Storage</delay>"

    await world.stored(await romeo.send(message(JULIET, inner=forged)))
    juliet = await world.online("juliet")

    stamps = [delay.get("stamp") for delay in juliet.received[0].element.iterfind("{urn:xmpp:delay}delay")]
    assert stamps[-1] > "2020"


async def test_an_acknowledgement_of_receipt_is_kept_but_never_bounced(world):
    romeo = await prepare(world, store_empty_body=False)

    await world.stored(await romeo.send(message(JULIET, None, inner=RECEIPT)))

    assert await world.rows() == []
    assert romeo.received == []


@pytest.mark.parametrize(("setting", "inner", "kept"), [
    (True, CHATSTATE, 1), ("unless_chat_state", CHATSTATE, 0), ("unless_chat_state", RECEIPT, 1), (False, RECEIPT, 0),
    ("unless_chat_state", CHATSTATE + "<thread>t</thread><no-copy xmlns='urn:xmpp:hints'/>", 0),
    (True, "<x xmlns='jabber:x:event'><composing/><id>m0</id></x>", 0),
])  # fmt: skip
async def test_store_empty_body(world, setting, inner, kept):
    romeo = await prepare(world, store_empty_body=setting)

    await world.stored(await romeo.send(message(JULIET, None, inner=inner)))

    assert len(await world.rows()) == kept


async def test_a_message_that_is_being_stored_is_not_overtaken_by_a_later_one(any_world):
    """Its recipient logs in before the commit, and another one comes right behind."""
    world = any_world
    romeo = await prepare(world)
    commit, run = asyncio.Event(), world.storage.batcher._run

    async def slow(work: Any, **options: Any) -> Any:
        await commit.wait()
        return await run(work, **options)

    world.storage.batcher._run = slow
    await romeo.send(message(JULIET, "first", "m1"))
    juliet = world.login("juliet")
    coming = asyncio.create_task(juliet.available())
    await world.until(lambda: juliet.session.priority is not None)
    await asyncio.sleep(0.05)  # a login that does not wait has found nothing by now
    second = asyncio.create_task(romeo.send(message(JULIET, "second", "m2")))
    commit.set()
    await coming
    await second

    assert juliet.bodies == ["first", "second"]
    world.sweep()
    await world.until_true(lambda: no_rows(world))


async def test_what_is_stored_after_all_for_somebody_available_is_delivered(any_world):
    """As another node would do it, which has not heard of the login yet."""
    world = any_world
    romeo = await prepare(world)
    await world.stored(await romeo.send(message(JULIET, "one", "m1")))
    await world.stored(await romeo.send(message(JULIET, "two", "m2")))
    juliet = await world.online("juliet")
    offline = world.loader._loaded["offline"].instance

    late = Stanza.from_bytes(
        message(JULIET, "late", "m3").replace("<message", f"<message from='romeo@{HOST}'").encode()
    )
    await offline._store(parse(JULIET), late)

    await world.until(lambda: juliet.bodies == ["one", "two", "late"])


async def test_a_large_backlog_is_delivered_in_pieces_while_others_go_on(world):
    romeo = await prepare(world, max_messages=10_000)
    text = "x" * 300
    for number in range(5000):
        last = await romeo.send(message(JULIET, text, f"m{number}"))
        if number % 500 == 0:
            await world.settled(last)
    await world.settled(last)
    juliet, turns, before = world.login("juliet"), 0, 0

    coming = asyncio.create_task(juliet.available())
    while not coming.done():
        turns += 1
        await asyncio.sleep(0)
        if turns % 20 == 0:
            if before == len(juliet.received):  # it waits for the client
                world.sweep()
            before = len(juliet.received)
    await coming

    assert [stanza.id for stanza in juliet.received] == [f"m{number}" for number in range(5000)]
    assert turns > 50
    world.sweep()
    await world.until_true(lambda: no_rows(world))


async def test_a_session_that_takes_nothing_gives_back_what_it_was_not_sent(world):
    romeo = await prepare(world, max_messages=10_000)
    text = "x" * 10_000
    for number in range(150):
        last = await romeo.send(message(JULIET, text, f"m{number}"))
    await world.settled(last)
    phone = world.login("juliet", "phone")
    phone.stalled = True
    coming = asyncio.create_task(phone.available())
    await world.until(lambda: len(phone.received) > 40)
    await asyncio.sleep(0.05)
    assert len(phone.received) < 70  # the window

    phone.lose()
    await coming
    await world.until_true(lambda: free_rows(world, 150))

    laptop = world.login("juliet", "laptop")
    coming = asyncio.create_task(laptop.available())
    while not coming.done():
        world.sweep()
        await asyncio.sleep(0.001)
    assert [stanza.id for stanza in laptop.received] == [f"m{number}" for number in range(150)]


async def test_a_database_that_is_away_costs_a_try_later_and_no_message(world, monkeypatch):
    romeo = await prepare(world)
    await world.stored(await romeo.send(message(JULIET, "one", "m1")))
    run = world.storage.run

    async def away(*args: Any, **options: Any) -> Any:
        raise StorageUnavailable("the database is away")

    world.storage.run = away
    juliet = await world.online("juliet")  # does not fail, and does not hang
    assert juliet.bodies == []
    world.storage.run = run

    await world.until(lambda: juliet.bodies == ["one"])


async def test_a_full_write_queue_is_a_wait_error_for_the_sender(world, monkeypatch):
    romeo = await prepare(world)

    def full(*args: Any, **options: Any) -> Any:
        raise StorageUnavailable("the write queue is full")

    monkeypatch.setattr(world.storage.batcher, "submit", full)
    assert await world.settled(await romeo.send(message(JULIET))) is ERROR

    assert condition(romeo.received[0]) == "internal-server-error"
    assert romeo.received[0].element.find("{jabber:client}error").get("type") == "wait"


async def test_a_message_that_cannot_be_read_does_not_hold_up_the_others(world):
    romeo = await prepare(world)
    await world.spool.keep(HOST, "juliet", "", b"<message", dedup=None, quota=None)
    await world.stored(await romeo.send(message(JULIET)))

    juliet = await world.online("juliet")

    assert juliet.bodies == ["O, speak again"]
    world.sweep()
    await world.until_true(lambda: no_rows(world))


async def test_messages_pass_through_a_reload_of_the_module(world):
    romeo = await prepare(world)
    await world.stored(await romeo.send(message(JULIET, "one", "m1")))
    before = world.hooks.count()
    juliet = await world.online("juliet")
    await world.loader.reload("offline")
    world.sweep()
    await world.until_true(lambda: no_rows(world))
    juliet.lose()

    await world.stored(await romeo.send(message(JULIET, "two", "m2")))
    again = await world.online("juliet")

    assert again.bodies == ["two"]
    assert world.hooks.count() == before


async def test_get_offline_count_refuses_an_unknown_host(world):
    await prepare(world)

    assert await world.command("get_offline_count", "nobody", HOST) == 0
    with pytest.raises(CommandError, match="Unknown virtual host"):
        await world.command("get_offline_count", "juliet", "verona.example")


# -- looking through them (XEP-0013)

SPACE = "http://jabber.org/protocol/offline"
FETCH, PURGE = f"<offline xmlns='{SPACE}'><fetch/></offline>", f"<offline xmlns='{SPACE}'><purge/></offline>"


def asking(kind: str) -> str:
    return f"<query xmlns='http://jabber.org/protocol/disco#{kind}' node='{SPACE}'/>"


def naming(action: str, *nodes: str) -> str:
    items = "".join(f"<item action='{action}' node='{node}'/>" for node in nodes)
    return f"<offline xmlns='{SPACE}'>{items}</offline>"


async def with_three(world: World) -> Any:
    """Juliet, connected and not available, with three messages."""
    await world.load(offline={}, disco={})
    await world.account("romeo", "juliet")
    romeo = await world.online("romeo")
    for number in range(3):
        await world.stored(await romeo.send(message(JULIET, f"line {number}", f"m{number}")))
    return world.login("juliet")


async def headers(client: Any) -> list[tuple[str, str, str]]:
    query = await client.query("get", asking("items"))
    return [(item.get("jid"), item.get("node"), item.get("name")) for item in query]


async def test_a_client_that_counts_its_messages_is_not_sent_them(any_world):
    world = any_world
    juliet = await with_three(world)

    query = await juliet.query("get", asking("info"))
    await juliet.available()
    phone = await world.online("juliet", "phone")  # nor is another one meanwhile

    assert (query.get("node"), dict(query[0].attrib)) == (SPACE, {"category": "automation", "type": "message-list"})
    fields = {field.get("var"): field[0].text for field in query.iter("{jabber:x:data}field")}
    assert fields == {"FORM_TYPE": SPACE, "number_of_messages": "3"}
    assert juliet.bodies == phone.bodies == []

    juliet.lose()  # what it has left goes to the one that did not ask
    await world.until(lambda: phone.bodies == ["line 0", "line 1", "line 2"])


async def test_messages_are_listed_viewed_and_removed_one_by_one(any_world):
    world = any_world
    juliet = await with_three(world)

    listed = await headers(juliet)
    nodes = [node for _, node, _ in listed]
    await juliet.ask("get", naming("view", nodes[2], nodes[0]))
    shown = [s for s in juliet.received if s.kind == "message"]
    await juliet.ask("set", naming("remove", nodes[0], nodes[1]))

    assert [(jid, name) for jid, _, name in listed] == [(JULIET, f"romeo@{HOST}/balcony")] * 3
    assert nodes == sorted(set(nodes))
    assert [(s.body, s.child(SPACE, "offline")[0].get("node")) for s in shown] == [
        ("line 2", nodes[2]),
        ("line 0", nodes[0]),
    ]
    assert all(s.child("urn:xmpp:delay", "delay") is not None for s in shown)
    assert [node for _, node, _ in await headers(juliet)] == nodes[2:]


async def test_all_messages_are_fetched_and_purged(any_world):
    world = any_world
    juliet = await with_three(world)

    await juliet.ask("get", FETCH)
    assert juliet.bodies == ["line 0", "line 1", "line 2"]
    await juliet.available()
    assert len(juliet.bodies) == 3
    assert len(await headers(juliet)) == 3
    await juliet.ask("set", PURGE)

    assert await headers(juliet) == []
    assert await world.rows() == []


@pytest.mark.parametrize(("type", "action"), [("get", "view"), ("set", "remove")])
@pytest.mark.parametrize("node", ["", "nonsense", "00" * 16])
async def test_of_messages_one_of_which_is_not_there_none_is_touched(any_world, type, action, node):
    world = any_world
    juliet = await with_three(world)
    [(_, first, _), *_] = await headers(juliet)

    assert await juliet.refusal(type, naming(action, first, node)) == "item-not-found"
    assert juliet.bodies == []
    assert await world.spool.count(HOST, "juliet") == 3


@pytest.mark.parametrize(("type", "xml", "expected"), [
    ("get", naming("view"), "bad-request"), ("get", naming("remove", "00" * 16), "bad-request"),
    ("set", naming("view", "00" * 16), "bad-request"),
    ("get", naming("view", *(f"{number:032x}" for number in range(501))), "policy-violation"),
])  # fmt: skip
async def test_requests_that_make_no_sense(world, type, xml, expected):
    juliet = await with_three(world)

    assert await juliet.refusal(type, xml) == expected


async def test_offline_messages_are_shown_to_nobody_else(any_world):
    world = any_world
    await with_three(world)
    world.rosters.let_see(JULIET, f"romeo@{HOST}")
    romeo = await world.online("romeo", "orchard")

    for type, xml in (("get", FETCH), ("set", PURGE), ("get", asking("info")), ("get", asking("items"))):
        assert await romeo.refusal(type, xml, JULIET) == "forbidden"
    assert await world.spool.count(HOST, "juliet") == 3


async def test_one_cannot_remove_the_messages_of_another(any_world):
    world = any_world
    juliet = await with_three(world)
    romeo = await world.online("romeo", "orchard")
    [(_, first, _), *_] = await headers(juliet)

    assert await romeo.refusal("get", naming("view", first)) == "item-not-found"
    assert await romeo.refusal("set", naming("remove", first)) == "item-not-found"
    assert await world.spool.count(HOST, "juliet") == 3


async def test_asking_after_the_messages_have_come_changes_nothing(world):
    juliet = await with_three(world)
    await juliet.available()
    assert len(juliet.bodies) == 3

    await juliet.query("get", asking("info"))

    assert world.loader._loaded["offline"].instance._is_retrieving(parse(JULIET)) is False


async def test_a_shown_message_that_is_lost_is_neither_bounced_nor_delivered_elsewhere(world):
    juliet = await with_three(world)
    [romeo] = [row.session for row in world.table.all() if row.jid.local == "romeo"]
    juliet.stalled = True
    await juliet.ask("get", FETCH)
    phone = await world.online("juliet", "phone", priority=-1)

    juliet.lose()
    await phone.available(0)

    await world.until(lambda: len(phone.bodies) == 3)
    assert all(stanza.child(SPACE) is None for stanza in phone.received)
    assert [s for s in romeo.carrier.received if s.type == "error"] == []


async def test_a_large_backlog_is_fetched_as_fast_as_the_client_takes_it(world):
    await world.load(offline={"max_messages": 1000}, disco={})
    await world.account("romeo", "juliet")
    romeo = await world.online("romeo")
    for number in range(250):
        last = await romeo.send(message(JULIET, "x" * 10_000, f"m{number}"))
    await world.settled(last)
    juliet = world.login("juliet")
    juliet.stalled = True

    asked = asyncio.create_task(juliet.ask("get", FETCH))
    await world.until(lambda: len(juliet.received) > 40)
    await asyncio.sleep(0.05)
    assert len(juliet.received) < 70  # the window
    juliet.stalled = False
    while not asked.done():
        world.sweep()
        await asyncio.sleep(0.001)

    assert (await asked).type == "result"
    assert [s.id for s in juliet.received if s.kind == "message"] == [f"m{number}" for number in range(250)]
    assert await world.spool.count(HOST, "juliet") == 250


async def test_what_a_node_holds_that_dies_while_it_is_waited_for_comes_first(world, monkeypatch):
    """It had no session of hers any more, and was about to give them up."""
    monkeypatch.setattr(offline, "_SILENT", 1.0)
    monkeypatch.setattr(offline, "_SILENT_LOOK", 0.02)
    romeo, user = await prepare(world), parse(JULIET)
    other = Holder(b"B" * 16, 1, "its session")
    old, row = message(JULIET, "1", "m1").encode(), new_id()
    await world.spool.keep(
        user.domain, user.local, f"romeo@{HOST}", old, dedup=None, quota=None, holder=other, row_id=row
    )
    await world.stored(await romeo.send(message(JULIET, "2", "m2")))
    dead = asyncio.Event()
    monkeypatch.setattr(world.spool, "standing", Beside(dead))

    coming = asyncio.create_task(world.online("juliet"))
    await asyncio.sleep(0.7)
    dead.set()
    await asyncio.sleep(0.7)
    await world.spool.release([row], other)
    juliet = await coming

    assert juliet.bodies == ["1", "2"]


class Beside(Alone):
    """Beside another node."""

    def __init__(self, dead: asyncio.Event) -> None:
        self._dead = dead

    def is_silent(self, member: bytes) -> bool:
        return self._dead.is_set()
