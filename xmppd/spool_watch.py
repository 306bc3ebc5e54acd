"""What is done about the spool once a second by each node of a cluster: rows of the dead are taken over, and users who
are available here are not left waiting for what is stored for them.

Tables between nodes lag a little, so a node may store a message for somebody who has just become available on another
one. The nodes tell each other; this look at the database is for what that misses.

While a member of the cluster is not seen, by this node or another one, and until what was stored meanwhile has been
found, whoever binds a resource or brings their session along may come from where what they have written was stored for
somebody whom that node did not see: it comes before what they write next, so they wait for such a look. What such a
node still holds of it cannot be had before it is free: what is new for those users waits for that, for a while. So a
node that does not see all the others holds nothing for sessions without a stream: their clients may be elsewhere.
"""

import asyncio
import random
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Final

from xmppd.cluster.cluster import Cluster
from xmppd.errors import JidError, StorageError
from xmppd.events import MessagesFound, MessagesTakenOver, NodeDown, NodeUp, SessionBound
from xmppd.hooks import Hooks
from xmppd.log import get_logger
from xmppd.protocol.jid import JID, make
from xmppd.spool import Spool

_PERIOD: Final = 1.0  # seconds
_OVERLAP: Final = 10.0  # seconds a commit may take to show, and a clock may be behind; what differs more is known
_AT_ONCE: Final = 200  # users between two turns of the others
_SHARED: Final = 0.02  # seconds in which all who come share a look
_PATIENCE: Final = 2.0  # seconds that a login waits for it
_HELD: Final = (
    10.0  # seconds that new messages wait for what a node holds that is not seen: its lease, and a look or two
)
_HELD_LOOK: Final = 0.25
_OWNER: Final = "spool watch"  # of hooks
log = get_logger("spool")


