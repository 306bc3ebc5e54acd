"""A node as systemd, logrotate and a terminal treat it."""

import json
import os
import pty
import select
import shutil
import signal
import socket
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.scenarios.plain_node import PASSWORD, PATIENCE, ROOT, Node


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path, log_file=str(tmp_path / "xmppd.log"), modules={})
    yield node
    node.end(signal.SIGKILL)


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    """systemd's end of $NOTIFY_SOCKET."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(PATIENCE)
        yield manager


def said(manager: socket.socket) -> dict[str, str]:
    return dict(line.split("=", 1) for line in manager.recv(4096).decode().split("\n"))


def next_with(manager: socket.socket, name: str) -> dict[str, str]:
    """The next message that says `name`; only signs of life may come before it."""
    while name not in (message := said(manager)):
        assert "WATCHDOG" in message or message.keys() == {"STATUS"}, message
    return message


def is_heard(manager: socket.socket, seconds: float = 0) -> bool:
    if not select.select([manager], [], [], seconds)[0]:
        return False
    manager.recv(4096)
    return True


def until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def log(node: Node) -> str:
    return Path(str(node.options["log_file"])).read_text()


def test_systemd_hears_of_start_life_reload_restart_and_stop(node, manager):
    node.start(environment={"NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "400000"})
    assert node.process is not None
    pid = node.process.pid

    starting = said(manager)
    assert starting["WATCHDOG"] == "1"
    assert starting["EXTEND_TIMEOUT_USEC"] == "30000000"
    assert next_with(manager, "READY")["STATUS"] == "serving localhost: 0 sessions"
    assert "EXTEND_TIMEOUT_USEC" not in next_with(manager, "WATCHDOG")

    node.write(loglevel="debug")
    node.process.send_signal(signal.SIGHUP)
    assert next_with(manager, "RELOADING").keys() >= {"MONOTONIC_USEC"}
    next_with(manager, "READY")
    assert node.ctl("get_loglevel").stdout == "debug\n"

    (node.data_dir / "ready.json").unlink()
    assert node.ctl("restart").returncode == 0
    next_with(manager, "RELOADING")  # systemd takes no READY after STOPPING
    next_with(manager, "READY")
    node.wait_until_ready()
    assert node.process.pid == pid

    assert node.end() == 0
    next_with(manager, "STOPPING")


def test_a_node_that_hangs_gives_no_sign_of_life_and_tells_where_when_it_is_aborted(node, manager):
    node.start(environment={"NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "200000"})
    next_with(manager, "READY")
    assert node.process is not None
    node.process.send_signal(signal.SIGSTOP)
    until(lambda: not is_heard(manager))
    quiet = not is_heard(manager, seconds=0.5)
    node.process.send_signal(signal.SIGCONT)

    assert node.end(signal.SIGABRT) == -signal.SIGABRT

    assert quiet
    assert "Fatal Python error: Aborted" in node.err
    assert "xmppd/__main__.py" in node.err


def test_sighup_with_a_wrong_configuration_changes_nothing_and_says_so(node, manager):
    node.start(environment={"NOTIFY_SOCKET": manager.getsockname()})
    next_with(manager, "READY")
    node.write(loglevel="chatty")

    assert node.process is not None
    node.process.send_signal(signal.SIGHUP)
    next_with(manager, "RELOADING")
    next_with(manager, "READY")

    assert "not reloaded problem=" in log(node)
    assert node.ctl("get_loglevel").stdout == "info\n"
    assert node.end() == 0


@pytest.mark.parametrize("by", ["reopen_log", "SIGHUP"])
def test_a_rotated_log_goes_on_in_a_new_file(node, by):
    node.start()
    path = Path(str(node.options["log_file"]))
    until(lambda: "serving" in log(node))
    rotated = path.rename(path.with_suffix(".log.1"))
    before = rotated.read_text()

    if by == "reopen_log":
        assert node.ctl("reopen_log").returncode == 0
    else:
        assert node.process is not None
        node.process.send_signal(signal.SIGHUP)
    until(path.exists)
    assert node.process is not None
    held = {os.path.realpath(file) for file in Path(f"/proc/{node.process.pid}/fd").iterdir()}
    assert node.end() == 0

    assert str(rotated.resolve()) not in held
    assert "serving" in before
    assert rotated.read_text() == before
    assert "stopped" in path.read_text()


def test_file_and_format_of_the_log_change_at_a_reload_or_nothing_does(node, tmp_path):
    node.start()
    node.write(log_file=str(tmp_path / "missing" / "xmppd.log"), loglevel="debug")
    refused = node.ctl("reload_config")
    assert refused.returncode == 10
    assert f"log_file: cannot write {tmp_path}/missing/xmppd.log: No such file or directory" in refused.stdout
    assert node.ctl("get_loglevel").stdout == "info\n"

    node.write(log_file=str(tmp_path / "other.log"), log_format="json", loglevel="info")
    assert node.ctl("reload_config").returncode == 0
    assert node.end() == 0

    lines = [json.loads(line) for line in log(node).splitlines()]
    assert {"configuration reloaded", "stopping", "stopped"} <= {line["phrase"] for line in lines}
    assert not node.trouble(), node.err


def test_a_log_that_cannot_be_written_is_a_fault_of_the_configuration(node, tmp_path):
    node.write(log_file=str(tmp_path / "missing" / "xmppd.log"))
    node.launch()
    assert node.process is not None

    assert node.process.wait(PATIENCE) == 10

    assert f"log_file: cannot write {tmp_path}/missing/xmppd.log" in node.err


def test_a_node_in_a_terminal_ends_with_it_and_reloads_before(node):
    master, terminal = pty.openpty()
    node.start(terminal=terminal)
    os.close(terminal)
    assert node.process is not None
    node.process.send_signal(signal.SIGHUP)
    until(lambda: "configuration reloaded" in log(node))

    os.close(master)

    assert node.process.wait(PATIENCE) == 0
    assert "stopped" in log(node)


def test_a_backup_taken_while_the_node_runs_can_be_restored(node, tmp_path):
    """docs/operating.md, to the letter, with the online backup that `sqlite3 .backup` makes."""
    node.start()
    node.register("juliet")
    copy = tmp_path / "xmppd.db"
    with closing(sqlite3.connect(node.data_dir / "xmppd.db")) as live, closing(sqlite3.connect(copy)) as backup:
        live.backup(backup)
    node.register("romeo")
    assert node.end() == 0

    for name in ("xmppd.db-wal", "xmppd.db-shm"):
        (node.data_dir / name).unlink(missing_ok=True)
    shutil.copy(copy, node.data_dir / "xmppd.db")
    (node.data_dir / "incarnation").write_text(f"{int(time.time())}\n")
    node.start()

    assert node.ctl("registered_users", "localhost").stdout == "juliet\n"
    assert node.ctl("check_password", "juliet", "localhost", PASSWORD).returncode == 0


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_understands_the_unit_and_finds_it_well_guarded(tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("xmppd", "xmppctl"):
        (programs / name).write_text("#!/bin/sh\n")
        (programs / name).chmod(0o755)
    unit = tmp_path / "xmppd.service"
    unit.write_text((ROOT / "etc" / "xmppd.service").read_text().replace("/opt/xmppd/venv/bin", str(programs)))

    verified = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, timeout=60
    )
    assert verified.returncode == 0, verified.stderr
    assert "xmppd.service" not in verified.stderr, verified.stderr

    # exposure in tenths, from 0 (none) to 100
    guarded = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=20", str(unit)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert guarded.returncode == 0, guarded.stdout


@pytest.mark.skipif(shutil.which("logrotate") is None, reason="logrotate is not installed")
def test_logrotate_understands_its_file():
    done = subprocess.run(
        ["logrotate", "--debug", str(ROOT / "etc" / "logrotate.d" / "xmppd")],
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert "error:" not in done.stderr.replace("error: /var/log/xmppd", ""), done.stderr
