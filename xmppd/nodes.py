"""What the modules of one node say to those of the others: casts and calls, by the module's name and a topic.

A cast is news: it arrives in order with everything else between two nodes, or not at all, when the link goes down. A
call is a question. Payloads are JSON. Who hears a topic is registered and taken back with the module.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from inspect import isawaitable
from typing import Any, Final

from xmppd.cluster.interfaces import Calls, Links, Peer
from xmppd.errors import CallRefused, NodeUnreachable
from xmppd.hooks import Spawn
from xmppd.protocol.jid import JID

MODULE: Final = "module"  # the name of these calls and casts; their payload: [module, topic, payload]

Handler = Callable[[bytes, Any], Any]  # (UUID of the node that speaks, payload); a coroutine function, or a plain one


class NodeHandlers:
    """Who hears what: (module, topic) -> handler."""

    def __init__(self) -> None:
        self._handlers: dict[tuple[str, str], Handler] = {}
        self._spawn: Spawn | None = None

    def connect(self, calls: Calls, spawn: Spawn) -> None:
        """Listen to the other nodes."""
        self._spawn = spawn
        calls.on_cast(MODULE, self._told)
        calls.on_call(MODULE, self._asked)

    def add(self, module: str, topic: str, handler: Handler) -> None:
        """ValueError when somebody hears it already."""
        if (module, topic) in self._handlers:
            raise ValueError(f"the topic {topic} of the module {module} has a handler already")
        self._handlers[module, topic] = handler

    def remove(self, module: str) -> None:
        """Forget all of a module."""
        self._handlers = {key: handler for key, handler in self._handlers.items() if key[0] != module}

    def count(self) -> int:
        return len(self._handlers)

    def _told(self, peer: Peer, payload: Any) -> None:
        module, topic, news = payload
        handler = self._handlers.get((module, topic))
        if handler is None:
            return  # not loaded here
        waiting = handler(peer.node, news)
        if isawaitable(waiting) and self._spawn is not None:
            self._spawn(_finish(waiting), name=f"{module}: {topic} from {peer.name}")

    async def _asked(self, peer: Peer, payload: Any) -> Any:
        module, topic, question = payload
        handler = self._handlers.get((module, topic))
        if handler is None:
            raise CallRefused(f"nobody answers {topic} of the module {module} here")
        answer = handler(peer.node, question)
        return await answer if isawaitable(answer) else answer


class Nodes:
    """The other nodes of the cluster as one module sees them. They are named by their UUIDs (16 bytes)."""

    def __init__(
        self,
        module: str,
        links: Links | None = None,
        calls: Calls | None = None,
        nodes_of: Callable[[JID], set[bytes]] | None = None,
    ) -> None:
        """Without the rest: a node that is alone."""
        self._module = module
        self._links = links
        self._calls = calls
        self._nodes_of = nodes_of

    @property
    def others(self) -> list[bytes]:
        """Those that are up."""
        return [] if self._links is None else list(self._links.peers)

    def of(self, user: JID) -> set[bytes]:
        """Those that have sessions of a user (a bare JID), as far as it is known here."""
        return set() if self._nodes_of is None else self._nodes_of(user)

    def cast(self, topic: str, payload: Any, nodes: Iterable[bytes] | None = None) -> None:
        """Tell the same module of some nodes, or of all that are up. It arrives behind everything that was sent there
        before, or, when the link goes down, perhaps not at all."""
        if self._calls is not None:
            self._calls.cast(MODULE, [self._module, topic, payload], nodes)

    async def call(self, node: bytes, topic: str, payload: Any, *, timeout: float = 5.0) -> Any:
        """Ask the same module of a node. NodeUnreachable; CallRefused with its words, or where it is not loaded."""
        if self._calls is None:
            raise NodeUnreachable(f"{topic}: this node is alone")
        return await self._calls.call(node, MODULE, [self._module, topic, payload], timeout=timeout)

    async def call_all(self, topic: str, payload: Any, *, timeout: float = 5.0) -> list[Any]:
        """Ask it of all nodes that are up; those that do not answer are left out."""
        asked: list[Coroutine[Any, Any, Any]] = [
            self.call(node, topic, payload, timeout=timeout) for node in self.others
        ]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, NodeUnreachable | CallRefused):
                raise answer
        return [answer for answer in answers if not isinstance(answer, BaseException)]

    async def barrier(self, *, timeout: float = 5.0) -> None:
        """Wait until the others have seen all that this node sent so far, and it has seen all they had sent by then."""
        if self._calls is not None:
            await asyncio.sleep(0)  # what goes out at the end of this turn comes before it
            await self._calls.barrier(timeout=timeout)


async def _finish(waiting: Awaitable[None]) -> None:
    await waiting
