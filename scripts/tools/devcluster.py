"""A cluster for development, tests and benches: nodes in the background on free loopback ports.

    scripts/devcluster up N --dir D [--json] [--plain] [--config FILE] [--cpus LIST] [--timeout S]
    scripts/devcluster down --dir D            stops every node that runs; data and logs stay
    scripts/devcluster status --dir D [--json]  exit code 0 when every node serves
    scripts/devcluster kill NAME --dir D        SIGKILL, as a power cut does it
    scripts/devcluster start NAME --dir D [--json]

NAME is `xmppd@node01`, or `node01` for short. A node lives in D/xmppd@node01: xmppd.yml, xmppd.log, pid, its data. It
keeps its ports for as long as the cluster lives. `up` on the folder of a cluster that is down starts it again, with
its data. --json prints one object per node, one a line. Exit codes: 0 done, 1 not done (the reason is on standard
error), 2 wrong usage.
"""

import argparse
import contextlib
import copy
import errno
import fcntl
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

ROOT = Path(__file__).resolve().parents[2]
STATE = "devcluster.json"
MAX_NODES = 1  # a server that cannot join others makes no cluster of more
STOP_GRACE = 30.0  # s until a node that does not stop is killed
POLL = 0.05  # s
PORT_ATTEMPTS = 3  # until a node starts, which takes a second, others may take the ports that were free
LOG_TAIL = 20  # lines


class Refused(Exception):
    """What was asked cannot be done; the text is for the person who asked."""


class PortTaken(Refused):
    """Somebody else has got a port of ours."""


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
                node = Cluster.load(folder).node(arguments.name)
                start(node, arguments.timeout)
                show(node, as_json=arguments.json)
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
        command.add_argument("--dir", required=True, metavar="D", help="the folder of the cluster")
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


@dataclass(frozen=True, slots=True)
class Node:
    name: str
    folder: str
    cpus: tuple[int, ...] | None = None

    @property
    def path(self) -> Path:
        return Path(self.folder)

    @property
    def config(self) -> Path:
        return self.path / "xmppd.yml"

    @property
    def log(self) -> Path:
        return self.path / "xmppd.log"

    def pid(self) -> int | None:
        """The process that serves this node now, or None. A pid that outlived its process, and perhaps belongs to
        another by now, is told by its command line."""
        try:
            pid = int((self.path / "pid").read_text())
        except (OSError, ValueError):
            return None
        return pid if runs(pid, self.config) else None

    def ready(self) -> dict[str, Any] | None:
        """What the running server says of itself, once it serves. A starting server removes what a killed one left
        behind before it writes its pid, hence the order."""
        pid = self.pid()
        if pid is None:
            return None
        try:
            ready: dict[str, Any] = json.loads((self.path / "ready.json").read_text())
        except (OSError, ValueError):
            return None
        return ready | {"pid": pid}

    def xmppctl(self) -> list[str]:
        """The argv prefix that talks to this node, from any folder."""
        installed = ROOT / ".venv" / "bin" / "xmppctl"
        if Path(sys.executable).parent == installed.parent and installed.exists():
            program = [str(installed)]
        else:
            program = ["env", f"PYTHONPATH={ROOT}", sys.executable, "-m", "xmppd.ctl"]
        return [*program, "--data-dir", self.folder]

    def describe(self) -> dict[str, Any]:
        ready = self.ready() or {}
        return {
            "name": self.name,
            "c2s": address(ready, "c2s", tls=False),
            "c2s_tls": address(ready, "c2s", tls=True),
            "http": address(ready, "http", tls=False) or address(ready, "http", tls=True),
            "hosts": ready.get("hosts", []),
            "pid": ready.get("pid"),
            "xmppctl": self.xmppctl(),
        }


@dataclass(frozen=True, slots=True)
class Cluster:
    folder: Path
    nodes: list[Node]

    @classmethod
    def load(cls, folder: Path) -> "Cluster":
        try:
            state = json.loads((folder / STATE).read_text())
        except FileNotFoundError:
            raise Refused(f"{folder} holds no development cluster (`devcluster up` makes one)") from None
        nodes = [Node(node["name"], node["folder"], node["cpus"] and tuple(node["cpus"])) for node in state["nodes"]]
        return cls(folder, nodes)

    def save(self) -> None:
        fresh = self.folder / f"{STATE}.new"
        fresh.write_text(json.dumps({"nodes": [asdict(node) for node in self.nodes]}, indent=1) + "\n")
        fresh.replace(self.folder / STATE)

    def node(self, name: str) -> Node:
        for node in self.nodes:
            if name in (node.name, node.name.partition("@")[2]):
                return node
        raise Refused(f"no such node: {name}. There is {', '.join(node.name for node in self.nodes)}")


