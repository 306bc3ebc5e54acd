"""Private XML storage (XEP-0049): clients keep their settings and bookmarks on the server."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Final

from lxml import etree
from lxml.etree import QName, _Element
from sqlalchemy import Column, and_, delete, select

from xmppd.errors import StanzaError
from xmppd.events import HANDLED, Handled, UserDeleted, UserExporting, UserImporting
from xmppd.module_api import (
    IqRequest,
    Module,
    Size,
    User,
    between,
    by_host,
    fixed_bytes,
    hook,
    host_column,
    iq,
    key_hash,
    long_bytes,
    long_text,
    module_table,
    sized,
    upsert,
    user_column,
)
from xmppd.protocol import ns
from xmppd.protocol.jid import JID
from xmppd.protocol.stanza import serialize

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

KIND: Final = "private xml"
AT_ONCE: Final = 50  # elements in one request
NAME_LENGTH: Final = 1024  # characters of a namespace or an element's name

private_xml = module_table(
    "private_xml",
    host_column(primary_key=True),
    user_column(primary_key=True),
    Column("namespace_hash", fixed_bytes(32), primary_key=True),  # of element and namespace, which may be long
    Column("namespace", long_text(), nullable=False),
    Column("element", long_text(), nullable=False),
    Column("xml", long_bytes(), nullable=False),
)


@dataclass(frozen=True, slots=True)
class Config:
    max_elements: Annotated[int, between(1, 100_000)] = 200  # per user
    max_size: Annotated[Size, sized(1024, 8 << 20)] = 64 * 1024  # bytes of one element


@dataclass(frozen=True, slots=True)
class Part:
    """One element; `xml` b"": nothing is to be kept under that name."""

    namespace: str
    element: str
    xml: bytes

    @property
    def key(self) -> bytes:
        return key_hash(f"{self.element}\n{self.namespace}")


@dataclass(frozen=True, slots=True)
class Change:
    """What one request stores; `parts` None: everything of that user is removed."""

    user: User
    parts: tuple[Part, ...] | None
    limit: int = 0  # elements the user may have


class Private(Module[Config]):
    xeps = {49: "1.2"}
    features = (ns.PRIVATE,)
    account_features = (ns.PRIVATE,)
    tables = (private_xml,)

    async def start(self) -> None:
        self.storage.loader.define(KIND, _fetch)
        self.storage.batcher.define(KIND, _write, size=_size)

    async def stop(self) -> None:
        self.storage.loader.undefine(KIND)
        self.storage.batcher.undefine(KIND)

    @iq("get", ns.PRIVATE, "query")
    async def get(self, request: IqRequest) -> bytes:
        """Each element asked for as it was stored, or as the client sent it when there is none."""
        answers = []
        for part in self._parts(request):
            key = (*_user(request.target), part.key)
            stored: bytes | None = await self.storage.loader.get(KIND, key)
            answers.append(stored or part.xml)
        return f'<query xmlns="{ns.PRIVATE}">'.encode() + b"".join(answers) + b"</query>"

    @iq("set", ns.PRIVATE, "query")
    async def set(self, request: IqRequest) -> None:
        """All elements of the request, or none of them."""
        parts = tuple(
            Part(part.namespace, part.element, b"" if _is_empty(element) else part.xml)
            for part, element in zip(self._parts(request), request.payload.iterchildren(etree.Element), strict=True)
        )
        change = Change(_user(request.target), parts, self.config.max_elements)
        await self.storage.batcher.submit(KIND, change)

    def _parts(self, request: IqRequest) -> list[Part]:
        if not request.is_own:
            raise StanzaError("forbidden", "private data belong to their user")
        parts = [self._part(element) for element in request.payload.iterchildren(etree.Element)]
        if not parts:
            raise StanzaError("bad-request", "which element?")
        if len(parts) > AT_ONCE:
            raise StanzaError("policy-violation", f"at most {AT_ONCE} elements at once")
        return parts

    def _part(self, element: _Element) -> Part:
        name = QName(element)
        if not name.namespace or name.namespace == ns.PRIVATE:
            raise StanzaError("not-acceptable", "an element needs a namespace of its own")
        if len(name.namespace) > NAME_LENGTH or len(name.localname) > NAME_LENGTH:
            raise StanzaError("policy-violation", f"a name may have at most {NAME_LENGTH} characters")
        xml = serialize(element)
        if len(xml) > self.config.max_size:
            raise StanzaError("policy-violation", f"an element may have at most {self.config.max_size} bytes")
        return Part(name.namespace, name.localname, xml)

    # -- moving between servers

    @hook(UserExporting)
    async def write_out(self, event: UserExporting) -> None:
        columns = private_xml.c
        host, name = _user(event.user)
        query = select(columns.xml).where(columns.server_host == host, columns.username == name)
        query = query.order_by(columns.namespace_hash)

        async def work(connection: "AsyncConnection") -> list[bytes]:
            return list((await connection.execute(query)).scalars())

        if found := await self.storage.read(work):
            event.parts.append(f'<query xmlns="{ns.PRIVATE}">'.encode() + b"".join(found) + b"</query>")

    @hook(UserImporting)
    async def take_up(self, event: UserImporting) -> Handled | None:
        if event.element.tag != f"{{{ns.PRIVATE}}}query":
            return None
        parts = []
        for element in event.element.iterchildren(etree.Element):
            try:
                parts.append(self._part(element))
            except StanzaError as error:
                event.problems.append(f"private element left out: {error.text}")
        if parts:
            await self.storage.batcher.submit(KIND, Change(_user(event.user), tuple(parts), self.config.max_elements))
        event.count = len(parts)
        return HANDLED

    @hook(UserDeleted)
    async def forget(self, event: UserDeleted) -> None:
        await self.storage.batcher.submit(KIND, Change(_user(event.user), None))


def _user(jid: JID) -> User:
    return jid.domain, jid.local


def _is_empty(element: _Element) -> bool:
    return not len(element) and not element.attrib and not (element.text or "").strip()


def _size(change: Change) -> int:
    return 256 + sum(256 + len(part.xml) for part in change.parts or ())


async def _write(connection: "AsyncConnection", changes: list[Change]) -> list[StanzaError | None]:
    """In the order of the requests, each whole or not at all."""
    keys = await _existing(connection, {change.user for change in changes if change.parts})
    return [await _apply(connection, change, keys.setdefault(change.user, set())) for change in changes]


async def _apply(connection: "AsyncConnection", change: Change, keys: set[bytes]) -> StanzaError | None:
    host, name = change.user
    mine = and_(private_xml.c.server_host == host, private_xml.c.username == name)
    if change.parts is None:
        await connection.execute(delete(private_xml).where(mine))
        keys.clear()
        return None
    full = {part.key: part for part in change.parts if part.xml}
    empty = {part.key for part in change.parts if not part.xml} - full.keys()
    after = (keys - empty) | full.keys()
    if len(after) > change.limit and len(after) > len(keys):
        return StanzaError("resource-constraint", f"at most {change.limit} elements are kept for a user")
    if full:
        rows = [
            {
                "server_host": host,
                "username": name,
                "namespace_hash": key,
                "namespace": part.namespace,
                "element": part.element,
                "xml": part.xml,
            }
            for key, part in full.items()
        ]
        await connection.execute(upsert(private_xml, connection.dialect), rows)
    if empty:
        await connection.execute(delete(private_xml).where(mine, private_xml.c.namespace_hash.in_(empty)))
    keys.clear()
    keys.update(after)
    return None


async def _existing(connection: "AsyncConnection", users: set[User]) -> dict[User, set[bytes]]:
    found: dict[User, set[bytes]] = {user: set() for user in users}
    columns = private_xml.c
    for host, names in by_host(sorted(users)).items():
        query = select(columns.username, columns.namespace_hash).where(
            columns.server_host == host, columns.username.in_(names)
        )
        for row in await connection.execute(query):
            found[host, row.username].add(row.namespace_hash)
    return found


async def _fetch(
    connection: "AsyncConnection", keys: list[tuple[str, str, bytes]]
) -> dict[tuple[str, str, bytes], bytes]:
    """By host, user and the hash of the name: the users' rows with any of the hashes, of which there are few more."""
    per_host: dict[str, tuple[set[str], set[bytes]]] = {}
    for host, name, key in keys:
        names, hashes = per_host.setdefault(host, (set(), set()))
        names.add(name)
        hashes.add(key)
    columns = private_xml.c
    found = {}
    wanted = set(keys)
    for host, (names, hashes) in per_host.items():
        query = select(columns.username, columns.namespace_hash, columns.xml).where(
            columns.server_host == host, columns.username.in_(names), columns.namespace_hash.in_(hashes)
        )
        for row in await connection.execute(query):
            if (host, row.username, row.namespace_hash) in wanted:
                found[host, row.username, row.namespace_hash] = row.xml
    return found
