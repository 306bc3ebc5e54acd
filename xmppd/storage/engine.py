"""SQLAlchemy engines for both databases, set up so that the rules of this room hold on every connection.

Connections are in the server's own autocommit mode: a read leaves no transaction behind, and a transaction begins and
ends with plain statements that `Storage.run` sends. SQLAlchemy's own begin, commit and rollback send nothing.
"""

import asyncio
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import aiomysql
from pymysql.constants import CLIENT
from sqlalchemy import URL, event, exc
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool
from sqlalchemy.util.concurrency import in_greenlet

from xmppd.errors import StorageUnavailable
from xmppd.storage.literals import Literals
from xmppd.storage.url import MysqlTarget, SqliteTarget

CONNECT_TIMEOUT: Final = 5.0
STATEMENT_TIMEOUT: Final = 15.0
_PING_AFTER: Final = 1.0  # seconds a connection may rest before it is tried with a ping
STRICT: Final = ("STRICT_TRANS_TABLES", "STRICT_ALL_TABLES")
# A transaction whose node is gone without a word (a dead line, a proxy that hangs) holds its locks until the server
# notices; who repeats it waits for those. With this it notices while a write may still wait (30 s). MariaDB's alone.
_ORPHANS: Final = "idle_transaction_timeout"
_ORPHANED_AFTER: Final = 3  # seconds
# Each transaction locks the rows that it changes, and not the gaps between them too, where others insert: a node that
# is frozen in the midst of one, or slow, keeps nobody waiting but for these rows. What was read is not read again.
_ISOLATION: Final = ("transaction_isolation", "tx_isolation")  # MySQL and newer MariaDB; MariaDB
_COMMITTED: Final = "READ-COMMITTED"
_NAMES: Final = ("version", "sql_mode", "wsrep_on", "read_only", "log_bin", "binlog_format", _ORPHANS, *_ISOLATION)
_FACTS: Final = f"VARIABLES WHERE Variable_name IN ({', '.join(repr(name) for name in _NAMES)})"
# Galera: reads, UPDATEs and INSERTs wait until this server has what the others had committed when they began.
# https://mariadb.com/kb/en/galera-cluster-system-variables/#wsrep_sync_wait
_SYNC_WAIT: Final = "wsrep_sync_wait = 7"


