"""Our NATS client: with a real server, with TLS, in both event loops, and with servers that are mad."""

import asyncio
import os
import ssl
import subprocess
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import nats
import pytest
import uvloop

from tests.cluster.nats_nodes import until
from tests.mariadb import make_certificate
from xmppd.cluster.child import find_nats_server
from xmppd.cluster.connection import Connection
from xmppd.cluster.nats_client import MAX_WAITING, NatsClient, Server
from xmppd.cluster.nats_protocol import NatsError
from xmppd.errors import NodeUnreachable

BOTH_LOOPS = pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])


@asynccontextmanager
async def nats_server(folder: Path, *options: str) -> AsyncIterator[int]:
    """A nats-server of its own; its port."""
    os.makedirs(folder, exist_ok=True)
    command = [find_nats_server(None), "-a", "127.0.0.1", "-p", "-1", "--ports_file_dir", str(folder), *options]
    process = await asyncio.create_subprocess_exec(*command, stderr=subprocess.DEVNULL)
    ports = folder / f"nats-server_{process.pid}.ports"
    try:
        await until(lambda: ports.exists() and b"nats" in ports.read_bytes())
        yield int(ports.read_text().split("127.0.0.1:")[1].split('"')[0])
    finally:
        process.kill()
        await process.wait()


@asynccontextmanager
async def mad_server(serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], object]) -> AsyncIterator[Server]:
    """Serves a connection by this function, and ends it when that returns."""
    served: list[asyncio.Task[None]] = []

    async def each(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.append(asyncio.current_task())
        try:
            await serve(reader, writer)
        except OSError:
            pass
        finally:
            writer.transport.abort()

    server = await asyncio.start_server(each, "127.0.0.1", 0)
    try:
        async with server:
            yield Server(f"nats://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    finally:
        for task in served:
            task.cancel()
        await asyncio.gather(*served, return_exceptions=True)


async def log_in(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, info: bytes = b"{}") -> None:
    writer.write(b"INFO %b\r\n" % info)
    while await reader.readline() != b"PING\r\n":
        pass
    writer.write(b"PONG\r\n")


async def talk(server: Server) -> None:
    """Messages, questions and large payloads between two of our clients."""
    one, two = await NatsClient.open(server, "one"), await NatsClient.open(server, "two")
    try:
        got: list[tuple[str, str, bytes]] = []
        two.subscribe("a.*", lambda *message: got.append(message))
        two.subscribe("q", lambda _, reply, data: two.publish(reply, data + b"!") and None)
        await two.flush()
        payloads = [b"", b"\r\nMSG a.1 1 1\r\n", os.urandom(one.max_payload), b"x" * 400]
        for payload in payloads:
            assert one.publish("a.1", payload, "r")
        assert not one.publish("a.1", bytes(one.max_payload + 1))

        assert await one.request("q", b"hi", 5) == b"hi!"
        with pytest.raises(NatsError, match="nobody answers"):
            await one.request("nobody", b"", 5)
        await until(lambda: len(got) == len(payloads))
        assert got == [("a.1", "r", payload) for payload in payloads]

        two.unsubscribe("a.*")
        await two.flush()
        assert one.publish("a.1", b"late")
        assert await one.request("q", b"after it", 5) == b"after it!"
        assert len(got) == len(payloads)
        one.publish("a.1", b"goes out before the end")
    finally:
        await one.close()
        await two.close()
    assert not one.publish("a.1", b"")


@BOTH_LOOPS
def test_two_clients_of_ours_talk(loop, tmp_path):
    async def scene() -> None:
        async with nats_server(tmp_path) as port:
            await talk(Server(f"nats://127.0.0.1:{port}"))

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(scene())


@BOTH_LOOPS
def test_two_clients_of_ours_talk_over_tls(loop, tmp_path):
    certificate, key = make_certificate(tmp_path)
    context = ssl.create_default_context(cafile=certificate)
    options = ["--tls", "--tlscert", str(certificate), "--tlskey", str(key), "--user", "u", "--pass", "p"]

    async def scene() -> None:
        async with nats_server(tmp_path / "nats", *options) as port:
            await talk(Server(f"tls://127.0.0.1:{port}", "u", "p", context))
            with pytest.raises(ssl.SSLCertVerificationError):
                await NatsClient.open(Server(f"tls://127.0.0.1:{port}", "u", "p", ssl.create_default_context()), "x")
            with pytest.raises(NatsError, match="wants TLS"):
                await NatsClient.open(Server(f"nats://127.0.0.1:{port}", "u", "p"), "x")
            with pytest.raises(NatsError, match="Authorization Violation"):
                await NatsClient.open(Server(f"tls://127.0.0.1:{port}", "u", "wrong", context), "x")

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(scene())


async def test_a_server_without_tls_is_not_told_the_password_in_clear(tmp_path):
    async with nats_server(tmp_path) as port:
        with pytest.raises(NatsError, match="no TLS"):
            await NatsClient.open(Server(f"tls://127.0.0.1:{port}", "u", "p", ssl.create_default_context()), "x")


async def test_a_token_logs_in(tmp_path):
    async with nats_server(tmp_path, "--auth", "t0ken") as port:
        client = await NatsClient.open(Server(f"nats://127.0.0.1:{port}", token="t0ken"), "x")
        await client.close()
        with pytest.raises(NatsError, match="Authorization Violation"):
            await NatsClient.open(Server(f"nats://127.0.0.1:{port}", token="other"), "x")


async def test_another_client_understands_us_headers_included(tmp_path):
    async with nats_server(tmp_path) as port:
        ours = await NatsClient.open(Server(f"nats://127.0.0.1:{port}"), "ours")
        theirs = await nats.connect(f"nats://127.0.0.1:{port}")
        try:
            got: list[bytes] = []
            ours.subscribe("echo", lambda _, reply, data: got.append(data) or ours.publish(reply, data), queue="q")
            await ours.flush()

            answer = await theirs.request("echo", b"hello", headers={"A": "b"})

            assert (answer.data, got) == (b"hello", [b"hello"])
        finally:
            await theirs.close()
            await ours.close()


async def test_of_a_queue_one_gets_each_message(tmp_path):
    async with nats_server(tmp_path) as port:
        clients = [await NatsClient.open(Server(f"nats://127.0.0.1:{port}"), "x") for _ in range(3)]
        got: list[bytes] = []
        for client in clients:
            client.subscribe("a", lambda _s, _r, data: got.append(data), queue="q")
            await client.flush()
        for number in range(50):
            clients[0].publish("a", b"%d" % number)

        for client in [*clients, *clients]:
            await client.flush()

        assert sorted(got) == sorted(b"%d" % number for number in range(50))
        for client in clients:
            await client.close()


@BOTH_LOOPS
def test_a_server_that_reads_nothing_gets_so_much_and_no_more(loop):
    async def scene() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await log_in(reader, writer)
            await asyncio.Event().wait()

        async with mad_server(serve) as server:
            client = await NatsClient.open(server, "x")
            payload = bytes(client.max_payload)
            taken = 0
            while client.publish("a", payload):
                taken += 1
                assert taken < 100
                await asyncio.sleep(0)
            assert taken * len(payload) >= MAX_WAITING
            client.abort()

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(scene())


@pytest.mark.parametrize(
    "said",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"INFO {\r\n",
        b"PING\r\n",
        b"INFO {}\r\n-ERR 'maximum connections exceeded'\r\n",
        b"x" * 100_000,
        b"",
    ],
)
async def test_what_is_no_nats_server_is_no_connection(said):
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(said)
        await writer.drain()
        if said:
            await reader.read()

    async with mad_server(serve) as server:
        with pytest.raises((NatsError, OSError)):
            await NatsClient.open(server, "x")


async def test_what_comes_in_clear_before_tls_is_not_taken_for_what_comes_after(tmp_path):
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"tls_required":true}\r\nPI')
        await reader.read()

    async with mad_server(serve) as server:
        secure = Server(server.url.replace("nats:", "tls:"), tls=ssl.create_default_context())
        with pytest.raises(NatsError, match="in clear"):
            await NatsClient.open(secure, "x")


