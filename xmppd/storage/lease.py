"""Locks and leases: a row changed by a conditional UPDATE, with a token and the database's clock.

Fit for proxies and Galera, where GET_LOCK and SELECT … FOR UPDATE are not. A holder that dies loses its lease when the
time has run out.
"""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from sqlalchemy import or_, update
from sqlalchemy.ext.asyncio import AsyncConnection

from xmppd.storage.ids import new_id
from xmppd.storage.sql import db_now, insert_new
from xmppd.storage.tables import db_lock


class Lease:
    """`connect` gives a connection in autocommit mode (`Storage.connect`); `holder` is for operators to read."""

    def __init__(
        self,
        connect: Callable[[], AbstractAsyncContextManager[AsyncConnection]],
        name: str,
        holder: str,
        seconds: float,
    ) -> None:
        self._connect = connect
        self._name = name
        self._holder = holder
        self._seconds = seconds
        self._token = new_id()

    async def acquire(self) -> bool:
        """True when it is ours for `seconds` from now; False when somebody else has it."""
        async with self._connect() as connection:
            await connection.execute(insert_new(db_lock, connection.dialect), {"name": self._name})
            result = await connection.execute(
                update(db_lock)
                .where(
                    db_lock.c.name == self._name,
                    or_(db_lock.c.token.is_(None), db_lock.c.token == self._token, db_lock.c.until < db_now()),
                )
                .values(token=self._token, holder=self._holder, until=db_now() + self._seconds)
            )
        return result.rowcount == 1

    async def renew(self) -> bool:
        """False when it is no longer ours: what it guarded must stop."""
        async with self._connect() as connection:
            result = await connection.execute(
                update(db_lock)
                .where(db_lock.c.name == self._name, db_lock.c.token == self._token, db_lock.c.until >= db_now())
                .values(until=db_now() + self._seconds)
            )
        return result.rowcount == 1

    async def release(self) -> None:
        async with self._connect() as connection:
            await connection.execute(
                update(db_lock)
                .where(db_lock.c.name == self._name, db_lock.c.token == self._token)
                .values(token=None, holder=None, until=None)
            )

    async def held_by(self) -> str | None:
        """Who holds it, in the holder's own words."""
        async with self._connect() as connection:
            row = (await connection.execute(db_lock.select().where(db_lock.c.name == self._name))).one_or_none()
        return None if row is None else row.holder
