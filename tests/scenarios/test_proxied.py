"""Listeners behind a balancer that speaks the PROXY protocol: whose address counts, and who is sent away."""

import asyncio
import contextlib
import re
import socket
import ssl
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.harness.behind import LOCAL, Behind, version_1, version_2
from tests.harness.inbox import PATIENCE
from tests.harness.raw import header
from tests.harness.scene import PASSWORD, Scene, until
from tests.harness.server import Server, options

BALANCER, STRANGER = "127.0.0.1", "127.0.0.9"
JULIET, TYBALT = "192.0.2.7", "198.51.100.66"
PROXIED = {"ip": "127.0.0.1", "port": 0, "use_proxy_protocol": True, "trusted_proxies": [BALANCER]}


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    """All its listeners are behind the balancer, but one for metrics."""
    c2s = {**PROXIED, "module": "c2s", "negotiation_timeout": 2}
    listen = [
        c2s,
        {**c2s, "tls": True},
        {**PROXIED, "module": "http", "request_handlers": {"/": "api"}},
        {**PROXIED, "module": "http", "tls": True, "request_handlers": {"/": "api"}},
        {"module": "http", "ip": "127.0.0.2", "port": 0, "request_handlers": {"/": "metrics"}},
    ]
    node = Server(
        tmp_path_factory.mktemp("node"),
        options(
            listen=listen,
            acl={"capulets": {"ip": "198.51.100.0/24"}},
            access_rules={"c2s": [{"deny": "capulets"}, {"allow": "all"}]},
            login_limits={"per_address": "2/m"},
            api_permissions={
                "verona": {"who": {"ip": "192.0.2.0/24"}, "what": "status"},
                "near": {"who": "loopback", "what": "stats"},
            },
        ),
    )
    try:
        node.start()
        yield node
        node.judge()
    finally:
        node.kill()


@pytest.fixture
async def scene(node) -> AsyncIterator[Scene]:
    scene = Scene(node)
    scene.account("juliet")
    yield scene
    await scene.end()


@pytest.fixture
async def behind(scene):
    """`behind(*pieces)`: a client whose connection begins with these."""
    made: list[Behind] = []

    def make(*pieces: bytes, source: str = "") -> Behind:
        made.append(Behind(scene.node.certificate(), *pieces, source=source))
        return made[-1]

    yield make
    for client in made:
        await client.leave()


def address(scene: Scene, command: str = "user_sessions_info", *argv: str) -> list[str]:
    """Of each session: (connection, ip, port) as an operator sees them."""
    lines = scene.asked(command, *(argv or ("juliet", "localhost"))).splitlines()
    return [" ".join(line.split("\t")[:3]) for line in lines]


def metric(node: Server, name: str, **labels: str) -> float:
    port = next(one["port"] for one in node.ready["listen"] if one["ip"] == "127.0.0.2")
    with socket.create_connection(("127.0.0.2", port), PATIENCE) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        page = b"".join(iter(lambda: sock.recv(65536), b"")).decode()
    for found, text in re.findall(rf"^{name}(?:\{{(.*?)\}})? (\S+)$", page, re.MULTILINE):
        if dict(re.findall(r'(\w+)="(.*?)"', found)) == labels:
            return float(text)
    return 0.0


def refused(node: Server, reason: str) -> float:
    return metric(node, "xmppd_proxies_refused_total", reason=reason)


@pytest.mark.parametrize("said", [version_1, version_2])
@pytest.mark.parametrize("client", [JULIET, "2001:db8::7"])
async def test_over_starttls_and_direct_tls_the_address_is_the_clients_own(scene, behind, said, client):
    encrypted = behind(said(client, 40112))
    await encrypted.login(scene.node.tls_port, "juliet", PASSWORD, "balcony")
    upgraded = behind(said(client, 40113))
    await upgraded.connect(scene.node.port)
    await upgraded.open()
    await upgraded.starttls()
    await upgraded.authenticate("juliet", PASSWORD)
    await upgraded.bind("orchard")

    found = address(scene)

    assert sorted(found) == [f"c2s_tls {client} 40112", f"c2s_tls {client} 40113"]
    assert f" ip={client}" in scene.node.new_log()
    everybody = scene.asked("connected_users_info").splitlines()
    assert sorted(line.split("\t")[2] for line in everybody) == [client, client]


