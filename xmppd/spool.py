"""The spool: messages that nobody has acknowledged yet, which is also the offline storage. One table, one row each.

A row with a holder waits for the acknowledgement of that session; a row without one is an offline message. Quota and
counts see rows without holder only. A row is deleted by its id, after its recipient's client has acknowledged it.
"""

import asyncio
import enum
import hashlib
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol, Required, TypedDict, Unpack

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Select,
    TextClause,
    case,
    delete,
    exists,
    func,
    insert,
    null,
    or_,
    select,
    text,
    update,
)
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.types import TypeEngine

from xmppd.errors import StorageError, StorageUnavailable
from xmppd.log import get_logger
from xmppd.storage import Stamp, Storage, Utf8, by_host, first_id, fixed_bytes, id_at, id_of, insert_new, new_id
from xmppd.storage.literals import hex_or_null, hex_param, in_statements, millis_or_null, rows_param
from xmppd.storage.sql import User, db_now, limited_update
from xmppd.storage.tables import HOST_BYTES, PART_BYTES, account, node
from xmppd.storage.tables import spool as table

log = get_logger("spool")

KEEP: Final = "spool keep"
FREE: Final = "spool free"
DELETE: Final = "spool delete"
TELL: Final = "spool tell"
_CHUNK: Final = 500  # ids in one IN (…)
_UNTOLD: Final = bytes(16)
_FREE_AT_ONCE: Final = 1000
_ID_LATE: Final = 3600.0  # seconds by which a row's id may be younger than its `created_at`
_UNTAKE_FIRST: Final = 0.2  # seconds
_UNTAKE_LONGEST: Final = 10.0


class QuotaReached(StorageError):
    """The user has as many offline messages as they may have; nothing was stored."""


class NoAccount(StorageError):
    """The user is not registered."""


class NotToTell(StorageError):
    """The row is gone, or held again, or somebody else tells of it."""


class _NotThere(Exception):
    """Rolls a removal back."""


class Standing(Protocol):
    """This node among those that use the database."""

    def holds_lease(self) -> bool:
        """Whether no other node may have taken over what this one holds."""
        ...

    def is_silent(self, member: bytes) -> bool:
        """Whether that is another member of the cluster, and one that is not up as seen from here."""
        ...

    def sees_all(self) -> bool:
        """Whether every member of the cluster is seen, by this node and by the others."""
        ...


class Alone:
    """The Standing of a node without others."""

    def holds_lease(self) -> bool:
        return True

    def is_silent(self, member: bytes) -> bool:
        return False

    def sees_all(self) -> bool:
        return True


class Kept(enum.Enum):
    STORED = "stored"
    DUPLICATE = "duplicate"  # the same message is there already: it is as safe as that row


@dataclass(frozen=True, slots=True)
class Holder:
    """Who waits for an acknowledgement: a session of one life (incarnation) of one member of the cluster."""

    member: bytes  # 16 bytes, the member id
    incarnation: int
    session: str


@dataclass(frozen=True, slots=True)
class SpoolRow:
    id: bytes
    created_at: float
    sender: str
    stanza: bytes


@dataclass(frozen=True, slots=True)
class FreedRow:
    """A row that a session held and that is an offline message now, of which nobody has told yet."""

    id: bytes
    host: str
    username: str
    stanza: bytes
    expires_at: float | None


@dataclass(frozen=True, slots=True)
class Totals:
    """How many rows there are."""

    offline: int  # without holder, in the whole spool
    held: int  # by one member: they wait for the acknowledgement of a session
    oldest: float | None  # of those without holder: since when, in seconds since 1970


class KeepOptions(TypedDict, total=False):
    """What `Spool.keep` and `keep_item` take by name."""

    dedup: Required[bytes | None]  # 32 bytes; the same within the window, for the same user, gives DUPLICATE
    quota: Required[int | None]  # never refuses a row with a holder, else the future raises QuotaReached
    expires_at: float | None
    holder: Holder | None
    row_id: bytes | None  # from `new_id()`, made just now, for a caller that will have to delete or release the row
    # Where it stands among all messages (Stanza.place), which is the order in which `take` gives rows back; None, or 0:
    # behind those that are there.
    place: int | None
    # The future raises NoAccount when the user is not registered (any more), else an account made anew with that name
    # would get the message.
    for_account: bool
    also: Sequence[tuple[str, Any]]  # `keep` alone: (kind, item) pairs that commit with the row, or not at all


@dataclass(slots=True)  # not frozen, which costs: there may be one for each message
class KeepItem:
    """One row to be stored; `Spool.keep_item` makes it."""

    id: bytes
    host: str
    username: str
    sender: str
    stanza: bytes
    created_at: float
    expires_at: float | None
    dedup: bytes | None
    quota: int | None
    holder: Holder | None
    for_account: bool = False


