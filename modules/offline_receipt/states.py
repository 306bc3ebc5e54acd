"""What became of messages: one row for each that is kept track of, by sender, recipient and id.

A row is a set of times, one for each thing that can happen to a message, and the state follows from them. A time only
ever grows, so changes may come from several nodes, late, twice and in any order, and the row is the same in the end.
"""

import asyncio
import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

from sqlalchemy import Column, Index, delete, func, literal_column, select, update
from sqlalchemy.dialects import mysql, sqlite

from xmppd.errors import StorageError, StorageUnavailable
from xmppd.module_api import (
    BARE_BYTES,
    PART_BYTES,
    Stamp,
    Storage,
    Utf8,
    fixed_bytes,
    host_column,
    key_hash,
    module_table,
    user_column,
)
from xmppd.protocol.jid import JID, bare

if TYPE_CHECKING:
    from sqlalchemy import Insert
    from sqlalchemy.ext.asyncio import AsyncConnection

KIND: Final = "delivery states"
SOON: Final = 0.25  # seconds until changes are written
PIECE: Final = 500  # of them in one piece
_SAME_TIME: Final = 2000
_CLOSING: Final = 2.0  # seconds
ROOM: Final = 20_000  # messages with changes that wait for the database; past it changes are lost
_TIMES: Final = (
    "accepted_at",
    "stored_at",
    "sent_at",
    "acknowledged_at",
    "received_at",
    "displayed_at",
    "bounced_at",
    "removed_at",
    "expires_at",
)
_KEPT: Final = ("updated_at", *_TIMES)

delivery_state = module_table(
    "delivery_state",
    Column("id_hash", fixed_bytes(32), primary_key=True),  # of sender, recipient and id
    host_column(),  # the sender
    user_column(),
    Column("recipient", Utf8(BARE_BYTES), nullable=False),
    Column("recipient_hash", fixed_bytes(32), nullable=False),
    Column("message_id", Utf8(PART_BYTES), nullable=False),
    Column("updated_at", Stamp, nullable=False),
    Column("accepted_at", Stamp),
    Column("stored_at", Stamp),  # as an offline message, the last time
    Column("sent_at", Stamp),
    Column("acknowledged_at", Stamp),  # by the recipient's client (XEP-0198)
    Column("received_at", Stamp),  # as the recipient's client says (XEP-0184)
    Column("displayed_at", Stamp),  # likewise (XEP-0333)
    Column("bounced_at", Stamp),
    Column("removed_at", Stamp),
    Column("expires_at", Stamp),  # then it is not worth delivering any more
    Column("reason", Utf8(255)),  # of a bounce: a stanza error's condition
    Index("delivery_state_sender", "server_host", "username", "updated_at"),
    Index("delivery_state_recipient", "recipient_hash"),
    Index("delivery_state_age", "updated_at"),
)


@dataclass(frozen=True, slots=True)
class Key:
    """Bare JIDs, and the id that the sender's client gave."""

    sender: JID
    recipient: JID
    id: str

    @property
    def hash(self) -> bytes:
        return hashlib.sha256(f"{self.sender.bare}\0{self.recipient.bare}\0{self.id}".encode()).digest()


def key_of(sender: JID, recipient: JID, id: str) -> Key | None:
    """None for what cannot be kept track of: a blank id, or an endless one."""
    if not id.strip() or len(id.encode()) > PART_BYTES:
        return None
    return Key(bare(sender), bare(recipient), id)


@dataclass(slots=True)
class Change:
    """What has happened to one message, and when: names of columns, seconds since 1970."""

    key: Key
    times: dict[str, float] = field(default_factory=dict)
    reason: str | None = None

    def merge(self, times: dict[str, float], reason: str | None) -> None:
        for name, at in times.items():
            self.times[name] = max(at, self.times.get(name, 0.0))
        self.reason = reason or self.reason

    def row(self) -> dict[str, Any]:
        sender, recipient = self.key.sender, self.key.recipient
        times = {name: self.times.get(name) for name in _TIMES}
        happened = [at for name, at in self.times.items() if name != "expires_at"]
        return {
            "id_hash": self.key.hash,
            "server_host": sender.domain,
            "username": sender.local,
            "recipient": recipient.bare,
            "recipient_hash": key_hash(recipient.bare),
            "message_id": self.key.id,
            "updated_at": max(happened, default=0.0),
            "reason": self.reason,
            **times,
        }


@dataclass(frozen=True, slots=True)
class Removed:
    """A user has removed all that waited in the offline storage."""

    recipient: JID
    at: float


