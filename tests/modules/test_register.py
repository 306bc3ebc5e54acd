"""In-band registration: who may, how often, and what they are told."""

from ipaddress import ip_address
from typing import Any

import pytest

from tests.modules.world import HOST, Client, World, condition
from xmppd.errors import StorageUnavailable
from xmppd.events import FeaturesOffering, Handled, UnauthenticatedIq
from xmppd.protocol.stanza import Stanza

REGISTER = "{jabber:iq:register}"


def query(inner: str) -> str:
    return f"<query xmlns='jabber:iq:register'>{inner}</query>"


def new(username: str = "juliet", password: str = "rose") -> str:
    return query(f"<username>{username}</username><password>{password}</password>")


async def as_stranger(
    world: World, type: str, inner: str, *, encrypted: bool = True, address: str = "192.0.2.1", to: str | None = HOST
) -> Stanza | None:
    """What somebody who is not logged in is answered; None: nothing of ours."""
    replies: list[Stanza] = []
    to = f" to='{to}'" if to else ""
    stanza = Stanza.from_bytes(f"<iq type='{type}' id='r1'{to}>{inner}</iq>".encode())
    event = UnauthenticatedIq(HOST, address, encrypted, stanza, replies.append)
    decision: Any = world.hooks.decide(event)
    if not isinstance(decision, Handled | UnauthenticatedIq):
        decision = await decision
    assert isinstance(decision, Handled) == bool(replies)
    return replies[0] if replies else None


async def logged_in(world: World, **options: Any) -> Client:
    await world.load(register=options)
    await world.account("juliet")
    return await world.online("juliet")


async def test_a_stranger_is_told_the_fields_and_gets_an_account(world):
    await world.load(register={"instructions": "Be <nice>"})

    form = await as_stranger(world, "get", query(""))
    made = await as_stranger(world, "set", new())

    assert form.payload.findtext(f"{REGISTER}instructions") == "Be <nice>"
    assert form.payload.find(f"{REGISTER}username") is not None
    assert form.payload.find(f"{REGISTER}password") is not None
    assert (made.type, made.id, made.from_.full, made.payload) == ("result", "r1", HOST, None)
    assert await world.accounts.exists(HOST, "juliet")


async def test_names_are_prepared_before_they_are_compared(world):
    await world.load(register={})
    await as_stranger(world, "set", new("Juliet"))

    answer = await as_stranger(world, "set", new("JULIET"))

    assert condition(answer) == "conflict"
    assert await world.accounts.names(HOST) == ["juliet"]


@pytest.mark.parametrize(("inner", "expected"), [
    (new("juliet", ""), "not-acceptable"),
    (new("", "rose"), "not-acceptable"),
    (query(""), "not-acceptable"),
    (new("ju liet"), "not-acceptable"),
    (new("juliet@elsewhere.example"), "not-acceptable"),
    (new("j" * 1024), "not-acceptable"),
    (new(password="x" * 1025), "not-acceptable"),
    (query("<remove/>"), "unexpected-request"),
])  # fmt: skip
async def test_requests_of_strangers_that_are_refused(world, inner, expected):
    await world.load(register={})

    answer = await as_stranger(world, "set", inner)

    assert condition(answer) == expected
    assert answer.payload.tag == "{jabber:client}error"  # the password is not sent back
    assert await world.accounts.names(HOST) == []


async def test_passwords_do_not_travel_in_clear(world):
    await world.load(register={})

    assert condition(await as_stranger(world, "get", query(""), encrypted=False)) == "not-acceptable"
    assert condition(await as_stranger(world, "set", new(), encrypted=False)) == "not-acceptable"
    assert await world.accounts.names(HOST) == []


@pytest.mark.parametrize(("required", "encrypted", "authenticated", "offered"), [
    (True, True, False, True), (True, False, False, False), (False, False, False, True), (True, True, True, False),
])  # fmt: skip
async def test_the_stream_feature_is_offered_where_it_works(world, required, encrypted, authenticated, offered):
    await world.load(register={"require_encryption": required})
    event = FeaturesOffering(HOST, authenticated, encrypted, [])

    world.hooks.decide(event)

    assert event.features == ([b'<register xmlns="http://jabber.org/features/iq-register"/>'] if offered else [])
    if not authenticated:
        answer = await as_stranger(world, "set", new(), encrypted=encrypted)
        assert (answer.type == "result") == offered


