"""A world with rosters and presence: users who know each other, and a record of what goes to other servers."""

import asyncio
from types import SimpleNamespace
from typing import Any

from tests.modules.world import HOST, Client, Place, World
from xmppd.cluster.tables import Route
from xmppd.delivery import SAFE, Outcome
from xmppd.protocol.stanza import Stanza

JULIET, ROMEO, NURSE = f"juliet@{HOST}", f"romeo@{HOST}", f"nurse@{HOST}"
FAR = "mercutio@montague.example"
QUERY = "<query xmlns='jabber:iq:roster'/>"
ITEM = "{jabber:iq:roster}item"


class Friends(World):
    """Modules find each other; `sent_away` has what was routed to other domains."""

    def __init__(self, storage: Any, place: Place | None = None, *, strict: bool = False) -> None:
        super().__init__(storage, place, strict=strict)
        self.sent_away: list[Stanza] = []
        self.routing = SimpleNamespace(profile="compat", iq_needs_presence=False, presence_coalesce=60.0)
        self.router.connect(self)

    def route(self, stanza: Stanza) -> Outcome:
        """As the s2s manager."""
        self.sent_away.append(stanza)
        return SAFE

    def serve(self, host: str) -> None:
        """Route one more host to its users."""
        routes = self.router._routes
        routes.insert(Route(host, self.owner, routes.local(HOST)))

    def login_as(self, jid: str) -> Client:
        return Client(self, jid)

    def service(self, protocol: type) -> Any:
        return self.loader.service(protocol)

    async def begin(self, **roster: Any) -> None:
        """The modules, and three accounts."""
        await self.load(roster=roster, presence={})
        await self.account("juliet", "romeo", "nurse")

    async def enter(self, name: str, resource: str = "balcony", *, interested: bool = True) -> Client:
        """A session that has asked for its roster, if it is interested, and sent no presence."""
        client = self.login(name, resource)
        waiting = client.session.bound()
        if waiting is not None:
            await waiting
        if interested:
            await client.query("get", QUERY)
            client.received.clear()
        return client

    async def come(self, name: str, resource: str = "balcony", priority: int = 0) -> Client:
        """A session that is interested and available; what it was sent for that is forgotten."""
        client = await self.enter(name, resource)
        await client.available(priority)
        await self.quiet()
        client.received.clear()
        return client

    async def befriend(self, user: str, contact: str, subscription: str = "both") -> None:
        """Both rosters, by the operator's hand."""
        mirrored = {"both": "both", "to": "from", "from": "to", "none": "none"}[subscription]
        for one, other, subs in ((user, contact, subscription), (contact, user, mirrored)):
            await self.command("add_rosteritem", one, HOST, other, HOST, "", "", subs)

    async def quiet(self) -> None:
        """Until no stanza is on its way."""
        while self.tasks:
            await asyncio.wait(list(self.tasks))

    async def deliver(self, xml: str) -> None:
        """A stanza from another server arrives."""
        self.router.route(Stanza.from_bytes(xml.encode()))
        await self.quiet()

    async def roster(self, name: str) -> dict[str, tuple[str, str]]:
        """(subscription, ask) as the database has them, of all who are in the roster or ask."""

        async def work(connection: Any) -> Any:
            sql = f"SELECT jid, subscription, ask FROM roster_item WHERE username = '{name}'"
            rows = (await connection.exec_driver_sql(sql)).all()
            return {text(jid): (text(subscription), text(ask or "none")) for jid, subscription, ask in rows}

        found: dict[str, tuple[str, str]] = await self.storage.read(work)
        return found


def text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def pushes(client: Client) -> list[dict[str, str]]:
    """The items of the roster pushes a client got, in order."""
    found = []
    for stanza in client.received:
        if stanza.kind == "iq" and stanza.type == "set":
            assert stanza.payload is not None
            found.append({name: str(value) for name, value in stanza.payload[0].attrib.items()})
    return found


def presences(client: Client, *types: str) -> list[tuple[str, str]]:
    """(from, type) of the presences a client got, in order."""
    return [
        (stanza.from_.full, stanza.type)
        for stanza in client.received
        if stanza.kind == "presence" and stanza.from_ and (not types or stanza.type in types)
    ]


def story(client: Client) -> list[str]:
    """What a client got, in order: the types of presences, and `push`."""
    return ["push" if stanza.kind == "iq" else stanza.type for stanza in client.received]
