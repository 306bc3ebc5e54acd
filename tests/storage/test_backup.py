"""Backups of the embedded database, made and put back while it is in use."""

import asyncio
import os
import sqlite3
import stat
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import select, update

from tests.databases import Databases
from xmppd.admin.registry import Caller, Registry, commands_of
from xmppd.admin.storage_commands import BackupCommands
from xmppd.errors import CommandError, SchemaTooNew, StorageError
from xmppd.spool import Holder, Spool
from xmppd.storage import Accounts, Storage
from xmppd.storage.backup import NoBackup
from xmppd.storage.members import Members, Registration
from xmppd.storage.tables import account, node

HOST = "example.net"
NODE = b"N" * 16


@pytest.fixture
async def sqlite(databases: Databases, tmp_path: Path, make_storage) -> Storage:
    storage = make_storage(await databases.migrated("sqlite", tmp_path))
    await storage.open()
    return storage


async def register(storage: Storage, incarnation: int, instance: bytes = b"I" * 16) -> None:
    me = Registration(NODE, "xmppd@a", "", incarnation, "1", b"h" * 32, instance, b"p" * 32)
    await Members(storage).identity()
    await Members(storage).register(me, lease=60)


async def names(storage: Storage) -> list[str]:
    async with storage.connect() as connection:
        return sorted((await connection.execute(select(account.c.username))).scalars())


def in_file(file: Path, sql: str) -> list[tuple]:
    with closing(sqlite3.connect(file)) as connection:
        return connection.execute(sql).fetchall()


async def test_a_backup_has_all_that_was_committed_and_belongs_to_its_owner_alone(sqlite, tmp_path):
    await Accounts(sqlite).create(HOST, "juliet", {})
    os.umask(os.umask(0))  # whatever it is

    size = await sqlite.back_up(tmp_path / "copy.db")

    assert size == (tmp_path / "copy.db").stat().st_size > 0
    assert stat.S_IMODE((tmp_path / "copy.db").stat().st_mode) == 0o600
    assert in_file(tmp_path / "copy.db", "SELECT username FROM account") == [("juliet",)]
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


async def test_the_node_writes_on_while_a_backup_is_made_and_the_copy_is_of_one_moment(sqlite, tmp_path):
    """Each account comes with one of the same name at another host, in one transaction."""
    spool, accounts, written = Spool(sqlite), Accounts(sqlite), 0
    await accounts.create(HOST, "juliet", {})
    kept = [
        spool.keep(HOST, "juliet", "r@x", b"x" * 100_000, dedup=None, quota=None) for _ in range(100)
    ]  # so that it takes a while
    await asyncio.gather(*kept)
    backup = asyncio.create_task(sqlite.back_up(tmp_path / "copy.db"))

    async def pair(number: int):
        async def work(connection):
            for host in (HOST, "other.example"):
                values = {"server_host": host, "username": f"u{number}", "created_at": 1.0}
                await connection.execute(account.insert(), values)

        await sqlite.run(work)

    while not backup.done():
        await pair(written)
        written += 1
        await asyncio.sleep(0)
    await backup

    counts = in_file(tmp_path / "copy.db", "SELECT server_host, count(*) FROM account GROUP BY 1")
    assert written > 0
    assert dict(counts).get(HOST, 0) == dict(counts).get("other.example", 0) + 1


