"""Commands about what is stored: old messages, backups."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from pathlib import Path
from typing import Final, Protocol

from xmppd.admin.registry import Arg, Call, command
from xmppd.admin.results import Rescode, Restuple
from xmppd.errors import CommandError, SchemaTooNew
from xmppd.housekeeping import Delete, database_now, delete_all
from xmppd.spool import Spool
from xmppd.storage import Storage
from xmppd.storage.backup import NoBackup

# docs/exit-codes.md
NO_FILE_DATABASE: Final = 30
NO_BACKUP: Final = 31
IN_USE: Final = 32

DAY: Final = 86400.0
_SIGN: Final = 5.0  # seconds between two signs of life
_FORCE: Final = ("force", "--force")
_MOST_DAYS: Final = 36525
_INSTEAD: Final = (
    "{where} is not a file of this node, so it is backed up with its own tools: "
    "mysqldump --single-transaction --databases NAME > FILE; to restore, stop all nodes and: mysql < FILE"
)


class Sessions(Protocol):
    def count(self, host: str | None = None) -> int: ...


class OldMessageCommands:
    """They work on the shared spool: one node does it for all. What a session holds is never touched."""

    def __init__(self, spool: Spool, storage: Storage) -> None:
        self._spool = spool
        self._storage = storage

    @command(
        "delete_old_messages",
        args=(Arg("days", "integer"),),
        result=Rescode(),
        tags=("offline", "purge"),
        scope="shared",
        doc="Delete offline messages that have waited for more than DAYS days",
    )
    async def delete_old_messages(self, days: int, call: Call) -> None:
        if not 0 <= days <= _MOST_DAYS:
            raise CommandError(f"DAYS is a number from 0 to {_MOST_DAYS}")
        await self._delete(self._spool.delete_older, days * DAY, call)

    @command(
        "delete_expired_messages",
        result=Rescode(),
        tags=("offline", "purge"),
        scope="shared",
        doc="Delete offline messages that were sent with a time to live (jabber:x:expire) which is over",
    )
    async def delete_expired_messages(self, call: Call) -> None:
        await self._delete(self._spool.delete_expired, 0, call)

    async def _delete(self, delete: Delete, age: float, call: Call) -> None:
        async with _signs(call, "deleting messages"):
            await delete_all(delete, await database_now(self._storage) - age)


class BackupCommands:
    """Of an embedded database. `others`: the other nodes that run on it."""

    def __init__(
        self,
        storage: Storage,
        data_dir: Path,
        sessions: Sessions,
        others: Callable[[], Awaitable[Collection[str]]],
        restart: Callable[[], None],
    ) -> None:
        self._storage = storage
        self._data_dir = data_dir
        self._sessions = sessions
        self._others = others
        self._restart = restart

    @command(
        "backup",
        args=(Arg("file"),),
        result=Restuple(),
        tags=("server", "database"),
        scope="node",
        doc="Copy the embedded database into a new FILE of this machine while the node goes on; the copy is consistent"
        " and checked, and readable to its owner alone. A relative name is one in the data folder",
    )
    async def backup(self, file: str, call: Call) -> str:
        target = self._place(file)
        async with _signs(call, "copying the database"):
            try:
                size = await self._storage.back_up(target)
            except OSError as exc:
                raise CommandError(f"no backup was made: {exc}") from exc
        return f"{target}: {size} bytes, checked"

    @command(
        "restore",
        args=(Arg("file"), Arg("force", optional=True)),
        result=Restuple(),
        tags=("server", "database"),
        scope="node",
        doc="Put a backup in the place of all that the embedded database has, and restart the node; what was there is"
        " backed up first. Refused while somebody is logged in, unless the word `force` follows",
    )
    async def restore(self, file: str, call: Call, force: str = "") -> str:
        if force and force not in _FORCE:
            raise CommandError(f"unknown word '{force}' behind FILE; there is `force`", 2)
        source = self._place(file)
        database = self._storage.file
        if database is not None and source.exists() and source.samefile(database):
            raise CommandError(f"{source} is the database itself", NO_BACKUP)
        others = await self._others()
        if others:
            raise CommandError(f"stop the other nodes that use this database first: {', '.join(others)}", IN_USE)
        online = self._sessions.count()
        if online and not force:
            raise CommandError(f"{online} sessions are there; `restore FILE force` ends them", IN_USE)
        former = self._data_dir / time.strftime("before-restore-%Y%m%dT%H%M%SZ.db", time.gmtime())
        async with _signs(call, "restoring the database"):
            try:
                await self._storage.check_backup(source)
                await self._storage.back_up(former)
                await self._storage.restore(source)
            except (NoBackup, SchemaTooNew) as exc:
                raise CommandError(f"nothing was changed: {exc}", NO_BACKUP) from exc
            except OSError as exc:
                raise CommandError(f"nothing was changed: {exc}") from exc
        self._restart()
        return f"restored from {source}; what was there before is in {former}; the node restarts"

    def _place(self, file: str) -> Path:
        if self._storage.file is None:
            raise CommandError(_INSTEAD.format(where=self._storage.where), NO_FILE_DATABASE)
        if not file or "\0" in file:
            raise CommandError("which file?")
        return self._data_dir / file


@contextlib.asynccontextmanager
async def _signs(call: Call, what: str) -> AsyncIterator[None]:
    """Whoever waits sees now and then that it goes on."""

    async def tell() -> None:
        while True:
            await asyncio.sleep(_SIGN)
            await call.progress(f"{what} ...")

    telling = asyncio.create_task(tell(), name=what)
    try:
        yield
    finally:
        telling.cancel()
        await asyncio.wait([telling])
