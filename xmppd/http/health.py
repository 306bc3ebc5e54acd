"""/livez and /readyz: one word each, and no word about why (requirements LB-03).

/livez answers `alive` as long as the event loop turns. /readyz answers 200 `ready`, or 503 and `starting`, `syncing`,
`stopping` or `unavailable`: the last when the database does not answer or a listener is closed. What is wrong stands in
the log.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from aiohttp import web

from xmppd.errors import StorageError
from xmppd.http.answers import TEXT, Answer, only_reads
from xmppd.log import get_logger

_log = get_logger("xmppd.http")

CACHE: Final = 1.0  # seconds for which one answer of the database serves all who ask
PATIENCE: Final = 3.0  # seconds until a database that does not answer counts as away


class Live:
    """Fulfils answers.Handler."""

    name = "live"
    exact = True

    async def __call__(self, request: web.BaseRequest, rest: str) -> Answer:
        only_reads(request)
        return Answer(200, b"alive\n", TEXT)


class Ready:
    """Fulfils answers.Handler. `status` is the node's: starting, started, stopping. However many ask, the database is
    asked by one at a time, and at most once in CACHE seconds."""

    name = "ready"
    exact = True

    def __init__(
        self,
        status: Callable[[], str],
        ping: Callable[[], Awaitable[None]],
        listening: Callable[[], bool],
        *,
        cache: float = CACHE,
        patience: float = PATIENCE,
    ) -> None:
        self._status = status
        self._ping = ping
        self._listening = listening
        self._cache = cache
        self._patience = patience
        self._there = True
        self._asked_at = float("-inf")
        self._asking: asyncio.Task[None] | None = None

    async def __call__(self, request: web.BaseRequest, rest: str) -> Answer:
        only_reads(request)
        word = await self.word()
        return Answer(200 if word == "ready" else 503, f"{word}\n".encode(), TEXT)

    async def word(self) -> str:
        """What /readyz says now."""
        status = self._status()
        if status != "started":
            return status
        there = await self._database()
        status = self._status()
        if status != "started":  # it may have changed while the database was asked
            return status
        return "ready" if there and self._listening() else "unavailable"

    async def _database(self) -> bool:
        loop = asyncio.get_running_loop()
        if loop.time() - self._asked_at >= self._cache:
            if self._asking is None:
                self._asking = loop.create_task(self._ask(), name="readiness")
            await asyncio.shield(self._asking)  # whoever asks may leave; the others still want to know
        return self._there

    async def _ask(self) -> None:
        before = self._there
        reason: BaseException | None = None
        try:
            async with asyncio.timeout(self._patience):
                await self._ping()
            self._there = True
        except (StorageError, TimeoutError) as exc:
            self._there, reason = False, exc
        finally:
            self._asked_at = asyncio.get_running_loop().time()
            self._asking = None
        if before and not self._there:
            _log.warning("not ready: the database does not answer", error=reason or "")
        elif self._there and not before:
            _log.info("ready again: the database answers")

    def close(self) -> None:
        """Leave the database alone."""
        if self._asking is not None:
            self._asking.cancel()
