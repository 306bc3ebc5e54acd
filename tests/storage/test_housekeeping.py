"""What is old goes by itself, over both databases: in batches, by one node at a time, held rows never."""

import asyncio
import time
from types import SimpleNamespace

import pytest
from sqlalchemy import event, func, insert, select, update

from xmppd import housekeeping
from xmppd.admin.registry import Caller, Registry, commands_of
from xmppd.admin.storage_commands import OldMessageCommands
from xmppd.errors import CommandError, StorageUnavailable
from xmppd.housekeeping import Housekeeping, Retentions
from xmppd.outbox.rows import DEAD, DONE, PENDING, Rows, Run
from xmppd.spool import Holder, Spool
from xmppd.storage import Accounts, Lease, Storage, id_at
from xmppd.storage.tables import db_lock
from xmppd.storage.tables import outbox as outbox_table
from xmppd.storage.tables import spool as spool_table

HOST = "example.net"
HELD = Holder(b"A" * 16, 1, "juliet/balcony")
DAY = 86400.0


@pytest.fixture
async def spool(storage: Storage) -> Spool:
    await Accounts(storage).create(HOST, "juliet", {})
    return Spool(storage)


async def keep(spool: Spool, name: str, days: float, *, holder: Holder | None = None, expires: float | None = None):
    """A message that was stored so many days ago."""
    when = time.time() - days * DAY
    item = spool.keep_item(HOST, "juliet", "romeo@x", name.encode(), dedup=None, quota=None, holder=holder)[1]
    item = type(item)(*[
        {"id": id_at(when), "created_at": when, "expires_at": expires}.get(field, getattr(item, field))
        for field in type(item).__slots__
    ])  # fmt: skip
    await spool.submit(item)


async def left(storage: Storage) -> set[str]:
    async with storage.connect() as connection:
        return {row.decode() for row in (await connection.execute(select(spool_table.c.stanza))).scalars()}


async def run(spool: Spool, storage: Storage, *words: str):
    registry = Registry()
    registry.register("core", commands_of(OldMessageCommands(spool, storage)))
    return await registry.call(words[0], list(words[1:]), caller=Caller("test", "test"))


def keeper(storage: Storage, retentions: Retentions, name: str = "A", **options) -> Housekeeping:
    return Housekeeping(storage, retentions, name, lambda: SimpleNamespace(every=3600.0), **options)


async def holder_of_the_lock(storage: Storage) -> str | None:
    return await Lease(storage.connect, housekeeping.LOCK, "x", 1).held_by()


# -- messages


async def test_old_messages_go_when_an_operator_says_so_and_held_ones_stay(spool, storage):
    await keep(spool, "old", 31)
    await keep(spool, "held", 31, holder=HELD)
    await keep(spool, "young", 29)

    result = await run(spool, storage, "delete_old_messages", "30")

    assert (result.code, result.text()) == (0, "")
    assert await left(storage) == {"held", "young"}
    await run(spool, storage, "delete_old_messages", "0")
    assert await left(storage) == {"held"}


async def test_expired_messages_go_and_others_stay_however_old(spool, storage):
    now = time.time()
    await keep(spool, "expired", 1, expires=now - 5)
    await keep(spool, "held", 1, holder=HELD, expires=now - 5)
    await keep(spool, "lasting", 1, expires=now + 500)
    await keep(spool, "old", 500)

    result = await run(spool, storage, "delete_expired_messages")

    assert result.code == 0
    assert await left(storage) == {"held", "lasting", "old"}


async def test_no_message_is_read_to_find_the_expired_ones(spool, storage):
    for number in range(50):
        await keep(spool, f"m{number}", 1)
    async with storage.connect() as connection:
        said = []

        def listen(conn, cursor, statement, parameters, context, many):
            said.append((statement, parameters))

        engine = storage._engine.sync_engine
        event.listen(engine, "before_cursor_execute", listen)
        try:
            await spool.delete_expired(time.time(), 500)
        finally:
            event.remove(engine, "before_cursor_execute", listen)
        ((look, parameters),) = [each for each in said if each[0].startswith("SELECT")]
        explain = "EXPLAIN QUERY PLAN" if connection.dialect.name == "sqlite" else "EXPLAIN"
        plan = (await connection.exec_driver_sql(f"{explain} {look}", tuple(parameters))).all()

    words = " ".join(str(each) for each in plan[0])
    assert "spool_user" in words
    assert "COVERING INDEX" in words or "Using index" in words