async def test_a_backup_never_takes_the_place_of_a_file(sqlite, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")

    for name in ("file", "link"):
        with pytest.raises(FileExistsError):
            await sqlite.back_up(tmp_path / name)

    assert (tmp_path / "file").read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()


async def test_what_is_restored_is_what_was_backed_up_and_the_node_is_who_it_is(sqlite, tmp_path):
    await register(sqlite, 1)
    accounts, spool = Accounts(sqlite), Spool(sqlite)
    await accounts.create(HOST, "juliet", {})
    await spool.keep(HOST, "juliet", "r@x", b"<message/>", dedup=None, quota=None, holder=Holder(NODE, 1, "s"))
    await sqlite.back_up(tmp_path / "copy.db")
    await register(sqlite, 5)
    await accounts.create(HOST, "romeo", {})
    await accounts.remove(HOST, "juliet")

    await sqlite.restore(tmp_path / "copy.db")

    assert await names(sqlite) == ["juliet"]
    ((row,),) = [list(await Members(sqlite).all())]
    assert (row.incarnation, row.running) == (5, True)
    assert await spool.count(HOST, "juliet") == 1  # whose session it was waits no longer
    assert await accounts.create(HOST, "mercutio", {})
    assert in_file(sqlite.file, "PRAGMA integrity_check") == [("ok",)]
    assert in_file(sqlite.file, "PRAGMA journal_mode") == [("wal",)]
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


async def test_a_copy_that_sqlite_itself_made_and_one_of_an_older_version_are_restored(sqlite, tmp_path):
    await register(sqlite, 1)
    await Accounts(sqlite).create(HOST, "juliet", {})
    old = tmp_path / "old.db"
    with closing(sqlite3.connect(sqlite.file)) as source, closing(sqlite3.connect(old)) as target:
        source.backup(target)
        target.execute("PRAGMA journal_mode = WAL")
        # As it was before the outbox.
        target.execute("DROP TABLE outbox")
        target.execute("UPDATE alembic_version SET version_num = '0003'")
        target.commit()
    revision = in_file(sqlite.file, "SELECT version_num FROM alembic_version")

    await sqlite.restore(old)

    assert in_file(sqlite.file, "SELECT version_num FROM alembic_version") == revision
    assert in_file(sqlite.file, "SELECT count(*) FROM outbox") == [(0,)]
    assert await names(sqlite) == ["juliet"]


@pytest.mark.parametrize("what", ["missing", "empty", "text", "other", "newer", "torn"])
async def test_what_is_no_backup_is_refused_and_nothing_changes(sqlite, tmp_path, what):
    await Accounts(sqlite).create(HOST, "juliet", {})
    for number in range(50):
        await Accounts(sqlite).create(HOST, f"{number}" * 200, {})
    before = await names(sqlite)
    file = tmp_path / "backup.db"
    if what == "empty":
        file.touch()
    elif what == "text":
        file.write_text("-- a dump\n" * 1000)
    elif what == "other":
        with closing(sqlite3.connect(file)) as connection:
            connection.execute("CREATE TABLE songs (name)")
    elif what != "missing":
        await sqlite.back_up(file)
    if what == "newer":
        with closing(sqlite3.connect(file)) as connection:
            connection.execute("UPDATE alembic_version SET version_num = 'r9999'")
            connection.commit()
    if what == "torn":
        with file.open("r+b") as torn:
            torn.seek(file.stat().st_size // 2)
            torn.write(os.urandom(file.stat().st_size // 2))

    with pytest.raises((NoBackup, SchemaTooNew, OSError)):
        await sqlite.restore(file)

    assert await names(sqlite) == before


async def test_a_database_on_a_server_has_no_file(mariadb_database, databases, make_storage, tmp_path):
    storage = make_storage(mariadb_database)

    assert storage.file is None
    with pytest.raises(StorageError):
        await storage.back_up(tmp_path / "copy.db")
    with pytest.raises(StorageError):
        await storage.restore(tmp_path / "copy.db")


class Nodes:
    """Who is there, as the commands see it."""

    def __init__(self, storage: Storage, folder: Path) -> None:
        self.online, self.others, self.restarts = 0, [], 0
        self.registry = Registry()
        commands = BackupCommands(storage, folder, self, self.running, self.restart)
        self.registry.register("core", commands_of(commands))

    def count(self, host: str | None = None) -> int:
        return self.online

    async def running(self) -> list[str]:
        return self.others

    def restart(self) -> None:
        self.restarts += 1

    async def code(self, *words: str) -> int:
        try:
            return (await self.registry.call(words[0], words[1:], caller=Caller("test", "test"))).code
        except CommandError as exc:
            return exc.code


async def test_a_restore_is_refused_while_others_use_the_database_whatever_is_said(sqlite, tmp_path):
    nodes = Nodes(sqlite, tmp_path)
    assert await nodes.code("backup", "copy.db") == 0
    await Accounts(sqlite).create(HOST, "juliet", {})

    nodes.online = 1
    assert await nodes.code("restore", "copy.db") == 32
    nodes.online, nodes.others = 0, ["xmppd@b"]
    assert await nodes.code("restore", "copy.db", "force") == 32
    nodes.others = []
    assert await nodes.code("restore", "copy.db", "now") == 2
    assert await nodes.code("restore", "xmppd.db", "force") == 31
    assert (await names(sqlite), nodes.restarts) == (["juliet"], 0)

    assert await nodes.code("restore", str(tmp_path / "copy.db")) == 0
    assert (await names(sqlite), nodes.restarts) == ([], 1)
    (former,) = tmp_path.glob("before-restore-*.db")
    assert in_file(former, "SELECT username FROM account") == [("juliet",)]


async def test_on_a_database_server_the_commands_say_what_to_use(mariadb_database, make_storage, tmp_path):
    nodes = Nodes(make_storage(mariadb_database), tmp_path)

    assert await nodes.code("backup", "copy.db") == 30
    with pytest.raises(CommandError, match="mysqldump --single-transaction"):
        await nodes.registry.call("restore", ["copy.db"], caller=Caller("test", "test"))


async def test_restoring_while_another_program_writes_waits_for_it(sqlite, tmp_path):
    await register(sqlite, 1)
    await sqlite.back_up(tmp_path / "copy.db")
    await Accounts(sqlite).create(HOST, "juliet", {})
    with closing(sqlite3.connect(sqlite.file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        restoring = asyncio.create_task(sqlite.restore(tmp_path / "copy.db"))
        done, _ = await asyncio.wait([restoring], timeout=0.5)
        assert not done
        assert await names(sqlite) == ["juliet"]
        other.execute("COMMIT")
        await restoring

    assert await names(sqlite) == []
    async with sqlite.connect() as connection:
        await connection.execute(update(node).values(version="2"))
