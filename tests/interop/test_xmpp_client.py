"""@xmpp/client, the usual XMPP library of JavaScript, against our server: real TLS, certificates checked."""

import asyncio
import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.harness.inbox import PATIENCE
from tests.harness.scene import PASSWORD

FOLDER = Path(__file__).parent / "node"
ROSTER = "jabber:iq:roster"

pytestmark = [
    pytest.mark.node,
    pytest.mark.skipif(shutil.which("node") is None, reason="there is no Node.js"),
    pytest.mark.skipif(
        not (FOLDER / "node_modules" / "@xmpp" / "client").is_dir(), reason="@xmpp/client is not installed (npm ci)"
    ),
]


class NodeClient:
    """node/client.mjs and what it has told; `first` takes an event out."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._events: list[dict[str, Any]] = []
        self._changed = asyncio.Event()
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            self._events.append(json.loads(line))
            self._changed.set()
        self._events.append({"event": "ended"})
        self._changed.set()

    async def first(self, event: str, **wanted: Any) -> dict[str, Any]:
        async def look() -> dict[str, Any]:
            while True:
                for index, each in enumerate(self._events):
                    if each["event"] == event and wanted.items() <= each.items():
                        return self._events.pop(index)
                    assert each["event"] != "ended", self._events
                self._changed.clear()
                await self._changed.wait()

        try:
            return await asyncio.wait_for(look(), PATIENCE)
        except TimeoutError:
            raise AssertionError(f"no {event} {wanted}; there is {self._events}") from None

    def tell(self, do: str, **more: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **more}).encode() + b"\n")

    async def do(self, do: str, **more: Any) -> None:
        """The library's promise has been kept."""
        self.tell(do, **more)
        await self.first("done", what=do)

    async def start(self) -> str:
        self.tell("start")
        return (await self.first("online"))["jid"]

    async def stanza(self, name: str, **attributes: str) -> list[Any]:
        """The next stanza of that name with these attributes: [name, attributes, *children]."""

        def fits(each: dict[str, Any]) -> bool:
            return each["stanza"][0] == name and attributes.items() <= each["stanza"][1].items()

        while True:
            found = next((e for e in self._events if e["event"] == "stanza" and fits(e)), None)
            if found is not None:
                self._events.remove(found)
                return found["stanza"]
            event = await self._next()
            assert event["event"] != "ended", self._events

    async def _next(self) -> dict[str, Any]:
        self._changed.clear()
        try:
            await asyncio.wait_for(self._changed.wait(), PATIENCE)
        except TimeoutError:
            raise AssertionError(f"nothing comes; there is {self._events}") from None
        return self._events[-1]

    async def ask(self, type: str, *payload: Any, to: str | None = None) -> list[Any]:
        attributes = {"type": type, **({"to": to} if to else {})}
        self.tell("ask", id=type, stanza=["iq", attributes, *payload])
        return (await self.first("answer", id=type))["stanza"]

    async def end(self) -> None:
        if self._process.returncode is None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                await asyncio.wait_for(self._process.wait(), PATIENCE)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        self._reading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reading


@pytest.fixture
async def node_client(server):
    """`node_client(user, scheme)`: xmpp begins with STARTTLS, xmpps with TLS."""
    clients = []

    async def make(user: str, scheme: str = "xmpp") -> NodeClient:
        server.account(user)
        port = server.node.port if scheme == "xmpp" else server.node.tls_port
        process = await asyncio.create_subprocess_exec(
            "node",
            str(FOLDER / "client.mjs"),
            f"{scheme}://localhost:{port}",
            "localhost",
            user,
            PASSWORD,
            "web",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "NODE_EXTRA_CA_CERTS": str(server.node.certificate())},
        )
        clients.append(NodeClient(process))
        return clients[-1]

    yield make
    for client in clients:
        await client.end()


def text_of(stanza: list[Any], name: str) -> str | None:
    return next((child[2] for child in stanza[2:] if child[0] == name), None)


