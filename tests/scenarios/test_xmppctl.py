"""xmppctl as a process against a node that serves its control socket (tests/golden/small_node.py)."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import xmppd
from xmppd.ctl import lifecycle
from xmppd.ctl.main import main

ROOT = Path(xmppd.__file__).absolute().parents[1]
SMALL_NODE = [sys.executable, str(ROOT / "tests" / "golden" / "small_node.py")]
PATIENCE = 20.0


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    """No settings of whoever runs the tests."""
    for name in ("NODE", "CONFIG", "DATA_DIR", "CTL_CONFIG", "LOG", "START_TIMEOUT"):
        monkeypatch.delenv(f"XMPPD_{name}", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.01)


@pytest.fixture
def node(tmp_path):
    """A running node; its data folder is ./var."""
    process = subprocess.Popen([*SMALL_NODE, str(make(tmp_path / "var"))])
    try:
        wait_until((tmp_path / "var" / "xmppd.sock").exists)
        yield process
    finally:
        process.kill()
        process.wait()


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


def ctl(*argv, stdin=""):
    argv = [sys.executable, "-m", "xmppd.ctl", *argv]
    return subprocess.run(argv, input=stdin, capture_output=True, text=True, timeout=PATIENCE)


def answer(*argv, stdin=""):
    done = ctl(*argv, stdin=stdin)
    return done.stdout, done.stderr, done.returncode


def test_a_command_prints_its_answer_and_hands_on_its_code(node):
    assert answer("register", "juliet", "localhost", "rose") == (
        "User juliet@localhost successfully registered\n",
        "",
        0,
    )
    again = ("Error: conflict: User juliet@localhost already registered\n", "", 1)
    assert answer("register", "juliet", "localhost", "rose") == again
    assert answer("check_password", "juliet", "localhost", "rose") == ("", "", 0)
    assert answer("check_password", "juliet", "localhost", "thorn") == ("Error: false\n", "", 1)
    assert answer("--json", "registered_users", "localhost") == ('["juliet"]\n', "", 0)
    assert answer("--json", "stats", "registeredusers") == ("1\n", "", 0)
    done = ctl("--json", "register", "juliet", "localhost", "rose")
    assert json.loads(done.stdout)["message"] == "conflict: User juliet@localhost already registered"
    assert answer("stats")[2] == 2
    assert answer("module", "list") == ("ping\tloaded\txmppd\n", "", 0)
    assert answer("help", "module", "load")[0].startswith("  Command Name: module load\n")


def test_a_password_may_come_from_standard_input(node):
    assert answer("register", "juliet", "localhost", "-", stdin="ro se\nrest")[2] == 0
    assert answer("check_password", "juliet", "localhost", "ro se")[2] == 0
    assert answer("--password-stdin", "change_password", "juliet", "localhost", stdin="sweet\r\n")[2] == 0
    assert answer("--password-stdin", "check_password", "juliet", "localhost", stdin="sweet")[2] == 0
    assert answer("check_password", "juliet", "localhost", "-") == ("Error: no password was given\n", "", 2)
    assert answer("send_message", "chat", "localhost", "juliet@localhost", "-", "body")[2] == 0


def test_a_terminal_is_asked_for_the_password_and_does_not_show_it(node):
    ours, theirs = pty.openpty()
    argv = [sys.executable, "-m", "xmppd.ctl", "register", "juliet", "localhost", "-"]
    asking = subprocess.Popen(argv, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, close_fds=True)
    os.close(theirs)
    shown = b""
    while b"password: " not in shown:
        shown += os.read(ours, 1024)
    os.write(ours, b"rose\n")
    try:
        while data := os.read(ours, 1024):
            shown += data
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    assert asking.wait(PATIENCE) == 0
    assert b"successfully registered" in shown
    assert b"rose" not in shown
    assert answer("check_password", "juliet", "localhost", "rose")[2] == 0


def test_what_is_no_utf8_is_refused_and_what_is_printed_is_utf8_in_any_locale(node, monkeypatch):
    argv = [sys.executable, "-m", "xmppd.ctl", "register", "juliet", "localhost", b"\xff\xfe"]
    done = subprocess.run(argv, capture_output=True, timeout=PATIENCE)
    assert (done.stdout, done.returncode) == (b"Error: argument 'password': not UTF-8\n", 2)
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    monkeypatch.setenv("LC_ALL", "C")
    argv = [sys.executable, "-m", "xmppd.ctl", "register", "j\u00fcliet".encode(), "localhost", "rose"]
    done = subprocess.run(argv, capture_output=True, timeout=PATIENCE)
    assert done.stdout == "User jüliet@localhost successfully registered\n".encode()


def test_a_batch_answers_line_by_line_and_ends_with_the_worst_code(node):
    lines = """
