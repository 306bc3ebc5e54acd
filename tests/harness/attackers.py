"""Hostile clients by the hundred, in a process of their own, so that what they cost is not taken for what they do.

`Attack` starts one (`async with Attack(server, "half_open", count=700)`), `python -m tests.harness.attackers` is it.
Attackers have their own machines in the world; here they share the cores with the server and with those whose answers
are timed, so they run with less priority: they come last, not the server.
"""

import asyncio
import base64
import contextlib
import functools
import json
import os
import random
import re
import resource
import socket
import ssl
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import uvloop

from tests.harness.raw import SASL, header
from tests.harness.server import ROOT, Server

PATIENCE = 30.0
HOST = "crowd.localhost"  # where anybody may log in
HEADER = header(HOST)
BIND = "<iq type='set' id='b'><bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'/></iq>"
ERROR = re.compile(rb"<stream:error><([a-z-]+)|<failure xmlns='[^']*'><([a-z-]+)")
Result = dict[str, Any]


# -- the test's side


class Attack:
    """One attack. It is under way inside of the `async with`; `result` is there behind it."""

    def __init__(self, server: Server, kind: str, **options: Any) -> None:
        self._argument = json.dumps(
            {"kind": kind, "port": server.port, "tls_port": server.tls_port, "options": options}
        )
        self.result: Result = {}

    async def __aenter__(self) -> "Attack":
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.harness.attackers",
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=1 << 24,
        )
        assert self._process.stdin is not None
        self._process.stdin.write(self._argument.encode() + b"\n")
        await self._line("under way")
        return self

    async def __aexit__(self, kind: object, *exc: object) -> None:
        process = self._process
        if kind is not None:
            process.kill()
            await process.wait()
            return
        self.result = await self.end()

    async def end(self) -> Result:
        """Let it stop, if it does not do so by itself; what came of it."""
        process = self._process
        assert process.stdin is not None
        process.stdin.close()
        found: Result = json.loads(await self._line("result"))
        await asyncio.wait_for(process.wait(), PATIENCE)
        assert process.returncode == 0
        return found

    async def _line(self, what: str) -> str:
        assert self._process.stdout is not None
        try:
            line = await asyncio.wait_for(self._process.stdout.readline(), 4 * PATIENCE)
        except TimeoutError:
            self._process.kill()
            raise AssertionError(f"the attackers did not say: {what}") from None
        name, _, text = line.decode().partition(":")
        assert name == what, f"the attackers said {line[:200]!r} instead of: {what}"
        return text


# -- the attackers' side


class Target:
    """Where to attack, and how to know that it is enough."""

    def __init__(self, port: int, tls_port: int) -> None:
        self.port = port
        self.tls_port = tls_port
        self.over = asyncio.Event()  # the test has seen enough
        self.tls = ssl.create_default_context()
        self.tls.check_hostname = False
        self.tls.verify_mode = ssl.CERT_NONE

    def under_way(self) -> None:
        print("under way:", flush=True)

    async def connect(self, *, tls: bool = False) -> "Peer":
        reader, writer = await asyncio.open_connection(
            "127.0.0.1",
            self.tls_port if tls else self.port,
            ssl=self.tls if tls else None,
            server_hostname=HOST if tls else None,
            limit=1 << 20,
        )
        return Peer(reader, writer)

    async def login(self, *, tls: bool = False) -> "Peer":
        """Anonymous, so that it costs nobody much."""
        peer = await self.connect(tls=tls)
        peer.send(HEADER)
        await peer.until(b"</stream:features>")
        peer.send(f"<auth xmlns='{SASL}' mechanism='ANONYMOUS'/>")
        await peer.until(b"<success")
        peer.send(HEADER)
        await peer.until(b"</stream:features>")
        peer.send(BIND)
        peer.jid = re.findall(rb"<jid>([^<]*)</jid>", await peer.until(b"</iq>"))[0].decode()
        return peer


