"""`scripts/bench cluster --rows N`: a node joins another one that has N sessions. How long, at what cost in memory, and
for how long nobody was served meanwhile.

It is done twice, with two nodes each time: without a session, then with N. What both have in common cancels out.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from bench_own import Failed
from devnode import POLL, ROOT, Node, configuration, free_ports, raise_file_limit, share_cookie
from sampling import Sample, memory

HERE = Path(__file__).resolve().parent
HOST = "support.example.com"  # addresses are as long as they are in life
START = 60.0  # s for a node to serve
SETTLE = 1.5  # s between the join and the look at memory: a few heartbeats, digests


@dataclass(slots=True)
class RowNode:
    """A rownode.py that runs."""

    node: Node
    process: "subprocess.Popen[str]"

    def order(self, text: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(text + "\n")
            self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise Failed(f"{self.node.name} has ended: {self.node.log.read_text()[-1000:]}")
        found: dict[str, Any] = json.loads(answer)
        return found

    def pss_mb(self) -> float:
        return memory([self.process.pid])[1]


def measure(rows: int, folder: Path, cpus: str | None) -> dict[str, Any]:
    """Raises Failed."""
    before = joined(0, folder / "without", cpus)
    after = joined(rows, folder / "with", cpus)
    grown = after["newcomer_pss_mb"] - before["newcomer_pss_mb"]
    return {
        "rows": rows,
        "join_s": after["join_s"],
        "join_without_rows_s": before["join_s"],
        "join_cpu_s": after["join_cpu_s"],
        "rows_arrive_s": after["rows_arrive_s"],
        "longest_pause_ms": after["longest_pause_ms"],
        "longest_busy_ms": after["longest_busy_ms"],
        "longest_pause_without_rows_ms": before["longest_pause_ms"],
        "pss_bytes_per_row": round(grown * 1024 * 1024 / rows, 1),
        "newcomer_pss_mb": {"without": before["newcomer_pss_mb"], "with": after["newcomer_pss_mb"]},
        "owner_pss_mb": {"without": before["owner_pss_mb"], "with": after["owner_pss_mb"]},
        "nats_pss_mb": after["nats_pss_mb"],
        "other_cores": after["other_cores"],
    }


def joined(rows: int, folder: Path, cpus: str | None) -> dict[str, Any]:
    """Two fresh nodes, sessions on the first one, and the second one joins."""
    with two_nodes(folder, cpus) as (owner, newcomer):
        if rows:
            owner.order(f"open {rows}")
        owner.order("watch 0")
        newcomer.order(f"watch {rows}")
        roots = {"owner": [owner.process.pid], "newcomer": [newcomer.process.pid], "all": [os.getpid()]}
        starts = {name: Sample.take(pids) for name, pids in roots.items()}
        asked = newcomer.node.ask("join_cluster", owner.node.name)
        ends = {name: Sample.take(pids) for name, pids in roots.items()}
        start, end = starts["all"], ends["all"]
        if asked.returncode:
            raise Failed(f"join_cluster: {(asked.stderr or asked.stdout).strip()}")
        time.sleep(SETTLE)
        there, here = owner.order("report"), newcomer.order("report")
        agreed = newcomer.node.ask("cluster_status")
        if agreed.returncode or here["rows_of_others"] != rows:
            raise Failed(f"{newcomer.node.name} has {here['rows_of_others']} of {rows} rows: {agreed.stdout}")
        children = [Sample.take([one.process.pid]).pss_mb - one.pss_mb() for one in (owner, newcomer)]
        seconds = end.time - start.time
        arrived = here["all_rows_s"] - here["first_row_s"] if rows else 0.0
        return {
            "join_s": round(seconds, 2),
            "join_cpu_s": {name: round(ends[name].cpu - starts[name].cpu, 2) for name in ("owner", "newcomer")},
            "rows_arrive_s": round(arrived, 2),
            "longest_pause_ms": {"owner": there["longest_pause_ms"], "newcomer": here["longest_pause_ms"]},
            "longest_busy_ms": {"owner": there["longest_busy_ms"], "newcomer": here["longest_busy_ms"]},
            "newcomer_pss_mb": round(newcomer.pss_mb(), 2),
            "owner_pss_mb": round(owner.pss_mb(), 2),
            "nats_pss_mb": [round(each, 1) for each in children],
            "other_cores": round(max(end.machine_busy - start.machine_busy - (end.cpu - start.cpu), 0) / seconds, 3),
        }


@contextlib.contextmanager
def two_nodes(folder: Path, cpus: str | None) -> Iterator[tuple[RowNode, RowNode]]:
    nodes = [Node(name, str(folder / name)) for name in ("xmppd@node01", "xmppd@node02")]
    with free_ports() as next_port:
        for node in nodes:
            node.path.mkdir(parents=True, mode=0o700)
            database = f"sqlite:///{folder / 'xmppd.db'}"
            config = configuration(node, {"hosts": [HOST]}, database=database, plain=True, next_port=next_port)
            node.config.write_text(yaml.safe_dump(config))
    share_cookie([], nodes)
    raise_file_limit()
    running: list[RowNode] = []
    try:
        for node in nodes:
            running.append(launch(node, cpus))  # noqa: PERF401 - those before one that fails must be ended
        end = time.monotonic() + START
        while any(node.ready() is None for node in nodes):
            if time.monotonic() > end or any(one.process.poll() is not None for one in running):
                logs = "\n".join(node.log.read_text()[-1000:] for node in nodes)
                raise Failed(f"the nodes do not serve:\n{logs}")
            time.sleep(POLL)
        yield running[0], running[1]
    finally:
        for one in running:
            end_of(one.process)


def launch(node: Node, cpus: str | None) -> RowNode:
    command = [sys.executable, "-P", str(HERE / "rownode.py"), str(node.config)]
    with node.log.open("ab") as log:
        process = subprocess.Popen(
            ["taskset", "-c", cpus, *command] if cpus else command,
            cwd=node.path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    return RowNode(node, process)


def end_of(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()  # which it takes as the order to stop
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()
