"""A file as a sink: a line for each event, on the disk before it counts as taken."""

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

from xmppd.outbox.event import Event
from xmppd.sender.target import DONE, Answer


class FileSink:
    """Opened anew for each batch, so that it may be moved away at any time (log rotation)."""

    def __init__(self, path: Path) -> None:
        self.path = path

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def send(self, events: Sequence[Event]) -> Answer:
        try:
            await asyncio.to_thread(self._append, b"".join(event.payload + b"\n" for event in events))
        except OSError as exc:
            return Answer("retry", str(exc)[:200])
        return DONE

    def _append(self, lines: bytes) -> None:
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
        try:
            before = os.fstat(file).st_size
            try:
                left = memoryview(lines)
                while left:
                    left = left[os.write(file, left) :]
                os.fsync(file)
            except OSError:  # a full disk: no half a line
                os.ftruncate(file, before)
                raise
        finally:
            os.close(file)