class MysqlConnection(aiomysql.Connection):  # type: ignore[misc]
    """aiomysql's connection with an end to every wait, and with TLS that is refused rather than silently left out."""

    statement_timeout: float | None = STATEMENT_TIMEOUT
    cipher: str = ""  # of TLS, as the server tells it
    facts: Mapping[str, str] = {}  # what the server said of itself: `_NAMES`
    rests_since: float | None = None  # monotonic; None while it is in use

    async def _request_authentication(self) -> None:
        # Before this runs nothing secret has been sent; aiomysql would go on in clear text here.
        if self._ssl_context is not None and not self.server_capabilities & CLIENT.SSL:
            raise aiomysql.OperationalError(2026, "TLS was asked for, but the server does not offer it")
        await super()._request_authentication()
        if self._ssl_context is not None and self._writer.get_extra_info("ssl_object") is None:
            raise aiomysql.OperationalError(2026, "TLS was asked for, but the connection is not encrypted")

    def escape(self, obj: object) -> str:
        """Bytes go as hexadecimal literals, which mean the same in every sql_mode, character set and proxy."""
        if isinstance(obj, bytes | bytearray | memoryview):
            return f"x'{obj.hex()}'"
        if isinstance(obj, Literals):
            return obj.sql
        escaped: str = super().escape(obj)
        return escaped

    def close(self) -> None:
        """At once: a server that has gone does not answer the end of TLS, for which asyncio would wait."""
        writer = self._writer
        super().close()
        if writer is not None:
            writer.transport.abort()

    async def query(self, sql: str | bytes, unbuffered: bool = False) -> int:
        try:
            async with asyncio.timeout(self.statement_timeout):
                affected: int = await super().query(sql, unbuffered)
                return affected
        except TimeoutError as exc:
            self.close()
            raise aiomysql.OperationalError(2013, f"no answer within {self.statement_timeout:g} s") from exc

    async def ping(self, reconnect: bool = True) -> None:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                await super().ping(reconnect)
        except TimeoutError as exc:
            self.close()
            raise aiomysql.OperationalError(2013, "no answer to a ping") from exc

    @classmethod
    async def open(cls, *, statement_timeout: float | None, **options: Any) -> "MysqlConnection":
        connection = cls(**options)
        connection.statement_timeout = statement_timeout
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):  # aiomysql's own ends with the TCP handshake
                await connection._connect()
                await connection._settle()
        except TimeoutError as exc:
            connection.close()
            raise aiomysql.OperationalError(2003, f"no greeting within {CONNECT_TIMEOUT:g} s") from exc
        except aiomysql.OperationalError as exc:
            connection.close()
            if exc.__cause__ is None:
                raise
            raise aiomysql.OperationalError(exc.args[0], f"cannot connect: {exc.__cause__}") from exc.__cause__
        except RuntimeError as exc:  # aiomysql's, where the server has gone between the handshake of TCP and its own
            connection.close()
            raise aiomysql.OperationalError(2003, f"cannot connect: {exc}") from exc
        except BaseException:
            connection.close()
            raise
        return connection

    async def _settle(self) -> None:
        """What a session needs is set here, once, and nothing later: a proxy may give each statement another one."""
        if self._ssl_context is not None:
            self.cipher = (await self.show("SESSION STATUS LIKE 'Ssl_cipher'")).get("Ssl_cipher", "")
            if not self.cipher:
                raise aiomysql.OperationalError(
                    2026, "TLS was asked for, but the server says that the connection is not encrypted"
                )
        self.facts = await self.show(_FACTS)
        wanted = []
        mode = self.facts.get("sql_mode", "")
        if not any(word in mode for word in STRICT):
            wanted.append(f"sql_mode = '{','.join(word for word in (mode, STRICT[0]) if word)}'")
        if self.facts.get("wsrep_on") == "ON":
            wanted.append(_SYNC_WAIT)
        if self.facts.get(_ORPHANS) == "0":
            wanted.append(f"{_ORPHANS} = {_ORPHANED_AFTER}")
        isolation = next((name for name in _ISOLATION if name in self.facts), None)
        # A log of statements cannot say what such transactions do: the server refuses their writes.
        by_statement = self.facts.get("log_bin") == "ON" and self.facts.get("binlog_format") == "STATEMENT"
        if isolation is not None and self.facts[isolation] != _COMMITTED and not by_statement:
            wanted.append(f"{isolation} = '{_COMMITTED}'")
        if wanted:
            await self.query(f"SET SESSION {', '.join(wanted)}")

    async def show(self, what: str) -> dict[str, str]:
        """Names and values of `SHOW …`."""
        return {row[0]: row[1] for row in await self.ask(f"SHOW {what}")}

    async def ask(self, sql: str) -> list[tuple[str, ...]]:
        """The rows of one statement, past SQLAlchemy."""
        cursor = await self.cursor()
        try:
            await cursor.execute(sql)
            return [tuple("" if value is None else str(value) for value in row) for row in await cursor.fetchall()]
        finally:
            await cursor.close()


