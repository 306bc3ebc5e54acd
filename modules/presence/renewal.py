"""After a split: this node's people are shown once more to those on the node that is back.

The node of a session sends its presence, as always; so what it says now cannot be overtaken by what it said before.
Each presence crosses once, with the names of those who are to see it. The other node does the same.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

from xmppd.errors import CallRefused, NodeUnreachable, StorageError
from xmppd.module_api import Nodes, Session, Sessions

from .losses import Log
from .slices import Slice, sliced

_WINDOW: Final = 500  # presences on their way at a time: a link's queue has an end
_PATIENCE: Final = 30.0  # seconds for the other node to take them
SEEN: Final = "seen"  # a call: all that was sent before has been taken


class Show(Protocol):
    def __call__(self, session: Session, users: set[str], node: bytes, /) -> int:
        """Send a session's presence to those of `users` on a node who may see it; how many frames that were.
        LookupError where that is not known without waiting."""
        ...


class Renewal:
    """Towards each node one at a time: a newer one ends the one before. `know`: learn what `show` did not know."""

    def __init__(
        self,
        nodes: Nodes,
        sessions: Sessions,
        *,
        show: Show,
        know: Callable[[Session], Awaitable[None]],
        log: Log,
    ) -> None:
        self._nodes = nodes
        self._sessions = sessions
        self._show = show
        self._know = know
        self._log = log
        self._current: dict[bytes, object] = {}

    async def run(self, node: bytes, name: str) -> None:
        """Show everybody here to those on a node."""
        token = self._current[node] = object()
        slice_ = Slice()
        users: set[str] = set()
        for resource in sliced(self._sessions.on_node(node), slice_):
            if resource is None:
                await asyncio.sleep(0)
            elif resource.priority is not None:
                users.add(resource.jid.bare)
        sent = shown = 0
        for session in sliced(self._sessions.local() if users else (), slice_):
            if self._current.get(node) is not token:
                return
            if session is None:
                await asyncio.sleep(0)
                continue
            frames = await self._one(session, users, node)
            sent, shown = sent + frames, shown + bool(frames)
            if sent >= _WINDOW:
                sent = 0
                if not await self._taken(node):
                    return
        if self._current.get(node) is token:
            del self._current[node]
        if shown:
            self._log.info("sessions shown to a node", node=name, sessions=shown)

    async def _one(self, session: Session, users: set[str], node: bytes) -> int:
        try:
            return self._show(session, users, node)
        except LookupError:
            pass
        try:
            await self._know(session)
            return self._show(session, users, node)
        except (LookupError, StorageError):
            return 0  # it is shown with its next presence

    async def _taken(self, node: bytes) -> bool:
        try:
            await self._nodes.call(node, SEEN, None, timeout=_PATIENCE)
        except (NodeUnreachable, CallRefused):
            return False
        return True
