"""`scripts/chaos`: a cluster under load, faults, and an account of every message. docs/chaos.md tells how to read it.

Exit codes: 0 the promise was kept; 1 it was not (with --self-check: the loss was not seen); 2 wrong usage; 3 the run
itself failed.
"""

import argparse
import asyncio
import json
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import uvloop

from tests import mariadb
from tests.chaos.book import Book
from tests.chaos.client import KINDS, LATE, Client
from tests.chaos.faults import Faults
from tests.harness.cluster import RealCluster
from tests.harness.wires import Wires

TICK: Final = 0.02  # seconds
_COMING: Final = 60.0  # seconds until all clients must have logged in
_STUCK: Final = 90.0  # seconds without any progress until what has not come counts as lost
_QUIET: Final = 1.5  # seconds without a message: nothing more comes
_ROUND: Final = 30.0  # seconds until everybody logs in anew, quiet or not
_SILENT: Final = 2  # rounds in which nothing is acknowledged, kept or on its way: what is missing will not come


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--nodes", type=int, default=3)
    add("--pairs", type=int, default=20, help="of clients who write to each other")
    add("--rate", type=float, default=400, help="messages a second, of all together")
    add("--time", type=float, default=60, metavar="S", help="seconds under load")
    add("--messages", type=int, metavar="N", help="in place of --time: until so many are sent")
    add("--kills", type=int, default=3, metavar="N", help="SIGKILLs of a node, spread over the run")
    add("--faults", type=float, default=6, metavar="S", help="seconds between other faults, on average")
    add(
        "--only",
        metavar="KIND,...",
        help="other faults of these kinds only: restart, freeze, cut, nats, database, crowd; none",
    )
    add("--longest", type=float, default=20, metavar="S", help="seconds that a fault lasts at most")
    add("--unacknowledged", type=int, default=0, metavar="N", help="messages that must be unacknowledged at a kill")
    add("--database", choices=["sqlite", "mysql"], default="sqlite", help="mysql: a MariaDB of its own")
    add("--mysql", dest="database", action="store_const", const="mysql", help="the same as --database mysql")
    add("--seed", type=int, help="of faults and habits; what the machine makes of it differs from run to run")
    add("--report", metavar="FILE", help="where to write the report, as JSON; as it is meanwhile at SIGUSR1")
    add("--keep", metavar="DIR", help="a new folder for data and logs of the nodes, which then stay")
    add("--self-check", action="store_true", help="nodes acknowledge what they have merely received: it must be seen")
    arguments = parser.parse_args(argv)
    if arguments.nodes < 1 or arguments.pairs < 1:
        parser.error("there must be a node and a pair")
    if arguments.seed is None:
        arguments.seed = random.SystemRandom().randrange(1_000_000)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.database == "mysql" and (why := mariadb.missing()):
        print(f"chaos: {why}", file=sys.stderr)
        return 2
    folder = Path(arguments.keep or tempfile.mkdtemp(prefix="xmppd-chaos-")).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            report = runner.run(Run(arguments, folder).run())
    except Exception:
        traceback.print_exc()
        print(f"chaos: the run failed; data and logs are in {folder}", file=sys.stderr)
        return 3
    if arguments.report:
        Path(arguments.report).write_text(json.dumps(report, indent=1) + "\n")
    print(summary(report), flush=True)
    if not arguments.keep and (report["good"] or arguments.self_check):
        shutil.rmtree(folder, ignore_errors=True)
    else:
        print(f"data and logs: {folder}")
    if arguments.self_check:
        print("self-check:", "the loss was seen" if report["lost"] else "THE LOSS WAS NOT SEEN")
        return 0 if report["lost"] else 1
    return 0 if report["good"] else 1