@dataclass(frozen=True, slots=True)
class _FreeItem:
    """The rows `ids` held by `holder`, or those which the take `take_id` of `user` got."""

    ids: tuple[bytes, ...] = ()
    holder: Holder | None = None
    user: User | None = None
    take_id: bytes | None = None


class Spool:
    """`clock` gives seconds since 1970; `dedup_window` in seconds. Everything raises StorageUnavailable."""

    def __init__(
        self, storage: Storage, *, clock: Callable[[], float] = time.time, dedup_window: float = 600.0
    ) -> None:
        self._storage = storage
        self._clock = clock
        self._dedup_window = dedup_window
        self.standing: Standing = Alone()
        self._teller = new_id()  # this run
        self._untakes: dict[User, int] = {}  # takes of which it is not known what they got
        # rows since the start: written, already there, over the quota, taken for a session, acknowledged by its client
        self.stored = self.duplicates = self.refused = self.taken = self.flushed = 0
        self.taken_over = 0  # made free after the member that held them had died
        # In this order within a transaction: a row that is stored and acknowledged in one tick has to be gone after it.
        storage.batcher.define(
            KEEP, self._write_keeps, size=lambda item: 512 + len(item.stanza), committed=self._count_kept
        )
        storage.batcher.define(FREE, self._write_frees, size=lambda item: 64 + 16 * len(item.ids))
        storage.batcher.define(DELETE, _write_deletes, size=lambda ids: 16 * len(ids), committed=self._count_deleted)
        storage.batcher.define(TELL, self._write_tells)
        storage.loader.define("spool waiting", _fetch_waiting)

    # -- storing -----------------------------------------------------------------------------------------------------

    def keep(
        self, host: str, username: str, sender_bare: str, stanza: bytes, **options: Unpack[KeepOptions]
    ) -> "asyncio.Future[Kept]":
        """Stores one message; the future is resolved when it is committed, or raises QuotaReached or NoAccount. `take`
        gives rows back in the order of their places, those without one in the order of these calls. Raises
        StorageUnavailable at once when the write queue is full.
        """
        kind, item = self.keep_item(host, username, sender_bare, stanza, **options)
        also = options.get("also")
        if not also:
            return self._storage.batcher.submit(kind, item)
        kept: asyncio.Future[Kept] = asyncio.get_running_loop().create_future()
        self._storage.batcher.submit_unit([(kind, item), *also]).add_done_callback(partial(_first_of, kept))
        return kept

    def submit(self, item: KeepItem) -> "asyncio.Future[Kept]":
        """As `keep`, of what `keep_item` has made; to be told again what became of it, it may be submitted again."""
        return self._storage.batcher.submit(KEEP, item)

    def submit_all(self, items: Sequence[KeepItem]) -> "asyncio.Future[list[Kept | Exception]]":
        """As `submit` of each, with one future for all of them, which gives what their own would have given or raised.
        Raises StorageUnavailable at once when the write queue has no room for all."""
        return self._storage.batcher.submit_all(KEEP, items)

    def keep_item(
        self,
        host: str,
        username: str,
        sender_bare: str,
        stanza: bytes,
        *,
        dedup: bytes | None,
        quota: int | None,
        expires_at: float | None = None,
        holder: Holder | None = None,
        row_id: bytes | None = None,
        place: int | None = None,
        for_account: bool = False,
        also: object = None,  # for `keep` alone
    ) -> tuple[str, KeepItem]:
        """As `keep`, for `Batcher.submit_unit`: a row that commits together with rows of other tables."""
        if dedup is not None:  # the column is unique in the whole table, so the user has to be part of it
            dedup = hashlib.sha256(b"\0".join((host.encode(), username.encode(), dedup))).digest()
        item = KeepItem(
            row_id or (id_of(place) if place else new_id()),
            host,
            username,
            sender_bare,
            stanza,
            self._clock(),
            expires_at,
            dedup,
            quota,
            holder,
            for_account,
        )
        return KEEP, item

    def _count_kept(self, item: KeepItem, result: Kept | StorageError) -> None:
        if result is Kept.STORED:
            self.stored += 1
        elif result is Kept.DUPLICATE:
            self.duplicates += 1
        else:
            self.refused += 1

    def _count_deleted(self, ids: tuple[bytes, ...], result: object) -> None:
        self.flushed += len(ids)

    async def _write_keeps(self, connection: AsyncConnection, items: list[KeepItem]) -> list[Kept | StorageError]:
        now = self._clock()
        gone = await self._find_gone(connection, items)
        if not gone and await _insert_all(connection, items, now):
            return [Kept.STORED] * len(items)
        repeated = await self._find_repeated(connection, items, now)
        free = await self._count_free(connection, items, now)
        results: dict[bytes, Kept | StorageError] = {}
        seen: set[bytes] = set()
        earlier: dict[bytes, bytes] = {}  # by id of a row: the id that its repetition would have had
        for item in items:
            if (item.host, item.username) in gone and item.for_account:
                results[item.id] = NoAccount(f"{item.username}@{item.host} is not registered")
                continue
            if item.dedup is not None and (item.dedup in seen or repeated.get(item.dedup, item.id) != item.id):
                results[item.id] = Kept.DUPLICATE
                if (there := repeated.get(item.dedup)) is not None and item.id < earlier.get(there, there):
                    earlier[there] = item.id
                continue
            if item.holder is None:
                user = (item.host, item.username)
                if item.quota is not None and free[user] >= item.quota and not await _is_there(connection, item.id):
                    results[item.id] = QuotaReached(f"{item.username}@{item.host} has {free[user]} offline messages")
                    continue
                if user in free:
                    free[user] += 1
            if item.dedup is not None:
                seen.add(item.dedup)
            results[item.id] = Kept.STORED
        await self._insert(connection, [item for item in items if results[item.id] is Kept.STORED], results, now)
        for row_id, place in sorted(earlier.items()):
            # What came first has its place, whichever was written first: a client may have sent others since.
            waits = (table.c.id == row_id, table.c.holder_member.is_(None))
            await connection.execute(update(table).where(*waits).values(id=place))
        return [results[item.id] for item in items]

    async def _find_gone(self, connection: AsyncConnection, items: list[KeepItem]) -> set[User]:
        """Users without an account; those that are there stay until this transaction ends."""
        wanted: dict[str, set[str]] = {}
        for item in items:
            if item.for_account:
                wanted.setdefault(item.host, set()).add(item.username)
        gone: set[User] = set()
        for host, some in wanted.items():
            names = sorted(some)
            if await _count(connection, _COUNT_ACCOUNTS, names, host=host.encode()) == len(names):
                continue  # nearly always
            query = (
                select(account.c.username)
                .where(account.c.server_host == host, account.c.username.in_(names))
                .with_for_update(read=True)
            )
            some.difference_update((await connection.execute(query)).scalars())
            gone.update((host, name) for name in some)
        return gone

    async def _find_repeated(
        self, connection: AsyncConnection, items: list[KeepItem], now: float
    ) -> dict[bytes, bytes]:
        """The ids of rows stored before, by key. A row past the window, or expired, gives its key up."""
        own = {item.id for item in items}
        found = {}
        stale = []
        columns = (table.c.id, table.c.dedup_key, table.c.created_at, table.c.expires_at)
        for some in _chunks(sorted({item.dedup for item in items if item.dedup is not None})):
            if await _count(connection, _COUNT_KEYS, some) == 0:
                continue
            for row in await connection.execute(select(*columns).where(table.c.dedup_key.in_(some))):
                recent = row.created_at > now - self._dedup_window
                if row.id in own or (recent and (row.expires_at is None or row.expires_at > now)):
                    found[row.dedup_key] = row.id
                else:
                    stale.append(row.id)
        for some in _chunks(sorted(stale)):
            await connection.execute(update(table).where(table.c.id.in_(some)).values(dedup_key=null()))
        return found

    async def _count_free(self, connection: AsyncConnection, items: list[KeepItem], now: float) -> dict[User, int]:
        """How many offline messages the users have whose quota matters; their expired ones are deleted."""
        users = {(item.host, item.username) for item in items if item.holder is None and item.quota is not None}
        counts = dict.fromkeys(users, 0)
        expired = case((table.c.expires_at <= now, 1), else_=0)
        for host, names in by_host(sorted(users)).items():
            query = (
                select(table.c.username, func.count().label("rows_"), func.sum(expired).label("expired"))
                .where(table.c.server_host == host, table.c.username.in_(names), table.c.holder_member.is_(None))
                .group_by(table.c.username)
            )
            for row in (await connection.execute(query)).all():
                counts[host, row.username] = row.rows_ - int(row.expired)
                if row.expired:
                    await _delete_expired(connection, host, row.username, now)
        return counts

    async def _insert(
        self,
        connection: AsyncConnection,
        items: list[KeepItem],
        results: dict[bytes, Kept | StorageError],
        now: float,
    ) -> None:
        if not items:
            return
        await _insert_rows(connection, items, now, new=True)
        # Another node may have stored the same message a moment ago: its key then kept ours out.
        doubtful = [item.id for item in items if item.dedup is not None]
        for some in _chunks(doubtful):
            if await _count(connection, _COUNT_IDS, some) == len(some):
                continue
            there = set((await connection.execute(select(table.c.id).where(table.c.id.in_(some)))).scalars())
            results.update({row_id: Kept.DUPLICATE for row_id in some if row_id not in there})

    # -- taking and giving back --------------------------------------------------------------------------------------

    async def take(
        self,
        host: str,
        username: str,
        holder: Holder,
        *,
        limit: int = 1000,
        holders: frozenset[bytes | None] | None = None,
    ) -> list[SpoolRow]:
        """Makes `holder` the holder of the user's free rows, the oldest `limit` of them, and returns them in order.
        `holders`: what `holders` has just said, if it was asked.

        One conditional UPDATE: no row is ever given to two takers. Expired rows are deleted.
        """
        if (host, username) in self._untakes:
            raise StorageUnavailable("what an earlier attempt took is not free again yet")  # it would be passed over
        if None not in (holders if holders is not None else await self.holders(host, username)):
            return []  # what most logins find, in a merged look-up
        self._check_lease()
        take_id = new_id()

        async def work(connection: AsyncConnection) -> list[SpoolRow]:
            now = self._clock()
            await connection.execute(
                _TAKE[connection.dialect.name],
                {
                    "host": host,
                    "username": username,
                    "member": holder.member,
                    "incarnation": holder.incarnation,
                    "session": holder.session,
                    "take_id": take_id,
                    "now": now,
                    "limit": limit,
                },
            )
            query = (
                select(table.c.id, table.c.created_at, table.c.sender, table.c.stanza)
                .where(*_of(host, username), table.c.holder_member == holder.member, table.c.take_id == take_id)
                .order_by(table.c.id)
            )
            rows = (await connection.execute(query)).all()
            await _delete_expired(connection, host, username, now)
            return [SpoolRow(row.id, row.created_at, row.sender, row.stanza) for row in rows]

        try:
            rows = await self._storage.run(work, repeatable=True)
            self._check_lease()  # it may have been long ago that we began
        except BaseException:  # it may have been committed all the same: then these rows must not be held for ever
            user = (host, username)
            self._untakes[user] = self._untakes.get(user, 0) + 1
            self._untake(_FreeItem(user=user, take_id=take_id), user)
            raise
        self.taken += len(rows)
        return rows

    def was_away(self, seconds: float) -> bool:
        """Whether the database did not take what was written so many seconds ago or less."""
        return self._storage.batcher.was_away(seconds)

    def is_giving_back(self, host: str, username: str) -> bool:
        """Whether what a take that failed may have got is not free again yet."""
        return (host, username) in self._untakes

    def _check_lease(self) -> None:
        if not self.standing.holds_lease():
            raise StorageUnavailable("this node could not renew its lease: others may have taken over what it holds")

    async def holders(self, host: str, username: str) -> frozenset[bytes | None]:
        """The members that hold rows of the user, and None where there are rows without holder."""
        found: frozenset[bytes | None] | None = await self._storage.loader.get("spool waiting", (host, username))
        return found or frozenset()

    def release(self, ids: Iterable[bytes], holder: Holder) -> "asyncio.Future[None]":
        """Makes those of the rows free which `holder` still holds."""
        return self._storage.batcher.submit(FREE, _FreeItem(tuple(ids), holder))

    def delete(self, ids: Iterable[bytes]) -> "asyncio.Future[None]":
        """The recipient's client has acknowledged these rows."""
        return self._storage.batcher.submit(DELETE, tuple(ids))

    async def take_over(self, me: bytes) -> int:
        """Frees what nodes hold whose lease has ended, by the database's clock; how many rows they were. `me` is not
        among them. Several nodes may do it at once."""
        dead = (
            select(node.c.node_id, node.c.incarnation)
            .where(node.c.node_id != me, or_(node.c.lease_until.is_(None), node.c.lease_until < db_now()))
            .where(
                exists().where(
                    table.c.holder_member == node.c.node_id, table.c.holder_incarnation <= node.c.incarnation
                )
            )
        )

        async def look(connection: AsyncConnection) -> list[tuple[bytes, int]]:
            return [(row.node_id, row.incarnation) for row in await connection.execute(dead)]

        total = 0
        for member, incarnation in await self._storage.read(look):
            freed = await self._free(_TAKE_OVER, member, incarnation)
            if freed:
                log.info("messages of a dead node are free", node=uuid.UUID(bytes=member), messages=freed)
            total += freed
        self.taken_over += total
        return total

    async def free_stale(self, member: bytes, incarnation: int) -> int:
        """Frees the rows that older incarnations of the member hold; how many they were."""

        return await self._free(_FREE_STALE, member, incarnation)

    async def _free(self, statements: dict[str, TextClause], member: bytes, incarnation: int) -> int:
        async def work(connection: AsyncConnection) -> int:
            result = await connection.execute(
                statements[connection.dialect.name],
                {"member": member, "incarnation": incarnation, "now": self._clock(), "limit": _FREE_AT_ONCE},
            )
            return result.rowcount

        total = 0
        while True:  # in pieces, so that no transaction is long
            freed = await self._storage.run(work)
            total += freed
            if freed < _FREE_AT_ONCE:
                return total

    # -- telling -----------------------------------------------------------------------------------------------------

    async def untold(self, since: float, *, after: bytes = b"", limit: int = 500) -> list[FreedRow]:
        """Rows that became free at or after `since`, by the clock of the node that freed them, and that nobody has told
        of as offline messages, oldest first, in pages; `after` the last id of the page before."""
        columns = (table.c.id, table.c.server_host, table.c.username, table.c.stanza, table.c.expires_at)
        query = (
            select(*columns)
            .where(table.c.free_since >= since, table.c.told == _UNTOLD, table.c.holder_member.is_(None))
            .where(table.c.id > after, _lives(self._clock()))
            .order_by(table.c.id)
            .limit(limit)
        )

        async def work(connection: AsyncConnection) -> list[FreedRow]:
            return [FreedRow(*row) for row in await connection.execute(query)]

        return await self._storage.read(work)

    def tell(self, row_id: bytes, also: Sequence[tuple[str, Any]] = ()) -> "asyncio.Future[Any]":
        """Makes this node the one that tells of a row of `untold`; what is `also` to be written commits with that. The
        future raises NotToTell when it is not ours to tell; of all nodes that try, one succeeds."""
        return self._storage.batcher.submit_unit([(TELL, row_id), *also])

    async def _write_tells(self, connection: AsyncConnection, ids: list[bytes]) -> list[StorageError | None]:
        ours: set[bytes] = set()
        for some in _chunks(sorted(ids)):
            free = (table.c.id.in_(some), table.c.holder_member.is_(None))
            await connection.execute(update(table).where(*free, table.c.told == _UNTOLD).values(told=self._teller))
            query = select(table.c.id).where(table.c.id.in_(some), table.c.told == self._teller)
            ours.update((await connection.execute(query)).scalars())
        return [None if row_id in ours else NotToTell("somebody else tells of it") for row_id in ids]

    # -- looking -----------------------------------------------------------------------------------------------------

    async def count(self, host: str, username: str) -> int:
        """The user's offline messages: rows without holder that have not expired."""
        query = (
            select(func.count())
            .select_from(table)
            .where(*_of(host, username), table.c.holder_member.is_(None), _lives(self._clock()))
        )

        async def work(connection: AsyncConnection) -> int:
            return int((await connection.execute(query)).scalar_one())

        return await self._storage.read(work)

    async def totals(self, member: bytes) -> Totals:
        """For operators: it counts all offline messages there are."""
        offline = select(func.count(), func.min(table.c.free_since)).where(table.c.free_since.is_not(None))
        held = select(func.count()).select_from(table).where(table.c.holder_member == member)

        async def work(connection: AsyncConnection) -> Totals:
            count, oldest = (await connection.execute(offline)).one()
            return Totals(int(count), int((await connection.execute(held)).scalar_one()), oldest)

        return await self._storage.read(work)

    async def look(self, host: str, username: str, *, after: bytes | None = None, limit: int = 100) -> list[SpoolRow]:
        """The user's offline messages as they are, oldest first, in pages; `after` the last id of the page before."""
        query = self._free_rows(host, username).order_by(table.c.id).limit(limit)
        return await self._rows(query if after is None else query.where(table.c.id > after))

    async def every(self, host: str, username: str, *, after: bytes | None = None, limit: int = 100) -> list[SpoolRow]:
        """As `look`, with what sessions hold: all that has not arrived yet."""
        columns = (table.c.id, table.c.created_at, table.c.sender, table.c.stanza)
        query = select(*columns).where(*_of(host, username), _lives(self._clock())).order_by(table.c.id).limit(limit)
        return await self._rows(query if after is None else query.where(table.c.id > after))

    def adopt(
        self, host: str, username: str, sender_bare: str, stanza: bytes, created_at: float, expires_at: float | None
    ) -> "asyncio.Future[Kept]":
        """Stores a message that was stored elsewhere at that time, in the order of these times, whatever the quota; the
        future raises NoAccount. Raises StorageUnavailable at once when the write queue is full."""
        row_id = id_at(created_at)
        return self.submit(
            KeepItem(row_id, host, username, sender_bare, stanza, created_at, expires_at, None, None, None, True)
        )

    async def find(self, host: str, username: str, ids: Iterable[bytes]) -> list[SpoolRow]:
        """Those of the ids that are offline messages of the user."""
        found: list[SpoolRow] = []
        for some in _chunks(sorted(ids)):
            found += await self._rows(self._free_rows(host, username).where(table.c.id.in_(some)))
        return found

    def _free_rows(self, host: str, username: str) -> Select[Any]:
        columns = (table.c.id, table.c.created_at, table.c.sender, table.c.stanza)
        return select(*columns).where(*_of(host, username), table.c.holder_member.is_(None), _lives(self._clock()))

    async def _rows(self, query: Select[Any]) -> list[SpoolRow]:
        async def work(connection: AsyncConnection) -> list[SpoolRow]:
            rows = await connection.execute(query)
            return [SpoolRow(row.id, row.created_at, row.sender, row.stanza) for row in rows]

        return await self._storage.read(work)

    async def remove(self, host: str, username: str, ids: Sequence[bytes]) -> bool:
        """Their user does not want these offline messages: all of them go, or, when one is not there, none."""
        wanted = set(ids)

        async def work(connection: AsyncConnection) -> bool:
            mine = (*_of(host, username), table.c.holder_member.is_(None))
            for some in _chunks(sorted(wanted)):
                gone = await connection.execute(delete(table).where(*mine, table.c.id.in_(some)))
                if gone.rowcount < len(some):
                    raise _NotThere
            return True

        try:
            return await self._storage.run(work)
        except _NotThere:
            return False

    async def purge(self, host: str, username: str) -> None:
        """Removes all offline messages of a user, in pieces, so that no transaction is long."""
        query = select(table.c.id).where(*_of(host, username), table.c.holder_member.is_(None)).limit(_FREE_AT_ONCE)

        async def work(connection: AsyncConnection) -> int:
            ids = list((await connection.execute(query)).scalars())
            for some in _chunks(sorted(ids)):
                free = table.c.holder_member.is_(None)
                await connection.execute(delete(table).where(table.c.id.in_(some), free))
            return len(ids)

        while await self._storage.run(work) == _FREE_AT_ONCE:
            pass

    async def delete_older(self, before: float, limit: int) -> int:
        """Deletes offline messages that were stored before that time, the oldest `limit` of them; how many."""
        # The key of the table is in the order of time; it is some seconds of patience off `created_at`.
        old = (table.c.id < first_id(before + _ID_LATE), table.c.created_at < before, table.c.holder_member.is_(None))
        return await self._delete_free(select(table.c.id).where(*old).order_by(table.c.id), limit)

    async def delete_expired(self, before: float, limit: int) -> int:
        """Deletes offline messages that need not be delivered any more after a time before that one; how many."""
        # Few messages have such a time. The index `spool_user` answers alone, and no message is read; SQLite takes it
        # when the holder is asked for in a way that suits no other one.
        free = func.coalesce(table.c.holder_member, b"") == b""
        query = select(table.c.id).with_hint(table, "FORCE INDEX (spool_user)", "mysql")
        return await self._delete_free(query.where(table.c.expires_at < before, free), limit)

    async def _delete_free(self, query: Select[Any], limit: int) -> int:
        async def work(connection: AsyncConnection) -> int:
            ids = list((await connection.execute(query.limit(limit))).scalars())
            count = 0
            for some in _chunks(sorted(ids)):  # looked at once more: a session may have taken them meanwhile
                gone = delete(table).where(table.c.id.in_(some), table.c.holder_member.is_(None))
                count += (await connection.execute(gone)).rowcount
            return count

        return await self._storage.run(work)

    async def freed_since(self, when: float, *, limit: int = 10_000) -> list[User]:
        """The users with rows that were stored without holder, or released, at or after `when`, and are free now.

        For the promise that no message waits while its recipient is available. `when` is on the clocks of the nodes
        that wrote: ask with an overlap that covers how far these are apart and how long a commit may take.
        """
        query = (
            select(table.c.server_host, table.c.username)
            .where(table.c.free_since >= when)
            .group_by(table.c.server_host, table.c.username)
            .limit(limit)
        )

        async def work(connection: AsyncConnection) -> list[User]:
            return [(row.server_host, row.username) for row in await connection.execute(query)]

        return await self._storage.read(work)

    async def held_from(
        self, senders: Iterable[str], members: Iterable[bytes], *, limit: int = 1000
    ) -> list[tuple[User, bytes]]:
        """The users for whom one of these members holds rows of one of these senders (bare JIDs), and the member."""
        columns = (table.c.server_host, table.c.username, table.c.holder_member)
        query = (
            select(*columns)
            .where(table.c.holder_member.in_(sorted(members)), table.c.sender.in_(sorted(senders)))
            .group_by(*columns)
            .limit(limit)
        )

        async def work(connection: AsyncConnection) -> list[tuple[User, bytes]]:
            rows = await connection.execute(query)
            return [((row.server_host, row.username), row.holder_member) for row in rows]

        return await self._storage.read(work)

    # -- writing in batches ------------------------------------------------------------------------------------------

    async def _write_frees(self, connection: AsyncConnection, items: list[_FreeItem]) -> list[None]:
        free: dict[str, Any] = {
            "holder_member": null(),
            "holder_incarnation": null(),
            "holder_session": null(),
            "take_id": null(),
            "free_since": self._clock(),
        }
        by_holder: dict[Holder, list[bytes]] = {}
        for item in items:
            if item.holder is not None:
                by_holder.setdefault(item.holder, []).extend(item.ids)
            elif item.user is not None:
                await connection.execute(
                    update(table).where(*_of(*item.user), table.c.take_id == item.take_id).values(**free)
                )
        for holder, ids in by_holder.items():
            for some in _chunks(sorted(ids)):
                still_held = (
                    table.c.holder_member == holder.member,
                    table.c.holder_incarnation == holder.incarnation,
                    table.c.holder_session == holder.session,
                )
                await connection.execute(update(table).where(table.c.id.in_(some), *still_held).values(**free))
        return [None] * len(items)

    def _untake(self, item: _FreeItem, user: User, pause: float = _UNTAKE_FIRST) -> None:
        """Free what a take may have got, again and again until the database has done it: only then is it known."""
        try:
            future = self._storage.batcher.submit(FREE, item)
        except StorageUnavailable as exc:
            self._untake_later(item, user, pause, exc)
        else:
            future.add_done_callback(partial(self._untaken, item, user, pause))

    def _untaken(self, item: _FreeItem, user: User, pause: float, future: "asyncio.Future[Any]") -> None:
        exc = None if future.cancelled() else future.exception()
        if isinstance(exc, StorageUnavailable):
            self._untake_later(item, user, pause, exc)
            return
        if exc is not None:
            log.error("spooled messages may stay held until this node restarts", user=f"{user[1]}@{user[0]}", exc=exc)
        self._untakes[user] -= 1
        if not self._untakes[user]:
            del self._untakes[user]

    def _untake_later(self, item: _FreeItem, user: User, pause: float, exc: StorageUnavailable) -> None:
        if self._storage.closed:
            return  # the next start frees all that this run holds
        log.warning("spooled messages wait to be free again", user=f"{user[1]}@{user[0]}", reason=exc)
        asyncio.get_running_loop().call_later(pause, self._untake, item, user, min(pause * 2, _UNTAKE_LONGEST))


