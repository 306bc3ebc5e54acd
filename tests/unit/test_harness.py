"""What the tests themselves stand on, where a fault would not show."""

import fcntl
import subprocess
import sys
import threading
from pathlib import Path

from tests.alone import turn
from tests.harness.ports import free_port

ROOT = Path(__file__).parents[2]


def is_taken(lock: Path) -> bool:
    with lock.open("r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def test_tests_run_together_and_who_measures_waits_for_them_and_comes_before_newcomers(tmp_path):
    went = []

    def go(name: str, alone: bool) -> None:
        with turn(tmp_path, alone=alone):
            went.append(name)

    measuring = threading.Thread(target=go, args=("measuring", True))
    newcomer = threading.Thread(target=go, args=("newcomer", False))
    with turn(tmp_path, alone=False), turn(tmp_path, alone=False):
        measuring.start()
        while not is_taken(tmp_path / "door"):
            pass
        newcomer.start()
        assert went == []
    measuring.join(20)
    newcomer.join(20)

    assert went == ["measuring", "newcomer"]


def test_a_free_port_is_given_out_once_among_all_processes():
    code = "from tests.harness.ports import free_port\nprint(*(free_port() for _ in range(200)), flush=True)\ninput()"
    ask = [sys.executable, "-c", code]
    with subprocess.Popen(ask, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as other:
        theirs = {int(port) for port in other.stdout.readline().split()}
        ours = {free_port() for _ in range(200)}
        other.communicate("\n")

    assert len(theirs) == len(ours) == 200
    assert not theirs & ours