def mysql_engine(
    target: MysqlTarget,
    *,
    pool_size: int,
    pool_timeout: float,
    statement_timeout: float | None,
    opened: Callable[[MysqlConnection], None] | None = None,
) -> AsyncEngine:
    """`pool_size` 0: no pool, a connection for each use. `opened` is told of each new connection."""
    options: dict[str, Any] = {
        "host": target.host,
        "port": target.port,
        "user": target.user,
        "password": target.password,
        "db": target.database,
        "unix_socket": target.unix_socket,
        "charset": "utf8mb4",
        "autocommit": True,
        "ssl": target.ssl_context(),
        "connect_timeout": CONNECT_TIMEOUT,
        "client_flag": CLIENT.FOUND_ROWS,  # an UPDATE counts the rows it matched, as SQLite does
        "program_name": "xmppd",
    }

    async def connect(**ignored: Any) -> MysqlConnection:  # SQLAlchemy's arguments come from an empty URL
        connection = await MysqlConnection.open(statement_timeout=statement_timeout, **options)
        if opened is not None:
            opened(connection)
        return connection

    engine = _engine(URL.create("mysql+aiomysql"), pool_size, pool_timeout, {"async_creator_fn": connect})
    if pool_size:
        event.listen(engine.sync_engine, "checkin", _note_rest)
        event.listen(engine.sync_engine, "checkout", _ping_after_rest)
    return engine


def _note_rest(dbapi_connection: Any, record: Any) -> None:
    if dbapi_connection is not None:  # None: it was thrown away
        dbapi_connection.driver_connection.rests_since = time.monotonic()


def _ping_after_rest(dbapi_connection: Any, record: Any, fairy: Any) -> None:
    """A restarted server shows here, not in the caller's statement; under load nothing is sent."""
    connection: MysqlConnection = dbapi_connection.driver_connection
    since, connection.rests_since = connection.rests_since, None
    if connection.closed:  # it had rested for too long
        raise exc.DisconnectionError("the connection was closed")
    if since is None or time.monotonic() - since < _PING_AFTER:
        return
    try:
        dbapi_connection.ping(False)
    except Exception as error:
        raise exc.DisconnectionError("the server closed the connection") from error


def sqlite_engine(target: SqliteTarget, *, pool_size: int, pool_timeout: float) -> AsyncEngine:
    """A writer waits `pool_timeout` seconds for another process's write lock."""
    engine = _engine(
        URL.create("sqlite+aiosqlite", database=str(target.path)), pool_size, pool_timeout, {"timeout": pool_timeout}
    )
    event.listen(engine.sync_engine, "connect", _sqlite_pragmas)
    event.listen(engine.sync_engine, "invalidate", _roll_back)
    return engine


def _roll_back(dbapi_connection: Any, record: Any, error: BaseException | None) -> None:
    """Before a connection is thrown away, mostly because somebody was cancelled.

    Closing it alone leaves its transaction open, and everybody else without the write lock, for as long as a cursor of
    it lives, which the traceback of the exception holds.
    """
    if in_greenlet():
        try:
            dbapi_connection.rollback()
        except Exception:  # it is dead, then
            pass


def _sqlite_pragmas(dbapi_connection: Any, record: Any) -> None:
    cursor = dbapi_connection.cursor()
    # With NORMAL a commit in WAL mode survives a crash of the process but not a power cut; FULL syncs the log at each
    # commit. What we report as committed has to be there.
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.close()


def create_sqlite_file(path: Path) -> None:
    """Created for our eyes only; SQLite gives its -wal and -shm files the same mode. Raises StorageUnavailable.

    Its folder has to be there: a mistyped path must not become a new, empty database.
    """
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as exc:
        raise StorageUnavailable(f"sqlite {path}: {exc.strerror or exc}") from exc


def _engine(url: URL, pool_size: int, pool_timeout: float, connect_args: dict[str, Any]) -> AsyncEngine:
    pool: dict[str, Any] = {"poolclass": NullPool}
    if pool_size:
        pool = {"pool_size": pool_size, "max_overflow": 0, "pool_timeout": pool_timeout, "pool_use_lifo": True}
    return create_async_engine(
        url,
        connect_args=connect_args,
        isolation_level="AUTOCOMMIT",
        skip_autocommit_rollback=True,
        hide_parameters=True,  # stanzas and keys have no place in exceptions and logs
        **pool,
    )
