"""A node without sockets: real hooks, routing, sessions, modules and storage; only the connections are doubles."""

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Self

from lxml.etree import _Element

from xmppd.access import Access, AccessRules
from xmppd.admin.registry import Caller, Registry
from xmppd.c2s.session import Parts, Session
from xmppd.c2s.spooling import Spooling
from xmppd.cluster.interfaces import Calls, Links
from xmppd.cluster.tables import Owner, Route, RouteTable, SessionTable
from xmppd.config import parse as parse_config
from xmppd.config.loader import validate_dataclass
from xmppd.delivery import SAFE, Gate, Outcome, Pending, Settled
from xmppd.errors import StreamError
from xmppd.events import UserDeleted, UserRegistered
from xmppd.forward import Forwarder
from xmppd.hooks import Hooks
from xmppd.iq import IqDispatcher, IqHandlers
from xmppd.local_router import LocalRouter
from xmppd.log import get_logger
from xmppd.module_api import Contact, Context, RosterService
from xmppd.module_loader import ModuleLoader
from xmppd.nodes import NodeHandlers, Nodes
from xmppd.outbox import Outbox, Retry, Settings
from xmppd.protocol.jid import JID, parse
from xmppd.protocol.sasl import prep_password, prep_username
from xmppd.protocol.stanza import Stanza
from xmppd.removals import Removals
from xmppd.router import Router
from xmppd.s2s_manager import S2SManager
from xmppd.session_manager import SessionManager
from xmppd.spool import Spool
from xmppd.storage import Accounts, Storage

HOST = "capulet.example"
OWNER = Owner(bytes(range(16)), 0, 7)
OUTBOX = Settings(retry=Retry(base=0.01, jitter="none"))
_ids = itertools.count(1)


class Client:
    """The far end of a session and the connection between, in one: what was written to it is in `received`."""

    name = "c2s"
    peer = ("192.0.2.7", 5222)

    def __init__(self, world: "World", jid: str, *, anonymous: bool = False) -> None:
        self.received: list[Stanza] = []
        self.last_heard = time.monotonic()
        self.stalled = False  # takes no more bytes
        self.ended: StreamError | None = None
        self._world = world
        self.session = Session(parse(jid), self, world.parts, get_logger("c2s"), anonymous=anonymous)

    def write(self, data: bytes) -> None:
        if data:  # else what else there is to be written is asked for
            self.received.append(Stanza.from_bytes(data))

    def unsent(self) -> int:
        return 1 if self.stalled else 0

    def end(self, error: StreamError) -> None:
        self.ended = error

    async def send(self, xml: str) -> Outcome:
        """Give a stanza to the server and wait until it would take the next one."""
        outcome = self.session.receive(Stanza.from_bytes(xml.encode()))
        if isinstance(outcome, Pending):
            decided = asyncio.Event()
            outcome.when_decided(decided.set)
            await asyncio.wait_for(decided.wait(), 10)
        return outcome

    async def available(self, priority: int = 0) -> None:
        await self.send(f"<presence><priority>{priority}</priority></presence>")

    async def ask(self, type: str, inner: str, to: str | None = None) -> Stanza:
        """An IQ request and its answer."""
        id = f"q{next(_ids)}"
        address = f' to="{to}"' if to else ""
        await self.send(f'<iq type="{type}" id="{id}"{address}>{inner}</iq>')
        return await self._world.found(lambda: next((s for s in self.received if s.id == id), None))

    async def query(self, type: str, inner: str, to: str | None = None) -> _Element:
        """The payload of the result."""
        answer = await self.ask(type, inner, to)
        assert answer.type == "result", answer.xml
        assert answer.payload is not None
        return answer.payload

    async def refusal(self, type: str, inner: str, to: str | None = None) -> str:
        """The condition of the error."""
        return condition(await self.ask(type, inner, to))

    @property
    def bodies(self) -> list[str | None]:
        return [stanza.body for stanza in self.received if stanza.kind == "message" and stanza.type != "error"]

    def lose(self) -> None:
        """The connection dies."""
        self.session.close(clean=False)


class Rosters:
    """Who sees whose presence."""

    def __init__(self) -> None:
        self.items: dict[str, dict[str, Contact]] = {}

    def let_see(self, user: str, contact: str) -> None:
        self.items.setdefault(user, {})[contact] = Contact(parse(contact), "from", "none", "", ())

    def cached(self, user: JID) -> Mapping[str, Contact] | None:
        return None

    async def contacts(self, user: JID) -> Mapping[str, Contact]:
        return self.items.get(user.bare, {})


