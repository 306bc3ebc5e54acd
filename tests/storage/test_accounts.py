"""Accounts, on both databases."""

import asyncio
from collections.abc import Callable

import pytest

from xmppd.errors import StorageError
from xmppd.spool import Kept, Spool
from xmppd.storage import Accounts, Secret, Storage

HOST = "example.net"


def secret(kind: str = "sha1", salt: bytes = b"salt") -> Secret:
    return Secret(kind, salt, 4096, b"s" * 20, b"k" * 20)


@pytest.fixture
def accounts(storage: Storage) -> Accounts:
    return Accounts(storage)


@pytest.fixture
async def other_node(database: str, storage: Storage, make_storage: Callable[..., Storage]) -> Accounts:
    other = make_storage(database)
    await other.open()
    return Accounts(other)


async def test_account_comes_back_with_all_its_secrets(accounts):
    secrets = {"sha1": secret(), "sha512": Secret("sha512", bytes(range(255)), 10_000, b"\0" * 64, b"\xff" * 64)}

    assert await accounts.create(HOST, "juliet", secrets)

    juliet = await accounts.get(HOST, "juliet")
    assert (juliet.host, juliet.username) == (HOST, "juliet")
    assert juliet.secrets == secrets
    assert await accounts.get(HOST, "romeo") is None
    assert await accounts.get("example.org", "juliet") is None


async def test_secrets_stay_out_of_the_text_of_an_account(accounts):
    await accounts.create(HOST, "juliet", {"sha1": Secret("sha1", b"PEPPER", 4096, b"STORED", b"SERVER")})

    text = repr(await accounts.get(HOST, "juliet"))

    assert not any(word in text for word in ("PEPPER", "STORED", "SERVER"))


async def test_a_name_can_be_created_once_even_by_two_nodes_at_the_same_moment(accounts, other_node):
    for number in range(20):
        name = f"user{number}"
        made = await asyncio.gather(
            accounts.create(HOST, name, {"sha1": secret(salt=b"one")}),
            other_node.create(HOST, name, {"sha1": secret(salt=b"two")}),
        )
        assert sorted(made) == [False, True]
        winner = b"one" if made[0] else b"two"
        assert (await accounts.get(HOST, name)).secrets["sha1"].salt == winner

    assert await accounts.count(HOST) == 20


@pytest.mark.parametrize(
    "name", ["x" * 1023, "ж" * 511, "😀", "a b", "trailing ", "Trailing", "трэйл", 'it\'s \\ "quoted" %s :x', "ß"]
)
async def test_any_name_is_kept_byte_by_byte(accounts, name):
    assert await accounts.create(HOST, name, {"sha1": secret()})

    assert (await accounts.get(HOST, name)).username == name
    assert await accounts.names(HOST) == [name]


async def test_names_that_a_collation_would_confuse_are_different_accounts(accounts):
    names = ["strasse", "straße", "strässe", "strasse ", "Strasse", "strasse\u00ad"]

    for name in names:
        assert await accounts.create(HOST, name, {"sha1": secret(salt=name.encode())})

    for name in names:
        assert (await accounts.get(HOST, name)).secrets["sha1"].salt == name.encode()
    assert await accounts.names(HOST) == sorted(names, key=str.encode)


async def test_a_name_too_long_for_its_column_is_an_error_and_not_cut_off(accounts):
    with pytest.raises(StorageError, match="1024 bytes"):
        await accounts.create(HOST, "x" * 1024, {})

    assert await accounts.names(HOST) == []


async def test_a_bad_name_among_many_looked_up_together_fails_alone(accounts):
    await accounts.create(HOST, "juliet", {"sha1": secret()})

    good, bad, unknown = await asyncio.gather(
        accounts.get(HOST, "juliet"),
        accounts.get(HOST, "x" * 1024),
        accounts.get(HOST, "romeo"),
        return_exceptions=True,
    )

    assert good.username == "juliet"
    assert isinstance(bad, StorageError)
    assert unknown is None


async def test_new_secrets_replace_all_old_ones(accounts):
    await accounts.create(HOST, "juliet", {"sha1": secret(), "sha256": secret("sha256")})

    assert await accounts.set_secrets(HOST, "juliet", {"sha512": secret("sha512")})

    assert set((await accounts.get(HOST, "juliet")).secrets) == {"sha512"}


async def test_secrets_of_an_unknown_user_are_not_stored(accounts):
    assert not await accounts.set_secrets(HOST, "nobody", {"sha1": secret()})

    assert await accounts.create(HOST, "nobody", {})
    assert (await accounts.get(HOST, "nobody")).secrets == {}


async def test_removal_takes_secrets_and_spooled_messages_along(storage, accounts):
    spool = Spool(storage)
    await accounts.create(HOST, "juliet", {"sha1": secret()})
    await accounts.create(HOST, "nurse", {"sha1": secret()})
    for name in ("juliet", "nurse"):
        assert await spool.keep(HOST, name, "romeo@example.net", b"<message/>", dedup=None, quota=None) is Kept.STORED

    assert await accounts.remove(HOST, "juliet")

    assert not await accounts.remove(HOST, "juliet")
    assert await accounts.get(HOST, "juliet") is None
    assert await spool.count(HOST, "juliet") == 0
    assert await spool.count(HOST, "nurse") == 1
    assert await accounts.create(HOST, "juliet", {})
    assert (await accounts.get(HOST, "juliet")).secrets == {}


async def test_existence_is_known_at_once_after_creation_and_removal(accounts):
    assert not await accounts.exists(HOST, "juliet")
    await accounts.create(HOST, "juliet", {})
    assert await accounts.exists(HOST, "juliet")
    await accounts.remove(HOST, "juliet")
    assert not await accounts.exists(HOST, "juliet")


async def test_a_remembered_account_is_asked_for_again_after_a_minute(storage, other_node):
    now = 1000.0
    accounts = Accounts(storage, clock=lambda: now)
    await accounts.create(HOST, "juliet", {})
    assert await accounts.exists(HOST, "juliet")

    await other_node.remove(HOST, "juliet")

    assert await accounts.exists(HOST, "juliet")  # remembered
    now += 61
    assert not await accounts.exists(HOST, "juliet")


async def test_an_account_removed_elsewhere_is_forgotten_when_we_are_told(accounts, other_node):
    await accounts.create(HOST, "juliet", {})
    assert await accounts.exists(HOST, "juliet")
    await other_node.remove(HOST, "juliet")

    accounts.forget(HOST, "juliet")

    assert not await accounts.exists(HOST, "juliet")


async def test_names_come_sorted_and_in_pages(accounts):
    for name in ("nurse", "juliet", "romeo", "julia", "jule"):
        await accounts.create(HOST, name, {})
    await accounts.create("example.org", "julius", {})

    assert await accounts.names(HOST) == ["jule", "julia", "juliet", "nurse", "romeo"]
    assert await accounts.names(HOST, prefix="juli") == ["julia", "juliet"]
    assert await accounts.names(HOST, limit=2) == ["jule", "julia"]
    assert await accounts.names(HOST, limit=2, after="julia") == ["juliet", "nurse"]
    assert await accounts.count(HOST) == 5
    assert await accounts.count("example.com") == 0


async def test_all_nodes_make_fake_salts_from_the_same_key(accounts, other_node):
    ours, theirs = await asyncio.gather(accounts.fake_salt_key(), other_node.fake_salt_key())

    assert len(ours) == 32
    assert ours == theirs
