"""The outbox in the database: rows, and which run of which node sends them.

A row belongs to one run (node and incarnation); that is its lease, which holds while the run's own lease in the table
`node` does. `take_id` says that the run has the row in memory.
"""

import json
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NamedTuple

from sqlalchemy import BigInteger, delete, func, null, select, update
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.types import TypeEngine

from xmppd.outbox.event import Event
from xmppd.outbox.line import Item
from xmppd.storage import Lease, Storage, Utf8, db_now, first_id, fixed_bytes, id_time, insert_new, new_id
from xmppd.storage.sql import limited_update
from xmppd.storage.tables import node
from xmppd.storage.tables import outbox as table

PUT: Final = "outbox put"
MARK: Final = "outbox mark"
PENDING: Final = "pending"
DONE: Final = "done"
DEAD: Final = "dead"
DEDUP_WINDOW: Final = 86400.0  # seconds
_CHUNK: Final = 500
_PIECE: Final = 1000  # rows in one transaction of background work
_TAKEOVER: Final = 30.0  # seconds one node has for the rows of a dead one


class Run(NamedTuple):
    """One life of one node."""

    node: bytes
    incarnation: int


@dataclass(slots=True, eq=False)
class Put:
    """A row to be written. `taken`: the event is in memory (`reserved`: its place there is counted; `item`: there it is
    already, in the line of `holder`, and perhaps done before it is written)."""

    event: Event
    taken: bool
    reserved: bool = False
    state: str = PENDING
    item: Item | None = None
    holder: object = None


@dataclass(frozen=True, slots=True)
class Mark:
    """What became of an attempt. DONE removes the row, or keeps what guards against repetitions."""

    id: bytes
    state: str
    attempts: int = 0
    next_at: float | None = None
    error: str = ""
    keep: bool = False


@dataclass(frozen=True, slots=True)
class Loaded:
    event: Event
    attempts: int
    next_at: float | None


@dataclass(frozen=True, slots=True)
class Listed:
    """A row as operators see it."""

    id: bytes
    sink: str
    host: str
    kind: str
    state: str
    attempts: int
    created_at: float
    next_at: float | None
    error: str | None


@dataclass(frozen=True, slots=True)
class Tally:
    """The rows of a sink that this run has."""

    pending: int = 0
    dead: int = 0
    oldest: float | None = None  # when the oldest pending one was made


