"""Rosters and presence subscriptions (RFC 6121 2 and 3), with roster versioning (XEP-0237, RFC 6121 2.6).

moves.py has the states and how they change, subscriptions.py what is sent when they do, items.py what a client may set,
store.py the database, cache.py the rosters of the users who are here, news.py what nodes tell each other.
"""

import asyncio
import itertools
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from xmppd.errors import CommandError, JidError, StanzaError, StorageError
from xmppd.events import (
    HANDLED,
    FeaturesOffering,
    Handled,
    SessionArrived,
    SessionBecameAvailable,
    SessionBound,
    SessionClosed,
    SessionLeft,
    SubscriptionReceiving,
    SubscriptionSending,
    UserDeleted,
    UserExporting,
    UserForgotten,
    UserImporting,
)
from xmppd.module_api import (
    Arg,
    Contact,
    Context,
    IqRequest,
    List,
    Module,
    Rescode,
    RosterService,
    Session,
    Tuple,
    command,
    from_node,
    hook,
    iq,
    string,
)
from xmppd.protocol import ns
from xmppd.protocol.jid import JID, make, parse
from xmppd.protocol.stanza import Stanza, build

from .cache import Rosters
from .items import Item, Limits, check_texts, item_xml, query_xml, read_edit, removed_xml
from .moving import QUERY, items_in, merged, request_in, request_xml
from .news import heard, told
from .store import Change, Loaded, Store, roster_item, roster_version
from .subscriptions import Subscriptions, decided, kept_request

_FEATURE: Final = f"<ver xmlns='{ns.ROSTER_VERSIONING}'/>".encode()
_INTERESTED: Final = "roster"  # in a session's state: it asked for the roster
_WITHOUT_PAUSE: Final = 1000  # items written before others get their turn
_SUBSCRIPTIONS: Final = ("none", "from", "to", "both")


@dataclass(frozen=True, slots=True)
class Config:
    max_items: int = 10_000  # contacts in one roster; past it the client gets resource-constraint
    max_requests: int = 1000  # waiting requests of people who are not in the roster; past it new ones are dropped
    max_groups: int = 100  # groups of one contact
    max_length: int = 1023  # bytes of a name or a group
    versioning: bool = True  # let clients keep a copy, and send only what is new (XEP-0237)


