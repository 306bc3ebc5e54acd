"""A cluster for development, tests and benches: nodes in the background on free loopback ports, joined to each other.

    scripts/devcluster up N [--mysql URL] [--json] [--plain] [--config FILE] [--cpus LIST] [--timeout S]
    scripts/devcluster status [--json]     exit code 0 when all serve and their tables agree
    scripts/devcluster kill NAME           SIGKILL, as a power cut does it
    scripts/devcluster start NAME [--json]
    scripts/devcluster down                stops every node that runs; data and logs stay

All take --dir D, the folder of the cluster; without it var/devcluster in this checkout. NAME is `xmppd@node02`,
`node02` or `2`. A node lives in D/xmppd@node02: xmppd.yml, xmppd.log, pid, its data. The database of all of them is
D/xmppd.db, or --mysql URL, which is remembered. A node keeps its ports for as long as the cluster lives.

`up` returns when every node has all others' tables. On the folder of a cluster that is down it starts that again, with
its data. With another N it adds nodes to the cluster, or takes the last ones out of it for good and deletes their
folders, whether the cluster runs or not. --plain, --config and --cpus count for the nodes that it configures: new ones,
and all when none runs.

--json prints one object per node, one a line. Exit codes: 0 done, 1 not done (the reason is on standard error), 2 wrong
usage.
"""

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from devnode import (
    POLL,
    ROOT,
    Node,
    PortTaken,
    Refused,
    configuration,
    free_ports,
    kill,
    read_overlay,
    share_cookie,
    start,
    stop,
    wait_until_gone,
)

STATE = "devcluster.json"
MAX_NODES = 32
PORT_ATTEMPTS = 3  # until a node starts, which takes a second, others may take the ports that were free
ALREADY_JOINED = 17  # exit code of join_cluster
LEAVE = 20.0  # s for a node that was taken out to stop


def main() -> None:
    arguments = parse(sys.argv[1:])
    folder = Path(arguments.dir).absolute()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that an `up` that is ended cleans up behind itself
    try:
        if arguments.command == "up":
            up(folder, arguments)
        elif arguments.command == "down":
            down(folder)
        elif arguments.command == "status":
            sys.exit(status(Cluster.load(folder), as_json=arguments.json))
        elif arguments.command == "kill":
            with locked(folder):
                kill(Cluster.load(folder).node(arguments.name))
        elif arguments.command == "start":
            with locked(folder):
                start_again(Cluster.load(folder), arguments)
    except Refused as refusal:
        print(f"devcluster: {refusal}", file=sys.stderr)
        sys.exit(1)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="devcluster", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, *, starts: bool = False, prints: bool = False) -> argparse.ArgumentParser:
        command = commands.add_parser(name)
        command.add_argument(
            "--dir", default=str(ROOT / "var" / "devcluster"), metavar="D", help="the folder of the cluster"
        )
        if prints:
            command.add_argument("--json", action="store_true", help="one JSON object per node, one a line")
        if starts:
            command.add_argument(
                "--timeout", type=float, default=60, metavar="S", help="seconds until a node must serve"
            )
        return command

    command = add("up", starts=True, prints=True)
    command.add_argument("count", type=int, metavar="N", help="how many nodes")
    command.add_argument(
        "--mysql", metavar="URL", help="mysql://USER:PASSWORD@HOST/DATABASE in place of an SQLite file"
    )
    command.add_argument(
        "--plain",
        action="store_true",
        help="clients may log in without TLS, and send as fast as they can (for benches)",
    )
    command.add_argument("--config", metavar="FILE", help="YAML merged over the generated configuration")
    command.add_argument("--cpus", metavar="LIST", type=cpu_list, help="CPUs the nodes may run on, such as 0 or 0,2-3")
    add("down")
    add("status", prints=True)
    add("kill").add_argument("name", metavar="NAME")
    add("start", starts=True, prints=True).add_argument("name", metavar="NAME")
    return parser.parse_args(argv)


def cpu_list(text: str) -> tuple[int, ...]:
    """`0,2-3` as (0, 2, 3).

    Raises:
        argparse.ArgumentTypeError: no such list, or a CPU this process may not use.
    """
    cpus: set[int] = set()
    try:
        for part in text.split(","):
            first, dash, last = part.partition("-")
            cpus.update(range(int(first), int(last if dash else first) + 1))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a list such as 0 or 0,2-3, got {text!r}") from None
    available = os.sched_getaffinity(0)
    if not cpus or not cpus <= available:
        raise argparse.ArgumentTypeError(f"{text!r}: the CPUs here are {', '.join(map(str, sorted(available)))}")
    return tuple(sorted(cpus))


# ---------------------------------------------------------------------------------------------- what there is


