"""Presence (RFC 6121 4; requirements 3.6): who is told that a user is there, and answers to those who ask.

Nothing is broadcast before it is true: own presence goes out when the session's row has changed (PresenceChanged,
SessionBecameUnavailable). Somebody who becomes available at the same moment then either finds the new presence or is
told of it, never neither.
"""

import asyncio
import time
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from xmppd.errors import StanzaError, StorageError, StorageUnavailable
from xmppd.events import (
    HANDLED,
    AddressesBlocked,
    AddressesUnblocked,
    ConfigReloaded,
    DirectedPresenceArrived,
    DirectedPresenceSending,
    Handled,
    NodeSynced,
    PresenceBounced,
    PresenceChanged,
    PresenceSending,
    ProbeReceiving,
    SessionArrived,
    SessionBecameUnavailable,
    SessionClosed,
    SessionLeft,
    SessionsLost,
    StanzaDelivering,
    UserDeleted,
    UserForgotten,
)
from xmppd.module_api import (
    BlockingService,
    Blocklist,
    Contact,
    Context,
    Module,
    RosterService,
    Session,
    from_node,
    hook,
)
from xmppd.protocol.jid import JID, bare, parse
from xmppd.protocol.stanza import Stanza, build

from .blocked import NOBODY, Blocks, touched
from .content import delayed, digest
from .elsewhere import Asked, Elsewhere
from .fanout import PIECE, Fanout
from .last import LastKnown
from .losses import CAME, Losses
from .renewal import SEEN, Renewal

_STATE: Final = "presence"  # in a session's state: a plain dict, which outlives a reload of this file
_RETRY: Final = 5.0  # seconds between two looks for a database that is away
_LAST_WAIT: Final = 2.0  # seconds for other nodes to say what they know of an absent user


@dataclass(frozen=True, slots=True)
class Config:
    max_directed: int = 1000  # addresses one session may send directed presence to, rooms among them


