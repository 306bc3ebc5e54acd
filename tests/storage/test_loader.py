"""Merged look-ups, on both databases."""

import asyncio

import pytest
from sqlalchemy import event

from xmppd.errors import StorageError, StorageUnavailable
from xmppd.storage import Accounts, Secret, Storage, loader

HOST = "example.net"
SECRETS = {"sha1": Secret("sha1", b"salt", 4096, b"s", b"k"), "sha256": Secret("sha256", b"salt", 4096, b"s", b"k")}


class Statements:
    def __init__(self, storage: Storage) -> None:
        self.seen: list[str] = []
        event.listen(storage._engine.sync_engine, "before_cursor_execute", self._see)

    def _see(self, connection, cursor, statement, *_) -> None:
        self.seen.append(statement)


@pytest.fixture
async def accounts(storage: Storage) -> Accounts:
    accounts = Accounts(storage)
    for name in ("juliet", "romeo", "nurse"):
        await accounts.create(HOST, name, SECRETS)
    return accounts


async def test_look_ups_of_one_moment_are_one_select(storage, accounts):
    statements = Statements(storage)

    found = await asyncio.gather(*(accounts.get(HOST, name) for name in ["juliet", "romeo", "nobody", "juliet"] * 50))

    assert [account and account.username for account in found] == ["juliet", "romeo", None, "juliet"] * 50
    assert len(statements.seen) == 1
    assert "IN (" in statements.seen[0]


async def test_look_ups_that_come_while_a_query_runs_are_the_next_query(storage):
    queries = []
    begun, gate = asyncio.Event(), asyncio.Event()

    async def fetch(connection, keys):
        queries.append(keys)
        begun.set()
        await gate.wait()
        return {key: key * 2 for key in keys if key != 13}

    storage.loader.define("double", fetch)
    first = asyncio.create_task(storage.loader.get("double", 1))
    await begun.wait()
    rest = [asyncio.create_task(storage.loader.get("double", key)) for key in (1, 2, 13, 2)]
    await asyncio.sleep(0.01)
    gate.set()

    assert await first == 2
    assert await asyncio.gather(*rest) == [2, 4, None, 4]
    assert queries == [[1], [1, 2, 13]]  # 1 again: the query under way may have begun before its last change


@pytest.mark.parametrize(("hangs", "queries"), [(True, 1), (False, 2)])
async def test_nobody_waits_for_a_second_query_that_hangs(storage, monkeypatch, hangs, queries):
    monkeypatch.setattr(loader, "_HUNG", 0.1 if hangs else 1000)
    asked = []
    begun, gate = asyncio.Event(), asyncio.Event()

    async def fetch(connection, keys):
        asked.append(keys)
        begun.set()
        await gate.wait()
        if len(asked) == 1:
            raise StorageUnavailable("no answer")
        return dict.fromkeys(keys, True)

    storage.loader.define("slow", fetch)
    first = asyncio.create_task(storage.loader.get("slow", 1))
    await begun.wait()
    behind = asyncio.create_task(storage.loader.get("slow", 2))
    await asyncio.sleep(0.2)
    gate.set()
    results = await asyncio.gather(first, behind, return_exceptions=True)

    assert isinstance(results[0], StorageUnavailable)
    assert isinstance(results[1], StorageUnavailable) if hangs else results[1] is True
    assert len(asked) == queries
    monkeypatch.undo()
    assert await storage.loader.get("slow", 3) is True


async def test_a_look_up_sees_what_was_committed_before_it(accounts):
    reads = [asyncio.create_task(accounts.get(HOST, f"user{number}")) for number in range(100)]
    for number in range(20):
        await accounts.create(HOST, f"new{number}", SECRETS)
        assert (await accounts.get(HOST, f"new{number}")) is not None
    await asyncio.gather(*reads)


async def test_no_query_has_more_than_five_hundred_keys(storage):
    sizes = []

    async def fetch(connection, keys):
        sizes.append(len(keys))
        return dict.fromkeys(keys, True)

    storage.loader.define("many", fetch)

    found = await asyncio.gather(*(storage.loader.get("many", key) for key in range(1200)))

    assert all(found)
    assert sizes == [500, 500, 200]


async def test_a_cancelled_waiter_harms_nobody(storage):
    queries = []

    async def fetch(connection, keys):
        queries.append(keys)
        return {key: key for key in keys}

    storage.loader.define("echo", fetch)
    tasks = [asyncio.create_task(storage.loader.get("echo", key)) for key in ("a", "a", "b", "c")]
    await asyncio.sleep(0)
    tasks[0].cancel()
    tasks[2].cancel()

    assert await tasks[1] == "a"
    assert await tasks[3] == "c"
    assert queries == [["a", "c"]]  # nobody waits for b any more
    assert await storage.loader.get("echo", "d") == "d"


async def test_a_waiter_cancelled_during_the_query_harms_nobody(storage):
    started, gate = asyncio.Event(), asyncio.Event()

    async def fetch(connection, keys):
        started.set()
        await gate.wait()
        return {key: key for key in keys}

    storage.loader.define("echo", fetch)
    tasks = [asyncio.create_task(storage.loader.get("echo", key)) for key in ("a", "a", "b")]
    await started.wait()
    tasks[0].cancel()
    gate.set()

    assert await asyncio.gather(*tasks[1:]) == ["a", "b"]


async def test_a_fetch_with_a_bug_fails_the_keys_that_trigger_it_only(storage, caplog):
    async def fetch(connection, keys):
        if 13 in keys:
            raise KeyError("bad luck")
        return {key: key for key in keys}

    storage.loader.define("superstitious", fetch)

    found = await asyncio.gather(
        *(storage.loader.get("superstitious", key) for key in range(20)), return_exceptions=True
    )

    assert isinstance(found.pop(13), StorageError)
    assert found == [key for key in range(20) if key != 13]
    assert "look-up failed kind=superstitious" in caplog.text


async def test_a_reloaded_module_answers_from_then_on_and_an_unloaded_one_only_who_waits(storage):
    def answering(word):
        async def fetch(connection, keys):
            return dict.fromkeys(keys, word)

        return fetch

    storage.loader.define("module", answering("old"))
    assert await storage.loader.get("module", 1) == "old"
    storage.loader.define("module", answering("new"))
    assert await storage.loader.get("module", 1) == "new"

    waiting = asyncio.create_task(storage.loader.get("module", 1))
    await asyncio.sleep(0)
    storage.loader.undefine("module")

    assert await waiting == "new"
    with pytest.raises(StorageError, match="nobody loads module"):
        await storage.loader.get("module", 1)


async def test_look_ups_end_when_the_storage_is_closed(database, make_storage):
    storage = make_storage(database)
    await storage.open()
    started = asyncio.Event()

    async def hang(connection, keys):
        started.set()
        await asyncio.Event().wait()

    storage.loader.define("hang", hang)
    tasks = [asyncio.create_task(storage.loader.get("hang", 1))]
    await started.wait()
    tasks.append(asyncio.create_task(storage.loader.get("hang", 2)))
    await asyncio.sleep(0)

    await storage.close()

    for task in tasks:
        with pytest.raises(StorageUnavailable):
            await task
    with pytest.raises(StorageUnavailable):
        await storage.loader.get("hang", 3)