def address(ready: dict[str, Any], module: str, *, tls: bool) -> str | None:
    for listener in ready.get("listen", []):
        if listener.get("module") == module and bool(listener.get("tls")) is tls:
            ip = listener["ip"]
            return f"[{ip}]:{listener['port']}" if ":" in ip else f"{ip}:{listener['port']}"
    return None


def runs(pid: int, config: Path) -> bool:
    """Does this process live, as a server with this configuration? (A zombie has no command line.)"""
    try:
        return os.fsencode(config) in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False


# ---------------------------------------------------------------------------------------------- the commands


def up(folder: Path, arguments: argparse.Namespace) -> None:
    if not 1 <= arguments.count <= MAX_NODES:
        raise Refused(f"{arguments.count} nodes: only 1 for now, since this version does not join nodes into a cluster")
    over = read_overlay(arguments.config)
    if (
        folder.exists()
        and not (folder / STATE).exists()
        and any(name for name in folder.iterdir() if name.name != ".lock")
    ):
        raise Refused(f"{folder} is not empty and holds no development cluster; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if (folder / STATE).exists():
            alive = [f"{node.name} (pid {pid})" for node in Cluster.load(folder).nodes if (pid := node.pid())]
            if alive:
                raise Refused(f"{folder} belongs to a live cluster: {', '.join(alive)}. `devcluster down` stops it")
        names = [f"xmppd@node{number:02}" for number in range(1, arguments.count + 1)]
        cluster = Cluster(folder, [Node(name, str(folder / name), arguments.cpus) for name in names])
        for left in reversed(range(PORT_ATTEMPTS)):
            configure(cluster, over, plain=arguments.plain)
            try:
                start_all(cluster, arguments.timeout)
            except PortTaken:
                if not left:
                    raise
            else:
                break
        for node in cluster.nodes:
            show(node, as_json=arguments.json)


def configure(cluster: Cluster, over: dict[str, Any], *, plain: bool) -> None:
    with free_ports() as next_port:
        for node in cluster.nodes:
            node.path.mkdir(mode=0o700, exist_ok=True)  # secrets will stand in it
            config = configuration(node, over, plain=plain, next_port=next_port)
            node.config.write_text(yaml.safe_dump(config, sort_keys=False))
    cluster.save()


def start_all(cluster: Cluster, timeout: float) -> None:
    try:
        for node in cluster.nodes:
            start(node, timeout)
    except BaseException:
        stop(cluster.nodes)  # an `up` that fails, or is interrupted, leaves nothing running
        raise


def down(folder: Path) -> None:
    if not (folder / STATE).exists():
        return  # nothing to stop: asking twice is no fault
    with locked(folder):
        stop(Cluster.load(folder).nodes)


def status(cluster: Cluster, *, as_json: bool) -> int:
    for node in cluster.nodes:
        show(node, as_json=as_json)
    return 0 if all(node.ready() for node in cluster.nodes) else 1


def show(node: Node, *, as_json: bool) -> None:
    about = node.describe()
    if as_json:
        print(json.dumps(about), flush=True)
    elif about["pid"]:
        doors = " ".join(f"{door}={about[door]}" for door in ("c2s", "c2s_tls", "http") if about[door])
        print(f"{node.name} serves {','.join(about['hosts'])} pid={about['pid']} {doors} log={node.log}", flush=True)
    else:
        state = f"starting pid={node.pid()}" if node.pid() else "stopped"
        print(f"{node.name} {state} log={node.log}", flush=True)


def kill(node: Node) -> None:
    pid = node.pid()
    if pid is None:
        raise Refused(f"{node.name} does not run")
    send(pid, signal.SIGKILL)
    wait_until_gone({node: pid}, 10)


def stop(nodes: list[Node]) -> None:
    """Ask all of them at once, wait, kill what is left."""
    left = {node: pid for node in nodes if (pid := node.pid())}
    for pid in left.values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    left = wait_until_gone(left, STOP_GRACE)
    for node, pid in left.items():
        print(f"devcluster: {node.name} (pid {pid}) did not stop in {STOP_GRACE:.0f} s: killed", file=sys.stderr)
        send(pid, signal.SIGKILL)
    if left := wait_until_gone(left, 10):
        raise Refused(f"still running: {', '.join(node.name for node in left)}")


def send(pid: int, number: int) -> None:
    """To the process with all its workers: `start` gave it a process group of its own."""
    with contextlib.suppress(ProcessLookupError):
        if os.getpgid(pid) == pid:
            os.killpg(pid, number)
        else:
            os.kill(pid, number)


def wait_until_gone(left: dict[Node, int], seconds: float) -> dict[Node, int]:
    end = time.monotonic() + seconds
    while True:
        left = {node: pid for node, pid in left.items() if runs(pid, node.config)}
        if not left or time.monotonic() > end:
            return left
        time.sleep(POLL)


# ---------------------------------------------------------------------------------------------- starting a node


def start(node: Node, timeout: float) -> None:
    """Returns when the node serves.

    Raises:
        Refused: it runs already, ended, or did not serve in time; with the end of its log.
    """
    if pid := node.pid():
        raise Refused(f"{node.name} runs already (pid {pid})")
    for stale in ("pid", "ready.json"):
        (node.path / stale).unlink(missing_ok=True)
    raise_file_limit()
    own_cpus = os.sched_getaffinity(0)
    with node.log.open("ab") as log:
        begin = log.tell()
        if node.cpus:
            os.sched_setaffinity(0, node.cpus)  # inherited by the node; no other thread runs here
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "xmppd", "--config", str(node.config)],
                cwd=node.path,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # lives on when this terminal closes; Ctrl-C here does not reach it
            )
        finally:
            os.sched_setaffinity(0, own_cpus)
    end = time.monotonic() + timeout
    try:
        while node.ready() is None:
            if (code := process.poll()) is not None:
                fail(node, begin, f"{node.name} ended with exit code {code} before it served")
            if time.monotonic() > end:
                fail(node, begin, f"{node.name} did not serve within {timeout:g} s")
            time.sleep(POLL)
    except BaseException:
        if process.poll() is None:
            send(process.pid, signal.SIGKILL)
            process.wait()
        raise


