"""Accounts and their salted keys. Passwords are never stored."""

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from secrets import token_bytes
from typing import Any, Final

from sqlalchemy import and_, delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from xmppd.errors import StorageError
from xmppd.protocol.sasl import Secret
from xmppd.storage.database import Storage
from xmppd.storage.faults import Duplicate
from xmppd.storage.settings import shared_setting
from xmppd.storage.sql import by_host
from xmppd.storage.tables import account, account_secret, spool

_ADOPT: Final = "account adopt"
_REMEMBERED: Final = 100_000  # accounts known to exist
_REMEMBERED_FOR: Final = 60.0  # seconds; bounds what a removal on another node can leave behind here


@dataclass(frozen=True, slots=True)
class Account:
    username: str
    host: str
    secrets: Mapping[str, Secret] = field(repr=False)  # by kind; logs are no place for keys


class Accounts:
    """`username` and `host` are the parts of a prepared JID (RFC 7622). Everything raises StorageUnavailable."""

    def __init__(self, storage: Storage, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._storage = storage
        self._clock = clock
        self._known: OrderedDict[tuple[str, str], float] = OrderedDict()
        self._removals = 0
        self._fake_salt_key: bytes | None = None
        storage.loader.define("account", _fetch)
        storage.loader.define("account exists", _fetch_names)
        storage.batcher.define(_ADOPT, _write_adopts, size=lambda new: 1024)

    async def get(self, host: str, username: str) -> Account | None:
        found: Account | None = await self._storage.loader.get("account", (host, username))
        return found

    def known(self, host: str, username: str) -> bool:
        """Whether `exists` would say yes without asking the database; no means only that it would have to ask."""
        until = self._known.get((host, username))
        return until is not None and until > self._clock()

    async def exists(self, host: str, username: str) -> bool:
        """A yes is remembered for a minute, a no never."""
        key = (host, username)
        until = self._known.get(key)
        if until is not None and until > self._clock():
            self._known.move_to_end(key)
            return True
        removals = self._removals
        found = bool(await self._storage.loader.get("account exists", key))
        if found and removals == self._removals:  # nobody was removed while we asked
            self._known[key] = self._clock() + _REMEMBERED_FOR
            self._known.move_to_end(key)
            if len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        return found

    def forget(self, host: str, username: str) -> None:
        """The account was removed, here or on another node."""
        self._removals += 1
        self._known.pop((host, username), None)

    async def create(self, host: str, username: str, secrets: Mapping[str, Secret]) -> bool:
        """False when it exists already, also when another node creates it at the same moment."""

        async def work(connection: AsyncConnection) -> None:
            await connection.execute(
                insert(account), {"server_host": host, "username": username, "created_at": time.time()}
            )
            await _insert_secrets(connection, host, username, secrets)

        try:
            await self._storage.run(work)
        except Duplicate:
            return False
        return True

    async def adopt(self, host: str, username: str, secrets: Mapping[str, Secret]) -> bool:
        """As `create`, for many at a time: those of one moment are one transaction."""
        try:
            made: bool = await self._storage.batcher.submit(_ADOPT, Account(username, host, secrets))
        except Duplicate:  # made by somebody else at this moment
            return False
        return made

    async def set_secrets(self, host: str, username: str, secrets: Mapping[str, Secret]) -> bool:
        """Replaces all of them. False when there is no such account."""

        async def work(connection: AsyncConnection) -> bool:
            # Writing the account's row first makes a removal at the same moment wait, or us find nothing.
            touched = await connection.execute(
                update(account).where(*_is(account, host, username)).values(created_at=account.c.created_at)
            )
            if touched.rowcount == 0:
                return False
            await connection.execute(delete(account_secret).where(*_is(account_secret, host, username)))
            await _insert_secrets(connection, host, username, secrets)
            return True

        return await self._storage.run(work, repeatable=True)

    async def remove(self, host: str, username: str) -> bool:
        """Removes account, secrets and spooled messages. False when there is no such account."""

        async def work(connection: AsyncConnection) -> bool:
            removed = await connection.execute(delete(account).where(*_is(account, host, username)))
            await connection.execute(delete(account_secret).where(*_is(account_secret, host, username)))
            await connection.execute(delete(spool).where(*_is(spool, host, username)))
            return removed.rowcount > 0

        self.forget(host, username)
        try:
            return await self._storage.run(work)
        finally:
            self.forget(host, username)

    async def names(
        self, host: str, *, limit: int | None = None, prefix: str = "", after: str | None = None
    ) -> list[str]:
        """User names in the order of their bytes; `after` the last one of the page before."""
        query = select(account.c.username).where(account.c.server_host == host).order_by(account.c.username)
        if prefix:
            # U+10FFFF is no character and sorts behind every one that a name can have.
            query = query.where(account.c.username >= prefix, account.c.username < prefix + "\U0010ffff")
        if after is not None:
            query = query.where(account.c.username > after)
        query = query.limit(limit)

        async def work(connection: AsyncConnection) -> list[str]:
            return list((await connection.execute(query)).scalars())

        return await self._storage.read(work)

    async def count(self, host: str) -> int:
        query = select(func.count()).select_from(account).where(account.c.server_host == host)

        async def work(connection: AsyncConnection) -> int:
            return int((await connection.execute(query)).scalar_one())

        return await self._storage.read(work)

    async def fake_salt_key(self) -> bytes:
        """32 bytes, equal on all nodes: the salts shown for unknown users are made from it."""
        if self._fake_salt_key is None:
            key = await shared_setting(self._storage, "fake_salt_key", lambda: token_bytes(32))
            if len(key) != 32:
                raise StorageError(f"{self._storage.where}: the setting fake_salt_key is damaged")
            self._fake_salt_key = key
        return self._fake_salt_key


def _is(table: Any, host: str, username: str) -> tuple[Any, Any]:
    return table.c.server_host == host, table.c.username == username


async def _write_adopts(connection: AsyncConnection, accounts: list[Account]) -> list[bool]:
    there: set[tuple[str, str]] = set()
    for host, names in by_host(sorted({(new.host, new.username) for new in accounts})).items():
        query = select(account.c.username).where(account.c.server_host == host, account.c.username.in_(names))
        there |= {(host, name) for name in (await connection.execute(query)).scalars()}
    made = []
    for new in accounts:
        made.append((new.host, new.username) not in there)
        there.add((new.host, new.username))
    fresh = [new for new, is_new in zip(accounts, made, strict=True) if is_new]
    if fresh:
        now = time.time()
        rows = [{"server_host": new.host, "username": new.username, "created_at": now} for new in fresh]
        await connection.execute(insert(account), rows)
        secrets = [row for new in fresh for row in _secret_rows(new.host, new.username, new.secrets)]
        if secrets:
            await connection.execute(insert(account_secret), secrets)
    return made


async def _insert_secrets(connection: AsyncConnection, host: str, username: str, kinds: Mapping[str, Secret]) -> None:
    rows = _secret_rows(host, username, kinds)
    if rows:
        await connection.execute(insert(account_secret), rows)


def _secret_rows(host: str, username: str, kinds: Mapping[str, Secret]) -> list[dict[str, Any]]:
    return [
        {
            "server_host": host,
            "username": username,
            "kind": kind,
            "salt": secret.salt,
            "iterations": secret.iterations,
            "stored_key": secret.stored_key,
            "server_key": secret.server_key,
        }
        for kind, secret in kinds.items()
    ]


async def _fetch(connection: AsyncConnection, keys: list[tuple[str, str]]) -> dict[tuple[str, str], Account]:
    found: dict[tuple[str, str], dict[str, Secret]] = {}
    joined = account.outerjoin(
        account_secret,
        and_(
            account.c.server_host == account_secret.c.server_host,
            account.c.username == account_secret.c.username,
        ),
    )
    secret = account_secret.c
    for host, names in by_host(keys).items():
        query = (
            select(
                account.c.username, secret.kind, secret.salt, secret.iterations, secret.stored_key, secret.server_key
            )
            .select_from(joined)
            .where(account.c.server_host == host, account.c.username.in_(names))
        )
        for row in await connection.execute(query):
            kinds = found.setdefault((host, row.username), {})
            if row.kind is not None:
                kinds[row.kind] = Secret(row.kind, row.salt, row.iterations, row.stored_key, row.server_key)
    return {(host, username): Account(username, host, kinds) for (host, username), kinds in found.items()}


async def _fetch_names(connection: AsyncConnection, keys: list[tuple[str, str]]) -> dict[tuple[str, str], bool]:
    found = {}
    for host, names in by_host(keys).items():
        query = select(account.c.username).where(account.c.server_host == host, account.c.username.in_(names))
        found.update({(host, username): True for username in (await connection.execute(query)).scalars()})
    return found