@pytest.mark.parametrize("scheme", ["xmpp", "xmpps"])
async def test_messages_pass_in_both_directions(server, node_client, scheme):
    romeo = await server.login("romeo", "orchard")
    juliet = await node_client("juliet", scheme)
    assert await juliet.start() == "juliet@localhost/web"
    await juliet.do("send", stanza=["presence", {}])

    await juliet.do("send", stanza=["message", {"to": romeo.jid, "type": "chat", "id": "j1"}, ["body", {}, "O Romeo…"]])
    heard = await romeo.next_message()
    assert (heard.sender, heard.id, heard.body) == ("juliet@localhost/web", "j1", "O Romeo…")
    romeo.send_message("juliet@localhost", "I take thee at thy word & <more>")

    answer = await juliet.stanza("message")
    assert answer[1]["from"] == romeo.jid
    assert text_of(answer, "body") == "I take thee at thy word & <more>"
    await juliet.do("stop")


async def test_a_wrong_password_is_refused(server, node_client, monkeypatch):
    juliet = await node_client("juliet")
    server.asked("change_password", "juliet", "localhost", "another")

    juliet.tell("start")

    assert (await juliet.first("failed", what="start"))["condition"] == "not-authorized"


async def test_the_roster_and_a_subscription(server, node_client):
    romeo = await server.login("romeo", "orchard")
    juliet = await node_client("juliet")
    await juliet.start()
    assert (await juliet.ask("get", ["query", {"xmlns": ROSTER}]))[2][2:] == []
    item = ["item", {"jid": "romeo@localhost", "name": "Romeo"}, ["group", {}, "Lovers"]]

    assert (await juliet.ask("set", ["query", {"xmlns": ROSTER}, item]))[1]["type"] == "result"
    pushed = (await juliet.stanza("iq", type="set"))[2][2]
    assert pushed[1] | {"subscription": "none", "name": "Romeo"} == pushed[1]
    assert pushed[2] == ["group", {}, "Lovers"]

    await juliet.do("send", stanza=["presence", {}])
    await juliet.do("send", stanza=["presence", {"to": "romeo@localhost", "type": "subscribe"}])
    assert (await juliet.stanza("iq", type="set"))[2][2][1]["ask"] == "subscribe"
    request = await romeo.wait_for(lambda got: got.type == "subscribe", "the request")
    assert request.sender == "juliet@localhost"
    romeo.send_presence("juliet@localhost", type="subscribed")

    await juliet.stanza("presence", type="subscribed")
    assert (await juliet.stanza("iq", type="set"))[2][2][1]["subscription"] == "to"
    assert (await juliet.stanza("presence", **{"from": romeo.jid}))[1].get("type") is None
    roster = (await juliet.ask("get", ["query", {"xmlns": ROSTER}]))[2][2:]
    assert [each[1]["jid"] for each in roster] == ["romeo@localhost"]


async def test_offline_messages_come_in_order_at_the_next_login(server, node_client):
    romeo = await server.login("romeo", "orchard")
    juliet = await node_client("juliet")
    await juliet.start()
    await juliet.do("send", stanza=["presence", {}])
    await juliet.do("stop")
    for number in range(5):
        romeo.send_message("juliet@localhost", f"night {number}")
    await romeo.sync()
    assert await server.stored("juliet") == 5

    again = await node_client("juliet")
    await again.start()
    await again.do("send", stanza=["presence", {}])

    for number in range(5):
        message = await again.stanza("message")
        assert text_of(message, "body") == f"night {number}"
        assert [child[1]["xmlns"] for child in message[2:] if child[0] == "delay"] == ["urn:xmpp:delay"]


async def test_a_client_that_lost_its_connection_comes_back_by_itself(server, node_client):
    romeo = await server.login("romeo", "orchard")
    juliet = await node_client("juliet", "xmpps")
    await juliet.start()
    await juliet.do("send", stanza=["presence", {}])

    juliet.tell("drop")
    await juliet.first("status", status="disconnect")
    romeo.send_message("juliet@localhost", "art thou gone?")
    assert (await juliet.first("online"))["jid"] == "juliet@localhost/web"
    await juliet.do("send", stanza=["presence", {}])
    romeo.send_message("juliet@localhost", "there thou art")

    assert text_of(await juliet.stanza("message"), "body") == "art thou gone?"
    assert text_of(await juliet.stanza("message"), "body") == "there thou art"
