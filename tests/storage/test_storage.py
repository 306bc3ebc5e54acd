"""Connections, transactions, and what a database in trouble looks like from outside."""

import asyncio
import logging
import os
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Column, Integer, event, insert, select, text, update

from tests import mariadb
from tests.harness.folders import let_in
from xmppd.errors import ConfigError, StorageError, StorageUnavailable
from xmppd.spool import Kept, Spool
from xmppd.storage import Accounts, Duplicate, Storage, engine, module_table, new_id
from xmppd.storage.tables import spool as spool_table

COUNTER = module_table("counter", Column("id", Integer, primary_key=True, autoincrement=False), Column("n", Integer))


@pytest.fixture
async def counter(storage: Storage) -> Storage:
    await storage.ensure_tables([COUNTER])

    async def work(connection):
        await connection.execute(insert(COUNTER), [{"id": 1, "n": 0}, {"id": 2, "n": 0}])

    await storage.run(work)
    return storage


async def numbers(storage: Storage) -> list[int]:
    async with storage.connect() as connection:
        return list((await connection.execute(select(COUNTER.c.n).order_by(COUNTER.c.id))).scalars())


def add_one(row: int = 1):
    async def work(connection):
        n = (await connection.execute(select(COUNTER.c.n).where(COUNTER.c.id == row))).scalar_one()
        await connection.execute(update(COUNTER).where(COUNTER.c.id == row).values(n=COUNTER.c.n + 1))
        return n

    return work


# -- transactions ----------------------------------------------------------------------------------------------------


async def test_work_that_raises_leaves_nothing(counter):
    async def work(connection):
        await add_one()(connection)
        raise LookupError("no such thing")

    with pytest.raises(LookupError):
        await counter.run(work)

    assert await numbers(counter) == [0, 0]
    await counter.run(add_one())
    assert await numbers(counter) == [1, 0]


async def test_work_that_is_cancelled_keeps_nobody_from_writing_however_long_it_is_remembered(counter):
    """On SQLite it kept the write lock for as long as a cursor lived, which an exception's traceback held."""
    remembered, written = [], 0

    async def work(connection):
        await add_one()(connection)
        await connection.execute(select(COUNTER.c.n))

    for turns in range(0, 200, 3):
        task = asyncio.create_task(counter.run(work))
        remembered.append(task)
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            break
        await counter.run(add_one(2))
        written += 1
    assert (await numbers(counter))[1] == written > 3


async def test_work_that_is_cancelled_leaves_nothing_and_no_broken_connection(database, make_storage):
    storage = make_storage(database, pool_max=1)
    await storage.open()
    await storage.ensure_tables([COUNTER])
    await storage.run(lambda connection: connection.execute(insert(COUNTER), {"id": 1, "n": 0}))

    for moment in range(60):
        task = asyncio.create_task(storage.run(add_one()))
        for _ in range(moment):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        reading = asyncio.create_task(numbers(storage))
        for _ in range(moment % 17):
            await asyncio.sleep(0)
        reading.cancel()
        await asyncio.wait([reading])

    (before,) = await numbers(storage)
    await storage.run(add_one())
    assert await numbers(storage) == [before + 1]


async def test_a_duplicate_has_an_exception_of_its_own(counter):
    with pytest.raises(Duplicate):
        await counter.run(lambda connection: connection.execute(insert(COUNTER), {"id": 1, "n": 5}))


async def test_a_statement_that_is_wrong_is_a_storage_error_without_the_values(counter):
    for statement in ("SELECT nonsense FROM nowhere", "SELEKT 1"):
        with pytest.raises(StorageError) as caught:
            await counter.run(lambda connection, statement=statement: connection.execute(text(statement)))
        assert not isinstance(caught.value, StorageUnavailable)

    with pytest.raises(StorageError) as caught:
        async with counter.connect() as connection:
            await connection.execute(text("SELECT * FROM nowhere WHERE x = :x"), {"x": "SECRET"})
    assert "SECRET" not in str(caught.value) + str(caught.value.__cause__)


