"""Commands answer for the cluster, from any node; a node that does not answer is named."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.command_net import CTL, Cluster, Node
from tests.modules.world import HOST
from xmppd.admin import talk
from xmppd.admin.nodes import UNANSWERED
from xmppd.admin.registry import SPREAD, Arg, Call, command
from xmppd.admin.results import List, Rescode, Tuple, integer, string
from xmppd.errors import CommandError
from xmppd.log import get_level, set_level

ONE, TWO, THREE = "xmppd@node01", "xmppd@node02", "xmppd@node03"


@pytest.fixture(autouse=True)
def _loglevel():
    before = get_level()
    yield
    set_level(before)


async def hang(*args: Any, **more: Any) -> None:
    await asyncio.Event().wait()


def deaf(node: Node) -> None:
    """The node takes calls and answers none, as one whose process hangs."""
    for name in ("talk.begin", "talk.more"):
        node.calls.off(name)
        node.calls.on_call(name, hang)


@pytest.fixture
def hurried(monkeypatch):
    monkeypatch.setattr(talk, "ANSWERS_WITHIN", 0.2)
    monkeypatch.setattr(talk, "POLL", 0.05)


async def test_the_sessions_of_all_nodes_are_listed_by_any(cluster: Cluster) -> None:
    one, two = await cluster.add(ONE, TWO)
    await two.online("juliet", "phone", 3)
    await one.online("romeo", "orchard")
    await one.online("juliet", "balcony")

    rows = [(await node.run("connected_users_info")).text().splitlines() for node in (one, two)]

    assert rows[0] == rows[1]
    found = [row.split("\t") for row in rows[0]]
    assert [(row[0], row[5]) for row in found] == [
        (f"juliet@{HOST}/balcony", ONE),
        (f"juliet@{HOST}/phone", TWO),
        (f"romeo@{HOST}/orchard", ONE),
    ]
    assert found[1][4] == "3"
    assert (await two.run("connected_users_info", local=True)).text().splitlines() == [rows[0][1]]
    assert (await one.run("connected_users")).text().split() == [row[0] for row in found]
    assert json.loads((await one.run("connected_users_info")).json())[1]["node"] == TWO


async def test_only_the_nodes_that_hold_a_user_are_asked_about_it(cluster: Cluster) -> None:
    one, two, three = await cluster.add(ONE, TWO, THREE)
    await two.online("juliet", "phone")
    await one.online("juliet", "balcony")
    await cluster.settle()
    deaf(three)

    for node in (one, two):
        assert (await node.run("user_resources", "Juliet", HOST)).text() == "balcony\nphone\n"
    info = (await three.run("user_sessions_info", "juliet", HOST)).text().splitlines()
    assert [row.split("\t")[4] for row in info] == [ONE, TWO]
    assert (await one.run("user_resources", "nobody", HOST)).text() == ""
    assert (await one.run("user_resources", "a b", HOST)).text() == ""


async def test_where_names_node_connection_and_time(cluster: Cluster) -> None:
    one, two = await cluster.add(ONE, TWO)
    await two.online("juliet", "phone")
    await one.online("juliet", "balcony")
    await cluster.settle()

    both = [row.split("\t") for row in (await one.run("where", f"JULIET@{HOST}")).text().splitlines()]
    phone = (await one.run("where", f"juliet@{HOST}/phone")).text()

    assert [row[:5] for row in both] == [
        [f"juliet@{HOST}/balcony", ONE, "c2s", "192.0.2.7", "5222"],
        [f"juliet@{HOST}/phone", TWO, "c2s", "192.0.2.7", "5222"],
    ]
    assert all(row[5].endswith("Z") and row[5].startswith("20") for row in both)
    assert phone.split("\t")[1] == TWO
    assert (await one.run("where", f"juliet@{HOST}/attic")).text() == ""
    for wrong in (HOST, "a b@c", ""):
        with pytest.raises(CommandError, match="JID"):
            await one.run("where", wrong)


async def test_a_session_is_kicked_wherever_it_is(cluster: Cluster) -> None:
    one, two = await cluster.add(ONE, TWO)
    phone, balcony = await two.online("juliet", "phone"), await one.online("juliet", "balcony")
    orchard = await two.online("romeo", "orchard")
    await cluster.settle()

    await one.run("kick_session", "juliet", HOST, "phone", "Go")
    assert phone.ended is not None
    assert phone.ended.text == "Go"
    assert balcony.ended is None

    assert (await one.run("kick_user", "romeo", HOST)).text() == "1\n"
    assert orchard.ended is not None

    assert (await two.run("kick_user", "juliet", HOST)).text() == "1\n"
    assert balcony.ended is not None
    assert (await two.run("kick_user", "nobody", HOST)).text() == "0\n"


async def test_a_node_that_does_not_answer_is_named(cluster: Cluster, hurried: None) -> None:
    one, two, three = await cluster.add(ONE, TWO, THREE)
    await one.online("juliet", "balcony")
    await three.online("romeo", "orchard")
    deaf(two)

    result = await one.run("connected_users")

    assert result.text().split() == [f"juliet@{HOST}/balcony", f"romeo@{HOST}/orchard"]
    assert result.code == UNANSWERED
    (note,) = result.notes
    assert note.startswith(f"{TWO}: did not answer")
    frames = await one.frames({"argv": ["connected_users"]})
    assert frames[-1]["code"] == UNANSWERED
    assert TWO in frames[-1]["err"]


async def test_a_node_that_goes_down_while_it_is_asked_is_named(cluster: Cluster) -> None:
    one, two = await cluster.add(ONE, TWO)
    deaf(two)

    asking = asyncio.ensure_future(one.run("connected_users"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    cluster.net.kill(TWO)

    result = await asking
    assert result.code == UNANSWERED
    assert result.notes[0].startswith(f"{TWO}: did not answer")
    assert (await one.run("connected_users")).code == 0


async def test_what_several_nodes_do_is_done_by_all_and_told_by_node_where_it_differs(cluster: Cluster) -> None:
    one, two = await cluster.add(ONE, TWO)

    assert (await one.run("module", "load", "offline")).text() == "Module offline loaded\n"
    assert "offline" in one.modules.loaded
    assert "offline" in two.modules.loaded

    del two.modules.loaded["offline"]
    assert (await one.run("module", "list")).text() == (
        f"offline\tloaded; unknown on {TWO}\txmppd\nping\tloaded\txmppd\n"
    )
    again = await one.run("module", "load", "offline")
    assert again.text() == "Module offline loaded\n"
    assert again.notes == (f"{ONE}: the module offline is loaded already",)
    assert again.code == 14
    with pytest.raises(CommandError, match=r"^the module offline is loaded already$"):
        await two.run("module", "load", "offline")
    assert (await one.run("module", "unload", "offline", local=True)).text() == "Module offline unloaded\n"
    assert "offline" in two.modules.loaded

    two.part.report = ["applied: loglevel"]
    assert (await one.run("reload_config")).text() == f"{ONE}: nothing to do\n{TWO}: applied: loglevel\n"
    assert (one.part.asked, two.part.asked) == (["reload"], ["reload"])
    assert dict(row[:3:2] for row in (await one.run("module", "stats")).value) == {"ping": 4, "offline": 2}
    assert (await one.run("set_loglevel", "warning")).code == 0
    assert (await two.run("get_loglevel")).text() == "warning\n"


async def test_numbers_are_the_clusters_or_the_nodes(cluster: Cluster) -> None:
    one, two = await cluster.add(ONE, TWO)
    await one.account("juliet")
    await two.online("juliet", "phone")
    await one.online("romeo", "orchard")
    await one.online("juliet", "balcony")
    await cluster.settle()

    async def number(*argv: str, local: bool = False) -> int:
        return int((await two.run(*argv, local=local)).text())

    assert await number("connected_users_number") == 3
    assert await number("connected_users_number", local=True) == 1
    assert await number("stats", "onlineusers") == 3
    assert await number("stats", "onlineusers", local=True) == 1
    assert await number("stats", "onlineusersnode") == 1
    assert await number("stats", "registeredusers") == 1
    assert await number("stats_host", "onlineusers", HOST) == 3
    assert await number("stats_host", "onlineusers", HOST, local=True) == 1


# -- another node is told to do it


async def test_a_request_for_another_node_is_carried_out_there(cluster: Cluster) -> None:
    one, two = await cluster.add(ONE, TWO)

    (*_, last) = frames = await one.frames({"argv": ["status"], "node": TWO})
    assert frames[0]["out"].startswith(f"The node {TWO} is started")
    assert last["code"] == 0

    await one.frames({"argv": ["stop"], "node": TWO})
    assert (one.part.asked, two.part.asked) == ([], ["stop"])
    asked = {"command": "connected_users_number", "args": {}, "json": True, "node": TWO}
    assert "".join(frame["out"] for frame in await one.frames(asked)) == "0\n"


async def test_a_refusal_of_another_node_comes_back_with_its_code_and_help(cluster: Cluster) -> None:
    one, _ = await cluster.add(ONE, TWO)

    (frame,) = await one.frames({"argv": ["module", "load", "elopement"], "node": TWO})
    assert (frame["code"], frame["out"][:6]) == (13, "Error:")
    (frame,) = await one.frames({"argv": ["register"], "node": TWO})
    assert frame["code"] == 2
    assert "Command Name: register" in frame["out"]
    (frame,) = await one.frames({"argv": ["module", "load", "elopement"], "node": TWO, "json": True})
    assert json.loads(frame["out"])["code"] == 13


async def test_a_password_for_another_node_is_asked_for_here(cluster: Cluster) -> None:
    one, two = await cluster.add(ONE, TWO)

    frames = await one.frames({"argv": ["register", "juliet", HOST, "-"], "node": TWO}, secret="rose")

    assert [frame.get("code") for frame in frames] == [None, 0]
    assert two.accountant.passwords == {"juliet": "rose"}
    frames = await one.frames({"argv": ["register", "romeo", HOST, "-"], "node": TWO}, secret=None)
    assert frames[-1]["code"] == 2
    assert "romeo" not in two.accountant.passwords


async def test_a_node_that_dies_while_it_carries_a_request_out_is_told(cluster: Cluster) -> None:
    one, two = await cluster.add(ONE, TWO)
    deaf(two)

    asking = asyncio.ensure_future(one.frames({"argv": ["status"], "node": TWO}))
    await asyncio.sleep(0)
    cluster.net.kill(TWO)

    (frame,) = await asking
    assert frame["code"] == 3
    assert frame["out"].startswith(f"Error: Failed RPC connection to the node {TWO}:")


# -- long answers and long work


class Long:
    def __init__(self, node: str) -> None:
        self.node = node
        self.walked = 0
        self.release = asyncio.Event()

    @command(
        "count_up",
        args=(Arg("rows", "integer"),),
        result=List("rows", Tuple("row", (integer("number"), string("text")))),
        doc="Count",
        reads=True,
        scope="gather",
        merge=lambda answers: [row for rows in answers.values() for row in rows],
    )
    def count_up(self, rows: int, call: Call) -> Any:
        assert call.local

        def made() -> Any:
            for number in range(rows):
                self.walked += 1
                yield number, f'{self.node} ú\N{WHITE SMILING FACE}\n"\\' + "x" * (number % 500)

        return made()

    @command("toil", result=Rescode(), doc="Work until told to end", scope="everywhere", timeout=0.3)
    async def toil(self) -> None:
        await self.release.wait()

    @command(
        "huge", result=string("text"), doc="One long text", scope="gather", merge=lambda answers: max(answers.values())
    )
    def huge(self) -> str:
        return "\N{WHITE SMILING FACE}" * 300_000

    @command("report", result=Rescode(), doc="Tell how far it is", scope="node")
    async def report(self, call: Call) -> None:
        await call.progress("half")
        await self.release.wait()


@pytest.fixture
async def long(cluster: Cluster) -> AsyncIterator[list[Long]]:
    nodes = await cluster.add(ONE, TWO)
    made = [Long(node.name) for node in nodes]
    for node, source in zip(nodes, made, strict=True):
        node.registry.register("long", [source.count_up, source.toil, source.huge, source.report])
    yield made
    for source in made:
        source.release.set()


async def test_a_long_list_comes_whole_and_in_pieces(cluster: Cluster, long: list[Long]) -> None:
    one, two = cluster.nodes

    rows = list((await one.run("count_up", "3000")).value)

    assert len(rows) == 6000
    assert list(map(tuple, rows[3000:])) == list(long[1].count_up(3000, Call(CTL, local=True)))
    texts = "".join([frame["out"] for frame in await two.frames({"argv": ["count_up", "3000"], "node": ONE})])
    assert len(texts.splitlines()) == 6000
    assert len((await one.run("huge")).value) == 300_000


async def test_a_list_is_not_walked_ahead_of_who_reads_it(cluster: Cluster, long: list[Long]) -> None:
    one, _ = cluster.nodes
    asked = {"command": "count_up", "args": {"rows": 1_000_000}}
    lines = talk.listen(one.calls, cluster.net.node(TWO), asked, CTL, rows=True)

    for _ in range(10):
        await anext(lines)
    await asyncio.sleep(0.05)

    assert 10 < long[1].walked < 10_000
    await lines.aclose()
    await cluster.net.until(lambda: not cluster.nodes[1].speaker.talks)
    walked = long[1].walked
    await asyncio.sleep(0.02)
    assert long[1].walked == walked


async def test_long_work_is_waited_for_only_so_long_and_goes_on(
    cluster: Cluster, long: list[Long], hurried: None
) -> None:
    one, _ = cluster.nodes
    long[0].release.set()

    result = await one.run("toil")

    assert (result.code, result.notes) == (UNANSWERED, (f"{TWO}: did not answer: not done within 0.3 s",))
    long[1].release.set()
    assert (await one.run("toil")).code == 0


async def test_progress_of_another_node_is_seen_while_it_works(
    cluster: Cluster, long: list[Long], hurried: None
) -> None:
    one, _ = cluster.nodes
    said: list[Any] = []
    alive = asyncio.Event()

    async def send(frame: Any) -> None:
        said.append(frame)
        if said[-1] == {"out": ""}:
            alive.set()

    asking = asyncio.ensure_future(one.nodes.relay(TWO, {"argv": ["report"]}, CTL, send, hang))
    await asyncio.wait_for(alive.wait(), 5)
    long[1].release.set()
    await asking

    assert said[0] == {"progress": "half"}
    assert said[-1]["code"] == 0


async def test_a_talk_nobody_goes_on_with_is_given_up(cluster: Cluster, long: list[Long], monkeypatch) -> None:
    one, two = cluster.nodes
    monkeypatch.setattr(talk, "ABANDONED", 0.05)
    begin = {"request": {"command": "count_up", "args": {"rows": 100_000}}, "caller": "", "rows": True}

    piece = await one.calls.call(cluster.net.node(TWO), "talk.begin", begin)
    assert not piece["end"]
    await cluster.net.until(lambda: not two.speaker.talks)

    with pytest.raises(Exception, match="given up"):
        await one.calls.call(cluster.net.node(TWO), "talk.more", {"id": piece["id"]})


# -- every command


def test_every_command_has_a_scope_of_its_own_choice() -> None:
    import ast

    root = Path(__file__).parents[2]
    undecided = []
    for file in [*(root / "xmppd").rglob("*.py"), *(root / "modules").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            for one in getattr(node, "decorator_list", []):
                if isinstance(one, ast.Call) and getattr(one.func, "id", "") == "command":
                    name = ast.literal_eval(one.args[0])
                    if not any(keyword.arg == "scope" for keyword in one.keywords):
                        undecided.append(f"{file.relative_to(root)}: {name}")

    assert not undecided


# A call of each spread command: its arguments, and what both nodes are to have said in the end.
ARGUMENTS = {
    "user_resources": ("juliet", HOST),
    "user_sessions_info": ("juliet", HOST),
    "kick_user": ("juliet", HOST),
    "kick_session": ("juliet", HOST, "phone", "Go"),
    "where": (f"juliet@{HOST}",),
    "set_loglevel": ("info",),
    "module load": ("offline",),
    "module unload": ("ping",),
    "module reload": ("ping",),
}


async def test_every_command_of_several_nodes_reaches_the_other_node(cluster: Cluster) -> None:
    one, two = await cluster.add(ONE, TWO)
    spread = [spec for spec in one.registry.commands() if spec.scope in SPREAD]
    assert len(spread) > 10
    for spec in spread:
        await two.online("juliet", "phone")
        await cluster.settle()
        reached: list[str] = []

        async def spy(name: str, *args: Any, reached: list[str] = reached, **more: Any) -> Any:
            reached.append(name)
            return await type(two.registry).call(two.registry, name, *args, **more)

        two.registry.call = spy  # type: ignore[method-assign]
        result = await one.run(*spec.name.split(), *ARGUMENTS.get(spec.name, ()))
        assert result.code == 0, (spec.name, result.notes)
        result.text(), result.json()
        assert reached == [spec.name]
