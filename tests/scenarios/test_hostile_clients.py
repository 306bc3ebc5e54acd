"""Whatever strangers and users throw at it, each gets its error, and two others chat on without a gap."""

import asyncio
import base64
import contextlib
import os
import subprocess

import pytest

from tests.harness.raw import SASL, TLS, header
from tests.harness.scene import PASSWORD, until
from tests.harness.server import NotServing

STREAMS = "http://etherx.jabber.org/streams"
LAUGHS = "<!DOCTYPE a [<!ENTITY a 'ha'>" + "".join(
    f"<!ENTITY {name} '&{before};&{before};&{before};'>" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
BEFORE_STREAM = [
    ("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", "not-well-formed"),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500), "not-well-formed"),
    ("<stream:stream to='localhost'".encode("utf-16"), "unsupported-encoding"),
    ("<?xml version='1.0' encoding='iso-8859-1'?>" + header(), "unsupported-encoding"),
    (LAUGHS + "]>" + header(), "restricted-xml"),
    ("<!-- hello -->" + header(), "restricted-xml"),
    ("<?evil code?>" + header(), "restricted-xml"),
    (header().replace("jabber:client", "jabber:server"), "invalid-namespace"),
    (header().replace(STREAMS, "http://example.net/streams"), "invalid-namespace"),
    (header().replace("stream:stream", "stream:flow"), "bad-format"),
    ("<stream:stream a='" + "x" * 17_000, "policy-violation"),
]
BEFORE_LOGIN = [
    (f"<auth xmlns='{SASL}' mechanism='PLAIN'>" + "A" * 17_000, "policy-violation"),
    (f"<auth xmlns='{SASL}' mechanism='PLAIN'>" + "<a/>" * 1_000, "policy-violation"),
    (f"<auth xmlns='{SASL}'>" + "<a>" * 100, "policy-violation"),
    (f"<!-- --><auth xmlns='{SASL}'/>", "restricted-xml"),
    (f"<auth xmlns='{SASL}'>&who;</auth>", "restricted-xml"),
    ("<iq type='set' id='b'><bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'/></iq>", "not-authorized"),
    ("<message to='juliet@localhost'><body>psst</body></message>", "not-authorized"),
    (f"<starttls xmlns='{TLS}'", None),
]
AFTER_LOGIN = [
    ("<message to='juliet@localhost'><body>" + "x" * 300_000 + "</body></message>", "policy-violation"),
    ("<message to='juliet@localhost'><body>" + "x" * 300_000, "policy-violation"),
    ("<message to='" + "x" * 300_000, "policy-violation"),
    ("<message to='juliet@localhost'>" + "<a>" * 100, "policy-violation"),
    ("<message to='juliet@localhost'>" + "<a/>" * 20_000, "policy-violation"),
    ("<message to='juliet@localhost'><!-- psst --></message>", "restricted-xml"),
    ("<message to='juliet@localhost'><?psst?></message>", "restricted-xml"),
    ("<message to='juliet@localhost'><body>&psst;</body></message>", "restricted-xml"),
    ("<message from='nurse@localhost/x' to='juliet@localhost'><body>I</body></message>", "invalid-from"),
    ("<message from='@@' to='juliet@localhost'><body>I</body></message>", "invalid-from"),
    ("<presence from='localhost' to='juliet@localhost' type='unsubscribed'/>", "invalid-from"),
    ("<message xmlns='jabber:component:accept' to='juliet@localhost'/>", "unsupported-stanza-type"),
    ("<message xmlns='' to='juliet@localhost'/>", "invalid-namespace"),
    (header() + "</stream:stream>", "unsupported-stanza-type"),
    ("</message>", "not-well-formed"),
    ("<message to='juliet@localhost'><body>half", None),
]


class Pair:
    """Two who chat; every message must arrive, in order, and none but theirs."""

    def __init__(self, romeo, juliet):
        self.romeo, self.juliet = romeo, juliet
        self.heard = 0
        self._going = True
        self._task = asyncio.create_task(self._chat())

    async def _chat(self):
        while self._going:
            self.romeo.send_message(self.juliet.jid, str(self.heard))
            got = await self.juliet.next_stanza()
            assert (got.name, got.sender, got.body) == ("message", self.romeo.jid, str(self.heard)), got
            self.heard += 1
            await asyncio.sleep(0.001)

    async def goes_on(self):
        """Three more messages from now."""
        before = self.heard
        await until(lambda: self.heard > before + 2 or self._task.done(), "the chat to go on")
        if self._task.done():
            self._task.result()

    async def end(self):
        self._going = False
        await self._task
        for client in (self.romeo, self.juliet):
            await client.expect_nothing()