@pytest.mark.parametrize(("same", "other"), [
    ("192.0.2.1", "192.0.2.2"), ("2001:db8::1", "2001:db8:0:1::1"), ("::ffff:192.0.2.1", "::ffff:192.0.2.2"),
])  # fmt: skip
async def test_an_address_has_a_limit(world, same, other):
    await world.load(register={"per_address": "2/h"})
    for name in ("one", "two"):
        assert (await as_stranger(world, "set", new(name), address=same)).type == "result"

    neighbour = "2001:db8::ffff" if ip_address(same).version == 6 and "." not in same else same
    too_many = await as_stranger(world, "set", new("three"), address=neighbour)
    elsewhere = await as_stranger(world, "set", new("four"), address=other)
    world.advanced += 3601
    later = await as_stranger(world, "set", new("five"), address=same)

    assert condition(too_many) == "resource-constraint"
    assert too_many.element[0].get("type") == "wait"
    assert (elsewhere.type, later.type) == ("result", "result")
    assert "three" not in await world.accounts.names(HOST)


async def test_the_memory_of_addresses_is_bounded():
    from modules.register import Attempts
    from xmppd.config.types import Rate

    attempts = Attempts(Rate(1, 3600.0), lambda: 0.0)

    for number in range(12_000):
        assert attempts.one_more(str(ip_address(number + (10 << 24))))

    assert len(attempts._times) == 10_000


async def test_other_requests_of_strangers_are_nobodys(world):
    await world.load(register={})

    assert await as_stranger(world, "get", "<ping xmlns='urn:xmpp:ping'/>") is None
    assert await as_stranger(world, "get", query("") + query("")) is None


async def test_without_the_database_registration_says_try_later(world, monkeypatch):
    await world.load(register={})

    async def away(*args: Any, **options: Any) -> Any:
        raise StorageUnavailable("the database is away")

    monkeypatch.setattr(world.accounts, "create", away)
    answer = await as_stranger(world, "set", new())

    assert condition(answer) == "internal-server-error"
    assert answer.element[0].get("type") == "wait"


@pytest.mark.parametrize("to", [HOST, None])
async def test_a_user_sees_the_account_and_changes_the_password(world, to):
    juliet = await logged_in(world)

    state = await juliet.query("get", query(""), to)
    changed = await juliet.ask("set", new(password="new"), to)

    assert state.find(f"{REGISTER}registered") is not None
    assert state.findtext(f"{REGISTER}username") == "juliet"
    assert changed.type == "result"
    assert world.accountant.passwords == {"juliet": "new"}


@pytest.mark.parametrize(("inner", "to", "expected"), [
    (new("romeo"), HOST, "not-allowed"),
    (new(), f"romeo@{HOST}", "forbidden"),
    (query("<username>juliet</username>"), HOST, "bad-request"),
    (new(password=""), HOST, "bad-request"),
    (new(password="x" * 1025), HOST, "not-acceptable"),
    (query("<remove/><username>juliet</username>"), HOST, "bad-request"),
])  # fmt: skip
async def test_requests_of_users_that_are_refused(world, inner, to, expected):
    juliet = await logged_in(world)
    await world.account("romeo")

    answer = await juliet.ask("set", inner, to)

    assert condition(answer) == expected
    assert len(answer.element) == 1
    assert world.accountant.passwords == {"juliet": "secret", "romeo": "secret"}


async def test_a_user_of_another_domain_changes_nothing(world):
    await logged_in(world)
    refused: list[Stanza] = []
    world.router._s2s.route = refused.append
    stanza = f"<iq type='set' id='r1' from='juliet@elsewhere.example/a' to='{HOST}'>{new()}</iq>"

    await world.settled(world.router.route(Stanza.from_bytes(stanza.encode())))

    assert [condition(answer) for answer in refused] == ["not-allowed"]
    assert world.accountant.passwords == {"juliet": "secret"}


async def test_a_user_removes_the_account_and_hears_of_it_before_the_stream_ends(world):
    juliet = await logged_in(world)

    answer = await juliet.ask("set", query("<remove/>"))

    assert (answer.type, answer.payload) == ("result", None)
    await world.until(lambda: juliet.ended)
    assert not await world.accounts.exists(HOST, "juliet")


async def test_what_the_operator_does_not_allow_is_not_done(world):
    juliet = await logged_in(world, allow_password_change=False, allow_removal=False)

    assert await juliet.refusal("set", new(password="new")) == "not-allowed"
    assert await juliet.refusal("set", query("<remove/>")) == "not-allowed"
    assert world.accountant.passwords == {"juliet": "secret"}
    assert await world.accounts.exists(HOST, "juliet")
