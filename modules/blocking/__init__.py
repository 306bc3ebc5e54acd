"""Blocking (XEP-0191) with reports of spam and abuse (XEP-0377).

rules.py says whom a list matches and what becomes of what it stops, lists.py keeps the lists of the users who are here,
store.py has the database, reports.py the reports. Only sessions of users who block somebody are guarded: for all others
a stanza costs nothing. Where a list is not known, nothing passes.
"""

import asyncio
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Final
from xml.sax.saxutils import quoteattr

from lxml.etree import _Element
from pydantic import AfterValidator

from xmppd.errors import JidError, StanzaError, StorageError
from xmppd.events import (
    HANDLED,
    AddressesBlocked,
    AddressesUnblocked,
    GuardedDelivering,
    GuardedSending,
    Handled,
    MessageUndeliverable,
    ProbeReceiving,
    RequestReceiving,
    SessionArrived,
    SessionBound,
    SessionClosed,
    SessionLeft,
    SubscriptionReceiving,
    UserDeleted,
    UserExporting,
    UserForgotten,
    UserImporting,
)
from xmppd.module_api import (
    SAFE,
    Arg,
    BlockingService,
    Blocklist,
    Context,
    IqRequest,
    List,
    Module,
    Session,
    Tuple,
    between,
    command,
    from_node,
    hook,
    iq,
    string,
)
from xmppd.protocol import ns
from xmppd.protocol.jid import JID, parse
from xmppd.protocol.stanza import Stanza, build

from .lists import Lists
from .moving import blocked_in
from .reports import Report, notice, read_report
from .rules import exempt, incoming, outgoing, unknown
from .store import Change, Changed, Store, block_item, spam_report

_ITEM: Final = f"{{{ns.BLOCKING}}}item"
_INTERESTED: Final = "blocking"  # in a session's state: it asked for the list
_RETRY: Final = 2.0  # seconds between two looks for a database that is away
_AT_ONCE: Final = 500  # look-ups
_SHOWN: Final = 1000  # reports


def _address(text: str) -> str:
    try:
        return parse(text).full
    except JidError:
        raise ValueError("expected an address such as admin@example.net") from None


@dataclass(frozen=True, slots=True)
class Config:
    max_items: Annotated[int, between(1, 100_000)] = 1000  # addresses one user may block
    max_reports: Annotated[int, between(0, 1_000_000)] = 100  # kept of one user; past it new ones are dropped
    report_to: tuple[Annotated[str, AfterValidator(_address)], ...] = ()  # who is sent a message about each report


