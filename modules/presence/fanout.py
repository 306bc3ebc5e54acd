"""One presence for many: in pieces between which other work gets its turn, and in order.

What is short goes out at once. What is long goes out piece by piece, and whatever the same user broadcasts meanwhile
waits behind it, so that nobody gets an old presence after a new one.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from xmppd.protocol.jid import JID
from xmppd.protocol.stanza import Stanza

PIECE: Final = 500  # recipients between two turns of the loop: some 5 ms when all of them are online


class Multicast(Protocol):
    def __call__(self, stanza: Stanza, users: Iterable[JID], /, *, only: bytes | None = None) -> None: ...


class Spawn(Protocol):
    def __call__(self, coroutine: Coroutine[Any, Any, None], /, *, name: str) -> None: ...


@dataclass(slots=True)
class _Job:
    presence: Stanza
    targets: Sequence[JID]
    wanted: Callable[[JID], bool] | None
    done: asyncio.Future[None]
    only: bytes | None = None
    next: int = 0


class Fanout:
    """`multicast` takes bare JIDs of the hosts that `is_local` knows; `route` everything else."""

    def __init__(
        self,
        multicast: Multicast,
        route: Callable[[Stanza], object],
        is_local: Callable[[JID], bool],
        spawn: Spawn,
    ) -> None:
        self._multicast = multicast
        self._route = route
        self._is_local = is_local
        self._spawn = spawn
        self._queues: dict[str, deque[_Job]] = {}

    def send(
        self,
        user: JID,
        presence: Stanza,
        targets: Sequence[JID],
        wanted: Callable[[JID], bool] | None = None,
        *,
        only: bytes | None = None,
    ) -> asyncio.Future[None] | None:
        """Send a presence without `to` of one of the user's resources. None when all is done, else a future that ends
        when it is; `wanted` is asked once more for each target that is sent to later than now. `only`: to local users'
        resources on that other node."""
        queue = self._queues.get(user.bare)
        if queue is None and len(targets) <= PIECE:
            self._piece(presence, targets, only)
            return None
        job = _Job(presence, targets, wanted, asyncio.get_running_loop().create_future(), only)
        if queue is not None:
            queue.append(job)
            return job.done
        queue = self._queues[user.bare] = deque([job])
        self._piece(presence, targets[:PIECE], only)
        job.next = PIECE
        self._spawn(self._drain(user.bare, queue), name="presence for many")
        return job.done

    def finish(self) -> None:
        """Send all that is left, now: the tasks are gone."""
        for queue in self._queues.values():
            while queue:
                self._step(queue)
        self._queues.clear()

    async def _drain(self, user: str, queue: deque[_Job]) -> None:
        while queue:
            await asyncio.sleep(0)
            self._step(queue)
        del self._queues[user]

    def _step(self, queue: deque[_Job]) -> None:
        job = queue[0]
        some = job.targets[job.next : job.next + PIECE]
        job.next += PIECE
        ended = job.next >= len(job.targets)
        if ended:
            queue.popleft()
        try:
            wanted = some if job.wanted is None else [jid for jid in some if job.wanted(jid)]
            self._piece(job.presence, wanted, job.only)
        finally:
            if ended and not job.done.done():
                job.done.set_result(None)

    def _piece(self, presence: Stanza, targets: Sequence[JID], only: bytes | None) -> None:
        near: list[JID] = []
        far: list[JID] = []
        for target in targets:
            (near if self._is_local(target) else far).append(target)
        if near:
            self._multicast(presence, near, only=only)
        for target in far:
            self._route(presence.addressed(target))
