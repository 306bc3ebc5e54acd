"""What is old goes by itself, in small batches, by one node of the cluster at a time.

Whoever keeps rows for a while registers a retention: how old they may grow, and how to delete some of them. A pass asks
each for batch after batch until none is left. Nothing is remembered between two passes, so another node goes on where
one died, as soon as its lease has ended.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, Protocol

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from xmppd.errors import StorageError
from xmppd.log import get_logger
from xmppd.storage import Lease, Storage, db_now

log = get_logger("housekeeping")

BATCH: Final = 500  # rows in one transaction
LOCK: Final = "housekeeping"
LEASE: Final = 30.0  # seconds; renewed before every batch
_BREATH: Final = 0.02  # seconds between two batches, in which others write
_FIRST: Final = 10.0  # seconds between the start of a node and its first pass, of which each node has its own

Delete = Callable[[float, int], Awaitable[int]]
"""Deletes at most so many rows that are older than a time (seconds since 1970, by the database's clock), and says how
many it was: fewer than asked for when no more are left. Raises StorageError."""


@dataclass(frozen=True, slots=True)
class Retention:
    owner: str  # `core` or a module
    name: str  # for the log
    older_than: Callable[[], float]  # seconds, asked at each pass; 0: they are kept
    delete: Delete


class Retentions:
    """All that are registered on this node."""

    def __init__(self) -> None:
        self._all: list[Retention] = []

    def add(self, owner: str, name: str, older_than: Callable[[], float], delete: Delete) -> None:
        self._all.append(Retention(owner, name, older_than, delete))

    def remove(self, owner: str) -> None:
        self._all = [each for each in self._all if each.owner != owner]

    def all(self) -> list[Retention]:
        return list(self._all)


class Options(Protocol):
    @property
    def every(self) -> float:
        """Seconds between two passes."""
        ...


class Housekeeping:
    """`name` is the node's, for operators who look at the locks."""

    def __init__(
        self,
        storage: Storage,
        retentions: Retentions,
        name: str,
        options: Callable[[], Options],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._storage = storage
        self._retentions = retentions
        self._name = name
        self._options = options
        self._sleep = sleep

    async def run(self) -> None:
        """Pass after pass, as long as the node lives."""
        await self._sleep(min(_FIRST, self._options().every))
        while True:
            try:
                await self.sweep()
            except StorageError as exc:
                log.warning("old rows wait to be deleted", error=exc)
            await self._sleep(self._options().every)

    async def sweep(self) -> int | None:
        """One pass; how many rows went. None: another node is at it. Raises StorageError."""
        lease = Lease(self._storage.connect, LOCK, self._name, LEASE)
        if not await lease.acquire():
            return None
        total = 0
        try:
            now = await self._storage.read(_now)
            for retention in self._retentions.all():
                try:
                    gone = await self._thin_out(retention, now, lease)
                except StorageError:
                    raise
                except Exception as exc:  # of a module; the others' rows are old all the same
                    log.error("old rows not deleted", what=retention.name, exc=exc)
                    continue
                if gone is None:
                    log.warning("housekeeping was taken over by another node", deleted=total)
                    break
                total += gone
        finally:
            with contextlib.suppress(StorageError):  # it ends by itself
                await lease.release()
        return total

    async def _thin_out(self, retention: Retention, now: float, lease: Lease) -> int | None:
        """None: the lease is another node's now."""
        keep = retention.older_than()
        total, again = 0, keep > 0
        before = now - keep
        while again:
            if not await lease.renew():
                return None
            gone = await retention.delete(before, BATCH)
            total += gone
            again = gone >= BATCH
            if again:
                await self._sleep(_BREATH)
        if total:
            log.info("old rows deleted", what=retention.name, rows=total)
        return total


async def delete_all(delete: Delete, before: float) -> int:
    """The same in one go, for an operator who asks for it; how many rows went. Raises StorageError."""
    total = 0
    while True:
        gone = await delete(before, BATCH)
        total += gone
        if gone < BATCH:
            return total
        await asyncio.sleep(_BREATH)


async def database_now(storage: Storage) -> float:
    """Seconds since 1970 by the database's clock. Raises StorageError."""
    return await storage.read(_now)


async def _now(connection: AsyncConnection) -> float:
    now: float = (await connection.execute(select(db_now()))).scalar_one()
    return now