class Place:
    """This node among those that use the database. Fulfils spool.Standing."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def holds_lease(self) -> bool:
        """By the clock of the process, which goes on while it is frozen."""
        return self._cluster.holds_lease

    def is_silent(self, member: bytes) -> bool:
        cluster = self._cluster
        return member != cluster.me.node and member not in cluster.links.peers and cluster.membership.is_member(member)

    def sees_all(self) -> bool:
        return not self.unseen()

    def unseen(self) -> set[bytes]:
        """The other members that are not up, as seen from here or by one that is."""
        return self._cluster.links.unseen(each.node for each in self._cluster.membership.others)


class SpoolWatch:
    """One per node. `is_here` tells whether a user (a bare JID) has a session on this node that takes messages; `hold`
    has messages for a user wait who `is_available` anywhere; `set_aside` leaves what waits for sessions without a
    stream to whoever comes."""

    def __init__(
        self,
        spool: Spool,
        cluster: Cluster,
        place: Place,
        hooks: Hooks,
        is_here: Callable[[JID], bool],
        spawn: Callable[..., Any],
        clock: Callable[[], float] = time.time,
        *,
        is_available: Callable[[JID], bool],
        hold: "Callable[[JID, asyncio.Future[None]], None]",
        set_aside: Callable[[], None],
    ) -> None:
        self._spool = spool
        self._cluster = cluster
        self._place = place
        self._hooks = hooks
        self._is_here = is_here
        self._spawn = spawn
        self._clock = clock
        self._since = clock()  # what was stored before has been seen, but for the overlap
        self._is_available = is_available
        self._hold = hold
        self._set_aside = set_aside
        self._sharing: asyncio.Future[None] | None = None  # a look that has not begun
        self._senders: set[str] = set()  # for whom it will be
        self._held: set[str] = set()  # users whose messages wait
        self._listens = False  # to logins
        self.looks = 0
        self._owing = True  # no look has succeeded since all members were seen
        hooks.add(_OWNER, NodeDown, self._parted)
        hooks.add(_OWNER, NodeUp, self._met)

    async def run(self) -> None:
        """Until it is cancelled."""
        away = False
        while True:
            self._listen()
            if not self._place.sees_all():
                self._set_aside()
            await asyncio.sleep(_PERIOD * random.uniform(0.8, 1.2))  # not all nodes at once
            if not self._cluster.joined or not self._cluster.holds_lease:
                continue
            try:
                await self.look()
            except StorageError as exc:
                if not away:
                    log.warning("spool cannot be looked at", error=exc)
                away = True
            except Exception as exc:
                log.error("look at the spool failed", exc=exc)
            else:
                away = False

    async def look(self) -> None:
        """Once. Raises StorageError."""
        began, whole = self._clock(), self._place.sees_all()
        taken = await self._spool.take_over(self._cluster.me.node)
        if taken and (told := self._hooks.notify(MessagesTakenOver(taken))) is not None:
            await told
        await self._find()
        self._since = began
        if whole and self._place.sees_all():
            self._owing = False

    async def _find(self, *, everywhere: bool = False) -> None:
        """Those who have something new, and are here or, if that is asked for, anywhere."""
        skew = max((abs(each) for each in self._cluster.skews.values()), default=0.0)
        users = await self._spool.freed_since(self._since - _OVERLAP - skew)
        self.looks += 1
        for count, (host, username) in enumerate(users, 1):
            try:
                user = make(username, host)
            except JidError:
                continue
            if everywhere or self._is_here(user):
                self._hooks.notify_aside(MessagesFound(user), self._spawn, name="messages found")
            if count % _AT_ONCE == 0:
                await asyncio.sleep(0)

    # -- logins

    def _parted(self, event: NodeDown) -> None:
        self._owing = True
        self._listen()
        self._set_aside()

    def _met(self, event: NodeUp) -> None:
        """It may have been started a moment ago, and not see all the others yet."""
        self._owing = True
        self._listen()

    def _listen(self) -> None:
        """While a member is not seen, and until what was stored meanwhile has been; a login costs nothing otherwise."""
        wanted = self._cluster.joined and (self._owing or not self._place.sees_all())
        if wanted != self._listens:
            self._listens = wanted
            if wanted:
                self._hooks.add(_OWNER, SessionBound, self._look_first)
            else:
                self._hooks.remove(_OWNER, SessionBound)

    async def _look_first(self, event: SessionBound) -> None:
        await self._shared(event.session.user)

    def look_first(self, user: JID) -> Coroutine[Any, Any, None] | None:
        """For a session that comes from another node: what its client has written there may be stored. None: nothing
        has to be waited for."""
        return self._shared(user) if self._listens else None

    async def _shared(self, user: JID) -> None:
        self._senders.add(user.bare)
        sharing = self._sharing
        if sharing is None:
            sharing = self._sharing = asyncio.get_running_loop().create_future()
            self._spawn(self._shared_look(sharing), name="look at the spool")
        await asyncio.wait((sharing,), timeout=_PATIENCE)

    async def _shared_look(self, sharing: "asyncio.Future[None]") -> None:
        try:
            await asyncio.sleep(_SHARED)
            self._sharing = None
            senders, self._senders = self._senders, set()
            await self._find_held(senders)
            await self._find(everywhere=True)
        except StorageError as exc:
            log.debug("nothing known of stored messages at a login", error=exc)
        finally:
            if self._sharing is sharing:
                self._sharing = None
            sharing.set_result(None)

    async def _find_held(self, senders: set[str]) -> None:
        """What they have written that a node holds which is not seen by all."""
        unseen = self._place.unseen()
        if not unseen:
            return
        holders: dict[JID, set[bytes]] = {}
        for (host, username), member in await self._spool.held_from(senders, unseen):
            with suppress(JidError):
                holders.setdefault(make(username, host), set()).add(member)
        for user, members in holders.items():
            if user.bare not in self._held and self._is_available(user):
                self._held.add(user.bare)
                until: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                self._hold(user, until)
                self._spawn(self._until_free(user, members, until), name="messages that an unseen node holds")

    async def _until_free(self, user: JID, members: set[bytes], until: "asyncio.Future[None]") -> None:
        give_up = time.monotonic() + _HELD
        try:
            holding = await self._spool.holders(user.domain, user.local)
            while members & holding and time.monotonic() < give_up:
                await asyncio.sleep(_HELD_LOOK)
                holding = await self._spool.holders(user.domain, user.local)
            self._hooks.notify_aside(MessagesFound(user), self._spawn, name="messages found")
        except StorageError as exc:
            log.debug("messages that an unseen node holds not waited for", user=user.bare, error=exc)
        finally:
            self._held.discard(user.bare)
            until.set_result(None)
