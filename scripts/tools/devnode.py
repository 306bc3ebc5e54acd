"""One node of a development cluster: its folder, its configuration, its process. devcluster.py puts them together."""

import contextlib
import copy
import errno
import json
import os
import random
import resource
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

ROOT = Path(__file__).resolve().parents[2]
STOP_GRACE = 30.0  # s until a node that does not stop is killed
POLL = 0.05  # s
LOG_TAIL = 20  # lines


class Refused(Exception):
    """What was asked cannot be done; the text is for the person who asked."""


class PortTaken(Refused):
    """Somebody else has got a port of ours."""


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

    @property
    def cookie(self) -> Path:
        return self.path / ".xmppd.cookie"

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

    def ask(self, *command: str) -> "subprocess.CompletedProcess[str]":
        """One command of xmppctl, to its end."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("XMPPD_")}
        return subprocess.run(
            [*self.xmppctl(), *command], cwd=self.path, env=environment, capture_output=True, text=True, check=False
        )

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


# ---------------------------------------------------------------------------------------------- starting


@dataclass(frozen=True, slots=True)
class Launch:
    """A process that is to become a node."""

    node: Node
    process: "subprocess.Popen[bytes]"
    begin: int  # where its log begins

    def give_up(self) -> None:
        if self.process.poll() is None:
            send(self.process.pid, signal.SIGKILL)
            self.process.wait()


def start(nodes: Sequence[Node], timeout: float) -> None:
    """Start them side by side; returns when all serve.

    Raises:
        Refused: one runs already, ended, or did not serve in time; with the end of its log. None of them runs then.
    """
    for node in nodes:
        if pid := node.pid():
            raise Refused(f"{node.name} runs already (pid {pid})")
    raise_file_limit()
    launches: list[Launch] = []
    end = time.monotonic() + timeout
    try:
        for node in nodes:
            launches.append(launch(node))  # noqa: PERF401 - those before one that fails must be known
        for one in launches:
            wait_until_it_serves(one, end)
    except BaseException:
        for one in launches:
            one.give_up()
        raise


def launch(node: Node) -> Launch:
    for stale in ("pid", "ready.json"):
        (node.path / stale).unlink(missing_ok=True)
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
    return Launch(node, process, begin)


def wait_until_it_serves(one: Launch, end: float) -> None:
    """`end`: time.monotonic(). Raises Refused."""
    while one.node.ready() is None:
        if (code := one.process.poll()) is not None:
            fail(one.node, one.begin, f"{one.node.name} ended with exit code {code} before it served")
        if time.monotonic() > end:
            fail(one.node, one.begin, f"{one.node.name} did not serve in time")
        time.sleep(POLL)


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


# ---------------------------------------------------------------------------------------------- ending


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


def share_cookie(known: Sequence[Node], fresh: Sequence[Node]) -> None:
    """Give new nodes the cookie of those that are there, or a new one."""
    cookie = secrets.token_hex(32) + "\n"
    for node in known:
        with contextlib.suppress(FileNotFoundError):
            cookie = node.cookie.read_text()
            break
    for node in fresh:
        node.cookie.touch(mode=0o600)
        node.cookie.write_text(cookie)
        node.cookie.chmod(0o400)


def configuration(
    node: Node, over: dict[str, Any], *, database: str, plain: bool, next_port: "NextPort"
) -> dict[str, Any]:
    own: dict[str, Any] = {
        "node": node.name,
        "data_dir": node.folder,
        "hosts": ["localhost"],
        "database": {"url": database},
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
    cluster = config.setdefault("cluster", {})
    if isinstance(cluster, dict):
        cluster.setdefault("listen", f"127.0.0.1:{next_port()}")
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
