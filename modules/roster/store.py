"""Rosters in the database.

Whoever changes a roster first locks the user's row in roster_version, on whatever node; so a change sees the one before
it, and no two are made of the same state. The version is a random word that every change renews: a number would begin
again with an account of the same name, and a client would take its old copy for the new roster.
"""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from sys import intern
from typing import Any, Final

from sqlalchemy import Boolean, Column, Row, Select, Table, and_, delete, func, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from xmppd.errors import JidError, StanzaError, StorageError
from xmppd.module_api import (
    FULL_BYTES,
    Storage,
    Utf8,
    by_host,
    fixed_bytes,
    host_column,
    insert_new,
    key_hash,
    long_bytes,
    long_text,
    module_table,
    upsert,
    user_column,
)
from xmppd.protocol.jid import JID, parse

from .items import Item, Limits, known_state, state_of
from .moves import NOTHING, received, sent

roster_item = module_table(
    "roster_item",
    host_column(primary_key=True),
    user_column(primary_key=True),
    Column("jid_hash", fixed_bytes(32), primary_key=True),
    Column("jid", Utf8(FULL_BYTES), nullable=False),
    Column("name", long_text(), nullable=False),
    Column("subscription", Utf8(16), nullable=False),
    Column("ask", Utf8(16)),  # in, out, both; null: none
    Column("approved", Boolean, nullable=False),
    Column("groups", long_text(), nullable=False),  # a JSON list; the word null: not in the roster, only a request
    Column("request", long_bytes()),  # the contact's request, until it is answered
)

roster_version = module_table(
    "roster_version",
    host_column(primary_key=True),
    user_column(primary_key=True),
    Column("version", Utf8(64), nullable=False),
)

_UNLISTED: Final = "null"
_PAGE: Final = 500  # rows that are read and decoded without a pause
_LOADER: Final = "roster"


@dataclass(slots=True)
class Loaded:
    """A roster as it is in the database. `version` is "" when it has never been changed by us."""

    items: dict[str, Item] = field(default_factory=dict)
    version: str = ""


@dataclass(frozen=True, slots=True)
class Change:
    """What a transaction did to one item; None: not in the roster."""

    jid: JID
    before: Item | None
    after: Item | None
    old_version: str
    version: str

    @property
    def changed(self) -> bool:
        return self.before != self.after

    @property
    def ends_presence(self) -> bool:
        """Whether the contact may no longer see the user."""
        return bool(self.before and self.before.sees_user) and not (self.after and self.after.sees_user)


Decide = Callable[[AsyncConnection, Item | None, bytes | None], Awaitable[tuple[Item | None, bytes | None]]]


