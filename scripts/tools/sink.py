"""A web server that says yes to every POST and counts them, as cheap as it can be: for `scripts/bench post_log`.

Prints its port; then, for each line it is given, how many there were. It ends with its input.
"""

import asyncio
import sys
from typing import cast

import uvloop

YES = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


class Sink(asyncio.Protocol):
    posted = 0

    def __init__(self) -> None:
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (head := self._buffer.find(b"\r\n\r\n")) >= 0:
            headers = self._buffer[:head].lower()
            length = int(headers.partition(b"content-length:")[2].partition(b"\r\n")[0] or 0)
            if len(self._buffer) < head + 4 + length:
                return
            self._buffer = self._buffer[head + 4 + length :]
            Sink.posted += 1
            self._transport.write(YES)


async def main() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Sink, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while await reader.readline():
        print(Sink.posted, flush=True)
    server.close()


if __name__ == "__main__":
    uvloop.run(main())
