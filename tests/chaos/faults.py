"""What goes wrong in a run of scripts/chaos, drawn from a seed, on a cluster of real processes.

Kills are spread evenly over the run; everything else comes at random between them. Each fault mends itself, and
`mend` mends all that are left.
"""

import asyncio
import os
import random
import signal
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Final

from tests.chaos.client import Client
from tests.harness.cluster import ClusterNode, RealCluster
from tests.harness.wires import Wires
from tests.mariadb import MariaDB

EARLY: Final = (sys.executable, "-m", "tests.chaos.early_node")
_FLOODING: Final = 6.0  # seconds until a kill goes on without as many unacknowledged messages as it was to have
_STOPPED: Final = 10.0  # seconds without a database


class Faults:
    """`kinds`: names and weights. `unacknowledged`: how many there are to be at a kill; `flood(n)` sees to it."""

    def __init__(
        self,
        cluster: RealCluster,
        wires: Wires,
        database: MariaDB | None,
        clients: list[Client],
        dice: random.Random,
        *,
        early: bool = False,
        longest: float = 20.0,
        unacknowledged: int = 0,
    ) -> None:
        self.cluster, self.wires, self.clients, self.dice = cluster, wires, clients, dice
        self.counts: Counter[str] = Counter()
        self.at_kill: list[int] = []  # unacknowledged messages
        self.trail: list[tuple[float, str]] = []
        self.memory: dict[str, int] = {node.name: 0 for node in cluster}  # KiB, the highest seen
        self.wanted = unacknowledged
        self.flooding = False
        self.launched = 0
        self._database = database
        self._prefix = EARLY if early else ()
        self._longest = longest
        self._busy: set[ClusterNode] = set()
        self._away: set[ClusterNode] = set()  # does not serve
        self._wires_busy = self._database_busy = False
        self._mending = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self.kinds: dict[str, tuple[int, Callable[[], Awaitable[None]]]] = {
            "restart": (1, self.restart),
            "freeze": (2, self.freeze),
            "cut": (3, self.cut),
            "nats": (2, self.kill_nats),
            "database": (1, self.stop_database),
            "crowd": (2, self.reset_many),
        }

    def note(self, what: str) -> None:
        self.trail.append((time.time(), what))

    def places(self) -> dict[int, int]:
        """The ports of the nodes that could be there."""
        nodes = enumerate(self.cluster)
        return {number: node.port for number, node in nodes if node not in self._away and node.process is not None}

    @property
    def unacknowledged(self) -> int:
        return sum(client.unacknowledged for client in self.clients)

    # -- starting

    async def start(self) -> None:
        await asyncio.to_thread(self._start)

    def _start(self) -> None:
        for node in self.cluster:
            node.launch(*self._prefix)
        for node in self.cluster:
            node.wait_until_ready()
        self.cluster.join()
        self.cluster.converged()

    # -- the course of things

    def begin(self, what: str) -> None:
        """A fault of this kind, which takes its time."""
        fault = self.kill if what == "kill" else self.kinds[what][1]
        task = asyncio.create_task(self._run(what, fault))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def random(self) -> str:
        names = list(self.kinds)
        return self.dice.choices(names, [self.kinds[name][0] for name in names])[0]

    async def _run(self, what: str, fault: Callable[[], Awaitable[None]]) -> None:
        try:
            await fault()
        except Exception as exc:
            self.note(f"{what} went wrong: {exc!r}")
            self.counts["went wrong"] += 1

    async def mend(self) -> None:
        """Everything is brought back, and the cluster is one again. AssertionError when it is not."""
        self._mending.set()
        if self._tasks:
            await asyncio.wait(list(self._tasks))
        await asyncio.to_thread(self.wires.heal)
        if self._database is not None:
            await asyncio.to_thread(self._database.start)
        for node in self.cluster:
            if node.process is None or node.process.poll() is not None:
                self.note(f"{node.name} was not there at the end")
                self.counts["nodes that ended by themselves"] += 1
                await asyncio.to_thread(node.kill)
                await self._bring_back(node)
        self._away.clear()
        await asyncio.to_thread(self.cluster.converged)
        self.note("everything is mended")

    async def _sleep(self, seconds: float) -> None:
        """Or until all is to be mended."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._mending.wait(), seconds)

    def _pick(self) -> ClusterNode | None:
        """A node that nothing happens to; None when one of the others has to stay."""
        free = [node for node in self.cluster if node not in self._busy]
        return self.dice.choice(free) if len(free) > 1 or len(self.cluster.nodes) == 1 else None

    async def _bring_back(self, node: ClusterNode) -> None:
        for last in (False, False, True):
            try:
                await asyncio.to_thread(node.launch, *self._prefix)
                await asyncio.to_thread(node.wait_until_ready)
                return
            except AssertionError as exc:  # somebody else has its port, or the database is away
                self.note(f"{node.name} did not start: {str(exc)[-600:]}")
                await asyncio.to_thread(node.kill)
                if last:
                    raise
                await asyncio.sleep(2)

    # -- faults

    async def kill(self) -> None:
        """SIGKILL under load, as a power cut."""
        while (node := self._pick()) is None:
            if self._mending.is_set():  # one that did not come back stays busy
                return
            await self._sleep(0.2)
        self._busy.add(node)
        await self._flood()
        waiting = self.unacknowledged
        self.at_kill.append(waiting)
        self.counts["kill"] += 1
        self.note(f"kill {node.name}, {waiting} unacknowledged")
        self._away.add(node)
        assert node.process is not None
        node.process.kill()
        await asyncio.to_thread(node.kill)
        await self._sleep(self.dice.uniform(0.2, 4))
        await self._bring_back(node)
        self.note(f"{node.name} is back")
        self._away.discard(node)
        self._busy.discard(node)

    async def _flood(self) -> None:
        """Until there is as much on its way as there is to be."""
        self.flooding = True
        end = time.monotonic() + _FLOODING
        while self.unacknowledged < self.wanted and time.monotonic() < end and not self._mending.is_set():
            await self._sleep(0.01)
        self.flooding = False

    async def restart(self) -> None:
        """An orderly stop, and a start."""
        if (node := self._pick()) is None:
            return
        self._busy.add(node)
        self.counts["restart"] += 1
        self.note(f"stop {node.name}")
        self._away.add(node)
        code = await asyncio.to_thread(node.stop)
        self.note(f"{node.name} stopped with {code}")
        await self._bring_back(node)
        self.note(f"{node.name} is back")
        self._away.discard(node)
        self._busy.discard(node)

    async def freeze(self) -> None:
        """SIGSTOP for 1 to 20 s; who is not told goes on trying to log in there."""
        if (node := self._pick()) is None:
            return
        self._busy.add(node)
        self.counts["freeze"] += 1
        seconds = self.dice.uniform(1, self._longest)
        self.note(f"freeze {node.name} for {seconds:.1f} s")
        node.send_signal(signal.SIGSTOP)
        await self._sleep(seconds)
        node.send_signal(signal.SIGCONT)
        self.note(f"{node.name} goes on")
        self._busy.discard(node)

    async def cut(self) -> None:
        """No bytes between nodes: all of one's, between two, or one way between two."""
        if self._wires_busy or len(self.cluster.nodes) < 2:
            return
        self._wires_busy = True
        self.counts["cut"] += 1
        one, other = self.dice.sample(list(self.cluster), 2)
        seconds = self.dice.choice((0.1, 1.0, 4.0, self.dice.uniform(7, 12)))
        seconds = min(seconds, self._longest)
        pattern = self.dice.choice(("off", "off", "from", "one way from"))
        self.note(f"cut {one.name} {pattern} {'all' if pattern == 'off' else other.name} for {seconds:.1f} s")
        if pattern == "off":
            await asyncio.to_thread(self.wires.isolate, one)
        else:
            await asyncio.to_thread(partial(self.wires.cut, one, other, both=pattern == "from"))
        await self._sleep(seconds)
        await asyncio.to_thread(self.wires.heal)
        self.note("healed")
        self._wires_busy = False

    async def kill_nats(self) -> None:
        """SIGKILL to the nats-server of a node."""
        node = self.dice.choice(list(self.cluster))
        if node.process is None or node in self._busy:
            return
        for child in children(node.process.pid):
            if b"nats-server" in command(child):
                self.counts["nats"] += 1
                self.note(f"kill the nats-server of {node.name}")
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)

    async def stop_database(self) -> None:
        """MariaDB is stopped for 10 s; an SQLite file is locked by somebody else."""
        if self._database_busy:
            return
        self._database_busy = True
        self.counts["database"] += 1
        seconds = min(_STOPPED, self._longest)
        self.note(f"no database for {seconds:.0f} s")
        if self._database is not None:
            await asyncio.to_thread(self._database.stop)
            await self._sleep(seconds)
            await asyncio.to_thread(self._database.start)
        else:
            own = sqlite3.connect(self.file, timeout=5, isolation_level=None, check_same_thread=False)
            with closing(own), suppress(sqlite3.OperationalError):
                await asyncio.to_thread(own.execute, "BEGIN IMMEDIATE")
                await self._sleep(seconds)
                own.execute("ROLLBACK")
        self.note("the database is back")
        self._database_busy = False

    async def reset_many(self) -> None:
        """A tenth of all clients lose their connections at once, as with an access router that restarts."""
        self.counts["crowd"] += 1
        self.note("a tenth of the clients lose their connections")
        for client in self.clients:
            if self.dice.random() < 0.1:
                client.vanish()

    # -- looking

    @property
    def file(self) -> Path:
        return Path(self.cluster.database.removeprefix("sqlite:///"))

    def spooled(self) -> int:
        """Rows of the spool."""
        if self._database is not None:
            name = self.cluster.database.rpartition("/")[2]
            return int(str(self._database.query("SELECT COUNT(*) FROM spool", name)[0][0]))
        with closing(sqlite3.connect(f"file:{self.file}?mode=ro", uri=True, timeout=10)) as own:
            return int(own.execute("SELECT COUNT(*) FROM spool").fetchone()[0])

    def look(self) -> None:
        """How big the nodes are."""
        for node in self.cluster:
            with suppress(OSError, AssertionError, IndexError, ValueError):
                self.memory[node.name] = max(self.memory[node.name], node.memory)

    def trouble(self) -> list[str]:
        """ERROR lines of all nodes."""
        lines = []
        for node in self.cluster:
            lines += [f"{node.name} {line}" for line in node.log.splitlines() if " ERROR " in line[:60]]
        return lines


def children(pid: int) -> list[int]:
    """Of all its threads."""
    found: list[int] = []
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += map(int, listed.read_text().split())
    return found


def command(pid: int) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""