@dataclass(slots=True)
class Cluster:
    folder: Path
    nodes: list[Node] = field(default_factory=list)
    mysql: str | None = None  # URL; without one the database is a file

    @classmethod
    def load(cls, folder: Path) -> "Cluster":
        try:
            state = json.loads((folder / STATE).read_text())
        except FileNotFoundError:
            raise Refused(f"{folder} holds no development cluster (`devcluster up` makes one)") from None
        nodes = [Node(node["name"], node["folder"], node["cpus"] and tuple(node["cpus"])) for node in state["nodes"]]
        return cls(folder, nodes, state.get("mysql"))

    def save(self) -> None:
        fresh = self.folder / f"{STATE}.new"
        fresh.touch(mode=0o600)  # the URL holds a password
        fresh.write_text(json.dumps({"nodes": [asdict(node) for node in self.nodes], "mysql": self.mysql}, indent=1))
        fresh.replace(self.folder / STATE)

    @property
    def database(self) -> str:
        return self.mysql or f"sqlite:///{self.folder / 'xmppd.db'}"

    def alive(self) -> list[Node]:
        return [node for node in self.nodes if node.pid()]

    def node(self, name: str) -> Node:
        for number, node in enumerate(self.nodes, 1):
            if name in (node.name, node.name.partition("@")[2], str(number)):
                return node
        raise Refused(f"no such node: {name}. There is {', '.join(node.name for node in self.nodes)}")


# ---------------------------------------------------------------------------------------------- the commands


