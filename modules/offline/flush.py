"""Offline messages on their way to a session."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Final, Protocol

from xmppd.errors import JidError, StorageUnavailable
from xmppd.module_api import (
    ERROR,
    Blocklist,
    Chores,
    Holder,
    KeptMessage,
    Outcome,
    Pending,
    Session,
    SpoolRow,
    Standing,
)
from xmppd.protocol.jid import JID

CHUNK: Final = 100  # rows taken at once
WINDOW: Final = 512 * 1024  # bytes that may be on their way to one session; its connection ends when too much piles up
RETRY_FIRST: Final = 1.0  # seconds
RETRY_LONGEST: Final = 30.0


class Spool(Protocol):
    """What a flush needs of the spool."""

    standing: Standing

    async def take(
        self, host: str, username: str, holder: Holder, *, limit: int, holders: frozenset[bytes | None] | None
    ) -> list[SpoolRow]: ...

    def release(self, ids: Iterable[bytes], holder: Holder) -> "asyncio.Future[None]": ...

    def delete(self, ids: Iterable[bytes]) -> "asyncio.Future[None]": ...


class Log(Protocol):
    def warning(self, phrase: str, /, **fields: object) -> None: ...

    def error(self, phrase: str, /, *, exc: BaseException | None = None, **fields: object) -> None: ...


def takes(session: Session) -> bool:
    """Whether a session is one that gets offline messages."""
    return session.priority is not None and session.priority >= 0 and not session.aside


class Flush:
    """Takes a user's messages and writes them to one session, oldest first, until there are none.

    A row is deleted when its message's outcome is known, never before. What was written and lost with the connection is
    routed again by the server, and free for others where nobody takes it.
    """

    def __init__(
        self,
        session: Session,
        holder: Holder,
        spool: Spool,
        chores: Chores,
        log: Log,
        blocklist: Callable[[JID], Awaitable[Blocklist | None]],
        release: Callable[[Iterable[bytes], Holder], None],
    ) -> None:
        self._blocklist = blocklist
        self._release = release
        self._session = session
        self._holder = holder
        self._spool = spool
        self._chores = chores
        self._log = log
        self._bytes = 0  # on their way
        self._room = asyncio.Event()
        # True: all is written; False: the database could not give it.
        self.ended: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.again = True  # something was stored meanwhile
        self.barred = False  # what comes first is about to be free: nothing else is to be sent before

    async def run(self, holders: frozenset[bytes | None] | None) -> None:
        """Return when all is written that was there; StorageUnavailable. `holders` of what there is, if they are known:
        most logins find nothing, and need not look twice."""
        user = self._session.user
        while self.takes and not self.barred:
            blocked = await self._blocklist(user)
            rows = await self._spool.take(user.domain, user.local, self._holder, limit=CHUNK, holders=holders)
            holders = None
            if not rows:
                return
            await self._send_all(rows, blocked)

    @property
    def takes(self) -> bool:
        """Whether the session is still one that gets offline messages."""
        return takes(self._session)

    def end(self) -> None:
        """The session has ended: wait no longer for room."""
        self._room.set()

    async def _send_all(self, rows: list[SpoolRow], blocked: Blocklist | None) -> None:
        sent = 0
        try:
            for row in rows:
                while self._bytes >= WINDOW and self.takes:
                    self._room.clear()
                    await self._room.wait()
                if not self.takes or self.barred:
                    break
                if not self._spool.standing.holds_lease():
                    raise StorageUnavailable("this node has no lease: others may have taken over what it has taken")
                sent += 1
                self._send(row, blocked)
            await asyncio.sleep(0)  # others' turn
        finally:
            if sent < len(rows):
                self._release([row.id for row in rows[sent:]], self._holder)

    def _send(self, row: SpoolRow, blocked: Blocklist | None) -> None:
        try:
            message = KeptMessage.of(row, self._holder)
        except (ValueError, JidError) as exc:
            self._log.error("offline message cannot be read and is lost", user=self._session.user, exc=exc)
            self._chores.delete(row.id)
            return
        if blocked is not None and message.from_ is not None and blocked.blocks(message.from_):
            self._chores.delete(row.id)  # blocked after it was stored
            return
        size = len(row.stanza)
        self._bytes += size
        outcome = self._session.send(message)
        if isinstance(outcome, Pending):
            outcome.then(partial(self._settled, message, size))
        else:
            self._settled(message, size, None)

    def _settled(self, message: KeptMessage, size: int, result: Outcome | None) -> None:
        # Safe: it has arrived, and the row has done its duty, unless the message came back and the row is free again.
        self._bytes -= size
        self._room.set()
        holder = message.holder
        if holder is None:
            return
        if result is ERROR:
            # Refused where it went when this session had ended; its sender had been told that it is safe.
            message.holder = None
            self._release((message.row_id,), holder)
        else:
            self._chores.delete(message.row_id)
