"""`xmppctl start`, `started`, `stopped`: what must work while no node answers."""

import os
import signal
import subprocess
import sys
import time

from xmppd.ctl.client import Client, NotReachable, complain, write
from xmppd.ctl.settings import Settings
from xmppd.errors import CommandError

USAGE = 2
ALREADY_RUNNING = 11
START_TIMEOUT = 12
STARTS_OR_STOPS = 15
WAIT = 60.0  # seconds, as ejabberdctl waits
POLL = 0.1


def run(verb: str, arguments: list[str], settings: Settings) -> int:
    if arguments:
        raise CommandError(f"{verb} takes no argument, got '{arguments[0]}'", USAGE)
    if verb == "start":
        return start(settings)
    return wait_for(0 if verb == "started" else 3, settings)


def state(settings: Settings) -> int:
    """The exit code of `status`: 0 serves, 3 there is no node, else it starts or stops."""
    try:
        client = Client(settings.socket, settings.node, timeout=5.0)
    except NotReachable:
        return STARTS_OR_STOPS if holds(settings.data_dir) else 3
    try:
        return client.request({"argv": ["status"], "node": settings.given_node}, show=False)
    except NotReachable:
        return STARTS_OR_STOPS if holds(settings.data_dir) else 3
    except CommandError:
        return 1
    finally:
        client.close()


def holds(data_dir: str) -> bool:
    """Whether the process in `data_dir/pid` lives, socket or not: until it has ended, another one cannot start.

    Its lock is not tried: a server that starts in that moment would find it taken.
    """
    try:
        with open(f"{data_dir}/pid", encoding="ascii") as file:
            pid = int(file.read())
        os.kill(pid, 0)
    except (OSError, ValueError) as exc:
        return isinstance(exc, PermissionError)
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read().split(b"\0")
        return any(os.path.basename(word) == b"xmppd" for word in words)  # else its number is somebody else's now
    except OSError:
        return not os.path.isdir("/proc/self")


def wait_for(wanted: int, settings: Settings) -> int:
    """0 as soon as the state is the wanted one, 1 when the time is over."""
    deadline = time.monotonic() + WAIT
    while state(settings) != wanted:
        if time.monotonic() > deadline:
            return 1
        time.sleep(POLL)
    return 0


def start(settings: Settings) -> int:
    """Start `python -m xmppd` apart from this terminal, and wait until it serves or ends."""
    if state(settings) != 3:
        write(f"ERROR: The xmppd node '{settings.node}' is already running.\n")
        return ALREADY_RUNNING
    log = settings.variable("XMPPD_LOG") or f"{settings.data_dir}/xmppd.log"
    try:
        os.makedirs(settings.data_dir, mode=0o700, exist_ok=True)
        # the node keeps this file as its standard output and error: appended to, so that it may be cut while it runs
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
    except OSError as exc:
        raise CommandError(f"cannot write {exc.filename or log}: {exc.strerror}") from exc
    with os.fdopen(out, "ab") as sink:
        began = os.fstat(sink.fileno()).st_size
        child = subprocess.Popen(
            server_argv(settings),
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            start_new_session=True,  # Ctrl-C and the end of this terminal are not its business
            env={**settings.variables, **os.environ},
        )
    return _watch(child, settings, log, began)


def server_argv(settings: Settings) -> list[str]:
    argv = [sys.executable, "-m", "xmppd"]
    if settings.config:
        argv += ["--config", settings.config]
    if settings.given_data_dir:
        argv += ["--data-dir", settings.data_dir]
    if settings.given_node:
        argv += ["--node", settings.given_node]
    return argv


def _watch(child: "subprocess.Popen[bytes]", settings: Settings, log: str, began: int) -> int:
    deadline = time.monotonic() + float(settings.variable("XMPPD_START_TIMEOUT") or WAIT)
    while True:
        code = child.poll()
        if code is not None:
            said = _said(log, began)
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            complain(said)
            write(f"Error: the node {settings.node} did not start: it {how}; its log is {log}\n")
            return code if 10 <= code < 30 else 1
        if state(settings) == 0:
            child.returncode = 0  # it lives on without us; nobody waits for it here
            return 0
        if time.monotonic() > deadline:
            child.returncode = 0
            complain(_said(log, began))
            write(f"Error: the node {settings.node} does not serve yet and goes on starting; its log is {log}\n")
            return START_TIMEOUT
        time.sleep(POLL)


def _said(log: str, began: int) -> str:
    """What the node wrote since, at most the last 20 lines."""
    try:
        with open(log, "rb") as file:
            file.seek(max(began, os.fstat(file.fileno()).st_size - 65536))
            lines = file.read().decode("utf-8", "replace").splitlines(keepends=True)
    except OSError:
        return ""
    return "".join(lines[-20:])
