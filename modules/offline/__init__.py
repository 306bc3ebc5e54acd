"""Offline messages (XEP-0160): keep what nobody was online to receive, deliver it at login."""

import asyncio
import random
import secrets
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Annotated, Any, Final

from xmppd.errors import (
    CallRefused,
    CommandError,
    JidError,
    NodeUnreachable,
    StanzaError,
    StorageError,
    StorageUnavailable,
)
from xmppd.events import (
    HANDLED,
    DiscoNodeAsking,
    Handled,
    MessagesFound,
    MessagesFreed,
    MessagesFreeing,
    MessageSpooling,
    MessagesRemoved,
    MessageStored,
    MessageStoring,
    MessageUndeliverable,
    NodeDown,
    NodeSynced,
    NodeUp,
    SessionAppeared,
    SessionArrived,
    SessionBecameAvailable,
    SessionClosed,
    SessionLeft,
    UserExporting,
    UserImporting,
)
from xmppd.module_api import (
    SAFE,
    AccessRules,
    Arg,
    BlockingService,
    Blocklist,
    Chores,
    Context,
    Holder,
    IqRequest,
    Kept,
    Module,
    NoAccount,
    QuotaReached,
    Session,
    between,
    command,
    from_node,
    hook,
    integer,
    iq,
)
from xmppd.protocol import ns
from xmppd.protocol.jid import JID, make, parse
from xmppd.protocol.stanza import Stanza, xml_with_child

from . import moving
from .awaited import Awaited, end
from .flush import RETRY_FIRST, RETRY_LONGEST, Flush, takes
from .retrieval import Retrieval, count_form, nodes
from .rules import EmptyBody, Verdict, bears_our_stamp, delay_in, expiry, judge, repetition_key, sender_of

DEFAULT_QUOTA: Final = 100  # where no rule counts, as in ejabberd
_AT_ONCE: Final = 200  # sessions looked up together
_REMEMBERED: Final = 10.0  # seconds for which it is remembered that a message was stored for somebody
_SAW_LATER: Final = 60.0  # seconds by which another node may have lost sight of this one before this one did of it
_RETRIEVES: Final = "offline"  # in a session's state: it looks through the messages by itself
_PARTED: Final = 100_000  # users with messages of a split, the most that are looked at
_HELD: Final = 20.0  # seconds that messages wait for older ones to be stored, free, or delivered by another node
_HELD_BACK: Final = 50.0  # seconds that they do while the database cannot give these, or another node not store them
_AWAY: Final = 30.0  # seconds since the database was away in which other nodes are asked what they are storing
_LOOKED: Final = 10.0  # seconds that all that comes from a node waits for a look at what it has stored
_SILENT: Final = 8.0  # seconds for what a silent node holds to be taken over: its lease, and a look or two
_STORED_LOOK: Final = 0.02
_WAKE_EVERY: Final = 0.05  # seconds between two words to other nodes about what is stored for one user
_SILENT_LOOK: Final = 0.25  # seconds between two looks
_FETCH: Final = f"{{{ns.OFFLINE}}}fetch"
_PURGE: Final = f"{{{ns.OFFLINE}}}purge"


@dataclass(frozen=True, slots=True)
class Config:
    access_max_user_messages: str = "max_user_offline_messages"  # the rule that says how many a user may have waiting
    max_messages: Annotated[int, between(0, 1_000_000)] | None = None  # for everybody, instead of that rule
    store_empty_body: EmptyBody = "unless_chat_state"  # messages without a body


