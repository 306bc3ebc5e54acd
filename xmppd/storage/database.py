"""Storage: the one object through which the server reads and writes its database."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from sqlalchemy import Table, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from xmppd.errors import StorageError, StorageUnavailable
from xmppd.log import get_logger
from xmppd.storage import backup
from xmppd.storage.batcher import Batcher
from xmppd.storage.engine import STATEMENT_TIMEOUT, create_sqlite_file, mysql_engine, sqlite_engine
from xmppd.storage.faults import Fault, classify, translated
from xmppd.storage.loader import Loader
from xmppd.storage.migrate import create_missing, migrate
from xmppd.storage.url import SqliteTarget, parse_url

log = get_logger("storage")
T = TypeVar("T")

_ATTEMPTS: Final = 8
_FIRST_PAUSE: Final = 0.005
_STRICT: Final = ("STRICT_TRANS_TABLES", "STRICT_ALL_TABLES")


class Storage:
    """A pool of connections, transactions with a bounded number of retries, the loader and the batcher.

    Every database exception comes out as StorageError, or as StorageUnavailable when trying again later may work:
    away, refused, timed out, locked, disk full, read-only, pool exhausted. No wait is longer than about
    `pool_timeout` plus the time-outs on connecting (5 s) and on one statement (15 s).
    """

    def __init__(
        self,
        url: str,
        *,
        data_dir: Path,
        pool_min: int = 1,
        pool_max: int = 8,
        pool_timeout: float = 5.0,
        commit_interval: float = 0.010,
    ) -> None:
        """`pool_min` connections are opened at the start, at most `pool_max` exist; `pool_timeout` in seconds bounds
        the wait for one of them, and for another process's lock. Raises ConfigError for a URL that makes no sense.
        """
        self._target = parse_url(url, data_dir)
        self._pool_min = min(pool_min, pool_max)
        self._pool_max = pool_max
        self._pool_timeout = pool_timeout
        self._engine: AsyncEngine | None = None
        self._sql_mode: str | None = None
        # SQLite has one writer at a time; ours queue here rather than in SQLite's lock, which is polled with sleeps.
        self._writer = asyncio.Lock()
        self.loader = Loader(self.read)
        self.batcher = Batcher(self.run, interval=commit_interval)

    def __repr__(self) -> str:
        return f"<Storage {self._target}>"

    @property
    def where(self) -> str:
        """The database in words an operator knows, without the password."""
        return str(self._target)

    @property
    def node_local(self) -> bool:
        """True when only processes of this machine can share it."""
        return isinstance(self._target, SqliteTarget)

    @property
    def file(self) -> Path | None:
        """Where an embedded database is."""
        return self._target.path if isinstance(self._target, SqliteTarget) else None

    @property
    def is_open(self) -> bool:
        return self._engine is not None

    @property
    def closed(self) -> bool:
        """True before `open` and from `close` on."""
        return self._engine is None or self.batcher.closed

    async def open(self) -> None:
        """Connect, bring the schema to this version. Raises StorageUnavailable, SchemaTooNew, StorageError."""
        if self._engine is not None:
            raise StorageError(f"{self.where} is open already")
        try:
            with translated(self.where):
                await self._start_engine()
                await self._migrate(None)
                await self._warm_up()
        except BaseException:
            await self._dispose()
            raise
        log.info("storage open", database=self.where)

    async def close(self) -> None:
        """Writes what is queued, as long as its deadlines allow, then closes every connection."""
        try:
            await self.batcher.close()
            await self.loader.close()
        finally:
            await self._dispose()

    async def ensure_tables(self, tables: Sequence[Table]) -> None:
        """Creates those that are missing, for third-party modules; a table that is there is left as it is."""
        with translated(self.where):
            await self._migrate(tables)

    def forget_statements(self) -> None:
        """Forget how statements were compiled: those of a module that was unloaded would keep its tables in memory."""
        if self._engine is not None:
            self._engine.sync_engine.clear_compiled_cache()

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[AsyncConnection]:
        """A connection for reads. Each statement stands alone: no transaction is open, and none is left behind."""
        engine = self._need_engine()
        with translated(self.where):
            async with engine.connect() as connection:
                yield connection

    async def read(self, work: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        """`work` on a connection for reads, once more when the pooled connection turned out to be dead."""
        for attempt in (1, 2):
            try:
                async with self.connect() as connection:
                    return await work(connection)
            except StorageUnavailable as exc:
                fault = classify(exc.__cause__) if exc.__cause__ else None
                if attempt == 2 or fault is None or not fault.lost:
                    raise
        raise AssertionError("not reached")

    async def run(self, work: Callable[[AsyncConnection], Awaitable[T]], *, repeatable: bool = False) -> T:
        """`work` in one transaction that is committed when it returns and rolled back when it raises.

        It may be called several times: a deadlock, a Galera conflict, "database is locked" and a connection lost
        before COMMIT are tried again with a growing pause. `repeatable`: so is a COMMIT whose answer was lost, because
        doing it all again changes nothing. Raises what `work` raises, StorageUnavailable, Duplicate, StorageError.
        """
        self._need_engine()
        loop = asyncio.get_running_loop()
        give_up = loop.time() + self._pool_timeout
        pause = _FIRST_PAUSE
        for attempt in range(1, _ATTEMPTS + 1):
            transaction = _Transaction()
            try:
                async with self._turn():
                    return await self._attempt(transaction, work)
            except SQLAlchemyError as exc:
                fault = classify(exc) or Fault(str(exc))
                undone = fault.transient or (fault.lost and (repeatable or not transaction.committing))
                if not undone or attempt == _ATTEMPTS or loop.time() >= give_up:
                    raise fault.error(self.where) from exc
                log.debug("transaction tried again", attempt=attempt, reason=fault.reason)
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(pause * 2, 0.2)
        raise AssertionError("not reached")

    async def ping(self) -> None:
        """For readiness: the database answers and has our schema. Raises StorageUnavailable."""

        async def ask(connection: AsyncConnection) -> None:
            await connection.execute(text("SELECT version_num FROM alembic_version"))

        try:
            async with asyncio.timeout(self._pool_timeout):
                await self.read(ask)
        except TimeoutError as exc:
            raise StorageUnavailable(f"{self.where}: no answer within {self._pool_timeout:g} s") from exc

    # -- copies of an embedded database ----------------------------------------------------------------------------

    async def back_up(self, target: Path) -> int:
        """A consistent, checked copy while others read and write; its bytes. Raises OSError, StorageError."""
        return await asyncio.to_thread(backup.back_up, self._need_file(), target)

    async def check_backup(self, source: Path) -> None:
        """Raises backup.NoBackup, SchemaTooNew, OSError, StorageError where a file cannot be restored."""
        await asyncio.to_thread(backup.check, source)

    async def restore(self, source: Path) -> None:
        """Put a backup in the place of all that is here, whatever version it was made with; the rows of the nodes and
        of their cluster stay. Nothing has changed when it fails. Whoever remembers something of what was here has to
        start again. Raises backup.NoBackup, SchemaTooNew, OSError, StorageError."""
        file = self._need_file()
        await self.check_backup(source)
        copies = backup.working_copy(source, file)
        copy = await asyncio.to_thread(copies.__enter__)
        try:
            other = Storage(f"sqlite:///{copy}", data_dir=file.parent, pool_max=1)
            try:
                await other.open()  # which migrates it
            finally:
                await other.close()
            async with self._writer:
                await asyncio.to_thread(backup.put_back, copy, file)
        finally:
            await asyncio.to_thread(copies.__exit__, None, None, None)

    def _need_file(self) -> Path:
        file = self.file
        if file is None:
            raise StorageError(f"{self.where} is no file")
        return file

    # -- one attempt -------------------------------------------------------------------------------------------------

    async def _attempt(self, transaction: "_Transaction", work: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        async with self._need_engine().connect() as connection:
            try:
                await connection.exec_driver_sql("BEGIN IMMEDIATE" if self.node_local else "START TRANSACTION")
                result = await work(connection)
                transaction.committing = True
                await connection.exec_driver_sql("COMMIT")
            except Exception:
                await self._roll_back(connection)
                raise
            except BaseException:  # cancelled: what the connection was doing is unknown, so it is thrown away
                await connection.invalidate()
                raise
        return result

    async def _roll_back(self, connection: AsyncConnection) -> None:
        if connection.invalidated:
            return
        try:
            await connection.exec_driver_sql("ROLLBACK")
        except SQLAlchemyError:  # SQLite has rolled back by itself on a full disk; or the connection is dead
            await connection.invalidate()

    def _turn(self) -> AbstractAsyncContextManager[None]:
        return self._writer_turn() if self.node_local else nullcontext()

    @asynccontextmanager
    async def _writer_turn(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._pool_timeout):
                await self._writer.acquire()
        except TimeoutError as exc:
            raise StorageUnavailable(f"{self.where}: other writers took longer than {self._pool_timeout:g} s") from exc
        try:
            yield
        finally:
            self._writer.release()

    # -- opening and closing -----------------------------------------------------------------------------------------

    async def _start_engine(self) -> None:
        target = self._target
        if isinstance(target, SqliteTarget):
            create_sqlite_file(target.path)
            self._engine = sqlite_engine(target, pool_size=self._pool_max, pool_timeout=self._pool_timeout)
            await self._use_wal(self._engine)
            return
        self._sql_mode = await self._missing_sql_mode()
        self._engine = mysql_engine(
            target,
            pool_size=self._pool_max,
            pool_timeout=self._pool_timeout,
            sql_mode=self._sql_mode,
            statement_timeout=STATEMENT_TIMEOUT,
        )

    async def _use_wal(self, engine: AsyncEngine) -> None:
        """Readers beside one writer. The switch, made once per file, does not wait for a lock by itself: so we do."""
        loop = asyncio.get_running_loop()
        give_up = loop.time() + self._pool_timeout
        while True:
            try:
                async with engine.connect() as connection:
                    mode = (await connection.exec_driver_sql("PRAGMA journal_mode=WAL")).scalar_one()
                    break
            except SQLAlchemyError as exc:
                fault = classify(exc)
                if fault is None or not fault.transient or loop.time() >= give_up:
                    raise
            await asyncio.sleep(0.05)
        if mode != "wal":
            log.warning("no write-ahead log, readers wait for writers", database=self.where, mode=mode)

    async def _missing_sql_mode(self) -> str | None:
        """None when the server is strict by itself; else the mode that each of our connections has to set."""
        async with self._setup_engine(None) as engine, engine.connect() as connection:
            mode = str((await connection.exec_driver_sql("SELECT @@sql_mode")).scalar_one())
        if any(word in mode for word in _STRICT):
            return None
        log.warning("database server is not strict", database=self.where, sql_mode=mode)
        return ",".join(word for word in (mode, _STRICT[0]) if word)

    @asynccontextmanager
    async def _setup_engine(self, sql_mode: str | None) -> AsyncIterator[AsyncEngine]:
        """An engine for changes of the schema: no pool, and no time-out on a statement, for ALTER may take minutes."""
        if isinstance(self._target, SqliteTarget):
            yield self._need_engine()
            return
        engine = mysql_engine(
            self._target, pool_size=0, pool_timeout=self._pool_timeout, sql_mode=sql_mode, statement_timeout=None
        )
        try:
            yield engine
        finally:
            await engine.dispose()

    async def _migrate(self, extra: Sequence[Table] | None) -> None:
        async with self._setup_engine(self._sql_mode) as engine:
            if extra is None:
                await migrate(engine, self.where)
            else:
                await create_missing(engine, extra)

    async def _warm_up(self) -> None:
        async with AsyncExitStack() as stack:
            for _ in range(self._pool_min):
                await stack.enter_async_context(self._need_engine().connect())

    async def _dispose(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            await engine.dispose()

    def _need_engine(self) -> AsyncEngine:
        if self._engine is None:
            raise StorageUnavailable(f"{self.where} is not open")
        return self._engine


@dataclass(slots=True)
class _Transaction:
    committing: bool = False
