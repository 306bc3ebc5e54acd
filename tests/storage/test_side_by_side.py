"""Two versions on one database: the newer one, with a revision more, is a copy of the code to which one was added."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import text

from tests.harness.next_version import make_next_version
from xmppd.errors import SchemaTooNew
from xmppd.spool import Kept, Spool
from xmppd.storage import Storage, migrate

REPOSITORY = Path(__file__).parents[2]
NEWER = """
import asyncio, sys
from pathlib import Path
from xmppd.storage import Storage

async def main(url):
    storage = Storage(url, data_dir=Path("."))
    await storage.open()
    await storage.ping()
    await storage.close()

asyncio.run(main(sys.argv[1]))
"""


@pytest.fixture
def next_version(tmp_path: Path) -> Callable[[bool], Path]:
    """`next_version(expands)`: the folder of a copy of the code with one revision more."""
    return lambda expands: make_next_version(tmp_path / "next", expands=expands)


async def run_next(folder: Path, database: str) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", NEWER, database, cwd=folder, env={"PYTHONPATH": str(folder)}
    )
    assert await process.wait() == 0


async def tables(storage: Storage) -> set[str]:
    show = "SELECT name FROM sqlite_master" if storage.node_local else "SHOW TABLES"
    async with storage.connect() as connection:
        return set((await connection.execute(text(show))).scalars())


async def keep(storage: Storage) -> Kept:
    return await Spool(storage).keep("example.net", "juliet", "r@x", b"x", dedup=None, quota=None)


async def test_an_older_node_goes_on_beside_a_newer_one_and_says_so(
    database, storage, make_storage, next_version, caplog
):
    assert await keep(storage) is Kept.STORED

    await run_next(next_version(True), database)
    assert "novelty" in await tables(storage)
    assert await keep(storage) is Kept.STORED
    await storage.ping()
    await storage.ping()
    assert caplog.text.count("schema is newer than this version") == 1
    restarted = make_storage(database)
    await restarted.open()

    assert await keep(restarted) is Kept.STORED
    assert await Spool(restarted).count("example.net", "juliet") == 3
    assert "revision=9999 knows=" in caplog.text


@pytest.mark.long
async def test_an_older_node_does_not_start_where_something_was_taken_away(
    database, storage, make_storage, next_version
):
    await run_next(next_version(False), database)

    with pytest.raises(SchemaTooNew, match="9999"):
        await make_storage(database).open()


async def test_a_dry_run_tells_what_would_be_done_and_does_nothing(database, make_storage):
    storage = make_storage(database)

    plan = await storage.plan_migration()

    assert plan.current is None
    assert [revision for revision, _, _ in plan.steps] == migrate.revisions()
    assert plan.sql.count("CREATE TABLE") > 10
    if storage.node_local:
        assert not os.path.exists(database.removeprefix("sqlite:///"))  # noqa: ASYNC240
    else:
        assert "ENGINE=InnoDB" in plan.sql
    await storage.open()
    assert "spool" in await tables(storage)


async def test_a_dry_run_tells_only_what_is_missing(database, storage, make_storage):
    async with storage.connect() as connection:
        await connection.execute(text("DROP TABLE outbox"))
        await connection.execute(text("UPDATE alembic_version SET version_num = '0003'"))
    later = make_storage(database)

    plan = await later.plan_migration()

    assert (plan.current, plan.steps[0][0]) == ("0003", "0004")
    assert "CREATE TABLE outbox" in plan.sql
    assert "CREATE TABLE spool" not in plan.sql
    assert "outbox" not in await tables(storage)
    await later.open()
    assert "outbox" in await tables(storage)
    assert (await later.plan_migration()).steps == ()


@pytest.mark.long
def test_the_program_tells_of_a_migration_does_it_and_has_nothing_more_to_do(tmp_path):
    (tmp_path / "xmppd.yml").write_text(f"data_dir: {tmp_path}\n")

    def migrate_with(*argv: str) -> str:
        command = [sys.executable, "-m", "xmppd", "--config", str(tmp_path / "xmppd.yml"), "--migrate", *argv]
        return subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout

    told = migrate_with("--dry-run")
    assert "would apply 0001: The first tables" in told
    assert "CREATE TABLE spool" in told
    assert not (tmp_path / "xmppd.db").exists()

    assert migrate_with().endswith("done\n")
    assert (tmp_path / "xmppd.db").exists()
    assert migrate_with().endswith("nothing to do\n")