class Run:
    """One run, from the start of the cluster to the report."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments, self.folder = arguments, folder
        self.dice = random.Random(arguments.seed)
        self.book = Book()
        self.counts: Counter[str] = Counter()
        self.clients: list[Client] = []
        self.spooled = 0  # rows, the most seen
        self._lives: list[asyncio.Task[None]] = []
        self._due = 0.0

    async def run(self) -> dict[str, Any]:
        arguments = self.arguments
        database = await asyncio.to_thread(mariadb.MariaDB) if arguments.database == "mysql" else None
        url = database.new_database() if database is not None else None
        cluster = RealCluster(self.folder, arguments.nodes, database=url, **OPTIONS)
        wires = Wires(cluster)
        self.faults = Faults(
            cluster,
            wires,
            database,
            self.clients,
            self.dice,
            early=arguments.self_check,
            longest=arguments.longest,
            unacknowledged=arguments.unacknowledged,
        )
        if arguments.only:
            wanted = set(arguments.only.split(","))
            self.faults.kinds = {name: kind for name, kind in self.faults.kinds.items() if name in wanted}
        try:
            await self.faults.start()
            return await self._run()
        finally:
            for task in self._lives:
                task.cancel()
            for client in self.clients:
                client.end()
            await asyncio.to_thread(cluster.end)
            wires.close()
            if database is not None:
                await asyncio.to_thread(database.destroy)

    async def _run(self) -> dict[str, Any]:
        began = time.time()
        if self.arguments.report:
            asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, self._write_report)
        await asyncio.to_thread(self._people)
        for client in self.clients:
            self._lives.append(asyncio.create_task(client.live()))
        await self._until(lambda: all(client.up for client in self.clients), "everybody has logged in", _COMING)
        await self._load()
        loaded = time.time()
        self.faults.note("nobody writes any more")
        await self.faults.mend()
        drained = await self._drain()
        return {
            **self._so_far(),
            "seconds": {"under_load": round(loaded - began, 1), "to_the_end": round(time.time() - loaded, 1)},
            "drained": drained,
            "spooled_at_most": self.spooled,
            "spooled_at_the_end": await asyncio.to_thread(self.faults.spooled),
        }

    def _so_far(self) -> dict[str, Any]:
        return {
            **self.book.verdict(),
            "seed": self.arguments.seed,
            "options": {name: value for name, value in vars(self.arguments).items() if name != "seed"},
            "faults": dict(self.faults.counts),
            "unacknowledged_at_kills": self.faults.at_kill,
            "clients": dict(sorted(self.counts.items())),
            "habits": dict(Counter(client.habits.name for client in self.clients)),
            "memory_kib": self.faults.memory,
            "errors_logged": self.faults.trouble()[:50],
            "trail": [f"{at:.3f} {what}" for at, what in self.faults.trail],
        }

    def _write_report(self) -> None:
        """What is not at an end yet counts as lost in it."""
        Path(self.arguments.report).write_text(json.dumps(self._so_far(), indent=1) + "\n")

    def _people(self) -> None:
        first = self.faults.cluster[0]
        for pair in range(self.arguments.pairs):
            names = (f"u{pair}a", f"u{pair}b")
            for place, name in enumerate(names):
                first.register(name, "secret")
                # Both of a pair have habits of their own, and each habit meets each other one sooner or later.
                habits = KINDS[(pair if place else pair + pair // len(KINDS) + 1) % len(KINDS)]
                if self.arguments.self_check:
                    habits = LATE
                dice = random.Random(f"{self.arguments.seed} {name}")
                peer = names[1 - place]
                self.clients.append(Client(name, peer, habits, self.book, self.faults.places, dice, self.counts))

    async def _until(self, reached: Any, what: str, patience: float) -> None:
        end = time.monotonic() + patience
        while not reached():
            if time.monotonic() > end:
                failed = {client.failure for client in self.clients if not client.up}
                raise AssertionError(f"{what}: not within {patience} s; {failed}")
            await asyncio.sleep(TICK)

    # -- under load

    async def _load(self) -> None:
        arguments, dice, loop = self.arguments, self.dice, asyncio.get_running_loop()
        began = now = seen = loop.time()
        kills = [(number + dice.uniform(0.2, 0.8)) / max(arguments.kills, 1) for number in range(arguments.kills)]
        next_fault = began + dice.expovariate(1 / arguments.faults)
        next_look = began + 1
        done = 0.0
        while done < 1:
            await asyncio.sleep(TICK)
            now, before = loop.time(), now
            self._write(now - before)
            done = self.book.sent / arguments.messages if arguments.messages else (now - began) / arguments.time
            if kills and done >= kills[0]:
                kills.pop(0)
                self.faults.begin("kill")
            if now >= next_fault and self.faults.kinds:
                next_fault = now + dice.expovariate(1 / arguments.faults)
                self.faults.begin(self.faults.random())
            if now >= next_look:
                next_look, seen = now + 1, now - seen
                self._live(now)

    def _write(self, seconds: float) -> None:
        """Everybody's share; those who flood write fifty times as much at once, fifty times more seldom."""
        dice = self.dice
        self._due += self.arguments.rate * seconds
        count = int(self._due)
        self._due -= count
        while count > 0:
            client = dice.choice(self.clients)
            if not client.habits.floods:
                client.write(1)
            elif dice.random() < 0.02:
                client.write(50)
            count -= 1
        if self.faults.flooding:
            for client in self.clients:
                client.write(10 if client.habits.managed else 0)

    def _live(self, now: float) -> None:
        """What happens to single clients, about once a second."""
        dice = self.dice
        self.faults.look()
        for client in self.clients:
            client.look(now)
            fate = dice.random()
            if fate < 0.03:
                client.vanish()
            elif fate < 0.04:
                client.absence = dice.uniform(1, 8)
                client.vanish()
            elif fate < 0.055:
                client.absence = dice.uniform(0.2, 8)
                client.leave()
            elif client.habits.slow and fate < 0.4:
                client.pause(dice.uniform(0.5, 3))

    # -- the end

    async def _drain(self) -> bool:
        """Until nobody waits for anything. False when it goes on no more, and something is missing."""
        loop = asyncio.get_running_loop()
        for client in self.clients:
            client.calm = True
        progress, last, silent = self._state(), loop.time(), 0
        while True:
            if await self._quiet() and not await self._spooled():
                if not self.book.owed():
                    return True
                silent += 1
            if (state := self._state()) != progress:
                progress, last, silent = state, loop.time(), 0
            if silent > _SILENT or loop.time() - last > _STUCK:
                return False
            # A new session for everybody: what waits in the database comes then, if it has not come before.
            for client in self.clients:
                client.leave()
            await asyncio.sleep(0.3)

    def _state(self) -> tuple[int, int, int]:
        return self.book.arrived, self.faults.unacknowledged, self.book.owed()

    async def _spooled(self) -> int:
        found = await asyncio.to_thread(self.faults.spooled)
        self.spooled = max(self.spooled, found)
        return found

    async def _quiet(self) -> bool:
        """Wait until everybody is there, everything is acknowledged, and nothing comes any more; False when that takes
        too long."""
        loop = asyncio.get_running_loop()
        began = now = loop.time()
        looked = 0.0
        while now - began < _ROUND:
            await asyncio.sleep(0.1)
            now = loop.time()
            quiet = now - max(began, *(client.received_at for client in self.clients)) > _QUIET
            if quiet and not self.faults.unacknowledged and all(client.up for client in self.clients):
                return True
            if now - looked > 1:
                looked = now
                for client in self.clients:
                    client.look(now)
        return False