class Peer:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.jid = ""

    def send(self, data: str | bytes) -> None:
        try:
            self.writer.write(data.encode() if isinstance(data, str) else data)
        except RuntimeError as exc:  # what uvloop says of a transport that is closed
            raise ConnectionResetError from exc

    async def until(self, end: bytes) -> bytes:
        return await asyncio.wait_for(self.reader.readuntil(end), PATIENCE)

    async def rest(self, *, polite: bool = False) -> bytes:
        """Whatever comes until the server closes; who is polite answers its closing tag."""
        data = b""
        try:
            while piece := await asyncio.wait_for(self.reader.read(1 << 16), PATIENCE):
                data = (data + piece)[-65536:]
                if polite and b"</stream:stream>" in data:
                    self.send("</stream:stream>")
                    polite = False
        except TimeoutError:
            return data + b"<stream:error><never-closed"
        except (OSError, ssl.SSLError):
            pass
        return data

    def drop(self) -> None:
        self.writer.transport.abort()


def named(data: bytes) -> str:
    """The refusal in what the server has said."""
    found = [a or b for a, b in ERROR.findall(data)]
    return found[-1].decode() if found else "none"


async def by_turns(jobs: Iterable[Callable[[], Awaitable[Any]]], at_once: int) -> list[Any]:
    """Run all, so many at once; what they return, in order."""
    gate = asyncio.Semaphore(at_once)

    async def run(job: Callable[[], Awaitable[Any]]) -> Any:
        async with gate:
            return await job()

    return await asyncio.gather(*(run(job) for job in jobs))


async def half_open(target: Target, stages: dict[str, int]) -> Result:
    """So many connections stop at each stage, and stay until it is over (or the server has had enough)."""
    hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100)
    said = {
        "tcp": (False, target.port, b""),
        "tcp before tls": (False, target.tls_port, b""),
        "half a client hello": (False, target.tls_port, hello),
        "half a header": (False, target.port, HEADER[:40].encode()),
        "half a header in tls": (True, target.tls_port, HEADER[:40].encode()),
        "half an auth in tls": (True, target.tls_port, (HEADER + f"<auth xmlns='{SASL}' mech").encode()),
    }
    peers: list[Peer] = []

    async def stop_at(stage: str) -> None:
        tls, port, data = said[stage]
        if tls:
            peer = await target.connect(tls=True)
        else:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            peer = Peer(reader, writer)
        peers.append(peer)
        peer.send(data)

    order = [stage for stage, count in stages.items() for _ in range(count)]
    random.Random(1).shuffle(order)
    await by_turns([functools.partial(stop_at, stage) for stage in order], 50)
    target.under_way()
    await target.over.wait()
    still = sum(not peer.reader.at_eof() for peer in peers)
    for peer in peers:
        peer.drop()
    return {"open": still}


async def break_limits(target: Target, streams: list[list[str]], at_once: int = 100) -> Result:
    """Each stream: where it is when it sends something (`connected`, `opened`, `bound`), and what, base64. What the
    server called it, and how long it took to close: every other client answers its closing tag."""

    async def one(number: int, where: str, data: bytes) -> tuple[str, float]:
        tls = number % 7 == 0
        peer = await (target.login(tls=tls) if where == "bound" else target.connect(tls=tls))
        if where == "opened":
            peer.send(HEADER)
            await peer.until(b"</stream:features>")
        began = time.monotonic()
        peer.send(data)
        said = await peer.rest(polite=number % 2 == 0)
        took = time.monotonic() - began
        peer.drop()
        return named(said), took

    target.under_way()
    jobs = [
        functools.partial(one, number, where, base64.b64decode(data)) for number, (where, data) in enumerate(streams)
    ]
    found = await by_turns(jobs, at_once)
    return {"named": [name for name, _ in found], "seconds": [took for _, took in found]}


async def loris(target: Target, count: int, pause: float) -> Result:
    """One byte, a pause, one byte: a header and a login that never end. What each was told, and when."""

    async def one(number: int) -> tuple[str, float]:
        peer = await target.connect(tls=number % 4 == 0)
        began = time.monotonic()
        text = (" " * 5 + HEADER if number % 2 else HEADER) + f"<auth xmlns='{SASL}' mechanism='PLAIN'>" + "A" * 1000
        if number % 2:
            peer.send(HEADER)
            text = f"<auth xmlns='{SASL}' mechanism='PLAIN'>" + "A" * 1000
        listening = asyncio.create_task(peer.rest())
        for byte in text.encode():
            with contextlib.suppress(OSError):
                peer.send(bytes([byte]))
            if (await asyncio.wait([listening], timeout=pause))[0]:
                break
        said = await listening
        peer.drop()
        return named(said), time.monotonic() - began

    target.under_way()
    found = await asyncio.gather(*(one(number) for number in range(count)))
    return {"named": Counter(name for name, _ in found), "slowest": max(took for _, took in found)}


