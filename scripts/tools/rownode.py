"""A node with sessions that nobody is connected to: what `scripts/bench cluster --rows N` measures.

    rownode.py CONFIG

Serves as `python -m xmppd --config CONFIG` does, in this process, and takes orders, one a line, from standard input.
Each is answered by one JSON object on standard output. It ends with its input.

    open N      sessions of that many resources enter through the session manager, as bound clients do
    watch N     from now on: how late the event loop is, and when N rows of other nodes have come
    report      what was seen since `watch`
"""

import asyncio
import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import uvloop

from xmppd import config, log
from xmppd.cluster.tables import SessionRow
from xmppd.delivery import SAFE, Outcome
from xmppd.protocol.jid import JID, parse
from xmppd.protocol.stanza import Stanza
from xmppd.server import Server
from xmppd.session_manager import SessionInfo, Waiting

BEAT: Final = 0.001  # s
PIECE: Final = 200  # sessions between two turns of the loop
FIRST: Final = ("anna", "bartholomew", "chi", "dimitri", "elisabeth", "farid", "gwendolyn", "hugo", "ines", "jo")
LAST: Final = ("abernathy", "brandt", "castellanos", "diaz", "eriksson", "fitzgerald", "guo", "haraldsen", "ito", "ng")
CLIENTS: Final = ("Conversations.{:.6}", "gajim.{:.8}", "dino.{:.8}", "Psi+", "{:.32}", "phone", "Monal-iOS.{:.10}")


class Unattended:
    """A session without a client: what arrives is as good as read. Fulfils session_manager.LiveSession."""

    __slots__ = ("anonymous", "jid", "row")

    awaits_older = False

    def __init__(self, jid: JID) -> None:
        self.jid = jid
        self.anonymous = False
        self.row: SessionRow | None = None

    def deliver(self, stanza: Stanza) -> Outcome:
        return SAFE

    def waiting(self) -> Waiting:
        return Waiting(self.jid, "plain", 0.0, 0, 0, 0, 0, 0.0)

    def hold_messages(self, until: "asyncio.Future[None]") -> None: ...

    def replaced(self) -> None: ...

    def kick(self, reason: str, condition: str) -> None: ...

    def info(self) -> SessionInfo:
        jid = self.jid
        return SessionInfo(jid.local, jid.domain, jid.resource, "none", "", 0, 0, "", 0, "available", "")


def addresses(host: str, seed: int = 1) -> Iterator[JID]:
    """Full JIDs as people and their clients make them; every fourth user has two resources."""
    dice = random.Random(seed)
    number = 0
    while True:
        number += 1
        user = f"{dice.choice(FIRST)}.{dice.choice(LAST)}{number}"
        for client in dice.sample(CLIENTS, 2 if number % 4 == 0 else 1):
            yield parse(f"{user}@{host}/{client.format(f'{dice.getrandbits(128):032x}')}")


class Pulse:
    """A heartbeat in the event loop: what comes between two beats is what a client would have waited for."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._loop = asyncio.get_running_loop()
        self.watch(0)
        self._beat()

    def watch(self, rows: int) -> None:
        self._wanted = rows
        self._began = self._last = time.perf_counter()
        self._busy = time.thread_time()
        self.longest_pause = self.longest_busy = 0.0  # s
        self.first_row: float | None = None  # s since `watch`
        self.all_rows: float | None = None

    def _beat(self) -> None:
        now, busy = time.perf_counter(), time.thread_time()
        self.longest_pause = max(self.longest_pause, now - self._last - BEAT)
        self.longest_busy = max(self.longest_busy, busy - self._busy)
        self._last, self._busy = now, busy
        if self._wanted and self.all_rows is None:
            table = self._server.table
            foreign = table.count() - table.own.rows
            if foreign and self.first_row is None:
                self.first_row = now - self._began
            if foreign >= self._wanted:
                self.all_rows = now - self._began
        self._loop.call_later(BEAT, self._beat)

    def report(self) -> dict[str, Any]:
        table = self._server.table
        return {
            "longest_pause_ms": round(self.longest_pause * 1000, 1),
            "longest_busy_ms": round(self.longest_busy * 1000, 1),
            "first_row_s": self.first_row,
            "all_rows_s": self.all_rows,
            "rows_of_others": table.count() - table.own.rows,
        }


async def open_sessions(server: Server, count: int) -> dict[str, Any]:
    began = time.perf_counter()
    jids = addresses(server.hosts[0])
    for number in range(count):
        session = Unattended(next(jids))
        session.row = server.sessions.open(session)
        server.sessions.set_priority(session.row, 0)
        if number % PIECE == PIECE - 1:
            await asyncio.sleep(0)
    return {"rows": server.table.own.rows, "seconds": round(time.perf_counter() - began, 3)}


async def obey(server: Server) -> None:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while server.status != "started":  # noqa: ASYNC110 - the server tells systemd and ready.json, not us
        await asyncio.sleep(0.01)
    pulse = Pulse(server)
    while line := await reader.readline():
        order, _, number = line.decode().strip().partition(" ")
        if order == "open":
            answer = await open_sessions(server, int(number))
        elif order == "watch":
            pulse.watch(int(number))
            answer = {}
        else:
            answer = pulse.report()
        print(json.dumps(answer), flush=True)
    server.stop()


async def main(file: Path) -> None:
    loaded = config.load(file)
    log.setup_from(loaded)
    server = Server(loaded)
    orders = asyncio.create_task(obey(server))
    await server.run()
    orders.cancel()


if __name__ == "__main__":
    uvloop.run(main(Path(sys.argv[1])))