async def test_a_read_leaves_no_transaction_behind(database, make_storage, counter):
    """With one open, a reader would go on seeing the past, and on SQLite it would keep the log from being emptied."""
    reader = make_storage(database, pool_max=1)
    await reader.open()
    async with reader.connect() as connection:
        for n in range(3):
            assert (await connection.execute(select(COUNTER.c.n).where(COUNTER.c.id == 1))).scalar_one() == n
            await counter.run(add_one())


async def test_two_nodes_that_count_up_lose_no_step(database, make_storage, counter):
    other = make_storage(database)
    await other.open()

    await asyncio.gather(*((counter, other)[number % 2].run(add_one()) for number in range(60)))

    assert await numbers(counter) == [60, 0]


async def test_a_deadlock_is_tried_again(mariadb_database, make_storage):
    storage = make_storage(mariadb_database)
    await storage.open()
    await storage.ensure_tables([COUNTER])
    await storage.run(lambda connection: connection.execute(insert(COUNTER), [{"id": 1, "n": 0}, {"id": 2, "n": 0}]))
    tries = 0
    met = asyncio.Barrier(2)

    def crossing(first: int, second: int):
        async def work(connection):
            nonlocal tries
            tries += 1
            await add_one(first)(connection)
            if tries <= 2:
                await met.wait()
            await add_one(second)(connection)

        return work

    await asyncio.gather(storage.run(crossing(1, 2)), storage.run(crossing(2, 1)))

    assert tries == 3
    assert await numbers(storage) == [2, 2]


test_a_deadlock_is_tried_again = pytest.mark.mariadb(test_a_deadlock_is_tried_again)


async def test_an_exhausted_pool_is_unavailable_after_its_time_out(database, make_storage):
    storage = make_storage(database, pool_max=2, pool_timeout=0.2)
    await storage.open()
    async with storage.connect(), storage.connect():
        started = time.monotonic()
        with pytest.raises(StorageUnavailable, match="every connection of the pool is in use"):
            async with storage.connect():
                pass
        with pytest.raises(StorageUnavailable):
            await storage.ping()
        assert time.monotonic() - started < 2
    await storage.ping()


async def test_a_storage_that_is_not_open_is_unavailable(database, make_storage):
    storage = make_storage(database)
    for _ in range(2):
        with pytest.raises(StorageUnavailable):
            await storage.ping()
        with pytest.raises(StorageUnavailable):
            await storage.run(add_one())
        await storage.close()


async def test_long_work_does_not_hold_up_reads(counter):
    inside, gate = asyncio.Event(), asyncio.Event()

    async def work(connection):
        await add_one()(connection)
        inside.set()
        await gate.wait()

    task = asyncio.create_task(counter.run(work))
    await inside.wait()
    assert await numbers(counter) == [0, 0]
    gate.set()
    await task
    assert await numbers(counter) == [1, 0]


# -- the URL ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("postgres://x", "expected sqlite:///FILE or mysql://"),
        ("sqlite://", "expected sqlite:///FILE"),
        ("sqlite:///:memory:", "expected sqlite:///FILE"),
        ("mysql://user:hunter2@host", "the name of one database"),
        ("mysql://:hunter2@host/db", "expected a user"),
        ("mysql://user:hunter2@host:99999/db", "a port from 1 to 65535"),
        ("mysql://user:hunter2@host/db?ssl=maybe", "expected off, required, verify-ca or verify-full"),
        ("mysql://user:hunter2@host/db?sll=required", "unknown option sll"),
        ("mysql://user:hunter2@host/db?ssl_ca=/x", "do nothing without ssl=required"),
    ],
)
def test_a_url_that_makes_no_sense_is_named_without_its_password(url, problem, tmp_path):
    with pytest.raises(ConfigError) as caught:
        Storage(url, data_dir=tmp_path)

    assert problem in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_the_data_folder_stands_in_for_its_name(tmp_path):
    storage = Storage("sqlite:///{data_dir}/xmppd.db", data_dir=tmp_path)

    assert storage.where == f"sqlite {tmp_path}/xmppd.db"
    assert storage.node_local
    assert not Storage("mysql://u:p@h/db", data_dir=tmp_path).node_local


