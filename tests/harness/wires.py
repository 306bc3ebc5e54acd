"""The network between the nodes of a cluster, to be cut without a word: no FIN and no RST, as when a cable is pulled.

wires = Wires(cluster)      # before the nodes start
wires.isolate(cluster[0]); wires.cut(cluster[0], cluster[2]); wires.cut(a, b, both=False); wires.heal(); wires.close()

Every node reaches every other one over a proxy of its own, which in a cut takes nothing and gives nothing. What was on
its way arrives after the heal, as TCP would bring it.
"""

import asyncio
import itertools
import threading
from contextlib import suppress
from typing import Final

from tests.harness.cluster import ClusterNode, RealCluster

_PIECE: Final = 65536
_DIALS: Final = 25  # a tenth of a second apart


class Way:
    """What one node says to another, however the two are connected."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.open.set()


class Wires:
    """A thread of its own carries the bytes."""

    def __init__(self, cluster: RealCluster) -> None:
        self._nodes = list(cluster)
        self._ways: dict[tuple[str, str], Way] = {}
        self._ports: dict[tuple[str, str], int] = {}
        self._servers: list[asyncio.Server] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="wires", daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result(10)
        for node in self._nodes:
            hosts = {
                other.name.partition("@")[2]: f"127.0.0.1:{self._ports[node.name, other.name]}"
                for other in self._nodes
                if other is not node
            }
            host = node.name.partition("@")[2]
            # The name is what the others are told; each of them has an address of its own for it.
            own = {**node.options["cluster"], "hosts": hosts, "advertise": f"{host}:{node.port_of_cluster}"}
            node.configure({**node.options, "cluster": own})

    # -- for tests

    def cut(self, one: ClusterNode, other: ClusterNode, *, both: bool = True) -> None:
        """What `one` says does not reach `other` any more (and the other way round)."""
        self._set([(one.name, other.name), *([(other.name, one.name)] if both else [])], False)

    def isolate(self, node: ClusterNode) -> None:
        """Cut a node off from all others."""
        names = [(node.name, other.name) for other in self._nodes if other is not node]
        self._set([*names, *((to, from_) for from_, to in names)], False)

    def heal(self) -> None:
        self._set(list(self._ways), True)

    def close(self) -> None:
        """When the nodes are gone."""
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    # -- in the thread

    def _set(self, ways: list[tuple[str, str]], on: bool) -> None:
        done = threading.Event()

        def change() -> None:
            for way in ways:
                event = self._ways[way].open
                event.set() if on else event.clear()
            done.set()

        self._loop.call_soon_threadsafe(change)
        assert done.wait(10)

    async def _open(self) -> None:
        for one, other in itertools.permutations(self._nodes, 2):
            self._ways[one.name, other.name] = Way()
        for one, other in itertools.permutations(self._nodes, 2):
            there, back = self._ways[one.name, other.name], self._ways[other.name, one.name]
            server = await asyncio.start_server(self._carrier(other.port_of_cluster, there, back), "127.0.0.1", 0)
            self._servers.append(server)
            self._ports[one.name, other.name] = server.sockets[0].getsockname()[1]

    def _carrier(self, port: int, there: Way, back: Way):  # type: ignore[no-untyped-def]
        async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self._note()
            await there.open.wait()
            await back.open.wait()
            try:
                to_reader, to_writer = await self._dial(port)
            except OSError:
                writer.transport.abort()
                return
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._pump(reader, to_writer, there))
                    group.create_task(self._pump(to_reader, writer, back))
            finally:
                writer.transport.abort()
                to_writer.transport.abort()

        return carry

    @staticmethod
    async def _dial(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A node that is asked to open its port takes a moment."""
        for _ in range(_DIALS):
            with suppress(ConnectionRefusedError):
                return await asyncio.open_connection("127.0.0.1", port)
            await asyncio.sleep(0.1)
        return await asyncio.open_connection("127.0.0.1", port)

    def _note(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: Way) -> None:
        with suppress(OSError):
            while data := await reader.read(_PIECE):
                await way.open.wait()
                writer.write(data)
                await writer.drain()
            await way.open.wait()
            writer.write_eof()

    async def _close(self) -> None:
        for server in self._servers:
            server.close()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=5)