OPTIONS: Final[dict[str, Any]] = {
    "listen": [{"port": 0, "ip": "127.0.0.1", "module": "c2s", "starttls_required": False}],
    "shaper_rules": {"c2s_shaper": "none", "max_user_offline_messages": "infinity"},
    "stream_management": {"ack_timeout": "15s", "resume_timeout": "30s"},
    "auth_scram": {"hashes": ["sha1"]},
}


def summary(report: dict[str, Any]) -> str:
    """For people."""
    counts, clients = report["faults"], report["clients"]
    kills = report["unacknowledged_at_kills"]
    lines = [
        f"seed {report['seed']}, {report['options']['nodes']} nodes on {report['options']['database']}, "
        f"{report['seconds']['under_load']:.0f} s under load, {report['seconds']['to_the_end']:.0f} s to the end",
        "faults: "
        + (", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "none")
        + (f"; unacknowledged at kills: {min(kills)} to {max(kills)}" if kills else ""),
        "clients: " + ", ".join(f"{count} {name}" for name, count in clients.items()),
        f"messages: {report['sent']} sent, {report['acknowledged']} acknowledged, {report['arrived']} arrived, "
        f"{report['given_back']} given back, {report['duplicates']} duplicates",
        f"LOST {report['lost']}, OUT OF ORDER {report['out_of_order']}, WRONG {report['wrong']}",
    ]
    for kind, named in report["named"].items():
        lines += [f"  {kind}: {one}" for one in named[:10]]
    if report["errors_logged"]:
        lines.append(f"errors in the nodes' logs ({len(report['errors_logged'])}):")
        lines += [f"  {line}" for line in report["errors_logged"][:5]]
    lines.append("the promise was kept" if report["good"] else "THE PROMISE WAS BROKEN")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
