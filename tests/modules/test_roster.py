"""The roster module over a real database: what clients ask, what they are told, what is kept."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.databases import opened
from tests.golden import compare
from tests.modules.friends import FAR, ITEM, JULIET, NURSE, QUERY, ROMEO, Friends, presences, pushes, story
from tests.modules.world import HOST, condition
from xmppd.admin.registry import Caller
from xmppd.errors import CommandError, StorageUnavailable
from xmppd.events import FeaturesOffering
from xmppd.module_api import RosterService
from xmppd.protocol.jid import parse
from xmppd.protocol.stanza import Stanza


@pytest.fixture
async def friends(any_url: str, tmp_path: Path) -> AsyncIterator[Friends]:
    async with opened(any_url, tmp_path) as storage, Friends(storage) as world:
        await world.begin(max_items=5, max_requests=2, max_length=30)
        yield world
        await world.quiet()


def put(jid: str, name: str = "", *groups: str) -> str:
    inner = "".join(f"<group>{group}</group>" for group in groups)
    return f"<query xmlns='jabber:iq:roster'><item jid='{jid}' name='{name}'>{inner}</item></query>"


def remove(jid: str) -> str:
    return f"<query xmlns='jabber:iq:roster'><item jid='{jid}' subscription='remove'/></query>"


# -- the roster itself


async def test_what_is_set_is_pushed_to_interested_resources_and_kept(friends):
    phone, laptop = await friends.enter("juliet", "phone"), await friends.enter("juliet", "laptop")
    stranger = await friends.enter("juliet", "dull", interested=False)

    await phone.ask("set", put(ROMEO, "Romeo &amp; co", "Friends", "&lt;Lovers>"))

    wanted = [{"jid": ROMEO, "name": "Romeo & co", "subscription": "none"}]
    assert pushes(phone) == pushes(laptop) == wanted
    assert not stranger.received
    query = await phone.query("get", QUERY)
    assert [group.text for group in query.find(ITEM)] == ["Friends", "<Lovers>"]


async def test_the_whole_roster_is_not_sent_twice_to_a_client_that_has_it(friends):
    phone = await friends.enter("juliet")
    await phone.ask("set", put(ROMEO))
    version = next(stanza for stanza in phone.received if stanza.type == "set").payload.get("ver")

    same = await phone.ask("get", f"<query xmlns='jabber:iq:roster' ver='{version}'/>")
    await phone.ask("set", put(NURSE))
    newer = await phone.query("get", f"<query xmlns='jabber:iq:roster' ver='{version}'/>")

    assert same.type == "result"
    assert same.payload is None
    assert len(newer.findall(ITEM)) == 2
    assert newer.get("ver") not in (None, "", version)


async def test_versioning_is_offered_after_authentication_only(friends):
    before, after = (FeaturesOffering(HOST, authenticated, True) for authenticated in (False, True))

    await friends.tell(before)
    await friends.tell(after)

    assert before.features == []
    assert after.features == [b"<ver xmlns='urn:xmpp:features:rosterver'/>"]


async def test_an_account_made_anew_is_not_taken_for_the_old_one(friends):
    phone = await friends.enter("juliet")
    await phone.ask("set", put(ROMEO))
    version = phone.received[0].payload.get("ver")
    await friends.accountant.remove(HOST, "juliet")
    await friends.account("juliet")

    again = await friends.enter("juliet")
    query = await again.query("get", f"<query xmlns='jabber:iq:roster' ver='{version}'/>")

    assert query.findall(ITEM) == []


async def test_the_roster_of_another_is_forbidden(friends):
    phone = await friends.enter("juliet")

    assert await phone.refusal("get", QUERY, to=ROMEO) == "forbidden"
    assert await phone.refusal("set", put(NURSE), to=ROMEO) == "forbidden"
    assert await friends.roster("romeo") == {}


@pytest.mark.parametrize(
    ("query", "wanted"),
    [
        (put(JULIET), "not-allowed"),
        (put(f"{JULIET}/phone"), "not-allowed"),
        (put(ROMEO, "x" * 31), "not-acceptable"),
        (put("ro@meo@x"), "jid-malformed"),
        (remove(ROMEO), "item-not-found"),
    ],
)
async def test_a_wrong_item_changes_nothing(friends, query, wanted):
    phone = await friends.enter("juliet")

    assert await phone.refusal("set", query) == wanted
    assert pushes(phone) == []
    assert await friends.roster("juliet") == {}


async def test_a_full_roster_takes_changes_but_nobody_new(friends):
    phone = await friends.enter("juliet")
    for number in range(5):
        await phone.ask("set", put(f"friend{number}@{HOST}"))

    refused = await phone.refusal("set", put(NURSE))
    changed = await phone.ask("set", put(f"friend0@{HOST}", "Old friend"))
    await phone.send(f"<presence type='subscribe' to='{NURSE}' id='s'/>")

    assert refused == "resource-constraint"
    assert changed.type == "result"
    assert condition(phone.received[-1]) == "resource-constraint"
    assert NURSE not in await friends.roster("juliet")


async def test_removing_a_contact_ends_both_subscriptions(friends):
    await friends.befriend("juliet", "romeo")
    juliet, romeo = await friends.come("juliet"), await friends.come("romeo")
    juliet.received.clear()

    await juliet.ask("set", remove(ROMEO))
    await friends.quiet()

    assert pushes(juliet)[0] == {"jid": ROMEO, "subscription": "remove"}
    assert await friends.roster("juliet") == {}
    assert await friends.roster("romeo") == {JULIET: ("none", "none")}
    assert [item["subscription"] for item in pushes(romeo)] == ["to", "none"]
    assert [kind for sender, kind in presences(romeo) if sender == JULIET] == ["unsubscribe", "unsubscribed"]
    # romeo's presence ends for juliet as hers does for him
    assert (f"{JULIET}/balcony", "unavailable") in presences(romeo)
    assert (f"{ROMEO}/balcony", "unavailable") in presences(juliet)


async def test_a_contact_on_another_server_is_told_of_a_removal(friends):
    juliet = await friends.come("juliet")
    await juliet.send(f"<presence type='subscribe' to='{FAR}'/>")
    friends.sent_away.clear()

    await juliet.ask("set", remove(FAR))

    assert [(stanza.type, stanza.from_.full) for stanza in friends.sent_away] == [("unsubscribe", JULIET)]


# -- subscriptions


async def test_two_users_become_friends(friends):
    juliet, romeo = await friends.come("juliet"), await friends.come("romeo")

    await romeo.send(f"<presence type='subscribe' to='{JULIET}/balcony'><status>hist!</status></presence>")
    await friends.quiet()

    assert pushes(romeo) == [{"jid": JULIET, "subscription": "none", "ask": "subscribe"}]
    request = juliet.received[0]
    assert (request.type, request.from_.full, request.to.full) == ("subscribe", ROMEO, f"{JULIET}/balcony")
    assert request.element.findtext("{jabber:client}status") == "hist!"
    assert pushes(juliet) == []  # a request alone is nothing a client has to see in its roster

    romeo.received.clear()
    juliet.received.clear()
    await juliet.send(f"<presence type='subscribed' to='{ROMEO}'/>")
    await friends.quiet()

    assert pushes(juliet) == [{"jid": ROMEO, "subscription": "from"}]
    assert story(romeo) == ["subscribed", "push", "available"]  # RFC 6121 3.1.6
    assert pushes(romeo) == [{"jid": JULIET, "subscription": "to"}]
    assert presences(romeo, "available") == [(f"{JULIET}/balcony", "available")]

    await juliet.send(f"<presence type='subscribe' to='{ROMEO}'/>")
    await romeo.send(f"<presence type='subscribed' to='{JULIET}'/>")
    await friends.quiet()

    assert await friends.roster("juliet") == {ROMEO: ("both", "none")}
    assert await friends.roster("romeo") == {JULIET: ("both", "none")}
    assert presences(juliet, "available") == [(f"{ROMEO}/balcony", "available")]


async def test_a_request_is_shown_at_every_login_until_it_is_answered(friends):
    romeo = await friends.come("romeo")
    await romeo.send(f"<presence type='subscribe' to='{JULIET}' id='r1'><status>hist!</status></presence>")
    await friends.quiet()
    assert await friends.roster("juliet") == {ROMEO: ("none", "in")}

    for _ in range(2):
        juliet = await friends.enter("juliet")
        assert juliet.received == []
        await juliet.available(-1)
        shown = [stanza for stanza in juliet.received if stanza.type == "subscribe"]
        assert [stanza.id for stanza in shown] == ["r1"]
        assert shown[0].element.findtext("{jabber:client}status") == "hist!"
        await juliet.available(5)  # the same session is not told again
        assert [stanza.id for stanza in juliet.received if stanza.type == "subscribe"] == ["r1"]
        juliet.lose()

    juliet = await friends.enter("juliet")
    await juliet.available()
    await juliet.send(f"<presence type='unsubscribed' to='{ROMEO}'/>")
    await friends.quiet()
    again = await friends.enter("juliet")
    await again.available()

    assert presences(again, "subscribe") == []
    assert await friends.roster("juliet") == {}
    assert await friends.roster("romeo") == {JULIET: ("none", "none")}
    assert presences(romeo, "unsubscribed") == [(JULIET, "unsubscribed")]
    assert pushes(juliet) == []


async def test_a_contact_in_the_roster_who_asks_stays_in_the_roster(friends):
    juliet, romeo = await friends.come("juliet"), await friends.come("romeo")
    await juliet.ask("set", put(ROMEO))
    await romeo.send(f"<presence type='subscribe' to='{JULIET}'/>")
    await friends.quiet()

    items = (await juliet.query("get", QUERY)).findall(ITEM)
    await juliet.send(f"<presence type='unsubscribed' to='{ROMEO}'/>")

    assert [item.get("jid") for item in items] == [ROMEO]
    assert await friends.roster("juliet") == {ROMEO: ("none", "none")}


async def test_a_request_for_nobody_is_silence(friends):
    romeo = await friends.come("romeo")

    await romeo.send(f"<presence type='subscribe' to='tybalt@{HOST}'/>")
    await friends.quiet()

    assert story(romeo) == ["push"]
    assert await friends.roster("tybalt") == {}


async def test_cancelling_ends_the_presence_before_the_subscription(friends):
    await friends.befriend("juliet", "romeo", "from")
    juliet, romeo = await friends.come("juliet"), await friends.come("romeo")
    romeo.received.clear()

    await juliet.send(f"<presence type='unsubscribed' to='{ROMEO}'/>")
    await friends.quiet()

    assert story(romeo) == ["unavailable", "unsubscribed", "push"]  # RFC 6121 3.2.2, 3.2.3
    assert pushes(juliet) == [{"jid": ROMEO, "subscription": "none"}]


async def test_unsubscribing_brings_the_end_of_the_contacts_presence(friends):
    await friends.befriend("juliet", "romeo", "to")
    romeo, juliet = await friends.come("romeo"), await friends.come("juliet")
    juliet.received.clear()

    await juliet.send(f"<presence type='unsubscribe' to='{ROMEO}'/>")
    await friends.quiet()

    assert story(romeo) == ["unsubscribe", "push"]  # RFC 6121 3.3.3
    assert presences(juliet) == [(f"{ROMEO}/balcony", "unavailable")]
    assert await friends.roster("romeo") == {JULIET: ("none", "none")}


async def test_a_request_that_is_granted_already_is_answered_by_the_server(friends):
    await friends.befriend("juliet", "romeo", "from")
    juliet = await friends.come("juliet")

    await friends.deliver(f"<presence type='subscribe' from='{ROMEO}' to='{JULIET}'/>")

    assert juliet.received == []
    await friends.command("add_rosteritem", "juliet", HOST, *FAR.split("@"), "", "", "both")
    await friends.deliver(f"<presence type='subscribe' from='{FAR}' to='{JULIET}'/>")
    assert [(stanza.type, stanza.from_.full) for stanza in friends.sent_away][-2:] == [
        ("subscribed", JULIET),
        ("available", f"{JULIET}/balcony"),
    ]


async def test_strangers_cannot_fill_the_database_with_requests(friends):
    for number in range(4):
        await friends.deliver(f"<presence type='subscribe' from='spam{number}@spam.example' to='{JULIET}'/>")

    assert len(await friends.roster("juliet")) == 2
    assert friends.sent_away == []


async def test_a_huge_request_is_kept_without_its_ballast(friends):
    await friends.deliver(f"<presence type='subscribe' from='{FAR}' to='{JULIET}'><x>{'y' * 20000}</x></presence>")

    juliet = await friends.enter("juliet")
    await juliet.available()

    shown = next(stanza for stanza in juliet.received if stanza.type == "subscribe")
    assert shown.xml == f'<presence from="{FAR}" to="{JULIET}/balcony" type="subscribe"/>'.encode()


async def test_nobody_subscribes_to_themselves(friends):
    juliet = await friends.come("juliet")

    await juliet.send(f"<presence type='subscribe' to='{JULIET}' id='me'/>")

    assert condition(juliet.received[0]) == "not-allowed"


async def test_requests_that_cross_leave_both_rosters_alike(friends):
    juliet, romeo = await friends.come("juliet"), await friends.come("romeo")

    await asyncio.gather(
        juliet.send(f"<presence type='subscribe' to='{ROMEO}'/>"),
        romeo.send(f"<presence type='subscribe' to='{JULIET}'/>"),
    )
    await friends.quiet()

    assert await friends.roster("juliet") == {ROMEO: ("none", "both")}
    assert await friends.roster("romeo") == {JULIET: ("none", "both")}


async def test_stanzas_reach_the_contact_in_the_order_they_were_sent(friends):
    juliet, romeo = await friends.come("juliet"), await friends.come("romeo")

    for _ in range(3):
        await juliet.send(f"<presence type='subscribe' to='{ROMEO}'/>")
        await juliet.ask("set", remove(ROMEO))
    await friends.quiet()

    assert [kind for _, kind in presences(romeo)] == ["subscribe", "unsubscribe"] * 3
    assert await friends.roster("romeo") == {}


async def test_two_nodes_moving_one_item_at_once_lose_no_move(friends, any_url, tmp_path):
    # A second node on the same database: its own modules, caches and connections.
    async with opened(any_url, tmp_path) as storage, Friends(storage) as other:
        await other.load(roster={}, presence={})
        here, there = (node.loader.service(RosterService)._store for node in (friends, other))
        user = parse(JULIET)
        for number in range(5):
            contact = parse(f"friend{number}@montague.example")
            await asyncio.gather(
                here.move(user, contact, "subscribe"), there.move(user, contact, "subscribe", b"<presence/>")
            )
        states = set((await friends.roster("juliet")).values())

    assert states == {("none", "both")}


# -- the cache and the database


async def test_a_change_on_another_node_is_not_hidden_by_the_cache(friends):
    phone = await friends.enter("juliet")
    roster = friends.loader.service(RosterService)
    # What another node does: its cache is not ours.
    await roster._store.edit(parse(JULIET), parse(ROMEO), "Romeo", ())

    await phone.ask("set", put(NURSE))
    noticed = await phone.query("get", QUERY)
    await roster._store.edit(parse(JULIET), parse(FAR), "", ())
    roster.invalidate(parse(JULIET))
    told = await phone.query("get", QUERY)

    assert {item.get("jid") for item in noticed} == {ROMEO, NURSE}
    assert {item.get("jid") for item in told} == {ROMEO, NURSE, FAR}


async def test_rosters_are_kept_while_somebody_is_there(friends):
    roster = friends.loader.service(RosterService)
    phone, laptop = await friends.enter("juliet", "phone"), await friends.enter("juliet", "laptop")
    assert roster.cached(parse(JULIET)) is not None
    assert roster.cached(parse(ROMEO)) is None
    await roster.contacts(parse(ROMEO))
    assert roster.cached(parse(ROMEO)) is None

    phone.lose()
    assert roster.cached(parse(JULIET)) is not None
    laptop.lose()

    assert roster.cached(parse(JULIET)) is None


async def test_logins_at_the_same_time_are_one_query(friends):
    await friends.account(*(f"user{number}" for number in range(30)))
    queries = 0
    read = friends.storage.read

    async def counted(work):
        nonlocal queries
        queries += 1
        return await read(work)

    friends.storage.loader._read = counted
    await asyncio.gather(*(friends.enter(f"user{number}", interested=False) for number in range(30)))

    assert queries <= 2


async def test_without_the_database_nothing_changes_and_the_client_is_told_to_wait(friends, monkeypatch):
    await friends.befriend("juliet", "romeo")
    juliet = await friends.come("juliet")

    async def away(*_args, **_options):
        raise StorageUnavailable("the database is away")

    monkeypatch.setattr(friends.storage, "run", away)
    answers = [await juliet.ask("set", put(NURSE)), await juliet.ask("set", remove(ROMEO))]
    await juliet.send(f"<presence type='unsubscribed' to='{ROMEO}' id='u'/>")
    monkeypatch.undo()

    for stanza in (*answers, juliet.received[-1]):
        assert stanza.element.find("{jabber:client}error").get("type") == "wait"
    assert pushes(juliet) == []
    assert friends.sent_away == []
    items = (await juliet.query("get", QUERY)).findall(ITEM)
    assert [(item.get("jid"), item.get("subscription")) for item in items] == [(ROMEO, "both")]


async def test_the_end_of_an_account_is_told_to_its_contacts(friends):
    await friends.befriend("juliet", "romeo")
    await friends.befriend("juliet", "nurse", "to")
    juliet, romeo = await friends.come("juliet"), await friends.come("romeo")
    await juliet.send(f"<presence type='subscribe' to='{FAR}'/>")
    friends.sent_away.clear()

    await friends.accountant.remove(HOST, "juliet")
    await friends.quiet()

    assert await friends.roster("juliet") == {}
    assert await friends.roster("romeo") == {JULIET: ("none", "none")}
    assert await friends.roster("nurse") == {JULIET: ("none", "none")}
    assert [stanza.type for stanza in friends.sent_away] == ["unsubscribe"]
    assert (f"{JULIET}/balcony", "unavailable") in presences(romeo)


# -- operators


async def test_an_operators_item_is_pushed_and_listed(friends):
    juliet = await friends.come("juliet")

    await friends.command("add_rosteritem", "juliet", HOST, "romeo", HOST, "Romeo", "Friends;Lovers;Friends", "both")
    await friends.command("add_rosteritem", "juliet", HOST, "nurse", HOST, "", "", "none")
    listed = await friends.command("get_roster", "juliet", HOST)
    await friends.command("delete_rosteritem", "juliet", HOST, "nurse", HOST)
    await friends.command("delete_rosteritem", "juliet", HOST, "nurse", HOST)

    assert pushes(juliet) == [
        {"jid": ROMEO, "name": "Romeo", "subscription": "both"},
        {"jid": NURSE, "subscription": "none"},
        {"jid": NURSE, "subscription": "remove"},
    ]
    assert listed == [
        (NURSE, "", "none", "undefined", ""),
        (ROMEO, "Romeo", "both", "undefined", "Friends"),
        (ROMEO, "Romeo", "both", "undefined", "Lovers"),
    ]


async def test_a_name_that_no_stream_can_carry_is_refused(friends):
    with pytest.raises(Exception, match="XML cannot carry"):
        await friends.command("add_rosteritem", "juliet", HOST, "romeo", HOST, "Ro\x01meo", "", "both")

    assert await friends.roster("juliet") == {}


async def test_a_roster_of_several_pages_is_whole(friends, monkeypatch):
    monkeypatch.setattr("modules.roster.store._PAGE", 2)
    monkeypatch.setattr("modules.roster._WITHOUT_PAUSE", 2)
    for name in ("juliet", "romeo"):
        for number in range(5):
            await friends.command("add_rosteritem", name, HOST, f"friend{number}", HOST, "", "", "both")

    juliet, romeo = await asyncio.gather(friends.enter("juliet"), friends.enter("romeo"))

    for client in (juliet, romeo):
        items = (await client.query("get", QUERY)).findall(ITEM)
        assert sorted(item.get("jid") for item in items) == [f"friend{number}@{HOST}" for number in range(5)]


async def test_a_roster_may_have_no_version_and_a_version_no_roster(friends, monkeypatch):
    monkeypatch.setattr("modules.roster.store._PAGE", 2)
    for name in ("juliet", "romeo", "nurse"):
        for number in range(5):
            await friends.command("add_rosteritem", name, HOST, f"friend{number}", HOST, "", "", "both")

    async def work(connection):
        await connection.exec_driver_sql("DELETE FROM roster_version WHERE username = 'juliet'")
        await connection.exec_driver_sql("DELETE FROM roster_item WHERE username = 'nurse'")

    await friends.storage.run(work)
    service = friends.loader.service(RosterService)
    loads = [service._store.load(parse(f"{name}@{HOST}")) for name in ("juliet", "romeo", "nurse")]
    juliet, romeo, nurse = await asyncio.gather(*loads)  # one query

    assert (juliet.version, len(juliet.items)) == ("", 5)
    assert (bool(romeo.version), len(romeo.items)) == (True, 5)
    assert (bool(nurse.version), len(nurse.items)) == (True, 0)


async def test_a_change_while_a_long_roster_is_written_is_in_it(friends, monkeypatch):
    monkeypatch.setattr("modules.roster._WITHOUT_PAUSE", 1)
    phone, laptop = await friends.enter("juliet", "phone"), await friends.enter("juliet", "laptop", interested=False)
    for number in range(4):
        await phone.ask("set", put(f"friend{number}@{HOST}"))

    query, _ = await asyncio.gather(laptop.query("get", QUERY), phone.ask("set", remove(f"friend3@{HOST}")))

    listed = {item.get("jid") for item in query.findall(ITEM)}
    for item in pushes(laptop):
        listed = listed - {item["jid"]} if item["subscription"] == "remove" else listed | {item["jid"]}
    assert listed == {f"friend{number}@{HOST}" for number in range(3)}


# -- what ejabberdctl prints


@pytest.fixture
async def recorded(sqlite_url: str, tmp_path: Path) -> AsyncIterator[Friends]:
    """The accounts of the recordings, who know nobody."""
    async with opened(sqlite_url, tmp_path) as storage, Friends(storage) as world:
        world.hosts = ("localhost", "capulet.example")
        world.serve("localhost")
        await world.load(roster={}, presence={})
        yield world
        await world.quiet()


def in_words(xml: bytes) -> list[object]:
    """The item of a push, without what differs from one server to another."""
    query = Stanza.from_bytes(xml).payload
    assert query is not None
    return [dict(query[0].attrib), [group.text for group in query[0]]]


@pytest.mark.parametrize("command", ["add_rosteritem", "delete_rosteritem", "get_roster"])
async def test_operators_see_what_ejabberdctl_showed(recorded, command):
    record = next(each for each in compare.files() if each["command"] == command)
    for argv in record["given"]["before"]:
        await recorded.command(*argv)
    clients = {}
    for online in record["given"]["online"]:
        client = recorded.login_as(f"{online['user']}@localhost/{online['resource']}")
        await client.query("get", QUERY)
        await client.send(online["presence"])
        clients[f"{online['user']}/{online['resource']}"] = client
    told = 0
    for case in record["cases"]:
        if "too few" in case["name"]:
            continue  # the registry's work
        name, *args = case["argv"]
        try:
            result = await recorded.registry.call(name, args, caller=Caller("test", "test"))
            printed, code = result.text(), result.code
        except CommandError as error:
            printed, code = f"Error: {error.text}\n", error.code
        compare.check(command, case, printed, code, node="xmppd@localhost", version="0")

        for whose, wanted in case.get("received", {}).items():
            got = [s.xml for s in clients[whose].received if s.kind == "iq" and s.type == "set"][told:]
            pieces = [f"<iq{piece}" for piece in wanted.split("<iq")[1:]]
            told += len(pieces)
            assert [in_words(xml) for xml in got[: len(pieces)]] == [in_words(piece.encode()) for piece in pieces]
