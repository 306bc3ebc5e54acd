"""Our connection to NATS: kept up, watched, subscribed again after each loss.

The client library's own reconnecting is not used: it hides for how long we heard nothing, replays what has waited, and
gives up for good at some errors. Here a lost connection is thrown away, and each new one begins with `on_up`.
"""

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from xmppd.errors import NodeUnreachable
from xmppd.log import get_logger

MAX_WAITING: Final = 16 * 1024 * 1024  # bytes that wait to be written; beyond it packets are dropped
_PENDING_MESSAGES: Final = 512 * 1024
_PENDING_BYTES: Final = 128 * 1024 * 1024
_CONNECT_TIMEOUT: Final = 2  # seconds
_FIRST_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 1.0
_PING: Final = 2.0
_MISSED: Final = 3  # pings without an answer

log = get_logger("cluster")

Handler = Callable[[Msg], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Server:
    """Where to connect, and as whom."""

    url: str  # nats://address:port or tls://...
    user: str | None = None
    password: str | None = None
    tls: ssl.SSLContext | None = None
    token: str | None = None


class Connection:
    """One connection at a time, to the first of `servers()` that takes it.

    `on_up(first)` is called when it stands and is subscribed; `on_lost()` when it is gone; `on_dropped()` when messages
    came too fast, and some are lost; `on_stuck()` when the server keeps the connection and is silent.
    """

    def __init__(
        self,
        name: str,
        servers: Callable[[], Sequence[Server]],
        *,
        on_up: Callable[[bool], None],
        on_lost: Callable[[], None],
        on_dropped: Callable[[], None],
        on_stuck: Callable[[], None],
    ) -> None:
        self.last_error = ""
        self._name = name
        self._servers = servers
        self._on_up = on_up
        self._on_lost = on_lost
        self._on_dropped = on_dropped
        self._on_stuck = on_stuck
        self._client: Client | None = None
        self._handlers: dict[str, Handler] = {}
        self._queues: dict[str, str] = {}
        self._present: dict[str, Subscription] = {}  # of the present client
        self._subscribing = asyncio.Lock()
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._up = asyncio.Event()
        self._stopping = False
        self._kick = asyncio.Event()

    @property
    def client(self) -> Client | None:
        """The library's connection while it stands."""
        client = self._client
        return client if client is not None and client.is_connected else None

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
        while task is not None and not task.done():
            task.cancel()  # more than once: the library swallows it in some places
            await asyncio.wait([task], timeout=0.5)

    async def handle(self, subject: str, handler: Handler | None, *, queue: str = "") -> None:
        """Who gets what comes to a subject, on this connection and all later ones. None: nobody any more. Of all that
        share a `queue`, one gets each message."""
        if handler is None:
            self._handlers.pop(subject, None)
        else:
            self._handlers[subject] = handler
            self._queues[subject] = queue
        client = self.client
        if client is None:
            return
        try:
            await self._subscribe(client)
        except (OSError, nats.errors.Error, TimeoutError) as exc:
            log.debug("subscription failed", subject=subject, error=repr(exc))  # comes again with the next connection

    def publish(self, subject: str, payload: bytes) -> bool:
        """Hand a message over without waiting; False when it is lost."""
        client = self._client
        if client is None or not client.is_connected or client.pending_data_size > MAX_WAITING:
            return False
        _run_now(client.publish(subject, payload))
        return True

    async def request(self, subject: str, payload: bytes, timeout: float) -> bytes:
        """The first answer. Raises `NodeUnreachable`."""
        client = self.client
        if client is None:
            raise NodeUnreachable("no connection to NATS")
        try:
            return bytes((await client.request(subject, payload, timeout=timeout)).data)
        except nats.errors.NoRespondersError:
            raise NodeUnreachable("nobody answers to this name") from None
        except (nats.errors.TimeoutError, TimeoutError):
            raise NodeUnreachable(f"no answer within {timeout:g} s") from None
        except (nats.errors.Error, OSError, ValueError) as exc:
            raise NodeUnreachable(f"NATS: {exc}") from exc

    async def _keep(self) -> None:
        first, pause = True, _FIRST_PAUSE
        while not self._stopping:
            try:
                client = await self._connect()
            except Exception as exc:  # a fault of the library must not end this task
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
                await _discard(client)
            if not self._stopping:
                self._on_lost()

    async def _connect(self) -> Client | None:
        for server in self._servers():
            client = Client()
            self._changed.clear()
            self.last_error = ""
            try:
                async with asyncio.timeout(2 * _CONNECT_TIMEOUT):
                    await client.connect(
                        server.url,
                        name=self._name,
                        user=server.user,
                        password=server.password,
                        token=server.token,
                        tls=server.tls,
                        allow_reconnect=False,
                        max_reconnect_attempts=1,  # of the first attempt; endless otherwise
                        reconnect_time_wait=0,
                        connect_timeout=_CONNECT_TIMEOUT,
                        ping_interval=3600,  # we ask ourselves, see _watch
                        pending_size=4 * MAX_WAITING,  # `publish` looks at our own limit, and never waits
                        flusher_queue_size=65536,
                        skip_subject_validation=True,  # ours are made of hex digits
                        error_cb=self._error,
                        closed_cb=self._closed,
                    )
                    await self._subscribe(client, afresh=True)
            except (OSError, nats.errors.Error, TimeoutError, ssl.SSLError, ValueError) as exc:
                self.last_error = self.last_error or str(exc) or type(exc).__name__
                await _discard(client)
                continue
            except BaseException:
                await _discard(client)
                raise
            return client
        return None

    async def _subscribe(self, client: Client, *, afresh: bool = False) -> None:
        """Make the client's subscriptions those of `_handlers`; they are in force when this returns."""
        async with self._subscribing:
            if afresh:
                self._present = {}
            present = self._present
            while changed := self._handlers.keys() ^ present.keys():
                for subject in changed:
                    handler = self._handlers.get(subject)
                    if handler is None:
                        await present.pop(subject).unsubscribe()
                        continue
                    present[subject] = await client.subscribe(
                        subject,
                        queue=self._queues.get(subject, ""),
                        cb=handler,
                        pending_msgs_limit=_PENDING_MESSAGES,
                        pending_bytes_limit=_PENDING_BYTES,
                    )
                for _ in range(2):  # the first ping may overtake what the library has not written yet
                    await client.flush(_CONNECT_TIMEOUT)

    async def _watch(self, client: Client) -> None:
        """Returns when the connection is of no use any more."""
        missed = 0
        while client.is_connected and not self._stopping:
            try:
                async with asyncio.timeout(_PING):
                    await self._changed.wait()
                return
            except TimeoutError:
                pass
            try:
                async with asyncio.timeout(_PING):
                    await client.flush(60)
                missed = 0
            except (TimeoutError, OSError, nats.errors.Error):
                missed += 1
            if missed >= _MISSED:
                self._on_stuck()
                return

    async def _error(self, error: Exception) -> None:
        if isinstance(error, nats.errors.SlowConsumerError):
            self._on_dropped()
            return
        self.last_error = str(error) or type(error).__name__
        log.debug("nats client", error=repr(error))

    async def _closed(self) -> None:
        self._changed.set()


def _run_now(step: Coroutine[Any, Any, None]) -> None:
    """Run what has no reason to wait: the library has queued the message when it would, and writes it by and by."""
    try:
        step.send(None)
    except StopIteration:
        return
    except nats.errors.Error as exc:
        log.debug("nats client", error=repr(exc))
        return
    step.close()


async def _discard(client: Client) -> None:
    try:
        async with asyncio.timeout(1):
            await client.close()
    except (TimeoutError, OSError, nats.errors.Error):
        pass
