"""Bringing the schema to this version at the start, by one node at a time.

A lock row says who migrates; the others wait. A migrator that was killed loses the lock when its lease has run out,
and its half-done work is completed: on SQLite a migration is one transaction, on MySQL (where each DDL statement
commits by itself) every step looks first at what is there.

Alembic is loaded when there is something to migrate: nearly every start is spared a sixth of its time and some memory.
"""

import asyncio
import os
import re
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sqlalchemy import Connection, Table, inspect, select, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.schema import CreateTable

from xmppd.errors import SchemaTooNew, StorageUnavailable
from xmppd.log import get_logger
from xmppd.storage.faults import classify
from xmppd.storage.lease import Lease
from xmppd.storage.sql import upsert
from xmppd.storage.tables import db_lock, setting

if TYPE_CHECKING:
    from alembic.config import Config

log = get_logger("storage")

LOCK_NAME: Final = "migration"
LOCK_SECONDS: Final = 30.0  # a killed migrator holds the others up for as long as this
WAIT_SECONDS: Final = 300.0
_FLOOR: Final = "schema_floor"  # the setting that names the oldest revision whose code may go on
_POLL: Final = 0.2
_PROGRESS: Final = 5.0
_SCRIPTS: Final = Path(__file__).parent / "migrations"


class Guard:
    """Tells a migration under way that another node may have taken the lock from it."""

    lost = False

    def check(self) -> None:
        if self.lost:
            raise StorageUnavailable("the migration lock was lost to another node; nothing more was changed")


async def migrate(engine: AsyncEngine, where: str) -> None:
    """Raises SchemaTooNew, StorageUnavailable (somebody holds the lock for too long); SQLAlchemy's for the rest."""
    if await _is_current(engine, where):
        return
    async with _migration_lock(engine) as guard:
        if await _is_current(engine, where):
            return
        log.info("migration begins", database=where)
        await _upgrade(engine, guard)
        log.info("migration done", database=where)


async def create_missing(engine: AsyncEngine, tables: Sequence[Table]) -> None:
    """Creates those of `tables` that are not there, with their indexes."""

    def missing(connection: Connection) -> list[Table]:
        there = set(inspect(connection).get_table_names())
        return [table for table in tables if table.name not in there]

    def create(connection: Connection) -> None:
        for table in missing(connection):
            table.create(connection)
            log.info("table created", name=table.name)

    async with engine.connect() as connection:
        if not await connection.run_sync(missing):
            return
    async with _migration_lock(engine), engine.connect() as connection:
        await connection.run_sync(create)


async def _is_current(engine: AsyncEngine, where: str) -> bool:
    async with engine.connect() as connection:
        current, floor = await connection.run_sync(_schema_of)
    known = revisions()
    if current is None or current in known:
        return current == known[-1]
    if floor not in known:
        raise SchemaTooNew(
            f"{where}: the schema is at revision {current}, which this version does not know; it knows up to "
            f"{known[-1]}. The database was made by a newer version: run that one, or go back to a backup."
        )
    tell_newer(where, current)
    return True


def tell_newer(where: str, revision: str) -> None:
    """Another node has migrated to what this version does not know, and may go on with."""
    log.warning("schema is newer than this version", database=where, revision=revision, knows=revisions()[-1])


def _schema_of(connection: Connection) -> tuple[str | None, str | None]:
    """Its revision, and the oldest one whose code may go on with it."""
    tables = inspect(connection)
    if not tables.has_table("alembic_version"):
        return None, None
    current: str | None = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    if current is None or not tables.has_table("setting"):
        return current, None
    floor = connection.execute(select(setting.c.value).where(setting.c.name == _FLOOR)).scalar()
    return current, None if floor is None else floor.decode()


@cache
def revisions() -> list[str]:
    """All that this version knows, oldest first."""
    return [revision for revision, _, _ in _files()]


def oldest_beside() -> str:
    """The oldest revision whose code may go on when the schema is that of this version: the last one that does not
    merely add something."""
    return [revision for revision, _, expands in _files() if not expands][-1]


def _files() -> list[tuple[str, str, bool]]:
    """(revision, its first line, whether it expands), oldest first."""
    found = []
    for file in sorted((_SCRIPTS / "versions").glob("r[0-9]*.py")):
        source = file.read_text()
        (revision,) = re.findall(r'^revision = "(\w+)"', source, re.MULTILINE)
        title = source.partition("\n")[0].strip('"')
        found.append((revision, title, "\nexpands = True\n" in source))
    return found


@dataclass(frozen=True, slots=True)
class Plan:
    """What a migration would do. `steps`: revision, what it is for, whether code that does not know it may go on."""

    current: str | None
    steps: tuple[tuple[str, str, bool], ...]
    sql: str