def _first_of(kept: "asyncio.Future[Kept]", unit: "asyncio.Future[list[Any]]") -> None:
    """The row's own result out of those of its unit."""
    if kept.done():
        return
    if unit.cancelled():
        kept.cancel()
    elif (error := unit.exception()) is not None:
        kept.set_exception(error)
    else:
        kept.set_result(unit.result()[0])


def _row(item: KeepItem, now: float) -> dict[str, Any]:
    holder = item.holder
    return {
        "id": item.id,
        "server_host": item.host,
        "username": item.username,
        "created_at": item.created_at,
        "expires_at": item.expires_at,
        "dedup_key": item.dedup,
        "sender": item.sender,
        "stanza": item.stanza,
        "holder_member": holder.member if holder else None,
        "holder_incarnation": holder.incarnation if holder else None,
        "holder_session": holder.session if holder else None,
        "free_since": None if holder else now,  # not when it was queued, which may be long ago
        "told": _UNTOLD if holder else None,
    }


async def _insert_all(connection: AsyncConnection, items: list[KeepItem], now: float) -> bool:
    """Nearly always none of them is there, in one form or another, and no quota stands in the way: then one statement
    does it. False: one of them needs a closer look; what is written already is theirs."""
    if any(item.holder is None and item.quota is not None for item in items):
        return False
    try:
        await _insert_rows(connection, items, now, new=False)
    except IntegrityError:  # which has undone this statement alone
        return False
    return True


