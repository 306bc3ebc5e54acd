"""Blocking: whom a user blocks is told nothing and gets nothing, and nobody else notices."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from modules.blocking.rules import BlockedJids
from tests.databases import opened
from tests.modules.friends import FAR, JULIET, NURSE, ROMEO, Friends, presences
from tests.modules.world import HOST, Client, condition, message
from xmppd.delivery import ERROR
from xmppd.errors import CommandError, StorageUnavailable
from xmppd.events import UserDeleted
from xmppd.protocol.jid import parse

VECTORS = yaml.safe_load((Path(__file__).parents[1] / "vectors" / "blocking.yaml").read_text())
NS = "urn:xmpp:blocking"
LIST = f"<blocklist xmlns='{NS}'/>"
INVITATION = "<x xmlns='http://jabber.org/protocol/muc#user'><invite/></x>"
VCARD = "<vCard xmlns='vcard-temp'/>"


@pytest.fixture
async def any_friends(any_url: str, tmp_path: Path) -> AsyncIterator[Friends]:
    async with opened(any_url, tmp_path) as storage, Friends(storage) as world:
        yield world


@pytest.fixture
async def friends(sqlite_url: str, tmp_path: Path) -> AsyncIterator[Friends]:
    async with opened(sqlite_url, tmp_path) as storage, Friends(storage) as world:
        yield world


async def begin(world: Friends, **options: Any) -> None:
    await world.load(roster={}, presence={}, offline={}, vcard={}, disco={}, blocking=options)
    await world.account("juliet", "romeo", "nurse")


def block(*jids: str, inner: str = "") -> str:
    return f"<block xmlns='{NS}'>" + "".join(f"<item jid='{jid}'>{inner}</item>" for jid in jids) + "</block>"


def unblock(*jids: str) -> str:
    return f"<unblock xmlns='{NS}'>" + "".join(f"<item jid='{jid}'/>" for jid in jids) + "</unblock>"


async def do(client: Client, xml: str) -> None:
    answer = await client.ask("set", xml)
    assert answer.type == "result", answer.xml


async def listed(client: Client) -> list[str]:
    return [item.get("jid") for item in await client.query("get", LIST)]


def pushes(client: Client) -> list[tuple[str, list[str]]]:
    return [
        (s.payload.tag.partition("}")[2], [item.get("jid") for item in s.payload])
        for s in client.received
        if s.kind == "iq" and s.type == "set"
    ]


def errors(client: Client) -> list[str]:
    return [condition(stanza) for stanza in client.received if stanza.type == "error"]


async def away(*args: Any, **options: Any) -> Any:
    raise StorageUnavailable("the database is away")


# -- whom and what


@pytest.mark.parametrize("vector", VECTORS["matching_vectors"], ids=lambda v: f"{v['item']} {v['jid']}")
def test_matching_vector(vector):
    blocked = BlockedJids(parse(JULIET), frozenset({vector["item"]}))

    assert blocked.blocks(parse(vector["jid"])) is vector["blocked"]


@pytest.mark.parametrize("vector", VECTORS["blocking_vectors"], ids=lambda v: v["id"])
async def test_blocking_vector(any_friends, vector):
    world = any_friends
    await begin(world)
    await world.befriend("juliet", "romeo")
    juliet, romeo = await world.come("juliet"), await world.come("romeo")
    await do(juliet, block(ROMEO))
    await world.quiet()
    juliet.received.clear()
    romeo.received.clear()
    sender, receiver, to = (romeo, juliet, JULIET) if "in" in vector else (juliet, romeo, ROMEO)
    where = vector.get("in", vector.get("out"))
    to += "/balcony" if where == "full" else ""
    kind = "" if vector["type"] in ("available",) else f" type='{vector['type']}'"
    inner = {"iq": VCARD, "message": "<body>hear me</body>", "presence": ""}[vector["stanza"]]
    if vector.get("with") == "invitation":
        inner += INVITATION
    before = await world.roster("juliet"), await world.roster("romeo")

    await world.settled(await sender.send(f"<{vector['stanza']}{kind} to='{to}' id='x1'>{inner}</{vector['stanza']}>"))
    await world.quiet()

    expected = [] if vector["result"] == "S" else [vector["result"].removeprefix("E:")]
    if vector["id"] in ("B-16", "B-17"):  # the server of the sender shows the sender's own roster
        sender.received[:] = [stanza for stanza in sender.received if stanza.kind != "iq"]
        before = before[0], await world.roster("romeo")
    assert receiver.received == []
    assert errors(sender) == expected
    assert len(sender.received) == len(expected)
    assert (await world.roster("juliet"), await world.roster("romeo")) == before
    assert await world.spool.count(HOST, "juliet") == await world.spool.count(HOST, "romeo") == 0


async def test_a_user_who_writes_to_somebody_blocked_is_told_so(friends):
    await begin(friends)
    juliet = await friends.come("juliet")
    await do(juliet, block(FAR))

    await juliet.send(message(FAR))

    error = juliet.received[-1].element.find("{jabber:client}error")
    assert error.get("type") == "cancel"
    assert [child.tag.partition("}")[2] for child in error][:2] == ["not-acceptable", "text"]
    assert error.find("{urn:xmpp:blocking:errors}blocked") is not None
    assert friends.sent_away == []


async def test_everybody_else_goes_on_as_before(friends):
    await begin(friends)
    juliet, romeo, nurse = [await friends.come(name) for name in ("juliet", "romeo", "nurse")]
    await do(juliet, block(ROMEO))
    juliet.received.clear()

    await nurse.send(message(JULIET, "from nurse"))
    await juliet.send(message(NURSE, "from juliet"))

    assert juliet.bodies == ["from nurse"]
    assert nurse.bodies == ["from juliet"]
    assert [client.session.guards for client in (juliet, romeo, nurse)] == [{"blocking"}, frozenset(), frozenset()]


async def test_who_blocks_the_own_domain_can_still_use_the_server(friends):
    await begin(friends)
    juliet, phone, romeo = [await friends.come(*who) for who in (("juliet",), ("juliet", "phone"), ("romeo",))]
    await do(juliet, block(HOST))

    await romeo.send(message(JULIET, "from romeo"))
    await juliet.send(message(f"{JULIET}/phone", "to myself"))
    info = await juliet.query("get", "<query xmlns='http://jabber.org/protocol/disco#info'/>", HOST)
    features = [one.get("var") for one in info]
    await do(juliet, unblock())

    assert {NS, "urn:xmpp:reporting:1"} <= set(features)
    assert phone.bodies == ["to myself"]
    assert errors(romeo) == ["service-unavailable"]


# -- the list


async def test_resources_that_have_asked_for_the_list_are_told_of_changes(any_friends):
    world = any_friends
    await begin(world)
    juliet, phone, silent = [await world.come("juliet", name) for name in ("balcony", "phone", "silent")]
    assert (await listed(juliet), await listed(phone)) == ([], [])
    for client in (juliet, phone, silent):
        client.received.clear()

    await do(juliet, block(ROMEO, "Montague.Example"))
    await do(phone, unblock(ROMEO, NURSE))
    await do(juliet, unblock())

    told = [("block", [ROMEO, "montague.example"]), ("unblock", [ROMEO, NURSE]), ("unblock", [])]
    assert pushes(juliet) == pushes(phone) == told
    assert pushes(silent) == []
    assert await listed(silent) == []


async def test_the_list_is_there_at_the_next_login(any_friends):
    world = any_friends
    await begin(world)
    juliet = await world.come("juliet")
    await do(juliet, block(FAR, ROMEO))
    await do(juliet, unblock(FAR))
    juliet.lose()

    again = await world.come("juliet")

    assert await listed(again) == [ROMEO]
    assert again.session.guards


@pytest.mark.parametrize(("xml", "expected"), [
    (block(), "bad-request"), (block("a@b@c"), "jid-malformed"), (block(""), "bad-request"),
    (block(f"{JULIET}/phone"), "not-allowed"), (unblock("a@b@c"), "jid-malformed"),
    (block("a@x.example", "b@x.example", "c@x.example", "d@x.example"), "resource-constraint"),
])  # fmt: skip
async def test_what_cannot_be_blocked(friends, xml, expected):
    await begin(friends, max_items=3)
    juliet = await friends.come("juliet")
    await do(juliet, block(FAR))

    assert await juliet.refusal("set", xml) == expected
    assert await listed(juliet) == [FAR]


async def test_a_block_list_is_its_owners_alone(friends):
    await begin(friends)
    romeo = await friends.come("romeo")

    assert await romeo.refusal("get", LIST, JULIET) == "forbidden"
    assert await romeo.refusal("set", block(NURSE), JULIET) == "forbidden"


async def test_changes_made_at_once_are_all_made_up_to_the_limit(any_friends):
    world = any_friends
    await begin(world, max_items=10)
    clients = [await world.come("juliet", f"r{number}") for number in range(4)]

    await asyncio.gather(
        *(client.ask("set", block(*(f"u{n}-{i}@x.example" for n in range(3)))) for i, client in enumerate(clients))
    )

    assert len(await listed(clients[0])) == 9
    assert [s.type for client in clients for s in client.received if s.id.startswith("q")].count("error") == 1


async def test_a_list_that_another_node_has_changed_is_loaded_again(friends):
    await begin(friends)
    juliet = await friends.come("juliet")
    blocking = friends.loader._loaded["blocking"].instance
    from modules.blocking.store import Change

    await blocking._store.change(Change(("capulet.example", "juliet"), add=(ROMEO,), limit=10))
    assert await listed(juliet) == []
    blocking.invalidate(parse(JULIET))

    assert await listed(juliet) == [ROMEO]
    assert juliet.session.guards


async def test_a_removed_account_leaves_nothing_behind(any_friends):
    world = any_friends
    await begin(world)
    juliet = await world.come("juliet")
    await do(juliet, block(FAR, inner="<report xmlns='urn:xmpp:reporting:1' reason='urn:xmpp:reporting:spam'/>"))
    juliet.lose()

    await world.tell(UserDeleted(parse(JULIET)))

    again = await world.come("juliet")
    assert await listed(again) == []
    assert await world.command("spam_reports", HOST) == []


# -- presence


async def test_who_is_blocked_sees_the_user_go_and_come_back(friends):
    await begin(friends)
    await friends.befriend("juliet", "romeo")
    await friends.befriend("juliet", "nurse")
    juliet, romeo, nurse = [await friends.come(name) for name in ("juliet", "romeo", "nurse")]
    for client in (juliet, romeo, nurse):
        client.received.clear()

    await do(juliet, block(ROMEO))
    await friends.quiet()
    assert presences(romeo) == [(f"{JULIET}/balcony", "unavailable")]
    romeo.received.clear()

    await juliet.send("<presence><show>away</show></presence>")
    phone = await friends.come("juliet", "phone")
    again = await friends.come("romeo", "hall")  # a new resource is not told of juliet either
    await romeo.send(f"<presence type='probe' to='{JULIET}'/>")
    phone.lose()
    await friends.quiet()
    assert [who for who, _ in presences(romeo) + presences(again) if who.startswith(JULIET)] == []
    assert (f"{JULIET}/phone", "available") in presences(nurse)
    assert [who for who, _ in presences(juliet) if who.startswith(ROMEO)] == []

    romeo.received.clear()
    juliet.received.clear()
    await do(juliet, unblock(ROMEO))
    await friends.quiet()
    assert presences(romeo) == [(f"{JULIET}/balcony", "available")]
    assert sorted(presences(juliet)) == [(f"{ROMEO}/balcony", "available"), (f"{ROMEO}/hall", "available")]


async def test_blocking_a_domain_hides_the_user_from_all_in_it_and_from_nobody_else(friends):
    await begin(friends)
    await friends.befriend("juliet", "romeo")
    far = [f"{name}@montague.example" for name in ("mercutio", "benvolio", "abram")]
    for jid in far:
        await friends.command("add_rosteritem", "juliet", HOST, *jid.split("@"), "", "", "both")
    await friends.command("add_rosteritem", "juliet", HOST, "abram", "montague.example", "", "", "to")  # sees nothing
    juliet, romeo = await friends.come("juliet"), await friends.come("romeo")
    friends.sent_away.clear()
    romeo.received.clear()

    await do(juliet, block("montague.example"))
    await juliet.send("<presence><show>dnd</show></presence>")
    await friends.quiet()

    assert sorted((s.to.full, s.type) for s in friends.sent_away) == [(far[1], "unavailable"), (far[0], "unavailable")]
    assert [kind for _, kind in presences(romeo)] == ["available"]

    friends.sent_away.clear()
    await do(juliet, unblock())
    await friends.quiet()
    assert sorted((s.type, s.to.full) for s in friends.sent_away) == sorted(
        [("available", far[0]), ("available", far[1]), *(("probe", jid) for jid in far)]
    )


async def test_who_had_directed_presence_and_is_no_contact_sees_the_user_go_once(friends):
    await begin(friends)
    juliet = await friends.come("juliet")
    await juliet.send(f"<presence to='{FAR}/hall'/>")
    friends.sent_away.clear()

    await do(juliet, block(FAR))
    juliet.lose()
    await friends.quiet()

    assert [(s.to.full, s.type) for s in friends.sent_away] == [(f"{FAR}/hall", "unavailable")]


# -- those who are absent


async def test_what_was_stored_before_the_block_is_not_delivered_after_it(any_friends):
    world = any_friends
    await begin(world)
    romeo, nurse = await world.come("romeo"), await world.come("nurse")
    await world.stored(await romeo.send(message(JULIET, "from romeo")))
    await world.stored(await nurse.send(message(JULIET, "from nurse")))
    juliet = await world.enter("juliet")
    await do(juliet, block(ROMEO))

    await juliet.available()

    assert juliet.bodies == ["from nurse"]
    world.sweep()
    await world.until_true(lambda: _empty(world))


async def _empty(world: Friends) -> bool:
    return not await world.rows()


async def test_a_request_for_an_absent_user_is_not_answered_to_somebody_blocked(any_friends):
    world = any_friends
    await begin(world)
    juliet = await world.come("juliet")
    await do(juliet, "<vCard xmlns='vcard-temp'><FN>Juliet</FN></vCard>")
    await do(juliet, block(ROMEO))
    juliet.lose()
    romeo, nurse = await world.come("romeo"), await world.come("nurse")

    assert await romeo.refusal("get", VCARD, JULIET) == "service-unavailable"
    assert (await nurse.query("get", VCARD, JULIET)).findtext("{vcard-temp}FN") == "Juliet"


# -- a database in trouble


async def test_nothing_passes_while_the_list_is_not_known(friends, monkeypatch):
    monkeypatch.setattr("modules.blocking._RETRY", 0.02)
    await begin(friends)
    romeo = await friends.come("romeo")
    read, friends.storage.loader._read = friends.storage.loader._read, away
    juliet = friends.login("juliet")
    await juliet.session.bound()

    await romeo.send(message(f"{JULIET}/balcony"))
    await romeo.send(f"<presence to='{JULIET}/balcony'/>")
    await juliet.send(message(ROMEO))
    uptime = await juliet.ask("get", "<query xmlns='http://jabber.org/protocol/disco#items'/>", HOST)

    assert [stanza.kind for stanza in juliet.received if stanza is not uptime] == ["message"]  # the refusal of hers
    assert errors(romeo) == errors(juliet) == ["internal-server-error"]
    assert romeo.bodies == []
    [error] = [s.element.find("{jabber:client}error") for s in romeo.received if s.type == "error"]
    assert error.get("type") == "wait"
    assert uptime.type == "result"

    friends.storage.loader._read = read
    await friends.until(lambda: not juliet.session.guards)
    await romeo.send(message(f"{JULIET}/balcony", "now"))
    assert juliet.bodies == ["now"]


async def test_those_who_are_online_go_on_with_their_lists_while_the_database_is_away(friends):
    await begin(friends)
    juliet, romeo, nurse = [await friends.come(name) for name in ("juliet", "romeo", "nurse")]
    await do(juliet, block(ROMEO))
    friends.storage.loader._read = friends.storage.run = friends.storage.read = away

    await romeo.send(message(JULIET, "from romeo"))
    await nurse.send(message(JULIET, "from nurse"))

    assert juliet.bodies == ["from nurse"]
    assert errors(romeo) == ["service-unavailable"]


async def test_a_message_for_an_absent_user_whose_list_cannot_be_read_is_refused_for_now(friends):
    await begin(friends)
    romeo = await friends.come("romeo")
    await friends.accounts.exists(HOST, "juliet")
    friends.storage.loader._read = away

    assert await friends.settled(await romeo.send(message(JULIET))) is ERROR

    [error] = [s.element.find("{jabber:client}error") for s in romeo.received if s.type == "error"]
    assert (error.get("type"), condition(romeo.received[-1])) == ("wait", "internal-server-error")
    assert await friends.rows() == []


async def test_a_change_whose_end_is_not_known_is_looked_up(friends):
    """The answer to the COMMIT is lost: the client is told of an error, and the list in force is what was stored."""
    await begin(friends)
    juliet = await friends.come("juliet")
    run = friends.storage.batcher._run

    async def lost(*args: Any, **options: Any) -> Any:
        await run(*args, **options)
        raise StorageUnavailable("the connection is lost")

    friends.storage.batcher._run = lost
    friends.storage.batcher._deadline = 0.0
    assert await juliet.refusal("set", block(ROMEO)) == "internal-server-error"
    friends.storage.batcher._run = run

    await friends.until(lambda: juliet.session.guards)
    assert await listed(juliet) == [ROMEO]


async def test_a_new_session_is_guarded_before_its_list_is_there(friends):
    await begin(friends)
    juliet, romeo = await friends.come("juliet"), await friends.come("romeo")
    await do(juliet, block(ROMEO))
    juliet.lose()
    go, read = asyncio.Event(), friends.storage.loader._read

    async def slow(*args: Any, **options: Any) -> Any:
        await go.wait()
        return await read(*args, **options)

    friends.storage.loader._read = slow
    again = friends.login("juliet")
    binding = asyncio.ensure_future(again.session.bound())
    await asyncio.sleep(0)

    await romeo.send(f"<iq type='get' id='x' to='{JULIET}/balcony'><ping xmlns='urn:xmpp:ping'/></iq>")
    go.set()
    await binding

    assert again.received == []


async def test_an_anonymous_user_blocks_nobody_and_waits_for_no_list(friends):
    await begin(friends)
    friends.storage.loader._read = away
    guest = Client(friends, f"guest@{HOST}/x", anonymous=True)
    await guest.session.bound()

    assert guest.session.guards == frozenset()
    assert await guest.refusal("set", block(ROMEO)) == "not-allowed"


# -- the module comes and goes


async def test_a_module_that_is_loaded_late_knows_the_lists_of_those_who_are_there(friends):
    await begin(friends)
    juliet, romeo = await friends.come("juliet"), await friends.come("romeo")
    await do(juliet, block(ROMEO))
    hooks = friends.hooks.count()

    await friends.loader.unload("blocking")
    await romeo.send(message(JULIET, "unhindered"))
    assert (juliet.bodies, juliet.session.guards) == (["unhindered"], frozenset())

    await friends.loader.load("blocking")
    await friends.until(lambda: not romeo.session.guards)
    await romeo.send(message(JULIET, "hindered"))

    assert juliet.bodies == ["unhindered"]
    assert errors(romeo) == ["service-unavailable"]
    assert friends.hooks.count() == hooks


async def test_a_change_that_is_under_way_at_a_reload_is_seen_by_the_new_instance(friends):
    await begin(friends)
    juliet = await friends.come("juliet")
    commit, run = asyncio.Event(), friends.storage.batcher._run

    async def slow(*args: Any, **options: Any) -> Any:
        await commit.wait()
        return await run(*args, **options)

    friends.storage.batcher._run = slow
    asked = asyncio.create_task(juliet.ask("set", block(ROMEO)))
    await asyncio.sleep(0.02)
    await friends.loader.reload("blocking")
    await friends.until(lambda: not juliet.session.guards)  # the new one has read the list
    commit.set()
    assert (await asked).type == "result"

    await friends.until(lambda: juliet.session.guards)
    assert await listed(juliet) == [ROMEO]


# -- reports


def report(reason: str = "spam", text: str = "") -> str:
    inner = f"<text>{text}</text><stanza-id xmlns='urn:xmpp:sid:0' by='{JULIET}' id='s1'/>" if text else ""
    return f"<report xmlns='urn:xmpp:reporting:1' reason='urn:xmpp:reporting:{reason}'>{inner}</report>"


async def test_a_report_is_kept_and_sent_to_those_who_look_after_the_host(any_friends):
    world = any_friends
    await begin(world, report_to=[NURSE])
    juliet, nurse = await world.come("juliet"), await world.come("nurse")

    await do(juliet, block(ROMEO, inner=report("abuse", "Came <i/>trouble &amp; strife")))
    await do(juliet, block(FAR, inner=report()))

    kept = await world.command("spam_reports", HOST)
    assert [row[1:4] for row in kept] == [
        ("juliet", FAR, "urn:xmpp:reporting:spam"),
        ("juliet", ROMEO, "urn:xmpp:reporting:abuse"),
    ]
    assert 'id="s1"' in kept[1][4]
    assert kept[0][0].startswith("20")
    assert [(s.type, s.from_.full) for s in nurse.received] == [("normal", HOST)] * 2
    assert f"{JULIET} reports {ROMEO} (urn:xmpp:reporting:abuse)\nCame" in nurse.bodies[0]
    assert nurse.received[0].child("urn:xmpp:reporting:1", "report") is not None
    assert await listed(juliet) == [FAR, ROMEO]


@pytest.mark.parametrize("inner", [
    "<report xmlns='urn:xmpp:reporting:1'/>", f"<report xmlns='urn:xmpp:reporting:1' reason='{'x' * 300}'/>",
    "<report xmlns='urn:example:other' reason='urn:xmpp:reporting:spam'/>",
])  # fmt: skip
async def test_a_report_that_says_nothing_does_not_hinder_the_block(friends, inner):
    await begin(friends)
    juliet = await friends.come("juliet")

    await do(juliet, block(ROMEO, inner=inner))

    assert await listed(juliet) == [ROMEO]
    assert await friends.command("spam_reports", HOST) == []


async def test_a_user_cannot_fill_the_database_with_reports(any_friends):
    world = any_friends
    await begin(world, max_reports=3, report_to=[NURSE])
    juliet, nurse = await world.come("juliet"), await world.come("nurse")

    for _ in range(4):
        await do(juliet, block(ROMEO, FAR, inner=report(text="x" * 20_000)))
        await do(juliet, unblock())

    kept = await world.command("spam_reports", HOST)
    assert (len(kept), len(nurse.received)) == (3, 3)
    assert all(len(row[4]) < 200 for row in kept)  # of a very long one only the reason


async def test_spam_reports_refuses_an_unknown_host(friends):
    await begin(friends)

    with pytest.raises(CommandError, match="unknown host"):
        await friends.command("spam_reports", "verona.example")
