"""Bringing the schema up to date: once, by one node, never backwards."""

import asyncio
import logging
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Column, Integer, MetaData, inspect, select, text, update

from modules.announce.motd import motd, motd_seen
from modules.blocking.store import block_item, spam_report
from modules.last import last_activity
from modules.offline_receipt.states import delivery_state
from modules.private import private_xml
from modules.roster.store import roster_item, roster_version
from modules.vcard import vcard
from xmppd.errors import SchemaTooNew, StorageUnavailable
from xmppd.storage import Lease, Utf8, db_now, host_column, long_text, migrate, module_table, user_column
from xmppd.storage.migrate import revisions
from xmppd.storage.tables import db_lock, metadata

# The tables that the bundled modules declare, each of which a revision has to make.
BUNDLED = [
    block_item,
    delivery_state,
    last_activity,
    motd,
    motd_seen,
    private_xml,
    roster_item,
    roster_version,
    spam_report,
    vcard,
]
REPOSITORY = Path(__file__).parents[2]


def declared() -> MetaData:
    everything = MetaData()
    for table in (*metadata.tables.values(), *BUNDLED):
        table.to_metadata(everything)
    return everything


def test_every_table_of_a_bundled_module_is_among_them():
    """A module's declaration that is not listed here would be compared with nothing."""
    declarations = [
        name
        for file in (REPOSITORY / "modules").rglob("*.py")
        for name in re.findall(r"module_table\(\s*\"(\w+)\"", file.read_text())
    ]

    assert sorted(declarations) == sorted(table.name for table in BUNDLED)


def test_the_revisions_are_those_that_alembic_finds():
    found = ScriptDirectory(str(REPOSITORY / "xmppd/storage/migrations")).walk_revisions()

    assert revisions() == [script.revision for script in found][::-1]


def test_a_start_without_a_migration_does_not_load_alembic():
    program = "import sys, xmppd.server; sys.exit('alembic' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=False).returncode == 0


async def tables_of(storage) -> set[str]:
    async with storage.connect() as connection:
        return set(await connection.run_sync(lambda sync: inspect(sync).get_table_names()))


async def test_the_migrated_schema_is_the_declared_one(database, make_storage):
    storage = make_storage(database)
    await storage.open()

    await assert_as_declared(storage)


async def assert_as_declared(storage) -> None:
    def compare(connection):
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        return compare_metadata(context, declared())

    async with storage.connect() as connection:
        assert await connection.run_sync(compare) == []


async def test_the_comparison_sees_a_difference(storage):
    """Else the test above would prove nothing."""
    wrong = declared()
    wrong.tables["spool"].append_column(Column("forgotten", Integer))
    wrong.tables["vcard"].c.xml.type = Utf8(10)

    def compare(connection):
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        return compare_metadata(context, wrong)

    async with storage.connect() as connection:
        assert len(await connection.run_sync(compare)) == 2


@pytest.mark.mariadb
async def test_tables_on_mariadb_are_innodb_and_utf8mb4(mariadb_database, mariadb_server, make_storage):
    storage = make_storage(mariadb_database)
    await storage.open()

    name = mariadb_database.rsplit("/", 1)[1]
    kinds = mariadb_server.query(
        "SELECT DISTINCT engine, table_collation, row_format FROM information_schema.tables "
        f"WHERE table_schema = '{name}' AND table_name <> 'alembic_version'"
    )
    assert kinds == [("InnoDB", "utf8mb4_bin", "Dynamic")]


async def test_opening_again_changes_nothing_and_asks_for_no_lock(database, storage, make_storage):
    async with storage.connect() as connection:
        await connection.execute(
            update(db_lock).values(token=b"x" * 16, holder="somebody", until=db_now() + 1000.0)
        )  # held for ever, as far as we are concerned

    again = make_storage(database)
    async with asyncio.timeout(3):
        await again.open()

    await again.ping()