async def plan(engine: AsyncEngine | None, where: str, dialect: str) -> Plan:
    """Nothing is changed. `engine` None: there is no database yet. Raises SchemaTooNew."""
    current = None
    if engine is not None:
        await _is_current(engine, where)
        async with engine.connect() as connection:
            current, _ = await connection.run_sync(_schema_of)
    known = revisions()
    if current is not None and current not in known:
        return Plan(current, (), "")
    steps = _files()[known.index(current) + 1 if current else 0 :]
    return Plan(current, tuple(steps), _sql(current, dialect) if steps else "")


def _sql(current: str | None, dialect: str) -> str:
    from alembic import command

    config = _config()
    config.output_buffer = StringIO()
    config.attributes["dialect"] = dialect
    command.upgrade(config, f"{current or 'base'}:head", sql=True)
    return config.output_buffer.getvalue()


def _note_floor(connection: Connection) -> None:
    if inspect(connection).has_table("setting"):
        insert = upsert(setting, connection.dialect)
        connection.execute(insert, {"name": _FLOOR, "value": oldest_beside().encode()})


async def _upgrade(engine: AsyncEngine, guard: Guard) -> None:
    from alembic import command

    def upgrade(connection: Connection) -> None:
        config = _config()
        config.attributes["connection"] = connection
        config.attributes["guard"] = guard
        _note_floor(connection)  # before: who starts in the middle finds it
        command.upgrade(config, "head")
        _note_floor(connection)

    one_transaction = engine.dialect.name == "sqlite"
    async with _alembic_turn(), engine.connect() as connection:
        if not one_transaction:
            await connection.run_sync(upgrade)
            return
        await connection.exec_driver_sql("BEGIN IMMEDIATE")
        try:
            await connection.run_sync(upgrade)
            await connection.exec_driver_sql("COMMIT")
        except BaseException:
            await connection.invalidate()  # closing it rolls back
            raise


def _config() -> "Config":
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_SCRIPTS).replace("%", "%%"))
    return config


@asynccontextmanager
async def _migration_lock(engine: AsyncEngine) -> AsyncIterator[Guard]:
    """Waits, with a line of progress every few seconds. Raises StorageUnavailable after `WAIT_SECONDS`."""
    lease = Lease(engine.connect, LOCK_NAME, f"{socket.gethostname()} process {os.getpid()}", LOCK_SECONDS)
    await _acquire(engine, lease)
    guard = Guard()
    # On SQLite the migration holds the write lock, which is guard enough and would block the renewal.
    renewal = (
        None if engine.dialect.name == "sqlite" else asyncio.create_task(_renew(lease, guard), name="migration lock")
    )
    try:
        yield guard
    finally:
        if renewal is not None:
            renewal.cancel()
            await asyncio.wait([renewal])
        await lease.release()


async def _acquire(engine: AsyncEngine, lease: Lease) -> None:
    loop = asyncio.get_running_loop()
    started = said = loop.time()
    while not await _try_lock(engine, lease):
        now = loop.time()
        if now - started >= WAIT_SECONDS:
            raise StorageUnavailable(
                f"the migration lock was not free within {WAIT_SECONDS:g} s; {await _holder(lease)}"
            )
        if now - said >= _PROGRESS:
            said = now
            log.info("waiting for the migration lock", waited_s=int(now - started), holder=await _holder(lease))
        await asyncio.sleep(_POLL)


async def _try_lock(engine: AsyncEngine, lease: Lease) -> bool:
    try:
        async with engine.connect() as connection:
            await connection.execute(CreateTable(db_lock, if_not_exists=True))
        return await lease.acquire()
    except SQLAlchemyError as exc:
        fault = classify(exc)
        if fault is not None and fault.transient:  # SQLite: the other one is in the middle of its migration
            return False
        raise


async def _holder(lease: Lease) -> str:
    return await lease.held_by() or "nobody"


async def _renew(lease: Lease, guard: Guard) -> None:
    while True:
        await asyncio.sleep(LOCK_SECONDS / 3)
        try:
            guard.lost = not await lease.renew()
        except SQLAlchemyError:
            continue  # the lease may live on; if it does not, the next renewal says so
        if guard.lost:
            log.error("migration lock lost")
            return


_alembic_locks: dict[int, asyncio.Lock] = {}


@asynccontextmanager
async def _alembic_turn() -> AsyncIterator[None]:
    """Alembic keeps its current migration in a global, so a process runs one at a time."""
    key = id(asyncio.get_running_loop())
    lock = _alembic_locks.setdefault(key, asyncio.Lock())
    async with lock:
        yield
    if not lock.locked():
        _alembic_locks.pop(key, None)
