"""The node's end of the process that makes HTTP requests (xmppd/sender): started, fed, started again when it dies.

It ends when our end of the pair of sockets is closed, however we end. Where requests go, and what they are signed with,
it is told over these sockets: the arguments and the environment of a process can be read by others.
"""

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, cast

import xmppd
from xmppd.children import when_ended
from xmppd.log import get_logger
from xmppd.sender.frames import ANSWER, BadFrame, Body, Chain, Frames, Request, answered, closing, opening, sending
from xmppd.sender.target import Answer, HttpTarget

log = get_logger("outbox")

_STEADY: Final = 30.0  # seconds of life after which the next death counts as the first
_LONGEST_PAUSE: Final = 5.0
_PATIENCE: Final = 3.0  # seconds for it to end by itself
_SILENCE: Final = 10.0  # seconds beyond the longest time-out until one that says nothing is taken for hung
_ENVIRONMENT: Final = (
    "PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "SSL_CERT_FILE", "SSL_CERT_DIR",
    "LOCALDOMAIN", "RES_OPTIONS", "PYTHONPATH", "PYTHONHASHSEED",
)  # fmt: skip

_LOST: Final = Answer("lost", "the process that made the request has died")
Ended = Callable[[Any, Answer], None]


class Sender:
    """Runs while there are sinks. Requests that are handed over wait for it while it starts."""

    def __init__(self) -> None:
        self.restarts = 0
        self._sinks: dict[int, tuple[int, HttpTarget]] = {}
        self._sink = 0  # the last number
        self._request = 0
        self._waiting: dict[int, tuple[Ended, Any, int]] = {}  # by the number of the request: also of which sink
        self._chains: list[Chain] = []  # to be handed over at the end of this turn of the loop
        self._process: subprocess.Popen[bytes] | None = None
        self._exited = asyncio.Event()
        self._exited.set()
        self._transport: asyncio.Transport | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._ending = asyncio.Lock()
        self._heard = 0.0
        self._watch: asyncio.TimerHandle | None = None

    @property
    def pid(self) -> int | None:
        """None while there is none."""
        return None if self._process is None or self._exited.is_set() else self._process.pid

    async def open(self, target: HttpTarget, connections: int) -> int:
        """A sink; its number."""
        self._sink += 1
        self._sinks[self._sink] = (connections, target)
        if self._transport is not None:
            self._transport.write(opening(self._sink, connections, target))
        elif self._supervisor is None:
            self._supervisor = asyncio.get_running_loop().create_task(self._supervise(), name="outbox sender")
        return self._sink

    async def close(self, number: int) -> None:
        """What is under way is forgotten, and nobody is told. Without sinks the process ends."""
        self._sinks.pop(number, None)
        self._chains = [chain for chain in self._chains if chain[0] != number]
        self._waiting = {request: one for request, one in self._waiting.items() if one[2] != number}
        if self._transport is not None:
            self._transport.write(closing(number))
        if not self._sinks:
            await self.stop()

    async def stop(self) -> None:
        """Returns when the process has ended. May be called in any state."""
        supervisor, self._supervisor = self._supervisor, None
        async with self._ending:
            if supervisor is not None:
                supervisor.cancel()
                await asyncio.gather(supervisor, return_exceptions=True)
            await self._end()

    def send(self, sink: int, chain: Sequence[tuple[Any, Body]], ended: Ended) -> None:
        """Requests that are made one after the other, each with a token. `ended(token, answer)` is called for each,
        later, unless the sink is closed before."""
        number = self._request
        requests: list[Request] = []
        for token, body in chain:
            number += 1
            self._waiting[number] = (ended, token, sink)
            requests.append((number, *body))
        self._request = number
        if not self._chains:
            asyncio.get_running_loop().call_soon(self._hand_over)
        self._chains.append((sink, requests))

    def _hand_over(self) -> None:
        if self._transport is None or not self._chains:
            return  # when it has started
        chains, self._chains = self._chains, []
        self._transport.write(sending(chains))
        if self._watch is None:
            self._listen()

    # -- its life ----------------------------------------------------------------------------------------------------

    async def _supervise(self) -> None:
        loop = asyncio.get_running_loop()
        pause = 0.0
        async with self._ending:
            pass  # the one before has to be gone
        while True:
            since = loop.time()
            try:
                await self._start()
            except OSError as exc:
                log.error("sender does not start", error=exc.strerror or str(exc), again_in_s=pause)
            await self._exited.wait()
            if loop.time() - since > _STEADY:
                pause = 0.0
            if self._process is not None:
                code = self._process.returncode
                log.warning("sender died", code=code, requests=len(self._waiting), restart_in_s=pause)
            await self._end()
            self._lose()
            await asyncio.sleep(pause)
            pause = min(_LONGEST_PAUSE, pause * 2 or 0.1)
            self.restarts += 1

    async def _start(self) -> None:
        ours, its = socket.socketpair()
        ours.setblocking(False)
        try:
            self._process = process = _spawn(its)
        except OSError:
            ours.close()
            raise
        finally:
            its.close()
        self._exited.clear()
        try:
            self._reap(process)
            loop = asyncio.get_running_loop()
            transport, _ = await loop.create_unix_connection(lambda: _Answers(self), sock=ours)
        except BaseException:  # there is nobody who would tell that it has ended
            ours.close()
            process.kill()
            process.wait()
            self._exited.set()
            raise
        self._transport = transport
        log.debug("sender started", pid=process.pid)
        for number, (connections, target) in self._sinks.items():
            transport.write(opening(number, connections, target))
        self._hand_over()

    def _reap(self, process: subprocess.Popen[bytes]) -> None:
        def ended() -> None:
            if process is self._process:
                self._exited.set()

        when_ended(process, ended)

    async def _end(self) -> None:
        """Close our end, which ends it, or else it is killed."""
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.close()
        if self._process is not None and not self._exited.is_set():
            try:
                async with asyncio.timeout(_PATIENCE):
                    await self._exited.wait()
            except TimeoutError:
                self.kill()
                await self._exited.wait()
        self._process = None

    def kill(self) -> None:
        """End it the hard way, because it does not answer: another one is started."""
        if self._process is not None and not self._exited.is_set():
            self._process.kill()

    def _lose(self) -> None:
        """Nobody will answer any more what had been handed over."""
        kept = {number for _, requests in self._chains for number, *_ in requests}
        lost = [number for number in self._waiting if number not in kept]
        for number in lost:
            self._ended(number, _LOST)

    def cut_off(self, transport: asyncio.Transport | None) -> None:
        """The connection has ended: if that was not us, it has died, or is to."""
        if transport is self._transport:
            self.kill()

    # -- what it says ------------------------------------------------------------------------------------------------

    def heard(self, body: bytes) -> None:
        """Answers."""
        self._heard = asyncio.get_running_loop().time()
        for number, answer in answered(body):
            self._ended(number, answer)

    def _ended(self, number: int, answer: Answer) -> None:
        waiting = self._waiting.pop(number, None)
        if waiting is None:
            return  # its sink was closed
        ended, token, _ = waiting
        try:
            ended(token, answer)
        except Exception as exc:
            log.error("answer not handled", exc=exc)

    def _listen(self) -> None:
        """One that is stuck (stopped by a signal, say) is ended: nothing may wait for it for ever."""
        loop = asyncio.get_running_loop()
        if self._watch is None:
            self._heard = loop.time()
        self._watch = None
        if not self._waiting:
            return
        longest = max((target.timeout for _, target in self._sinks.values()), default=0.0) + _SILENCE
        silent = loop.time() - self._heard
        if silent >= longest:
            log.warning("sender says nothing", silent_s=round(silent), requests=len(self._waiting))
            self.kill()
            return
        self._watch = loop.call_later(longest - silent, self._listen)


def _spawn(its: socket.socket) -> subprocess.Popen[bytes]:
    """It speaks through its standard input; what goes wrong in it goes where ours does."""
    found = os.environ.get("PYTHONPATH")
    root = str(Path(xmppd.__file__).parents[1])
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    environment["PYTHONPATH"] = f"{root}{os.pathsep}{found}" if found else root
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "xmppd.sender"], stdin=its.fileno(), stdout=subprocess.DEVNULL, env=environment
    )


class _Answers(asyncio.Protocol):
    def __init__(self, sender: Sender) -> None:
        self._sender = sender
        self._frames = Frames()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            for kind, body in self._frames.feed(data):
                if kind == ANSWER:
                    self._sender.heard(body)
        except (BadFrame, ValueError) as exc:
            log.error("sender makes no sense", exc=exc)
            self._sender.kill()

    def connection_lost(self, exc: Exception | None) -> None:
        self._sender.cut_off(self._transport)