class Store:
    """All methods raise StorageUnavailable or StorageError; those that change also what StanzaError they say."""

    def __init__(self, storage: Storage, limits: Limits) -> None:
        self._storage = storage
        self._limits = limits

    def open(self) -> None:
        self._storage.loader.define(_LOADER, _fetch)

    def close(self) -> None:
        self._storage.loader.undefine(_LOADER)

    async def load(self, user: JID) -> Loaded:
        """The whole roster; look-ups made at the same time are one query."""
        loaded: Loaded = await self._storage.loader.get(_LOADER, (user.domain, user.local))
        return loaded

    async def move(self, user: JID, contact: JID, kind: str, request: bytes | None = None) -> Change:
        """Move the contact's state by a subscription stanza: one that the contact sent, given as `request`, or, where
        that is None, one that the user sent. StanzaError resource-constraint when there is no room."""
        move = sent if request is None else received

        async def decide(
            connection: AsyncConnection, item: Item | None, kept: bytes | None
        ) -> tuple[Item | None, bytes | None]:
            state = move(state_of(item), kind)
            if state == state_of(item):
                return item, kept
            if state == NOTHING and item is not None and not item.listed:
                return None, None  # a request that was never more than one
            subscription, ask = state
            # Everything but a request alone is in the roster from here on.
            listed = state != ("none", "in") or (item is not None and item.listed)
            if item is None or item.listed != listed:
                await self._need_room(connection, user, listed=listed)
            item = item or Item(contact, "none", "none", "", ())
            item = replace(item, subscription=subscription, ask=ask, listed=listed)
            return item, (kept or request) if item.asks else None

        return await self._change(user, contact, decide)

    async def edit(self, user: JID, contact: JID, name: str, groups: tuple[str, ...]) -> Change:
        """Add an item, or give it another name and groups (RFC 6121 2.3, 2.4); StanzaError resource-constraint."""

        async def decide(
            connection: AsyncConnection, item: Item | None, kept: bytes | None
        ) -> tuple[Item | None, bytes | None]:
            if item is None or not item.listed:
                await self._need_room(connection, user, listed=True)
            item = item or Item(contact, "none", "none", "", ())
            return replace(item, name=name, groups=groups, listed=True), kept

        return await self._change(user, contact, decide)

    async def force(self, user: JID, contact: JID, name: str, groups: tuple[str, ...], subscription: str) -> Change:
        """What an operator wants: the item as it is said; StanzaError resource-constraint."""

        async def decide(
            connection: AsyncConnection, item: Item | None, kept: bytes | None
        ) -> tuple[Item | None, bytes | None]:
            if item is None or not item.listed:
                await self._need_room(connection, user, listed=True)
            subscribed, ask = known_state(subscription, item.ask if item else "none")
            item = Item(contact, subscribed, ask, name, groups)
            return item, kept if item.asks else None

        return await self._change(user, contact, decide)

    async def remove(self, user: JID, contact: JID) -> Change:
        """Take an item out (RFC 6121 2.5); StanzaError item-not-found."""

        async def decide(
            connection: AsyncConnection, item: Item | None, kept: bytes | None
        ) -> tuple[Item | None, bytes | None]:
            if item is None or not item.listed:
                raise StanzaError("item-not-found", f"{contact} is not in the roster")
            return None, None

        return await self._change(user, contact, decide)

    async def adopt(self, user: JID, items: Sequence[Item], merge: Callable[[Item, Item | None], Item]) -> int:
        """Put many items into a roster at once, each as `merge` makes it of itself and what is there; how many differ.
        StanzaError resource-constraint when they are too many."""
        version = secrets.token_hex(8)

        async def work(connection: AsyncConnection) -> int:
            await _lock(connection, user)
            rows = (await connection.execute(_items(roster_item.c.request).where(*_of(roster_item, user)))).all()
            there = {item.jid.full: (item, row.request) for row in rows if (item := _item(row)) is not None}
            new = []
            for item in items:
                before, request = there.get(item.jid.full, (None, None))
                after = merge(item, before)
                if after != before:
                    new.append(_row(user, after, request if after.asks else None))
            if not new:
                return 0
            listed = {name for name, (item, _) in there.items() if item.listed} | {item.jid.full for item in items}
            if len(listed) > self._limits.items:
                raise StanzaError("resource-constraint", f"a roster holds at most {self._limits.items} contacts")
            for start in range(0, len(new), _PAGE):
                await connection.execute(upsert(roster_item, connection.dialect), new[start : start + _PAGE])
            changed = {"server_host": user.domain, "username": user.local, "version": version}
            await connection.execute(upsert(roster_version, connection.dialect), changed)
            return len(new)

        return await self._storage.run(work)

    async def forget(self, user: JID) -> list[Item]:
        """Remove everything of an account that is gone; what there was comes back."""

        async def work(connection: AsyncConnection) -> list[Item]:
            await _lock(connection, user)
            rows = (await connection.execute(_items().where(*_of(roster_item, user)))).all()
            await connection.execute(delete(roster_item).where(*_of(roster_item, user)))
            await connection.execute(delete(roster_version).where(*_of(roster_version, user)))
            return [item for item in map(_item, rows) if item is not None]

        return await self._storage.run(work)

    async def requests(self, user: JID) -> dict[str, bytes | None]:
        """The stanzas of contacts that wait for the user's answer, by their JID; None where the stanza is not known."""
        query = select(roster_item.c.jid, roster_item.c.request).where(
            *_of(roster_item, user), roster_item.c.ask.in_(("in", "both"))
        )

        async def work(connection: AsyncConnection) -> dict[str, bytes | None]:
            return {row.jid: row.request for row in await connection.execute(query)}

        return await self._storage.read(work)

    # -- one change

    async def _change(self, user: JID, contact: JID, decide: Decide) -> Change:
        """Let `decide` make the new item, and the request kept with it, of the old ones, in one transaction."""
        version = secrets.token_hex(8)
        key = (*_of(roster_item, user), roster_item.c.jid_hash == key_hash(contact.full))

        async def work(connection: AsyncConnection) -> Change:
            old_version = await _lock(connection, user)
            row = (await connection.execute(_items(roster_item.c.request).where(*key))).one_or_none()
            before, kept = (None, None) if row is None else (_item(row), row.request)
            after, request = await decide(connection, before, kept)
            if after == before and request == kept:
                return Change(contact, before, after, old_version, old_version)
            if after is None:
                await connection.execute(delete(roster_item).where(*key))
            else:
                await connection.execute(upsert(roster_item, connection.dialect), _row(user, after, request))
            await connection.execute(
                upsert(roster_version, connection.dialect),
                {"server_host": user.domain, "username": user.local, "version": version},
            )
            return Change(contact, before, after, old_version, version)

        return await self._storage.run(work)

    async def _need_room(self, connection: AsyncConnection, user: JID, *, listed: bool) -> None:
        limit = self._limits.items if listed else self._limits.requests
        groups = roster_item.c.groups
        query = (
            select(func.count())
            .select_from(roster_item)
            .where(*_of(roster_item, user), groups != _UNLISTED if listed else groups == _UNLISTED)
        )
        if (await connection.execute(query)).scalar_one() >= limit:
            what = "contacts" if listed else "subscription requests"
            raise StanzaError("resource-constraint", f"a roster holds at most {limit} {what}")


