"""One database server: its connections, whether it is up, and what was counted about it."""

import asyncio
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal
from weakref import WeakSet

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from xmppd.errors import StorageUnavailable
from xmppd.log import get_logger
from xmppd.storage.engine import STRICT, MysqlConnection, mysql_engine, sqlite_engine
from xmppd.storage.url import MysqlTarget, SqliteTarget, Target

log = get_logger("storage")

Role = Literal["write", "read"]

_MANY: Final = re.compile(r"(\(?%s\)?|\?)(, (\(?%s\)?|\?)){2,}")
_TEXT: Final = 500  # characters of a statement in the log


@dataclass(frozen=True, slots=True)
class Limits:
    """`min` connections are opened at the start, at most `max` exist, those of them above `min` that have rested for
    `idle` seconds are closed. `timeout` seconds somebody waits for one, `queue` may wait, one more is refused. What
    takes longer than `slow` seconds is logged; 0: nothing is.
    """

    min: int = 1
    max: int = 8
    timeout: float = 5.0
    idle: float = 300.0
    queue: int = 1000
    slow: float = 1.0
    statement: float | None = None  # seconds one statement may take; MySQL's alone
    hint: str = ""  # what goes before reads that must not be late


class Endpoint:
    """A server and our connections to it. `name` is its host and port, or the name of the SQLite file."""

    def __init__(self, target: Target, role: Role, limits: Limits, *, weight: int = 1) -> None:
        self.target = target
        self.role: Role = role
        self.weight = weight
        self.name = target.name
        self.up = True
        self.down_by_hand = False
        self.reason = ""  # why it is not up
        self.lag: float | None = None  # seconds a replica is behind; None: not known
        self.round_trip: float | None = None  # seconds
        self.version = ""
        self.cipher = ""
        self.read_only = False
        self.wsrep_size: int | None = None
        self.wsrep_state = ""
        self.statements = self.slow = self.errors = self.retries = 0
        self.answered_at = time.monotonic()  # the last statement that ended well
        self.waiting = 0
        self._limits = limits
        self._open: WeakSet[MysqlConnection] = WeakSet()
        self._engine: AsyncEngine | None = None
        self._warned = False

    def __repr__(self) -> str:
        return f"<Endpoint {self.role} {self.target}>"

    @property
    def usable(self) -> bool:
        """True unless it is known to be down, or somebody has taken it down."""
        return self.up and not self.down_by_hand

    @property
    def state(self) -> str:
        return "taken down" if self.down_by_hand else "up" if self.up else "down"

    @property
    def galera(self) -> bool:
        return bool(self.wsrep_state)

    @property
    def engine(self) -> AsyncEngine:
        if self._engine is None:
            self._engine = self._make()
        return self._engine

    @property
    def size(self) -> int:
        """Connections that are open."""
        if self._engine is None:
            return 0
        if isinstance(self.target, SqliteTarget):
            return int(self._pool.checkedin() + self._pool.checkedout())
        return sum(not connection.closed for connection in self._open)

    @property
    def used(self) -> int:
        """Of these, those somebody works with."""
        return 0 if self._engine is None else int(self._pool.checkedout())

    @property
    def most(self) -> int:
        """Connections there may be."""
        return self._limits.max

    @property
    def _pool(self) -> Any:
        return self.engine.sync_engine.pool

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[AsyncConnection]:
        """A connection of the pool. Raises StorageUnavailable when too many wait for one, else SQLAlchemy's."""
        if self.waiting >= self._limits.queue:
            raise StorageUnavailable(f"{self.target}: {self.waiting} wait for a connection already")
        self.waiting += 1
        counted = True
        try:
            async with self.engine.connect() as connection:
                self.waiting -= 1
                counted = False
                yield connection
        finally:
            if counted:
                self.waiting -= 1

    def reap(self) -> None:
        """Close what has rested for long; the pool notices when it would give it out."""
        now = time.monotonic()
        resting = [each for each in self._open if not each.closed and each.rests_since is not None]
        resting.sort(key=lambda each: each.rests_since or 0.0)
        spare = self.size - self._limits.min
        for connection in resting[: max(0, spare)]:
            if now - (connection.rests_since or now) > self._limits.idle:
                connection.close()

    def abort(self) -> None:
        """Close every connection: who waits for an answer on one is told so at once."""
        for connection in list(self._open):
            if not connection.closed:
                connection.close()

    async def dispose(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            await engine.dispose()

    def setup_engine(self) -> AsyncEngine:
        """For changes of the schema: no pool, and no time-out on a statement, for ALTER may take minutes."""
        assert isinstance(self.target, MysqlTarget)
        return mysql_engine(
            self.target,
            pool_size=0,
            pool_timeout=self._limits.timeout,
            statement_timeout=None,
            opened=self._note_facts,
        )

    # -- what is seen on the connections -------------------------------------------------------------------------------

    def _make(self) -> AsyncEngine:
        limits = self._limits
        if isinstance(self.target, SqliteTarget):
            engine = sqlite_engine(self.target, pool_size=limits.max, pool_timeout=limits.timeout)
        else:
            engine = mysql_engine(
                self.target,
                pool_size=limits.max,
                pool_timeout=limits.timeout,
                statement_timeout=limits.statement,
                opened=self._opened,
            )
        event.listen(engine.sync_engine, "before_cursor_execute", self._begins, retval=True)
        event.listen(engine.sync_engine, "after_cursor_execute", self._ended)
        event.listen(engine.sync_engine, "handle_error", self._failed)
        return engine

    def _opened(self, connection: MysqlConnection) -> None:
        self._open.add(connection)
        self._note_facts(connection)

    def _note_facts(self, connection: MysqlConnection) -> None:
        facts = connection.facts
        self.version, self.cipher = facts.get("version", ""), connection.cipher
        self.read_only = facts.get("read_only", "OFF") not in ("OFF", "0")
        if facts.get("wsrep_on") == "ON":
            self.wsrep_state = self.wsrep_state or "ON"
        mode = facts.get("sql_mode", "")
        if not self._warned and not any(word in mode for word in STRICT):
            self._warned = True
            log.warning("database server is not strict", database=self.target, sql_mode=mode)

    def _begins(self, connection: Any, cursor: Any, sql: str, values: Any, context: Any, many: bool) -> tuple[str, Any]:
        connection.info["began"] = time.monotonic()
        if self._limits.hint and self.role == "write" and sql.startswith("SELECT"):
            sql = f"{self._limits.hint} {sql}"  # known to proxies that give reads to replicas
        return sql, values

    def _ended(self, connection: Any, cursor: Any, sql: str, values: Any, context: Any, many: bool) -> None:
        now = time.monotonic()
        self.statements += 1
        self.answered_at = now
        took = now - connection.info["began"]
        if self._limits.slow and took >= self._limits.slow:
            self._tell_slow(sql, took, cursor.rowcount)

    def _failed(self, context: Any) -> None:
        self.errors += 1
        if context.connection is None or context.statement is None or not self._limits.slow:
            return
        took = time.monotonic() - context.connection.info.get("began", time.monotonic())
        if took >= self._limits.slow:
            self._tell_slow(context.statement, took, None)

    def _tell_slow(self, sql: str, took: float, rows: int | None) -> None:
        """Without the values: they are people's messages and keys."""
        self.slow += 1
        text = _MANY.sub(r"\1, ...", " ".join(sql.split()))
        log.warning(
            "slow statement",
            endpoint=self.name,
            ms=round(took * 1000),
            rows="failed" if rows is None else rows,
            sql=text if len(text) <= _TEXT else f"{text[:_TEXT]}...",
        )


async def probe(endpoint: Endpoint, patience: float, fresh: str) -> str | None:
    """Ask a MySQL server how it is; the answer to `fresh`, one statement, or None when every connection is in use.

    Raises SQLAlchemy's and the driver's exceptions, TimeoutError.
    """
    asking = False
    busy = endpoint.used >= endpoint.most
    try:
        # Not counted among those who wait: it has no right to a place of theirs.
        async with asyncio.timeout(patience), endpoint.engine.connect() as connection:
            asking = True
            raw: MysqlConnection = (await connection.get_raw_connection()).driver_connection  # type: ignore[assignment]
            try:
                began = time.monotonic()
                rows = await raw.ask(fresh)
                endpoint.round_trip = time.monotonic() - began
                endpoint.answered_at = time.monotonic()
                await _look(endpoint, raw)
            except BaseException:  # SQLAlchemy does not see in what state it is
                raw.close()
                raise
            return rows[0][0] if rows else ""
    except TimeoutError:
        if asking or not busy:
            raise
        return None


async def _look(endpoint: Endpoint, raw: MysqlConnection) -> None:
    """What may have changed since the connection was made."""
    if raw.facts.get("wsrep_on") == "ON":
        names = "'wsrep_cluster_size', 'wsrep_local_state_comment'"
        found = await raw.show(f"STATUS WHERE Variable_name IN ({names})")
        endpoint.wsrep_size = int(found.get("wsrep_cluster_size") or 0)
        endpoint.wsrep_state = found.get("wsrep_local_state_comment", "")
    read_only = (await raw.show("GLOBAL VARIABLES LIKE 'read_only'")).get("read_only", "OFF")
    endpoint.read_only = read_only not in ("OFF", "0")