def up(folder: Path, arguments: argparse.Namespace) -> None:
    if not 1 <= arguments.count <= MAX_NODES:
        raise Refused(f"{arguments.count} nodes: expected 1 to {MAX_NODES}")
    over = read_overlay(arguments.config)
    if (
        folder.exists()
        and not (folder / STATE).exists()
        and any(name for name in folder.iterdir() if name.name != ".lock")
    ):
        raise Refused(f"{folder} is not empty and holds no development cluster; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        cluster = Cluster.load(folder) if (folder / STATE).exists() else Cluster(folder, mysql=arguments.mysql)
        alive = cluster.alive()
        if len(alive) == len(cluster.nodes) == arguments.count:
            named = ", ".join(f"{node.name} (pid {node.pid()})" for node in alive)
            raise Refused(f"{folder} belongs to a live cluster: {named}. `devcluster down` stops it")
        if arguments.mysql not in (None, cluster.mysql):
            raise Refused(f"{folder} belongs to a cluster with another database; choose another folder")
        try:
            bring_up(cluster, over, arguments)
        except BaseException:
            stop([node for node in cluster.alive() if node not in alive])  # nothing that we started goes on running
            raise
        if print_all(cluster.nodes, as_json=arguments.json):
            raise Refused("the cluster does not agree (any more)")


def bring_up(cluster: Cluster, over: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Make it `count` nodes that run and agree."""
    known = len(cluster.nodes)
    for number in range(known + 1, arguments.count + 1):
        name = f"xmppd@node{number:02}"
        cluster.nodes.append(Node(name, str(cluster.folder / name), arguments.cpus))
    dead = [node for node in cluster.nodes[: arguments.count] if not node.pid()]
    to_configure = cluster.nodes[known:]
    if not cluster.alive():
        cluster.nodes = [Node(node.name, node.folder, arguments.cpus) for node in cluster.nodes]
        dead = to_configure = cluster.nodes[: arguments.count]
    for left in reversed(range(PORT_ATTEMPTS)):
        configure(cluster, to_configure, over, plain=arguments.plain)
        try:
            start(dead, arguments.timeout)
        except PortTaken:
            if not left:
                raise
        else:
            break
    for node in reversed(cluster.nodes[arguments.count :]):
        take_out(cluster, node)
    for node in cluster.nodes[1:]:
        joined = node.ask("join_cluster", cluster.nodes[0].name)
        if joined.returncode not in (0, ALREADY_JOINED):
            raise Refused(f"{node.name} did not join: {(joined.stderr or joined.stdout).strip()}")
    wait_until_they_agree(cluster.nodes, arguments.timeout)


def configure(cluster: Cluster, nodes: Sequence[Node], over: dict[str, Any], *, plain: bool) -> None:
    with free_ports() as next_port:
        for node in nodes:
            node.path.mkdir(mode=0o700, exist_ok=True)  # secrets will stand in it
            config = configuration(node, over, database=cluster.database, plain=plain, next_port=next_port)
            node.config.touch(mode=0o600)
            node.config.write_text(yaml.safe_dump(config, sort_keys=False))
    share_cookie(cluster.nodes, [node for node in nodes if not node.cookie.exists()])
    cluster.save()


def take_out(cluster: Cluster, node: Node) -> None:
    """Out of the cluster for good."""
    pid = node.pid()
    done = cluster.nodes[0].ask("leave_cluster", node.name)
    if done.returncode and "no member" not in done.stderr + done.stdout:  # an `up` that failed before it joined
        raise Refused(f"{node.name} did not leave: {(done.stderr or done.stdout).strip()}")
    if pid and wait_until_gone({node: pid}, LEAVE):
        stop([node])
    cluster.nodes.remove(node)
    cluster.save()
    shutil.rmtree(node.path, ignore_errors=True)


def down(folder: Path) -> None:
    if not (folder / STATE).exists():
        return  # nothing to stop: asking twice is no fault
    with locked(folder):
        stop(Cluster.load(folder).nodes)


def start_again(cluster: Cluster, arguments: argparse.Namespace) -> None:
    node = cluster.node(arguments.name)
    start([node], arguments.timeout)
    wait_until_they_agree(cluster.alive(), arguments.timeout)
    show(node, as_json=arguments.json)


def status(cluster: Cluster, *, as_json: bool) -> int:
    return print_all(cluster.nodes, as_json=as_json)


# ---------------------------------------------------------------------------------------------- how they are


@dataclass(frozen=True, slots=True)
class View:
    """What a node says about the cluster."""

    agrees: bool  # and everybody it sees agrees with it
    peers: int  # links that are up
    sessions: int  # of its own
    why: str  # it does not agree

    @classmethod
    def of(cls, node: Node) -> "View":
        if node.ready() is None:
            return cls(False, 0, 0, "does not serve")
        asked = node.ask("--json", "cluster_status")
        try:
            said = json.loads(asked.stdout)
        except ValueError:
            return cls(False, 0, 0, asked.stderr.strip() or asked.stdout.strip())
        own = [
            row["rows"]
            for row in said["tables"]
            if row["table"] == "session" and row["node"] == row["owner"] == node.name
        ]
        links = [link for link in said["links"] if link["node"] == node.name and link["state"] == "up"]
        return cls(asked.returncode == 0, len(links), sum(own), "; ".join(said["missing"]))


def views(nodes: Sequence[Node]) -> list[View]:
    with ThreadPoolExecutor(len(nodes) or 1) as pool:  # xmppctl is a process: they run side by side
        return list(pool.map(View.of, nodes))


def one_cluster(seen: Sequence[View]) -> bool:
    """Whether each of them has a link to each other one, and the same tables."""
    return all(view.agrees and view.peers == len(seen) - 1 for view in seen)


def wait_until_they_agree(nodes: Sequence[Node], timeout: float) -> None:
    """Raises Refused."""
    end = time.monotonic() + timeout
    while not one_cluster(seen := views(nodes)):
        if time.monotonic() > end:
            told = "; ".join(
                f"{node.name} has {view.peers} peers{f' ({view.why})' if view.why else ''}"
                for node, view in zip(nodes, seen, strict=True)
            )
            raise Refused(f"the nodes do not agree after {timeout:g} s: {told}")
        time.sleep(POLL)


def print_all(nodes: Sequence[Node], *, as_json: bool) -> int:
    """The exit code of `status`."""
    seen = views(nodes)
    agree = one_cluster(seen)
    if as_json:
        for node in nodes:
            show(node, as_json=True)
        return 0 if agree else 1
    rows = [["node", "state", "peers", "sessions", "pid", "c2s", "c2s_tls", "http", "log"]]
    for node, view in zip(nodes, seen, strict=True):
        about = node.describe()
        state = "serves" if about["pid"] else "starting" if node.pid() else "stopped"
        doors = (str(about[door] or "") for door in ("c2s", "c2s_tls", "http"))
        numbers = (view.peers, view.sessions, node.pid() or "")
        rows.append([node.name, state, *map(str, numbers), *doors, str(node.log)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if len(nodes) > 1:
        print("one cluster: all have the same tables" if agree else "not one cluster:")
        for node, view in zip(nodes, seen, strict=True):
            if view.why:
                print(f"  {node.name}: {view.why}")
    sys.stdout.flush()
    return 0 if agree else 1


def show(node: Node, *, as_json: bool) -> None:
    about = node.describe()
    if as_json:
        print(json.dumps(about), flush=True)
    elif about["pid"]:
        doors = " ".join(f"{door}={about[door]}" for door in ("c2s", "c2s_tls", "http") if about[door])
        print(f"{node.name} serves {','.join(about['hosts'])} pid={about['pid']} {doors} log={node.log}", flush=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One change at a time per cluster."""
    try:
        lock = (folder / ".lock").open("w")
    except FileNotFoundError:
        raise Refused(f"{folder} holds no development cluster (`devcluster up` makes one)") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    main()
