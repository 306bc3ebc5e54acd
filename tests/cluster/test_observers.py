"""Observers: what they may see and do, over a real nats-server, also by docs/examples/observer.js."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import nats
import nats.errors
import pytest

from tests.cluster.command_net import Cluster, Node
from tests.cluster.nats_nodes import CLUSTER
from tests.cluster.nats_nodes import Node as Wire
from tests.modules.world import HOST
from xmppd.access import Access, AccessRules
from xmppd.admin.observers import Observers
from xmppd.config import Config, parse
from xmppd.errors import ConfigError
from xmppd.events import SessionBound

NODE = shutil.which("node") or ""
ROOT = Path(__file__).parents[2]
ONE, TWO = "xmppd@node01", "xmppd@node02"
SECRET = "wherefore-art-thou-romeo"
IDS = CLUSTER.hex()


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Served:
    """A node with a nats-server, and observers of three kinds."""

    def __init__(self, node: Node, wire: Wire, folder: Path) -> None:
        self.node, self.wire = node, wire
        self.port = free_port()
        self.secret = folder / "secret"
        self.secret.write_text(f"{SECRET}\nthe rest is a comment\n")
        self.secret.chmod(0o600)
        self.config = self.parsed()
        self.observers = Observers(
            node=node.name,
            version="1.2.3",
            transport=wire.engine,
            registry=node.registry,
            nodes=node.nodes,
            watch=node.watch,
            table=node.table,
            routes=node.routes,
            config=lambda: self.config,
            rules=Access(AccessRules(self.config)),
            spawn=node.spawn,
        )

    def parsed(self, **users: Any) -> Config:
        file = {"secret_file": str(self.secret)}
        users = users or {
            "dashboard": {**file, "may": ["events", "tables", "api"]},
            "ears": {**file, "may": "events"},
            "hands": {**file, "may": "api"},
        }
        permissions = {
            "dashboard": {"from": "observer", "who": {"observer": "dashboard"}, "what": ["send_message", "connected*"]},
            "http": {"who": {"observer": "hands"}, "what": "*"},
        }
        observers = {"listen": f"127.0.0.1:{self.port}", "users": users}
        text = {"cluster": {"observers": observers}, "api_permissions": permissions}
        return parse(text, source="xmppd.yml")

    async def connect(self, name: str, secret: str = SECRET) -> Any:
        errors: list[str] = []

        async def error(exc: Exception) -> None:
            errors.append(str(exc))

        client = await nats.connect(
            f"nats://127.0.0.1:{self.port}",
            user=name,
            password=secret,
            inbox_prefix=f"_INBOX.{name}".encode(),
            error_cb=error,
            allow_reconnect=False,
        )
        client.complaints = errors  # type: ignore[attr-defined]
        return client


async def ask(client: Any, subject: str, question: Any) -> Any:
    inbox = client.new_inbox()
    answers = await client.subscribe(inbox)
    await client.publish(subject, json.dumps(question).encode(), reply=inbox)
    text = b""
    while True:
        message = await answers.next_msg(timeout=5)
        if not message.data:
            break
        text += message.data
    await answers.unsubscribe()
    return json.loads(text)


async def greeting(port: int, name: str, secret: str) -> str:
    """What the server says to somebody of that name: PONG, or an error."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        await reader.readline()
        login = json.dumps({"user": name, "pass": secret, "verbose": False})
        writer.write(f"CONNECT {login}\r\nPING\r\n".encode())
        return (await reader.readline()).decode().strip()
    finally:
        writer.close()
        await writer.wait_closed()


@asynccontextmanager
async def serving(cluster: Cluster, folder: Path, node: Node) -> AsyncIterator[Served]:
    wire = Wire(folder / "wire", listen=f"127.0.0.1:{free_port()}")
    served = Served(node, wire, folder)
    await served.observers.apply(CLUSTER)
    await wire.start()
    try:
        yield served
    finally:
        await served.observers.stop()
        await wire.engine.stop()


@pytest.fixture
async def served(cluster: Cluster, tmp_path: Path) -> AsyncIterator[Served]:
    one, _ = await cluster.add(ONE, TWO)
    async with serving(cluster, tmp_path, one) as served:
        yield served


