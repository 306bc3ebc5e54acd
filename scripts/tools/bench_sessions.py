"""Sessions that lose their streams: how fast they are resumed, and what they weigh while they wait."""

import argparse
import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import uvloop
from bench_own import Failed, Own, own_nodes
from sampling import memory

from tests.chaos.stream import SM, Got, Refused, Stream

PATIENCE = 30.0  # seconds for an answer
KEPT = 3600  # seconds for which sessions may wait
QUEUE = 10  # messages for each of them
WARM = 20  # sessions that come first and are not counted
AT_ONCE = 20
CHECKED = 20  # sessions that are resumed in the end, to see that they were there
CONFIG: dict[str, Any] = {
    "stream_management": {"resume_timeout": f"{KEPT}s"},
    "auth_scram": {"hashes": ["sha1"]},
}


@dataclass
class Client:
    """A user with a session that can be resumed."""

    user: int
    id: str = ""  # of the session
    handled: int = 0
    stream: Stream | None = None
    salted: dict[str, bytes] = field(default_factory=dict)
    covered: int = 0  # answers to <r/>
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def arrived(self, got: Got) -> None:
        if got.name in ("message", "presence", "iq"):
            self.handled += 1
        elif got.name == "a":
            self.covered += 1
        elif got.name == "r":
            self.acknowledge()
        self.changed.set()

    def over(self) -> None:
        self.stream = None
        self.changed.set()

    async def until(self, reached: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not reached():
                if self.stream is None:
                    raise Failed(f"u{self.user:05} lost its stream")
                self.changed.clear()
                await self.changed.wait()

    def acknowledge(self) -> None:
        assert self.stream is not None
        self.stream.write(f"<a xmlns='{SM}' h='{self.handled}'/>")

    async def settle(self) -> None:
        """Until neither side waits for an acknowledgement."""
        assert self.stream is not None
        covered = self.covered
        self.acknowledge()
        self.stream.write(f"<r xmlns='{SM}'/>")
        await self.until(lambda: self.covered > covered)

    async def connect(self, port: int) -> Stream:
        self.stream = stream = await Stream.open(port, self)
        await stream.authenticate(f"u{self.user:05}", f"p{self.user:05}", self.salted)
        return stream

    async def begin(self, port: int) -> None:
        """A session that is available."""
        stream = await self.connect(port)
        await stream.bind("bench")
        self.id = (await stream.enable(KEPT)).attributes["id"]
        self.handled = 0
        stream.write("<presence/>")
        stream.start()
        await self.until(lambda: self.handled > 0)  # its own presence has come back
        await self.settle()

    async def resume(self, port: int) -> float:
        """Seconds from <resume/> to <resumed/>."""
        stream = await self.connect(port)
        began = time.perf_counter()
        answer = await stream.resume(self.id, self.handled)
        took = time.perf_counter() - began
        if answer.name != "resumed":
            raise Failed(f"a session was not resumed: {answer.children}")
        stream.start()
        return took

    def cut(self) -> None:
        """As a phone that loses its network, but told at once."""
        if self.stream is not None:
            self.stream.reset()


# -- resume


def resume(arguments: argparse.Namespace) -> dict[str, Any]:
    """Raises Failed."""
    with own_nodes(2, config=CONFIG, file=arguments.config, mysql=arguments.mysql, cpus=arguments.server_cpus) as own:
        own.register(range(arguments.users))
        return _run(_resume(own, arguments))


async def _resume(own: Own, arguments: argparse.Namespace) -> dict[str, Any]:
    clients = [Client(user) for user in range(arguments.users)]
    for client in clients:
        await client.begin(own.ports[0])
    times: dict[str, list[float]] = {"same": [], "other": []}
    links = [await asyncio.to_thread(_link_ms, own)]
    place = 0  # where the sessions are
    for _ in range(arguments.rounds):
        for name, target in (("same", place), ("other", 1 - place)):
            for client in clients:
                client.cut()
                times[name].append(await client.resume(own.ports[target]))
            links.append(await asyncio.to_thread(_link_ms, own))
        place = 1 - place
    for client in clients:
        client.cut()
    link = sorted(links)[len(links) // 2]
    other, same = _spread(times["other"]), _spread(times["same"])
    return {
        "scenario": "resume",
        "sessions": arguments.users,
        "rounds": arguments.rounds,
        "same_node_ms": same,
        "other_node_ms": other,
        "link_rtt_ms": link,
        "link_rtt_ms_of_looks": links,
        "other_node_beyond_one_rtt_ms": {part: round(other[part] - link, 2) for part in ("p50", "p99")},
    }


def _link_ms(own: Own) -> float:
    """The round-trip time between the two nodes, as they measure it with their heartbeats; the larger one."""
    links = json.loads(own.ctl("--json", "cluster_status"))["links"]
    return max(float(link["rtt_ms"]) for link in links if link["rtt_ms"] != "")


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    ranked = sorted(seconds)
    return {
        name: round(ranked[min(len(ranked) - 1, int(part * len(ranked)))] * 1000, 2)
        for name, part in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0))
    }