class Presence(Module[Config]):
    requires = ("roster",)

    def __init__(self, context: Context, config: Config) -> None:
        super().__init__(context, config)
        self._fanout = Fanout(self.sessions.multicast, self.route, self._is_near, self.spawn)
        self._blocks = Blocks(lambda: self.service(BlockingService))  # type: ignore[type-abstract]
        self._last = LastKnown(self.clock)
        self._elsewhere = Elsewhere(self.nodes, self.sessions, self._is_near)
        self._losses = Losses(
            self.sessions,
            self._blocks,
            contacts=self._cached,
            later=self._contacts,
            route=self.route,
            log=self.log,
        )
        self._renewal = Renewal(self.nodes, self.sessions, show=self._show_on, know=self._know, log=self.log)

    async def start(self) -> None:
        self.switch(StanzaDelivering, self.server.routing.iq_needs_presence)

    async def stop(self) -> None:
        self._losses.finish()
        self._fanout.finish()

    @hook(ConfigReloaded)
    def reloaded(self, event: ConfigReloaded) -> None:
        self.switch(StanzaDelivering, self.server.routing.iq_needs_presence)

    # -- own presence

    @hook(PresenceSending)
    def check(self, event: PresenceSending) -> PresenceSending | Handled | None:
        session, presence = event.session, event.presence
        if presence.type == "unavailable" and session.priority is None:
            self._end_directed(session, presence)  # nobody else has seen it
        elif presence.type == "available" and self._is_repeat(session, presence):
            return HANDLED
        # It may have been addressed to the own bare JID, which says the same.
        return None if presence.to is None else replace(event, presence=presence.replace(to=None))

    def _is_repeat(self, session: Session, presence: Stanza) -> bool:
        """The same within `presence_coalesce` of the last broadcast is a sign of life and nothing more."""
        state = _state(session)
        if session.presence is None or self.clock() - state["since"] >= self.server.routing.presence_coalesce:
            return False
        return bool(state["digest"] == digest(presence))

    @hook(PresenceChanged)
    async def broadcast(self, event: PresenceChanged) -> None:
        """RFC 6121 4.2.2, 4.4.2. The first one also brings the presence of others."""
        session, presence = event.session, event.presence
        state = _state(session)
        state["since"], state["digest"] = self.clock(), digest(presence)
        presence.forget_element()
        if event.previous is None:
            self._last.forget(session.user)
            state["complete"] = False
            session.state[CAME] = time.monotonic()
        try:
            await self._tell(session, presence)
        except StorageError as exc:
            self.log.warning("presence waits for the roster", user=session.user.bare, error=exc)
            self.spawn(self._tell_later(session, presence), name="presence waits for the roster")

    async def _tell(self, session: Session, presence: Stanza) -> None:
        user = session.user
        contacts = self._cached(user)
        if contacts is None:
            contacts = await self._contacts(user)
        known, blocked = contacts, await self._blocks.get(user)
        if session.presence is not presence:
            return

        first = not _state(session)["complete"]
        audience = self._audience(user, contacts, blocked)
        told = self._elsewhere.resources(audience) if first and self._elsewhere.exists else None

        def wanted(target: JID) -> bool:
            if session.presence is not presence:
                return False  # it was replaced while it went out
            cached = self._cached(user)
            item = (known if cached is None else cached).get(target.full)
            return target == user or (item is not None and item.sees_user and not self._blocks.blocks(user, target))

        sending = self._fanout.send(user, presence, audience, wanted)
        if sending is not None:
            await sending
        if told is not None:
            self.spawn(self._tell_newcomers(session, told), name="presence for newcomers")
        if not _state(session)["complete"] and session.presence is presence:
            _state(session)["complete"] = True
            await self._bring(session, contacts)

    async def _tell_newcomers(self, session: Session, told: set[JID]) -> None:
        """Somebody may have become available on another node at the same moment, so that neither knew of the other.
        When both nodes have heard all that the other had sent, each tells whom it had not told."""
        await self.nodes.barrier()
        if session.presence is None:
            return
        try:
            contacts, blocked = await self._roster_of(session.user), await self._blocks.get(session.user)
        except StorageError as exc:
            self.log.warning("presence waits for the roster", user=session.user.bare, error=exc)
            return  # both are tried again with the next presence
        newcomers = self._elsewhere.resources(self._audience(session.user, contacts, blocked)) - told
        if newcomers and session.presence is not None:
            self._fanout.send(session.user, session.presence, sorted(newcomers, key=str))

    async def _tell_later(self, session: Session, presence: Stanza) -> None:
        """The client has been told that it is available; the others hear of it when the database is back."""
        while session.presence is presence:
            await asyncio.sleep(_RETRY)
            if session.presence is presence:
                try:
                    await self._tell(session, presence)
                    return
                except StorageError:
                    pass

    async def _bring(self, session: Session, contacts: Mapping[str, Contact]) -> None:
        """The presence of the user's other resources and of the contacts (RFC 6121 4.3)."""
        asked: Asked = {}
        self._answer(session.user, session.jid)
        self._elsewhere.note(session.user, asked)
        for count, contact in enumerate(_seen(contacts), 1):
            await self._bring_one(session, contact, asked)
            if count % PIECE == 0:
                self._elsewhere.ask(session.jid, asked)
                await asyncio.sleep(0)
            if session.presence is None:
                return
        self._elsewhere.ask(session.jid, asked)

    async def _bring_one(self, session: Session, contact: JID, asked: Asked) -> None:
        """`asked` gets the contact for each other node it is on."""
        if self._blocks.blocks(session.user, contact):
            return
        if not self._is_near(contact):
            probe = {"from": session.jid.full, "to": contact.full, "type": "probe"}
            self.route(build("presence", probe))
            return
        # Our own users need no probe; of the absent ones a new resource is not told, it takes nobody for there.
        self._elsewhere.note(contact, asked)
        here = self._present(contact) and not self._blocks.blocks(contact, session.jid)
        if here and await self._may_see(contact, session.user):
            self._answer(contact, session.jid)

    # -- other nodes answer for the sessions they have

    @from_node("probe")
    def answer_node(self, node: bytes, news: list[Any]) -> Awaitable[None] | None:
        """Somebody there wants to see users who are here."""
        asker, users, only = parse(news[0]), [parse(user) for user in news[1]], news[2]
        if all(self._cached(user) is not None for user in users):
            for user in users:
                self._answer_if(user, asker, only, self._cached(user) or {})
            return None
        return self._answer_later(users, asker, only)

    async def _answer_later(self, users: list[JID], asker: JID, only: str) -> None:
        for user in users:
            try:
                self._answer_if(user, asker, only, await self._roster_of(user))
            except StorageError as exc:
                self.log.warning("presence waits for the roster", user=user.bare, error=exc)

    def _answer_if(self, user: JID, asker: JID, only: str, contacts: Mapping[str, Contact]) -> None:
        item = contacts.get(asker.bare)
        may_see = asker.bare == user.bare or (item is not None and item.sees_user)
        if may_see and self._present(user) and not self._blocks.blocks(user, asker):
            self._answer(user, asker, only)

    @from_node("last")
    def say_last(self, node: bytes, user: str) -> list[Any] | None:
        """[seconds since 1970, the presence]: the last that was heard of a user here."""
        return self._last.told(user)

    @from_node("hide")
    async def hide_too(self, node: bytes, news: list[Any]) -> None:
        await self._hide(parse(news[0]), [parse(address) for address in news[1]])

    @from_node("show")
    async def show_too(self, node: bytes, news: list[Any]) -> None:
        await self._show(parse(news[0]), [parse(address) for address in news[1]])

    @hook(SessionBecameUnavailable)
    def end(self, event: SessionBecameUnavailable) -> None:
        """RFC 6121 4.5.2. Plain, so that it comes before the session is taken apart."""
        session, presence = event.session, event.presence
        user, directed = session.user, self._take_directed(session)
        if newer := self._elsewhere.nodes_with(user, session.jid.resource):
            # Both were bound while their nodes did not see each other: the other one is who contacts see now.
            self._fanout.send(user, presence, directed)
            self.spawn(self._have_shown(session.jid, newer), name="presence of a newer session")
            return
        if all(resource.priority is None for resource in self.sessions.resources(user)):
            self._last.remember(user, presence)
        contacts, blocked = self._cached(user), self._blocks.known(user)
        if contacts is None or blocked is None:
            self.spawn(self._end_later(user, presence, directed), name="unavailable presence")
        else:
            self._end(user, presence, directed, contacts, blocked)

    async def _have_shown(self, jid: JID, nodes: set[bytes]) -> None:
        """Some may have heard of the older session after the newer one, from this node when it was back."""
        await self.nodes.barrier()
        self.nodes.cast("again", jid.full, nodes)

    @from_node("again")
    async def show_again(self, node: bytes, full: str) -> None:
        jid = parse(full)
        try:
            contacts, blocked = await self._roster_of(bare(jid)), await self._blocks.get(bare(jid))
        except StorageError as exc:
            self.log.warning("presence waits for the roster", user=jid.bare, error=exc)
            return  # they see it with its next presence
        for session in self._present(bare(jid)):
            if session.jid == jid and session.presence is not None:
                shown = _shown(session, session.presence)
                self._fanout.send(session.user, shown, self._audience(session.user, contacts, blocked))

    async def _end_later(self, user: JID, presence: Stanza, directed: list[JID]) -> None:
        contacts: Mapping[str, Contact] = {}
        blocked: Blocklist = NOBODY
        try:
            contacts, blocked = await self._contacts(user), await self._blocks.get(user)
        except (StorageError, StanzaError) as exc:
            self.log.warning("contacts are not told of the end of a session", user=user.bare, error=exc)
            contacts = {}
        self._end(user, presence, directed, contacts, blocked)

    def _end(
        self, user: JID, presence: Stanza, directed: list[JID], contacts: Mapping[str, Contact], blocked: Blocklist
    ) -> None:
        audience = self._audience(user, contacts, blocked)
        told = {target.bare for target in audience}
        others = [target for target in directed if target.bare not in told and not blocked.blocks(target)]
        self._fanout.send(user, presence, audience + others)

    @hook(SessionClosed)
    def close(self, event: SessionClosed) -> None:
        """One that never was available may have sent directed presence all the same."""
        session = event.session
        self._end_directed(session, build("presence", {"from": session.jid.full, "type": "unavailable"}))

    @hook(SessionLeft)
    def pass_on(self, event: SessionLeft) -> None:
        """Nobody is told of an end, and the session will be told of nothing that it knows."""
        state = _state(event.session)
        event.luggage[self.name] = {
            "since": state["since"],
            "digest": state["digest"].hex(),
            "complete": state["complete"],
            "directed": list(state["directed"]),
        }

    @hook(SessionArrived)
    def take(self, event: SessionArrived) -> None:
        luggage = event.luggage.get(self.name)
        if luggage is not None:
            _state(event.session).update(
                since=luggage["since"],
                digest=bytes.fromhex(luggage["digest"]),
                complete=luggage["complete"],
                directed={target: parse(target) for target in luggage["directed"]},
            )

    @hook(UserDeleted)
    def forget(self, event: UserDeleted) -> None:
        self._last.forget(event.user)

    @hook(UserForgotten)
    def forget_here(self, event: UserForgotten) -> None:
        self._last.forget(event.user)

    # -- directed presence

    @hook(DirectedPresenceSending)
    def direct(self, event: DirectedPresenceSending) -> None:
        """RFC 6121 4.6: whoever is told that the session is there will be told of its end."""
        target = event.presence.to
        assert target is not None
        directed = _state(event.session)["directed"]
        if event.presence.type == "unavailable":
            directed.pop(target.full, None)
        elif target.full not in directed:
            if len(directed) >= self.config.max_directed:
                raise StanzaError("resource-constraint", "this session has sent directed presence to too many")
            directed[target.full] = target

    @hook(PresenceBounced)
    def undirect(self, event: PresenceBounced) -> None:
        """Where the presence did not arrive no end needs to be told (requirements 3.5)."""
        sender = event.error.from_
        if sender is not None:
            for session in self.sessions.sessions(event.to):
                if _STATE in session.state and event.to.resource in ("", session.jid.resource):
                    _state(session)["directed"].pop(sender.full, None)

    def _take_directed(self, session: Session) -> list[JID]:
        if _STATE not in session.state:
            return []
        directed = _state(session)["directed"]
        targets = list(directed.values())
        directed.clear()
        return targets

    def _end_directed(self, session: Session, presence: Stanza) -> None:
        directed = self._take_directed(session)
        if directed:
            plain = presence if presence.to is None else presence.replace(to=None)
            self._fanout.send(session.user, plain, directed)

    # -- nodes that come and go

    @hook(SessionsLost)
    def lose(self, event: SessionsLost) -> None:
        """Nobody else tells their contacts here."""
        self.spawn(self._losses.tell(event.sessions, time.monotonic()), name="presence of lost sessions")

    @hook(DirectedPresenceArrived)
    def meet(self, event: DirectedPresenceArrived) -> None:
        sender, to = event.presence.from_, event.presence.to
        if sender is None or to is None or not sender.resource or sender.domain not in self.server.hosts:
            return
        item = (self._cached(to) or {}).get(sender.bare)
        if sender.bare != to.bare and (item is None or not item.is_seen):
            here = self.sessions.sessions(to)
            self._losses.met(event.presence, [each for each in here if to.resource in ("", each.jid.resource)])

    @hook(NodeSynced)
    def renew(self, event: NodeSynced) -> None:
        self.spawn(self._renewal.run(event.node, event.name), name="presence for a node that is back")

    @from_node(SEEN)
    def say_seen(self, node: bytes, payload: None) -> None:
        """What was sent before this question has been taken."""

    async def _know(self, session: Session) -> None:
        await self._contacts(session.user)
        await self._blocks.get(session.user)

    def _show_on(self, session: Session, users: set[str], node: bytes) -> int:
        """Send a session's presence to those of `users` on a node who may see it; how many frames that were.
        LookupError where that is not known without waiting."""
        user, presence = session.user, session.presence
        if presence is None or session.priority is None:
            return 0
        contacts, blocked = self._cached(user), self._blocks.known(user)
        if contacts is None or blocked is None:
            raise LookupError(user.bare)
        found = [contacts[name].jid for name in users.intersection(contacts) if contacts[name].sees_user]
        directed = [to for to in _state(session)["directed"].values() if to.bare in users and to not in found]
        near = found + [to for to in directed if not to.resource]
        near = [user] * (user.bare in users) + [to for to in near if not blocked.blocks(to)]
        far = [to for to in directed if to.resource and not blocked.blocks(to) and self._is_on(to, node)]
        if near or far:
            shown = _shown(session, presence)
            if near:
                self._fanout.send(user, shown, near, only=node)
            for to in far:
                self.route(shown.addressed(to))
        return bool(near) + len(far)

    def _is_on(self, jid: JID, node: bytes) -> bool:
        return any(found.jid == jid and found.node == node for found in self.sessions.resources(bare(jid)))

    # -- blocking (XEP-0191 3.3, 3.4)

    @hook(AddressesBlocked)
    async def hide(self, event: AddressesBlocked) -> None:
        """Whoever is blocked sees the user go, and with them whoever got directed presence."""
        self.nodes.cast("hide", _blocked(event), self.nodes.of(event.user))
        await self._hide(event.user, event.addresses)

    async def _hide(self, user: JID, addresses: Sequence[JID]) -> None:
        blocked = await self._blocks.newest(user)
        watching = touched(addresses, await self._roster_of(user), _sees_user)
        for session in self._present(user):
            gone = build("presence", {"from": session.jid.full, "type": "unavailable"})
            directed = _state(session)["directed"]
            met = [target for target in directed.values() if blocked.blocks(target)]
            for target in met:
                del directed[target.full]
            met = [target for target in met if target.bare not in {contact.full for contact in watching}]
            self._fanout.send(user, gone, [target for target in watching if blocked.blocks(target)] + met)

    @hook(AddressesUnblocked)
    async def show(self, event: AddressesUnblocked) -> None:
        """Both see each other again, as at the beginning of a session."""
        self.nodes.cast("show", _blocked(event), self.nodes.of(event.user))
        await self._show(event.user, event.addresses)

    async def _show(self, user: JID, addresses: Sequence[JID]) -> None:
        blocked = await self._blocks.newest(user)
        contacts = await self._roster_of(user)
        watching = touched(addresses, contacts, _sees_user)
        for session in self._present(user):
            if session.presence is not None:
                self._fanout.send(user, session.presence, [target for target in watching if not blocked.blocks(target)])
            asked: Asked = {}
            for contact in touched(addresses, contacts, _is_seen):
                await self._bring_one(session, contact, asked)
            self._elsewhere.ask(session.jid, asked)

    # -- those who ask

    @hook(ProbeReceiving, after=("blocking", "privacy"))
    async def answer_probe(self, event: ProbeReceiving) -> Handled:
        """RFC 6121 4.3.2, once for the account. An account that is not there is answered like one that says no."""
        user, asker = event.user, event.stanza.from_
        if asker is None:
            return HANDLED
        only = event.stanza.to.resource if event.stanza.to else ""
        if not await self._may_see(user, asker):
            self.route(build("presence", {"from": user.bare, "to": asker.bare, "type": "unsubscribed"}))
            return HANDLED
        found, nodes = self._answer(user, asker, only), self._elsewhere.nodes_with(user, only)
        self._elsewhere.ask(asker, {node: [user.bare] for node in nodes}, only)
        if not found and not nodes:
            last = await self._last_of(user)
            unavailable = build("presence", {"from": user.bare, "type": "unavailable"})
            self.route((unavailable if last is None else delayed(*last)).addressed(asker))
        return HANDLED

    async def _last_of(self, user: JID) -> tuple[Stanza, float] | None:
        """The last presence of an absent user: the node knows it on which their last session was."""
        return self._last.newest(user, await self.nodes.call_all("last", user.bare, timeout=_LAST_WAIT))

    async def _may_see(self, user: JID, asker: JID) -> bool:
        if asker.bare == user.bare:
            return True
        contacts = self._cached(user)
        if contacts is None:
            contacts = await self._contacts(user)
        item = contacts.get(asker.bare)
        return item is not None and item.sees_user

    def _answer(self, user: JID, asker: JID, only: str = "") -> bool:
        """Send the presence of each available resource (or of one) to somebody; False when there is none."""
        found = False
        for session in self._present(user):
            presence = session.presence
            if presence is None or session.jid == asker or only not in ("", session.jid.resource):
                continue
            found = True
            self.route(_shown(session, presence).addressed(asker))
        return found

    # -- routing.iq_needs_presence

    @hook(StanzaDelivering, switched=True)
    def guard(self, event: StanzaDelivering) -> None:
        """A request is delivered only from those who may know that the session is there (RFC 6121 8.5.3.1)."""
        stanza, session = event.stanza, event.session
        if stanza.kind != "iq" or stanza.type not in ("get", "set") or stanza.from_ is None:
            return
        sender, user = stanza.from_, session.user
        if sender.bare == user.bare or sender.full in self.server.hosts:
            return
        item = (self._cached(user) or {}).get(sender.bare)
        if item is not None and item.sees_user:
            return
        directed = _state(session)["directed"]
        if sender.full not in directed and sender.bare not in directed:
            raise StanzaError("service-unavailable")

    # -- helpers

    def _is_near(self, jid: JID) -> bool:
        return bool(jid.local) and not jid.resource and jid.domain in self.server.hosts

    def _present(self, user: JID) -> list[Session]:
        return [session for session in self.sessions.sessions(user) if session.priority is not None]

    def _audience(self, user: JID, contacts: Mapping[str, Contact], blocked: Blocklist) -> list[JID]:
        """The user's own resources and whoever may see the user."""
        audience = [user, *(contact.jid for contact in contacts.values() if contact.sees_user)]
        return [target for target in audience if not blocked.blocks(target)] if blocked else audience

    def _roster(self) -> RosterService:
        """Asked for each time: the module may be loaded again while this one runs."""
        found: RosterService = self.service(RosterService)  # type: ignore[type-abstract]
        return found

    def _cached(self, user: JID) -> Mapping[str, Contact] | None:
        try:
            return self._roster().cached(user)
        except LookupError:  # it is just being loaded again
            return None

    async def _roster_of(self, user: JID) -> Mapping[str, Contact]:
        """As it is now, whatever happens to it while somebody waits. StorageUnavailable."""
        cached = self._cached(user)
        return dict(await self._contacts(user) if cached is None else cached)

    async def _contacts(self, user: JID) -> Mapping[str, Contact]:
        """Live where it is kept. StorageUnavailable."""
        try:
            return await self._roster().contacts(bare(user))
        except LookupError as exc:
            raise StorageUnavailable("the roster module is being loaded") from exc


def _blocked(event: AddressesBlocked | AddressesUnblocked) -> list[Any]:
    """As other nodes are told."""
    return [event.user.full, [address.full for address in event.addresses]]


def _sees_user(contact: Contact) -> bool:
    return contact.sees_user


def _is_seen(contact: Contact) -> bool:
    return contact.is_seen


def _seen(contacts: Mapping[str, Contact]) -> Iterator[JID]:
    return iter([contact.jid for contact in contacts.values() if contact.is_seen])


def _shown(session: Session, presence: Stanza) -> Stanza:
    """A session's presence for somebody who is told of it later than others."""
    since = _state(session)["since"]
    return delayed(presence, since) if since else presence


def _state(session: Session) -> dict[str, Any]:
    """since: when its presence was broadcast (0: not known); digest: of what; complete: it was brought the presence of
    others; directed: addresses by full JID."""
    state = session.state.get(_STATE)
    if state is None:
        state = session.state[_STATE] = {"since": 0.0, "digest": b"", "complete": True, "directed": {}}
    assert isinstance(state, dict)
    return state