@pytest.fixture
async def pair(server):
    pair = Pair(await server.raw_login("mercutio", "street"), await server.raw_login("benvolio", "street"))
    yield pair
    await pair.end()


async def attack(client, data, condition):
    """Send it while the answer may come already; the stream error, and the end."""
    client.forget()
    client.send_raw(data)
    if condition is None:
        with contextlib.suppress(OSError):
            await client.drain()
        await client.close()
        return
    error = await client.wait_for(lambda got: got.xml.tag == f"{{{STREAMS}}}error", f"the error for {data[:80]!r}")
    assert error.condition == condition, (data[:80], error)
    await client.assert_closed()
    await client.close()


@pytest.mark.parametrize("tls", [False, True])
async def test_nonsense_in_place_of_a_stream(server, pair, tls):
    for data, condition in BEFORE_STREAM:
        client = await (server.encrypted() if tls else server.connected())
        await attack(client, data, condition)
        await pair.goes_on()


async def test_plain_text_where_tls_is_spoken(server, pair):
    client = server.raw()
    await client.connect(server.node.tls_port)
    client.send_raw(header())
    await client.assert_closed()
    await pair.goes_on()


async def test_nonsense_in_place_of_authentication(server, pair):
    for data, condition in BEFORE_LOGIN:
        client = await server.encrypted()
        await client.open()
        await attack(client, data, condition)
        await pair.goes_on()


async def test_users_who_break_the_rules(server, pair):
    server.account("juliet")
    for data, condition in AFTER_LOGIN:
        client = await server.raw_login("tybalt")
        await attack(client, data, condition)
        await pair.goes_on()
    assert await server.stored("juliet") == 0  # nothing of it has come through


async def test_nobody_logs_in_as_somebody_else(server, pair):
    for user in ("juliet", "tybalt"):
        server.account(user)
    for authzid, condition in [
        ("juliet@localhost", "invalid-authzid"),
        ("tybalt@elsewhere.example", "invalid-authzid"),
        ("@@", "invalid-authzid"),
    ]:
        client = await server.encrypted()
        await client.open()
        secret = base64.b64encode(f"{authzid}\0tybalt\0{PASSWORD}".encode()).decode()
        client.send_raw(f"<auth xmlns='{SASL}' mechanism='PLAIN'>{secret}</auth>")
        answer = await client.next()
        assert (answer.name, answer.payload.tag) == ("failure", f"{{{SASL}}}{condition}"), authzid
        assert await client.plain("tybalt", PASSWORD) is not None  # the stream is still of use
        await client.close()
        await pair.goes_on()
    client = await server.encrypted()
    await client.open()
    secret = base64.b64encode(f"tybalt@localhost\0tybalt\0{PASSWORD}".encode()).decode()
    client.send_raw(f"<auth xmlns='{SASL}' mechanism='PLAIN'>{secret}</auth>")
    assert (await client.next()).name == "success"


async def test_strangers_who_stop_in_the_middle(server, pair):
    """At every stage: nothing said, half a TLS handshake, half a header, half a login; all at once, then all gone."""
    clients = []
    for number in range(40):
        client = await (server.connected() if number % 2 else server.encrypted())
        if number % 2:
            client.send_raw([b"", b"\x16\x03\x01", header()[:30].encode(), header().encode()][number // 2 % 4])
        else:
            client.send_raw([header()[:30], header(), header() + "<auth ", header() + "<iq type='"][number // 2 % 4])
        clients.append(client)
    await pair.goes_on()
    for client in clients:
        await client.close()
    await pair.goes_on()


# -- a disk that is full from the start (test_database_trouble.py has those that become so)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 6 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("NOT TESTED: a full disk takes root (mount)")
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m,mode=0700", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if made.returncode != 0:
        pytest.skip(f"NOT TESTED: a full disk; no file system can be mounted here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder):
    """Use up what is left; the file that does."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return filler


async def test_a_start_on_a_full_disk_says_so(fresh, small_disk):
    scene = fresh(start=False)
    scene.node.configure({**scene.node.options, "data_dir": str(small_disk / "var")})
    scene.node.data_dir = small_disk / "var"
    filler = fill(small_disk)

    with pytest.raises(NotServing, match=r"exit code 1\b[\s\S]*No space left on device"):
        scene.node.start()
    assert "Traceback" not in scene.node.log

    filler.unlink()
    scene.node.start()
    assert scene.node.stop() == 0