class Offline(Module[Config]):
    xeps = {13: "1.3", 160: "1.0.1", 203: "2.0", 334: "0.4.0"}
    features = (ns.MSGOFFLINE, ns.OFFLINE)

    def __init__(self, context: Context, config: Config) -> None:
        super().__init__(context, config)
        self._chores = Chores(self.spool, self.log)
        self._flushes: dict[Session, Flush] = {}
        self._retries: dict[
            Session, asyncio.Future[None]
        ] = {}  # done when one has succeeded, or is not wanted any more
        self._retrieval = Retrieval(self.spool, self._blocklist, self._is_here)
        # Messages that are being stored, by bare JID: a login waits for them, or a later message would overtake them.
        self._storing: dict[str, set[asyncio.Future[Any]]] = {}
        self._stopped = False
        self._listens = False  # to sessions that appear
        self._looking: dict[bytes, asyncio.Future[None]] = {}  # nodes that are back: done when users were looked for
        self._parted: set[str] = set()  # users for whom something was stored while a node was down
        self._returning: dict[bytes, dict[str, asyncio.Future[None]]] = {}  # by node: users whose messages wait
        self._awaited = Awaited()
        self._apart_since: dict[bytes, float] = {}  # nodes that are down, or not in step again
        self._woken: dict[str, bool] = {}  # bare JIDs of which other nodes were just told, and whether to tell again
        self._stored_lately: dict[str, float] = {}  # bare JID -> when; the oldest first
        self._retrieving_elsewhere: dict[str, set[bytes]] = {}  # bare JID -> nodes with such a session

    @classmethod
    def check_options(cls, config: Config, access: AccessRules) -> Iterator[str]:
        rule = config.access_max_user_messages
        if config.max_messages is None and not access.has_limit(rule):
            yield f"access_max_user_messages: there is no shaper rule {rule!r}"

    async def start(self) -> None:
        local = self.sessions.local()
        takers = [session for session in local if takes(session) and not self._is_retrieving(session.user)]
        if takers:
            self.spawn(self._catch_up(takers), name="messages from before")

    async def stop(self) -> None:
        self._stopped = True
        for node in list(self._looking):
            self._end_look(node)
        for users in self._returning.values():
            for held in users.values():
                end(held)
        self._awaited.end()

    async def _catch_up(self, takers: list[Session]) -> None:
        """Deliver what was stored while the module did not run, or was just being delivered when it was reloaded."""
        for first in range(0, len(takers), _AT_ONCE):
            some = takers[first : first + _AT_ONCE]
            flushed = await asyncio.gather(*(self._flush(session) for session in some))
            for session, done in zip(some, flushed, strict=True):
                if not done:
                    self._retry(session)

    # -- keeping

    def _quota(self, user: JID) -> int | None:
        """How many messages may wait for a user; past it the sender gets an error."""
        if self.config.max_messages is not None:
            return self.config.max_messages
        return self.access.limit(self.config.access_max_user_messages, DEFAULT_QUOTA, user)

    @hook(MessageUndeliverable, after=("push", "blocking", "privacy"))
    def keep(self, event: MessageUndeliverable) -> Handled | None:
        verdict = judge(event.message, self.config.store_empty_body)
        if verdict is Verdict.REFUSE:
            return None
        if verdict is Verdict.DROP:
            event.outcome.follow(SAFE)
        else:
            event.outcome.follow(self._store(event.user, event.message))
        return HANDLED

    def _store(self, user: JID, message: Stanza) -> "asyncio.Future[None]":
        """One row in the group commit; the future ends as the sender's stanza does. Raises StorageUnavailable."""
        now = self.clock()
        # A copy of something that was stored already must not be taken for its repetition: that row is going away. So
        # is that of a message that waited for a session on another node, as soon as the message is safe here.
        replayed = bears_our_stamp(message)
        key = None if message.moved or replayed else repetition_key(message, user)
        storing = MessageStoring(user, message, expires_at=expiry(message, now), replayed=replayed)
        self.tell_at_once(storing)
        stored = self.spool.keep(
            user.domain,
            user.local,
            sender_of(message),
            self._stamped(message, user, now),
            dedup=key,
            quota=self._quota(user),
            expires_at=storing.expires_at,
            place=message.place,
            for_account=True,
            also=storing.rows,
        )
        kept: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._storing.setdefault(user.bare, set()).add(kept)
        self._listen(user)
        stored.add_done_callback(partial(self._stored, storing, kept))
        return kept

    @staticmethod
    def _stamped(message: Stanza, user: JID, now: float) -> bytes:
        second, millis = divmod(int(now * 1000), 1000)
        return xml_with_child(message, delay_in(second, user.domain) % millis)

    def _no_longer_storing(self, user: JID, kept: "asyncio.Future[Any]") -> None:
        waiting = self._storing[user.bare]
        waiting.discard(kept)
        if not waiting:
            del self._storing[user.bare]

    def _stored(self, storing: MessageStoring, kept: "asyncio.Future[None]", stored: "asyncio.Future[Kept]") -> None:
        user = storing.user
        self._no_longer_storing(user, kept)
        if stored.cancelled():
            kept.cancel()
            return
        error = stored.exception()
        if error is None:
            kept.set_result(None)
            repeated = stored.result() is Kept.DUPLICATE
            self.tell_at_once(MessageStored(user, storing.message, repeated, storing.replayed))
            self._remember(user)
            self._wake(user)
        elif isinstance(error, NoAccount):
            kept.set_exception(StanzaError("service-unavailable"))
        elif isinstance(error, QuotaReached):
            kept.set_exception(StanzaError("resource-constraint", "too many offline messages wait for this user"))
        else:
            kept.set_exception(error)

    @hook(MessageSpooling)
    def keep_unacknowledged(self, event: MessageSpooling) -> None:
        """A session holds it until its client has acknowledged it, or the session ends."""
        message = event.message
        event.keep = judge(message, self.config.store_empty_body) is Verdict.KEEP
        if event.keep:
            now = self.clock()
            event.stanza = self._stamped(message, event.user, now)
            event.dedup = None if bears_our_stamp(message) else repetition_key(message, event.user)
            event.expires_at = expiry(message, now)

    @hook(MessagesFreeing)
    def await_free(self, event: MessagesFreeing) -> None:
        """As if they were being stored: a login waits for them, and other sessions get them."""
        self._listen(event.user)
        self._comes_first(event.user, event.done)
        # What is written from here on is behind them.
        if not self.sessions.is_available(event.user):
            return
        until = _at_most(event.done)
        takers = self._takers(event.user)
        for session in takers:
            session.hold_messages(until)
        if not takers:
            self.sessions.hold_messages(event.user, until)

    def _comes_first(self, user: JID, done: "asyncio.Future[None]") -> None:
        """What is about to be free: nobody is sent what was stored behind it."""
        self._storing.setdefault(user.bare, set()).add(done)
        done.add_done_callback(partial(self._freed, user))
        self._bar(user)

    def _bar(self, user: JID) -> None:
        """What comes first is not there yet: what runs begins anew when it is."""
        for session in self.sessions.sessions(user):
            if (flush := self._flushes.get(session)) is not None:
                flush.again = flush.barred = True

    def _freed(self, user: JID, done: "asyncio.Future[None]") -> None:
        self._no_longer_storing(user, done)
        self.tell_at_once(MessagesFreed(user))
        self._remember(user)
        self._wake(user)

    def _release(self, user: JID, ids: Iterable[bytes], holder: Holder) -> None:
        """They did not arrive. Until they are free nobody is sent what was stored behind them."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._comes_first(user, done)
        self._chores.release(ids, holder, lambda: end(done))

    @hook(MessagesFound)
    def deliver_found(self, event: MessagesFound) -> None:
        self._wake(event.user)

    # -- moving between servers

    @hook(UserExporting)
    async def write_out(self, event: UserExporting) -> None:
        if found := await moving.write_out(self.spool, event.user):
            event.parts.append(found)

    @hook(UserImporting)
    async def take_up(self, event: UserImporting) -> Handled | None:
        if event.element.tag != moving.MESSAGES:
            return None
        user = event.user
        messages = list(moving.messages_in(event.element, user, self.clock(), event.problems))
        event.count = await moving.take_up(self.spool, user, messages)
        if event.count:
            self._remember(user)
            self._wake(user)
        return HANDLED

    # -- delivering

    @hook(SessionBecameAvailable, after=("presence", "roster"))
    async def flush(self, event: SessionBecameAvailable) -> None:
        if event.priority < 0 or (event.old_priority is not None and event.old_priority >= 0):
            return
        if event.session.anonymous or self._is_retrieving(event.session.user):
            return  # nothing was kept, or the client looks through it by itself
        if not await self._flush(event.session):
            self._retry(event.session)

    @hook(SessionClosed)
    def session_closed(self, event: SessionClosed) -> None:
        flush, user = self._flushes.get(event.session), event.session.user
        if flush is not None and flush.ended not in self._storing.get(user.bare, ()):  # it may have left before
            flush.end()
            # What it is just taking it gives back: that comes before what others take.
            self._storing.setdefault(user.bare, set()).add(flush.ended)
            flush.ended.add_done_callback(partial(self._no_longer_storing, user))
        if _RETRIEVES in event.session.state:
            if not any(_RETRIEVES in session.state for session in self.sessions.sessions(user)):
                self.nodes.cast("retrieves", [user.bare, False])
            self._wake(user)  # what it has left goes to those who have not asked

    @hook(SessionLeft)
    def pass_on(self, event: SessionLeft) -> None:
        session = event.session
        luggage = {"retrieves": _RETRIEVES in session.state, "node": self.owner.member.hex()}
        event.luggage[self.name] = {**luggage, "behind": session.holds_messages or session in self._flushes}
        self.session_closed(SessionClosed(event.session, last=False))

    @hook(SessionArrived)
    def take(self, event: SessionArrived) -> None:
        session, luggage = event.session, event.luggage.get(self.name, {})
        if luggage.get("retrieves"):
            session.state[_RETRIEVES] = True
            self.nodes.cast("retrieves", [session.user.bare, True])
        elif session.priority is not None and session.priority >= 0 and not self._is_retrieving(session.user):
            if luggage.get("behind"):
                # The other node was in the midst of it. What it has sent to the client comes first, then what is left.
                flushed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                session.hold_messages(_at_most(flushed, _HELD_BACK))
                self.spawn(self._go_on(session, bytes.fromhex(luggage["node"]), flushed), name="offline flush goes on")
            else:
                self._retry(session, hold=False)

    async def _go_on(self, session: Session, node: bytes, flushed: "asyncio.Future[None]") -> None:
        try:
            await self.nodes.call(node, "stored", session.jid.full, timeout=_HELD_BACK)
        except (NodeUnreachable, CallRefused) as exc:
            self.log.debug("messages that are being stored not waited for", error=exc)
        await self._flush_woken(session, flushed)

    @from_node("stored")
    async def until_stored(self, node: bytes, jid: str) -> None:
        """A session has gone there: answer when what is being stored here for its user, or freed, is there for others,
        and its row no longer says that it is here."""
        session, give_up = parse(jid), time.monotonic() + _HELD_BACK
        storing = self._is_storing(session)
        while storing and time.monotonic() < give_up:
            await asyncio.sleep(_STORED_LOOK)
            storing = self._is_storing(session)

    def _is_storing(self, jid: JID) -> bool:
        user = jid.bare
        return (
            user in self._storing
            or self.spool.is_giving_back(jid.domain, jid.local)
            or any(session.user.bare == user and not flush.takes for session, flush in self._flushes.items())
            or any(session.jid == jid for session in self.sessions.sessions(jid))
        )

    async def _flush(self, session: Session) -> bool:
        """Send what is kept for the user; False when the database could not give it."""
        flush = self._flushes.get(session)
        if flush is not None:
            flush.again = True
            return await asyncio.shield(flush.ended)  # what comes from here on is behind all of it
        holder = Holder(self.owner.member, self.owner.incarnation, secrets.token_hex(8))
        self._flushes[session] = flush = Flush(
            session, holder, self.spool, self._chores, self.log, self._blocklist, partial(self._release, session.user)
        )
        done, user = False, session.user.bare
        try:
            if self.spool.was_away(_AWAY):
                # Others may still have much to store, of sessions that have ended there meanwhile.
                await self.nodes.call_all("stored", session.jid.full, timeout=_HELD)
            while flush.again and flush.takes:
                flush.again = flush.barred = False
                if waiting := [*self._storing.get(user, ()), *self._awaited.being_stored(user)]:
                    _, late = await asyncio.wait(waiting, timeout=_HELD)
                    if late:
                        raise StorageUnavailable("older messages are not stored or free yet")
                await flush.run(await self._until_taken_over(flush, session.user))
            done = True
        except StorageError as exc:
            self.log.warning("offline messages wait", user=session.user, error=exc)
        finally:
            del self._flushes[session]
            flush.ended.set_result(done)
        return done

    async def _until_taken_over(self, flush: Flush, user: JID) -> frozenset[bytes | None] | None:
        """The holders of what there is; None where that is out of date.

        What a node holds that has died comes before what is stored now, and will be free when its lease has ended:
        seconds in which new messages wait too; likewise what another one holds of a session that has ended there. One
        that is only cut off keeps it, and is not waited for any longer."""
        give_up = time.monotonic() + _SILENT
        silent: set[bytes] = set()
        while flush.takes and time.monotonic() < give_up:
            holders = await self.spool.holders(user.domain, user.local)
            leaving = {holder for holder in holders if holder is not None and self._is_leaving(holder, user)}
            if not leaving:
                return holders
            if died := {holder for holder in leaving - silent if self.spool.standing.is_silent(holder)}:
                silent |= died
                give_up = time.monotonic() + _SILENT  # its lease ends later than it has died
            await asyncio.sleep(_SILENT_LOOK)
        return None

    def _is_leaving(self, holder: bytes, user: JID) -> bool:
        """Whether what a node holds will be free soon: it has died, or has no session of the user any more."""
        if holder == self.owner.member:
            return False
        if self.spool.standing.is_silent(holder):
            return True
        # Not `nodes.of`: a session there may have been bound anew elsewhere, and not know it yet.
        return all(resource.node != holder for resource in self.sessions.resources(user))

    def _wake(self, user: JID) -> None:
        """No message waits in the spool while its recipient is available: it may have become so meanwhile."""
        if not self.sessions.is_available(user) or self._is_retrieving(user):
            return
        takers = self._takers(user)
        if not takers:
            self._wake_elsewhere(user)
            return
        session = max(takers, key=lambda taker: taker.priority or 0)
        flush = self._flushes.get(session)
        if flush is not None:
            if not flush.again:
                flush.again = True
                session.hold_messages(flush.ended)
            return
        flushed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        session.hold_messages(flushed)  # what was stored was written before them
        self.spawn(self._flush_woken(session, flushed), name=f"offline flush {session.jid}")

    def _wake_elsewhere(self, user: JID) -> None:
        """Now, and once more a little later if more was stored meanwhile."""
        if user.bare in self._woken:
            self._woken[user.bare] = True
            return
        self._woken[user.bare] = False
        self.nodes.cast("wake", user.full, self.nodes.of(user))
        asyncio.get_running_loop().call_later(_WAKE_EVERY, self._wake_again, user)

    def _wake_again(self, user: JID) -> None:
        if self._woken.pop(user.bare) and not self._stopped:
            self._wake(user)

    async def _flush_woken(self, session: Session, flushed: "asyncio.Future[None]") -> None:
        try:
            done = await self._flush(session)
        finally:
            end(flushed)
        if not done:
            self._retry(session)

    # -- users who are on other nodes

    def _remember(self, user: JID) -> None:
        """They may just have become available on another node that looked before this was stored, while that node's
        word of it is still on its way."""
        if self.nodes.others:
            self._stored_lately.pop(user.bare, None)
            self._stored_lately[user.bare] = self.clock()

    def _listen(self, user: JID) -> None:
        """Something is being stored for them: hear of it if they appear elsewhere."""
        if self._apart_since and len(self._parted) < _PARTED:
            self._parted.add(user.bare)
        if not self._listens and (self.nodes.others or self._apart_since):
            self._listens = True
            self.switch(SessionAppeared, True)
            asyncio.get_running_loop().call_later(_REMEMBERED, self._forget_old)

    def _forget_old(self) -> None:
        if self._stopped:
            return  # the handlers are another one's now
        before = self.clock() - _REMEMBERED
        while self._stored_lately and next(iter(self._stored_lately.values())) <= before:
            del self._stored_lately[next(iter(self._stored_lately))]
        if self._stored_lately or self._parted or self._storing:
            asyncio.get_running_loop().call_later(_REMEMBERED / 2, self._forget_old)
        else:
            self._listens = False
            self.switch(SessionAppeared, False)

    @hook(SessionAppeared, switched=True)
    def poke(self, event: SessionAppeared) -> None:
        """Its node looks again. What is stored comes before what is written from here on, on whatever node: that waits
        until the other node has delivered what there is."""
        user = event.user.bare
        if user in self._parted or user in self._storing:
            self._parted.discard(user)
            if not self._returning.setdefault(event.node, {}):
                self.spawn(self._let_flush(event.node), name="messages from before a split")
            held = self._returning[event.node].setdefault(user, asyncio.get_running_loop().create_future())
            self.sessions.hold_messages(event.user, held)
            self.nodes.cast("storing", user, (event.node,))
        elif user in self._stored_lately:
            self.nodes.cast("wake", user, (event.node,))

    async def _let_flush(self, node: bytes) -> None:
        await asyncio.sleep(0)  # with all the others that come now
        while users := self._returning.get(node):
            some = dict(islice(users.items(), _AT_ONCE))
            try:
                storing = [one for user in some for one in self._storing.get(user, ())]
                if storing:
                    await asyncio.wait(storing, timeout=_HELD_BACK)
                await self.nodes.call(node, "flush", list(some), timeout=_HELD)
            except (NodeUnreachable, CallRefused) as exc:
                self.log.debug("messages from before a split not flushed", error=exc)
            finally:
                for user, held in some.items():
                    del users[user]
                    end(held)
                self.nodes.cast("flushed", list(some), (node,))
        self._returning.pop(node, None)

    @from_node("storing")
    def await_stored(self, node: bytes, user: str) -> None:
        """That node says when it has had what is stored there for a user flushed here, or waits no longer."""
        flushed = self._awaited.begin(node, user)
        if flushed is not None:
            jid = parse(user)
            self._bar(jid)
            for session in self._takers(jid):
                session.hold_messages(_at_most(flushed, _HELD_BACK))

    @from_node("flushed")
    def await_no_more(self, node: bytes, users: list[str]) -> None:
        """New messages need not wait for what that node has stored."""
        self._awaited.flushed(node, users)

    @from_node("flush")
    async def flush_now(self, node: bytes, users: list[str]) -> None:
        """Deliver what is stored for users who are here, and answer when that is done."""
        self._awaited.stored(node, users)
        await asyncio.gather(*(self._flush_whole(parse(user)) for user in users))

    async def _flush_whole(self, user: JID) -> None:
        takers = self._takers(user)
        if not takers or self._is_retrieving(user):
            return
        session = max(takers, key=lambda taker: taker.priority or 0)
        if not await self._flush(session):
            self._retry(session)

    @hook(NodeDown)
    def note_parting(self, event: NodeDown) -> None:
        self._apart_since.setdefault(event.node, self.clock())
        self._end_look(event.node)
        self._awaited.flushed(event.node)

    @hook(NodeUp)
    def hold_back(self, event: NodeUp) -> None:
        """Whoever sends from there may have been elsewhere before: what was stored there while this node was not seen
        comes first, so users are woken before anything arrives."""
        self._end_look(event.node)
        self._looking[event.node] = looked = asyncio.get_running_loop().create_future()
        self.sessions.hold_arrivals(event.node, _at_most(looked, _LOOKED))

    def _end_look(self, node: bytes) -> None:
        looked = self._looking.pop(node, None)
        if looked is not None:
            end(looked)

    @hook(NodeSynced)
    def look_for_stored(self, event: NodeSynced) -> None:
        """While that node did not see who is here, it stored what came for them there; for what is stored from here on
        they are woken."""
        since = self._apart_since.pop(event.node, self.server.started_at) - _SAW_LATER
        if not self._apart_since:
            self._parted.clear()  # those that were not back yet have gone
        self.spawn(self._look(event.node, since), name="offline messages of a split")

    async def _look(self, node: bytes, since: float) -> None:
        looked = self._looking.get(node)
        try:
            await self._wake_all(since)
        finally:
            if self._looking.get(node) is looked:
                self._end_look(node)

    async def _wake_all(self, since: float) -> None:
        pause = RETRY_FIRST
        while True:
            try:
                users = await self.spool.freed_since(since, limit=_PARTED)
                break
            except StorageError as exc:
                self.log.warning("offline messages wait", user="*", error=exc)
            await asyncio.sleep(pause)
            pause = min(pause * 2, RETRY_LONGEST)
        for count, (host, username) in enumerate(users, 1):
            user = make(username, host)
            if self._takers(user):
                self._wake(user)
            if count % _AT_ONCE == 0:
                await asyncio.sleep(0)

    @from_node("wake")
    def wake(self, node: bytes, user: str) -> None:
        """Something was stored for a user who is here."""
        jid = parse(user)
        if self._takers(jid):
            self._wake(jid)

    @from_node("retrieves")
    def note_retrieving(self, node: bytes, news: list[Any]) -> None:
        """A session on that node looks for itself, or no longer."""
        user, on = news
        nodes = self._retrieving_elsewhere.setdefault(user, set())
        (nodes.add if on else nodes.discard)(node)
        if not nodes:
            del self._retrieving_elsewhere[user]

    def _takers(self, user: JID) -> list[Session]:
        return [session for session in self.sessions.sessions(user) if takes(session)]

    def _retry(self, session: Session, *, hold: bool = True) -> None:
        """Again and again until the database can. What is written to them meanwhile waits, for a while."""
        running = self._retries.get(session)
        flushed: asyncio.Future[None] = running or asyncio.get_running_loop().create_future()
        if hold:
            session.hold_messages(_at_most(flushed, _HELD_BACK))

        if running is not None:
            return
        self._retries[session] = flushed

        async def retry() -> None:
            wait = RETRY_FIRST
            try:
                while True:
                    await asyncio.sleep(wait * random.uniform(0.3, 1.0))
                    if not takes(session) or self._is_retrieving(session.user):
                        return
                    if await self._flush(session):
                        return
                    wait = min(wait * 2, RETRY_LONGEST)
            finally:
                del self._retries[session]
                end(flushed)

        self.spawn(retry(), name=f"offline flush {session.jid}")

    async def _blocklist(self, user: JID) -> Blocklist | None:
        """Whom a user blocks; None: the server does not know blocking. StorageUnavailable."""
        try:
            service: BlockingService = self.service(BlockingService)  # type: ignore[type-abstract]
        except LookupError:
            return None
        known = service.cached(user)
        return await service.blocklist(user) if known is None else known

    # -- looking through them (XEP-0013)

    @hook(DiscoNodeAsking)
    async def describe(self, event: DiscoNodeAsking) -> Handled | None:
        """How many there are, or what is known of each."""
        user = event.target
        if event.node != ns.OFFLINE or not user.local:
            return None
        if event.asker.bare != user.bare:
            raise StanzaError("forbidden", "offline messages are their recipient's alone")
        self._retrieving_session(event.asker)
        if event.kind == "info":
            event.answer = count_form(await self.spool.count(user.domain, user.local))
        else:
            event.answer = await self._retrieval.headers(user)
        return HANDLED

    @iq("get", ns.OFFLINE, "offline")
    async def show(self, request: IqRequest) -> None:
        """Some (`view`), or all (`fetch`)."""
        session = self._asking(request)
        if request.payload.find(_FETCH) is not None:
            await self._retrieval.fetch(session)
            return
        ids = nodes(request.payload, "view")
        if not ids:
            raise StanzaError("bad-request", "which messages?")
        await self._retrieval.view(session, ids)

    @iq("set", ns.OFFLINE, "offline")
    async def drop(self, request: IqRequest) -> None:
        """Some (`remove`), or all (`purge`)."""
        self._asking(request)
        user = request.target
        if request.payload.find(_PURGE) is not None:
            await self.spool.purge(user.domain, user.local)
            await self.tell(MessagesRemoved(user, None))
            return
        ids = nodes(request.payload, "remove")
        if not ids:
            raise StanzaError("bad-request", "which messages?")
        found = await self.spool.find(user.domain, user.local, ids)
        if not await self.spool.remove(user.domain, user.local, ids):
            raise StanzaError("item-not-found", "there is no such message")
        await self.tell(MessagesRemoved(user, tuple(Stanza.from_bytes(row.stanza) for row in found)))

    def _asking(self, request: IqRequest) -> Session:
        if not request.is_own:
            raise StanzaError("forbidden", "offline messages are their recipient's alone")
        session = self._retrieving_session(request.sender)
        if session is None:
            raise StanzaError("unexpected-request", "the session has ended")
        return session

    def _retrieving_session(self, jid: JID) -> Session | None:
        """The session that asks. One that has not been sent them yet will not be: it looks for itself."""
        for session in self.sessions.sessions(jid):
            if session.jid == jid:
                if session.priority is None or session.priority < 0:
                    session.state[_RETRIEVES] = True
                    self.nodes.cast("retrieves", [session.user.bare, True])
                return session
        return None

    def _is_retrieving(self, user: JID) -> bool:
        """XEP-0013 2.2: while one of the user's sessions looks for itself, none is sent them."""
        if any(_RETRIEVES in session.state for session in self.sessions.sessions(user)):
            return True
        elsewhere = self._retrieving_elsewhere.get(user.bare)
        return elsewhere is not None and not elsewhere.isdisjoint(self.nodes.of(user))

    def _is_here(self, session: Session) -> bool:
        return any(session is other for other in self.sessions.sessions(session.user))

    # -- for operators

    @command(
        "get_offline_count",
        args=(Arg("user"), Arg("host")),
        result=integer("value"),
        tags=("offline",),
        scope="shared",
        doc="Get the number of unread offline messages",
        reads=True,
    )
    async def get_offline_count(self, user: str, host: str) -> int:
        try:
            jid = make(user, host)
        except JidError as exc:
            raise CommandError(str(exc)) from exc
        if jid.domain not in self.server.hosts:
            raise CommandError("Unknown virtual host")
        return await self.spool.count(jid.domain, jid.local)


def _at_most(done: "asyncio.Future[None]", seconds: float = _HELD) -> "asyncio.Future[None]":
    """Done when that is, or after a while: people who are online chat on while the database is away."""
    loop = asyncio.get_running_loop()
    until: asyncio.Future[None] = loop.create_future()

    timer = loop.call_later(seconds, end, until)

    def is_done(done: "asyncio.Future[None]") -> None:
        timer.cancel()
        end(until)

    done.add_done_callback(is_done)
    return until