@pytest.mark.parametrize("days", ["-1", "99999999"])
async def test_days_that_make_no_sense_delete_nothing(spool, storage, days):
    await keep(spool, "old", 31)

    with pytest.raises(CommandError):
        await run(spool, storage, "delete_old_messages", days)

    assert await left(storage) == {"old"}


async def test_a_message_that_a_session_takes_meanwhile_is_not_deleted(spool, storage):
    """Between the look and the deletion of a batch somebody logs in: one of the two gets each row."""
    for number in range(50):
        await keep(spool, f"m{number}", 40 + number / 100)

    gone, rows = await asyncio.gather(
        spool.delete_older(time.time() - 30 * DAY, 500), spool.take(HOST, "juliet", HELD, limit=20)
    )

    there = await left(storage)
    assert {row.stanza.decode() for row in rows} <= there
    assert len(there) in (0, 20, 50 - gone)
    assert gone + len(there) == 50


# -- events


async def test_dead_events_go_when_they_are_old_and_waiting_ones_never(storage):
    rows = Rows(storage, Run(b"N" * 16, 1), clock=time.time, committed=lambda put, stored: None)
    values = {
        "sink": "s", "server_host": HOST, "kind": "k", "partition_key": b"p" * 32, "headers": b"[]", "payload": b"",
        "attempts": 0, "lease_node": b"X" * 16, "lease_incarnation": 1,
    }  # fmt: skip
    states = [(state, days) for state in (PENDING, DEAD, DONE) for days in (1, 100)]
    revived = {"id": id_at(time.time() - 100 * DAY), "state": DEAD, "created_at": time.time() - DAY}
    async with storage.connect() as connection:
        for state, days in states:
            when = time.time() - days * DAY
            old = {"id": id_at(when), "state": state, "created_at": when}
            await connection.execute(insert(outbox_table).values(**values, **old))
        await connection.execute(insert(outbox_table).values(**values, **revived))

    assert await rows.delete_dead(time.time() - 90 * DAY, 500) == 1
    assert await rows.delete_done(time.time() - 2 * DAY, 500) == 1

    async with storage.connect() as connection:
        found = (await connection.execute(select(outbox_table.c.state))).scalars().all()
    assert sorted(found) == sorted([PENDING, PENDING, DEAD, DEAD, DONE])


# -- passes


async def test_a_pass_deletes_batch_after_batch_until_nothing_is_left(spool, storage, monkeypatch):
    monkeypatch.setattr(housekeeping, "BATCH", 7)
    for number in range(30):
        await keep(spool, f"old{number}", 31 + number / 100)
    await keep(spool, "young", 29)
    retentions = Retentions()
    retentions.add("core", "offline messages", lambda: 30 * DAY, spool.delete_older)
    retentions.add("core", "off", lambda: 0, spool.delete_older)

    assert await keeper(storage, retentions).sweep() == 30

    assert await left(storage) == {"young"}
    assert await holder_of_the_lock(storage) is None


async def test_a_module_has_its_rows_deleted_as_long_as_it_is_loaded(storage):
    retentions, asked = Retentions(), []

    async def delete(before: float, limit: int) -> int:
        asked.append((time.time() - before, limit))
        return 0

    retentions.add("receipts", "states", lambda: 60.0, delete)
    await keeper(storage, retentions).sweep()
    retentions.remove("receipts")
    await keeper(storage, retentions).sweep()

    ((age, limit),) = asked
    assert abs(age - 60) < 5  # by the database's clock
    assert limit == housekeeping.BATCH