class Blocking(Module[Config]):
    xeps = {191: "1.3", 377: "0.4.1"}
    features = (ns.BLOCKING, ns.REPORTING)
    provides = (BlockingService,)
    tables = (block_item, spam_report)

    def __init__(self, context: Context, config: Config) -> None:
        super().__init__(context, config)
        self._store = Store(self.storage)
        self._lists = Lists(self._load, self.sessions.sessions, self._guard_all)
        self._pushes = itertools.count(1)
        self._unknown: set[JID] = set()  # users whose lists a task tries to get
        self._loading = False

    async def start(self) -> None:
        self._store.open()
        for session in self.sessions.local():
            self._guard(session)  # nothing is known yet, so nothing passes
        self._load_until_known({session.user for session in self.sessions.local()})

    async def stop(self) -> None:
        self._store.close()
        for session in self.sessions.local():
            session.guard(self.name, False)

    # -- BlockingService

    def cached(self, user: JID) -> Blocklist | None:
        return self._lists.cached(user)

    async def blocklist(self, user: JID) -> Blocklist:
        return await self._lists.get(user)

    def invalidate(self, user: JID) -> None:
        """Somebody else may have changed this list: load it again if it is kept here."""
        self._lists.invalidate(user)
        if self.sessions.sessions(user):
            self._load_until_known({user})

    # -- the lists of those who are here

    @hook(SessionBound)
    def guard(self, event: SessionBound) -> None:
        """Plain, and behind no other module: a new session is guarded before anything can reach it."""
        self._guard(event.session)

    @hook(SessionBound)
    async def load(self, event: SessionBound) -> None:
        await self._load_now(event.session.user)

    async def _load_now(self, user: JID) -> None:
        try:
            await self._lists.get(user)
        except StorageError as exc:
            self.log.warning("block list not loaded, nothing passes", user=user.bare, error=exc)
            self._load_until_known({user})

    @hook(SessionClosed)
    def unload(self, event: SessionClosed) -> None:
        self._lists.leave(event.session.user)

    @hook(SessionLeft)
    def pass_on(self, event: SessionLeft) -> None:
        event.luggage[self.name] = _INTERESTED in event.session.state
        self._lists.leave(event.session.user)

    @hook(SessionArrived)
    def take(self, event: SessionArrived) -> None:
        self._guard(event.session)
        if event.luggage.get(self.name):
            event.session.state[_INTERESTED] = True

    @hook(SessionArrived)
    async def load_for(self, event: SessionArrived) -> None:
        await self._load_now(event.session.user)

    async def _load(self, user: JID) -> frozenset[str]:
        return frozenset() if self.sessions.is_anonymous(user) else await self._store.load(user)

    def _guard(self, session: Session) -> None:
        known = self._lists.cached(session.user)
        session.guard(self.name, known is None or bool(known))

    def _guard_all(self, user: JID) -> None:
        for session in self.sessions.sessions(user):
            self._guard(session)

    def _load_until_known(self, users: Iterable[JID]) -> None:
        """One task tries, for all there are, until each has a list or no session."""
        self._unknown.update(users)
        if self._unknown and not self._loading:
            self._loading = True
            self.spawn(self._load_unknown(), name="block lists")

    async def _load_unknown(self) -> None:
        try:
            while self._unknown:
                some = [self._unknown.pop() for _ in range(min(_AT_ONCE, len(self._unknown)))]
                results = await asyncio.gather(*map(self._lists.get, some), return_exceptions=True)
                failed = [user for user, result in zip(some, results, strict=True) if isinstance(result, StorageError)]
                if failed:
                    self.log.debug("block lists not loaded", users=len(failed))
                    self._unknown.update(user for user in failed if self.sessions.sessions(user))
                    await asyncio.sleep(_RETRY)
        finally:
            self._loading = False

    # -- what passes

    @hook(GuardedSending)
    def let_out(self, event: GuardedSending) -> None:
        """From a client, to somebody else (XEP-0191 3.3)."""
        to, user = event.stanza.to, event.session.user
        if to is None or exempt(user, to):
            return
        known = self._lists.cached(user)
        if known is None:
            raise unknown()
        if known.blocks(to):
            raise outgoing(event.stanza)

    @hook(GuardedDelivering)
    def let_in(self, event: GuardedDelivering) -> Handled | None:
        """To a client, from somebody else (requirements 3.5)."""
        stanza, user = event.stanza, event.session.user
        sender = stanza.from_
        if sender is None or exempt(user, sender):
            return None
        known = self._lists.cached(user)
        if known is not None:
            return _stop(stanza) if known.blocks(sender) else None
        if stanza.kind == "presence":
            return HANDLED  # an error would look like a refusal of the user's
        raise unknown()

    @hook(MessageUndeliverable)
    async def keep_out(self, event: MessageUndeliverable) -> Handled | None:
        """Nothing is stored of somebody blocked (requirements O-07)."""
        message = event.message
        if message.kept or message.from_ is None:  # let in before; the flush asks again
            return None
        if not (await self._lists.get(event.user)).blocks(message.from_):
            return None
        event.outcome.follow(SAFE)  # where it is met with silence
        return _stop(message)

    @hook(RequestReceiving)
    async def answer_nothing(self, event: RequestReceiving) -> Handled | None:
        return await self._absorb(event.user, event.stanza)

    @hook(SubscriptionReceiving)
    async def hear_no_request(self, event: SubscriptionReceiving) -> Handled | None:
        return await self._absorb(event.user, event.stanza)

    @hook(ProbeReceiving)
    async def hear_no_probe(self, event: ProbeReceiving) -> Handled | None:
        return await self._absorb(event.user, event.stanza)

    async def _absorb(self, user: JID, stanza: Stanza) -> Handled | None:
        sender = stanza.from_
        if sender is None or not (await self._lists.get(user)).blocks(sender):
            return None
        return _stop(stanza)

    # -- what clients ask

    @iq("get", ns.BLOCKING, "blocklist")
    async def give(self, request: IqRequest) -> bytes:
        _own(request)
        known = await self._lists.get(request.target)
        for session in self.sessions.sessions(request.target):
            if session.jid == request.sender:
                session.state[_INTERESTED] = True
        return _element("blocklist", sorted(known.items))

    @iq("set", ns.BLOCKING, "block")
    async def block(self, request: IqRequest) -> None:
        _own(request)
        user, items = request.target, _read(request.payload)
        if not items:
            raise StanzaError("bad-request", "whom?")
        if any(jid.bare == user.bare for jid, _ in items):
            raise StanzaError("not-allowed", "nobody blocks their own account")
        reports = [read_report(element, jid, self.clock()) for jid, element in items]
        jids = [jid for jid, _ in items]
        change = Change(
            (user.domain, user.local),
            add=tuple(jid.full for jid in jids),
            limit=self.config.max_items,
            reports=tuple(report for report in reports if report is not None),
            reports_limit=self.config.max_reports,
        )
        changed = await self._change(user, change, _element("block", [jid.full for jid in jids]))
        new = tuple(jid for jid in jids if jid.full not in changed.before)
        if new:
            await self.tell(AddressesBlocked(user, new))
        self._pass_on(user, changed.reports)

    @iq("set", ns.BLOCKING, "unblock")
    async def unblock(self, request: IqRequest) -> None:
        """Some, or all."""
        _own(request)
        user, jids = request.target, [jid.full for jid, _ in _read(request.payload)]
        change = Change((user.domain, user.local), remove=tuple(jids), clear=not jids, limit=self.config.max_items)
        changed = await self._change(user, change, _element("unblock", jids))
        gone = tuple(parse(jid) for jid in sorted(changed.before - changed.items))
        if gone:
            await self.tell(AddressesUnblocked(user, gone))

    async def _change(self, user: JID, change: Change, push: bytes) -> Changed:
        """In force, and known to the resources that have asked for the list, when this returns."""
        async with self._lists.turn(user):
            try:
                changed = await self._store.change(change)
            except (StorageError, asyncio.CancelledError):
                self.invalidate(user)  # the answer to a COMMIT may have been lost
                self.nodes.cast("changed", [user.full, [], ""])
                self._tell_successor(user)
                raise
            self._lists.keep(user, changed.items)
            self.nodes.cast("changed", [user.full, sorted(changed.items - changed.before), push.decode()])
            self._tell_successor(user)
            self._push_here(user, push)
        return changed

    def _push_here(self, user: JID, push: bytes) -> None:
        for session in self.sessions.sessions(user):
            if _INTERESTED in session.state:
                attrs = {"type": "set", "id": f"block-{next(self._pushes)}", "to": session.jid.full}
                session.send(build("iq", attrs | {"from": user.bare}, push))

    @from_node("changed")
    def learn(self, node: bytes, news: list[Any]) -> None:
        """To all nodes: one that is just loading that list must not keep what was there before."""
        user, added, push = parse(news[0]), news[1], news[2]
        self._lists.widen(user, frozenset(added))
        self.invalidate(user)
        if push:
            self._push_here(user, push.encode())

    @hook(UserForgotten)
    def forget_here(self, event: UserForgotten) -> None:
        self._lists.drop(event.user)

    def _tell_successor(self, user: JID) -> None:
        """This change was under way when the module was reloaded: the new one may have read the list before it."""
        try:
            serving: Any = self.service(BlockingService)  # type: ignore[type-abstract]
        except LookupError:
            return
        if serving is not self and hasattr(serving, "invalidate"):
            serving.invalidate(user)

    def _pass_on(self, user: JID, reports: Sequence[Report]) -> None:
        for report in reports:
            self.log.info("abuse reported", by=user.bare, about=report.jid, reason=report.reason)
            for address in self.config.report_to:
                self.route(notice(report, user, parse(address)))

    @hook(UserDeleted)
    async def forget(self, event: UserDeleted) -> None:
        user = event.user
        async with self._lists.turn(user):
            await self._store.change(Change((user.domain, user.local), forget=True))
            self._lists.drop(user)

    # -- moving between servers

    @hook(UserExporting)
    async def write_out(self, event: UserExporting) -> None:
        items = await self._store.load(event.user)
        if items:
            event.parts.append(_element("blocklist", sorted(items)))

    @hook(UserImporting)
    async def take_up(self, event: UserImporting) -> Handled | None:
        user, found = event.user, blocked_in(event.element, event.problems)
        if found is None:
            return None
        jids = [jid for jid in found if jid.bare != user.bare]
        if jids:
            names = tuple(jid.full for jid in jids)
            change = Change((user.domain, user.local), add=names, limit=self.config.max_items)
            changed = await self._change(user, change, _element("block", names))
            event.count = len(changed.items - changed.before)
        return HANDLED

    # -- what operators ask

    @command(
        "spam_reports",
        args=(Arg("host"),),
        result=List("reports", Tuple("report", tuple(map(string, ("time", "user", "jid", "reason", "report"))))),
        tags=("blocking",),
        scope="shared",
        doc="List what users of a host have reported as spam or abuse, newest first",
        reads=True,
    )
    async def spam_reports(self, host: str) -> list[tuple[str, ...]]:
        domain = self.own_host(host)
        return [
            (_stamp(when), user, jid, reason, report.decode())
            for when, user, jid, reason, report in await self._store.reports(domain, _SHOWN)
        ]


def _stop(stanza: Stanza) -> Handled:
    error = incoming(stanza)
    if error is not None:
        raise error
    return HANDLED


def _own(request: IqRequest) -> None:
    if not request.is_own:
        raise StanzaError("forbidden", "a block list is its owner's alone")


def _read(payload: _Element) -> list[tuple[JID, _Element]]:
    """The items, each once. StanzaError."""
    found: dict[str, tuple[JID, _Element]] = {}
    for element in payload.iterchildren(_ITEM):
        text = element.get("jid")
        if not text:
            raise StanzaError("bad-request", "an item has a jid")
        try:
            jid = parse(text)
        except JidError as exc:
            raise StanzaError("jid-malformed") from exc
        found.setdefault(jid.full, (jid, element))
    return list(found.values())


def _element(name: str, jids: Sequence[str]) -> bytes:
    items = "".join(f"<item jid={quoteattr(jid)}/>" for jid in jids)
    return f'<{name} xmlns="{ns.BLOCKING}">{items}</{name}>'.encode()


def _stamp(when: float) -> str:
    return datetime.fromtimestamp(when, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