class Rows:
    """`committed(put, stored)` is called after the commit of each Put; `stored` False: a repetition, not written."""

    def __init__(
        self, storage: Storage, run: Run, *, clock: Callable[[], float], committed: Callable[[Put, bool], None]
    ) -> None:
        self._storage = storage
        self._clock = clock
        self.run = run
        self._take = new_id()  # of all that is written with its event in memory
        self._lost_takes: list[bytes] = []  # of which it is not known what they got
        batcher = storage.batcher
        batcher.define(PUT, self._write_puts, size=lambda put: put.event.size, committed=committed)
        batcher.define(MARK, self._write_marks, size=lambda mark: 200)

    # -- in the group commit -----------------------------------------------------------------------------------------

    async def _write_puts(self, connection: AsyncConnection, puts: list[Put]) -> list[bool]:
        # What has arrived meanwhile needs no row. Its mark comes all the same: this may not be the first try.
        new = [put for put in puts if put.item is None or not put.item.done]
        if not new:
            return [True] * len(puts)
        guarded = [put for put in new if put.event.dedup is not None]
        if guarded:
            before = self._clock() - DEDUP_WINDOW
            for some in _chunks(sorted({put.event.dedup for put in guarded if put.event.dedup is not None})):
                stale = (table.c.dedup_key.in_(some), table.c.created_at < before)
                await connection.execute(update(table).where(*stale).values(dedup_key=null()))
        await connection.execute(insert_new(table, connection.dialect), [self._row(put) for put in new])
        there: set[bytes] = set()
        for some in _chunks([put.event.id for put in guarded]):
            there |= set((await connection.execute(select(table.c.id).where(table.c.id.in_(some)))).scalars())
        return [put.event.dedup is None or put.event.id in there for put in puts]

    def _row(self, put: Put) -> dict[str, Any]:
        event = put.event
        headers, payload = event.made()
        return {
            "id": event.id,
            "sink": event.sink,
            "server_host": event.host,
            "kind": event.kind,
            "partition_key": event.partition,
            "dedup_key": event.dedup,
            "headers": json.dumps(headers).encode(),
            "payload": payload,
            "state": put.state,
            "attempts": 0,
            "next_at": None,
            "lease_node": self.run.node,
            "lease_incarnation": self.run.incarnation,
            "take_id": self._take if put.taken else None,
            "last_error": None,
            "created_at": event.created_at,
        }

    async def _write_marks(self, connection: AsyncConnection, marks: list[Mark]) -> list[None]:
        gone = sorted(mark.id for mark in marks if mark.state == DONE and not mark.keep)
        for some in _chunks(gone):
            await connection.execute(delete(table).where(table.c.id.in_(some)))
        kept = sorted(mark.id for mark in marks if mark.state == DONE and mark.keep)
        for some in _chunks(kept):
            await connection.execute(update(table).where(table.c.id.in_(some)).values(state=DONE, payload=b""))
        for mark in marks:
            if mark.state != DONE:
                await connection.execute(
                    update(table)
                    .where(table.c.id == mark.id, table.c.lease_node == self.run.node)
                    .values(
                        state=mark.state,
                        attempts=mark.attempts,
                        next_at=mark.next_at,
                        last_error=_fitting(mark.error),
                        **({"take_id": None} if mark.state == DEAD else {}),
                    )
                )
        return [None] * len(marks)

    # -- what this run has -------------------------------------------------------------------------------------------

    async def load(self, sink: str, limit: int) -> list[Loaded]:
        """The oldest pending rows of this run that it does not have in memory; from now on it has."""
        take_id = new_id()
        lost = list(self._lost_takes)

        async def work(connection: AsyncConnection) -> list[Loaded]:
            for bad in lost:
                await connection.execute(
                    update(table).where(*self._mine(), table.c.take_id == bad).values(take_id=null())
                )
            given = {**self.run._asdict(), "sink": sink, "take_id": take_id, "limit": limit}
            await connection.execute(_TAKE[connection.dialect.name], given)
            query = (
                select(table)
                .where(*self._mine(), table.c.sink == sink, table.c.state == PENDING, table.c.take_id == take_id)
                .order_by(table.c.id)
            )
            return [_loaded(row) for row in (await connection.execute(query)).all()]

        try:
            rows = await self._storage.run(work, repeatable=True)
        except BaseException:
            self._lost_takes.append(take_id)
            raise
        del self._lost_takes[: len(lost)]
        return rows

    async def let_go(self, sink: str) -> None:
        """Nothing of the sink is in memory any more."""
        await self._change(update(table).where(*self._mine(), table.c.sink == sink).values(take_id=null()))

    async def tally(self) -> dict[str, Tally]:
        """By sink."""
        columns = (table.c.sink, table.c.state, func.count().label("rows_"), func.min(table.c.id).label("first"))
        query = select(*columns).where(*self._mine()).group_by(table.c.sink, table.c.state)

        async def work(connection: AsyncConnection) -> dict[str, Tally]:
            found: dict[str, Tally] = {}
            for row in await connection.execute(query):
                old = found.get(row.sink, Tally())
                if row.state == PENDING:
                    found[row.sink] = Tally(row.rows_, old.dead, id_time(row.first))
                elif row.state == DEAD:
                    found[row.sink] = Tally(old.pending, row.rows_, old.oldest)
            return found

        return await self._storage.read(work)

    async def listed(self, sink: str, state: str, limit: int) -> list[Listed]:
        """Rows of all nodes, the oldest first; an empty `sink` or `state` is any."""
        columns = [table.c[name] for name in ("id", "sink", "server_host", "kind", "state", "attempts", "created_at")]
        query = select(*columns, table.c.next_at, table.c.last_error).where(table.c.state != DONE)
        if sink:
            query = query.where(table.c.sink == sink)
        if state:
            query = query.where(table.c.state == state)
        query = query.order_by(table.c.id).limit(limit)

        async def work(connection: AsyncConnection) -> list[Listed]:
            return [Listed(*tuple(row)) for row in (await connection.execute(query)).all()]

        return await self._storage.read(work)

    async def revive(self, sink: str) -> int:
        """Dead rows of this run are tried again; how many."""
        values = {"state": PENDING, "attempts": 0, "next_at": null(), "take_id": null(), "created_at": self._clock()}
        return await self._change(self._of(update(table), sink, DEAD).values(**values))

    async def purge(self, sink: str, state: str) -> int:
        """Rows of this run in that state go for good; how many."""
        return await self._change(self._of(delete(table), sink, state))

    async def sweep(self) -> None:
        """What was only kept for its dedup key, and has served."""
        old = self._of(select(table.c.id), "", DONE).where(table.c.created_at < self._clock() - DEDUP_WINDOW)

        async def work(connection: AsyncConnection) -> int:
            ids = sorted((await connection.execute(old.limit(_PIECE))).scalars())
            for some in _chunks(ids):
                await connection.execute(delete(table).where(table.c.id.in_(some)))
            return len(ids)

        while await self._storage.run(work, repeatable=True) == _PIECE:
            pass

    async def delete_dead(self, before: float, limit: int) -> int:
        """Events of whatever run that were given up, made before that time; how many went, at most `limit`."""
        return await self._delete_old(DEAD, before, limit)

    async def delete_done(self, before: float, limit: int) -> int:
        """The same of those that were only kept for their dedup key: of runs that are over, and of sinks that are no
        more, nobody else does it."""
        return await self._delete_old(DONE, before, limit)

    async def _delete_old(self, state: str, before: float, limit: int) -> int:
        # By the index alone; a revived event is younger than its id.
        old = (table.c.state == state, table.c.id < first_id(before), table.c.created_at < before)

        async def work(connection: AsyncConnection) -> int:
            ids = sorted((await connection.execute(select(table.c.id).where(*old).limit(limit))).scalars())
            for some in _chunks(ids):  # looked at once more: it may have been revived meanwhile
                await connection.execute(delete(table).where(table.c.id.in_(some), *old))
            return len(ids)

        return await self._storage.run(work)

    # -- rows of runs that are over ----------------------------------------------------------------------------------

    async def take_over(self, name: str, sinks: Collection[str] | None = None) -> int:
        """Make the rows of dead runs our own, those of one run by one node only, so that conversations stay in order;
        how many. `sinks`: only of these; `name` is for operators who look at the locks."""
        left: dict[Run, list[str]] = {}
        for run, sink in await self._storage.read(_runs):
            if run != self.run and (sinks is None or sink in sinks):
                left.setdefault(run, []).append(sink)
        total = 0
        for run, names in left.items():
            if not await self._storage.read(partial(_is_over, run)):
                continue
            lease = Lease(self._storage.connect, f"outbox {run.node.hex()}", name, _TAKEOVER)
            if not await lease.acquire():
                continue
            try:
                for sink in names:
                    while (moved := await self._move(run, sink)) and await lease.renew():
                        total += moved
                    total += moved
            finally:
                await lease.release()
        return total

    async def _move(self, run: Run, sink: str) -> int:
        async def work(connection: AsyncConnection) -> int:
            old = {"old": run.node, "old_incarnation": run.incarnation, "sink": sink}
            given = {**self.run._asdict(), **old, "limit": _PIECE}
            return (await connection.execute(_MOVE[connection.dialect.name], given)).rowcount

        return await self._storage.run(work)

    def _mine(self) -> tuple[Any, Any]:
        return table.c.lease_node == self.run.node, table.c.lease_incarnation == self.run.incarnation

    def _of(self, statement: Any, sink: str, state: str) -> Any:
        chosen = statement.where(*self._mine(), table.c.state == state)
        return chosen.where(table.c.sink == sink) if sink else chosen

    async def _change(self, statement: Any) -> int:
        async def work(connection: AsyncConnection) -> int:
            return (await connection.execute(statement)).rowcount

        return await self._storage.run(work)


