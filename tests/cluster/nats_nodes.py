"""Nodes of a cluster as far as the transport goes: real nats-server processes on free ports of 127.0.0.1."""

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xmppd.cluster.engine import Engine

COOKIE = "f0" * 32
CLUSTER = uuid.uuid4().bytes


@dataclass
class ClusterOptions:
    listen: str = "127.0.0.1:0"
    advertise: str | None = None
    hosts: dict[str, str] = field(default_factory=dict)
    nats_url: str | None = None
    nats_server: str | None = None


_PROBE = b"is there a way? "


class Node:
    """An engine and what came to it."""

    def __init__(self, folder: Path, cookie: str = COOKIE, **options: Any) -> None:
        self.id = uuid.uuid4().bytes
        self.name = f"xmppd@{folder.name}"
        self.folder = folder
        self.options = ClusterOptions(**options)
        self.engine = Engine(self.options, node=self.id, name=self.name, cookie=cookie, folder=folder)
        self.packets: list[bytes] = []
        self.suspected: list[bytes] = []
        self._probes: set[bytes] = set()  # of `linked_to`: some come late
        self.engine.on_packet = self._take
        self.engine.on_suspect = self.suspected.append

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.engine.route_port}"

    async def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        await self.engine.set_cluster(CLUSTER)
        await self.engine.start()

    async def linked_to(self, other: "Node") -> None:
        """Until a packet of ours arrives there."""
        probe = _PROBE + uuid.uuid4().bytes

        async def arrived() -> bool:
            self.engine.send(other.id, probe)
            await asyncio.sleep(0.01)
            return probe in other._probes

        await until(arrived)

    def _take(self, packet: bytes) -> None:
        if packet.startswith(_PROBE):
            self._probes.add(packet)
        else:
            self.packets.append(packet)


async def until(condition: Callable[[], Awaitable[bool] | bool], timeout: float = 10.0) -> None:
    async with asyncio.timeout(timeout):
        while True:
            met = condition()
            if not (met if isinstance(met, bool) else await met):
                await asyncio.sleep(0.01)
                continue
            return


async def mesh(*nodes: Node) -> None:
    """Every node a route of every other, and packets pass in all directions."""
    await asyncio.gather(*(node.start() for node in nodes))
    for node in nodes:
        await node.engine.set_routes([other.address for other in nodes if other is not node])
    for node in nodes:
        for other in nodes:
            if other is not node:
                await node.linked_to(other)
    for node in nodes:
        node.suspected.clear()
