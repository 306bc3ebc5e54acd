"""Router, local router and session manager in memory: real hooks and tables, small sessions and accounts."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from xmppd.cluster.tables import Owner, Route, RouteTable, SessionRow, SessionTable
from xmppd.delivery import SAFE, Gate, Outcome, Pending, Settled
from xmppd.events import HANDLED, Handled, MessageUndeliverable
from xmppd.hooks import Hooks
from xmppd.iq import IqDispatcher, IqHandlers
from xmppd.local_router import LocalRouter
from xmppd.protocol.jid import JID, parse
from xmppd.protocol.stanza import Stanza, build
from xmppd.router import Router
from xmppd.s2s_manager import S2SManager
from xmppd.session_manager import SessionInfo, SessionManager

HOST = "localhost"
OWNER = Owner(bytes(16), 0, 1)


class FakeSession:
    """Remembers what is delivered to it; its outcome is what a test says."""

    anonymous = False
    awaits_older = False

    def __init__(self, jid: str, outcome: Outcome = SAFE) -> None:
        self.jid = parse(jid)
        self.received: list[Stanza] = []
        self.outcome = outcome
        self.was_replaced = False
        self.kicked: tuple[str, str] | None = None

    def deliver(self, stanza: Stanza) -> Outcome:
        self.received.append(stanza)
        return self.outcome

    def replaced(self) -> None:
        self.was_replaced = True

    def kick(self, reason: str, condition: str) -> None:
        self.kicked = (reason, condition)

    def info(self) -> SessionInfo:
        return SessionInfo(self.jid.local, self.jid.domain, self.jid.resource, "c2s", "", 0, None, "", 0, "", "")


class FakeAccounts:
    """Accounts; those that are not `remembered` have to be asked for, as from a database."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.remembered = False
        self.asked: list[str] = []
        self.failure: Exception | None = None
        self.gate: asyncio.Event | None = None

    def known(self, host: str, username: str) -> bool:
        return self.remembered and username in self.names

    async def exists(self, host: str, username: str) -> bool:
        self.asked.append(username)
        if self.gate is not None:
            await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        return host == HOST and username in self.names


class Node:
    """The four managers with nothing around them. The sender is romeo@localhost/orchard."""

    def __init__(self, *, strict: bool = False) -> None:
        self.hooks = Hooks()
        self.iqs = IqHandlers()
        self.accounts = FakeAccounts()
        self.table = SessionTable()
        self.routes = RouteTable()
        self.tasks: list[asyncio.Task[None]] = []
        self.stored: list[Stanza] = []
        self.router = Router(self.routes, self.hooks, self.spawn)
        self.s2s = S2SManager(self.router.bounce)
        self.router.connect(self.s2s)
        gate = Gate(self.hooks, self.spawn, self.router.bounce)
        dispatcher = IqDispatcher(self.iqs, send=self.router.route, bounce=self.router.bounce, gate=gate)
        self.manager = SessionManager(
            table=self.table,
            owner=OWNER,
            accounts=self.accounts,
            hooks=self.hooks,
            iqs=dispatcher,
            bounce=self.router.bounce,
            spawn=self.spawn,
            strict=strict,
        )
        self.routes.insert(Route(HOST, OWNER, LocalRouter(self.manager, dispatcher, gate).route))
        self.romeo = self.bind("romeo@localhost/orchard", 0)[0]

    def spawn(self, coroutine: Coroutine[Any, Any, None], *, name: str) -> object:
        task = asyncio.get_running_loop().create_task(coroutine, name=name)
        self.tasks.append(task)
        return task

    def bind(self, jid: str, priority: int | None = None, outcome: Outcome = SAFE) -> tuple[FakeSession, SessionRow]:
        """A session of an account, which exists from then on."""
        session = FakeSession(jid, outcome)
        self.accounts.names.add(session.jid.local)
        row = self.manager.open(session)
        self.manager.set_priority(row, priority)
        return session, row

    def keep_for_absent(self) -> None:
        """Be the offline storage."""

        def keep(event: MessageUndeliverable) -> Handled:
            self.stored.append(event.message)
            event.outcome.follow(SAFE)
            return HANDLED

        self.hooks.add("offline", MessageUndeliverable, keep)

    def send(self, kind: str, to: str, inner: bytes = b"", **attributes: str) -> Outcome:
        """Route a stanza of romeo's."""
        values = {"from": self.romeo.jid.full, "to": to, "id": "s1", **attributes}
        return self.router.route(build(kind, values, inner))

    async def settle(self, outcome: Outcome) -> Settled:
        """The outcome, once everything that waits has run."""
        while self.tasks:
            tasks, self.tasks = self.tasks, []
            await asyncio.gather(*tasks)
        if isinstance(outcome, Pending):
            assert outcome.result is not None, "nobody settled it"
            return outcome.result
        return outcome

    def error(self) -> str | None:
        """The condition of the one error that romeo got."""
        errors = [stanza for stanza in self.romeo.received if stanza.type == "error"]
        assert len(errors) <= 1
        return condition(errors[0]) if errors else None


def condition(stanza: Stanza) -> str:
    """The condition of an error stanza."""
    error = stanza.child("jabber:client", "error")
    assert error is not None
    return str(error[0].tag).rpartition("}")[2]


def address(to: str, user: str = "juliet") -> str:
    """A vector's `to` as an address."""
    if to == "bare":
        return f"{user}@{HOST}"
    if to.startswith("full:"):
        return f"{user}@{HOST}/{to[5:]}"
    if to == "domain":
        return HOST
    return to.replace("domain/", f"{HOST}/")


def jid(text: str) -> JID:
    return parse(text)
