"""Block lists and reports in the database."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from sqlalchemy import Column, ColumnElement, Index, and_, delete, func, select

from xmppd.errors import StanzaError
from xmppd.module_api import (
    FULL_BYTES,
    Stamp,
    Storage,
    User,
    Utf8,
    by_host,
    fixed_bytes,
    host_column,
    insert_new,
    key_hash,
    long_bytes,
    module_table,
    user_column,
)
from xmppd.protocol.jid import JID

from .reports import REASON_BYTES, Report

if TYPE_CHECKING:
    import asyncio

    from sqlalchemy.ext.asyncio import AsyncConnection

KIND: Final = "block list"
_CHUNK: Final = 500  # keys in one IN (…)

block_item = module_table(
    "block_item",
    host_column(primary_key=True),
    user_column(primary_key=True),
    Column("jid_hash", fixed_bytes(32), primary_key=True),
    Column("jid", Utf8(FULL_BYTES), nullable=False),
)

spam_report = module_table(
    "spam_report",
    Column("id", fixed_bytes(16), primary_key=True),
    host_column(),
    user_column(),  # who reports
    Column("created_at", Stamp, nullable=False),
    Column("jid", Utf8(FULL_BYTES), nullable=False),  # who is reported
    Column("reason", Utf8(REASON_BYTES), nullable=False),
    Column("report", long_bytes(), nullable=False),  # as XML
    Index("spam_report_user", "server_host", "username"),
)


@dataclass(frozen=True, slots=True)
class Change:
    """What one request does; `forget`: all of the account, reports too."""

    user: User
    add: tuple[str, ...] = ()
    remove: tuple[str, ...] = ()
    clear: bool = False
    forget: bool = False
    limit: int = 0  # items the user may have
    reports: tuple[Report, ...] = ()
    reports_limit: int = 0  # the user may have made


@dataclass(frozen=True, slots=True)
class Changed:
    """The list as it is now, what was in it before, and those of the reports that were kept."""

    items: frozenset[str]
    before: frozenset[str]
    reports: tuple[Report, ...]


class Store:
    """Everything raises StorageUnavailable or StorageError."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def open(self) -> None:
        self._storage.loader.define(KIND, _fetch)
        self._storage.batcher.define(KIND, _write, size=_size)

    def close(self) -> None:
        self._storage.loader.undefine(KIND)
        self._storage.batcher.undefine(KIND)

    async def load(self, user: JID) -> frozenset[str]:
        """The addresses a user blocks; look-ups made at the same time are one query."""
        found: frozenset[str] | None = await self._storage.loader.get(KIND, (user.domain, user.local))
        return found or frozenset()

    def change(self, change: Change) -> "asyncio.Future[Changed]":
        """Done when it is committed; StanzaError resource-constraint when the list would be too long."""
        return self._storage.batcher.submit(KIND, change)

    async def reports(self, host: str, limit: int) -> list[tuple[float, str, str, str, bytes]]:
        """The newest reports of a host's users, newest first: when, who, about whom, reason, report."""
        columns = spam_report.c
        query = (
            select(columns.created_at, columns.username, columns.jid, columns.reason, columns.report)
            .where(columns.server_host == host)
            .order_by(columns.id.desc())
            .limit(limit)
        )

        async def work(connection: "AsyncConnection") -> list[tuple[float, str, str, str, bytes]]:
            return [tuple(row) for row in (await connection.execute(query)).all()]

        return await self._storage.read(work)


def _size(change: Change) -> int:
    return (
        256 + sum(128 + len(jid) for jid in change.add + change.remove) + sum(256 + len(r.xml) for r in change.reports)
    )


async def _write(connection: "AsyncConnection", changes: list[Change]) -> list[Changed | StanzaError]:
    """In the order of the requests, each whole or not at all."""
    users = {change.user for change in changes}
    lists = {user: frozenset[str]() for user in users} | await _fetch(connection, list(users))
    results: list[Changed | StanzaError] = []
    for change in changes:
        before = lists[change.user]
        result = await _apply(connection, change, before)
        if isinstance(result, Changed):
            lists[change.user] = result.items
        results.append(result)
    return results


async def _apply(connection: "AsyncConnection", change: Change, before: frozenset[str]) -> Changed | StanzaError:
    host, name = change.user
    after = (frozenset() if change.clear or change.forget else before - set(change.remove)) | set(change.add)
    if len(after) > change.limit and len(after) > len(before):
        return StanzaError("resource-constraint", f"at most {change.limit} addresses can be blocked")
    gone, new = sorted(before - after), sorted(after - before)
    columns = block_item.c
    mine = and_(columns.server_host == host, columns.username == name)
    if change.clear or change.forget:
        await connection.execute(delete(block_item).where(mine))
    else:
        hashes = [key_hash(jid) for jid in gone]
        for start in range(0, len(hashes), _CHUNK):
            await connection.execute(
                delete(block_item).where(mine, columns.jid_hash.in_(hashes[start : start + _CHUNK]))
            )
    if new:
        rows = [{"server_host": host, "username": name, "jid_hash": key_hash(jid), "jid": jid} for jid in new]
        await connection.execute(insert_new(block_item, connection.dialect), rows)
    if change.forget:
        await connection.execute(delete(spam_report).where(*_by(change.user)))
    return Changed(after, before, await _report(connection, change))


async def _report(connection: "AsyncConnection", change: Change) -> tuple[Report, ...]:
    if not change.reports:
        return ()
    query = select(func.count()).select_from(spam_report).where(*_by(change.user))
    room = change.reports_limit - int((await connection.execute(query)).scalar_one())
    kept = change.reports[: max(0, room)]
    if kept:
        host, name = change.user
        rows = [
            {
                "id": report.id,
                "server_host": host,
                "username": name,
                "created_at": report.created_at,
                "jid": report.jid,
                "reason": report.reason,
                "report": report.xml,
            }
            for report in kept
        ]
        await connection.execute(insert_new(spam_report, connection.dialect), rows)
    return kept


def _by(user: User) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    host, name = user
    return spam_report.c.server_host == host, spam_report.c.username == name


async def _fetch(connection: "AsyncConnection", users: list[User]) -> dict[User, frozenset[str]]:
    found: dict[User, set[str]] = {}
    columns = block_item.c
    for host, names in by_host(users).items():
        query = select(columns.username, columns.jid).where(columns.server_host == host, columns.username.in_(names))
        for row in await connection.execute(query):
            found.setdefault((host, row.username), set()).add(row.jid)
    return {user: frozenset(items) for user, items in found.items()}
