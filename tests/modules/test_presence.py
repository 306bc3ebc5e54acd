"""The presence module: who is told of whom, and when."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.databases import opened
from tests.modules.friends import FAR, JULIET, NURSE, QUERY, ROMEO, Friends, presences
from tests.modules.world import HOST, condition
from xmppd.errors import StorageUnavailable
from xmppd.events import ConfigReloaded, SessionBecameUnavailable, StanzaDelivering
from xmppd.module_api import Contact
from xmppd.protocol.jid import parse

DELAY = "{urn:xmpp:delay}delay"
ROOM = "capulets@conference.montague.example/juliet"


@pytest.fixture
async def friends(sqlite_url: str, tmp_path: Path) -> AsyncIterator[Friends]:
    async with opened(sqlite_url, tmp_path) as storage, Friends(storage) as world:
        await world.begin()
        yield world
        await world.quiet()


async def test_the_first_presence_brings_everybody_together(friends):
    await friends.befriend("juliet", "romeo")
    await friends.befriend("juliet", "nurse", "to")
    romeo, nurse, laptop = [await friends.come(name) for name in ("romeo", "nurse", "juliet")]

    phone = await friends.enter("juliet", "phone")
    await phone.send("<presence><show>away</show><priority>3</priority></presence>")
    await friends.quiet()

    assert presences(romeo) == [(f"{JULIET}/balcony", "available"), (f"{JULIET}/phone", "available")]
    assert [stanza.to.full for stanza in romeo.received] == [ROMEO, ROMEO]
    assert presences(nurse) == []  # she does not see juliet
    assert presences(laptop) == [(f"{JULIET}/phone", "available")]
    assert presences(phone)[0] == (f"{JULIET}/phone", "available")  # its own, RFC 6121 4.2.2
    assert sorted(presences(phone)[1:]) == [
        (f"{JULIET}/balcony", "available"),
        (f"{NURSE}/balcony", "available"),
        (f"{ROMEO}/balcony", "available"),
    ]
    brought = [stanza for stanza in phone.received if stanza.from_.bare != JULIET]
    assert all(stanza.element.find(DELAY) is not None for stanza in brought)


async def test_two_who_become_available_at_the_same_moment_see_each_other(friends):
    await friends.befriend("juliet", "romeo")

    for _ in range(20):
        juliet, romeo = await friends.enter("juliet"), await friends.enter("romeo")
        await asyncio.gather(juliet.available(), romeo.available())
        await friends.quiet()

        assert (f"{ROMEO}/balcony", "available") in presences(juliet)
        assert (f"{JULIET}/balcony", "available") in presences(romeo)
        juliet.lose()
        romeo.lose()


async def test_later_presence_is_broadcast_and_nothing_is_asked_again(friends):
    await friends.befriend("juliet", "romeo")
    await friends.command("add_rosteritem", "juliet", HOST, *FAR.split("@"), "", "", "both")
    romeo, juliet = await friends.come("romeo"), await friends.come("juliet")
    assert [(s.type, s.from_.full, s.to.full) for s in friends.sent_away] == [
        ("available", f"{JULIET}/balcony", FAR),
        ("probe", f"{JULIET}/balcony", FAR),
    ]
    friends.sent_away.clear()
    romeo.received.clear()

    await juliet.send("<presence><show>dnd</show></presence>")

    assert presences(romeo) == [(f"{JULIET}/balcony", "available")]
    assert presences(juliet) == [(f"{JULIET}/balcony", "available")]
    assert [stanza.type for stanza in friends.sent_away] == ["available"]


async def test_the_same_presence_again_is_a_sign_of_life(friends):
    await friends.befriend("juliet", "romeo")
    romeo, juliet = await friends.come("romeo"), await friends.enter("juliet")
    await juliet.send("<presence id='1'><show>away</show><status>gone</status></presence>")
    romeo.received.clear()

    await juliet.send("<presence id='2'><status>gone</status><show>away</show></presence>")
    await juliet.send(f"<presence to='{JULIET}'><show>away</show><status>gone</status></presence>")
    assert presences(romeo) == []

    await juliet.send("<presence><show>away</show><status>back soon</status></presence>")
    assert len(presences(romeo)) == 1

    friends.advanced += 61
    await juliet.send("<presence><show>away</show><status>back soon</status></presence>")
    assert len(presences(romeo)) == 2

    friends.routing.presence_coalesce = 0
    await juliet.send("<presence><show>away</show><status>back soon</status></presence>")
    assert len(presences(romeo)) == 3


async def test_presence_to_the_own_bare_jid_is_own_presence(friends):
    await friends.befriend("juliet", "romeo")
    romeo, juliet = await friends.come("romeo"), await friends.enter("juliet")

    await juliet.send(f"<presence to='{JULIET}'/>")

    assert presences(romeo) == [(f"{JULIET}/balcony", "available")]
    assert romeo.received[0].xml.count(b" to=") == 1


@pytest.mark.parametrize("priority", ["128", "-129", "high"])
async def test_a_priority_that_is_none_is_refused_and_nobody_is_told(friends, priority):
    await friends.befriend("juliet", "romeo")
    romeo, juliet = await friends.come("romeo"), await friends.enter("juliet")

    await juliet.send(f"<presence><priority>{priority}</priority></presence>")

    assert condition(juliet.received[0]) == "bad-request"
    assert juliet.session.presence is None
    assert presences(romeo) == []


@pytest.mark.parametrize("how", ["presence", "connection"])
async def test_the_end_is_told_once_to_everybody_who_saw_the_beginning(friends, how):
    await friends.befriend("juliet", "romeo")
    romeo, nurse = await friends.come("romeo"), await friends.come("nurse")
    laptop, phone = await friends.come("juliet", "laptop"), await friends.come("juliet", "phone")
    for target in (NURSE, f"{ROMEO}/balcony", ROOM):
        await phone.send(f"<presence to='{target}'/>")
    for client in (romeo, nurse, laptop):
        client.received.clear()
    friends.sent_away.clear()

    if how == "presence":
        await phone.send("<presence type='unavailable'><status>farewell</status></presence>")
        phone.lose()
    else:
        phone.lose()
    await friends.quiet()

    for client in (romeo, nurse, laptop):
        assert presences(client) == [(f"{JULIET}/phone", "unavailable")]
    assert [(stanza.type, stanza.to.full) for stanza in friends.sent_away] == [("unavailable", ROOM)]


async def test_a_session_that_was_never_available_ends_for_its_directed_targets_alone(friends):
    await friends.befriend("juliet", "romeo")
    romeo, nurse = await friends.come("romeo"), await friends.come("nurse")
    juliet = await friends.enter("juliet")
    await juliet.send(f"<presence to='{NURSE}'/>")

    juliet.lose()
    await friends.quiet()

    assert presences(nurse) == [(f"{JULIET}/balcony", "available"), (f"{JULIET}/balcony", "unavailable")]
    assert presences(romeo) == []


async def test_who_was_told_the_end_by_hand_is_not_told_again(friends):
    nurse, juliet = await friends.come("nurse"), await friends.come("juliet")
    await juliet.send(f"<presence to='{NURSE}'/>")
    await juliet.send(f"<presence to='{NURSE}' type='unavailable'/>")

    juliet.lose()
    await friends.quiet()

    assert [kind for _, kind in presences(nurse)] == ["available", "unavailable"]


async def test_where_directed_presence_bounced_no_end_is_told(friends):
    juliet = await friends.come("juliet")
    await juliet.send(f"<presence to='{ROOM}'/>")
    error = "<error type='cancel'><conflict xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/></error>"
    await friends.deliver(f"<presence type='error' from='{ROOM}' to='{JULIET}/balcony'>{error}</presence>")
    friends.sent_away.clear()

    juliet.lose()
    await friends.quiet()

    assert friends.sent_away == []


async def test_directed_presence_has_a_bound(friends):
    await friends.loader.apply(friends.loader.prepare({"roster": {}, "presence": {"max_directed": 2}}))
    juliet = await friends.come("juliet")
    for number in range(2):
        await juliet.send(f"<presence to='room{number}@conference.montague.example/j'/>")
    friends.sent_away.clear()

    await juliet.send("<presence to='room2@conference.montague.example/j' id='third'/>")
    await juliet.send("<presence to='room1@conference.montague.example/j'/>")

    assert condition(juliet.received[-1]) == "resource-constraint"
    assert [stanza.to.local for stanza in friends.sent_away] == ["room1"]


# -- probes


async def probe(friends: Friends, sender: str, to: str) -> list[tuple[str, str, bool]]:
    """(from, type, delayed?) of the answers."""
    friends.sent_away.clear()
    await friends.deliver(f"<presence type='probe' from='{sender}' to='{to}'/>")
    return [(s.from_.full, s.type, s.element.find(DELAY) is not None) for s in friends.sent_away]


async def test_a_probe_is_answered_once_for_the_account(friends):
    await friends.command("add_rosteritem", "juliet", HOST, *FAR.split("@"), "", "", "from")
    phone, laptop = await friends.come("juliet", "phone"), await friends.come("juliet", "laptop", -1)
    await friends.enter("juliet", "silent")

    everybody = await probe(friends, f"{FAR}/orchard", JULIET)
    one = await probe(friends, FAR, f"{JULIET}/phone")

    assert sorted(everybody) == [(f"{JULIET}/laptop", "available", True), (f"{JULIET}/phone", "available", True)]
    assert one == [(f"{JULIET}/phone", "available", True)]
    assert phone.received[1:] == laptop.received  # the probe itself is for the server


async def test_a_probe_for_an_absent_user_gets_the_last_unavailable(friends):
    await friends.command("add_rosteritem", "juliet", HOST, *FAR.split("@"), "", "", "both")
    never = await probe(friends, FAR, JULIET)
    juliet = await friends.come("juliet")
    await juliet.send("<presence type='unavailable'><status>asleep</status></presence>")
    juliet.lose()

    after = await probe(friends, FAR, JULIET)

    assert never == [(JULIET, "unavailable", False)]
    assert after == [(f"{JULIET}/balcony", "unavailable", True)]
    assert friends.sent_away[0].element.findtext("{jabber:client}status") == "asleep"


@pytest.mark.parametrize("account", ["juliet", "nobody"])
async def test_a_probe_without_the_right_to_know_tells_nothing_of_the_account(friends, account):
    await friends.come("juliet")

    assert await probe(friends, f"{FAR}/x", f"{account}@{HOST}") == [(f"{account}@{HOST}", "unsubscribed", False)]
    assert friends.sent_away[0].to.full == FAR


async def test_somebody_who_took_the_right_back_is_not_brought(friends):
    await friends.command("add_rosteritem", "juliet", HOST, "romeo", HOST, "", "", "to")
    await friends.come("romeo")

    juliet = await friends.enter("juliet")
    await juliet.available()
    await friends.quiet()

    assert [sender for sender, _ in presences(juliet)] == [f"{JULIET}/balcony"]


# -- IQs for those who may know


async def test_a_request_from_a_stranger_is_not_delivered_when_presence_is_needed(friends):
    await friends.befriend("juliet", "romeo")
    juliet, romeo, nurse = [await friends.come(name) for name in ("juliet", "romeo", "nurse")]
    ask = f"<iq type='get' id='i' to='{JULIET}/balcony'><query xmlns='jabber:iq:version'/></iq>"
    await nurse.send(ask)
    assert [stanza.id for stanza in juliet.received] == ["", "i"]  # romeo's presence; the request, for anybody may ask
    assert not friends.hooks.wants(StanzaDelivering)
    juliet.received.clear()

    friends.routing.iq_needs_presence = True
    await friends.tell(ConfigReloaded())
    await nurse.send(ask)
    assert condition(nurse.received[-1]) == "service-unavailable"
    assert juliet.received == []

    await romeo.send(ask)
    await friends.deliver(
        f"<iq type='get' id='p' from='{HOST}' to='{JULIET}/balcony'><ping xmlns='urn:xmpp:ping'/></iq>"
    )
    assert [stanza.id for stanza in juliet.received] == ["i", "p"]

    await juliet.send(f"<presence to='{NURSE}/balcony'/>")
    await nurse.send(ask)
    assert juliet.received[-1].id == "i"

    friends.routing.iq_needs_presence = False
    await friends.tell(ConfigReloaded())
    assert not friends.hooks.wants(StanzaDelivering)


# -- trouble and size


async def test_presence_is_told_when_the_database_is_back(friends, monkeypatch):
    await friends.befriend("juliet", "romeo")
    romeo = await friends.come("romeo")
    monkeypatch.setattr("modules.presence._RETRY", 0.01)
    loader = friends.storage.loader
    read = loader._read

    async def away(work):
        raise StorageUnavailable("the database is away")

    loader._read = away
    juliet = friends.login("juliet")
    await juliet.session.bound()
    await juliet.available()
    assert presences(romeo) == []

    loader._read = read
    await friends.until(lambda: presences(romeo))

    assert presences(romeo) == [(f"{JULIET}/balcony", "available")]
    await friends.until(lambda: (f"{ROMEO}/balcony", "available") in presences(juliet))


async def test_presence_survives_a_reload_of_both_modules(friends):
    await friends.befriend("juliet", "romeo")
    juliet, romeo, nurse = [await friends.come(name) for name in ("juliet", "romeo", "nurse")]
    await juliet.send(f"<presence to='{NURSE}'/>")

    await friends.loader.reload("roster")
    await friends.loader.reload("presence")
    await juliet.send("<presence><show>xa</show></presence>")
    juliet.lose()
    await friends.quiet()

    assert [kind for _, kind in presences(romeo)] == ["available", "unavailable"]
    assert [kind for _, kind in presences(nurse)] == ["available", "unavailable"]


async def test_ten_thousand_contacts_do_not_stop_the_loop(friends):
    """A roster of that size, half of them online: no callback of the loop may take long, and the order is kept."""
    contacts = {
        jid: Contact(parse(jid), "both", "none", "", ()) for jid in (f"friend{n}@{HOST}" for n in range(10_000))
    }
    juliet = await friends.enter("juliet")
    roster = friends.loader.service(friends.loader._loaded["roster"].instance.provides[0])
    roster._rosters._kept[JULIET].items = contacts
    listeners = [friends.login(f"friend{number}") for number in range(0, 10_000, 2)]
    for listener in listeners:
        friends.manager.set_priority(listener.session.row, 0)
        listener.write = listener.received.append  # bytes: parsing them is the client's work
    longest = await longest_pause_of(juliet.available())
    juliet.lose()
    longest = max(longest, await longest_pause_of(friends.quiet()))

    wanted = [b"available" if kind == "available" else b"unavailable" for kind in ("available", "unavailable")]
    for listener in listeners:
        assert [b"unavailable" in data for data in listener.received] == [b"un" in kind for kind in wanted]
    assert longest < 0.05


async def longest_pause_of(work) -> float:
    """Seconds of work between two turns of others; what the machine does meanwhile does not count."""
    longest, running = 0.0, True

    async def watch() -> None:
        nonlocal longest
        while running:
            before = time.thread_time()
            await asyncio.sleep(0)
            longest = max(longest, time.thread_time() - before)

    watcher = asyncio.create_task(watch())
    await asyncio.sleep(0)
    await work
    running = False
    await watcher
    return longest


async def test_nobody_gets_an_old_presence_after_the_end(friends):
    contacts = {jid: Contact(parse(jid), "from", "none", "", ()) for jid in (f"friend{n}@{HOST}" for n in range(3000))}
    juliet = await friends.enter("juliet")
    roster = friends.loader.service(friends.loader._loaded["roster"].instance.provides[0])
    roster._rosters._kept[JULIET].items = contacts
    last = friends.login("friend2999")
    friends.manager.set_priority(last.session.row, 0)

    coming = asyncio.create_task(juliet.available())
    await friends.until(lambda: juliet.session.presence is not None)
    juliet.lose()  # while the broadcast is under way
    await coming
    await friends.quiet()

    assert presences(last) == [(f"{JULIET}/balcony", "unavailable")]


async def test_the_end_is_told_even_if_other_handlers_of_it_wait(friends):
    await friends.befriend("juliet", "romeo")
    romeo, juliet = await friends.come("romeo"), await friends.come("juliet")

    async def slow(event: SessionBecameUnavailable) -> None:
        await asyncio.sleep(0)

    friends.hooks.add("slow", SessionBecameUnavailable, slow)
    juliet.lose()
    await friends.quiet()

    assert presences(romeo)[-1] == (f"{JULIET}/balcony", "unavailable")
    friends.hooks.remove("slow")
    assert (await romeo.ask("get", QUERY)).type == "result"