class PlainAccounts:
    """Accounts without the work of hashing passwords."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self.passwords: dict[str, str] = {}

    async def exists(self, host: str, username: str) -> bool:
        return await self._world.accounts.exists(host, username)

    async def names(self, host: str, *, limit: int, after: str | None) -> list[str]:
        return await self._world.accounts.names(host, limit=limit, after=after)

    async def register(self, host: str, username: str, password: str) -> bool:
        username = prep_username(username)
        prep_password(password)
        if not await self._world.accounts.create(host, username, {}):
            return False
        self.passwords[username] = password
        await self._world.tell(UserRegistered(parse(f"{username}@{host}")))
        return True

    async def set_password(self, host: str, username: str, password: str) -> bool:
        prep_password(password)
        self.passwords[username] = password
        return True

    async def remove(self, host: str, username: str, *, removed: Callable[[], None] | None = None) -> bool:
        if not await self._world.accounts.remove(host, username):
            return False
        if removed is not None:
            removed()
        self._world.manager.kick(username, host, None, "User removed")
        await self._world.tell(UserDeleted(parse(f"{username}@{host}")))
        return True


@dataclass(frozen=True, slots=True)
class Place:
    """What a node of a cluster has that one alone has not."""

    name: str
    owner: Owner
    links: Links
    calls: Calls


class World:
    """`place`: one node of several; else it is alone."""

    def __init__(self, storage: Storage, place: Place | None = None, *, strict: bool = False) -> None:
        self.storage = storage
        self.advanced = 0.0
        self.hooks = Hooks()
        self.iqs = IqHandlers()
        self.registry = Registry()
        self.access = Access(AccessRules(parse_config({}, source="xmppd.yml")))
        self.rosters = Rosters()
        self.accounts = Accounts(storage)
        self.accountant = PlainAccounts(self)
        self.spool = Spool(storage, clock=self.clock)
        self.owner = place.owner if place else OWNER
        self.place = place
        self.node_handlers = NodeHandlers()
        self.table = SessionTable()
        self.tasks: set[asyncio.Task[None]] = set()
        self.with_records: list[Session] = []
        self.outbox = Outbox(storage, self.owner.member, self.owner.incarnation, settings=OUTBOX, clock=self.clock)
        self.node = place.name if place else "xmppd@test"
        self.version, self.hosts, self.started_at = "1.2.3", (HOST,), self.clock() - 100
        routes = self.routes = RouteTable()
        self.router = Router(routes, self.hooks, self.spawn)
        self.router.connect(S2SManager(self.router.bounce))
        gate = Gate(self.hooks, self.spawn, self.router.bounce)
        dispatcher = IqDispatcher(self.iqs, send=self.router.route, bounce=self.router.bounce, gate=gate)
        self.manager = SessionManager(
            table=self.table,
            owner=self.owner,
            accounts=self.accounts,
            hooks=self.hooks,
            iqs=dispatcher,
            bounce=self.router.bounce,
            spawn=self.spawn,
            strict=strict,
        )
        if place is not None:
            self.forwarder = Forwarder(place.links, place.calls, self.manager, bounce=self.router.bounce)
            self.manager.connect(self.forwarder)
            self.node_handlers.connect(place.calls, self.spawn)
            Removals(place.calls, self.accounts, self.hooks, self.spawn)
        routes.insert(Route(HOST, self.owner, LocalRouter(self.manager, dispatcher, gate).route))
        sweeper: Any = SimpleNamespace(add=self.with_records.append)
        rows = Spooling(self.spool, self.hooks, self.owner, reroute=self.manager.reroute)
        self.manager.freeing = rows.freeing
        self.router.on_kept(rows.give_back)
        self.parts = Parts(
            place.name if place else "xmppd@test", self.router, self.manager, self.hooks, gate, self.spawn, sweeper
        )
        self.loader = ModuleLoader(
            hooks=self.hooks,
            iqs=self.iqs,
            registry=self.registry,
            context=self._context,
            validate=validate_dataclass,
            access=self.access,
            nodes=self.node_handlers,
        )

    # -- what modules may know of the server

    features = property(lambda self: self.loader.features)
    account_features = property(lambda self: self.loader.account_features)
    loaded = property(lambda self: self.loader.loaded)

    def clock(self) -> float:
        return time.time() + self.advanced

    def service(self, protocol: type) -> Any:
        return self.rosters if protocol is RosterService else self.loader.service(protocol)

    def _context(self, name: str) -> Context:
        return Context(
            name=name,
            owner=self.owner,
            storage=self.storage,
            spool=self.spool,
            sessions=self.manager,  # type: ignore[arg-type]
            accounts=self.accountant,
            access=self.access,
            server=self,  # type: ignore[arg-type]
            log=get_logger(f"modules.{name}"),
            clock=self.clock,
            route=self.router.route,
            spawn=self.spawn,
            service=self.service,
            nodes=Nodes(name, self.place.links, self.place.calls, self.manager.nodes_of) if self.place else Nodes(name),
            outbox=self.outbox,
        )

    # -- for tests

    async def load(self, **modules: Mapping[str, Any]) -> None:
        """Start modules with these options."""
        await self.loader.start(modules)

    async def account(self, *names: str) -> None:
        for name in names:
            assert await self.accountant.register(HOST, name, "secret")

    def login(self, name: str, resource: str = "balcony", *, anonymous: bool = False) -> Client:
        """A session that has sent no presence."""
        return Client(self, f"{name}@{HOST}/{resource}", anonymous=anonymous)

    async def online(self, name: str, resource: str = "balcony", priority: int = 0) -> Client:
        client = self.login(name, resource)
        await client.available(priority)
        return client

    def sweep(self) -> None:
        """What a second of a living connection does, twice."""
        for _ in range(2):
            sessions, self.with_records[:] = self.with_records[:], []
            self.with_records += [session for session in sessions if session.sweep()]

    async def until(self, condition: Callable[[], object]) -> None:
        """Let things happen until the condition holds; fails after ten seconds."""
        give_up = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < give_up, "it did not happen"
            await asyncio.sleep(0.002)

    async def until_true(self, ask: Callable[[], Awaitable[bool]]) -> None:
        give_up = time.monotonic() + 10
        while not await ask():
            assert time.monotonic() < give_up, "it did not happen"
            await asyncio.sleep(0.002)

    async def found(self, look: Callable[[], Any]) -> Any:
        await self.until(look)
        return look()

    async def settled(self, outcome: Outcome) -> Settled:
        if isinstance(outcome, Settled):
            return outcome
        await self.until(lambda: outcome.result is not None)
        assert outcome.result is not None
        return outcome.result

    async def stored(self, outcome: Outcome) -> None:
        """Wait for a message's outcome, which must be that it is safe."""
        assert await self.settled(outcome) is SAFE

    async def rows(self, name: str = "juliet") -> list[tuple[bytes | None, bytes]]:
        """All rows of the spool for a user, (holder, stanza), in order."""

        async def work(connection: Any) -> Any:
            columns = "holder_member, stanza"
            sql = f"SELECT {columns} FROM spool WHERE username = '{name}' ORDER BY id"
            return [tuple(row) for row in (await connection.exec_driver_sql(sql)).all()]

        return await self.storage.read(work)

    async def command(self, name: str, *args: str) -> Any:
        return (await self.registry.call(name, args, caller=Caller("test", "test"))).value

    async def tell(self, event: object) -> None:
        waiting = self.hooks.notify(event)
        if waiting is not None:
            await waiting

    def spawn(self, coroutine: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(coroutine, name=name)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self.loader.stop()
        await self.outbox.stop()
        for task in list(self.tasks):
            task.cancel()
        if self.tasks:
            await asyncio.wait(list(self.tasks))


def condition(stanza: Stanza) -> str:
    """The condition of an error stanza."""
    assert stanza.type == "error", stanza.xml
    error = stanza.element.find("{jabber:client}error")
    assert error is not None
    return str(error[0].tag).partition("}")[2]


def message(
    to: str, body: str | None = "O, speak again", id: str | None = "m", inner: str = "", type: str = "chat"
) -> str:
    """A message as a client writes it."""
    ident = f" id='{id}'" if id else ""
    text = "" if body is None else f"<body>{body}</body>"
    return f"<message type='{type}' to='{to}'{ident}>{text}{inner}</message>"