async def test_one_node_at_a_time_and_another_goes_on_where_one_died(spool, storage, database, make_storage):
    other = make_storage(database)
    await other.open()
    for number in range(30):
        await keep(spool, f"old{number}", 31)
    retentions, begun, never = Retentions(), asyncio.Event(), asyncio.Event()

    async def some(before: float, limit: int) -> int:
        if begun.is_set():
            await never.wait()
        begun.set()
        await spool.delete_older(before, 10)
        return limit  # as if there were more

    retentions.add("core", "offline messages", lambda: 30 * DAY, some)
    dying = asyncio.create_task(keeper(storage, retentions, "dying").sweep())
    await begun.wait()
    all_of_it = Retentions()
    all_of_it.add("core", "offline messages", lambda: 30 * DAY, Spool(other).delete_older)

    assert await keeper(other, all_of_it, "B").sweep() is None  # the other one is at it
    assert await holder_of_the_lock(other) == "dying"
    async with other.connect() as connection:  # it says nothing any more, and its time runs out
        await connection.execute(update(db_lock).where(db_lock.c.name == housekeeping.LOCK).values(until=1.0))
    assert await keeper(other, all_of_it, "B").sweep() == 20

    async with other.connect() as connection:
        assert (await connection.execute(select(func.count()).select_from(spool_table))).scalar_one() == 0
    dying.cancel()
    await asyncio.wait([dying])


async def test_who_has_lost_the_lease_deletes_no_further(spool, storage):
    retentions, batches = Retentions(), []

    async def lose(before: float, limit: int) -> int:
        batches.append(limit)
        async with storage.connect() as connection:
            await connection.execute(
                update(db_lock).where(db_lock.c.name == housekeeping.LOCK).values(token=b"t" * 16, holder="B")
            )
        return limit

    retentions.add("core", "first", lambda: 1.0, lose)
    retentions.add("core", "second", lambda: 1.0, lose)

    await keeper(storage, retentions).sweep()

    assert len(batches) == 1
    assert await holder_of_the_lock(storage) == "B"


async def test_one_that_crashes_or_a_database_that_is_away_is_not_the_end(storage, caplog):
    retentions, asked, twice = Retentions(), [], asyncio.Event()
    steps: asyncio.Queue[None] = asyncio.Queue()

    async def crash(before: float, limit: int) -> int:
        raise ValueError("a bug")

    async def away(before: float, limit: int) -> int:
        asked.append(before)
        if len(asked) == 1:
            raise StorageUnavailable("away")
        twice.set()
        return 0

    async def step(seconds: float) -> None:
        await steps.get()

    retentions.add("bad", "crash", lambda: 1.0, crash)
    retentions.add("good", "away", lambda: 1.0, away)
    running = asyncio.create_task(keeper(storage, retentions, sleep=step).run())
    for _ in range(2):
        steps.put_nowait(None)

    async with asyncio.timeout(30):
        await twice.wait()
    running.cancel()
    await asyncio.wait([running])

    assert "old rows not deleted" in caplog.text
    assert "old rows wait to be deleted" in caplog.text


async def test_the_loader_takes_a_modules_retention_back(storage, tmp_path):
    from tests.modules.world import World
    from xmppd.config.loader import validate_dataclass
    from xmppd.module_loader import ModuleLoader

    (tmp_path / "keeper.py").write_text(
        "from xmppd.module_api import Module\n"
        "class Keeper(Module[object]):\n"
        "    async def start(self):\n"
        "        self.retention('things', 5.0, self.delete)\n"
        "    async def delete(self, before, limit):\n"
        "        return 0\n"
    )
    retentions = Retentions()
    async with World(storage) as world:
        loader = ModuleLoader(
            hooks=world.hooks, iqs=world.iqs, registry=world.registry, context=world._context,
            validate=validate_dataclass, access=world.access, paths=[tmp_path], retentions=retentions,
        )  # fmt: skip
        await loader.start({"keeper": {}})
        await loader.reload("keeper")
        ((owner, name, seconds),) = [(each.owner, each.name, each.older_than()) for each in retentions.all()]
        await loader.unload("keeper")

    assert (owner, name, seconds) == ("keeper", "things", 5.0)
    assert retentions.all() == []
