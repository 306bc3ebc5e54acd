"""Last activity, private data and vCards, over both databases."""

import asyncio
from typing import Any

import pytest

from tests.modules.world import HOST, Client, World
from xmppd.errors import StorageUnavailable

JULIET = f"juliet@{HOST}"
LAST = "<query xmlns='jabber:iq:last'/>"


async def romeo_in(world: World, **modules: dict) -> Client:
    await world.load(**modules)
    await world.account("romeo", "juliet")
    return await world.online("romeo")


async def away(*args: Any, **options: Any) -> Any:
    raise StorageUnavailable("the database is away")


# -- last activity


async def test_the_server_says_how_long_it_has_been_up(world):
    romeo = await romeo_in(world, last={})
    world.advanced += 50

    query = await romeo.query("get", LAST, HOST)

    assert 150 <= int(query.get("seconds")) < 160


async def test_a_contact_learns_when_a_user_was_last_there_and_why_they_left(any_world):
    world = any_world
    romeo = await romeo_in(world, last={})
    world.rosters.let_see(JULIET, f"romeo@{HOST}")
    juliet = await world.online("juliet")
    assert (await romeo.query("get", LAST, JULIET)).get("seconds") == "0"

    await juliet.send("<presence type='unavailable'><status>To the &amp; tomb</status></presence>")
    await world.storage.batcher.drain()
    world.advanced += 900

    query = await romeo.query("get", LAST, JULIET)
    assert 900 <= int(query.get("seconds")) < 910
    assert query.text == "To the & tomb"


async def test_who_was_never_available_was_there_all_the_same(any_world):
    world = any_world
    romeo = await romeo_in(world, last={})
    world.rosters.let_see(JULIET, f"romeo@{HOST}")
    assert await romeo.refusal("get", LAST, JULIET) == "item-not-found"

    world.login("juliet").lose()
    await world.storage.batcher.drain()

    assert (await romeo.query("get", LAST, JULIET)).get("seconds") in ("0", "1", "2")


async def test_the_last_resource_counts(world):
    romeo = await romeo_in(world, last={})
    world.rosters.let_see(JULIET, f"romeo@{HOST}")
    phone, _ = await world.online("juliet", "phone"), await world.online("juliet", "laptop", priority=-1)

    phone.lose()
    world.advanced += 60

    assert (await romeo.query("get", LAST, JULIET)).get("seconds") == "0"


async def test_a_stranger_learns_nothing_about_last_activity(world):
    romeo = await romeo_in(world, last={})

    assert await romeo.refusal("get", LAST, JULIET) == "forbidden"
    assert await romeo.refusal("get", LAST, f"nobody@{HOST}") == "service-unavailable"


async def test_a_very_long_status_is_cut(world):
    romeo = await romeo_in(world, last={})
    world.rosters.let_see(JULIET, f"romeo@{HOST}")
    juliet = await world.online("juliet")
    await juliet.send(f"<presence type='unavailable'><status>{'x' * 5000}</status></presence>")
    await world.storage.batcher.drain()

    assert len((await romeo.query("get", LAST, JULIET)).text) == 1024


# -- private data

BOOKMARKS = "<storage xmlns='storage:bookmarks'><conference jid='rose@rooms.example'/></storage>"
PREFS = "<prefs xmlns='urn:example:prefs' theme='dark'/>"


def private(inner: str) -> str:
    return f"<query xmlns='jabber:iq:private'>{inner}</query>"


async def stored_private(client: Client, element: str) -> list[dict[str, str]]:
    query = await client.query("get", private(element))
    assert len(query) == 1
    return [dict(one.attrib) for one in query[0].iter()]


async def test_private_data_come_back_as_they_were_stored(any_world):
    romeo = await romeo_in(any_world, private={})

    answer = await romeo.ask("set", private(BOOKMARKS + PREFS))
    assert (answer.type, answer.payload) == ("result", None)

    assert await stored_private(romeo, "<storage xmlns='storage:bookmarks'/>") == [{}, {"jid": "rose@rooms.example"}]
    assert await stored_private(romeo, "<prefs xmlns='urn:example:prefs'/>") == [{"theme": "dark"}]
    assert await stored_private(romeo, "<other xmlns='urn:example:prefs'/>") == [{}]
    both = await romeo.query("get", private("<prefs xmlns='urn:example:prefs'/><storage xmlns='storage:bookmarks'/>"))
    assert [one.tag for one in both] == ["{urn:example:prefs}prefs", "{storage:bookmarks}storage"]


async def test_private_data_are_replaced_and_removed_by_an_empty_element(any_world):
    world = any_world
    romeo = await romeo_in(world, private={"max_elements": 1})
    await romeo.ask("set", private(PREFS))

    await romeo.ask("set", private("<prefs xmlns='urn:example:prefs' theme='light'/>"))
    assert await stored_private(romeo, "<prefs xmlns='urn:example:prefs'/>") == [{"theme": "light"}]

    await romeo.ask("set", private("<prefs xmlns='urn:example:prefs'/>"))
    assert await stored_private(romeo, "<prefs xmlns='urn:example:prefs'/>") == [{}]
    assert (await romeo.ask("set", private(BOOKMARKS))).type == "result"  # there is room again


async def test_private_data_belong_to_their_user(world):
    romeo = await romeo_in(world, private={})
    juliet = await world.online("juliet")
    await juliet.ask("set", private(PREFS))

    assert await romeo.refusal("get", private(PREFS), JULIET) == "forbidden"
    assert await romeo.refusal("set", private(PREFS), JULIET) == "forbidden"
    assert await stored_private(romeo, "<prefs xmlns='urn:example:prefs'/>") == [{}]


