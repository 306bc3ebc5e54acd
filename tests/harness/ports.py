"""Ports for what must come back where it was, or has to know its port before it listens.

Everything else asks for port 0 and is told what it got.
"""

import atexit
import fcntl
import os
import random
import socket
import tempfile
from pathlib import Path
from typing import IO, Final

_FIRST, _LAST = 20000, 32767  # below those that the kernel gives to clients, one of which could be in the way
_FOLDER: Final = Path(tempfile.gettempdir()) / f"xmppd-test-ports-{os.getuid()}"
_held: list[IO[bytes]] = []  # until this process ends


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on and that no other test process is given while this one lives."""
    _FOLDER.mkdir(mode=0o700, exist_ok=True)
    for _ in range(1000):
        port = random.randint(_FIRST, _LAST)
        lock = (_FOLDER / str(port)).open("wb")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", port))
        except OSError:
            lock.close()
            continue
        _held.append(lock)
        return port
    raise RuntimeError("found no free loopback port")


@atexit.register
def _let_go() -> None:
    for lock in _held:
        lock.close()
