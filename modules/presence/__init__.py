"""Presence (RFC 6121 4; requirements 3.6): who is told that a user is there, and answers to those who ask.

Nothing is broadcast before it is true: own presence goes out when the session's row has changed (PresenceChanged,
SessionBecameUnavailable). Somebody who becomes available at the same moment then either finds the new presence or is
told of it, never neither.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from xmppd.errors import StanzaError, StorageError, StorageUnavailable
from xmppd.events import (
    HANDLED,
    ConfigReloaded,
    DirectedPresenceSending,
    Handled,
    PresenceBounced,
    PresenceChanged,
    PresenceSending,
    ProbeReceiving,
    SessionBecameUnavailable,
    SessionClosed,
    StanzaDelivering,
    UserDeleted,
)
from xmppd.module_api import Contact, Context, Module, RosterService, Session, hook
from xmppd.protocol.jid import JID, bare
from xmppd.protocol.stanza import Stanza, build

from .content import delayed, digest
from .fanout import PIECE, Fanout

_STATE: Final = "presence"  # in a session's state: a plain dict, which outlives a reload of this file
_LAST_KNOWN: Final = 10_000  # users whose last unavailable presence is remembered
_LAST_SIZE: Final = 1024  # bytes; a longer one is not
_RETRY: Final = 5.0  # seconds between two looks for a database that is away


@dataclass(frozen=True, slots=True)
class Config:
    max_directed: int = 1000  # addresses one session may send directed presence to, rooms among them


class Presence(Module[Config]):
    requires = ("roster",)

    def __init__(self, context: Context, config: Config) -> None:
        super().__init__(context, config)
        self._fanout = Fanout(self.sessions.multicast, self.route, self._is_near, self.spawn)
        self._last: OrderedDict[str, tuple[Stanza, float]] = OrderedDict()

    async def start(self) -> None:
        self.switch(StanzaDelivering, self.server.routing.iq_needs_presence)

    async def stop(self) -> None:
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
            self._last.pop(session.user.bare, None)
            state["complete"] = False
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
            if session.presence is not presence:
                return
        known = contacts

        def wanted(target: JID) -> bool:
            if session.presence is not presence:
                return False  # it was replaced while it went out
            cached = self._cached(user)
            item = (known if cached is None else cached).get(target.full)
            return target == user or (item is not None and item.sees_user)

        sending = self._fanout.send(user, presence, self._audience(user, contacts), wanted)
        if sending is not None:
            await sending
        if not _state(session)["complete"] and session.presence is presence:
            _state(session)["complete"] = True
            await self._bring(session, contacts)

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
        self._answer(session.user, session.jid)
        for count, contact in enumerate(_seen(contacts), 1):
            if not self._is_near(contact):
                probe = {"from": session.jid.full, "to": contact.full, "type": "probe"}
                self.route(build("presence", probe))
            elif self._present(contact) and await self._may_see(contact, session.user):
                # Our own users need no probe; of the absent ones a new resource is not told, it takes nobody for there.
                self._answer(contact, session.jid)
            if count % PIECE == 0:
                await asyncio.sleep(0)
            if session.presence is None:
                return

    @hook(SessionBecameUnavailable)
    def end(self, event: SessionBecameUnavailable) -> None:
        """RFC 6121 4.5.2. Plain, so that it comes before the session is taken apart."""
        session, presence = event.session, event.presence
        user, directed = session.user, self._take_directed(session)
        if not self._present(user):
            self._remember(user, presence)
        contacts = self._cached(user)
        if contacts is None:
            self.spawn(self._end_later(user, presence, directed), name="unavailable presence")
        else:
            self._end(user, presence, directed, contacts)

    async def _end_later(self, user: JID, presence: Stanza, directed: list[JID]) -> None:
        contacts: Mapping[str, Contact] = {}
        try:
            contacts = await self._contacts(user)
        except (StorageError, StanzaError) as exc:
            self.log.warning("contacts are not told of the end of a session", user=user.bare, error=exc)
        self._end(user, presence, directed, contacts)

    def _end(self, user: JID, presence: Stanza, directed: list[JID], contacts: Mapping[str, Contact]) -> None:
        audience = self._audience(user, contacts)
        told = {target.bare for target in audience}
        self._fanout.send(user, presence, audience + [target for target in directed if target.bare not in told])

    @hook(SessionClosed)
    def close(self, event: SessionClosed) -> None:
        """One that never was available may have sent directed presence all the same."""
        session = event.session
        self._end_directed(session, build("presence", {"from": session.jid.full, "type": "unavailable"}))

    @hook(UserDeleted)
    def forget(self, event: UserDeleted) -> None:
        self._last.pop(event.user.bare, None)

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

    # -- those who ask

    @hook(ProbeReceiving, after=("blocking", "privacy"))
    async def answer_probe(self, event: ProbeReceiving) -> Handled:
        """RFC 6121 4.3.2, once for the account. An account that is not there is answered like one that says no."""
        user, asker = event.user, event.stanza.from_
        if asker is None:
            return HANDLED
        if not await self._may_see(user, asker):
            self.route(build("presence", {"from": user.bare, "to": asker.bare, "type": "unsubscribed"}))
        elif not self._answer(user, asker, only=event.stanza.to.resource if event.stanza.to else ""):
            last = self._last.get(user.bare)
            unavailable = build("presence", {"from": user.bare, "type": "unavailable"})
            self.route((unavailable if last is None else delayed(*last)).addressed(asker))
        return HANDLED

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
            since = _state(session)["since"]
            self.route((delayed(presence, since) if since else presence).addressed(asker))
        return found

    def _remember(self, user: JID, presence: Stanza) -> None:
        if len(presence.xml) <= _LAST_SIZE:
            self._last[user.bare] = (presence, self.clock())
            self._last.move_to_end(user.bare)
            if len(self._last) > _LAST_KNOWN:
                self._last.popitem(last=False)

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

    def _audience(self, user: JID, contacts: Mapping[str, Contact]) -> list[JID]:
        """The user's own resources and whoever may see the user."""
        return [user, *(contact.jid for contact in contacts.values() if contact.sees_user)]

    def _roster(self) -> RosterService:
        """Asked for each time: the module may be loaded again while this one runs."""
        found: RosterService = self.service(RosterService)  # type: ignore[type-abstract]
        return found

    def _cached(self, user: JID) -> Mapping[str, Contact] | None:
        try:
            return self._roster().cached(user)
        except LookupError:  # it is just being loaded again
            return None

    async def _contacts(self, user: JID) -> Mapping[str, Contact]:
        """Live where it is kept. StorageUnavailable."""
        try:
            return await self._roster().contacts(bare(user))
        except LookupError as exc:
            raise StorageUnavailable("the roster module is being loaded") from exc


def _seen(contacts: Mapping[str, Contact]) -> Iterator[JID]:
    return iter([contact.jid for contact in contacts.values() if contact.is_seen])


def _state(session: Session) -> dict[str, Any]:
    """since: when its presence was broadcast (0: not known); digest: of what; complete: it was brought the presence of
    others; directed: addresses by full JID."""
    state = session.state.get(_STATE)
    if state is None:
        state = session.state[_STATE] = {"since": 0.0, "digest": b"", "complete": True, "directed": {}}
    assert isinstance(state, dict)
    return state