async def test_private_data_have_their_limits(any_world):
    romeo = await romeo_in(any_world, private={"max_elements": 2, "max_size": "1KiB"})
    big = f"<big xmlns='urn:example:big'>{'x' * 1024}</big>"
    three = "".join(f"<e xmlns='urn:example:{number}' n='1'/>" for number in range(3))

    assert await romeo.refusal("set", private(big)) == "policy-violation"
    assert await romeo.refusal("set", private(three)) == "resource-constraint"
    assert await stored_private(romeo, "<e xmlns='urn:example:0'/>") == [{}]  # all or nothing
    assert (await romeo.ask("set", private(BOOKMARKS + PREFS))).type == "result"
    assert (await romeo.ask("set", private(PREFS))).type == "result"
    assert await romeo.refusal("set", private("<e xmlns='urn:example:0' n='1'/>")) == "resource-constraint"


async def test_the_limit_holds_for_requests_that_come_together(any_world):
    world = any_world
    await romeo_in(world, private={"max_elements": 2})
    clients = [await world.online("juliet", f"r{number}") for number in range(6)]
    elements = [private(f"<e xmlns='urn:example:{number}' n='1'/>") for number in range(6)]

    answers = await asyncio.gather(*(c.ask("set", element) for c, element in zip(clients, elements, strict=True)))

    assert sorted(answer.type for answer in answers) == ["error"] * 4 + ["result"] * 2


@pytest.mark.parametrize(("inner", "expected"), [
    ("", "bad-request"),
    ("<prefs/>", "not-acceptable"),
    ("<prefs xmlns=''/>", "not-acceptable"),
    (f"<prefs xmlns='urn:{'x' * 1100}'/>", "policy-violation"),
    ("".join(f"<e xmlns='urn:example:{number}'/>" for number in range(51)), "policy-violation"),
])  # fmt: skip
async def test_private_requests_that_make_no_sense(world, inner, expected):
    romeo = await romeo_in(world, private={})

    assert await romeo.refusal("get", private(inner)) == expected
    assert await romeo.refusal("set", private(inner)) == expected


# -- vCards

CARD = "<vCard xmlns='vcard-temp'><FN>Juliet &amp; nurse</FN></vCard>"
NO_CARD = "<vCard xmlns='vcard-temp'/>"


async def test_everybody_reads_a_vcard_and_its_owner_writes_it(any_world):
    world = any_world
    romeo = await romeo_in(world, vcard={})
    juliet = await world.online("juliet")
    assert len(await juliet.query("get", NO_CARD)) == 0
    assert await romeo.refusal("get", NO_CARD, JULIET) == "service-unavailable"
    assert await romeo.refusal("get", NO_CARD, f"nobody@{HOST}") == "service-unavailable"

    assert (await juliet.ask("set", CARD)).type == "result"

    assert (await romeo.query("get", NO_CARD, JULIET)).findtext("{vcard-temp}FN") == "Juliet & nurse"
    assert await romeo.refusal("set", CARD, JULIET) == "forbidden"
    await juliet.ask("set", CARD.replace("Juliet", "Tybalt"))
    assert (await juliet.query("get", NO_CARD)).findtext("{vcard-temp}FN") == "Tybalt & nurse"


async def test_a_vcard_has_its_limit(world):
    romeo = await romeo_in(world, vcard={"max_size": "1KiB"})

    big = f"<vCard xmlns='vcard-temp'><FN>{'x' * 1024}</FN></vCard>"

    assert await romeo.refusal("set", big) == "policy-violation"
    assert len(await romeo.query("get", NO_CARD)) == 0


# -- all of them


async def test_nothing_is_left_of_a_removed_account(any_world):
    world = any_world
    await romeo_in(world, vcard={}, private={}, last={})
    juliet = await world.online("juliet")
    await juliet.ask("set", CARD)
    await juliet.ask("set", private(PREFS))

    await world.accountant.remove(HOST, "juliet")
    await world.account("juliet")
    again = await world.online("juliet")

    assert len(await again.query("get", NO_CARD)) == 0
    assert await stored_private(again, "<prefs xmlns='urn:example:prefs'/>") == [{}]
    for table in ("vcard", "private_xml", "last_activity"):

        async def count(connection: Any, table: str = table) -> Any:
            sql = f"SELECT COUNT(*) FROM {table} WHERE username = 'juliet'"
            return (await connection.exec_driver_sql(sql)).scalar_one()

        assert await world.storage.read(count) == 0


@pytest.mark.parametrize(("type", "inner"), [
    ("get", NO_CARD), ("set", CARD), ("get", private(PREFS)), ("set", private(PREFS)), ("get", LAST),
])  # fmt: skip
async def test_without_the_database_the_answer_is_try_later(world, monkeypatch, type, inner):
    romeo = await romeo_in(world, vcard={}, private={}, last={})
    await romeo.send("<presence type='unavailable'/>")  # else nobody asks the database for last activity
    await world.storage.batcher.drain()
    monkeypatch.setattr(world.storage.loader, "get", away)
    monkeypatch.setattr(world.storage.batcher, "submit", away)

    answer = await romeo.ask(type, inner)

    error = answer.element.find("{jabber:client}error")
    assert error is not None
    assert error.get("type") == "wait"


async def test_many_users_leave_at_once_in_few_transactions(world):
    await romeo_in(world, last={})
    await world.account(*(f"user{number}" for number in range(100)))
    clients = [await world.online(f"user{number}") for number in range(100)]
    transactions, run = 0, world.storage.batcher._run

    async def counted(work: Any, **options: Any) -> Any:
        nonlocal transactions
        transactions += 1
        return await run(work, **options)

    world.storage.batcher._run = counted
    for client in clients:
        client.lose()
    await world.storage.batcher.drain()
    await asyncio.sleep(0)

    assert transactions <= 3
