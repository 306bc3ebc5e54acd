"""`python -m xmppd.sender`: makes requests for the node at the other end of its standard input, while that is there.

What has been handed over when the node goes is still made, for a second: one that is killed has perhaps no row of it.
"""

import asyncio
import os
import signal
import socket
import sys
from typing import Final, cast

import uvloop

from xmppd.sender.frames import CLOSE, OPEN, SEND, Frames, Request, answering, opened, sent
from xmppd.sender.requests import Requests
from xmppd.sender.target import Answer

_TOGETHER: Final = 0.01  # seconds: answers that come so close wake the node once
_LAST: Final = 1.0  # seconds for what is under way when the node has gone


class Sender(asyncio.Protocol):
    """The conversation with the node."""

    def __init__(self) -> None:
        self._frames = Frames()
        self._sinks: dict[int, Requests] = {}
        self._broken: dict[int, str] = {}
        self._answers: list[tuple[int, Answer]] = []
        self._told = 0.0  # when answers were last written
        self._closing: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self.over = asyncio.Event()

    @property
    def busy(self) -> bool:
        return any(sink.busy for sink in self._sinks.values())

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.over.set()

    def data_received(self, data: bytes) -> None:
        for kind, body in self._frames.feed(data):
            if kind == SEND:
                for number, chain in sent(body):
                    self._make(number, chain)
            elif kind == OPEN:
                self._open(body)
            elif kind == CLOSE:
                self._close(int(body))

    def _open(self, body: bytes) -> None:
        number, connections, target = opened(body)
        try:
            self._sinks[number] = Requests(target, connections, self._answered)
        except (OSError, ValueError) as exc:  # a certificate that was there a moment ago
            self._broken[number] = f"{type(exc).__name__}: {exc}"[:200]

    def _close(self, number: int) -> None:
        self._broken.pop(number, None)
        sink = self._sinks.pop(number, None)
        if sink is not None:
            task = self._loop.create_task(sink.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    def _make(self, number: int, chain: list[Request]) -> None:
        sink = self._sinks.get(number)
        if sink is not None:
            sink.make(chain)
            return
        for request, *_ in chain:
            self._answered(request, Answer("retry", self._broken.get(number, "the sink is closed")))

    def _answered(self, number: int, answer: Answer) -> None:
        if not self._answers:
            wait = self._told + _TOGETHER - self._loop.time()
            if wait > 0:
                self._loop.call_later(wait, self._tell)
            else:
                self._loop.call_soon(self._tell)
        self._answers.append((number, answer))

    def _tell(self) -> None:
        answers, self._answers = self._answers, []
        self._told = self._loop.time()
        if not self.over.is_set():
            self._transport.write(answering(answers))


async def main() -> None:
    loop = asyncio.get_running_loop()
    node = socket.socket(fileno=sys.stdin.fileno())
    node.setblocking(False)
    _, sender = await loop.create_unix_connection(Sender, sock=node)
    await sender.over.wait()
    end = loop.time() + _LAST
    while sender.busy and loop.time() < end:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    os._exit(0)  # a thread that looks up a name may take its time


if __name__ == "__main__":
    # They may be meant for everybody in the terminal. The node ends in order, and this with it.
    for _number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(_number, signal.SIG_IGN)
    uvloop.run(main())