@pytest.mark.mariadb
async def test_the_password_appears_in_no_log_and_no_text(mariadb_server, mariadb_database, make_storage, caplog):
    caplog.set_level(logging.DEBUG)
    storage = make_storage(mariadb_database)
    await storage.open()
    await storage.ping()
    wrong = make_storage(mariadb_database.replace("://xmppd:", "://xmppd:wrong"), pool_timeout=0.2)
    with pytest.raises(StorageUnavailable) as caught:
        await wrong.open()

    cause = caught.value.__cause__
    texts = [
        caplog.text,
        repr(storage),
        repr(wrong),
        repr(wrong._target),
        str(caught.value),
        repr(cause),
        repr(storage._engine),
    ]
    assert "Access denied" in str(caught.value)
    for word in (mariadb.PASSWORD, "sesame"):
        assert all(word not in text for text in texts)


# -- SQLite ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    (tmp_path / "data").mkdir(exist_ok=True)
    return f"sqlite:///{tmp_path}/data/xmppd.db"


async def test_the_file_is_for_our_eyes_only_and_every_commit_is_synced(sqlite_url, make_storage, tmp_path):
    storage = make_storage(sqlite_url)
    before = os.umask(0)
    try:
        await storage.open()
        await Accounts(storage).create("example.net", "juliet", {})
    finally:
        os.umask(before)

    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "data").iterdir()}
    assert modes == {"xmppd.db": 0o600, "xmppd.db-wal": 0o600, "xmppd.db-shm": 0o600}
    async with storage.connect() as one, storage.connect() as two:
        for connection in (one, two):
            assert (await connection.exec_driver_sql("PRAGMA synchronous")).scalar_one() == 2  # FULL
            assert (await connection.exec_driver_sql("PRAGMA journal_mode")).scalar_one() == "wal"


LOCKER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
sys.stdin.readline()
connection.execute("COMMIT")
print("free", flush=True)
"""


@pytest.fixture
def lock(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that can take the write lock of the file."""
    started: list[subprocess.Popen[bytes]] = []

    def take() -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-c", LOCKER, str(tmp_path / "data/xmppd.db")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        started.append(process)
        assert process.stdout.readline() == b"locked\n"
        return process

    yield take
    for process in started:
        process.kill()
        process.communicate()


async def test_a_file_locked_by_another_process_is_unavailable_in_time_and_readable_meanwhile(
    sqlite_url, make_storage, lock
):
    storage = make_storage(sqlite_url, pool_timeout=0.3)
    await storage.open()
    accounts = Accounts(storage)
    await accounts.create("example.net", "juliet", {})
    holder = lock()

    started = time.monotonic()
    results = await asyncio.gather(
        *(accounts.create("example.net", f"user{number}", {}) for number in range(10)), return_exceptions=True
    )

    assert {type(result) for result in results} == {StorageUnavailable}
    assert time.monotonic() - started < 3
    assert (await accounts.get("example.net", "juliet")).username == "juliet"
    holder.communicate(b"go on\n")
    assert await accounts.create("example.net", "user1", {})


async def test_queued_writes_outlast_a_lock_of_another_process(sqlite_url, make_storage, lock):
    storage = make_storage(sqlite_url, pool_timeout=0.1)
    await storage.open()
    spool = Spool(storage)
    holder = lock()
    kept = [spool.keep("example.net", "juliet", "r@x", b"%d" % n, dedup=None, quota=None) for n in range(100)]
    done, _ = await asyncio.wait(kept, timeout=0.5)
    assert not done

    holder.communicate(b"go on\n")

    assert await asyncio.gather(*kept) == [Kept.STORED] * 100


