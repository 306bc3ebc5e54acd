"""The few statements that the two databases spell differently."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from sqlalchemy import Dialect, Insert, Integer, Row, Table, TextClause, bindparam, delete, select, text
from sqlalchemy.dialects import mysql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.expression import ColumnElement
from sqlalchemy.types import TypeEngine

from xmppd.storage.tables import Stamp

User = tuple[str, str]  # server_host, username


class db_now(ColumnElement[float]):
    """The database's clock, fit for comparison with a `Stamp` column."""

    inherit_cache = True
    type = Stamp()


_NOW: Final = {
    "sqlite": "CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)",
    "mysql": "(TIMESTAMPDIFF(MICROSECOND, '1970-01-01', UTC_TIMESTAMP(3)) DIV 1000)",
}


@compiles(db_now, "sqlite")
def _sqlite_now(element: db_now, compiler: SQLCompiler, **options: Any) -> str:
    return _NOW["sqlite"]


@compiles(db_now, "mysql")
def _mysql_now(element: db_now, compiler: SQLCompiler, **options: Any) -> str:
    return _NOW["mysql"]


def insert_new(table: Table, dialect: Dialect) -> Insert:
    """An INSERT that leaves a row alone which has the same key; right for rows whose id the node made."""
    if dialect.name == "sqlite":
        return sqlite.insert(table).on_conflict_do_nothing()
    first = next(iter(table.primary_key))
    return mysql.insert(table).on_duplicate_key_update({first.name: first})  # INSERT IGNORE would hide other errors


def upsert(table: Table, dialect: Dialect) -> Insert:
    """An INSERT that overwrites every other column of the row which has the same primary key.

    All columns of the table must be given.
    """
    others = [column.name for column in table.columns if not column.primary_key]
    if dialect.name == "sqlite":
        lite = sqlite.insert(table)
        return lite.on_conflict_do_update(
            index_elements=list(table.primary_key), set_={name: lite.excluded[name] for name in others}
        )
    my = mysql.insert(table)
    return my.on_duplicate_key_update({name: my.inserted[name] for name in others})


def by_host(keys: Iterable[User]) -> dict[str, list[str]]:
    """(host, username) pairs sorted into one `IN (…)` per host, which both databases answer from the key."""
    hosts: dict[str, list[str]] = {}
    for host, username in keys:
        hosts.setdefault(host, []).append(username)
    return hosts


async def read_per_user(connection: AsyncConnection, table: Table, users: Iterable[User]) -> dict[User, Row[Any]]:
    """The whole rows of a table that has one for each user, of those that have one."""
    found: dict[User, Row[Any]] = {}
    for host, names in by_host(users).items():
        query = select(table).where(table.c.server_host == host, table.c.username.in_(names))
        found.update({(host, row.username): row for row in await connection.execute(query)})
    return found


async def write_per_user(
    connection: AsyncConnection, table: Table, changes: Iterable[tuple[User, Mapping[str, Any] | None]]
) -> None:
    """Write a table that has one row for each user, keyed by server_host and username: the other columns, or None for
    no row. The last change to a user counts."""
    latest = dict(changes)
    rows = [
        {"server_host": host, "username": username, **values}
        for (host, username), values in latest.items()
        if values is not None
    ]
    if rows:
        await connection.execute(upsert(table, connection.dialect), rows)
    for host, names in by_host([user for user, values in latest.items() if values is None]).items():
        await connection.execute(delete(table).where(table.c.server_host == host, table.c.username.in_(names)))


def limited_update(table: str, changes: str, where: str, types: Mapping[str, TypeEngine[Any]]) -> dict[str, TextClause]:
    """An UPDATE of the first `:limit` rows by `id` that match, for each database by its dialect's name.

    UPDATE … ORDER BY … LIMIT is MySQL's, and locks the rows it changes in one go; SQLite as it is usually built does
    without, and its writer has the database to itself anyway. `types` tells those of the other parameters; `{db_now}`
    in `where` is the database's clock.
    """
    rows = f"{where} ORDER BY id LIMIT :limit"
    spelt = {
        "mysql": f"UPDATE {table} SET {changes} WHERE {rows}".replace("{db_now}", _NOW["mysql"]),
        "sqlite": f"UPDATE {table} SET {changes} WHERE id IN (SELECT id FROM {table} WHERE {rows})".replace(
            "{db_now}", _NOW["sqlite"]
        ),
    }
    used = [bindparam(name, type_=types[name]) for name in types if re.search(rf":{name}\b", spelt["mysql"])]
    return {name: text(sql).bindparams(*used, bindparam("limit", type_=Integer())) for name, sql in spelt.items()}
