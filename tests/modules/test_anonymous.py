"""An anonymous account and the modules: it can talk, nothing is kept of it, and then nobody has been there."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.databases import opened
from tests.modules.friends import QUERY, Friends
from tests.modules.world import HOST, Client, condition, message
from xmppd.errors import StorageUnavailable
from xmppd.events import UserDeleted

GUEST = "5b1dc1a6ab1d4d4c8e2f6b3f0f6c7d21"
MODULES = ("roster", "presence", "offline", "disco", "ping", "version", "time", "last", "private", "vcard", "register")
NOTE = "<query xmlns='jabber:iq:private'><note xmlns='urn:x'>secret</note></query>"


@pytest.fixture
async def world(sqlite_url: str, tmp_path: Path) -> AsyncIterator[Friends]:
    async with opened(sqlite_url, tmp_path) as storage, Friends(storage) as world:
        await world.load(**{name: {} for name in MODULES})
        await world.account("juliet")
        yield world


async def bound(world: Friends) -> Client:
    """A session of a guest, as after bind."""
    guest = world.login(GUEST, anonymous=True)
    waiting = guest.session.bound()
    if waiting is not None:
        await waiting
    return guest


async def traces(world: Friends) -> list[str]:
    """The tables that know of the guest."""

    async def work(connection: Any) -> list[str]:
        tables = await connection.exec_driver_sql("SELECT name FROM sqlite_master WHERE type = 'table'")
        found = []
        for name in tables.scalars().all():
            rows = (await connection.exec_driver_sql(f"SELECT * FROM {name}")).all()
            found += [name for row in rows if any(GUEST in str(value) for value in row)]
        return found

    return await world.storage.read(work)


async def test_nothing_is_kept_of_an_anonymous_account(world):
    guest = await bound(world)
    assert len(await guest.query("get", QUERY)) == 0
    await guest.available()
    for payload in (
        "<query xmlns='jabber:iq:roster'><item jid='juliet@capulet.example'/></query>",
        "<vCard xmlns='vcard-temp'><FN>Nobody</FN></vCard>",
        NOTE,
        "<query xmlns='jabber:iq:register'><username>x</username><password>y</password></query>",
    ):
        assert await guest.refusal("set", payload) == "not-allowed"
        assert await guest.refusal("set", payload, f"{GUEST}@{HOST}") == "not-allowed"
    for kind in ("subscribe", "subscribed", "unsubscribe", "unsubscribed"):
        await guest.send(f"<presence type='{kind}' to='juliet@{HOST}'/>")
        assert condition(guest.received.pop()) == "not-allowed"
    await guest.send("<presence type='unavailable'/>")
    guest.session.close(clean=True)

    await world.until(lambda: not world.manager.sessions(guest.session.user))
    again = await bound(world)  # whatever was on its way to the database has arrived behind this
    await again.available()
    again.session.close(clean=False)
    juliet = world.login("juliet")
    juliet.session.close(clean=True)  # the last activity of somebody who has an account comes behind all of it
    await world.until_true(lambda: _has_rows(world, "last_activity"))
    assert await traces(world) == []


async def _has_rows(world: Friends, table: str) -> bool:
    async def work(connection: Any) -> bool:
        return bool((await connection.exec_driver_sql(f"SELECT COUNT(*) FROM {table}")).scalar_one())

    return await world.storage.read(work)


async def test_nobody_can_subscribe_to_an_anonymous_account(world):
    guest, juliet = await bound(world), await world.online("juliet")
    await guest.available()
    before = len(guest.received)
    await juliet.send(f"<presence type='subscribe' to='{GUEST}@{HOST}'/>")
    assert guest.received[before:] == []
    assert await traces(world) in ([], ["roster_item"])  # juliet's own roster may remember that she asked
    assert not [table for table in await traces(world) if table != "roster_item"]


async def test_a_message_waits_for_no_anonymous_user(world):
    """Neither before it is available, nor while it takes none, nor when it has gone."""
    guest, juliet = await bound(world), await world.online("juliet")
    for step in (None, -1, 0, "gone"):
        if step == "gone":
            guest.session.close(clean=True)
        elif step is not None:
            await guest.available(step)
        juliet.received.clear()
        outcome = await juliet.send(message(f"{GUEST}@{HOST}", f"step {step}"))
        if step != 0:
            await world.settled(outcome)
        if step == 0:
            assert guest.bodies == ["step 0"]
            assert juliet.received == []
        else:
            assert [condition(stanza) for stanza in juliet.received] == ["service-unavailable"]
    assert guest.bodies == ["step 0"]
    assert await world.rows(GUEST) == []


async def test_what_an_anonymous_client_had_not_taken_comes_back(world):
    guest, juliet = await bound(world), await world.online("juliet")
    await guest.available()
    guest.stalled = True
    outcome = await juliet.send(message(f"{GUEST}@{HOST}"))
    guest.lose()
    await world.settled(outcome)
    assert condition(juliet.received[-1]) == "service-unavailable"
    assert await world.rows(GUEST) == []


async def test_an_anonymous_login_needs_no_database(world, monkeypatch):
    async def away(*_: Any) -> Any:
        raise StorageUnavailable("away")

    monkeypatch.setattr(world.storage, "run", away)
    monkeypatch.setattr(world.storage, "read", away)
    monkeypatch.setattr(world.storage.loader, "get", away)
    monkeypatch.setattr(world.spool, "take", away, raising=False)
    guest = await bound(world)
    assert len(await guest.query("get", QUERY)) == 0
    await guest.available()
    other = world.login("another", anonymous=True)
    await guest.send(message(other.session.jid.full, "hello"))
    assert other.bodies == ["hello"]


async def test_nobody_is_told_that_an_anonymous_account_was_deleted(world):
    """Those who listen clean up in the database."""
    told: list[UserDeleted] = []
    world.hooks.add("test", UserDeleted, told.append)
    guest = await bound(world)
    guest.session.close(clean=True)
    assert told == []


async def test_what_ends_with_the_session_can_be_set(world):
    seen: list[Any] = []
    world.iqs.add("test", "account", "set", "urn:x", "enable", seen.append, anonymous=True)
    world.iqs.add("test", "account", "set", "urn:y", "enable", seen.append)
    guest = await bound(world)
    assert (await guest.ask("set", "<enable xmlns='urn:x'/>")).type == "result"
    assert await guest.refusal("set", "<enable xmlns='urn:y'/>") == "not-allowed"
    assert await guest.refusal("set", "<enable xmlns='urn:z'/>") == "service-unavailable"
    assert len(seen) == 1