async def _insert_rows(connection: AsyncConnection, items: list[KeepItem], now: float, *, new: bool) -> None:
    """`new`: those that are there already are left alone, else they raise IntegrityError."""
    if connection.dialect.name == "mysql":
        for rows in in_statements(_literals(item, now) for item in items):
            await connection.execute(_INSERT_NEW if new else _INSERT, {"rows": rows})
    else:
        statement = insert_new(table, connection.dialect) if new else insert(table)
        await connection.execute(statement, [_row(item, now) for item in items])


async def _count(
    connection: AsyncConnection, query: TextClause, values: Sequence[bytes] | Sequence[str], **others: Any
) -> int | None:
    """How many there are, which says it all as a rule; one row to be read. None: this database is asked for them."""
    if connection.dialect.name != "mysql":
        return None
    return int((await connection.execute(query, {"some": values, **others})).scalar_one())


def _literals(item: KeepItem, now: float) -> str:
    """The same in the order of `_INSERT`."""
    holder = item.holder
    if holder is None:
        held = f"NULL,NULL,NULL,{millis_or_null(now)},NULL"
    else:
        session = holder.session.encode().hex()
        held = f"x'{holder.member.hex()}',{holder.incarnation},x'{session}',NULL,x'{_UNTOLD.hex()}'"
    return (
        f"(x'{item.id.hex()}',x'{item.host.encode().hex()}',x'{item.username.encode().hex()}',"
        f"{millis_or_null(item.created_at)},{millis_or_null(item.expires_at)},{hex_or_null(item.dedup)},"
        f"x'{item.sender.encode().hex()}',x'{item.stanza.hex()}',{held})"
    )