async def test_a_schema_of_a_newer_version_is_refused_with_both_revisions(database, storage, make_storage):
    async with storage.connect() as connection:
        await connection.execute(text("UPDATE alembic_version SET version_num = 'ff99'"))
        await connection.execute(text("DELETE FROM setting WHERE name = 'schema_floor'"))

    old = make_storage(database)
    with pytest.raises(SchemaTooNew, match=r"revision ff99.*up to 0005"):
        await old.open()

    with pytest.raises(StorageUnavailable):
        await old.ping()


OPENER = """
import asyncio, logging, sys
from pathlib import Path
from xmppd.storage import Storage

logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")

async def main(url):
    storage = Storage(url, data_dir=Path("."))
    print("ready", flush=True)
    sys.stdin.readline()
    await storage.open()
    await storage.ping()
    await storage.close()

asyncio.run(main(sys.argv[1]))
"""


async def start(database: str) -> asyncio.subprocess.Process:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        OPENER,
        database,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=REPOSITORY,
    )
    assert await process.stdout.readline() == b"ready\n"
    return process


async def test_of_nodes_that_start_at_once_on_an_empty_database_one_migrates(database):
    nodes = await asyncio.gather(*(start(database) for _ in range(3)))

    answers = [output.decode() for output, _ in await asyncio.gather(*(node.communicate(b"go\n") for node in nodes))]

    assert [node.returncode for node in nodes] == [0, 0, 0], answers
    assert sum("migration done" in answer for answer in answers) == 1
    assert all("storage open" in answer for answer in answers)