@dataclass(frozen=True, slots=True)
class State:
    """A row, and what it comes to."""

    recipient: str
    id: str
    state: str
    at: float  # when it came to that
    reason: str
    times: dict[str, float]


def state_of(row: Any, now: float) -> State | None:
    """None where all that is known is what the recipient's client says."""
    times = {name: at for name in _TIMES if (at := getattr(row, name))}
    known = {
        # In this order where two of them have the same time: the later one counts.
        "stored-offline": times.get("stored_at"),
        "sent": times.get("sent_at"),
        "removed": times.get("removed_at"),
        "bounced": times.get("bounced_at"),
    }
    happened = [(at, state) for state, at in known.items() if at]
    if not happened and "accepted_at" not in times and "acknowledged_at" not in times:
        return None
    if "displayed_at" in times:
        state, at = "displayed", times["displayed_at"]
    elif delivered := [times[name] for name in ("acknowledged_at", "received_at") if name in times]:
        state, at = "delivered", min(delivered)
    elif happened:
        at, state = max(happened, key=lambda each: each[0])
    else:
        at, state = times["accepted_at"], "accepted"
    if state == "stored-offline" and (expires := times.get("expires_at")) and expires <= now:
        at, state = expires, "expired"
    return State(row.recipient, row.message_id, state, at, row.reason or "" if state == "bounced" else "", times)


class Log(Protocol):
    def warning(self, phrase: str, /, **fields: object) -> None: ...


