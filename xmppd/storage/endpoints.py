"""The database servers of a node: where writes go, which replica may answer a read, who is up.

Writes, and every read that must not be late, go to one of `writers` at a time: the first of them that works, and from
then on that one until it fails. `readers` are replicas, of which a read that may be late gets one by weight.
"""

import asyncio
import random
from collections.abc import Iterator, Sequence
from typing import Final

from sqlalchemy.exc import SQLAlchemyError

from xmppd.errors import StorageError
from xmppd.log import get_logger
from xmppd.storage.endpoint import Endpoint, probe
from xmppd.storage.faults import Fault, classify

log = get_logger("storage")

PROBE_EVERY: Final = 1.0  # seconds
PROBE_PATIENCE: Final = 1.0  # for an answer
# So many that do not come in a row, and the server is down. When a member of a Galera cluster dies, the others take no
# writes for five seconds (evs.suspect_timeout): nothing is gained by going from one of them to the next.
_MISSES: Final = {"read": 2, "write": 5}
_SILENT: Final = 10.0  # seconds without any answer while all connections are in use
_NO_CLOCK: Final = ""
# Every node writes this each second: how far a replica has come, without the right to ask for its status.
_FRESH: Final = "SELECT MAX(last_seen_at) FROM node"


class Endpoints:
    """`writers` in the order of preference, at least one. A replica that is more than `max_lag` seconds late, or of
    which that is not known, is not asked."""

    def __init__(self, writers: Sequence[Endpoint], readers: Sequence[Endpoint], *, max_lag: float) -> None:
        self.writers = tuple(writers)
        self.readers = tuple(readers)
        self._max_lag = max_lag
        self._current = 0
        self._missed: dict[Endpoint, int] = {}
        self._latest = _NO_CLOCK  # what the writer last answered
        self._tasks: list[asyncio.Task[None]] = []

    def __iter__(self) -> Iterator[Endpoint]:
        return iter((*self.writers, *self.readers))

    @property
    def writer(self) -> Endpoint:
        return self.writers[self._current]

    @property
    def window(self) -> float:
        """Seconds after a write until every replica that is asked has it."""
        return self._max_lag + 3 * PROBE_EVERY

    def reader(self) -> Endpoint | None:
        """A replica for one read; None: ask the writer."""
        fit = [each for each in self.readers if each.usable and each.lag is not None and each.lag <= self._max_lag]
        if not fit:
            return None
        return random.choices(fit, [each.weight for each in fit])[0]

    def find(self, name: str) -> Endpoint:
        """Raises StorageError: there is no server of this name."""
        for endpoint in self:
            if name in (endpoint.name, endpoint.name.removesuffix(":3306")):
                return endpoint
        names = ", ".join(endpoint.name for endpoint in self)
        raise StorageError(f"no database server {name}: there is {names}")

    def take_down(self, endpoint: Endpoint) -> None:
        """Use it no more, until `bring_up`. Raises StorageError when nothing would be left to write to."""
        if endpoint.role == "write" and not any(each.usable for each in self.writers if each is not endpoint):
            raise StorageError(f"{endpoint.name} is the only server that takes writes")
        endpoint.down_by_hand = True
        log.info("database server taken down", endpoint=endpoint.name, role=endpoint.role)
        if endpoint is self.writer:
            self._move("taken down")

    def bring_up(self, endpoint: Endpoint) -> None:
        """Undo `take_down`; where it is really down, it is used when it is back."""
        endpoint.down_by_hand = False
        log.info("database server brought up", endpoint=endpoint.name, role=endpoint.role)
        if not self.writer.usable and endpoint.role == "write":
            self._move("another one is up")

    def failed(self, endpoint: Endpoint, fault: Fault) -> bool:
        """A statement could not be done there; True when another server takes writes now."""
        if fault.elsewhere:
            self._down(endpoint, fault.reason)
        return endpoint.role == "write" and endpoint is not self.writer

    def gave_up(self, endpoint: Endpoint, reason: str) -> None:
        """A replica that did not answer in time, or not what it should."""
        self._down(endpoint, reason)

    # -- health --------------------------------------------------------------------------------------------------------

    async def choose(self) -> None:
        """At the start: the first server that takes writes. With one there is no choice."""
        if len(self.writers) > 1:
            await asyncio.gather(*(self._probe(each, "SELECT 1") for each in self.writers))
            self._current = next((n for n, each in enumerate(self.writers) if each.usable), 0)

    def start(self) -> None:
        """Look after all of them, until `stop`."""
        self._tasks = [asyncio.create_task(self._watch(each), name=f"database {each.name}") for each in self]

    async def stop(self) -> None:
        """Close every connection."""
        tasks, self._tasks = self._tasks, []
        while tasks:
            for task in tasks:
                task.cancel()
            # A cancellation that meets the end of a TCP handshake is swallowed (asyncio.wait_for before Python 3.12).
            _, pending = await asyncio.wait(tasks, timeout=0.2)
            tasks = list(pending)
        for endpoint in self:
            await endpoint.dispose()

    async def _watch(self, endpoint: Endpoint) -> None:
        while True:
            try:
                await self._probe(endpoint, _FRESH)
                endpoint.reap()
            except Exception as exc:  # a bug; without this nobody would look after the server any more
                log.error("look at a database server failed", endpoint=endpoint.name, exc=exc)
            await asyncio.sleep(PROBE_EVERY)

    async def _probe(self, endpoint: Endpoint, question: str) -> None:
        loop = asyncio.get_running_loop()
        try:
            answer = await probe(endpoint, PROBE_PATIENCE, question)
        except TimeoutError:
            self._missed[endpoint] = self._missed.get(endpoint, 0) + 1
            if self._missed[endpoint] >= _MISSES[endpoint.role]:
                self._down(endpoint, f"no answer, {self._missed[endpoint]} times in a row")
            return
        except (SQLAlchemyError, StorageError, OSError) as exc:
            fault = classify(exc)
            if fault is None or fault.unavailable:
                self._down(endpoint, str(exc) if fault is None else fault.reason)
            return
        except Exception as exc:  # the driver's, past SQLAlchemy
            self._down(endpoint, str(exc.args[-1]) if exc.args else repr(exc))
            return
        if answer is None:  # every connection is in use: busy, or hanging
            if loop.time() - endpoint.answered_at > _SILENT:
                self._down(endpoint, f"no answer within {_SILENT:g} s")
            return
        self._missed[endpoint] = 0
        self._compare(endpoint, answer)
        if endpoint.role == "write" and endpoint.read_only and len(self.writers) > 1:
            self._down(endpoint, "it is read-only")
        elif not endpoint.up:
            self._back(endpoint)

    def _compare(self, endpoint: Endpoint, answer: str) -> None:
        if endpoint is self.writer:
            self._latest = answer
        elif endpoint.role == "read":
            known = self._latest != _NO_CLOCK and answer != ""
            endpoint.lag = max(0.0, (int(self._latest) - int(answer)) / 1000) if known else None

    def _down(self, endpoint: Endpoint, reason: str) -> None:
        endpoint.reason = reason
        if endpoint.up and not self._alone(endpoint):
            log.warning("database server lost", endpoint=endpoint.name, role=endpoint.role, reason=reason)
        endpoint.up = False
        if endpoint is self.writer and not self._move(reason):
            return  # whoever has a statement there waits for its end: there is nowhere else to go
        endpoint.abort()

    def _back(self, endpoint: Endpoint) -> None:
        endpoint.up, endpoint.reason = True, ""
        if not self._alone(endpoint):
            log.info("database server back", endpoint=endpoint.name, role=endpoint.role)
        if endpoint.role == "write" and not self.writer.usable and endpoint.usable:
            self._move("another one is up")

    def _alone(self, endpoint: Endpoint) -> bool:
        return endpoint.role == "write" and len(self.writers) == 1

    def _move(self, why: str) -> bool:
        """To the next server that works. When none does, the present one is tried on."""
        count = len(self.writers)
        for step in range(1, count):
            place = (self._current + step) % count
            if self.writers[place].usable:
                before, self._current = self.writer, place
                self._latest = _NO_CLOCK
                log.warning("writes go to another database server", to=self.writer.name, before=before.name, why=why)
                return True
        return False
