"""When what a plain client was sent counts as taken."""

import asyncio
import time

from xmppd.c2s import sweeper
from xmppd.c2s.sweeper import RecordSweeper


class Visited:
    def __init__(self) -> None:
        self.visits = 0
        self.visited = asyncio.Event()

    def sweep(self) -> bool:
        self.visits += 1
        self.visited.set()
        return True


async def test_a_visit_that_comes_much_too_late_is_put_off(monkeypatch):
    """The process was frozen: what its connections have to say is read after its timers have run."""
    monkeypatch.setattr(sweeper, "_PERIOD", 0.05)
    monkeypatch.setattr(sweeper, "_LATE", 0.1)
    loop = asyncio.get_running_loop()
    sweeping, session = RecordSweeper(loop), Visited()
    heard: list[int] = []
    sweeping.add(session)  # type: ignore[arg-type]
    told = asyncio.Event()
    loop.call_later(0.06, lambda: (heard.append(session.visits), told.set()))
    time.sleep(0.4)  # noqa: ASYNC251 - frozen
    await told.wait()
    assert heard == [0], "it was visited before anything else was heard"
    time.sleep(0.4)  # noqa: ASYNC251 - it is always late
    async with asyncio.timeout(10):
        await session.visited.wait()
    sweeping.stop()
