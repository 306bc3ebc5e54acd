"""Requests to one URL, over a few connections that are kept open."""

import asyncio
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import Final

import aiohttp
from yarl import URL

from xmppd.sender.forms import Headers
from xmppd.sender.frames import Request
from xmppd.sender.signature import HEADER, sign
from xmppd.sender.target import UNTRIED, Answer, HttpTarget, judge, ulid

_ANSWER: Final = 64 << 10  # bytes of an answer that are read so that the connection can be used again
_OURS: Final = ("User-Agent", "Accept", "Accept-Encoding", "Content-Type")  # not sent unless an event asks for it


class Requests:
    """`answered(number, answer)` is called for each request that is made, or given back untried.

    As many chains as there are connections are under way; the others wait here. When a request has to be repeated, the
    rest of its chain and all that waits goes back: the node knows what to do about a sink that does not answer.
    """

    def __init__(self, target: HttpTarget, connections: int, answered: Callable[[int, Answer], None]) -> None:
        """Raises OSError, ssl.SSLError or ValueError where certificates cannot be used."""
        self._target = target
        self._url = URL(target.url)
        self._answered = answered
        self._free = connections
        self._queue: deque[list[Request]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=connections, ssl=target.tls(), keepalive_timeout=30),
            timeout=aiohttp.ClientTimeout(total=target.timeout, connect=target.connect_timeout),
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=_OURS,
        )

    @property
    def busy(self) -> bool:
        return bool(self._tasks)

    def make(self, chain: list[Request]) -> None:
        """One after the other."""
        self._queue.append(chain)
        self._begin()

    async def close(self) -> None:
        """What is under way is forgotten."""
        self._queue.clear()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._session.close()

    def _begin(self) -> None:
        while self._free and self._queue:
            self._free -= 1
            task = asyncio.get_running_loop().create_task(self._run(self._queue.popleft()))
            self._tasks.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        self._free += 1
        self._begin()

    async def _run(self, chain: list[Request]) -> None:
        for place, request in enumerate(chain, 1):
            answer = await self._make(request)
            self._answered(request[0], answer)
            if answer.verdict == "retry":
                self._give_back(chain[place:])
                return

    def _give_back(self, rest: list[Request]) -> None:
        waiting = [rest, *self._queue]
        self._queue.clear()
        for chain in waiting:
            for number, *_ in chain:
                self._answered(number, UNTRIED)

    async def _make(self, request: Request) -> Answer:
        _, key, headers, body = request
        if headers is None:
            try:
                assert self._target.form is not None
                headers, body = self._target.form.make(body)
            except Exception as exc:  # a bug; no other attempt would go better
                traceback.print_exc(file=sys.stderr)
                return Answer("dead", f"cannot be made: {type(exc).__name__}")
        return await self._post(key, headers, body)

    async def _post(self, key: bytes, headers: Headers, body: bytes) -> Answer:
        target = self._target
        said = [*headers, ("Idempotency-Key", ulid(key))]
        if target.secrets:
            said.append((HEADER, sign(target.secrets, body, time.time())))
        try:
            async with self._session.post(self._url, data=body, headers=said, allow_redirects=False) as response:
                await response.content.read(_ANSWER)
                return judge(target, response.status, response.headers.get("Retry-After", ""), time.time())
        except TimeoutError:
            return Answer("retry", "no answer in time")
        except (aiohttp.ClientError, OSError) as exc:
            return Answer("retry", f"{type(exc).__name__}: {exc}"[:200])
        except ValueError as exc:  # a header that cannot be written: no other attempt would go better
            return Answer("dead", f"cannot be sent: {exc}"[:200])
        except Exception as exc:  # a bug; the event stays
            traceback.print_exc(file=sys.stderr)
            return Answer("retry", type(exc).__name__)
