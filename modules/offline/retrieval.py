"""Looking through one's offline messages without being sent them all (XEP-0013).

A message is shown as a copy; it stays where it is until its user removes it, or logs in without asking.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import ClassVar, Final, Protocol
from xml.sax.saxutils import quoteattr

from lxml.etree import _Element

from xmppd.errors import JidError, StanzaError
from xmppd.module_api import Blocklist, Outcome, Pending, Session, SpoolRow
from xmppd.protocol import ns
from xmppd.protocol.jid import JID
from xmppd.protocol.stanza import Stanza, with_child

from .flush import CHUNK, WINDOW

LISTED: Final = 2000  # headers in one answer
_AT_ONCE: Final = 500  # messages named in one request
_ITEM: Final = f"{{{ns.OFFLINE}}}item"


class Spool(Protocol):
    """What is needed of the spool: rows that no session holds."""

    async def look(self, host: str, username: str, *, after: bytes | None, limit: int) -> list[SpoolRow]: ...

    async def find(self, host: str, username: str, ids: Iterable[bytes]) -> list[SpoolRow]: ...


class Copy(Stanza):
    """A message that is shown; when it does not arrive nothing is lost."""

    __slots__ = ()
    copy: ClassVar[bool] = True


class Retrieval:
    """`blocklist` gives that of a user, `is_here` says whether a session still lives."""

    def __init__(
        self,
        spool: Spool,
        blocklist: Callable[[JID], Awaitable[Blocklist | None]],
        is_here: Callable[[Session], bool],
    ) -> None:
        self._spool = spool
        self._blocklist = blocklist
        self._is_here = is_here

    async def headers(self, user: JID) -> bytes:
        """XEP-0013 2.3: the payload of a disco#items answer, oldest first."""
        items: list[str] = []
        blocked, after = await self._blocklist(user), None
        while len(items) < LISTED:
            rows = await self._spool.look(user.domain, user.local, after=after, limit=CHUNK)
            for row in rows:
                sender = _sender(row)
                if sender is not None and not _barred(sender, blocked):
                    attrs = f"jid={quoteattr(user.bare)} node={quoteattr(row.id.hex())} name={quoteattr(sender.full)}"
                    items.append(f"<item {attrs}/>")
            if len(rows) < CHUNK:
                break
            after = rows[-1].id
        listed = "".join(items[:LISTED])
        return f'<query xmlns="{ns.DISCO_ITEMS}" node="{ns.OFFLINE}">{listed}</query>'.encode()

    async def view(self, session: Session, ids: list[bytes]) -> None:
        """XEP-0013 2.4. StanzaError item-not-found when one of them is not there; then none is shown."""
        user = session.user
        blocked = await self._blocklist(user)
        found = {row.id: row for row in await self._spool.find(user.domain, user.local, ids)}
        shown = [row for row in map(found.get, ids) if row is not None and not _barred(_sender(row), blocked)]
        if len(shown) < len(ids):
            raise StanzaError("item-not-found", "there is no such message")
        await self._show(session, shown)

    async def fetch(self, session: Session) -> None:
        """XEP-0013 2.6: all of them."""
        user, after = session.user, None
        blocked = await self._blocklist(user)
        while self._is_here(session):
            rows = await self._spool.look(user.domain, user.local, after=after, limit=CHUNK)
            await self._show(session, [row for row in rows if not _barred(_sender(row), blocked)])
            if len(rows) < CHUNK:
                return
            after = rows[-1].id

    async def _show(self, session: Session, rows: list[SpoolRow]) -> None:
        """Not more than the client takes: its connection ends when too much piles up."""
        room, waiting = asyncio.Event(), 0

        def arrived(size: int) -> None:
            nonlocal waiting
            waiting -= size
            room.set()

        for row in rows:
            while waiting >= WINDOW and self._is_here(session):
                room.clear()
                await room.wait()
            if not self._is_here(session):
                return
            message = _copy(row)
            if message is not None:
                outcome: Outcome = session.send(message)  # type: ignore[assignment]
                if isinstance(outcome, Pending):
                    size = len(message.xml)
                    waiting += size
                    outcome.then(lambda result, size=size: arrived(size))  # type: ignore[misc]


def count_form(count: int) -> bytes:
    """XEP-0013 2.2: the payload of a disco#info answer."""
    fields = (
        f'<field var="FORM_TYPE" type="hidden"><value>{ns.OFFLINE}</value></field>'
        f'<field var="number_of_messages"><value>{count}</value></field>'
    )
    return (
        f'<query xmlns="{ns.DISCO_INFO}" node="{ns.OFFLINE}"><identity category="automation" type="message-list"/>'
        f'<feature var="{ns.OFFLINE}"/><x xmlns="{ns.DATA_FORMS}" type="result">{fields}</x></query>'
    ).encode()


def nodes(payload: _Element, action: str) -> list[bytes]:
    """The ids of the rows that a request names, each once. StanzaError."""
    found: dict[bytes, None] = {}
    for item in payload.iterchildren(_ITEM):
        if item.get("action") != action:
            raise StanzaError("bad-request", f"expected the action {action}")
        try:
            row_id = bytes.fromhex(item.get("node") or "")
        except ValueError:
            row_id = b""
        if len(row_id) != 16:
            raise StanzaError("item-not-found", "there is no such message")
        found[row_id] = None
    if len(found) > _AT_ONCE:
        raise StanzaError("policy-violation", f"at most {_AT_ONCE} messages at once")
    return list(found)


def _sender(row: SpoolRow) -> JID | None:
    try:
        return Stanza.from_bytes(row.stanza).from_
    except (ValueError, JidError):
        return None


def _barred(sender: JID | None, blocked: Blocklist | None) -> bool:
    return sender is not None and blocked is not None and blocked.blocks(sender)


def _copy(row: SpoolRow) -> Stanza | None:
    marker = f'<offline xmlns="{ns.OFFLINE}"><item node="{row.id.hex()}"/></offline>'.encode()
    try:
        return Copy.from_bytes(with_child(Stanza.from_bytes(row.stanza), marker).xml)
    except (ValueError, JidError):
        return None  # the flush reports it
