"""The rosters of the users who have a session on this node.

Everything that loads or changes a user's roster on this node happens in that user's turn, one after the other: what is
kept is then what the last of them left. What other nodes do comes in by `invalidate`.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from weakref import WeakValueDictionary

from xmppd.module_api import Session
from xmppd.protocol.jid import JID

from .items import Item
from .store import Change, Loaded


class Kept:
    """One roster. `stale`: it may lack something, and is loaded again before it is shown."""

    __slots__ = ("items", "stale", "version")

    def __init__(self, loaded: Loaded) -> None:
        self.items: dict[str, Item] = loaded.items
        self.version = loaded.version
        self.stale = False


class Rosters:
    """Kept from a user's first session here to the end of the last one."""

    def __init__(self, load: Callable[[JID], Awaitable[Loaded]], sessions: Callable[[JID], Sequence[Session]]) -> None:
        self._load = load
        self._sessions = sessions
        self._kept: dict[str, Kept] = {}
        self._loading: set[str] = set()  # and not invalidated since the query began
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def __len__(self) -> int:
        return len(self._kept)

    def turn(self, user: JID) -> asyncio.Lock:
        """Held by whoever works on this user's roster; those who wait get it in the order they came."""
        lock = self._turns.get(user.bare)
        if lock is None:
            lock = self._turns[user.bare] = asyncio.Lock()
        return lock

    def cached(self, user: JID) -> Kept | None:
        """What is kept, without waiting; it may be stale."""
        return self._kept.get(user.bare)

    async def get(self, user: JID) -> Kept:
        """A roster that is not stale; StorageUnavailable. Not to be called in the user's turn."""
        kept = self._kept.get(user.bare)
        if kept is not None and not kept.stale:
            return kept
        async with self.turn(user):
            kept = self._kept.get(user.bare)
            if kept is not None and not kept.stale:
                return kept
            return await self._fill(user)

    async def _fill(self, user: JID) -> Kept:
        self._loading.add(user.bare)
        try:
            fresh = Kept(await self._load(user))
            fresh.stale = user.bare not in self._loading
        finally:
            self._loading.discard(user.bare)
        if self._sessions(user):  # the last one may have ended meanwhile
            self._kept[user.bare] = fresh
        return fresh

    def apply(self, user: JID, change: Change) -> None:
        """Take over what a transaction of this node has committed."""
        kept = self._kept.get(user.bare)
        if kept is None or not change.changed:
            return
        if change.after is None:
            kept.items.pop(change.jid.full, None)
        else:
            kept.items[change.jid.full] = change.after
        if kept.version != change.old_version:
            kept.stale = True  # another node has changed it in between
        kept.version = change.version

    def learn(self, user: JID, change: Change) -> bool:
        """Take over what another node has committed; False: what is kept, or being loaded, has to be loaded again."""
        loading = user.bare in self._loading
        self._loading.discard(user.bare)
        kept = self._kept.get(user.bare)
        if kept is None:
            return not loading
        if loading or kept.stale or kept.version != change.old_version:
            kept.stale = True
            return False
        self.apply(user, change)
        return True

    def invalidate(self, user: JID) -> None:
        """The database may have something newer: another node said so, or the end of a transaction is not known."""
        self._loading.discard(user.bare)
        kept = self._kept.get(user.bare)
        if kept is not None:
            kept.stale = True

    def leave(self, user: JID) -> None:
        """A session has ended."""
        if not self._sessions(user):
            self._kept.pop(user.bare, None)

    def drop(self, user: JID) -> None:
        """The account is gone."""
        self._kept.pop(user.bare, None)
