"""The client's side of the control socket (its protocol stands in xmppd/admin/socket.py)."""

import json
import os
import socket
import sys
from typing import Any

from xmppd.errors import CommandError

NOT_REACHABLE = 3
SUN_PATH = 100
TIMEOUT = 60.0  # seconds without a sign of life from the node; --no-timeout waits for ever


class NotReachable(CommandError):
    """No node answers. `text` is the line ejabberdctl prints, `hint` what to do about it."""

    def __init__(self, node: str, hint: str) -> None:
        super().__init__(f"Failed RPC connection to the node {node}: nodedown", NOT_REACHABLE)
        self.hint = hint


def write(text: str) -> None:
    """To standard output, as UTF-8 whatever the locale."""
    sys.stdout.buffer.write(text.encode("utf-8", "replace"))


def complain(text: str) -> None:
    """To standard error."""
    sys.stdout.flush()  # so that both arrive in order where they are one file
    sys.stderr.buffer.write(text.encode("utf-8", "replace"))
    sys.stderr.flush()


def connect(path: str, timeout: float | None) -> socket.socket:
    """A connection to a unix socket, also where its path is too long for the system call. Raises OSError."""
    sock = socket.socket(socket.AF_UNIX)
    folder = -1
    try:
        sock.settimeout(timeout)
        if len(os.fsencode(path)) > SUN_PATH:
            folder = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
            path = f"/proc/self/fd/{folder}/{os.path.basename(path)}"
        sock.connect(path)
        return sock
    except BaseException:
        sock.close()
        raise
    finally:
        if folder >= 0:
            os.close(folder)


class Client:
    """One connection to a node, for one request or many. Raises NotReachable where there is none."""

    def __init__(self, path: str, node: str, *, timeout: float | None = TIMEOUT) -> None:
        self._node = node
        self._path = path
        try:
            self._sock = connect(path, timeout)
        except FileNotFoundError:
            raise NotReachable(
                node, f"There is no {path}: the node does not run, or has another data folder."
            ) from None
        except ConnectionRefusedError:
            raise NotReachable(
                node, f"Nobody listens on {path}: the node has died. `xmppctl start` starts it."
            ) from None
        except PermissionError:
            raise NotReachable(node, f"{path} is for root and the user of the node alone.") from None
        except OSError as exc:
            raise NotReachable(node, f"{path}: {exc.strerror or exc}") from None
        self._lines = self._sock.makefile("rb")

    def close(self) -> None:
        self._lines.close()
        self._sock.close()

    def request(self, frame: dict[str, Any], ask: "Any" = None, show: bool = True) -> int:
        """Send a request and print what comes back; the exit code.

        `ask(name)` gives the secret the node asks for, or None. With `show` false nothing is printed.
        """
        try:
            self._send(frame)
            while True:
                answer = self._receive()
                if "need" in answer:
                    self._send({"secret": ask(answer["need"]) if ask else None})
                    continue
                if show:
                    if "progress" in answer:
                        complain(f"{answer['progress']}\n")
                    if answer.get("out"):
                        write(answer["out"])
                        sys.stdout.flush()  # the next part may be long in coming
                    if answer.get("err"):
                        complain(answer["err"])
                if "code" in answer:
                    return int(answer["code"])
        except TimeoutError:
            text = "the node does not answer; the command may still be carried out. --no-timeout waits for it"
            raise CommandError(text) from None
        except ConnectionError:
            raise NotReachable(
                self._node, "The node closed the connection; it may have carried out the command."
            ) from None

    def _send(self, frame: dict[str, Any]) -> None:
        self._sock.sendall(json.dumps(frame).encode() + b"\n")

    def _receive(self) -> dict[str, Any]:
        line = self._lines.readline()
        if not line.endswith(b"\n"):
            raise ConnectionResetError
        answer: dict[str, Any] = json.loads(line)
        return answer
