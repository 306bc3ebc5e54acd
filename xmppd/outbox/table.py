"""A table of a database as a sink: a row for each event, once, however often it is sent."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, Table, inspect
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.schema import CreateTable

from xmppd.errors import ConfigError, StorageError
from xmppd.log import get_logger
from xmppd.outbox.event import Event
from xmppd.sender.target import DONE, Answer
from xmppd.storage import BadValue, Duplicate, Storage, insert_new
from xmppd.storage.url import MysqlTarget, parse_url

log = get_logger("outbox")

_CONNECTIONS: Final = 2


class TableSink:
    """Writes to a database of its own, over a few connections of its own, which are opened when there is something to
    write.

    `table` is created where it is missing, without its `system` columns. Of a table that is there the columns that it
    has are written; its columns of other names are left to their defaults. The primary key is what makes a repetition
    known: it has to be unique in a given table too. `row` says what an event is in it.
    """

    def __init__(self, url: str, table: Table, row: Callable[[Event], Mapping[str, Any]]) -> None:
        """Raises ValueError for a URL that makes no sense, or names certificates that cannot be used."""
        problem = self.wrong_with(url)
        if problem:
            raise ValueError(problem)
        self._storage = Storage(url, data_dir=Path(), pool_max=_CONNECTIONS, schema=False)
        self._table = table
        self._row = row
        self._columns: list[str] | None = None  # those that are there
        self._turns = asyncio.Semaphore(_CONNECTIONS)
        self._opening = asyncio.Lock()

    @staticmethod
    def wrong_with(url: str) -> str:
        """What is wrong with the URL of a database, or nothing; never the URL itself, which has a password in it."""
        if "{data_dir}" in url:
            return "expected the whole path of a file"
        try:
            for target in parse_url(url, Path()):
                if isinstance(target, MysqlTarget):
                    target.ssl_context()
        except ConfigError as exc:
            return "; ".join(problem.removeprefix("database.url: ") for problem in exc.problems)
        return ""

    async def open(self) -> None: ...

    async def close(self) -> None:
        await self._storage.close()

    async def send(self, events: Sequence[Event]) -> Answer:
        """All in one transaction. Data that the table refuses are dead, everything else is tried again."""
        rows = [self._row(event) for event in events]
        try:
            async with self._turns:
                columns = await self._prepared()
                values = [{name: row[name] for name in columns} for row in rows]

                async def write(connection: AsyncConnection) -> None:
                    await connection.execute(insert_new(self._table, connection.dialect), values)

                await self._storage.run(write, repeatable=True)
        except (BadValue, Duplicate) as exc:
            return Answer("dead", str(exc)[:200])
        except (StorageError, ConfigError) as exc:
            self._columns = None  # somebody may be changing it
            return Answer("retry", str(exc)[:200])
        return DONE

    async def _prepared(self) -> list[str]:
        async with self._opening:
            if not self._storage.is_open:
                await self._storage.open()
            if self._columns is None:
                self._columns = await self._find() or await self._create()
            return self._columns

    async def _find(self) -> list[str]:
        """Our columns of the table; none where there is no table."""

        async def look(connection: AsyncConnection) -> list[str]:
            return await connection.run_sync(self._look)

        return await self._storage.read(look)

    def _look(self, connection: Connection) -> list[str]:
        table, inspector = self._table, inspect(connection)
        if not inspector.has_table(table.name):
            return []
        names = {column["name"] for column in inspector.get_columns(table.name)}
        hidden: dict[str, Any] = {"include_auto_indexes": True} if connection.dialect.name == "sqlite" else {}
        keys: list[Sequence[str | None]] = [inspector.get_pk_constraint(table.name)["constrained_columns"]]
        keys += [one["column_names"] for one in inspector.get_indexes(table.name, **hidden) if one["unique"]]
        key = [column.name for column in table.primary_key]
        if key not in keys:
            raise StorageError(f"{self._storage.where}: the table {table.name} has no unique key {', '.join(key)}")
        return [column.name for column in table.columns if column.name in names]

    async def _create(self) -> list[str]:
        async def create(connection: AsyncConnection) -> None:
            await connection.execute(CreateTable(self._table, if_not_exists=True))  # other nodes are doing it, too

        await self._storage.run(create, repeatable=True)
        log.info("table created", name=self._table.name)
        return await self._find()
