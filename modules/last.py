"""Last activity (XEP-0012): when a user was last online, and since when the server is up."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from xml.sax.saxutils import escape

from sqlalchemy import BigInteger, Column

from xmppd.errors import StanzaError, StorageError
from xmppd.events import SessionArrived, SessionBecameUnavailable, SessionClosed, SessionLeft, UserDeleted
from xmppd.module_api import (
    IqRequest,
    Module,
    User,
    hook,
    host_column,
    iq,
    long_text,
    module_table,
    read_per_user,
    user_column,
    write_per_user,
)
from xmppd.protocol import ns
from xmppd.protocol.jid import JID
from xmppd.protocol.stanza import Stanza

if TYPE_CHECKING:
    import asyncio

    from sqlalchemy.ext.asyncio import AsyncConnection

KIND: Final = "last activity"
STATUS_LENGTH: Final = 1024  # characters of a status text that are kept

last_activity = module_table(
    "last_activity",
    host_column(primary_key=True),
    user_column(primary_key=True),
    Column("seconds", BigInteger, nullable=False),  # since 1970
    Column("status", long_text(), nullable=False),
)


@dataclass(frozen=True, slots=True)
class Seen:
    """One row to be written; `seconds` None: to be removed."""

    user: User
    seconds: int | None
    status: str = ""


class Last(Module[object]):
    xeps = {12: "2.0"}
    features = (ns.LAST,)
    account_features = (ns.LAST,)
    tables = (last_activity,)

    async def start(self) -> None:
        self.storage.loader.define(KIND, _fetch, late=True)
        self.storage.batcher.define(
            KIND, _write, size=lambda seen: 256 + 4 * len(seen.status), user=lambda seen: seen.user
        )

    async def stop(self) -> None:
        self.storage.loader.undefine(KIND)
        self.storage.batcher.undefine(KIND)

    # -- asking

    @iq("get", ns.LAST, "query", at="host")
    def uptime(self, request: IqRequest) -> bytes:
        """How long the server has been up (XEP-0012 section 4)."""
        return _answer(self.clock() - self.server.started_at)

    @iq("get", ns.LAST, "query", at="account")
    async def last(self, request: IqRequest) -> bytes:
        """For the user and those who see their presence; 0 while they are online."""
        user = request.target
        if not await self.sees_presence(request.sender, user):
            raise StanzaError("forbidden")
        if self._is_online(user):
            return _answer(0)
        found: tuple[int, str] | None = await self.storage.loader.get(KIND, (user.domain, user.local))
        if found is None:
            raise StanzaError("item-not-found", "never seen")
        seconds, status = found
        return _answer(self.clock() - seconds, status)

    # -- remembering

    @hook(SessionBecameUnavailable)
    def became_unavailable(self, event: SessionBecameUnavailable) -> None:
        event.session.state[self.name] = True
        if not event.session.anonymous:
            self._remember(event.session.user, _status(event.presence))

    @hook(SessionClosed)
    def closed(self, event: SessionClosed) -> None:
        """One that was never available was here all the same."""
        if event.last and self.name not in event.session.state and not event.session.anonymous:
            self._remember(event.session.user, "")

    @hook(SessionLeft)
    def give(self, event: SessionLeft) -> None:
        event.luggage[self.name] = self.name in event.session.state

    @hook(SessionArrived)
    def take(self, event: SessionArrived) -> None:
        if event.luggage.get(self.name):
            event.session.state[self.name] = True

    @hook(UserDeleted)
    async def forget(self, event: UserDeleted) -> None:
        # Through the batcher, so that it comes after what the end of the user's sessions has put there.
        await self._submit(Seen((event.user.domain, event.user.local), None))

    def _remember(self, user: JID, status: str) -> None:
        if self._is_online(user):
            return
        try:
            future = self._submit(Seen((user.domain, user.local), int(self.clock()), status))
        except StorageError as exc:
            self.log.warning("last activity not stored", user=user, error=exc)
        else:
            future.add_done_callback(self._stored)

    def _is_online(self, user: JID) -> bool:
        return any(resource.priority is not None for resource in self.sessions.resources(user))

    def _submit(self, seen: Seen) -> "asyncio.Future[None]":
        return self.storage.batcher.submit(KIND, seen)

    def _stored(self, future: "asyncio.Future[None]") -> None:
        if not future.cancelled() and (error := future.exception()) is not None:
            self.log.warning("last activity not stored", error=error)


def _status(presence: Stanza) -> str:
    text = presence.element.findtext(f"{{{ns.CLIENT}}}status") or ""
    return text[:STATUS_LENGTH]


def _answer(seconds: float, status: str = "") -> bytes:
    return f'<query xmlns="{ns.LAST}" seconds="{max(0, int(seconds))}">{escape(status)}</query>'.encode()


async def _write(connection: "AsyncConnection", items: list[Seen]) -> list[None]:
    await write_per_user(
        connection,
        last_activity,
        [
            (seen.user, None if seen.seconds is None else {"seconds": seen.seconds, "status": seen.status})
            for seen in items
        ],
    )
    return [None] * len(items)


async def _fetch(connection: "AsyncConnection", users: list[User]) -> dict[User, tuple[int, str]]:
    rows = await read_per_user(connection, last_activity, users)
    return {user: (row.seconds, row.status) for user, row in rows.items()}