# -- waiting


def waiting(arguments: argparse.Namespace) -> dict[str, Any]:
    """Raises Failed."""
    with own_nodes(config=CONFIG, file=arguments.config, mysql=arguments.mysql, cpus=arguments.server_cpus) as own:
        own.register(range(arguments.users + WARM + 1))
        return _run(_waiting(own, arguments))


async def _waiting(own: Own, arguments: argparse.Namespace) -> dict[str, Any]:
    port, pids, settle = own.ports[0], own.server.pids, arguments.settle
    clients = [Client(user) for user in range(arguments.users + WARM)]
    writer = Client(arguments.users + WARM)
    await writer.begin(port)
    await _lose(clients[arguments.users :], port)
    clients = clients[: arguments.users]
    await asyncio.sleep(settle)
    before = _pss(pids)
    await _lose(clients, port)
    await asyncio.sleep(settle)
    alone = _pss(pids)
    size = await _write(writer, len(clients), arguments.body)
    await asyncio.sleep(settle)
    queued = _pss(pids)
    brought = await _check(clients, port)
    writer.cut()
    return {
        "scenario": "waiting",
        "sessions": len(clients),
        "pss_mb": {"before": before / 2**20, "waiting": alone / 2**20, "with_queues": queued / 2**20},
        "bytes_per_session": round((alone - before) / len(clients)),
        "bytes_per_session_with_queue": round((queued - before) / len(clients)),
        "queue": {"messages": QUEUE, "bytes_of_a_message": size},
        "bytes_per_queued_message": round((queued - alone) / len(clients) / QUEUE),
        "checked": {"resumed": CHECKED, "messages_brought": brought},
    }


async def _lose(clients: Sequence[Client], port: int) -> None:
    """A few at a time: what connections need must not be left over as memory that the sessions then fill."""

    async def come_and_go(client: Client) -> None:
        await client.begin(port)
        client.cut()

    for first in range(0, len(clients), AT_ONCE):
        await asyncio.gather(*(come_and_go(client) for client in clients[first : first + AT_ONCE]))


async def _write(writer: Client, users: int, body: int) -> int:
    """The size of one of the messages."""
    assert writer.stream is not None
    text = ("lorem ipsum dolor sit amet " * (body // 27 + 1))[:body]
    size = 0
    for number in range(QUEUE):
        for user in range(users):
            xml = f"<message to='u{user:05}@localhost' type='chat' id='{number:08}'><body>{text}</body></message>"
            size = len(xml)
            writer.stream.write(xml)
            if user % 100 == 99:
                await _answered(writer)
    await _answered(writer)
    return size


async def _answered(writer: Client) -> None:
    """Until everything before it has been routed."""
    assert writer.stream is not None
    handled = writer.handled
    writer.stream.write("<iq type='get' id='p' to='localhost'><ping xmlns='urn:xmpp:ping'/></iq>")
    await writer.until(lambda: writer.handled > handled)


async def _check(clients: Sequence[Client], port: int) -> int:
    """Messages that the first sessions get when they are resumed."""

    async def brought(client: Client) -> int:
        before = client.handled
        await client.resume(port)
        await client.until(lambda: client.handled >= before + QUEUE)
        client.cut()
        return client.handled - before

    return sum([await brought(client) for client in clients[:CHECKED]])


def _pss(pids: Sequence[int]) -> float:
    """Bytes."""
    return memory(pids)[1] * 2**20


def _run(work: Any) -> dict[str, Any]:
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            found: dict[str, Any] = runner.run(work)
            return found
    except (OSError, Refused, TimeoutError) as exc:
        raise Failed(f"a session did not come up: {exc}") from exc