async def _runs(connection: AsyncConnection) -> list[tuple[Run, str]]:
    """Which runs have rows of which sinks."""
    query = select(table.c.lease_node, table.c.lease_incarnation, table.c.sink).distinct()
    return [(Run(row.lease_node, row.lease_incarnation), row.sink) for row in await connection.execute(query)]


async def _is_over(run: Run, connection: AsyncConnection) -> bool:
    lives = (node.c.node_id == run.node, node.c.incarnation == run.incarnation, node.c.lease_until >= db_now())
    return (await connection.execute(select(node.c.node_id).where(*lives))).first() is None


def _loaded(row: Any) -> Loaded:
    headers = tuple((str(name), str(value)) for name, value in json.loads(row.headers))
    event = Event(
        row.id,
        row.sink,
        row.server_host,
        row.kind,
        row.partition_key,
        row.payload,
        row.created_at,
        headers,
        row.dedup_key,
    )
    return Loaded(event, row.attempts, row.next_at)


def _fitting(text: str) -> str:
    return text.encode()[:255].decode("utf-8", "ignore")


def _chunks(ids: Sequence[bytes]) -> Iterable[Sequence[bytes]]:
    return (ids[start : start + _CHUNK] for start in range(0, len(ids), _CHUNK))


_TYPES: Final[dict[str, TypeEngine[Any]]] = {
    "node": fixed_bytes(16),
    "incarnation": BigInteger(),
    "old": fixed_bytes(16),
    "old_incarnation": BigInteger(),
    "sink": Utf8(64),
    "take_id": fixed_bytes(16),
}
_TAKE: Final = limited_update(
    "outbox",
    "take_id = :take_id",
    "lease_node = :node AND lease_incarnation = :incarnation AND sink = :sink AND state = 'pending'"
    " AND take_id IS NULL",
    _TYPES,
)
_NOW: Final = {  # as db_now
    "mysql": "(TIMESTAMPDIFF(MICROSECOND, '1970-01-01', UTC_TIMESTAMP(3)) DIV 1000)",
    "sqlite": "CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)",
}
_MOVE: Final = {
    dialect: limited_update(
        "outbox",
        "lease_node = :node, lease_incarnation = :incarnation, take_id = NULL, next_at = NULL",
        "lease_node = :old AND lease_incarnation = :old_incarnation AND sink = :sink AND NOT EXISTS (SELECT 1 FROM node"
        f" WHERE node.node_id = :old AND node.incarnation = :old_incarnation AND node.lease_until >= {now})",
        _TYPES,
    )[dialect]
    for dialect, now in _NOW.items()
}