async def test_a_question_ends_with_the_connection():
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await log_in(reader, writer)
        while not (await reader.readline()).startswith(b"PUB"):
            pass
        writer.write(b"-ERR 'Stale Connection'\r\n")
        await writer.drain()

    async with mad_server(serve) as server:
        client = await NatsClient.open(server, "x")
        with pytest.raises(NatsError, match="Stale Connection"):
            await client.request("a", b"", 5)
        assert client.closed.is_set()


async def test_a_handler_that_fails_ends_the_connection_and_is_told(caplog):
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await log_in(reader, writer)
        while not (await reader.readline()).startswith(b"SUB a"):
            pass
        writer.write(b"MSG a 1 0\r\n\r\n")
        await reader.read()

    async with mad_server(serve) as server:
        client = await NatsClient.open(server, "x")
        client.subscribe("a", lambda *_: 1 // 0)
        await asyncio.wait_for(client.closed.wait(), 5)
    assert "nats connection failed" in caplog.text


class Kept:
    """A Connection, and what it has told."""

    def __init__(self, *servers: Server) -> None:
        self.told: list[str] = []
        self.connection = Connection(
            "x",
            lambda: servers,
            on_up=lambda first: self.told.append("up" if first else "again"),
            on_lost=lambda: self.told.append("lost"),
            on_stuck=lambda: self.told.append("stuck"),
        )


async def test_a_silent_server_is_stuck_and_left(monkeypatch):
    monkeypatch.setattr("xmppd.cluster.connection._PING", 0.05)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await log_in(reader, writer)
        await reader.read()

    async with mad_server(serve) as server:
        kept = Kept(server)
        await kept.connection.start(5)
        await until(lambda: kept.told[:4] == ["up", "stuck", "lost", "again"])
        await kept.connection.stop()


async def test_a_handler_that_comes_while_it_connects_is_not_forgotten(tmp_path):
    subjects = [uuid.uuid4().hex for _ in range(20)]
    got: list[str] = []
    async with nats_server(tmp_path) as port:
        kept = Kept(Server("nats://127.0.0.1:1"), Server(f"nats://127.0.0.1:{port}"))
        starting = asyncio.create_task(kept.connection.start(5))
        for subject in subjects:
            await kept.connection.handle(subject, lambda subject, _r, _d: got.append(subject))
            await asyncio.sleep(0)
        await starting
        other = await NatsClient.open(Server(f"nats://127.0.0.1:{port}"), "y")
        for subject in subjects:
            other.publish(subject, b"")
        await until(lambda: got == subjects)

        await kept.connection.handle(subjects[0], lambda *_: got.append("another handler"))
        other.publish(subjects[0], b"")
        await until(lambda: got[-1] == "another handler")
        await other.close()
        await kept.connection.stop()
        with pytest.raises(NodeUnreachable):
            await kept.connection.request("a", b"", 1)
    assert kept.told == ["up"]