async def test_a_file_that_is_locked_at_the_start_says_so(sqlite_url, make_storage, lock, tmp_path):
    (tmp_path / "data").mkdir(exist_ok=True)
    sqlite3.connect(tmp_path / "data/xmppd.db").close()
    holder = lock()
    storage = make_storage(sqlite_url, pool_timeout=0.2)

    with pytest.raises(StorageUnavailable, match=r"xmppd\.db: database is locked"):
        await storage.open()

    holder.communicate(b"go on\n")
    await storage.open()
    await storage.ping()


async def test_a_full_disk_fails_what_does_not_fit_and_loses_nothing_that_was_reported(sqlite_url, make_storage):
    storage = make_storage(sqlite_url, pool_max=1)
    await storage.open()
    storage.batcher._deadline = 0.3
    spool = Spool(storage)

    def keep(number: int):
        return spool.keep("example.net", "juliet", "r@x", b"x" * 20_000, dedup=None, quota=None, row_id=new_id())

    async with storage.connect() as connection:
        limit = (await connection.exec_driver_sql("PRAGMA page_count")).scalar_one() + 40

    def set_limit(dbapi_connection, record, fairy):  # it belongs to a connection, not to the file
        dbapi_connection.cursor().execute(f"PRAGMA max_page_count = {limit}")

    event.listen(storage._engine.sync_engine, "checkout", set_limit)
    results = []
    for number in range(20):
        results += await asyncio.gather(keep(number), return_exceptions=True)
        if isinstance(results[-1], Exception):
            break

    stored = results.count(Kept.STORED)
    assert stored > 0
    assert isinstance(results[-1], StorageUnavailable)
    assert "full" in str(results[-1])
    assert await spool.count("example.net", "juliet") == stored
    limit = 100_000
    assert await keep(99) is Kept.STORED


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a file system of 2 MB")
async def test_a_file_system_that_is_full_fails_writes_in_time_and_they_go_on_when_there_is_room(
    make_storage, tmp_path
):
    small = tmp_path / "small"
    small.mkdir()
    mount = await asyncio.create_subprocess_exec("mount", "-t", "tmpfs", "-o", "size=2m", "xmppd-test", str(small))
    if await mount.wait():
        pytest.skip("no tmpfs can be mounted here")
    storage = make_storage(f"sqlite:///{small}/xmppd.db")
    try:
        await storage.open()
        storage.batcher._deadline = 0.3
        spool = Spool(storage)
        ballast = small / "ballast"
        ballast.write_bytes(b"x" * (os.statvfs(small).f_bavail * os.statvfs(small).f_frsize - 100_000))
        results = []
        while not any(isinstance(result, Exception) for result in results):
            kept = spool.keep("example.net", "juliet", "r@x", b"x" * 20_000, dedup=None, quota=None)
            results += await asyncio.gather(kept, return_exceptions=True)
        assert isinstance(results[-1], StorageUnavailable)
        assert await spool.count("example.net", "juliet") == results.count(Kept.STORED)

        ballast.unlink()

        assert await spool.keep("example.net", "juliet", "r@x", b"x", dedup=None, quota=None) is Kept.STORED
    finally:
        await storage.close()
        umount = await asyncio.create_subprocess_exec("umount", str(small))
        assert await umount.wait() == 0


async def test_a_file_that_is_no_database_is_an_error_that_names_it(sqlite_url, make_storage, tmp_path):
    (tmp_path / "data").mkdir(exist_ok=True)
    (tmp_path / "data/xmppd.db").write_bytes(b"Dear diary, " * 1000)

    with pytest.raises(StorageError, match=r"xmppd\.db: file is not a database"):
        await make_storage(sqlite_url).open()


async def test_a_folder_that_cannot_be_made_is_unavailable(make_storage, tmp_path):
    (tmp_path / "data").write_text("a file where a folder should be")

    with pytest.raises(StorageUnavailable, match="data"):
        await make_storage(f"sqlite:///{tmp_path}/data/xmppd.db").open()


# -- MariaDB ---------------------------------------------------------------------------------------------------------


