"""What is left to be written about rows of the spool: that they are gone, or free."""

import asyncio
from collections.abc import Callable, Iterable
from functools import partial
from typing import ClassVar, Final, Protocol

from xmppd.errors import StorageError
from xmppd.protocol.stanza import Stanza
from xmppd.spool import Holder, SpoolRow
from xmppd.storage import place_of

RETRY_FIRST: Final = 1.0  # seconds
RETRY_LONGEST: Final = 30.0


class Spool(Protocol):
    """What is needed of the spool."""

    def release(self, ids: Iterable[bytes], holder: Holder) -> "asyncio.Future[None]": ...

    def delete(self, ids: Iterable[bytes]) -> "asyncio.Future[None]": ...


class Log(Protocol):
    def warning(self, phrase: str, /, **fields: object) -> None: ...

    def error(self, phrase: str, /, *, exc: BaseException | None = None, **fields: object) -> None: ...


class KeptMessage(Stanza):
    """A message that is a row of the spool, and still is when the session it went to has died."""

    __slots__ = ("holder", "row_id")

    kept: ClassVar[bool] = True
    row_id: bytes
    holder: Holder | None  # None as soon as the row is free again

    @classmethod
    def of(cls, row: SpoolRow, holder: Holder) -> "KeptMessage":
        """The message of a row, at the place which it has had from the beginning. ValueError, JidError."""
        message = cls.from_bytes(row.stanza)
        assert isinstance(message, KeptMessage)
        message.row_id, message.holder, message.place = row.id, holder, place_of(row.id)
        return message


class Chores:
    """Deletes and releases rows, in batches, and tries again until the database has done it."""

    def __init__(self, spool: Spool, log: Log) -> None:
        self._spool = spool
        self._log = log
        self._delete: list[bytes] = []
        self._pause = RETRY_FIRST
        self._scheduled = False

    def delete(self, row_id: bytes) -> None:
        """The message has arrived, or its sender was told that it will not."""
        self._delete.append(row_id)
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._write_deletes)

    def delete_all(self, ids: list[bytes], done: Callable[[], None] = lambda: None) -> None:
        """The same for those that somebody has gathered already; `done` is called when that is committed."""
        if ids:
            self._attempt(lambda: self._spool.delete(ids), partial(self.delete_all, ids, done), done)
        else:
            done()

    def release(self, ids: Iterable[bytes], holder: Holder, done: Callable[[], None] = lambda: None) -> None:
        """They did not arrive: somebody else may take them; `done` is called when that is committed."""
        ids = tuple(ids)
        again = partial(self.release, ids, holder, done)
        if ids:
            self._attempt(lambda: self._spool.release(ids, holder), again, done)

    def _write_deletes(self) -> None:
        self._scheduled = False
        ids, self._delete = self._delete, []
        self.delete_all(ids)

    def _attempt(
        self, write: "Callable[[], asyncio.Future[None]]", again: Callable[[], None], done: Callable[[], None]
    ) -> None:
        try:
            future = write()
        except StorageError as exc:
            self._later(again, exc)
        else:
            future.add_done_callback(partial(self._written, again, done))

    def _written(self, again: Callable[[], None], done: Callable[[], None], future: "asyncio.Future[None]") -> None:
        if future.cancelled():
            return
        error = future.exception()
        if error is None:
            self._pause = RETRY_FIRST
            done()
        elif isinstance(error, StorageError):
            self._later(again, error)
        else:
            self._log.error("offline messages could not be put away", exc=error)

    def _later(self, again: Callable[[], None], error: StorageError) -> None:
        self._log.warning("offline messages wait to be put away", error=error, again_in_s=self._pause)
        asyncio.get_running_loop().call_later(self._pause, again)
        self._pause = min(self._pause * 2, RETRY_LONGEST)
