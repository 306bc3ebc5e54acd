"""post_log: sinks that are no web servers: the table of a database, and a JID."""

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.databases import BOTH, Databases, opened
from tests.modules.world import HOST, World, message
from xmppd.delivery import ERROR
from xmppd.errors import ConfigError, StorageError
from xmppd.protocol import ns
from xmppd.protocol.stanza import Stanza
from xmppd.storage import Storage

JULIET, ROMEO, LOGGER = f"juliet@{HOST}", f"romeo@{HOST}", f"logger@{HOST}"
SINK = "post_log.rows"


@pytest.fixture(params=BOTH)
async def elsewhere(request: pytest.FixtureRequest, databases: Databases, tmp_path: Path) -> AsyncIterator[Storage]:
    """A database that is not the server's own, and has nothing in it."""
    (tmp_path / "elsewhere").mkdir()
    url = databases.empty(request.param, tmp_path / "elsewhere")
    storage = Storage(url, data_dir=tmp_path, schema=False)
    storage.url = url  # type: ignore[attr-defined]
    await storage.open()
    yield storage
    await storage.close()
    databases.drop(url)


async def ask(storage: Storage, sql: str) -> list[dict[str, Any]]:
    """Rows, by the names of their columns; a statement that writes answers with none."""

    async def work(connection: Any) -> list[dict[str, Any]]:
        result = await connection.exec_driver_sql(sql)
        return [dict(row._mapping) for row in result] if result.returns_rows else []

    return await storage.run(work)


async def rows_of(storage: Storage, count: int, table: str = "post_log", order: str = "id") -> list[dict[str, Any]]:
    """Waits until there are so many."""
    found: list[dict[str, Any]] = []
    async with asyncio.timeout(30):
        while len(found) < count:
            await asyncio.sleep(0.01)
            try:
                found = await ask(storage, f"SELECT * FROM {table} ORDER BY {order}")
            except StorageError as exc:
                if "exist" not in str(exc) and "no such table" not in str(exc):
                    raise
    return found


async def post_log(world: World, storage: Storage, **options: Any) -> None:
    await world.outbox.start()
    sink = {"name": "rows", "database": storage.url, **options}  # type: ignore[attr-defined]
    await world.load(offline={}, post_log={"sinks": [sink]})
    await world.account("romeo", "juliet", "logger")
    await world.until(lambda: not any(runner.more for runner in world.outbox.runners.values()))


async def test_each_message_becomes_a_row_of_a_table_that_is_made_for_it(world, elsewhere):
    await post_log(world, elsewhere)
    romeo = await world.online("romeo", "orchard")
    before = datetime.now(UTC).replace(tzinfo=None)

    inner = "<thread>t</thread><origin-id xmlns='urn:xmpp:sid:0' id='o1'/><body xml:lang='de'>hallo</body>"
    await romeo.send(message(JULIET, "hi \U0001f339", "m1", inner))
    for number in range(300):
        await romeo.send(message(JULIET, f"n{number:03}", None))

    first, *others = await rows_of(elsewhere, 301)
    xml, ts, id = first.pop("xml"), first.pop("ts"), first.pop("id")
    assert first == {
        "direction": "sent",
        "host": HOST,
        "node": "xmppd@test",
        "type": "chat",
        "stanza_id": "m1",
        "origin_id": "o1",
        "from_jid": f"{ROMEO}/orchard",
        "to_jid": JULIET,
        "thread": "t",
        "body": "hi \U0001f339",
        "state": "accepted",
    }
    assert Stanza.from_bytes(xml.encode()).body == "hi \U0001f339"
    assert before <= datetime.fromisoformat(str(ts)) <= datetime.now(UTC).replace(tzinfo=None)
    assert len(id) == 26
    assert [row["body"] for row in others] == [f"n{number:03}" for number in range(300)]
    names = (
        "sqlite_master WHERE type = 'table'"
        if elsewhere.node_local
        else "information_schema.tables WHERE table_schema = DATABASE()"
    )
    assert [list(row.values()) for row in await ask(elsewhere, f"SELECT count(*) FROM {names}")] == [
        [1]
    ]  # and no other


