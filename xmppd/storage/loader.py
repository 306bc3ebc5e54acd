"""The loader: look-ups made at the same time become one SELECT … IN (…)."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final, Protocol, TypeVar

from sqlalchemy.ext.asyncio import AsyncConnection

from xmppd.errors import StorageError, StorageUnavailable
from xmppd.log import get_logger

log = get_logger("storage")
K = TypeVar("K")
V = TypeVar("V")
T = TypeVar("T")

MAX_KEYS: Final = 500  # in one query
# seconds; a query that failed so late takes along those who waited behind it: the next one would hang as long
_HUNG: Final = 2.0
MAX_WAITING: Final = 100_000  # look-ups of one kind; one more is refused with StorageUnavailable

Fetch = Callable[[AsyncConnection, list[Any]], Awaitable[dict[Any, Any]]]


class Reader(Protocol):
    def __call__(self, work: Callable[[AsyncConnection], Awaitable[T]], *, late: bool = False) -> Awaitable[T]: ...


@dataclass(slots=True)
class _Kind:
    name: str
    fetch: Fetch
    waiting: dict[Any, list[asyncio.Future[Any]]] = field(default_factory=dict)
    task: asyncio.Task[None] | None = None
    late: "_Kind | None" = None  # the same for keys of which a replica may be asked
    may_be_late: bool = False


class Loader:
    """One query of a kind runs at a time; what is asked for meanwhile goes into the next one.

    A database that does not answer keeps nobody waiting for more than one query's time-outs.

    A look-up never joins a query that has begun: it sees everything that was committed before it was made, unless its
    kind may be late; then, where there are replicas, it sees at least what its user has written on this node.
    """

    def __init__(self, read: Reader, *, late: Callable[[Any], bool] | None = None) -> None:
        """`late`: whether a key may be looked up in a replica; None: there is none."""
        self._read = read
        self._late = late
        self._kinds: dict[str, _Kind] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    def define(
        self, name: str, fetch: Callable[[AsyncConnection, list[K]], Awaitable[dict[K, V]]], *, late: bool = False
    ) -> None:
        """`fetch` gets at most 500 distinct keys and answers with those that exist. Defining again replaces it.

        `late`: its keys begin with host and user name, and what others have written may be some seconds old; what the
        user has written is not, if the kind's writes are defined with `user` (Batcher.define).
        """
        kind = self._kinds.get(name)
        if kind is None:
            kind = self._kinds[name] = _Kind(name, fetch)
        kind.fetch = fetch
        kind.late = None
        if late and self._late is not None:
            kind.late = _Kind(name, fetch, may_be_late=True)

    def undefine(self, name: str) -> None:
        """No more of this kind; look-ups that wait are still made."""
        self._kinds.pop(name, None)

    async def get(self, name: str, key: Any) -> Any:
        """The value, or None when there is no such row. Raises StorageError, StorageUnavailable."""
        kind = self._kinds.get(name)
        if kind is None:
            raise StorageError(f"nobody loads {name}: its module is not running")
        if self._closed:
            raise StorageUnavailable("the storage is closed")
        if kind.late is not None and self._late is not None and self._late(key):
            kind = kind.late
        waiters = kind.waiting.get(key)
        if waiters is None:
            if len(kind.waiting) >= MAX_WAITING:
                raise StorageUnavailable(f"{MAX_WAITING} look-ups of {name} wait already")
            waiters = kind.waiting[key] = []
        future = asyncio.get_running_loop().create_future()
        waiters.append(future)
        if kind.task is None:
            kind.task = asyncio.create_task(self._serve(kind), name=f"load {name}")
            self._tasks.add(kind.task)
            kind.task.add_done_callback(self._tasks.discard)
        return await future

    async def close(self) -> None:
        """Look-ups that still wait fail with StorageUnavailable."""
        self._closed = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _serve(self, kind: _Kind) -> None:
        batch: dict[Any, list[asyncio.Future[Any]]] = {}
        try:
            while kind.waiting:
                batch = _cut(kind.waiting)
                if batch:
                    await self._load(kind, batch)
        finally:
            kind.task = None
            for waiters in (*batch.values(), *kind.waiting.values()):
                _fail(waiters, StorageUnavailable("the storage is closing"))
            kind.waiting.clear()

    async def _load(self, kind: _Kind, batch: dict[Any, list[asyncio.Future[Any]]]) -> None:
        fetch, keys = kind.fetch, list(batch)
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            found = await self._read(lambda connection: fetch(connection, keys), late=kind.may_be_late)
        except StorageUnavailable as exc:
            hung = loop.time() - began >= _HUNG
            for waiters in (*batch.values(), *(kind.waiting.values() if hung else ())):
                _fail(waiters, exc)
            if hung:
                kind.waiting.clear()
        except Exception as exc:
            await self._find_culprit(kind, batch, exc)
        else:
            for key, waiters in batch.items():
                value = found.get(key)
                for future in waiters:
                    if not future.done():
                        future.set_result(value)

    async def _find_culprit(self, kind: _Kind, batch: dict[Any, list[asyncio.Future[Any]]], exc: Exception) -> None:
        """One key that cannot be looked up must not fail the others: halve until it is alone."""
        if len(batch) == 1:
            if not isinstance(exc, StorageError):
                log.error("look-up failed", kind=kind.name, exc=exc)
            for waiters in batch.values():
                _fail(waiters, exc)
            return
        items = list(batch.items())
        middle = len(items) // 2
        await self._load(kind, dict(items[:middle]))
        await self._load(kind, dict(items[middle:]))


def _cut(waiting: dict[Any, list[asyncio.Future[Any]]]) -> dict[Any, list[asyncio.Future[Any]]]:
    """Takes up to MAX_KEYS keys, oldest first, leaving out those whose waiters have all gone."""
    batch = {}
    for key in list(islice(waiting, MAX_KEYS)):
        waiters = waiting.pop(key)
        if not all(future.done() for future in waiters):
            batch[key] = waiters
    return batch


def _fail(waiters: list[asyncio.Future[Any]], exc: Exception) -> None:
    for future in waiters:
        if not future.done():
            # One exception object raised in many tasks would collect all their tracebacks.
            own = type(exc)(str(exc)) if isinstance(exc, StorageError) else StorageError(f"look-up failed: {exc!r}")
            own.__cause__ = exc
            future.set_exception(own)
