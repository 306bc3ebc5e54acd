"""vCards (XEP-0054): everybody may read them, their owners write them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Final

from sqlalchemy import Column

from xmppd.errors import StanzaError
from xmppd.events import HANDLED, Handled, UserDeleted, UserExporting, UserImporting
from xmppd.module_api import (
    IqRequest,
    Module,
    Size,
    Stamp,
    User,
    hook,
    host_column,
    iq,
    long_bytes,
    module_table,
    read_per_user,
    sized,
    user_column,
    write_per_user,
)
from xmppd.protocol import ns
from xmppd.protocol.jid import JID
from xmppd.protocol.stanza import serialize

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

KIND: Final = "vcard"
_EMPTY: Final = f'<vCard xmlns="{ns.VCARD}"/>'.encode()

vcard = module_table(
    "vcard",
    host_column(primary_key=True),
    user_column(primary_key=True),
    Column("xml", long_bytes(), nullable=False),
    Column("updated_at", Stamp, nullable=False),
)


@dataclass(frozen=True, slots=True)
class Config:
    max_size: Annotated[Size, sized(1024, 8 << 20)] = 128 * 1024  # bytes of one vCard, photo included


@dataclass(frozen=True, slots=True)
class Change:
    """One vCard to be written; `xml` None: to be removed."""

    user: User
    xml: bytes | None
    at: float


class VCard(Module[Config]):
    xeps = {54: "1.3"}
    features = (ns.VCARD,)
    account_features = (ns.VCARD,)
    tables = (vcard,)

    async def start(self) -> None:
        self.storage.loader.define(KIND, _fetch)
        self.storage.batcher.define(KIND, _write, size=lambda change: 256 + len(change.xml or b""))

    async def stop(self) -> None:
        self.storage.loader.undefine(KIND)
        self.storage.batcher.undefine(KIND)

    @iq("get", ns.VCARD, "vCard")
    async def get(self, request: IqRequest) -> bytes:
        """The vCard as it was stored; no vCard and no account look alike to others (XEP-0054 section 7)."""
        user = request.target
        found: bytes | None = await self.storage.loader.get(KIND, (user.domain, user.local))
        if found is not None:
            return found
        if request.is_own:
            return _EMPTY
        raise StanzaError("service-unavailable")

    @iq("set", ns.VCARD, "vCard")
    async def set(self, request: IqRequest) -> None:
        """Replace one's own vCard."""
        if not request.is_own:
            raise StanzaError("forbidden", "a vCard belongs to its user")
        await self._store(request.target, serialize(request.payload))

    async def _store(self, user: JID, xml: bytes) -> None:
        if len(xml) > self.config.max_size:
            raise StanzaError("policy-violation", f"a vCard may have at most {self.config.max_size} bytes")
        await self.storage.batcher.submit(KIND, Change((user.domain, user.local), xml, self.clock()))

    @hook(UserExporting)
    async def write_out(self, event: UserExporting) -> None:
        found: bytes | None = await self.storage.loader.get(KIND, (event.user.domain, event.user.local))
        if found is not None:
            event.parts.append(found)

    @hook(UserImporting)
    async def take_up(self, event: UserImporting) -> Handled | None:
        if event.element.tag != f"{{{ns.VCARD}}}vCard":
            return None
        await self._store(event.user, serialize(event.element))
        event.count = 1
        return HANDLED

    @hook(UserDeleted)
    async def forget(self, event: UserDeleted) -> None:
        await self.storage.batcher.submit(KIND, Change((event.user.domain, event.user.local), None, self.clock()))


async def _write(connection: "AsyncConnection", changes: list[Change]) -> list[None]:
    await write_per_user(
        connection,
        vcard,
        [
            (change.user, None if change.xml is None else {"xml": change.xml, "updated_at": change.at})
            for change in changes
        ],
    )
    return [None] * len(changes)


async def _fetch(connection: "AsyncConnection", users: list[User]) -> dict[User, bytes]:
    return {user: row.xml for user, row in (await read_per_user(connection, vcard, users)).items()}