async def flood(target: Target, count: int, stanzas: list[str], rate: float = 0.0) -> Result:
    """Each sends stanzas as fast as it may, or `rate` bytes a second, and reads all that comes. `ME` is its address."""

    async def one(number: int) -> tuple[int, int, str, float]:
        peer = await target.login(tls=number % 2 == 0)
        data = "".join(stanzas).replace("ME", peer.jid).encode()
        batch = data * max(1, 4096 // len(data))
        listening = asyncio.create_task(peer.rest())
        began, sent = time.monotonic(), 0
        while not target.over.is_set() and not listening.done():
            peer.send(batch)
            sent += len(batch)
            try:
                await asyncio.wait_for(peer.writer.drain(), 0.5)
            except (TimeoutError, OSError):
                continue
            if rate:
                await asyncio.sleep(max(0.0, sent / rate - (time.monotonic() - began)))
        took = time.monotonic() - began
        left = peer.writer.transport.get_write_buffer_size()
        peer.drop()
        return sent - left, len(await listening), named(await listening), took

    logged_in = asyncio.get_running_loop().call_later(0.5, target.under_way)
    found = await asyncio.gather(*(one(number) for number in range(count)))
    logged_in.cancel()
    sent, heard, names, took = zip(*found, strict=True)
    return {"sent": sent, "heard": heard, "named": Counter(names), "seconds": max(took)}


async def deaf(target: Target, count: int, talkers: int) -> Result:
    """Each takes nothing, while so many others talk to it: more than the kernels keep for it. Until it is cut off."""

    async def one(number: int) -> float:
        peer = await target.login(tls=number % 2 == 0)
        peer.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
        note = f"<message to='{peer.jid}' type='headline'><body>{'x' * 8000}</body></message>"
        others = [await target.login() for _ in range(talkers)]
        began = time.monotonic()
        while not peer.writer.transport.is_closing() and time.monotonic() - began < PATIENCE:
            for other in others:
                if other.writer.transport.get_write_buffer_size() < 65536:
                    other.send(note)
            with contextlib.suppress(OSError):
                peer.send(" ")  # or it would not notice its end
            await asyncio.sleep(0.02)
        took = time.monotonic() - began
        for each in (peer, *others):
            each.drop()
        return took

    asyncio.get_running_loop().call_later(0.5, target.under_way)
    return {"seconds": await asyncio.gather(*(one(number) for number in range(count)))}


async def invent(target: Target, count: int, each: int, seed: int) -> Result:
    """Sessions one after the other that use names nobody has used before: `each` of them in `count` streams."""

    async def one(number: int) -> str:
        peer = await target.login(tls=number % 10 == 0)
        for part in range(0, each, 50):
            names = [f"n{seed}-{number}-{part + place}" for place in range(min(50, each - part))]
            inner = "".join(f"<{name} {name}=''/>" for name in names)
            peer.send(f"<message to='{peer.jid}' type='headline'>{inner}</message>")
        peer.send("<iq type='get' id='last'/>")
        try:
            said = await peer.until(b"last")
        except (asyncio.IncompleteReadError, OSError) as exc:
            said = getattr(exc, "partial", b"")
        except asyncio.LimitOverrunError:
            said = b""
        peer.drop()
        return named(said)

    target.under_way()
    return {"named": Counter(await by_turns([functools.partial(one, number) for number in range(count)], 20))}


ATTACKS: dict[str, Callable[..., Awaitable[Result]]] = {
    one.__name__: one for one in (half_open, break_limits, loris, flood, deaf, invent)
}


async def main() -> None:
    argument = json.loads(sys.stdin.readline())
    target = Target(argument["port"], argument["tls_port"])
    loop = asyncio.get_running_loop()

    def enough() -> None:  # it is closed, or the test is gone
        loop.remove_reader(sys.stdin.fileno())
        target.over.set()

    loop.add_reader(sys.stdin.fileno(), enough)
    result = await ATTACKS[argument["kind"]](target, **argument["options"])
    loop.remove_reader(sys.stdin.fileno())
    print("result:" + json.dumps(result), flush=True)


if __name__ == "__main__":
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    os.nice(10)
    uvloop.run(main())