# two people
register juliet localhost 'ro se'
register romeo localhost sweet

check_password juliet localhost "ro se"
registered_users localhost
register juliet localhost again
check_password romeo localhost -
nonsense 'quoted
start
registered_users localhost
"""
    stdout, stderr, code = answer("batch", stdin=lines)
    assert stdout.splitlines() == [
        "User juliet@localhost successfully registered",
        "User romeo@localhost successfully registered",
        "juliet",
        "romeo",
        "Error: conflict: User juliet@localhost already registered",
        "Error: no password was given",
        "Error: line 10: no closing quotation",
        "Error: line 11: start cannot stand in a batch",
        "juliet",
        "romeo",
    ]
    assert (stderr, code) == ("", 2)
    assert answer("batch", stdin="registered_vhosts\nregister juliet localhost x\n")[2] == 1
    assert answer("batch", stdin="") == ("", "", 0)
    assert (
        answer("--json", "batch", stdin="stats registeredusers\nregistered_users localhost\n")[0]
        == '2\n["juliet", "romeo"]\n'
    )
    assert answer("batch", "x")[2] == answer("--password-stdin", "batch")[2] == 2


def test_a_batch_is_answered_while_it_is_still_being_written(node):
    argv = [sys.executable, "-m", "xmppd.ctl", "batch"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as batch:
        batch.stdin.write("register juliet localhost rose\n")
        assert batch.stdout.readline() == "User juliet@localhost successfully registered\n"
        batch.stdin.write("registered_users localhost\n")
        assert batch.stdout.readline() == "juliet\n"
        batch.stdin.close()
        assert batch.wait(PATIENCE) == 0


def test_a_batch_that_loses_its_node_ends_with_code_3_and_names_the_line(node):
    stdout, stderr, code = answer("batch", stdin="registered_vhosts\nstop\n" + "registered_vhosts\n" * 1000)
    assert code == 3
    assert stdout.endswith("\nFailed RPC connection to the node xmppd@localhost: nodedown\n")
    assert re.match(r"line \d+: The node closed the connection", stderr)
    assert stdout.count("localhost\n") < 100


def test_a_node_that_does_not_run_is_code_3_with_a_sentence_that_helps(tmp_path):
    for argv in (["status"], ["registered_users", "localhost"], ["stop"], ["batch"]):
        stdout, stderr, code = answer(*argv)
        assert stdout == "Failed RPC connection to the node xmppd@localhost: nodedown\n"
        assert f"{tmp_path}/var/xmppd.sock" in stderr
        assert code == 3
    stdout, _, code = answer("--json", "-n", "a@b", "status")
    assert json.loads(stdout) == {
        "status": "error",
        "code": 3,
        "message": "Failed RPC connection to the node a@b: nodedown",
    }


def test_a_node_that_died_is_told_from_one_that_never_ran(node):
    node.kill()
    node.wait()
    stdout, stderr, code = answer("status")
    assert stdout.startswith("Failed RPC connection")
    assert "has died" in stderr
    assert code == 3


def test_a_command_for_another_node_is_not_carried_out_here(node):
    stdout, _, code = answer("-n", "xmppd@node02", "stop")
    assert "xmppd@node02: nodedown (the node here is xmppd@localhost)" in stdout
    assert code == 3
    assert answer("-n", "xmppd@localhost", "status")[2] == 0


def test_ctrl_c_ends_it_without_a_traceback(node):
    argv = [sys.executable, "-m", "xmppd.ctl", "batch"]
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as batch:
        batch.stdin.write("registered_vhosts\n")
        batch.stdin.flush()
        assert batch.stdout.readline() == "localhost\n"
        batch.send_signal(signal.SIGINT)
        _, stderr = batch.communicate(timeout=PATIENCE)
    assert batch.returncode == 130
    assert "interrupted" in stderr
    assert "Traceback" not in stderr


def test_a_reader_that_leaves_early_is_no_traceback(node):
    argv = f"{sys.executable} -m xmppd.ctl help | head -c 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", argv], capture_output=True, text=True, timeout=PATIENCE)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


# -- start, started, stopped


@pytest.fixture
def small(tmp_path, monkeypatch):
    """`start` starts the small node in place of the server; ended by `stop`, or by its pid where a test fails."""
    started = []

    def argv(settings):
        return [*SMALL_NODE, settings.data_dir, *started]

    monkeypatch.setattr(lifecycle, "server_argv", argv)
    yield started
    ctl("stop")


def test_start_waits_until_the_node_serves_and_stopped_until_it_does_not(small, capfd, tmp_path):
    assert main(["start"]) == 0
    assert answer("status")[2] == 0
    assert main(["started"]) == 0
    assert main(["start"]) == 11
    assert capfd.readouterr().out == "ERROR: The xmppd node 'xmppd@localhost' is already running.\n"
    assert main(["stop"]) == 0
    assert main(["stopped"]) == 0
    assert main(["status"]) == 3
    assert (tmp_path / "var").stat().st_mode & 0o777 == 0o700


def test_a_node_that_does_not_start_says_why(small, capfd, tmp_path):
    (tmp_path / "var").mkdir()
    (tmp_path / "var" / "xmppd.log").write_text("an older line\n")
    small.append("--refuse")
    assert main(["start"]) == 1
    out, err = capfd.readouterr()
    assert out.startswith("Error: the node xmppd@localhost did not start: it ended with exit code 1")
    assert err == "etc/xmppd.yml: hots: unknown option. Did you mean hosts?\n"


def test_a_node_that_takes_too_long_is_not_killed(small, capfd, monkeypatch):
    monkeypatch.setenv("XMPPD_START_TIMEOUT", "0")
    assert main(["start"]) == 12
    assert "goes on starting" in capfd.readouterr().out
    assert main(["started"]) == 0


def test_started_and_stopped_give_up_when_their_time_is_over(monkeypatch, node):
    monkeypatch.setattr(lifecycle, "WAIT", 0.0)
    assert main(["stopped"]) == 1
    assert main(["started"]) == 0
    node.kill()
    node.wait()
    assert main(["started"]) == 1
    assert main(["stopped"]) == 0
    assert main(["started", "x"]) == 2


def test_a_node_is_not_stopped_before_its_process_has_ended(monkeypatch, tmp_path):
    monkeypatch.setattr(lifecycle, "WAIT", 0.0)
    make(tmp_path / "var")
    process = subprocess.Popen([sys.executable, "-c", "input()", "-m", "xmppd"], stdin=subprocess.PIPE)
    try:
        (tmp_path / "var" / "pid").write_text(f"{process.pid}\n")
        wait_until(lambda: b"xmppd" in Path(f"/proc/{process.pid}/cmdline").read_bytes())
        assert main(["stopped"]) == 1
        assert main(["start"]) == 11
    finally:
        process.communicate(b"\n")
    assert main(["stopped"]) == 0
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    (tmp_path / "var" / "pid").write_text(f"{other.pid}\n")  # the number belongs to another program now
    try:
        assert main(["stopped"]) == 0
    finally:
        other.communicate(b"\n")


def test_the_server_is_told_what_was_said_here_and_nothing_else():
    plain = lifecycle.server_argv(lifecycle.Settings())
    assert plain[1:] == ["-m", "xmppd"]
    Path("c.yml").write_text("node: a@b\n")
    said = lifecycle.server_argv(lifecycle.Settings(config="c.yml", node="n@h", data_dir="d"))
    assert said[3:] == ["--config", "c.yml", "--data-dir", f"{os.getcwd()}/d", "--node", "n@h"]