async def test_the_lock_of_a_migrator_that_died_runs_out(database, make_storage, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(migrate, "_PROGRESS", 0.3)
    monkeypatch.setattr(migrate, "_POLL", 0.05)
    dead = await hold_migration_lock(database, make_storage, seconds=1.2)
    loop = asyncio.get_running_loop()
    started = loop.time()

    node = make_storage(database)
    await node.open()

    assert 0.8 < loop.time() - started < 10
    assert f'waiting for the migration lock waited_s=0 holder="{dead}"' in caplog.text
    await node.ping()


async def test_waiting_for_the_lock_has_an_end(database, make_storage, monkeypatch):
    monkeypatch.setattr(migrate, "WAIT_SECONDS", 0.3)
    holder = await hold_migration_lock(database, make_storage, seconds=100)

    with pytest.raises(StorageUnavailable, match=rf"not free within 0\.3 s; {holder}"):
        await make_storage(database).open()


async def hold_migration_lock(database: str, make_storage, *, seconds: float) -> str:
    """Leaves a database as a migrator leaves it that was killed right after it took the lock."""
    storage = make_storage(database)
    await storage.open()
    async with storage.connect() as connection:
        for name in await tables_of(storage) - {"db_lock"}:
            await connection.execute(text(f"DROP TABLE {name}"))
    assert await Lease(storage.connect, migrate.LOCK_NAME, "node02 process 7", seconds).acquire()
    return "node02 process 7"


async def test_a_migration_cut_off_in_the_middle_is_completed(database, storage, make_storage):
    """On MySQL every DDL statement is there for good, so a killed migration leaves some tables and no revision."""
    async with storage.connect() as connection:
        for statement in (
            "DROP TABLE alembic_version",
            "DROP TABLE vcard",
            "DROP TABLE private_xml",
            "DROP INDEX spool_free ON spool" if connection.dialect.name == "mysql" else "DROP INDEX spool_free",
        ):
            await connection.execute(text(statement))

    again = make_storage(database)
    await again.open()

    await assert_as_declared(again)


async def test_a_database_of_the_first_version_is_brought_up_to_date(database, storage, make_storage):
    async with storage.connect() as connection:
        for name in ("block_item", "spam_report", "motd", "motd_seen"):
            await connection.execute(text(f"DROP TABLE {name}"))
        await connection.execute(text("UPDATE alembic_version SET version_num = '0001'"))

    again = make_storage(database)
    await again.open()

    await assert_as_declared(again)


async def test_migrators_that_are_killed_at_any_moment_leave_a_database_the_next_one_can_finish(
    database, make_storage, monkeypatch
):
    for moment in (0.1, 0.2, 0.3):
        node = await start(database)
        node.stdin.write(b"go\n")
        await asyncio.sleep(moment)
        if node.returncode is None:
            node.kill()
        await node.communicate()

    monkeypatch.setattr("xmppd.storage.lease.db_now", lambda: db_now() + 60.0)  # the dead one's lock has run out
    storage = make_storage(database)
    await storage.open()

    await assert_as_declared(storage)


async def test_a_node_that_lost_the_lock_stops_migrating(database, make_storage, monkeypatch):
    monkeypatch.setattr(migrate.Guard, "lost", True)

    with pytest.raises(StorageUnavailable, match="lock was lost"):
        await make_storage(database).open()


async def test_tables_of_third_party_modules_are_made_once(storage, database, make_storage):
    other = make_storage(database)
    await other.open()
    mine = module_table("weather_report", Column("id", Integer, primary_key=True), Column("text", long_text()))
    before = await tables_of(storage)

    await asyncio.gather(storage.ensure_tables([mine]), other.ensure_tables([mine]))
    await storage.ensure_tables([mine])

    assert await tables_of(storage) - before == {"weather_report"}


def test_a_module_can_declare_its_table_again_after_a_reload():
    for _ in range(2):
        table = module_table("weather_report", host_column(primary_key=True), user_column(primary_key=True))
    assert [column.name for column in table.primary_key] == ["server_host", "username"]


async def test_a_wheel_has_the_migrations_in_it(tmp_path):
    """Started from an unpacked wheel, with the checkout out of reach."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (tmp_path / name).write_text((REPOSITORY / name).read_text() if (REPOSITORY / name).exists() else "")
    settings = tmp_path / "pyproject.toml"  # an older setuptools builds the same wheel, but knows no SPDX licence
    settings.write_text("\n".join(line for line in settings.read_text().splitlines() if not line.startswith("license")))
    for name in ("xmppd", "modules"):
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        "import setuptools.build_meta as b; print(b.build_wheel('dist'))",
        cwd=tmp_path,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await build.communicate()
    wheels = list((tmp_path / "dist").glob("*.whl"))
    assert wheels, output.decode()
    installed = tmp_path / "installed"
    shutil.unpack_archive(wheels[0], installed, "zip")
    node = await asyncio.create_subprocess_exec(
        sys.executable, "-c", OPENER, f"sqlite:///{tmp_path}/x.db", cwd=installed, stdin=asyncio.subprocess.PIPE
    )
    await node.communicate(b"go\n")

    assert node.returncode == 0
    names = sqlite3.connect(tmp_path / "x.db").execute("SELECT name FROM sqlite_master").fetchall()
    assert ("spool",) in names


# -- leases ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def leases(storage):
    return SimpleNamespace(
        a=Lease(storage.connect, "job", "node01", 0.5), b=Lease(storage.connect, "job", "node02", 0.5)
    )


async def test_a_lease_has_one_holder_until_it_is_released(leases):
    assert await leases.a.acquire()
    assert await leases.a.held_by() == "node01"
    assert not await leases.b.acquire()
    await leases.b.release()  # not its to release
    assert not await leases.b.acquire()

    await leases.a.release()

    assert await leases.b.acquire()
    assert not await leases.a.renew()


async def test_a_lease_that_is_renewed_stays_and_one_that_is_not_runs_out(leases):
    assert await leases.a.acquire()
    loop = asyncio.get_running_loop()
    end = loop.time() + 1.0
    while loop.time() < end:
        assert await leases.a.renew()
        assert not await leases.b.acquire()
        await asyncio.sleep(0.1)

    while not await leases.b.acquire():
        assert loop.time() < end + 5
        await asyncio.sleep(0.05)

    assert not await leases.a.renew()
    assert await leases.b.held_by() == "node02"


async def test_of_many_that_want_a_lease_at_once_one_gets_it(storage):
    results = await asyncio.gather(*(Lease(storage.connect, "job", f"n{n}", 30).acquire() for n in range(8)))

    assert sorted(results) == [False] * 7 + [True]


async def test_the_databases_clock_is_the_time_of_day(storage):
    import time

    async with storage.connect() as connection:
        now = (await connection.execute(select(db_now()))).scalar_one()

    assert abs(now - time.time()) < 2
