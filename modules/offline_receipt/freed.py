"""Messages that a session held and that are offline messages now: each is told of once, by one node of the cluster.

A session ends without having acknowledged messages, or its node dies. Their rows are free then, and either somebody
else of the user takes them, or they wait for the next login: only then they are offline messages that a sender should
hear of. Who made them free looks, after that has been committed, and so does who saw a node go down, in case that one
had made them free and could not look any more. A row is told of in the transaction that says so.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, Protocol

from xmppd.errors import JidError, StorageError
from xmppd.module_api import FreedRow, NotToTell
from xmppd.protocol.jid import JID, make
from xmppd.protocol.stanza import Stanza

_OVERLAP: Final = 60.0  # seconds by which what was freed may show late, or with a clock that is behind
_PAGE: Final = 200
_RETRY: Final = 1.0


class Spool(Protocol):
    """What is needed of the spool."""

    async def untold(self, since: float, *, after: bytes, limit: int) -> list[FreedRow]: ...

    def tell(self, row_id: bytes, also: Sequence[tuple[str, Any]]) -> "asyncio.Future[Any]": ...


class Log(Protocol):
    def warning(self, phrase: str, /, **fields: object) -> None: ...

    def error(self, phrase: str, /, *, exc: BaseException | None = None, **fields: object) -> None: ...


class Freed:
    """`is_available` says whether somebody takes a user's messages; `rows` what is written with the telling of one, and
    `told` is called when that is committed."""

    def __init__(
        self,
        spool: Spool,
        log: Log,
        clock: Callable[[], float],
        since: float,
        spawn: Callable[..., object],
        *,
        is_available: Callable[[JID], bool],
        rows: Callable[[JID, Stanza, float | None], Iterable[tuple[str, Any]]],
        told: Callable[[JID, Stanza], None],
    ) -> None:
        self._spool = spool
        self._log = log
        self._clock = clock
        self._since = since
        self._is_available = is_available
        self._rows = rows
        self._told = told
        self._spawn = spawn
        self._due = False
        self._looks = False
        self._stopped = False

    def look(self) -> None:
        """Something has become free, or may have: a look follows, in a task of its own."""
        self._due = True
        if not self._looks and not self._stopped:
            self._looks = True
            self._spawn(self._run(), name="messages that became offline messages")

    def stop(self) -> None:
        self._stopped = True

    async def _run(self) -> None:
        try:
            while self._due:
                self._due = False
                try:
                    await self._look()
                except StorageError as exc:
                    self._log.warning("offline messages are told of later", error=exc)
                    await asyncio.sleep(_RETRY)
                    self._due = True
        finally:
            self._looks = False

    async def _look(self) -> None:
        began, after = self._clock(), b""
        while True:
            rows = await self._spool.untold(self._since - _OVERLAP, after=after, limit=_PAGE)
            results = await asyncio.gather(*(self._tell(row) for row in rows), return_exceptions=True)
            for error in results:
                if isinstance(error, BaseException) and not isinstance(error, NotToTell):
                    raise error
            if len(rows) < _PAGE:
                break
            after = rows[-1].id
        self._since = began

    async def _tell(self, row: FreedRow) -> None:
        try:
            user = make(row.username, row.host)
            message = Stanza.from_bytes(row.stanza)
        except (ValueError, JidError) as exc:
            self._log.error("offline message cannot be read", user=f"{row.username}@{row.host}", exc=exc)
            return
        if self._is_available(user):
            return  # it is being sent to them; if that fails it will be free again
        await self._spool.tell(row.id, list(self._rows(user, message, row.expires_at)))
        self._told(user, message)