@pytest.fixture
async def remote(mariadb_database, make_storage) -> Storage:
    storage = make_storage(mariadb_database, pool_timeout=1.0)
    await storage.open()
    return storage


@pytest.mark.mariadb
async def test_a_restarted_server_is_survived_by_writes_that_wait_and_noticed_by_nobody_afterwards(
    remote, mariadb_server
):
    spool = Spool(remote)
    accounts = Accounts(remote)
    await accounts.create("example.net", "juliet", {})
    async with remote.connect(), remote.connect(), remote.connect():
        pass  # three connections that will be dead

    await asyncio.to_thread(mariadb_server.stop)
    started = time.monotonic()
    kept = [spool.keep("example.net", "juliet", "r@x", b"%d" % n, dedup=None, quota=None) for n in range(200)]
    for attempt in (accounts.get("example.net", "juliet"), accounts.create("example.net", "x", {}), remote.ping()):
        with pytest.raises(StorageUnavailable):
            await attempt
    assert time.monotonic() - started < 5
    assert not any(future.done() for future in kept)
    await asyncio.to_thread(mariadb_server.start)

    assert await asyncio.gather(*kept) == [Kept.STORED] * 200
    assert await spool.count("example.net", "juliet") == 200
    assert (await accounts.get("example.net", "juliet")).username == "juliet"


@pytest.mark.mariadb
async def test_connections_cut_by_the_server_are_replaced_without_an_error(remote, mariadb_server):
    accounts = Accounts(remote)
    for number in range(5):
        async with remote.connect(), remote.connect():
            pass
        for (ident,) in mariadb_server.query("SELECT id FROM information_schema.processlist WHERE user = 'xmppd'"):
            mariadb_server.query(f"KILL {ident}")

        if number % 2:
            assert await accounts.create("example.net", f"user{number}", {})
        else:
            assert await accounts.get("example.net", "nobody") is None


@pytest.mark.mariadb
async def test_a_killed_server_has_every_row_it_was_reported_to_have(remote, mariadb_server):
    spool = Spool(remote)
    reported = set()
    more = asyncio.Semaphore(0)  # one for every 300 rows

    async def feed():
        while True:
            row_id = new_id()
            await spool.keep("example.net", "juliet", "r@x", b"x", dedup=None, quota=None, row_id=row_id)
            reported.add(row_id)
            if len(reported) % 300 == 0:
                more.release()

    feeders = [asyncio.create_task(feed()) for _ in range(20)]
    await more.acquire()
    await asyncio.to_thread(mariadb_server.kill)
    while not more.locked():
        await more.acquire()
    await asyncio.to_thread(mariadb_server.start)
    await more.acquire()
    await more.acquire()
    assert not any(task.done() for task in feeders)  # not one of them saw an error
    for task in feeders:
        task.cancel()
    await asyncio.wait(feeders)
    await remote.batcher.drain()

    async with remote.connect() as connection:
        there = list((await connection.execute(select(spool_table.c.id))).scalars())
    assert reported <= set(there)
    assert len(there) == len(set(there))


@pytest.mark.mariadb
async def test_writes_fail_when_the_server_stays_away_longer_than_their_deadline(remote, mariadb_server):
    remote.batcher._deadline = 0.5
    spool = Spool(remote)
    await asyncio.to_thread(mariadb_server.stop)

    started = time.monotonic()
    kept = [spool.keep("example.net", "juliet", "r@x", b"x", dedup=None, quota=None) for _ in range(3000)]
    results = await asyncio.gather(*kept, return_exceptions=True)

    assert {type(result) for result in results} == {StorageUnavailable}
    assert 0.4 < time.monotonic() - started < 5
    assert remote.batcher.rows_waiting == 0


