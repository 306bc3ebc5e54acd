"""Our connection to NATS: kept up, watched, subscribed again after each loss.

A lost connection is thrown away with all that waited in it, and each new one begins with `on_up`: nobody is left to
believe that nothing was lost.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

from xmppd.cluster.nats_client import Handler, NatsClient, NobodyAnswers, Server
from xmppd.cluster.nats_protocol import NatsError
from xmppd.errors import NodeUnreachable
from xmppd.log import get_logger

_FLUSH_TIMEOUT: Final = 2.0  # seconds
_FIRST_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 1.0
_PING: Final = 2.0
_MISSED: Final = 3  # pings without an answer

log = get_logger("cluster")


class Connection:
    """One connection at a time, to the first of `servers()` that takes it.

    `on_up(first)` is called when it stands and is subscribed; `on_lost()` when it is gone; `on_stuck()` when the server
    keeps the connection and is silent. Nothing that has come is dropped here: where we are too slow, the server closes.
    """

    def __init__(
        self,
        name: str,
        servers: Callable[[], Sequence[Server]],
        *,
        on_up: Callable[[bool], None],
        on_lost: Callable[[], None],
        on_stuck: Callable[[], None],
    ) -> None:
        self.last_error = ""
        self._name = name
        self._servers = servers
        self._on_up = on_up
        self._on_lost = on_lost
        self._on_stuck = on_stuck
        self._client: NatsClient | None = None
        self._handlers: dict[str, tuple[Handler, str]] = {}  # by subject, with the queue
        self._task: asyncio.Task[None] | None = None
        self._up = asyncio.Event()
        self._stopping = False
        self._kick = asyncio.Event()

    @property
    def client(self) -> NatsClient | None:
        """The connection while it stands."""
        client = self._client
        return client if client is not None and not client.closed.is_set() else None

    async def start(self, timeout: float) -> None:
        """Returns when it stands. NodeUnreachable when that takes too long; it goes on trying all the same."""
        self._task = asyncio.create_task(self._keep(), name="cluster nats connection")
        try:
            async with asyncio.timeout(timeout):
                await self._up.wait()
        except TimeoutError:
            raise NodeUnreachable(f"NATS does not take our connection: {self.last_error or 'no answer'}") from None

    def retry(self) -> None:
        """Try again at once, if it is down: something has changed."""
        self._kick.set()

    async def stop(self) -> None:
        """Close it for good."""
        task, self._task = self._task, None
        self._stopping = True
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    async def handle(self, subject: str, handler: Handler | None, *, queue: str = "") -> None:
        """Who gets what comes to a subject, on this connection and all later ones. None: nobody any more. Of all that
        share a `queue`, one gets each message. A handler does not wait, and raises nothing."""
        if handler is None:
            self._handlers.pop(subject, None)
        else:
            self._handlers[subject] = handler, queue
        client = self.client
        if client is None:
            return
        try:
            async with asyncio.timeout(_FLUSH_TIMEOUT):
                await self._subscribe(client)
        except (NatsError, TimeoutError) as exc:
            log.debug("subscription failed", subject=subject, error=repr(exc))  # comes again with the next connection

    def publish(self, subject: str, payload: bytes) -> bool:
        """Hand a message over without waiting; False when it is lost."""
        client = self._client
        return client is not None and client.publish(subject, payload)

    async def request(self, subject: str, payload: bytes, timeout: float) -> bytes:
        """The first answer. Raises `NodeUnreachable`."""
        client = self.client
        if client is None:
            raise NodeUnreachable("no connection to NATS")
        try:
            return await client.request(subject, payload, timeout)
        except NobodyAnswers as exc:
            raise NodeUnreachable(str(exc)) from None
        except TimeoutError:
            raise NodeUnreachable(f"no answer within {timeout:g} s") from None
        except NatsError as exc:
            raise NodeUnreachable(f"NATS: {exc}") from exc

    async def _keep(self) -> None:
        first, pause = True, _FIRST_PAUSE
        while not self._stopping:
            try:
                client = await self._connect()
            except Exception as exc:  # a bug must not end this task
                log.error("nats connection failed", exc=exc)
                client = None
            if client is None:
                self._kick.clear()
                try:
                    async with asyncio.timeout(pause):
                        await self._kick.wait()
                except TimeoutError:
                    pass
                pause = min(_LONGEST_PAUSE, pause * 1.5)
                continue
            pause = _FIRST_PAUSE
            self._client = client
            try:
                self._up.set()
                self._on_up(first)
                first = False
                await self._watch(client)
            finally:
                self._client = None
                await client.close()
                self.last_error = client.error
            if not self._stopping:
                self._on_lost()

    async def _connect(self) -> NatsClient | None:
        for server in self._servers():
            client = None
            try:
                client = await NatsClient.open(server, self._name)
                async with asyncio.timeout(_FLUSH_TIMEOUT):
                    while await self._subscribe(client):
                        pass
            except (NatsError, OSError, ValueError) as exc:  # TimeoutError and those of TLS are OSErrors
                self.last_error = str(exc) or "no answer"
                if client is not None:
                    client.abort()
                continue
            except BaseException:
                if client is not None:
                    client.abort()
                raise
            return client
        return None

    async def _subscribe(self, client: NatsClient) -> bool:
        """Make the client's subscriptions those of `_handlers`, in force when this returns. Whether that was news."""
        gone = client.sids.keys() - self._handlers.keys()
        for subject in gone:
            client.unsubscribe(subject)
        new = self._handlers.keys() - client.sids.keys()
        for subject, (handler, queue) in self._handlers.items():
            client.subscribe(subject, handler, queue)
        if gone or new:
            await client.flush()
        return bool(gone or new)

    async def _watch(self, client: NatsClient) -> None:
        """Returns when the connection is of no use any more."""
        missed = 0
        while not self._stopping:
            try:
                async with asyncio.timeout(_PING):
                    await client.closed.wait()
                return
            except TimeoutError:
                pass
            try:
                async with asyncio.timeout(_PING):
                    await client.flush()
                missed = 0
            except (NatsError, TimeoutError):
                missed += 1
            if missed >= _MISSED:
                client.error = "no answer"
                self._on_stuck()
                return


__all__ = ["Connection", "Handler", "Server"]
