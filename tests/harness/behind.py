"""A client behind a balancer: something comes before its own first byte, and it may come from elsewhere."""

import asyncio
import socket
import ssl
import struct
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path

from tests.harness.raw import Raw

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"


def version_1(client: str, port: int = 40112) -> bytes:
    family = "TCP6" if ":" in client else "TCP4"
    return f"PROXY {family} {client} {client} {port} 5222\r\n".encode()


def version_2(client: str, port: int = 40112) -> bytes:
    address = ip_address(client)
    block = address.packed * 2 + struct.pack("!HH", port, 5222) + b"\x04\0\x04\0\0\0\0"
    return SIGNATURE + struct.pack("!BBH", 0x21, 0x11 if address.version == 4 else 0x21, len(block)) + block


LOCAL = SIGNATURE + b"\x20\x00\x00\x00"  # a health check


class Behind(Raw):
    """`pieces` are sent before everything else, TLS included; `dial` makes the connected socket."""

    def __init__(
        self, certificate: Path, *pieces: bytes, source: str = "", dial: Callable[[], socket.socket] | None = None
    ) -> None:
        super().__init__(certificate)
        self._pieces = pieces
        self._source = source
        self._dial = dial

    async def connect(self, port: int) -> None:
        await self._come_through(port)
        self._listen()

    async def connect_tls(
        self, port: int, context: ssl.SSLContext | None = None, name: str | None = None, source: str | None = None
    ) -> None:
        await self._come_through(port)
        assert self._writer is not None
        await self._writer.start_tls(context or self.context, server_hostname=name or self.host)
        self._listen()

    async def _come_through(self, port: int) -> None:
        if self._dial is not None:
            dialling = asyncio.ensure_future(asyncio.to_thread(self._dial))
            try:
                sock = await asyncio.shield(dialling)
            except asyncio.CancelledError:
                dialling.add_done_callback(_hang_up)  # it cannot be interrupted
                raise
            self._reader, self._writer = await asyncio.open_connection(sock=sock)
        else:
            local = (self._source, 0) if self._source else None
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", port, local_addr=local)
        for piece in self._pieces:
            self._writer.write(piece)
            await self._writer.drain()
            await asyncio.sleep(0.01 if len(self._pieces) > 1 else 0)  # a packet of its own, if it can be


def _hang_up(dialling: "asyncio.Future[socket.socket]") -> None:
    if not dialling.cancelled() and dialling.exception() is None:
        dialling.result().close()