@pytest.mark.mariadb
@pytest.mark.alone
async def test_a_server_that_stands_still_is_unavailable_in_time(
    mariadb_server, mariadb_database, make_storage, monkeypatch
):
    monkeypatch.setattr("xmppd.storage.database.STATEMENT_TIMEOUT", 0.4)
    monkeypatch.setattr("xmppd.storage.engine.CONNECT_TIMEOUT", 0.4)
    storage = make_storage(mariadb_database, pool_timeout=0.5)
    await storage.open()
    accounts = Accounts(storage)
    await accounts.create("example.net", "juliet", {})
    mariadb_server.pause()
    try:
        started = time.monotonic()
        for attempt in (accounts.get("example.net", "juliet"), accounts.create("example.net", "x", {}), storage.ping()):
            with pytest.raises(StorageUnavailable):
                await attempt
        assert time.monotonic() - started < 8
    finally:
        mariadb_server.go_on()

    assert (await accounts.get("example.net", "juliet")).username == "juliet"


@pytest.mark.mariadb
async def test_a_server_that_is_read_only_is_unavailable_for_writes_and_good_for_reads(remote, mariadb_server):
    accounts = Accounts(remote)
    await accounts.create("example.net", "juliet", {})
    mariadb_server.query("SET GLOBAL read_only = 1")
    try:
        with pytest.raises(StorageUnavailable, match="read-only"):
            await accounts.create("example.net", "romeo", {})
        assert await accounts.get("example.net", "juliet")
    finally:
        mariadb_server.query("SET GLOBAL read_only = 0")


@pytest.mark.mariadb
async def test_a_server_that_is_not_strict_does_not_cut_values_off(
    mariadb_server, mariadb_database, make_storage, caplog
):
    (before,) = mariadb_server.query("SELECT @@GLOBAL.sql_mode")
    mariadb_server.query("SET GLOBAL sql_mode = 'NO_BACKSLASH_ESCAPES'")
    try:
        storage = make_storage(mariadb_database)
        await storage.open()
        assert "database server is not strict" in caplog.text
        spool = Spool(storage)
        stanza = b"back\\slash ' \" \n\0\xff"
        await spool.keep("example.net", "juliet", "r@x", stanza, dedup=None, quota=None)
        async with storage.connect() as connection:
            assert (await connection.execute(select(spool_table.c.stanza))).scalar_one() == stanza

        with pytest.raises(StorageError):
            await storage.run(
                lambda connection: connection.execute(text("UPDATE spool SET username = :long"), {"long": b"x" * 2000})
            )
    finally:
        mariadb_server.query(f"SET GLOBAL sql_mode = '{before[0]}'")


@pytest.mark.mariadb
async def test_a_transaction_in_the_midst_of_which_its_node_is_frozen_keeps_others_waiting_for_its_rows_only(
    mariadb_database, make_storage
):
    frozen, other = make_storage(mariadb_database), make_storage(mariadb_database)
    await frozen.open()
    await other.open()
    await Spool(other).keep("example.net", "juliet", "r@x", b"<message/>", dedup=None, quota=None)
    take = text("UPDATE spool SET told = NULL WHERE server_host = 'example.net' AND username >= 'j'")
    entered, left = asyncio.Event(), asyncio.Event()

    async def half(connection):
        await connection.execute(take)
        entered.set()
        await left.wait()
        raise LookupError

    task = asyncio.create_task(frozen.run(half))
    await entered.wait()
    async with asyncio.timeout(2):  # another row, in the midst of what is locked
        await Spool(other).keep("example.net", "nurse", "r@x", b"<message/>", dedup=None, quota=None)
    async with asyncio.timeout(12):  # the row itself: the server ends that transaction after 3 s
        await other.run(lambda connection: connection.execute(take))
    left.set()
    with pytest.raises((StorageError, LookupError)):
        await task