async def test_an_event_that_is_sent_again_is_one_row(world, elsewhere):
    await post_log(world, elsewhere)
    romeo = await world.online("romeo")
    sink = world.outbox.runners[SINK].sink
    sent, send = [], sink.send

    async def twice(events):
        sent.extend(events)
        assert await send(events) == await send(events[::-1])
        return await send(events)

    sink.send = twice
    for number in range(20):
        await romeo.send(message(JULIET, f"n{number:02}", "m"))
    await rows_of(elsewhere, 20)

    await world.until(lambda: world.outbox.runners[SINK].sent == 20)
    assert [row["id"] for row in await rows_of(elsewhere, 20)] == sorted(event.ulid for event in sent)


async def test_a_table_that_is_there_is_filled_as_far_as_it_goes(world, elsewhere):
    await ask(
        elsewhere,
        "CREATE TABLE chat (number INTEGER, id VARCHAR(64) NOT NULL UNIQUE, body TEXT, json TEXT,"
        " site VARCHAR(9) DEFAULT 'verona')",
    )
    await post_log(world, elsewhere, table="chat", confidential=True)
    romeo = await world.online("romeo")

    await romeo.send(message(JULIET, "secret"))

    (row,) = await rows_of(elsewhere, 1, "chat")
    assert (row["number"], row["site"]) == (None, "verona")
    assert json.loads(row["json"])["id"] == row["id"]
    assert json.loads(row["body"]).keys() == {"length", "sha256"}
    assert "secret" not in row["json"]


async def test_what_a_table_refuses_dies_alone(world, elsewhere, caplog):
    check = "CHECK (length(body) < 10)" if elsewhere.node_local else ""
    await ask(elsewhere, f"CREATE TABLE chat (id CHAR(26) PRIMARY KEY, body VARCHAR(10) {check})")
    await post_log(world, elsewhere, table="chat")
    romeo = await world.online("romeo")

    for number in range(10):
        await romeo.send(message(JULIET, f"n{number}" if number != 4 else "far too long for it"))

    rows = await rows_of(elsewhere, 9, "chat")
    assert [row["body"] for row in rows] == [f"n{number}" for number in range(10) if number != 4]
    await world.until(lambda: world.outbox.runners[SINK].dead == 1)

    async def written() -> bool:
        return len(await world.outbox.listed(SINK, "dead", 10)) == 1

    await world.until_true(written)


async def test_a_table_without_a_key_waits_until_it_has_one(world, elsewhere, caplog):
    await ask(elsewhere, "CREATE TABLE chat (id CHAR(26), body TEXT)")
    await post_log(world, elsewhere, table="chat")
    romeo = await world.online("romeo")
    await romeo.send(message(JULIET, "hello"))
    await world.until(lambda: world.outbox.runners[SINK].failed)

    assert await ask(elsewhere, "SELECT * FROM chat") == []
    await ask(elsewhere, "CREATE UNIQUE INDEX chat_id ON chat (id)")

    (row,) = await rows_of(elsewhere, 1, "chat")
    assert row["body"] == "hello"


async def test_a_database_that_is_away_is_tried_again(world, tmp_path):
    folder = tmp_path / "later"
    await world.outbox.start()
    await world.load(post_log={"sinks": [{"name": "rows", "database": f"sqlite:///{folder}/chat.db"}]})
    romeo = await world.online("romeo")
    await romeo.send(message(JULIET, "hello"))
    await world.until(lambda: world.outbox.runners[SINK].failed)

    folder.mkdir()

    await world.until(lambda: world.outbox.runners[SINK].sent == 1)
    with sqlite3.connect(folder / "chat.db") as connection:
        assert connection.execute("SELECT body FROM post_log").fetchall() == [("hello",)]
    connection.close()


@pytest.mark.mariadb
async def test_two_nodes_write_to_one_table_at_once(databases, tmp_path):
    url = databases.empty("mariadb", tmp_path)
    worlds = []
    try:
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            own = await databases.migrated("sqlite", tmp_path / name)
            worlds.append(opened(own, tmp_path / name))
        async with worlds[0] as first, worlds[1] as second, World(first) as one, World(second) as two:
            for world in (one, two):
                await world.outbox.start()
                await world.load(post_log={"sinks": [{"name": "rows", "database": url}]})
            romeos = [await world.online("romeo") for world in (one, two)]
            for number in range(200):
                for romeo in romeos:
                    await romeo.send(message(JULIET, f"n{number}"))
            for world in (one, two):
                await world.until(lambda world=world: world.outbox.runners[SINK].sent == 200)
                assert world.outbox.runners[SINK].failed == 0
            storage = Storage(url, data_dir=tmp_path, schema=False)
            await storage.open()
            try:
                assert len(await rows_of(storage, 400)) == 400
            finally:
                await storage.close()
    finally:
        databases.drop(url)


