"""How a normal pair fares, and what the node says of itself, while others attack it."""

import asyncio
import re
import time
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path

from tests.harness.raw import Raw
from tests.harness.server import Server

# What two cores, shared by the server, the pair, the attackers and whatever else the machine does, add to a round trip
# by chance: a turn or two of the scheduler. Quiet, the p99 is about a millisecond, and three times that would judge the
# machine and not the server.
NOISE = 0.005  # seconds


class Pulse:
    """Romeo says something two hundred times a second, whether answers come or not; Juliet says it back.

    Sending does not wait, so a server that stands still is late for all that was said meanwhile, and not once."""

    def __init__(self, romeo: Raw, juliet: Raw) -> None:
        self._romeo, self._juliet = romeo, juliet
        self._said: dict[str, float] = {}
        self._took: list[float] = []
        self._number = 0
        self._tasks = [asyncio.create_task(self._answer()), asyncio.create_task(self._listen())]

    async def _answer(self) -> None:
        async for body in bodies(self._juliet):
            self._juliet.send_message(self._romeo.jid, body)

    async def _listen(self) -> None:
        async for body in bodies(self._romeo):
            self._took.append(time.perf_counter() - self._said.pop(body))

    async def p99(self, seconds: float, rate: int = 200) -> float:
        """Seconds that one round trip in a hundred takes at least. Every one must come."""
        self._took.clear()
        count, began = int(seconds * rate), time.perf_counter()
        for place in range(count):
            await asyncio.sleep(began + place / rate - time.perf_counter())
            self._number += 1
            self._said[str(self._number)] = time.perf_counter()
            self._romeo.send_message(self._juliet.jid, str(self._number))
        async with asyncio.timeout(15):
            while self._said:
                for task in self._tasks:
                    assert not task.done(), task.exception()
                await asyncio.sleep(0.005)
        assert len(self._took) == count
        return sorted(self._took)[-max(1, count // 100)]

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)


async def bodies(client: Raw) -> AsyncIterator[str]:
    """Of the messages that come, for as long as the connection lasts and however long it takes."""
    while not client.is_over:
        for got in client.forget():
            assert got.name == "message", got
            yield got.body or ""
        client._changed.clear()
        await client._changed.wait()


class Gauge:
    """What a node says of itself (/metrics), and what the machine says of the node."""

    def __init__(self, server: Server) -> None:
        self._server = server
        port = next(each["port"] for each in server.ready["listen"] if each["module"] == "http")
        self._url = f"http://127.0.0.1:{port}/metrics"

    def values(self, name: str) -> dict[str, float]:
        """Of one metric: label value (or "") -> value."""
        with urllib.request.urlopen(self._url, timeout=15) as answer:
            page = answer.read().decode()
        rows = re.findall(rf'^{name}(?:_total)?(?:\{{\w+="([^"]*)"\}})? (\S+)$', page, re.MULTILINE)
        return {label: float(value) for label, value in rows}

    def total(self, name: str) -> float:
        return sum(self.values(name).values())

    def memory(self) -> float:
        """MiB that belong to the process alone, and its share of what it shares (PSS)."""
        assert self._server.process is not None
        text = Path(f"/proc/{self._server.process.pid}/smaps_rollup").read_text()
        return int(re.findall(r"^Pss:\s+(\d+)", text, re.MULTILINE)[0]) / 1024
