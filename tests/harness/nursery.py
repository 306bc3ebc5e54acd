"""Nodes as processes of their own which need not load the server's code again: they are children of one that has.

Loading takes more processor time than all else that a small node does in a test. What runs is `xmppd.__main__.run`, as
in `python -m xmppd`. tests/scenarios/plain_node.py starts nodes from nothing.

process = nursery().start(["--config", path], cwd=folder, environment=variables, output=file)    # like a Popen
"""

import atexit
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, Final

LOADED: Final = (
    "xmppd.__main__",
    "xmppd.server",
    "uvloop",
    "aiosqlite",
    "sqlalchemy.dialects.sqlite.aiosqlite",
    "sqlalchemy.dialects.mysql.aiomysql",
)


class Child:
    """A node; what of subprocess.Popen tests use."""

    def __init__(self, nursery: "Nursery", pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._nursery = nursery

    def poll(self) -> int | None:
        if self.returncode is None:
            self._nursery.hear()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """subprocess.TimeoutExpired."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("xmppd", timeout or 0.0)
            time.sleep(0.005)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """If it runs. Its number is its own until `hear` has told of its end."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


class Nursery:
    """One for each process that runs tests; it ends with that one."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        self._variables = _of_python(environment)
        with theirs:
            # The word `xmppd` is what xmppctl looks for in the command line of a node.
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno()), "xmppd"],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env=environment,
            )
        self._lines = b""
        self._children: dict[int, Child] = {}
        self._born: list[int] = []
        self._lock = threading.Lock()

    def takes(self, environment: Mapping[str, str]) -> bool:
        """Whether the interpreter would be the same one with these variables."""
        return _of_python(environment) == self._variables

    def start(self, argv: list[str], *, cwd: Path, environment: Mapping[str, str], output: IO[bytes]) -> Child:
        asked = {"argv": argv, "cwd": str(cwd), "environment": dict(environment)}
        with self._lock:
            data = json.dumps(asked).encode() + b"\n"
            socket.send_fds(self._socket, [data], [output.fileno()])
            while not self._born:
                self._read()
            pid = self._born.pop()
            child = self._children[pid] = Child(self, pid)
        return child

    def hear(self) -> None:
        """What has ended."""
        with self._lock:
            while _ready(self._socket):
                self._read()

    def _read(self) -> None:
        data = self._socket.recv(65536)
        if not data:
            raise RuntimeError("the nursery has ended")
        *lines, self._lines = (self._lines + data).split(b"\n")
        for line in lines:
            said = json.loads(line)
            if "code" in said:
                self._children.pop(said["pid"]).returncode = said["code"]
            else:
                self._born.append(said["pid"])

    def end(self) -> None:
        self._socket.close()
        self._process.wait()


def _of_python(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith("PYTHON")}


def _ready(one: socket.socket) -> bool:
    """Whether there is something to read."""
    with selectors.DefaultSelector() as selector:
        selector.register(one, selectors.EVENT_READ)
        return bool(selector.select(0))


@lru_cache(maxsize=1)
def nursery() -> Nursery:
    made = Nursery()
    atexit.register(made.end)
    return made


# -- the other side


def serve(asked: socket.socket) -> None:
    for name in LOADED:
        importlib.import_module(name)
    gc.freeze()
    wake, woken = socket.socketpair()
    for end in (wake, woken):
        end.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
    selector = selectors.DefaultSelector()
    selector.register(asked, selectors.EVENT_READ)
    selector.register(wake, selectors.EVENT_READ)
    while True:
        ready = [key.fileobj for key, _ in selector.select()]
        if wake in ready:
            with suppress(BlockingIOError):
                wake.recv(4096)
            tell_ended(asked)
        if asked in ready:
            data, fds, _, _ = socket.recv_fds(asked, 65536, 1)
            if not data:
                return
            while not data.endswith(b"\n"):
                data += asked.recv(65536)
            pid = os.fork()
            if not pid:
                be_node(json.loads(data), fds[0])
            os.close(fds[0])
            asked.sendall(json.dumps({"pid": pid}).encode() + b"\n")


def tell_ended(asked: socket.socket) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        told = {"pid": pid, "code": os.waitstatus_to_exitcode(status)}
        with suppress(OSError):
            asked.sendall(json.dumps(told).encode() + b"\n")


def be_node(wanted: dict[str, Any], output: int) -> None:
    """Everything as it is in a new process."""
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.closerange(3, 4096)
        os.chdir(wanted["cwd"])
        os.environ.clear()
        os.environ.update(wanted["environment"])
        sys.argv = ["xmppd", *wanted["argv"]]
        gc.unfreeze()
        from xmppd.__main__ import run

        run()
    finally:
        os._exit(1)


if __name__ == "__main__":
    sys.path.pop(0)  # this folder; the project's is in PYTHONPATH
    serve(socket.socket(fileno=int(sys.argv[1])))
