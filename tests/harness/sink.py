"""A web server that events are posted to: it writes down what it gets, and answers as it is told."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from aiohttp import web

from tests.harness.inbox import PATIENCE


@dataclass(frozen=True)
class Post:
    """One request; `headers` as they came, in their order."""

    path: str
    headers: list[tuple[str, str]]
    body: bytes
    at: float
    status: int

    def __getitem__(self, name: str) -> str:
        return next(value for own, value in self.headers if own.lower() == name.lower())

    @property
    def key(self) -> str:
        return self["Idempotency-Key"]


class WebSink:
    """`answer` says the status of the next request: a number, or a function of the request so far. The same port is
    used again after `close` and `open`."""

    def __init__(self) -> None:
        self.posts: list[Post] = []
        self.answer: int | Callable[[bytes], int] = 200
        self.headers: dict[str, str] = {}
        self.hold: asyncio.Event | None = None  # answers wait for it
        self.waiting = 0  # so many
        self.port = 0
        self._runner: web.ServerRunner | None = None
        self._changed = asyncio.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/messages"

    @property
    def taken(self) -> list[Post]:
        """Those that were answered with success."""
        return [post for post in self.posts if post.status < 300]

    async def open(self) -> None:
        self._runner = web.ServerRunner(web.Server(self._serve), shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        assert site._server is not None
        self.port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]

    async def close(self) -> None:
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def _serve(self, request: web.BaseRequest) -> web.Response:
        body = await request.read()
        if self.hold is not None:
            self.waiting += 1
            try:
                await self.hold.wait()
            finally:
                self.waiting -= 1
        status = self.answer if isinstance(self.answer, int) else self.answer(body)
        headers = [(name.decode(), value.decode()) for name, value in request.raw_headers]
        loop = asyncio.get_running_loop()
        self.posts.append(Post(request.path, headers, body, loop.time(), status))
        self._changed.set()
        return web.Response(status=status, headers=self.headers)

    async def until(self, condition: Callable[[], object], patience: float = PATIENCE) -> None:
        """Wait for requests until the condition holds."""
        try:
            async with asyncio.timeout(patience):
                while not condition():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise AssertionError(f"it did not come about; {len(self.posts)} posts: {self.posts[-3:]}") from None

    async def wait(self, count: int, patience: float = PATIENCE) -> list[Post]:
        """Wait until so many requests have succeeded."""
        await self.until(lambda: len(self.posts) >= count and len(self.taken) >= count, patience)  # not of each, anew
        return self.taken