class States:
    """Changes on their way to the database, a few at a time, and what is there. Reading raises StorageError."""

    def __init__(self, storage: Storage, log: Log, clock: Callable[[], float]) -> None:
        self._storage = storage
        self._log = log
        self._clock = clock
        self._waiting: dict[Key, Change] = {}
        self._flying: set[asyncio.Future[Any]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._full = self._closed = False
        self.lost = 0  # changes for which there was no room

    def open(self) -> None:
        self._storage.batcher.define(KIND, _write, size=lambda changes: 400 * len(changes))

    async def close(self) -> None:
        """What waits is written if the database takes it soon."""
        self._closed = True
        self._submit_now()
        if self._flying:
            await asyncio.wait(self._flying, timeout=_CLOSING)
        self._storage.batcher.undefine(KIND)

    # -- writing

    def note(self, key: Key, *, reason: str | None = None, **times: float) -> None:
        """Something has happened; it is written in a moment, with what else happens till then."""
        change = self._waiting.get(key)
        if change is None:
            if self._closed or len(self._waiting) >= ROOM:
                self._lose(1)
                return
            change = self._waiting[key] = Change(key)
        change.merge(times, reason)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(SOON, self._submit)

    def item(self, key: Key, **times: float) -> tuple[str, Any]:
        """The same, for `submit_unit`: it commits with something else."""
        return KIND, (Change(key, dict(times)),)

    def removed_all(self, recipient: JID) -> None:
        """A user's offline messages are gone."""
        self._send((Removed(recipient, self._clock()),))

    def _submit(self) -> None:
        self._timer = None
        changes, self._waiting = list(self._waiting.values()), {}
        self._full = False
        for start in range(0, len(changes), PIECE):
            self._send(tuple(changes[start : start + PIECE]))

    def _send(self, changes: tuple[Change | Removed, ...]) -> None:
        try:
            future = self._storage.batcher.submit(KIND, changes)
        except StorageError:
            self._again(changes)
        else:
            self._flying.add(future)
            future.add_done_callback(partial(self._sent, changes))

    def _sent(self, changes: tuple[Change | Removed, ...], future: "asyncio.Future[Any]") -> None:
        self._flying.discard(future)
        if future.cancelled() or (error := future.exception()) is None:
            return
        if isinstance(error, StorageUnavailable):
            self._again(changes)
        else:
            self._lose(len(changes))

    def _again(self, changes: Iterable[Change | Removed]) -> None:
        """The database has not taken them for half a minute, or the queue to it is full."""
        for change in changes:
            if isinstance(change, Change):
                self.note(change.key, reason=change.reason, **change.times)

    def _lose(self, changes: int) -> None:
        self.lost += changes
        if not self._full:
            self._full = True
            self._log.warning("delivery states lost", waiting=len(self._waiting), lost=self.lost)

    async def flush(self) -> None:
        """Return when what this node has noted is written, or could not be."""
        self._submit_now()
        if self._flying:
            await asyncio.wait(self._flying)

    def _submit_now(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._submit()

    # -- reading

    async def find(self, keys: Iterable[Key]) -> list[State]:
        """What is known of these."""
        hashes = [key.hash for key in keys]

        async def work(connection: "AsyncConnection") -> list[Any]:
            query = select(delivery_state).where(delivery_state.c.id_hash.in_(hashes))
            return list(await connection.execute(query))

        return list(self._states(await self._storage.read(work)))

    async def since(self, sender: JID, when: float, *, limit: int) -> tuple[list[State], float | None]:
        """Those of a sender's messages with which something has happened at or after that time, oldest first; and the
        time to go on with, None when these are all. `limit` may be passed where many have one and the same time."""
        rows = await self._rows(sender, delivery_state.c.updated_at >= when, limit + 1)
        if len(rows) <= limit:
            return list(self._states(rows)), None
        last = rows[limit].updated_at
        page = [row for row in rows if row.updated_at < last]
        if page:
            return list(self._states(page)), last
        rows = await self._rows(sender, delivery_state.c.updated_at == last, _SAME_TIME)
        return list(self._states(rows)), last + 0.001

    async def _rows(self, sender: JID, which: Any, limit: int) -> list[Any]:
        table = delivery_state.c
        query = (
            select(delivery_state)
            .where(table.server_host == sender.domain, table.username == sender.local, which)
            .order_by(table.updated_at)
            .limit(limit)
        )

        async def work(connection: "AsyncConnection") -> list[Any]:
            return list(await connection.execute(query))

        return await self._storage.read(work)

    def _states(self, rows: Iterable[Any]) -> Iterator[State]:
        now = self._clock()
        for row in rows:
            state = state_of(row, now)
            if state is not None:
                yield state

    # -- housekeeping

    async def forget(self, sender: JID) -> None:
        """All of an account's messages, in pieces."""
        table = delivery_state.c
        while await self._delete(table.server_host == sender.domain, table.username == sender.local, limit=PIECE):
            pass

    async def delete_older(self, before: float, limit: int) -> int:
        """Delete states to which nothing has happened since that time, at most `limit`; how many it were."""
        return await self._delete(delivery_state.c.updated_at < before, limit=limit)

    async def _delete(self, *where: Any, limit: int) -> int:
        ids = select(delivery_state.c.id_hash).where(*where).limit(limit)

        async def work(connection: "AsyncConnection") -> int:
            found = sorted((await connection.execute(ids)).scalars())
            if found:
                await connection.execute(delete(delivery_state).where(delivery_state.c.id_hash.in_(found), *where))
            return len(found)

        return await self._storage.run(work)


async def _write(connection: "AsyncConnection", items: list[tuple[Change | Removed, ...]]) -> list[None]:
    merged: dict[Key, Change] = {}
    removed = []
    for change in (change for changes in items for change in changes):
        if isinstance(change, Removed):
            removed.append(change)
        elif (known := merged.get(change.key)) is None:
            merged[change.key] = Change(change.key, dict(change.times), change.reason)
        else:
            known.merge(change.times, change.reason)
    rows = sorted((change.row() for change in merged.values()), key=lambda row: row["id_hash"])  # no deadlocks
    if rows:
        await connection.execute(_upsert(connection.dialect.name), rows)
    for each in removed:
        table = delivery_state.c
        waits = (table.stored_at > func.coalesce(table.sent_at, 0), table.received_at.is_(None))
        await connection.execute(
            update(delivery_state)
            .where(table.recipient_hash == key_hash(each.recipient.bare), *waits, table.acknowledged_at.is_(None))
            .values(removed_at=each.at, updated_at=each.at)
        )
    return [None] * len(items)


def _upsert(dialect: str) -> "Insert":
    """A new row, or later times in the one that is there."""
    table = delivery_state.c
    zero: Any = literal_column("0")
    mine, lite = mysql.insert(delivery_state), sqlite.insert(delivery_state)
    new: Any = mine.inserted if dialect == "mysql" else lite.excluded
    later: Any = func.greatest if dialect == "mysql" else func.max
    changes: dict[str, Any] = {
        name: func.nullif(later(func.coalesce(table[name], zero), func.coalesce(new[name], zero)), zero)
        for name in _KEPT
    }
    changes["reason"] = func.coalesce(new["reason"], table["reason"])
    if dialect == "mysql":
        return mine.on_duplicate_key_update(changes)
    return lite.on_conflict_do_update(index_elements=[table.id_hash], set_=changes)
