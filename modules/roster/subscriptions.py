"""Subscription stanzas (RFC 6121 3): what the server does when one is sent or arrives.

The order is the RFC's. Everything up to the roster push happens in the user's turn, so that two stanzas are told in the
order in which they changed the roster; waiting for others does not.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Final, Protocol

from xmppd.errors import StanzaError
from xmppd.module_api import Outcome, Pending, Session
from xmppd.protocol.jid import JID, bare, parse
from xmppd.protocol.stanza import Stanza, build

from .items import Item, state_of
from .moves import auto_reply, farewells, goes_out
from .store import Change

_REQUEST_SIZE: Final = 8 << 10  # bytes of a kept request; of a longer one the plain request is kept


class Desk(Protocol):
    """The module, as far as it is needed here."""

    def turn(self, user: JID) -> asyncio.Lock: ...

    def sessions_of(self, user: JID) -> "list[Session]": ...

    def interested(self, session: Session) -> bool: ...

    async def write(self, user: JID, change: Awaitable[Change]) -> Change: ...

    async def exists(self, user: JID) -> bool: ...

    def push(self, user: JID, change: Change) -> None: ...

    def elsewhere(self, user: JID) -> bool:
        """Whether the user has sessions on other nodes."""
        ...

    def tell_others(self, topic: str, user: JID, what: str) -> None:
        """Tell the other nodes with sessions of the user."""
        ...

    async def heard(self) -> None:
        """Wait until the other nodes have heard of all that happened here."""
        ...

    def sees_user(self, user: JID, contact: JID) -> bool: ...


Move = Callable[[JID, JID, str, bytes | None], Awaitable[Change]]


class Subscriptions:
    """The flows. `move` makes the move in the database, `route` sends a stanza on its way."""

    def __init__(self, desk: Desk, move: Move, route: Callable[[Stanza], Outcome]) -> None:
        self._desk = desk
        self._move = move
        self._route = route

    async def send(self, user: JID, stanza: Stanza) -> None:
        """A client of the user sent one (RFC 6121 3.1.2, 3.1.5, 3.2.2, 3.3.2); from and to are bare."""
        contact = bare(_address(stanza.to))
        if contact == user:
            raise StanzaError("not-allowed", "nobody subscribes to the own presence")
        async with self._desk.turn(user):
            change = await self._desk.write(user, self._move(user, contact, stanza.type, None))
            if not goes_out(state_of(change.before), stanza.type):
                return
            if change.ends_presence:
                self.end_presence(user, contact)
            outcome = self._route(stanza)
            if change.changed:
                self._desk.push(user, change)
        # Its own stanzas come behind this one, and so does the presence that follows an approval.
        await decided(outcome)
        if stanza.type == "subscribed":
            await self.show_presence(user, contact)

    async def receive(self, user: JID, stanza: Stanza) -> None:
        """One arrived for the user (RFC 6121 3.1.3, 3.1.6, 3.2.3, 3.3.3). Nothing happens for an unknown account."""
        contact = bare(_address(stanza.from_))
        if contact == user:
            return
        if stanza.from_ != contact:
            stanza = stanza.replace(from_=contact.full)
        async with self._desk.turn(user):
            if not await self._desk.exists(user):
                return
            kept = stanza.xml if len(stanza.xml) <= _REQUEST_SIZE else request_of(contact, user).xml
            change = await self._desk.write(user, self._move(user, contact, stanza.type, kept))
            if change.changed:
                self._deliver(user, stanza)
                self._desk.push(user, change)
                if change.ends_presence:
                    self.end_presence(user, contact)
            reply = auto_reply(state_of(change.before), stanza.type)
            if reply is None:
                return
            outcome = self._route(_say(reply, user, contact))
        await decided(outcome)
        if reply == "subscribed":
            await self.show_presence(user, contact)

    def part(self, user: JID, item: Item) -> list[Outcome]:
        """The item was removed: tell the contact (RFC 6121 2.5.2)."""
        contact = item.jid
        if item.sees_user:
            self.end_presence(user, contact)
        return [self._route(_say(kind, user, contact)) for kind in farewells(item.state)]

    async def show_presence(self, user: JID, contact: JID) -> None:
        """Every available resource to a contact that may see the user now."""
        self.show_here(user, contact)
        if self._desk.elsewhere(user):
            await self._desk.heard()  # the contact's client first hears that it may
            self._desk.tell_others("show", user, contact.full)

    def show_here(self, user: JID, contact: JID) -> None:
        """Those on this node."""
        if self._desk.sees_user(user, contact):
            for session in self._available(user):
                if session.presence is not None:
                    self._route(session.presence.addressed(contact))

    def end_presence(self, user: JID, contact: JID) -> None:
        """Every available resource is unavailable for a contact."""
        self._desk.tell_others("hide", user, contact.full)
        self.hide_here(user, contact)

    def hide_here(self, user: JID, contact: JID) -> None:
        """Those on this node."""
        for session in self._available(user):
            self._route(build("presence", {"from": session.jid.full, "to": contact.full, "type": "unavailable"}))

    def _deliver(self, user: JID, stanza: Stanza) -> None:
        """To the user's resources on all nodes; the push comes behind it."""
        self._desk.tell_others("deliver", user, stanza.xml.decode())
        self.deliver_here(user, stanza)

    def deliver_here(self, user: JID, stanza: Stanza) -> None:
        """A request goes to the available resources (RFC 6121 3.1.3); the rest also to those who asked for the
        roster."""
        for session in self._desk.sessions_of(user):
            if session.priority is not None or (stanza.type != "subscribe" and self._desk.interested(session)):
                session.send(stanza.replace(to=session.jid.full))

    def _available(self, user: JID) -> Iterator[Session]:
        return (session for session in self._desk.sessions_of(user) if session.priority is not None)


async def decided(outcome: Outcome) -> None:
    """Wait until it is settled where a stanza goes: what is sent behind it stays behind it."""
    if not isinstance(outcome, Pending) or outcome.decided:
        return
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    outcome.when_decided(lambda: None if done.done() else done.set_result(None))
    await done


def request_of(contact: JID, user: JID) -> Stanza:
    """A plain subscription request."""
    return _say("subscribe", contact, user)


def kept_request(request: bytes | None, contact: str, user: JID) -> Stanza:
    """A request as it was kept, or a plain one where it was not (an import)."""
    if request:
        try:
            return Stanza.from_bytes(request)
        except ValueError:
            pass
    return request_of(parse(contact), user)


def _say(kind: str, sender: JID, to: JID) -> Stanza:
    return build("presence", {"from": sender.bare, "to": to.bare, "type": kind})


def _address(jid: JID | None) -> JID:
    if jid is None:
        raise StanzaError("bad-request", "a subscription stanza has a sender and a recipient")
    return jid
