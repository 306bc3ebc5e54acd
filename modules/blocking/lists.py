"""The block lists of the users who have a session on this node.

Everything that loads or changes a user's list on this node happens in that user's turn. What other nodes do comes in by
`widen` and `invalidate`; until the list is loaded again, the one that is known stays in force.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from weakref import WeakValueDictionary

from xmppd.module_api import Session
from xmppd.protocol.jid import JID

from .rules import BlockedJids


class Lists:
    """Kept from a user's first session here to the end of the last one. `changed` is called when one is kept anew."""

    def __init__(
        self,
        load: Callable[[JID], Awaitable[frozenset[str]]],
        sessions: Callable[[JID], Sequence[Session]],
        changed: Callable[[JID], None],
    ) -> None:
        self._load = load
        self._sessions = sessions
        self._changed = changed
        self._kept: dict[str, BlockedJids] = {}
        self._stale: set[str] = set()
        self._doubted: set[str] = set()  # invalidated since the last look-up began
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def turn(self, user: JID) -> asyncio.Lock:
        """Held by whoever works on this user's list."""
        lock = self._turns.get(user.bare)
        if lock is None:
            lock = self._turns[user.bare] = asyncio.Lock()
        return lock

    def cached(self, user: JID) -> BlockedJids | None:
        """Without waiting; None: not known."""
        return self._kept.get(user.bare)

    async def get(self, user: JID) -> BlockedJids:
        """The list of any account, as new as we know of; StorageUnavailable."""
        if not self._sessions(user):
            # Nothing is kept of it, so nothing can be wrong; and those who ask at once share a look-up.
            return BlockedJids(user, await self._load(user))
        kept = self._fresh(user)
        if kept is not None:
            return kept
        async with self.turn(user):
            kept = self._fresh(user)
            return await self._fill(user) if kept is None else kept

    def _fresh(self, user: JID) -> BlockedJids | None:
        return None if user.bare in self._stale else self._kept.get(user.bare)

    async def _fill(self, user: JID) -> BlockedJids:
        self._doubted.discard(user.bare)
        items = await self._load(user)
        if user.bare not in self._doubted:  # else it is still stale
            self._stale.discard(user.bare)
        return self.keep(user, items)

    def keep(self, user: JID, items: frozenset[str]) -> BlockedJids:
        """Take over what the database has; to be called in the user's turn."""
        fresh = BlockedJids(user, items)
        if self._sessions(user):  # the last one may have ended meanwhile
            self._kept[user.bare] = fresh
            self._changed(user)
        return fresh

    def widen(self, user: JID, items: frozenset[str]) -> None:
        """Another node has added these: they are in force at once, whatever else has changed."""
        kept = self._kept.get(user.bare)
        if kept is not None:
            self._kept[user.bare] = BlockedJids(user, kept.items | items)
            self._changed(user)

    def invalidate(self, user: JID) -> None:
        """The database may have something newer: another node said so, or the end of a transaction is not known."""
        if self._sessions(user):
            self._stale.add(user.bare)
            self._doubted.add(user.bare)

    def leave(self, user: JID) -> None:
        """A session has ended."""
        if not self._sessions(user):
            self.drop(user)

    def drop(self, user: JID) -> None:
        """Nothing is known any more."""
        self._kept.pop(user.bare, None)
        self._stale.discard(user.bare)
        self._doubted.discard(user.bare)
