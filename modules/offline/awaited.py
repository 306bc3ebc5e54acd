"""What other nodes are storing for users who are here now: older than what is to be delivered here."""

import asyncio
from collections.abc import Iterable


class Awaited:
    """By node and user (a bare JID). A node says that it is storing something, then that it is `stored`, and is free or
    can be taken, and last that it waits no longer: what was there has been `flushed` here."""

    def __init__(self) -> None:
        self._nodes: dict[bytes, dict[str, _Awaited]] = {}

    def begin(self, node: bytes, user: str) -> "asyncio.Future[None] | None":
        """Done when it is flushed; None where that is awaited already."""
        users = self._nodes.setdefault(node, {})
        if user in users:
            return None
        users[user] = awaited = _Awaited()
        return awaited.flushed

    def being_stored(self, user: str) -> "list[asyncio.Future[None]]":
        """What is to be waited for before anything is delivered that is stored already."""
        if not self._nodes:
            return []
        found = (users[user].stored for users in self._nodes.values() if user in users)
        return [stored for stored in found if not stored.done()]

    def stored(self, node: bytes, users: Iterable[str]) -> None:
        there = self._nodes.get(node, {})
        for user in users:
            if user in there:
                end(there[user].stored)

    def flushed(self, node: bytes, users: Iterable[str] | None = None) -> None:
        """`users`: None for all."""
        there = self._nodes.get(node, {})
        for user in list(there if users is None else users):
            awaited = there.pop(user, None)
            if awaited is not None:
                end(awaited.stored)
                end(awaited.flushed)
        if not there:
            self._nodes.pop(node, None)

    def end(self) -> None:
        for node in list(self._nodes):
            self.flushed(node)


class _Awaited:
    __slots__ = ("flushed", "stored")

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.stored: asyncio.Future[None] = loop.create_future()
        self.flushed: asyncio.Future[None] = loop.create_future()


def end(future: "asyncio.Future[None]") -> None:
    """Somebody else may have ended it."""
    if not future.done():
        future.set_result(None)
