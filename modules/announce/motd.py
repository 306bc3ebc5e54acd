"""The message of the day in the database, and who has seen it."""

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from sqlalchemy import Column, delete, select

from xmppd.module_api import (
    Storage,
    User,
    fixed_bytes,
    host_column,
    long_bytes,
    module_table,
    new_id,
    read_per_user,
    upsert,
    user_column,
    write_per_user,
)
from xmppd.protocol.jid import JID

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

TEXT: Final = "message of the day"
SEEN: Final = "message of the day seen"

motd = module_table(
    "motd",
    host_column(primary_key=True),
    Column("id", fixed_bytes(16), nullable=False),
    Column("stanza", long_bytes(), nullable=False),
)

motd_seen = module_table(
    "motd_seen",
    host_column(primary_key=True),
    user_column(primary_key=True),
    Column("id", fixed_bytes(16), nullable=False),  # of the last one the user has seen
)


@dataclass(frozen=True, slots=True)
class Motd:
    id: bytes
    stanza: bytes


@dataclass(frozen=True, slots=True)
class Seen:
    """`id` None: nothing is kept of that user."""

    user: User
    id: bytes | None


class Store:
    """Everything raises StorageUnavailable or StorageError."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def open(self) -> None:
        self._storage.loader.define(TEXT, _fetch_texts)
        self._storage.loader.define(SEEN, _fetch_seen)
        self._storage.batcher.define(SEEN, _write_seen)

    def close(self) -> None:
        self._storage.loader.undefine(TEXT)
        self._storage.loader.undefine(SEEN)
        self._storage.batcher.undefine(SEEN)

    async def get(self, host: str) -> Motd | None:
        found: Motd | None = await self._storage.loader.get(TEXT, host)
        return found

    async def set(self, host: str, stanza: bytes) -> Motd:
        """A new one, which nobody has seen."""
        new = Motd(new_id(), stanza)

        async def work(connection: "AsyncConnection") -> None:
            row = {"server_host": host, "id": new.id, "stanza": new.stanza}
            await connection.execute(upsert(motd, connection.dialect), [row])

        await self._storage.run(work, repeatable=True)
        return new

    async def delete(self, host: str) -> bool:
        """False when there was none."""

        async def work(connection: "AsyncConnection") -> bool:
            return (await connection.execute(delete(motd).where(motd.c.server_host == host))).rowcount > 0

        return await self._storage.run(work)

    async def seen(self, user: JID) -> bytes | None:
        """The id of the last one that a user has seen."""
        found: bytes | None = await self._storage.loader.get(SEEN, (user.domain, user.local))
        return found

    def mark(self, user: JID, id: bytes | None) -> "asyncio.Future[None]":
        """The user has seen that one; None: the account is gone."""
        return self._storage.batcher.submit(SEEN, Seen((user.domain, user.local), id))


async def _fetch_texts(connection: "AsyncConnection", hosts: list[str]) -> dict[str, Motd]:
    rows = await connection.execute(select(motd).where(motd.c.server_host.in_(hosts)))
    return {row.server_host: Motd(row.id, row.stanza) for row in rows}


async def _fetch_seen(connection: "AsyncConnection", users: list[User]) -> dict[User, bytes]:
    return {user: row.id for user, row in (await read_per_user(connection, motd_seen, users)).items()}


async def _write_seen(connection: "AsyncConnection", items: list[Seen]) -> list[None]:
    await write_per_user(
        connection, motd_seen, [(seen.user, None if seen.id is None else {"id": seen.id}) for seen in items]
    )
    return [None] * len(items)