async def test_an_observer_learns_the_cluster_and_its_tables(cluster: Cluster, served: Served) -> None:
    one, two = cluster.nodes
    await one.online("romeo", "orchard", 5)
    two.login("juliet", "balcony")
    await cluster.settle()
    client = await served.connect("dashboard")

    about = await ask(client, "xmppd.1.about.dashboard", {})
    sessions = await ask(client, f"xmppd.1.{IDS}.tables.dashboard", {"table": "sessions"})
    routes = await ask(client, f"xmppd.1.{IDS}.tables.dashboard", {"table": "routes"})
    none = await ask(client, f"xmppd.1.{IDS}.tables.dashboard", {"table": "sessions", "host": "example.net"})
    wrong = await ask(client, f"xmppd.1.{IDS}.tables.dashboard", {"table": "spool"})

    assert about == {"cluster": IDS, "node": ONE, "version": "1.2.3", "nodes": [ONE, TWO]}
    found = {row["jid"]: (row["node"], row["priority"]) for row in sessions}
    assert found == {f"romeo@{HOST}/orchard": (ONE, 5), f"juliet@{HOST}/balcony": (TWO, None)}
    assert all(abs(row["bound_at"] / 1000 - one.clock()) < 60 for row in sessions)
    assert {"domain": HOST, "node": ONE} in routes
    assert none == []
    assert wrong["code"] == 2
    await client.close()


async def test_a_long_table_comes_whole(cluster: Cluster, served: Served) -> None:
    one, _ = cluster.nodes
    for number in range(3000):
        one.login(f"user{number}", "a-resource-of-some-length")
    client = await served.connect("dashboard")

    sessions = await ask(client, f"xmppd.1.{IDS}.tables.dashboard", {"table": "sessions"})

    assert len({row["jid"] for row in sessions}) == 3000
    await client.close()


async def test_an_observer_hears_events_of_its_nodes(cluster: Cluster, served: Served) -> None:
    one, _ = cluster.nodes
    client = await served.connect("ears")
    events = await client.subscribe(f"xmppd.1.{IDS}.events.>")
    await client.flush()

    session = one.login("romeo", "orchard").session
    session.bound()
    session.close(clean=True)
    cluster.net.kill(TWO)
    found = [await events.next_msg(timeout=5) for _ in range(3)]

    assert [message.subject.rpartition(".")[2] for message in found] == [
        "session_opened",
        "session_closed",
        "node_down",
    ]
    opened, _, down = (json.loads(message.data) for message in found)
    assert (opened["jid"], opened["node"], opened["event"]) == (f"romeo@{HOST}/orchard", ONE, "session_opened")
    assert (down["node"], down["by"]) == (TWO, ONE)
    await client.close()


async def test_commands_are_called_as_over_http_as_far_as_permissions_go(cluster: Cluster, served: Served) -> None:
    one, two = cluster.nodes
    juliet = await two.online("juliet", "balcony")
    await cluster.settle()
    client, hands = await served.connect("dashboard"), await served.connect("hands")
    api = f"xmppd.1.{IDS}.api.dashboard"
    args = {"type": "chat", "from": HOST, "to": f"juliet@{HOST}", "subject": "", "body": "Look to the east"}

    assert await ask(client, api, {"command": "send_message", "args": args}) == 0
    await one.until(lambda: juliet.bodies)
    assert juliet.bodies == ["Look to the east"]
    assert await ask(client, api, {"command": "connected_users"}) == [f"juliet@{HOST}/balcony"]
    assert await ask(client, api, {"command": "connected_users", "local": True}) == []
    assert await ask(client, api, {"command": "connected_users", "local": True, "node": TWO}) == [
        f"juliet@{HOST}/balcony"
    ]
    for command, code in (("stop", 1), ("kick_user", 1), ("nonsense", 2), (None, 2)):
        assert (await ask(client, api, {"command": command}))["code"] == code
    assert (await ask(client, api, {"command": "send_message", "args": {}}))["code"] == 2
    assert (await ask(client, api, {"command": "connected_users", "node": "x"}))["code"] == 3
    assert (await ask(client, api, [1]))["code"] == 2
    # what is said for http is not said for observers
    assert (await ask(hands, f"xmppd.1.{IDS}.api.hands", {"command": "connected_users"}))["code"] == 1
    assert one.part.asked == []
    await client.close()
    await hands.close()


@pytest.mark.parametrize(
    "subject",
    [
        "xmppd.1.{id}.api.dashboard",  # as somebody else
        "xmppd.1.{id}.tables.ears",
        "xmppd.1.{id}.api.ears",
        "xmppd.1.{id}.to.{id}",  # into a link
        "xmppd.1.{id}.events.node_down",
        "xmppd.1.hello.00",
        "$SYS.REQ.SERVER.PING.VARZ",
        "_INBOX.dashboard.1",
    ],
)
async def test_nats_refuses_what_is_not_an_observers_right_to_say(served: Served, subject: str) -> None:
    client = await served.connect("ears")

    await client.publish(subject.format(id=IDS), b"{}", reply="_INBOX.ears.1")

    await served.node.until(lambda: client.complaints)
    assert "permissions violation" in client.complaints[0].lower()
    await client.close()