async def test_a_header_in_pieces_and_one_with_the_first_stanza_bytes(scene, behind):
    whole = version_2(JULIET)
    slow = behind(*(whole[at : at + 7] for at in range(0, len(whole), 7)))
    await slow.login(scene.node.tls_port, "juliet", PASSWORD, "slow")
    quick = behind(version_1(JULIET) + header().encode())
    await quick.connect(scene.node.port)

    assert (await quick.next()).name == "features"
    assert address(scene) == [f"c2s_tls {JULIET} 40112"]


async def test_a_client_hello_in_the_packet_of_the_header_is_not_lost(scene):
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.create_default_context(cafile=str(scene.node.certificate()))
    tls = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    reader, writer = await asyncio.open_connection("127.0.0.1", scene.node.tls_port)
    writer.write(version_2(JULIET) + outgoing.read())
    try:
        while True:
            incoming.write(await asyncio.wait_for(reader.read(65536), PATIENCE))
            with contextlib.suppress(ssl.SSLWantReadError):
                tls.do_handshake()
                break
    finally:
        writer.transport.abort()

    assert tls.getpeercert()


async def test_what_the_balancer_asks_for_itself_comes_from_the_balancer(scene, behind):
    client = behind(LOCAL)
    await client.login(scene.node.tls_port, "juliet", PASSWORD)

    assert [line.split()[1] for line in address(scene)] == [BALANCER]


async def test_rules_and_limits_go_by_the_clients_address(scene, behind):
    """All of them come from one balancer, and only Tybalt pays for what Tybalt does."""
    tybalt = behind(version_2(TYBALT))
    await tybalt.connect_tls(scene.node.tls_port)
    await tybalt.authenticate("juliet", PASSWORD)
    denied = await tybalt.bind()
    answers = []
    for _ in range(3):
        guess = behind(version_1("203.0.113.5"))
        await guess.connect_tls(scene.node.tls_port)
        await guess.open()
        answers.append((await guess.plain("juliet", "a guess")).xml[0].tag.rpartition("}")[2])
    honest = behind(version_2(JULIET))
    await honest.login(scene.node.tls_port, "juliet", PASSWORD)

    assert denied.condition == "not-allowed"
    assert answers == ["not-authorized", "not-authorized", "temporary-auth-failure"]
    assert honest.jid


