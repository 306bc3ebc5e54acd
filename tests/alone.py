"""Tests that measure have the machine to themselves, also when several processes run tests at once.

Every test holds a lock while it runs: those with the marker `alone` exclusively, all others together. Who waits to be
alone keeps a second lock that newcomers pass through, so that there are fewer and fewer others.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

FOLDER: Final = "XMPPD_TEST_LOCKS"  # where the locks of this run are; set by the process that starts the others


@contextmanager
def turn(folder: Path, *, alone: bool) -> Iterator[None]:
    """Wait for it and hold it."""
    mode = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
    door = os.open(folder / "door", os.O_RDWR | os.O_CREAT)
    room = os.open(folder / "room", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(door, mode)
        fcntl.flock(room, mode)
        fcntl.flock(door, fcntl.LOCK_UN)
        yield
    finally:
        os.close(room)
        os.close(door)
