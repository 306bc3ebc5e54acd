"""A look at another node: each thing that can be wrong has its own finding."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.cluster.nats_nodes import COOKIE, mesh, until
from xmppd.cluster import pki
from xmppd.cluster.addresses import join
from xmppd.cluster.probe import Finding


async def test_a_node_of_our_cookie_tells_who_it_is(make_node):
    one, two = make_node(), make_node()
    await one.start()

    found = await two.engine.probe(one.address)  # never started itself

    assert found.ok
    assert found.node == one.id
    assert found.nats_version.startswith("2.")
    assert found.addresses == (one.address,)
    assert 0 < found.connect_seconds < 1


async def test_another_cookie_is_told_from_everything_else(make_node):
    one, two = make_node(), make_node(cookie="another cookie of 32 characters.")
    await one.start()

    found = await two.engine.probe(one.address)

    assert found.finding is Finding.WRONG_COOKIE
    assert "cookie" in found.text
    assert found.node is None


async def test_who_comes_with_another_cookie_is_counted_and_named(make_node, caplog):
    one, two = make_node(), make_node(cookie="another cookie of 32 characters.")
    await one.start()

    await two.engine.probe(one.address)
    await two.engine.probe(one.address)

    await until(lambda: one.engine.refused == 2)
    lines = [record.fields for record in caplog.records if record.msg == "peer refused, wrong cookie"]
    assert len(lines) == 1
    assert lines[0]["peer"].startswith("127.0.0.1:")


async def test_a_cookie_that_is_only_trusted_is_good_enough(make_node):
    new = "the next cookie, 32 characters.."
    one, two = make_node(cookie=new), make_node()
    await one.engine.set_cookies(new, [COOKIE])
    await one.start()
    await two.engine.set_cookies(COOKIE, [new])

    assert (await two.engine.probe(one.address)).ok


async def test_a_node_that_does_not_trust_us_is_a_wrong_cookie_too(make_node):
    new = "the next cookie, 32 characters.."
    one, two = make_node(), make_node(cookie=new)
    await one.start()
    await two.engine.set_cookies(new, [COOKIE])  # we accept it, it does not accept us

    assert (await two.engine.probe(one.address)).finding is Finding.WRONG_COOKIE


async def test_a_name_nobody_knows(make_node):
    found = await make_node().engine.probe("xmppd@no-such-host.invalid")

    assert found.finding is Finding.NO_SUCH_HOST
    assert "cluster.hosts" in found.text


async def test_nothing_listens(make_node):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    found = await make_node().engine.probe(f"127.0.0.1:{port}")

    assert found.finding is Finding.REFUSED
    assert found.address == f"127.0.0.1:{port}"


async def test_an_address_that_swallows_everything(make_node):
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        port = full.getsockname()[1]
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(("127.0.0.1", port))

        found = await make_node().engine.probe(f"127.0.0.1:{port}", timeout=0.3)

        for one in waiting:
            one.close()
    assert found.finding is Finding.TIMEOUT


@asynccontextmanager
async def service(greeting: bytes, linger: float, context: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """Something that listens, says this, and closes some seconds after the first byte it gets; its address."""
    done = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ended = asyncio.Event()
        done.append(ended)
        try:
            writer.write(greeting)
            await reader.read(1)
            await asyncio.sleep(linger)
        except OSError:
            pass
        finally:
            writer.transport.abort()
            ended.set()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    async with server:
        yield join(*server.sockets[0].getsockname()[:2])
        for ended in done:
            await asyncio.wait_for(ended.wait(), 5)


@pytest.mark.parametrize("greeting", [b"", b"SSH-2.0-OpenSSH_9.2\r\n", b"INFO {}\r\n"])
async def test_another_service(make_node, greeting):
    async with service(greeting, 0.05) as address:
        found = await make_node().engine.probe(address)

    assert found.finding is Finding.NOT_A_NODE
    assert "cluster.listen" in found.text


async def test_a_service_that_says_nothing_at_all(make_node):
    async with service(b"", 1.0) as address:
        found = await make_node().engine.probe(address, timeout=0.3)

    assert found.finding is Finding.NOT_A_NODE


async def test_a_web_server_with_a_certificate_is_no_node_of_another_cookie(make_node, tmp_path, monkeypatch):
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    with monkeypatch.context() as patched:
        patched.setattr(pki, "ORGANIZATION", "somebody else")
        certificate, key = pki.leaf(pki.authority("the cookie of nobody else at all"), b"\0" * 16)
    file = tmp_path / "web.pem"
    file.write_bytes(certificate + key)
    context.load_cert_chain(file)

    async with service(b"", 0.05, context) as address:
        found = await make_node().engine.probe(address, timeout=1)

    assert found.finding is Finding.NOT_A_NODE


async def test_no_key_stays_behind(make_node):
    one, two = make_node(), make_node()
    await one.start()

    assert (await two.engine.probe(one.address)).ok

    assert list((two.folder / "nats").iterdir()) == []


async def test_a_look_disturbs_nobody(make_node):
    one, two, three = make_node(), make_node(), make_node()
    await mesh(one, two)

    for _ in range(3):
        await three.engine.probe(one.address)

    assert one.suspected == []
    assert one.engine.refused == 0