async def cut_off(port: int, *pieces: bytes, source: str = BALANCER) -> bytes:
    """What is answered until the connection or the stream has ended."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0))
    try:
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
            return await asyncio.wait_for(reader.readuntil(b"</stream:stream>"), PATIENCE)
        return b""
    except asyncio.IncompleteReadError as ended:
        return ended.partial
    finally:
        writer.transport.abort()


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("kind", ["c2s", "http"])
async def test_nobody_but_the_balancer_may_say_who_he_is(scene, kind, tls):
    before = refused(scene.node, "untrusted")
    for piece in (version_1(JULIET), header().encode()):
        assert await cut_off(port_of(scene.node, kind, tls), piece, source=STRANGER) == b""

    assert refused(scene.node, "untrusted") == before + 2


async def test_who_is_refused_stands_in_the_log_once_a_minute(scene):
    for _ in range(3):
        await cut_off(scene.node.port, source="127.0.0.77")

    said = [line for line in scene.node.log.splitlines() if "proxied connection refused peer=127.0.0.77" in line]

    assert len(said) == 1
    assert said[0].split(" ", 1)[1].startswith("WARN ")
    assert "reason=untrusted" in said[0]


@pytest.mark.parametrize(
    "data",
    [
        header().encode(),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PROXY " + b"A" * 500,
        version_2(JULIET).replace(b"\x21\x11", b"\x31\x11"),
        b"\r\n\r\n\0\r\nQUIT\n\x21\x11\xff\xff" + b"\0" * 60000,
    ],
)
async def test_a_balancer_that_says_nothing_sensible_is_cut_off(scene, data):
    before = refused(scene.node, "malformed")

    assert await cut_off(scene.node.port, data) == b""
    assert await cut_off(scene.node.tls_port, data) == b""

    assert refused(scene.node, "malformed") == before + 2


async def test_a_header_that_dribbles_or_never_comes_has_an_end(scene):
    """`negotiation_timeout` is 2 s here. A second header is no header: what is behind the first one is the stream."""
    timeouts, incomplete = refused(scene.node, "timeout"), refused(scene.node, "incomplete")

    async def dribble() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", scene.node.port)
        try:
            with contextlib.suppress(ConnectionError):
                for byte in b"PROXY UNKNOWN" + b" " * 90:
                    writer.write(bytes([byte]))
                    await asyncio.sleep(0.1)
                    if reader.at_eof():
                        return
            assert await asyncio.wait_for(reader.read(), PATIENCE) == b""
        finally:
            writer.transport.abort()

    await asyncio.gather(dribble(), cut_off(scene.node.tls_port), cut_off(scene.node.port, b"PROXY"))
    assert refused(scene.node, "timeout") == timeouts + 3
    _, writer = await asyncio.open_connection("127.0.0.1", scene.node.port)
    writer.write(b"PROXY TCP4")
    await writer.drain()
    writer.close()
    await until(lambda: refused(scene.node, "incomplete") == incomplete + 1, "the end of a half header to be counted")
    assert b"<stream:error>" in await cut_off(scene.node.port, version_1(JULIET) * 2)


async def test_a_port_that_is_only_knocked_at_is_no_trouble(scene):
    """As health checks do that know nothing but TCP; and every connection is forgotten."""
    before = {reason: refused(scene.node, reason) for reason in ("untrusted", "malformed", "timeout", "incomplete")}
    for _ in range(3):
        _, writer = await asyncio.open_connection("127.0.0.1", scene.node.port)
        writer.close()

    await until(lambda: metric(scene.node, "xmppd_connections", listener="c2s") == 0, "them to be forgotten")

    assert {reason: refused(scene.node, reason) for reason in before} == before


# ---------------------------------------------------------------------------------------------- http


def port_of(node: Server, module: str, tls: bool) -> int:
    return next(
        one["port"]
        for one in node.ready["listen"]
        if (one["module"], one["tls"], one["ip"]) == (module, tls, "127.0.0.1")
    )


async def command(node: Server, name: str, *pieces: bytes, tls: bool) -> int:
    """The status of a command."""
    client = Behind(node.certificate(), *pieces)
    await client._come_through(port_of(node, "http", tls))
    assert client._writer is not None
    assert client._reader is not None
    try:
        if tls:
            await client._writer.start_tls(client.context, server_hostname="localhost")
        client._writer.write(f"POST /{name} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n".encode())
        line = await asyncio.wait_for(client._reader.readline(), PATIENCE)
        return int(line.split()[1])
    finally:
        client._writer.transport.abort()


@pytest.mark.parametrize("tls", [False, True])
async def test_permissions_of_the_http_api_go_by_the_clients_address(scene, tls):
    assert await command(scene.node, "status", version_2(JULIET), tls=tls) == 200
    assert await command(scene.node, "status", version_1(TYBALT), tls=tls) == 401
    assert await command(scene.node, "status", b"PROXY", b" UNKNOWN\r\n", tls=tls) == 401
    assert await command(scene.node, "stats", version_2("127.0.0.1"), tls=tls) == 400  # allowed, and asked for nothing


async def test_a_handshake_that_fails_behind_the_header_ends_that_connection_alone(scene):
    port = port_of(scene.node, "http", True)

    assert b"HTTP" not in await cut_off(port, version_2(JULIET) + b"GET / HTTP/1.1\r\n\r\n")

    assert await command(scene.node, "status", version_2(JULIET), tls=True) == 200


async def test_without_the_option_a_header_is_no_stream(server: Any):
    answer = await cut_off(server.node.port, version_1(JULIET) + header().encode())

    assert b"<stream:error>" in answer
