"""When a node's engine runs, and what it does about its row: over a database and links that do as they are told."""

import asyncio
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from xmppd.cluster import cluster as life
from xmppd.cluster.cluster import Cluster, Myself
from xmppd.cluster.membership import Copy, Membership
from xmppd.errors import StorageUnavailable, XmppdError
from xmppd.hooks import Hooks
from xmppd.storage.members import DatabaseIdentity, Pulse

ME = b"1" * 16
IDENTITY = DatabaseIdentity(b"c" * 16, b"d" * 16)


class Folder:
    def __init__(self, state: str) -> None:
        self.text = Copy(IDENTITY.cluster, IDENTITY.database, state).text()

    def read_members(self) -> str:
        return self.text

    def write_members(self, text: str) -> None:
        self.text = text


class Store:
    def __init__(self) -> None:
        self.pulse = Pulse(True, "single", 1, None)
        self.away = False
        self.renewed = 0
        self.looked = 0

    async def identity(self) -> DatabaseIdentity:
        return IDENTITY

    async def all(self) -> list[Any]:
        row = {"address": "127.0.0.1:1", "left_by": "xmppd@node02", "left_at": 0.0, "left_why": "asked to"}
        return [SimpleNamespace(node=ME, name="xmppd@node01", state=self.pulse.state, running=True, **row)]

    async def look(self, node: bytes, instance: bytes) -> Pulse:
        self.looked += 1
        if self.away:
            raise StorageUnavailable("away")
        return self.pulse

    async def renew(self, node: bytes, instance: bytes, *, lease: float) -> Pulse:
        self.renewed += 1
        return await self.look(node, instance)

    async def release(self, node: bytes, instance: bytes) -> None:
        self.pulse = Pulse(False, self.pulse.state, 1, None)


class Engine:
    def __init__(self) -> None:
        self.runs = False
        self.starts = 0
        self.trouble = ""

    async def start(self, routes: list[str]) -> None:
        self.starts += 1
        if self.trouble:
            raise XmppdError(self.trouble)
        self.runs = True

    async def stop(self) -> None:
        self.runs = False

    async def nothing(self, *_: Any) -> None: ...

    set_cluster = serve = set_routes = nothing


class Node:
    """One node's life; what it calls is counted."""

    def __init__(self, state: str) -> None:
        self.store, self.engine = Store(), Engine()
        self.store.pulse = Pulse(True, state, 1, None)
        self.called: list[str] = []

        def note(name: str) -> Callable[..., None]:
            return lambda *_: self.called.append(name)

        async def claim() -> None:
            self.called.append("claim")
            self.store.pulse = Pulse(True, state, 1, None)

        nothing: Callable[..., None] = lambda *_: None  # noqa: E731
        links = SimpleNamespace(
            on_up=nothing, on_down=nothing, attach=nothing, detach=nothing, set_members=nothing, stop=nothing, queued=0,
            farewells=0,
            peers={},
        )  # fmt: skip
        self.cluster = Cluster(
            Myself(ME, "xmppd@node01", "127.0.0.1:1", b"i" * 16, "1.0", 1, ("localhost",), False, b"m" * 16),
            Membership(ME, Folder(state)),
            self.store,
            engine=self.engine,  # type: ignore[arg-type]
            links=links,  # type: ignore[arg-type]
            calls=SimpleNamespace(on_call=nothing, on_cast=nothing, cast=nothing),  # type: ignore[arg-type]
            replica=SimpleNamespace(start=nothing, stop=nothing, on_synced=[], on_exchanged=[]),  # type: ignore[arg-type]
            hooks=Hooks(),
            spawn=lambda work, name: asyncio.get_running_loop().create_task(work),
            removed=note("removed"),
            ousted=note("ousted"),
            claim=claim,
        )


@pytest.fixture
async def start(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Callable[..., Any]]:
    monkeypatch.setattr(life, "BEAT", 0.005)
    monkeypatch.setattr(life, "ENGINE_PAUSE", 0.01)
    made: list[Node] = []

    async def begin(state: str) -> Node:
        made.append(Node(state))
        await made[-1].cluster.start()
        return made[-1]

    yield begin
    for node in made:
        await node.cluster.stop()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


async def beats(node: Node, count: int = 5) -> None:
    seen = node.store.looked
    await until(lambda: node.store.looked >= seen + count)


async def test_a_node_alone_runs_no_engine_and_seldom_writes(start):
    node = await start("single")

    await beats(node, 20)

    assert node.engine.starts == 0
    assert 1 <= node.store.renewed <= 6


async def test_a_node_that_is_wanted_opens_its_port_for_a_while(start, monkeypatch):
    monkeypatch.setattr(life, "AWAKE", 0.1)
    node = await start("single")

    node.store.pulse = Pulse(True, "single", 1, 0.0)
    await until(lambda: node.engine.runs)
    node.store.pulse = Pulse(True, "single", 1, 99.0)

    await until(lambda: not node.engine.runs)


async def test_a_wish_of_long_ago_opens_nothing(start):
    node = await start("single")

    node.store.pulse = Pulse(True, "single", 1, life.AWAKE + 1)
    await beats(node)

    assert node.engine.starts == 0


async def test_a_member_runs_its_engine_from_the_start_and_renews_its_lease_at_every_beat(start):
    node = await start("member")
    assert node.engine.runs

    await beats(node)

    assert node.store.renewed >= 4  # of five looks, one was for the members
    assert node.cluster.lease_until > asyncio.get_running_loop().time() + life.LEASE - 1


async def test_an_engine_that_does_not_start_is_tried_again_and_the_node_lives_on(start, monkeypatch, caplog):
    node = Node("member")
    node.engine.trouble = "the port is taken"
    await node.cluster.start()
    await until(lambda: node.engine.starts >= 3)

    node.engine.trouble = ""

    await until(lambda: node.engine.runs)
    await node.cluster.stop()


async def test_a_lease_that_cannot_be_renewed_is_not_claimed_to_be_held(start, caplog):
    caplog.set_level("INFO", "xmppd")
    node = await start("member")
    await beats(node)
    node.store.away = True
    await beats(node)
    held = node.cluster.lease_until

    await beats(node)

    assert node.cluster.lease_until == held
    assert node.engine.runs
    assert [record.msg for record in caplog.records].count("members not readable") == 1
    node.store.away = False
    await until(lambda: node.cluster.lease_until > held)
    await until(lambda: "members readable again" in [record.msg for record in caplog.records])


async def test_a_node_whose_id_another_process_has_taken_says_so_once(start):
    node = await start("member")
    await beats(node)

    node.store.pulse = Pulse(False, "member", 1, None)
    await beats(node)

    assert node.called == ["ousted"]


async def test_a_row_that_has_gone_is_written_again(start):
    node = await start("member")
    await beats(node)

    node.store.pulse = Pulse(False, "", 0, None)
    await until(lambda: "claim" in node.called)
    await beats(node)

    assert "ousted" not in node.called


async def test_a_removed_node_is_told_once(start):
    node = await start("member")
    await beats(node)

    node.store.pulse = Pulse(True, "removed", 2, None)
    await until(lambda: bool(node.called))
    await beats(node)

    assert node.called == ["removed"]
    assert Copy.parse(node.cluster.membership._folder.text).state == "removed"