async def _lock(connection: AsyncConnection, user: JID) -> str:
    """Hold the user's roster until the end of the transaction; its version comes back."""
    query = select(roster_version.c.version).where(*_of(roster_version, user)).with_for_update()
    version: str | None = (await connection.execute(query)).scalar_one_or_none()
    if version is None:
        # A row that is not there cannot be locked: of two that make it, the second waits here for the first.
        await connection.execute(
            insert_new(roster_version, connection.dialect),
            {"server_host": user.domain, "username": user.local, "version": ""},
        )
        version = (await connection.execute(query)).scalar_one()
    return version


def _of(table: Table, user: JID) -> tuple[Any, Any]:
    return table.c.server_host == user.domain, table.c.username == user.local


def _items(*more: Any) -> Select[Any]:
    columns = roster_item.c
    return select(
        columns.username,
        columns.jid,
        columns.name,
        columns.subscription,
        columns.ask,
        columns.approved,
        columns.groups,
        *more,
    )


def _item(row: Row[Any]) -> Item | None:
    """An item out of its row; None when what stands there is no address."""
    try:
        jid = parse(row.jid)
    except JidError:
        return None
    if not jid.resource:
        # Thousands of them are kept: what is equal is kept once.
        jid = JID(jid.local, intern(jid.domain), "", jid.bare, jid.bare)
    groups = None if row.groups == _UNLISTED else _groups(row.groups)
    subscription, ask = known_state(row.subscription, row.ask or "none")
    return Item(jid, subscription, ask, row.name, groups or (), row.approved, groups is not None)


def _groups(text: str) -> tuple[str, ...]:
    if text == "[]":
        return ()
    try:
        groups = json.loads(text)
    except ValueError as exc:
        raise StorageError("roster_item.groups: not JSON") from exc
    return tuple([intern(group) for group in groups if isinstance(group, str)])


def _row(user: JID, item: Item, request: bytes | None) -> Mapping[str, Any]:
    return {
        "server_host": user.domain,
        "username": user.local,
        "jid_hash": key_hash(item.jid.full),
        "jid": item.jid.full,
        "name": item.name,
        "subscription": item.subscription,
        "ask": None if item.ask == "none" else item.ask,
        "approved": item.approved,
        "groups": json.dumps(item.groups, ensure_ascii=False) if item.listed else _UNLISTED,
        "request": request,
    }


async def _fetch(connection: AsyncConnection, keys: list[tuple[str, str]]) -> dict[tuple[str, str], Loaded]:
    """The version is read first: a change in between then leaves an older version with newer items, and the client
    asks again; the other way round it would believe it had them."""
    found = {key: Loaded() for key in keys}
    for host, names in by_host(keys).items():
        versions = roster_version.c
        query = select(versions.username, versions.version).where(
            versions.server_host == host, versions.username.in_(names)
        )
        for row in await connection.execute(query):
            found[host, row.username].version = row.version
        async for one in _rows_of(connection, host, names):
            item = _item(one)
            if item is not None:
                found[host, one.username].items[item.jid.full] = item
    return found


async def _rows_of(connection: AsyncConnection, host: str, names: list[str]) -> AsyncIterator[Row[Any]]:
    """The items of some users in the order of the key, a page at a time: decoding one keeps the loop from all else."""
    columns = roster_item.c
    query = (
        _items(columns.jid_hash)
        .where(columns.server_host == host, columns.username.in_(names))
        .order_by(columns.username, columns.jid_hash)
        .limit(_PAGE)
    )
    page = (await connection.execute(query)).all()
    while page:
        for row in page:
            yield row
        if len(page) < _PAGE:
            return
        await asyncio.sleep(0)
        user, last = page[-1].username, page[-1].jid_hash
        behind = or_(columns.username > user, and_(columns.username == user, columns.jid_hash > last))
        page = (await connection.execute(query.where(behind))).all()