def fail(node: Node, begin: int, what: str) -> NoReturn:
    with node.log.open("rb") as log:
        log.seek(begin)
        lines = log.read().decode(errors="replace").splitlines()
    tail = "\n  ".join(lines[-LOG_TAIL:]) or "(it wrote nothing)"
    kind = PortTaken if os.strerror(errno.EADDRINUSE) in tail else Refused
    raise kind(f"{what}. The end of {node.log}:\n  {tail}")


def raise_file_limit() -> None:
    """Thousands of sessions need thousands of files; the soft limit is often 1024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


# ---------------------------------------------------------------------------------------------- configuration


def read_overlay(file: str | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        over = yaml.safe_load(Path(file).read_text()) or {}
    except (OSError, yaml.YAMLError) as exc:
        raise Refused(f"{file}: {exc}") from exc
    if not isinstance(over, dict):
        raise Refused(f"{file}: expected options, got {type(over).__name__}")
    if taken := sorted(over.keys() & {"node", "data_dir"}):
        raise Refused(f"{file}: {' and '.join(taken)} cannot be set: devcluster names the nodes and their folders")
    return over


def configuration(node: Node, over: dict[str, Any], *, plain: bool, next_port: "NextPort") -> dict[str, Any]:
    own: dict[str, Any] = {
        "node": node.name,
        "data_dir": node.folder,
        "hosts": ["localhost"],
        "listen": [
            {"module": "c2s", "starttls_required": not plain},
            {"module": "c2s", "tls": True},
            {"module": "http"},
        ],
    }
    if plain:
        own["shaper_rules"] = {"c2s_shaper": "none"}  # benches measure the server, not its shapers
    config = merged(own, copy.deepcopy(over))
    for listener in config["listen"] if isinstance(config["listen"], list) else []:
        if isinstance(listener, dict):  # what is no listener is for the server to refuse, in its own words
            listener.setdefault("ip", "127.0.0.1")
            listener["port"] = listener.get("port") or next_port()
    return config


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Mappings merge key by key; everything else, lists too, is replaced."""
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        result[key] = merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return result


class NextPort:
    """Hands out free loopback ports outside the range from which the kernel takes outgoing ones: there a client's
    connection could take the port of a node that is down for a moment. Each is held until the hand-out is over."""

    def __init__(self) -> None:
        self._held: list[socket.socket] = []
        self._first, self._last = 10240, 32767
        with contextlib.suppress(OSError, ValueError):
            low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
            self._first, self._last = (10240, low - 1) if low > 12000 else (high + 1, 65535)
        if self._first >= self._last:  # the kernel takes them all
            self._first, self._last = 10240, 65535

    def __call__(self) -> int:
        for _ in range(1000):
            port = random.randint(self._first, self._last)
            probe = socket.socket()
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                probe.close()
                continue
            self._held.append(probe)
            return port
        raise Refused("found no free loopback port")

    def release(self) -> None:
        for probe in self._held:
            probe.close()


@contextlib.contextmanager
def free_ports() -> Iterator[NextPort]:
    ports = NextPort()
    try:
        yield ports
    finally:
        ports.release()


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