@pytest.mark.parametrize("subject", [">", "xmppd.>", "xmppd.1.{id}.to.>", "_INBOX.>", "_INBOX.dashboard.>", "$SYS.>"])
async def test_nats_refuses_what_is_not_an_observers_right_to_hear(served: Served, subject: str) -> None:
    client = await served.connect("hands")

    await client.subscribe(subject.format(id=IDS))

    await served.node.until(lambda: client.complaints)
    assert "permissions violation" in client.complaints[0].lower()
    await client.close()


async def test_an_answer_goes_nowhere_but_to_its_observer(cluster: Cluster, served: Served) -> None:
    client, other = await served.connect("dashboard"), await served.connect("hands")
    inbox = await other.subscribe("_INBOX.hands.x")
    await other.flush()

    for reply in ("_INBOX.hands.x", f"xmppd.1.{IDS}.to.{served.wire.id.hex()}", "_INBOX.dashboardx.1"):
        await client.publish("xmppd.1.about.dashboard", b"{}", reply=reply)
    await ask(client, "xmppd.1.about.dashboard", {})

    with pytest.raises(nats.errors.TimeoutError):
        await inbox.next_msg(timeout=0.2)
    assert served.wire.packets == []
    await client.close()
    await other.close()


async def test_a_wrong_secret_is_refused(served: Served) -> None:
    assert await greeting(served.port, "dashboard", SECRET) == "PONG"
    for name, secret in (("dashboard", "wrong-wrong-wrong"), ("nobody", SECRET), ("xmppd", SECRET), ("dashboard", "")):
        assert "Authorization" in await greeting(served.port, name, secret)


async def test_an_observer_that_is_removed_is_cut_off_at_a_reload(cluster: Cluster, served: Served) -> None:
    one, _ = cluster.nodes
    client = await served.connect("dashboard")
    assert one.hooks.wants(SessionBound)

    served.config = served.parsed(hands={"secret_file": str(served.secret), "may": "api"})
    await served.observers.apply(CLUSTER)

    await one.until(lambda: client.is_closed)
    await client.close()
    assert "Authorization" in await greeting(served.port, "dashboard", SECRET)
    assert not one.hooks.wants(SessionBound)


async def test_a_secret_that_others_can_read_is_refused_before_anything_changes(served: Served) -> None:
    served.secret.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        await served.observers.apply(CLUSTER)
    served.secret.chmod(0o600)
    served.secret.write_text("short\n")
    with pytest.raises(ConfigError, match="16 characters"):
        await served.observers.apply(CLUSTER)
    served.secret.unlink()
    with pytest.raises(ConfigError, match="No such file"):
        await served.observers.apply(CLUSTER)

    client = await served.connect("dashboard")
    assert (await ask(client, "xmppd.1.about.dashboard", {}))["node"] == ONE
    await client.close()


@pytest.mark.parametrize(
    ("observers", "words"),
    [
        ({"listen": "0.0.0.0:4222"}, "certfile"),
        ({"listen": "127.0.0.1:0"}, "port"),
        ({"users": {"a.b": {"secret_file": "x"}}}, "name"),
        ({"users": {"xmppd": {"secret_file": "x"}}}, "other than xmppd"),
        ({"users": {"a": {"secret_file": "x", "may": "everything"}}}, "may"),
    ],
)
def test_what_cannot_be_meant_is_refused(observers: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse({"cluster": {"observers": observers}}, source="xmppd.yml")


@pytest.mark.node
async def test_the_example_lists_sessions_sends_a_message_and_watches(cluster: Cluster, served: Served) -> None:
    one, two = cluster.nodes
    juliet = await two.online("juliet", "balcony")
    await cluster.settle()
    arguments = ("127.0.0.1", str(served.port), "dashboard", str(served.secret))
    script = ROOT / "docs" / "examples" / "observer.js"
    process = await asyncio.create_subprocess_exec(
        NODE, str(script), *arguments, HOST, f"juliet@{HOST}", "Look to the east ú", stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        lines = [(await asyncio.wait_for(process.stdout.readline(), 20)).decode().strip() for _ in range(3)]
        one.login("romeo", "orchard").session.bound()
        event = (await asyncio.wait_for(process.stdout.readline(), 20)).decode()
    finally:
        process.kill()
        await process.wait()

    assert lines == [f"nodes {ONE} {TWO}", f"session juliet@{HOST}/balcony {TWO}", "sent 0"]
    assert juliet.bodies == ["Look to the east ú"]
    assert json.loads(event.removeprefix("event "))["jid"] == f"romeo@{HOST}/orchard"
