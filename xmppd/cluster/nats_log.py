"""What our nats-server child says: kept in a file of limited size, and understood where it concerns us.

    [26759] 2026/11/21 14:38:03.637895 [ERR] 127.0.0.1:44892 - rid:8 - TLS route handshake error: remote error: tls: ...

The words are those of nats-server 2.10 to 2.15; tests with a real one say when they change. None of them is needed for
the cluster to work, they make it quicker to notice and easier to understand.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_LINE: Final = re.compile(r"^\[\d+\] \S+ \S+ \[(INF|WRN|ERR|FTL|DBG|TRC)\] (.*)$")
_ROUTE: Final = re.compile(r"^(\S+) - rid:\d+ - (.*)$")
_CLOSED: Final = re.compile(r"^Router connection closed: (.*?)(?: - Remote: ([0-9a-f]{32}))?$")
_DIAL: Final = re.compile(r"^Error trying to connect to route .*?: dial tcp (\S+): (.*)$")
# Both ends of a route check the other one's certificate, the one that dialled first: then we get to know by its alert.
_COOKIE: Final = re.compile(r"bad certificate|unknown authority|certificate required|didn't provide a certificate")


@dataclass(frozen=True, slots=True)
class RouteLost:
    """The connection to another node's server has ended."""

    node: bytes
    why: str


@dataclass(frozen=True, slots=True)
class CookieRefused:
    """The other end of a route, at this `address:port`, has no certificate of our CA, or does not take ours."""

    peer: str


@dataclass(frozen=True, slots=True)
class DialFailed:
    """No connection to this `address:port`, one of our routes."""

    address: str
    why: str


@dataclass(frozen=True, slots=True)
class Reloaded:
    """The answer to SIGHUP; `error` is empty when the new configuration is in force."""

    error: str = ""


@dataclass(frozen=True, slots=True)
class Listening:
    """The route port is open, the last thing to happen at a start."""


@dataclass(frozen=True, slots=True)
class Fatal:
    """The server cannot go on."""

    error: str


Said = RouteLost | CookieRefused | DialFailed | Reloaded | Listening | Fatal


def understand(line: str) -> Said | None:
    """What a line means to us; None for most."""
    match = _LINE.match(line)
    if match is None:
        return Fatal(line.removeprefix("nats-server: ")) if line.startswith("nats-server: ") else None
    level, text = match.groups()
    if level == "FTL":
        return Fatal(text)
    if route := _ROUTE.match(text):
        return _of_route(*route.groups())
    if text.startswith("Listening for route connections on"):
        return Listening()
    if text.startswith("Reloaded server configuration"):
        return Reloaded()
    if text.startswith("Failed to reload server configuration: "):
        return Reloaded(text.partition(": ")[2])
    if dial := _DIAL.match(text):
        return DialFailed(dial[1], dial[2])
    return None


def _of_route(peer: str, text: str) -> Said | None:
    if closed := _CLOSED.match(text):
        # two nodes that dial each other have two connections for a moment
        if closed[2] is None or closed[1] == "Duplicate Route":
            return None
        return RouteLost(bytes.fromhex(closed[2]), closed[1])
    if text.startswith("TLS route handshake error: ") and _COOKIE.search(text):
        return CookieRefused(peer)
    return None


class LogFile:
    """Appends lines (0600); when it would grow beyond `limit` bytes it becomes `NAME.1` and a new one begins.

    A disk that is full costs the lines, nothing else.
    """

    def __init__(self, path: Path, limit: int = 4 * 1024 * 1024) -> None:
        self._path = path
        self._limit = limit
        self._file = -1
        self._size = 0

    def write(self, line: str) -> None:
        """One line, without its end."""
        data = line.encode("utf-8", "backslashreplace") + b"\n"
        try:
            if self._file < 0:
                self._open()
            if self._size + len(data) > self._limit and self._size:
                self.close()
                os.replace(self._path, self._path.with_name(f"{self._path.name}.1"))
                self._open()
            self._size += os.write(self._file, data)
        except OSError:
            pass

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._file = os.open(self._path, flags, 0o600)
        self._size = os.fstat(self._file).st_size

    def close(self) -> None:
        """Close the file; the next line opens it again."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