class Roster(Module[Config]):
    xeps = {237: "1.3"}
    provides = (RosterService,)
    tables = (roster_item, roster_version)

    def __init__(self, context: Context, config: Config) -> None:
        super().__init__(context, config)
        self._limits = Limits(config.max_items, config.max_requests, config.max_groups, config.max_length)
        self._store = Store(self.storage, self._limits)
        self._rosters = Rosters(self._load, self.sessions.sessions)
        self._flows = Subscriptions(self, self._store.move, self.route)
        self._pushes = itertools.count(1)

    async def start(self) -> None:
        self._store.open()

    async def stop(self) -> None:
        self._store.close()

    # -- RosterService

    def cached(self, user: JID) -> Mapping[str, Contact] | None:
        """A live view: take a copy before you wait for anything."""
        kept = self._rosters.cached(user)
        return None if kept is None else kept.items

    async def contacts(self, user: JID) -> Mapping[str, Contact]:
        return (await self._rosters.get(user)).items

    def invalidate(self, user: JID) -> None:
        """This roster may have been changed by somebody else: load it again if it is kept here."""
        self._rosters.invalidate(user)
        if self._rosters.cached(user) is not None:
            self.spawn(self._refresh(user), name="load a roster again")

    async def _refresh(self, user: JID) -> None:
        try:
            await self._rosters.get(user)
        except StorageError as exc:
            self.log.warning("roster not loaded again", user=user.bare, error=exc)  # the next to ask tries again

    async def _load(self, user: JID) -> Loaded:
        return Loaded() if self.sessions.is_anonymous(user) else await self._store.load(user)

    # -- sessions

    @hook(SessionBound, after=("blocking",))
    async def load(self, event: SessionBound) -> None:
        await self._rosters.get(event.session.user)

    @hook(SessionClosed)
    def unload(self, event: SessionClosed) -> None:
        self._rosters.leave(event.session.user)

    @hook(SessionLeft)
    def pass_on(self, event: SessionLeft) -> None:
        event.luggage[self.name] = _INTERESTED in event.session.state
        self._rosters.leave(event.session.user)

    @hook(SessionArrived, after=("blocking",))
    async def take(self, event: SessionArrived) -> None:
        if event.luggage.get(self.name):
            event.session.state[_INTERESTED] = True
        await self._rosters.get(event.session.user)

    @hook(FeaturesOffering)
    def offer(self, event: FeaturesOffering) -> None:
        if event.authenticated and self.config.versioning:
            event.features.append(_FEATURE)

    @hook(SessionBecameAvailable)
    async def show_requests(self, event: SessionBecameAvailable) -> None:
        """Requests are shown at every new available presence until they are answered (RFC 6121 3.1.3)."""
        session = event.session
        if event.old_priority is not None:
            return
        kept = await self._rosters.get(session.user)
        if not any(item.asks for item in kept.items.values()):
            return
        for contact, request in (await self._store.requests(session.user)).items():
            item = kept.items.get(contact)
            if item is not None and item.asks:  # else it was answered while we looked
                session.send(kept_request(request, contact, session.user).replace(to=session.jid.full))

    # -- what clients ask

    @iq("get", ns.ROSTER, "query")
    async def give(self, request: IqRequest) -> bytes | None:
        """RFC 6121 2.1.3, 2.2; nothing when the client's copy is the newest (2.6.3)."""
        _own(request)
        known = request.payload.get("ver") if self.config.versioning else None
        items, version = await self._listed(request.target, known)
        # From here to the answer nothing waits, so no push can come between.
        for session in self.sessions.sessions(request.target):
            if session.jid == request.sender:
                session.state[_INTERESTED] = True
        return None if items is None else query_xml(items, None if known is None else version)

    async def _listed(self, user: JID, known: str | None) -> tuple[list[str] | None, str]:
        """The items as XML, or None when the version is the known one. A long roster is written with pauses, and again
        when it was changed in one of them: at the end it is as it is now."""
        while True:
            kept = await self._rosters.get(user)
            version = kept.version
            if known and known == version:
                return None, version
            items: list[str] = []
            for count, item in enumerate([item for item in kept.items.values() if item.listed], 1):
                items.append(item_xml(item))
                if count % _WITHOUT_PAUSE == 0:
                    await asyncio.sleep(0)
            now = self._rosters.cached(user)
            if version == kept.version and now in (kept, None) and not kept.stale:
                return items, version

    @iq("set", ns.ROSTER, "query")
    async def change(self, request: IqRequest) -> None:
        """RFC 6121 2.1.5, 2.3 to 2.5."""
        _own(request)
        user = request.target
        edit = read_edit(request.payload, self._limits)
        if edit.jid.bare == user.bare:
            raise StanzaError("not-allowed", "nobody is a contact of their own")
        if edit.remove:
            await self._remove(user, edit.jid, tell=True)
            return
        async with self.turn(user):
            self.push(user, await self.write(user, self._store.edit(user, edit.jid, edit.name, edit.groups)))

    async def _remove(self, user: JID, contact: JID, *, tell: bool) -> None:
        async with self.turn(user):
            change = await self.write(user, self._store.remove(user, contact))
            self.push(user, change)
            outcomes = self._flows.part(user, change.before) if tell and change.before is not None else []
        # The contact's server may answer by itself; a new request of the user must not meet that answer on its way.
        for outcome in outcomes:
            await decided(outcome)

    # -- subscriptions

    @hook(SubscriptionSending, after=("blocking", "privacy"))
    async def send(self, event: SubscriptionSending) -> Handled:
        await self._flows.send(event.session.user, event.stanza)
        return HANDLED

    @hook(SubscriptionReceiving, after=("blocking", "privacy"))
    async def receive(self, event: SubscriptionReceiving) -> Handled:
        try:
            await self._flows.receive(event.user, event.stanza)
        except StanzaError as error:
            # A stranger is not told what the roster of another holds.
            self.log.debug("subscription stanza dropped", user=event.user.bare, reason=error.text)
        return HANDLED

    @hook(UserDeleted)
    async def forget(self, event: UserDeleted) -> None:
        async with self.turn(event.user):
            items = await self._store.forget(event.user)
            self._rosters.drop(event.user)
        for item in items:
            # One by one: a contact of ours costs a transaction.
            for outcome in self._flows.part(event.user, item):
                await decided(outcome)

    # -- what subscriptions.py needs

    def turn(self, user: JID) -> asyncio.Lock:
        return self._rosters.turn(user)

    def sessions_of(self, user: JID) -> list[Session]:
        return list(self.sessions.sessions(user))

    def interested(self, session: Session) -> bool:
        return _INTERESTED in session.state

    async def exists(self, user: JID) -> bool:
        return self._rosters.cached(user) is not None or await self.accounts.exists(user.domain, user.local)

    def sees_user(self, user: JID, contact: JID) -> bool:
        """As far as it is known here: what is not kept has been read a moment ago."""
        kept = self._rosters.cached(user)
        item = kept.items.get(contact.full) if kept else None
        return kept is None or (item is not None and item.sees_user)

    async def write(self, user: JID, change: Awaitable[Change]) -> Change:
        """Make a change, in the user's turn; what is kept follows when it is committed."""
        try:
            done = await change
        except (StorageError, asyncio.CancelledError):
            self._doubt(user)  # the answer to a COMMIT may have been lost
            raise
        self._rosters.apply(user, done)
        if done.changed:
            self.nodes.cast("changed", told(user, done))
        self._tell_successor(user)
        return done

    def _tell_successor(self, user: JID) -> None:
        """This change was under way when the module was reloaded: the new one may have read the roster before it."""
        try:
            serving: Any = self.service(RosterService)  # type: ignore[type-abstract]
        except LookupError:
            return
        if serving is not self and hasattr(serving, "invalidate"):
            serving.invalidate(user)

    def push(self, user: JID, change: Change) -> None:
        """Tell every interested resource (RFC 6121 2.1.6), on whatever node."""
        if _is_shown(change.after) or _is_shown(change.before):
            self.nodes.cast("push", [user.full, change.jid.full])
            self._push_here(user, change.jid, change.after, change.version)

    def _push_here(self, user: JID, contact: JID, item: Item | None, version: str) -> None:
        text = item_xml(item) if item is not None and item.listed else removed_xml(contact)
        inner = query_xml((text,), version if self.config.versioning else None)
        for session in self.sessions.sessions(user):
            if self.interested(session):
                id = f"push-{next(self._pushes)}"
                attrs = {"type": "set", "id": id, "to": session.jid.full, "from": user.bare}
                session.send(build("iq", attrs, inner))

    # -- other nodes: they change rosters too, and have sessions of the same users

    def elsewhere(self, user: JID) -> bool:
        return bool(self.nodes.of(user))

    def tell_others(self, topic: str, user: JID, what: str) -> None:
        nodes = self.nodes.of(user)
        if nodes:
            self.nodes.cast(topic, [user.full, what], nodes)

    async def heard(self) -> None:
        await self.nodes.barrier()

    @from_node("changed")
    def learn(self, node: bytes, news: dict[str, Any]) -> None:
        """To all nodes: one that is just loading that roster must not keep what was there before."""
        user, change = heard(news)
        if not self._rosters.learn(user, change):
            self.invalidate(user)

    @from_node("doubt")
    def doubt(self, node: bytes, user: str) -> None:
        self.invalidate(parse(user))

    @from_node("push")
    def push_too(self, node: bytes, news: list[str]) -> Awaitable[None] | None:
        """Behind `changed`, so what is kept has the item; or something newer, which is then pushed in its place."""
        user, contact = parse(news[0]), parse(news[1])
        kept = self._rosters.cached(user)
        if kept is None:
            return None  # nobody here has asked for it
        if kept.stale:
            return self._push_current(user, contact)
        self._push_here(user, contact, kept.items.get(contact.full), kept.version)
        return None

    async def _push_current(self, user: JID, contact: JID) -> None:
        try:
            kept = await self._rosters.get(user)
        except StorageError as exc:
            self.log.warning("roster not loaded again", user=user.bare, error=exc)
        else:
            self._push_here(user, contact, kept.items.get(contact.full), kept.version)

    @from_node("deliver")
    def deliver(self, node: bytes, news: list[str]) -> None:
        self._flows.deliver_here(parse(news[0]), Stanza.from_bytes(news[1].encode()))

    @from_node("show")
    def show(self, node: bytes, news: list[str]) -> None:
        self._flows.show_here(parse(news[0]), parse(news[1]))

    @from_node("hide")
    def hide(self, node: bytes, news: list[str]) -> None:
        self._flows.hide_here(parse(news[0]), parse(news[1]))

    @hook(UserForgotten)
    def forget_here(self, event: UserForgotten) -> None:
        self._rosters.drop(event.user)

    # -- moving between servers

    @hook(UserExporting)
    async def write_out(self, event: UserExporting) -> None:
        user = event.user
        items = (await self._store.load(user)).items
        listed = [item_xml(item) for _, item in sorted(items.items()) if item.listed]
        if listed:
            event.parts.append(query_xml(listed, None))
        if any(item.asks for item in items.values()):
            requests = await self._store.requests(user)
            event.parts += [request_xml(kept_request(requests[name], name, user)) for name in sorted(requests)]

    @hook(UserImporting)
    async def take_up(self, event: UserImporting) -> Handled | None:
        """Whoever is logged in sees it at the next login."""
        user = event.user
        if event.element.tag == QUERY:
            items = items_in(event.element, user, self._limits, event.problems)
            async with self.turn(user):
                try:
                    event.count = await self._store.adopt(user, items, merged)
                finally:
                    self._doubt(user)
            return HANDLED
        request = request_in(event.element, user)
        if request is None:
            return None
        contact, stanza = request
        async with self.turn(user):
            change = await self.write(user, self._store.move(user, contact, "subscribe", stanza))
        event.count = int(change.changed)
        return HANDLED

    def _doubt(self, user: JID) -> None:
        self._rosters.invalidate(user)
        self.nodes.cast("doubt", user.full)
        self._tell_successor(user)

    # -- what operators ask

    @command(
        "add_rosteritem",
        args=tuple(map(Arg, ("localuser", "localhost", "user", "host", "nick", "group", "subs"))),
        result=Rescode(),
        tags=("roster",),
        scope="shared",
        doc="Add a contact to a user's roster, or change it; several groups are separated by `;`",
    )
    async def add_rosteritem(
        self, localuser: str, localhost: str, user: str, host: str, nick: str, group: str, subs: str
    ) -> None:
        owner, contact = self._local(localuser, localhost), _jid(user, host, "'user'/'server'")
        groups = tuple(dict.fromkeys(name for name in group.split(";") if name))
        if subs not in _SUBSCRIPTIONS:
            raise CommandError(f"unknown subscription '{subs}'. There are: none from to both")
        if contact == owner:
            raise CommandError("nobody is a contact of their own")
        try:
            check_texts(nick, groups, self._limits)
        except StanzaError as error:
            raise CommandError(error.text) from error
        async with self.turn(owner):
            force = partial(self._store.force, name=nick, groups=groups, subscription=subs)
            self.push(owner, await self.write(owner, force(owner, contact)))

    @command(
        "delete_rosteritem",
        args=tuple(map(Arg, ("localuser", "localhost", "user", "host"))),
        result=Rescode(),
        tags=("roster",),
        scope="shared",
        doc="Take a contact out of a user's roster; the contact is not told",
    )
    async def delete_rosteritem(self, localuser: str, localhost: str, user: str, host: str) -> None:
        owner, contact = self._local(localuser, localhost), _jid(user, host, "'user'/'server'")
        try:
            await self._remove(owner, contact, tell=False)
        except StanzaError:
            pass  # it was not there

    @command(
        "get_roster",
        args=(Arg("user"), Arg("host")),
        result=List("contacts", Tuple("contact", tuple(map(string, ("jid", "nick", "subscription", "ask", "group"))))),
        tags=("roster",),
        scope="shared",
        doc="List a user's contacts, one line per group",
        reads=True,
    )
    async def get_roster(self, user: str, host: str) -> list[tuple[str, ...]]:
        kept = await self._rosters.get(_jid(user, host, "'user'/'server'"))
        return sorted(
            (
                item.jid.full,
                item.name,
                item.subscription,
                "subscribe" if item.ask in ("out", "both") else "undefined",
                name,
            )
            for item in kept.items.values()
            if item.listed
            for name in item.groups or ("",)
        )

    def _local(self, user: str, host: str) -> JID:
        jid = _jid(user, host, "'localuser'/'localserver'")
        if jid.domain not in self.server.hosts:
            raise CommandError("Unknown virtual host")
        return jid


def _is_shown(item: Item | None) -> bool:
    """Whether clients are told of it."""
    return item is not None and item.listed


def _own(request: IqRequest) -> None:
    if not request.is_own:
        raise StanzaError("forbidden", "a roster is its owner's alone")


def _jid(user: str, host: str, what: str) -> JID:
    try:
        return make(user, host)
    except JidError as exc:
        raise CommandError(f"Invalid {what}") from exc
