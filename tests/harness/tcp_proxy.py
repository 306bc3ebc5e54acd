"""A proxy that knows bytes and nothing else, as one that stands before a database: it can cut, stall and half-close.

async with TcpProxy(port) as proxy:   # clients connect to proxy.port
    proxy.cut(); proxy.stall(); proxy.go_on(); proxy.half_close(); await proxy.refuse(); await proxy.admit()
"""

import asyncio
from contextlib import suppress
from typing import Final, Self

_PIECE: Final = 4096


class TcpProxy:
    def __init__(self, target: int) -> None:
        self._target = target
        self._server: asyncio.Server | None = None
        self._writers: list[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._flows = asyncio.Event()
        self._flows.set()
        self.port = 0
        self.accepted = 0

    async def __aenter__(self) -> Self:
        await self.admit()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.refuse()
        self._flows.set()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks))

    @property
    def flows(self) -> bool:
        return self._flows.is_set()

    def cut(self) -> None:
        """Every connection ends at once, with a reset."""
        pairs, self._writers = self._writers, []
        for pair in pairs:
            for writer in pair:
                writer.transport.abort()

    def half_close(self) -> None:
        """The server has closed, as clients see it; what they send is still taken."""
        for client, _ in self._writers:
            with suppress(OSError, RuntimeError):
                client.write_eof()

    def stall(self) -> None:
        """Nothing flows any more, and nobody is told."""
        self._flows.clear()

    def go_on(self) -> None:
        self._flows.set()

    async def refuse(self) -> None:
        """Nobody listens, and who was there is cut off."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
        self.cut()

    async def admit(self) -> None:
        """On the same port as before."""
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.accepted += 1
        there, back = await asyncio.open_connection("127.0.0.1", self._target)
        pair = (writer, back)
        self._writers.append(pair)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, back))
                group.create_task(self._pump(there, writer))
        finally:
            with suppress(ValueError):
                self._writers.remove(pair)
            writer.transport.abort()
            back.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, RuntimeError):
            while data := await reader.read(_PIECE):
                await self._flows.wait()
                writer.write(data)
                await writer.drain()
            writer.write_eof()