@pytest.mark.mariadb
@pytest.mark.parametrize(("format", "isolation"), [("MIXED", "READ-COMMITTED"), ("STATEMENT", "REPEATABLE-READ")])
async def test_transactions_read_what_is_committed_unless_the_log_is_one_of_statements(
    mariadb_server, mariadb_database, make_storage, monkeypatch, format, isolation
):
    show = engine.MysqlConnection.show

    async def with_a_log(connection, what):  # the server of the tests has none, and it takes a restart
        return {**await show(connection, what), "log_bin": "ON"}

    monkeypatch.setattr(engine.MysqlConnection, "show", with_a_log)
    mariadb_server.query(f"SET GLOBAL binlog_format = '{format}'")
    try:
        storage = make_storage(mariadb_database)
        await storage.open()
        async with storage.connect() as connection:
            asked = text("SELECT VARIABLE_VALUE FROM information_schema.SESSION_VARIABLES WHERE VARIABLE_NAME = :name")
            assert (await connection.execute(asked, {"name": "TX_ISOLATION"})).scalar_one() == isolation
    finally:
        mariadb_server.query("SET GLOBAL binlog_format = 'MIXED'")


@pytest.mark.mariadb
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("/t_", "/t_missing_"), "Unknown database"),
        (("://xmppd:", "://nobody:"), "Access denied"),
    ],
)
async def test_a_server_that_refuses_us_says_why(mariadb_database, make_storage, change, reason):
    storage = make_storage(mariadb_database.replace(*change))

    with pytest.raises(StorageUnavailable, match=reason):
        await storage.open()


# -- TLS -------------------------------------------------------------------------------------------------------------


@pytest.mark.mariadb
@pytest.mark.parametrize("mode", ["required", "verify-ca", "verify-full"])
async def test_tls_that_was_asked_for_and_is_not_given_is_refused(mariadb_database, make_storage, mode):
    storage = make_storage(f"{mariadb_database}?ssl={mode}")

    with pytest.raises(StorageUnavailable, match="TLS was asked for, but the server does not offer it"):
        await storage.open()


@pytest.fixture(scope="module")
def tls_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[mariadb.MariaDB]:
    if why := mariadb.missing():
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("tls")
    let_in(folder)
    cert, key = mariadb.make_certificate(folder)
    server = mariadb.MariaDB((f"--ssl-cert={cert}", f"--ssl-key={key}"))
    server.certificate = cert
    yield server
    server.destroy()


LOOPS = """
import asyncio, sys
from pathlib import Path
import uvloop
from xmppd.errors import StorageUnavailable
from xmppd.storage import Accounts, Storage

async def main(url):
    storage = Storage(url, data_dir=Path("."))
    try:
        await storage.open()
    except StorageUnavailable as exc:
        print("refused", exc)
        return
    async with storage.connect() as connection:
        cipher = (await connection.exec_driver_sql("SHOW STATUS LIKE 'Ssl_cipher'")).one()[1]
    await Accounts(storage).create("example.net", "juliet", {})
    await storage.close()
    print("cipher", cipher)

(uvloop if sys.argv[2] == "uvloop" else asyncio).run(main(sys.argv[1]))
"""


def attempt(server: mariadb.MariaDB, options: str, loop: str = "asyncio") -> str:
    answer = subprocess.run(
        [sys.executable, "-c", LOOPS, f"{server.new_database()}{options}", loop],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert not answer.stderr, answer.stderr
    return answer.stdout


@pytest.mark.mariadb
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_tls_is_on_when_asked_for(tls_server, loop):
    assert attempt(tls_server, "?ssl=required", loop).startswith("cipher TLS_")


@pytest.mark.mariadb
async def test_the_certificate_is_checked_as_asked(tls_server, make_storage):
    url = tls_server.new_database()
    other_name = url.replace("127.0.0.1", "localhost")
    for options in ("", "?ssl=required", f"?ssl=verify-full&ssl_ca={tls_server.certificate}"):
        await make_storage(f"{url}{options}").open()

    with pytest.raises(StorageUnavailable, match="certificate verify failed"):
        await make_storage(f"{url}?ssl=verify-ca").open()
    with pytest.raises(StorageUnavailable, match=r"doesn't match|not valid for|mismatch"):
        await make_storage(f"{other_name}?ssl=verify-full&ssl_ca={tls_server.certificate}").open()
