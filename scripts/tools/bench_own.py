"""What the scenarios of `scripts/bench` share: nodes of their own, accounts on them, the middle of several rounds."""

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from devnode import merged, read_overlay

HERE = Path(__file__).resolve().parent
COST = "server_cpu_us_per_message"
TROUBLE = ("lost", "bounced", "failed", "closed_early")


class Failed(Exception):
    """There is no result; the text says why."""


@dataclass
class Server:
    """What is measured: where it listens, and the processes whose CPU and memory count (none: not sampled)."""

    plain: str  # IP:PORT[,IP:PORT]; STARTTLS or no TLS
    direct_tls: str
    host: str
    pids: list[int] = field(default_factory=list)
    database_pids: list[int] = field(default_factory=list)


@dataclass
class Own:
    """Nodes that run for this measurement. `nodes`: as `devcluster up --json` tells of them."""

    folder: str
    nodes: list[dict[str, Any]]
    database_pids: list[int]

    @property
    def server(self) -> Server:
        plain, direct = (",".join(node[door] for node in self.nodes) for door in ("c2s", "c2s_tls"))
        pids = [node["pid"] for node in self.nodes]
        return Server(plain, direct, self.nodes[0]["hosts"][0], pids, self.database_pids)

    @property
    def ports(self) -> list[int]:
        return [int(node["c2s"].rpartition(":")[2]) for node in self.nodes]

    def ctl(self, *argv: str, place: int = 0, stdin: str | None = None) -> str:
        """What a command prints; Failed when it fails."""
        done = subprocess.run([*self.nodes[place]["xmppctl"], *argv], input=stdin, capture_output=True, text=True)
        if done.returncode:
            raise Failed(f"{' '.join(argv)}: {(done.stderr or done.stdout).strip()[-1000:]}")
        return done.stdout

    def register(self, users: range) -> None:
        """The accounts u00000 and so on, on the first of its hosts."""
        host = self.nodes[0]["hosts"][0]
        self.ctl("batch", stdin="".join(f"register u{user:05} {host} p{user:05}\n" for user in users))


@contextlib.contextmanager
def own_nodes(
    count: int = 1,
    *,
    config: dict[str, Any] | None = None,
    file: str | None = None,
    mysql: str | None = None,
    cpus: str | None = None,
) -> Iterator[Own]:
    """`config`, and what the YAML `file` says over it. `mysql`: a URL, or "own": a MariaDB is started for it."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="xmppd-bench-"))
        pids: list[int] = []
        if mysql == "own":
            mysql, pid = stack.enter_context(own_mariadb())
            pids.append(pid)
        devcluster = [sys.executable, str(HERE / "devcluster.py")]
        up = [*devcluster, "up", str(count), "--dir", f"{folder}/cluster", "--json", "--plain"]
        if config or file:
            overlay = Path(folder) / "overlay.yml"
            overlay.write_text(yaml.safe_dump(merged(config or {}, read_overlay(file))))
            up += ["--config", str(overlay)]
        up += ["--mysql", mysql] if mysql else []
        up += ["--cpus", cpus] if cpus else []
        try:
            started = subprocess.run(up, stdout=subprocess.PIPE, text=True)
            if started.returncode:
                raise Failed("the node did not start" if count == 1 else "the nodes did not start")
            yield Own(folder, [json.loads(line) for line in started.stdout.splitlines()], pids)
        finally:
            subprocess.run([*devcluster, "down", "--dir", f"{folder}/cluster"], check=False)


@contextlib.contextmanager
def own_mariadb() -> Iterator[tuple[str, int]]:
    """The URL of an empty database, and the process."""
    from tests import mariadb

    if why := mariadb.missing():
        raise Failed(f"{why}; or name a database: --mysql URL")
    server = mariadb.MariaDB()
    try:
        yield server.new_database(), server.pid
    finally:
        server.destroy()


def middle(runs: Sequence[dict[str, Any]], cost: str = COST) -> dict[str, Any]:
    """The run of which half of the others were dearer, with the cost of each round and the trouble of all."""
    ranked = sorted(runs, key=lambda one: float(one[cost]))
    found = ranked[(len(ranked) - 1) // 2] | {f"{cost}_of_rounds": [one[cost] for one in ranked]}
    return found | {trouble: sum(one[trouble] for one in runs) for trouble in TROUBLE}