async def _write_deletes(connection: AsyncConnection, items: list[tuple[bytes, ...]]) -> list[None]:
    for some in _chunks(sorted({row_id for ids in items for row_id in ids})):
        if connection.dialect.name == "mysql":
            await connection.execute(_DELETE, {"some": some})
        else:
            await connection.execute(delete(table).where(table.c.id.in_(some)))
    return [None] * len(items)


async def _fetch_waiting(connection: AsyncConnection, users: list[User]) -> dict[User, frozenset[bytes | None]]:
    """Who holds rows of the users: members, or None for rows without holder."""
    found: dict[User, set[bytes | None]] = {}
    for host, names in by_host(users).items():
        query = (
            select(table.c.username, table.c.holder_member)
            .where(table.c.server_host == host, table.c.username.in_(names))
            .distinct()
        )
        for row in await connection.execute(query):
            found.setdefault((host, row.username), set()).add(row.holder_member)
    return {user: frozenset(holders) for user, holders in found.items()}


async def _is_there(connection: AsyncConnection, row_id: bytes) -> bool:
    """Whether a try before this one was committed after all."""
    return (await connection.execute(select(table.c.id).where(table.c.id == row_id))).first() is not None


async def _delete_expired(connection: AsyncConnection, host: str, username: str, now: float) -> None:
    await connection.execute(
        delete(table).where(*_of(host, username), table.c.holder_member.is_(None), table.c.expires_at <= now)
    )


