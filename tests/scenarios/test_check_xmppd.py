"""etc/balancer/check_xmppd, as keepalived calls it, against a real node and against what is none."""

import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.harness.server import PATIENCE, Server, options

CHECK = Path(__file__).parents[2] / "etc" / "balancer" / "check_xmppd"


def check(port: int, seconds: str = "4", address: str = "127.0.0.1") -> tuple[int, str]:
    """The exit code, and the line."""
    done = subprocess.run(
        [str(CHECK), address, str(port), seconds], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.stderr == ""
    return done.returncode, done.stdout.rstrip("\n")


@contextmanager
def answering(pieces: list[bytes], pause: float = 0.0) -> Iterator[int]:
    """A port where one question is answered like that."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            peer, _ = server.accept()
            with peer, suppress(OSError):
                peer.recv(4096)
                for piece in pieces:
                    peer.sendall(piece)
                    time.sleep(pause)

        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()[1]
        thread.join(PATIENCE)


def test_a_node_that_serves_is_ready_and_one_that_hangs_or_is_gone_is_not(tmp_path):
    http = {"module": "http", "ip": "127.0.0.1", "port": 0, "request_handlers": {"/readyz": "ready"}}
    node = Server(tmp_path / "node", options(listen=[http]))
    try:
        node.start()
        port = node.ready["listen"][0]["port"]
        serving = check(port, str(PATIENCE))
        node.send_signal(signal.SIGSTOP)
        hanging = check(port, "0.5")
        node.send_signal(signal.SIGCONT)
        again = check(port, str(PATIENCE))
        node.stop()
        gone = check(port)
    finally:
        node.kill()

    assert serving == again == (0, "")
    assert hanging == (1, f"127.0.0.1 port {port}: no answer in time")
    assert gone[0] == 1
    assert "refused" in gone[1]


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        (b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 12\r\n\r\nunavailable\n", "'unavailable'"),
        (b"HTTP/1.1 404 Not Found\r\n\r\n", "'HTTP/1.1 404 Not Found"),
        (b"200 200 200\r\n\r\n", "'200 200 200"),
        (b"SSH-2.0-OpenSSH\r\n", "'SSH-2.0-OpenSSH"),
        (b"\xff\xfe\x1b[2J", "'"),
        (b"", "'nothing'"),
    ],
)
def test_any_other_answer_is_no(answer, line):
    with answering([answer]) as port:
        code, said = check(port)

    assert code == 1
    assert said.startswith(f"127.0.0.1 port {port}: {line}")
    assert said.isprintable()


def test_an_answer_that_dribbles_does_not_hold_up_the_balancer():
    pieces = [bytes([byte]) for byte in b"HTTP/1.1 200 OK\r\n" + b"x" * 4000]
    with answering(pieces, pause=0.05) as port:
        began = time.monotonic()
        code, said = check(port, "0.7")
        took = time.monotonic() - began

    assert (code, said) == (1, f"127.0.0.1 port {port}: no answer in time")
    assert took < PATIENCE / 2


def test_a_port_that_takes_connections_and_says_nothing_is_no():
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert check(server.getsockname()[1], "0.3")[0] == 1


@pytest.mark.parametrize("arguments", [("5281x",), ("99999",), ("5281", "soon")])
def test_arguments_that_make_no_sense_are_no(arguments):
    done = subprocess.run([str(CHECK), "127.0.0.1", *arguments], capture_output=True, text=True, timeout=PATIENCE)

    assert done.returncode == 1
    assert "Traceback" not in done.stderr