async def test_a_url_with_certificates_that_are_not_there_is_told_without_its_password(world):
    url = "mysql://xmppd:open-sesame@127.0.0.1:1/x?ssl=verify-ca&ssl_ca=/nowhere.pem"

    with pytest.raises(ConfigError, match=r"sinks\[0\]\.database: the TLS files cannot be used") as refused:
        await world.load(post_log={"sinks": [{"name": "a", "database": url}]})

    assert "sesame" not in str(refused.value)


# -- forwarded


async def forwards(world: World, to: str = LOGGER, **options: Any) -> None:
    await world.outbox.start()
    await world.load(offline={}, post_log={"sinks": [{"name": "jid", "jid": to}], **options})
    await world.account("romeo", "juliet", "logger")


def forwarded(stanza: Stanza) -> Stanza:
    """The message in a message."""
    element = stanza.child(ns.FORWARD, "forwarded")
    assert element is not None
    (inner,) = (child for child in element if child.tag == f"{{{ns.CLIENT}}}message")
    return Stanza.from_element(inner)


async def test_messages_are_forwarded_in_order_to_who_logs_them(world):
    await forwards(world)
    romeo, logger = await world.online("romeo", "orchard"), await world.online("logger")

    await romeo.send(message(JULIET, "first", "m0", "<x xmlns='urn:x'><y/></x>"))
    for number in range(1, 100):
        await romeo.send(message(JULIET, f"n{number}", f"m{number}"))

    runner = world.outbox.runners["post_log.jid"]
    await world.until(lambda: logger.received)
    assert runner.sent == 0  # what she was sent she may not have yet, and so the next ones wait
    while runner.sent < 100:
        world.sweep()
        await asyncio.sleep(0.01)
    found = [forwarded(stanza) for stanza in logger.received]
    assert [one.body for one in found] == ["first", *(f"n{number}" for number in range(1, 100))]
    first = logger.received[0]
    assert (first.from_.full, first.to.full, first.type) == (HOST, LOGGER, "normal")
    assert (found[0].from_.full, found[0].to.full, found[0].id) == (f"{ROMEO}/orchard", JULIET, "m0")
    assert found[0].child("urn:x", "x")[0].tag == "{urn:x}y"
    assert first.child(ns.FORWARD, "forwarded").find(f"{{{ns.DELAY}}}delay").get("stamp").endswith("Z")
    assert len({stanza.id for stanza in logger.received}) == 100


async def test_who_logs_and_is_absent_gets_them_later(world):
    await forwards(world)
    romeo = await world.online("romeo")

    await romeo.send(message(JULIET, "hello"))

    await world.until(lambda: world.outbox.runners["post_log.jid"].sent == 1)
    logger = await world.online("logger")
    stanza = await world.found(lambda: next((one for one in logger.received if one.kind == "message"), None))
    assert forwarded(stanza).body == "hello"


async def test_what_is_forwarded_is_not_forwarded_again(world):
    await forwards(world, directions=["sent", "received", "offline"], require_body=False, types=["chat", "normal"])
    romeo, logger = await world.online("romeo"), await world.online("logger")

    await romeo.send(message(f"{LOGGER}", "to the logger"))
    await romeo.send(message(JULIET, "to who is absent"))
    runner = world.outbox.runners["post_log.jid"]
    while runner.sent < 4 or runner.held:
        world.sweep()
        await asyncio.sleep(0.01)

    told = [forwarded(one).body for one in logger.received if one.child(ns.FORWARD) is not None]
    assert sorted(told) == ["to the logger", "to the logger", "to who is absent", "to who is absent"]
    assert runner.sent == 4


async def test_a_jid_that_does_not_take_them_is_tried_again(world, monkeypatch):
    routed: list[Stanza] = []
    answers: list[Any] = [ERROR, ERROR]
    route: Callable[[Stanza], Any] = world.router.route

    def refused_twice(stanza: Stanza) -> Any:
        routed.append(stanza)
        return answers.pop() if answers else route(stanza)

    monkeypatch.setattr(world.router, "route", refused_twice)
    await forwards(world)
    romeo, logger = await world.online("romeo"), await world.online("logger")
    monkeypatch.setattr(world.router, "route", route)
    await romeo.send(message(JULIET, "hello"))

    await world.until(lambda: len(logger.received) == 1)

    assert len({stanza.id for stanza in routed if stanza.kind == "message"}) == 1
    assert answers == []