def _of(host: str, username: str) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    return table.c.server_host == host, table.c.username == username


def _lives(now: float) -> ColumnElement[bool]:
    return or_(table.c.expires_at.is_(None), table.c.expires_at > now)


def _chunks(ids: Sequence[bytes]) -> list[Sequence[bytes]]:
    return [ids[start : start + _CHUNK] for start in range(0, len(ids), _CHUNK)]


# What every batch needs, for MySQL, with all its rows or keys as one value. Two are `insert(table)` and `insert_new`.
_VALUES: Final = (
    "INSERT INTO spool (id, server_host, username, created_at, expires_at, dedup_key, sender, stanza,"
    " holder_member, holder_incarnation, holder_session, free_since, told) VALUES :rows"
)
_SOME: Final = hex_param("some")
_COUNT_ACCOUNTS: Final = text(
    "SELECT COUNT(*) FROM account WHERE server_host = :host AND username IN :some LOCK IN SHARE MODE"
).bindparams(_SOME)
_COUNT_KEYS: Final = text("SELECT COUNT(*) FROM spool WHERE dedup_key IN :some").bindparams(_SOME)
_COUNT_IDS: Final = text("SELECT COUNT(*) FROM spool WHERE id IN :some").bindparams(_SOME)
_DELETE: Final = text("DELETE FROM spool WHERE id IN :some").bindparams(_SOME)
_INSERT: Final = text(_VALUES).bindparams(rows_param("rows"))
_INSERT_NEW: Final = text(f"{_VALUES} ON DUPLICATE KEY UPDATE id = spool.id").bindparams(rows_param("rows"))
_TYPES: Final[dict[str, TypeEngine[Any]]] = {
    "host": Utf8(HOST_BYTES),
    "username": Utf8(PART_BYTES),
    "member": fixed_bytes(16),
    "incarnation": BigInteger(),
    "session": Utf8(PART_BYTES),
    "take_id": fixed_bytes(16),
    "now": Stamp(),
}
_TAKE: Final = limited_update(
    "spool",
    "holder_member = :member, holder_incarnation = :incarnation, holder_session = :session, take_id = :take_id,"
    " free_since = NULL",
    "server_host = :host AND username = :username AND holder_member IS NULL"
    " AND (expires_at IS NULL OR expires_at > :now)",
    _TYPES,
)
_FREE: Final = (
    "holder_member = NULL, holder_incarnation = NULL, holder_session = NULL, take_id = NULL, free_since = :now"
)
_FREE_STALE: Final = limited_update(
    "spool", _FREE, "holder_member = :member AND holder_incarnation < :incarnation", _TYPES
)
# Looked at once more as it is done: the member may have come back meanwhile.
_TAKE_OVER: Final = limited_update(
    "spool",
    _FREE,
    "holder_member = :member AND holder_incarnation <= :incarnation AND EXISTS (SELECT 1 FROM node"
    " WHERE node_id = :member AND incarnation >= :incarnation AND (lease_until IS NULL OR lease_until < {db_now}))",
    _TYPES,
)
