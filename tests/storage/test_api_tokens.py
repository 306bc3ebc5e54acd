"""Tokens of the HTTP API in the database: made, found, listed, void; another node's; while the database is away."""

import pytest

from xmppd.admin.api_tokens import ApiTokenCommands, ApiTokens, digest_of
from xmppd.errors import CommandError, StorageUnavailable


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def tokens(storage, clock):
    return ApiTokens(storage, lambda: {"fixed": digest_of("from the file")}, clock=clock)


async def test_a_token_is_found_by_its_secret_alone(tokens):
    secret = await tokens.create("deploy", ("stats", "[tag:session]"))

    found = await tokens.find(secret)

    assert (found.name, found.what) == ("deploy", ("stats", "[tag:session]"))
    assert secret.startswith("xmppd_")
    assert len(secret) > 40
    assert await tokens.find(secret + "x") is None
    assert await tokens.find("deploy") is None
    assert await tokens.find(found.digest.hex()) is None


async def test_a_token_of_the_configuration_is_found_too(tokens):
    assert (await tokens.find("from the file")).name == "fixed"


async def test_the_secret_is_not_in_the_database(tokens, storage):
    secret = await tokens.create("deploy", ())

    async def work(connection):
        rows = await connection.exec_driver_sql("SELECT name, value FROM setting")
        return repr([tuple(row) for row in rows])

    assert secret not in await storage.read(work)


@pytest.mark.parametrize("name", ["deploy", "fixed"])
async def test_a_name_is_given_once(tokens, name):
    await tokens.create("deploy", ())

    with pytest.raises(CommandError, match="conflict: there is a token called"):
        await tokens.create(name, ())


async def test_a_revoked_token_is_void_at_once(tokens):
    secret = await tokens.create("deploy", ())
    assert await tokens.find(secret)

    assert await tokens.revoke("deploy") is True
    assert await tokens.find(secret) is None
    assert await tokens.revoke("deploy") is False
    assert await tokens.create("deploy", ()) != secret


async def test_another_node_follows_within_seconds(tokens, storage, clock):
    other = ApiTokens(storage, dict, clock=clock)
    assert await other.find("nobody") is None

    secret = await tokens.create("deploy", ())
    clock.now += 1.1  # a token nobody knows is looked up again, if not at once
    assert (await other.find(secret)).name == "deploy"
    await tokens.revoke("deploy")
    clock.now += 5.1
    assert await other.find(secret) is None


async def test_unknown_tokens_do_not_each_cost_a_query(tokens, monkeypatch):
    asked = 0
    look = tokens._look

    async def counted():
        nonlocal asked
        asked += 1
        await look()

    monkeypatch.setattr(tokens, "_look", counted)
    for number in range(20):
        assert await tokens.find(f"guess {number}") is None

    assert asked == 1


async def test_known_tokens_hold_for_a_while_without_the_database(tokens, storage, clock):
    secret = await tokens.create("deploy", ())
    assert await tokens.find(secret)
    await storage.close()

    clock.now += 30
    assert (await tokens.find(secret)).name == "deploy"
    assert (await tokens.find("from the file")).name == "fixed"
    with pytest.raises(StorageUnavailable):
        await tokens.find("nobody")
    clock.now += 40
    with pytest.raises(StorageUnavailable):
        await tokens.find(secret)


async def test_the_commands_check_what_they_are_given(tokens):
    commands = ApiTokenCommands(tokens)

    for name, what in (("a b", []), ("", []), ("x" * 41, []), ("ok", ["Bad!"]), ("ok", ["[tag:]"])):
        with pytest.raises(CommandError) as caught:
            await commands.create(name, what)
        assert caught.value.code == 2
    await commands.create("ok", ["stats", " [tag:session]"])

    rows = await commands.list_all()
    assert [row[:2] for row in rows] == [("fixed", ""), ("ok", "stats,[tag:session]")]
    assert rows[0][2] == "configuration"
    with pytest.raises(CommandError, match="not_found"):
        await commands.revoke("fixed")
