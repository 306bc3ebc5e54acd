"""Modules loaded, unloaded and reloaded while clients are at work; modules of others; broken ones."""

import asyncio

import pytest

from tests.harness.scene import until
from tests.harness.server import PATIENCE

ROSTER, PRIVATE, LAST = "jabber:iq:roster", "jabber:iq:private", "jabber:iq:last"
DISCO, VERSION, TIME, VCARD = (
    "http://jabber.org/protocol/disco#info",
    "jabber:iq:version",
    "urn:xmpp:time",
    "vcard-temp",
)
QUESTIONS = [
    (f"<query xmlns='{ROSTER}'/>", None),
    (f"<query xmlns='{PRIVATE}'><a xmlns='urn:example:a'/></query>", None),
    (f"<query xmlns='{LAST}'/>", "localhost"),
    (f"<query xmlns='{DISCO}'/>", "localhost"),
    (f"<query xmlns='{VERSION}'/>", "localhost"),
    (f"<time xmlns='{TIME}'/>", "localhost"),
    (f"<vCard xmlns='{VCARD}'/>", None),
    ("<ping xmlns='urn:xmpp:ping'/>", "localhost"),
]
BARD = '''
"""Remembers what was said."""

from dataclasses import dataclass

from sqlalchemy import Column, Integer, insert, select
from sqlalchemy.sql import func

from xmppd.events import StanzaSending
from xmppd.module_api import IqRequest, Module, command, hook, integer, iq, long_text, module_table

said = module_table("bard_said", Column("id", Integer, primary_key=True), Column("text", long_text(), nullable=False))


@dataclass(frozen=True, slots=True)
class Config:
    word: str = "verse"


class Bard(Module[Config]):
    requires = ("ping",)
    features = ("urn:example:bard",)
    tables = (said,)

    async def start(self) -> None:
        self.storage.batcher.define("bard", write)

    async def stop(self) -> None:
        self.storage.batcher.undefine("bard")

    @hook(StanzaSending)
    def listen(self, event: StanzaSending) -> None:
        if event.stanza.kind == "message" and event.stanza.body:
            self.storage.batcher.submit("bard", event.stanza.body)

    @iq("get", "urn:example:bard", "verse", at="host")
    async def recite(self, request: IqRequest) -> bytes:
        return f'<verse xmlns="urn:example:bard">{self.config.word} {await self.verses()}</verse>'.encode()

    @command("bard verses", result=integer("verses"), doc="Count the verses", reads=True)
    async def verses(self) -> int:
        async def count(connection):
            return (await connection.execute(select(func.count()).select_from(said))).scalar_one()

        return await self.storage.read(count)


async def write(connection, items):
    await connection.execute(insert(said), [{"text": item} for item in items])
    return [None] * len(items)
'''


def stats(scene):
    """Rows of `module stats`, without the tasks of the core, which come and go."""
    rows = [line.split("\t") for line in scene.node.quick("module", "stats").splitlines()]
    return {name: tuple(map(int, counts)) for name, *counts in rows if name != "core"} | {
        name: tuple(map(int, counts[:3])) for name, *counts in rows if name == "core"
    }


async def settled(scene, before):
    """It has again what it had before, once the tasks that are under way have ended."""
    try:
        await until(lambda: stats(scene) == before, "what is left behind to go")
    except AssertionError:
        assert stats(scene) == before
        raise


def loaded(scene):
    rows = [line.split("\t") for line in scene.node.quick("module", "list").splitlines()]
    return {name for name, state, _ in rows if state == "loaded"}


@pytest.fixture
async def changing(served):
    """A server for tests that change its modules, and load again what they have unloaded."""
    scene = await served(shutdown_grace=3)
    before = stats(scene)
    yield scene
    await settled(scene, before)


def refused(scene, *argv):
    """The exit code of a command that is refused, and its text."""
    done = scene.ctl("module", *argv)
    assert done.returncode != 0, done
    return done.returncode, done.stdout.removeprefix("Error: ").rstrip()


async def ask(scene, *argv):
    """A command, while the clients go on."""
    return await asyncio.to_thread(scene.node.quick, *argv)


SLEEPER = """
import asyncio
import threading
import time
from dataclasses import dataclass

from xmppd.module_api import Module


@dataclass(frozen=True, slots=True)
class Config:
    pass


class Sleeper(Module[Config]):
    async def start(self) -> None:
        threading.Thread(target=time.sleep, args=(3600,)).start()
        asyncio.get_running_loop().run_in_executor(None, time.sleep, 3600)
        self.deaf = asyncio.create_task(sleep_on())


async def sleep_on() -> None:
    while True:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            pass
"""


def site(tmp_path, **files):
    folder = tmp_path / "site"
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return folder


class Traffic:
    """Two who chat, a third whose presence changes, a fourth who is away; all goes on until `end`."""

    def __init__(self, scene):
        self.scene = scene
        self.sent = self.stored = self.changes = self.answers = 0
        self._going = True

    async def begin(self):
        scene = self.scene
        self.juliet, self.romeo = await scene.raw_login("juliet"), await scene.raw_login("romeo")
        self.nurse = await scene.raw_login("nurse")
        scene.account("tybalt")
        for one, other in (("juliet", "nurse"), ("nurse", "juliet")):
            scene.asked("add_rosteritem", one, "localhost", other, "localhost", other, "", "both")
        await self.nurse.sync()
        self.nurse.forget()
        self.juliet.forget()
        self._tasks = [asyncio.create_task(task) for task in (self._chat(), self._questions(), self._presence())]

    async def _chat(self):
        while self._going:
            self.romeo.send_message("juliet@localhost", f"chat {self.sent}")
            self.sent += 1
            if self.stored < 90:  # below the quota
                self.romeo.send_message("tybalt@localhost", f"away {self.stored}")
                self.stored += 1
            got = await self.juliet.next_message()
            assert got.body == f"chat {self.sent - 1}", got
            await asyncio.sleep(0.02)

    async def _questions(self):
        while self._going:
            for inner, to in QUESTIONS:
                answer = await self.juliet.ask("get", inner, to)
                assert answer.type == "result", answer
                self.answers += 1
                await asyncio.sleep(0.005)

    async def _presence(self):
        while self._going:
            self.nurse.send_presence(inner=f"<status>{self.changes}</status>")
            got = await self.juliet.wait_for(
                lambda got: got.name == "presence" and got.sender == self.nurse.jid, "the nurse's presence"
            )
            assert got.xml.findtext("{jabber:client}status") == str(self.changes), got
            self.changes += 1
            await asyncio.sleep(0.02)

    def check(self):
        for task in self._tasks:
            if task.done():
                task.result()

    async def end(self):
        self._going = False
        await asyncio.wait_for(asyncio.gather(*self._tasks), PATIENCE)
        await self.romeo.expect_nothing()  # no error


@pytest.mark.parametrize("cycles", [20, pytest.param(100, marks=pytest.mark.long)])
async def test_reloads_of_every_module_under_traffic_leave_nothing_behind(fresh, cycles):
    scene = fresh(routing={"presence_coalesce": 0})
    traffic = Traffic(scene)
    await traffic.begin()
    before, memory = stats(scene), []
    names = sorted(loaded(scene))
    assert {"roster", "presence", "offline", "disco", "ping", "last", "private", "vcard"} <= set(names)

    for cycle in range(cycles):
        for name in names:
            assert await ask(scene, "module", "reload", name) == f"Module {name} reloaded"
            traffic.check()
        if cycle in (cycles // 2 - 1, cycles - 1):
            memory.append(scene.node.memory)
    await traffic.end()

    assert min(traffic.sent, traffic.answers, traffic.changes) > cycles
    tybalt = await scene.raw_login("tybalt")
    assert [(await tybalt.next_message()).body for _ in range(traffic.stored)] == [
        f"away {number}" for number in range(traffic.stored)
    ]
    await tybalt.expect_nothing()
    await settled(scene, before)
    assert int(scene.node.quick("stats", "processes")) < 20
    assert memory[1] - memory[0] < 3 * 1024, f"KiB after half of {cycles} cycles and all: {memory}"


async def test_a_module_of_a_site_has_all_that_ours_have(fresh, tmp_path):
    folder = site(tmp_path, bard=BARD)
    scene = fresh(module_paths=[str(folder)], modules={"ping": {}, "disco": {}, "mod_bard": {"word": "line"}})
    romeo, juliet = await scene.raw_login("romeo"), await scene.raw_login("juliet")
    ask_verse = "<verse xmlns='urn:example:bard'/>"

    async def verse():
        return (await romeo.query("get", ask_verse, to="localhost")).payload.text

    async def say(text):
        romeo.send_message("juliet@localhost", text)
        assert (await juliet.next_message()).body == text

    async def verses(count):
        await until(lambda: scene.node.quick("bard", "verses") == str(count), f"verse {count}")

    await say("But soft!")
    await verses(1)
    assert await verse() == "line 1"
    assert scene.asked("bard", "verses") == "1"
    assert f"bard\tloaded\t{folder}" in scene.asked("module", "list").splitlines()
    assert stats(scene)["bard"] == (1, 1, 1, 0)
    info = await romeo.query("get", f"<query xmlns='{DISCO}'/>", to="localhost")
    assert "urn:example:bard" in [feature.get("var") for feature in info.payload]

    site(tmp_path, bard=BARD.replace("{self.config.word}", "{self.config.word} no."))
    assert scene.asked("module", "reload", "bard") == "Module bard reloaded"
    await say("What light through yonder window breaks?")
    await verses(2)
    assert await verse() == "line no. 2"

    assert refused(scene, "unload", "ping") == (14, "the module ping is needed by bard")
    assert scene.asked("module", "unload", "mod_bard") == "Module bard unloaded"
    assert await romeo.refusal("get", ask_verse, to="localhost") == "service-unavailable"
    assert scene.ctl("bard", "verses").returncode == 2
    assert "bard" not in stats(scene)
    await say("It is the east")  # nobody listens

    assert scene.asked("module", "load", "bard") == "Module bard loaded"
    assert await verse() == "line no. 2"
    scene.node.restart()
    romeo = await scene.raw_login("romeo")
    assert await verse() == "line no. 2"


async def test_a_broken_module_is_named_and_harms_nobody(fresh, tmp_path):
    folder = site(
        tmp_path,
        bard=BARD,
        clumsy="import elopement\n",
        empty="",
        faulty=BARD.replace("bard", "faulty").replace(
            "async def start(self) -> None:", "async def start(self) -> None:\n        raise OSError('no poison')"
        ),
        greedy=BARD.replace("bard", "greedy")
        .replace('"urn:example:greedy"', '"urn:xmpp:ping"')
        .replace('"verse"', '"ping"'),
        needy=BARD.replace("bard", "needy").replace('("ping",)', '("elopement",)'),
    )
    scene = fresh(module_paths=[str(folder)], modules={"ping": {}, "bard": {"word": "line"}})
    scene.node.expects_trouble = True  # what is broken is in the log
    romeo, juliet = await scene.raw_login("romeo"), await scene.raw_login("juliet")
    before = stats(scene)

    for argv, code, text in [
        (("load", "elopement"), 13, "there is no module called 'elopement'"),
        (("load", "bart"), 13, "there is no module called 'bart'. Did you mean bard?"),
        (("unload", "elopement"), 13, "there is no module called 'elopement'"),
        (("load", "../ping"), 13, "there is no module called '../ping'"),
        (("load", "ping"), 14, "the module ping is loaded already"),
        (("unload", "vcard"), 14, "the module vcard is not loaded"),
        (("reload", "vcard"), 14, "the module vcard is not loaded"),
        (("load", "needy"), 14, "the module needy needs elopement"),
        (
            ("load", "clumsy"),
            10,
            "modules.clumsy: cannot be imported: ModuleNotFoundError: No module named 'elopement'",
        ),
        (("load", "empty"), 10, "modules.empty: a module has exactly one subclass of Module, this one has 0"),
        (("load", "faulty"), 10, "modules.faulty: cannot be started: OSError: no poison"),
        (
            ("load", "greedy"),
            10,
            "modules.greedy: cannot be started: ValueError: ping already answers get urn:xmpp:ping",
        ),
    ]:
        got_code, said = refused(scene, *argv)
        assert got_code == code, argv
        assert said.startswith(text), said
        assert stats(scene) == before, argv
        romeo.send_message("juliet@localhost", text)
        assert (await juliet.next_message()).body == text
    await romeo.sync()

    for broken, text in [
        ("import elopement\n", "cannot be imported: ModuleNotFoundError"),
        (BARD.replace("word: str", "verb: str"), "unknown option"),
        (BARD.replace("self.storage.batcher.define", "self.storage.batcher.undo"), "cannot be started: AttributeError"),
        (BARD.replace('("ping",)', '("elopement",)'), "the module bard needs elopement"),
    ]:
        site(tmp_path, bard=broken)
        code, said = refused(scene, "reload", "bard")
        assert code in (10, 14)
        assert "bard" in said
        assert text in said
        assert stats(scene) == before, text
        answer = await romeo.query("get", "<verse xmlns='urn:example:bard'/>", to="localhost")
        assert answer.payload.text.startswith("line ")  # the one before goes on

    site(tmp_path, bard=BARD)
    assert scene.asked("module", "reload", "bard") == "Module bard reloaded"
    assert stats(scene) == before


async def test_modules_come_and_go_and_what_needs_them_is_respected(changing):
    scene = changing
    romeo = await scene.raw_login("romeo")

    assert refused(scene, "unload", "roster") == (14, "the module roster is needed by presence")
    for name in ("presence", "roster"):
        assert scene.asked("module", "unload", name) == f"Module {name} unloaded"
    assert await romeo.refusal("get", f"<query xmlns='{ROSTER}'/>") == "service-unavailable"
    assert refused(scene, "load", "presence") == (14, "the module presence needs roster")
    for name in ("roster", "presence"):
        assert scene.asked("module", "load", name) == f"Module {name} loaded"

    await romeo.query("get", f"<query xmlns='{ROSTER}'/>")


async def test_messages_that_wait_are_delivered_when_the_offline_module_is_loaded_again(changing):
    scene = changing
    romeo = await scene.raw_login("romeo")
    scene.account("juliet")
    romeo.send_message("juliet@localhost", "wait for me")
    assert await scene.stored("juliet") == 1
    scene.asked("module", "unload", "offline")
    juliet = await scene.raw_login("juliet")
    await juliet.expect_nothing()

    scene.asked("module", "load", "offline")

    assert (await juliet.next_message()).body == "wait for me"


async def test_an_unloaded_module_is_gone_and_a_loaded_one_is_there(changing):
    scene = changing
    romeo = await scene.raw_login("romeo")
    version = f"<query xmlns='{VERSION}'/>"
    await romeo.query("get", version, to="localhost")
    features = await features_of(romeo)
    assert VERSION in features

    scene.asked("module", "unload", "version")
    assert await romeo.refusal("get", version, to="localhost") == "service-unavailable"
    assert features - await features_of(romeo) == {VERSION}

    scene.asked("module", "load", "version")
    await romeo.query("get", version, to="localhost")
    assert await features_of(romeo) == features


async def features_of(client) -> set[str]:
    answer = await client.query("get", f"<query xmlns='{DISCO}'/>", to="localhost")
    return {child.get("var") for child in answer.payload if child.tag.endswith("feature")}


async def test_without_offline_the_sender_is_told(changing):
    scene = changing
    romeo = await scene.raw_login("romeo")
    scene.account("juliet")
    scene.asked("module", "unload", "offline")
    id = romeo.send_message("juliet@localhost", "anybody?")
    answer = await romeo.next_message()
    assert (answer.id, answer.condition) == (id, "service-unavailable")
    scene.asked("module", "load", "offline")


def test_threads_and_tasks_that_do_not_end_keep_no_node_from_stopping(fresh, tmp_path):
    scene = fresh(module_paths=[str(site(tmp_path, sleeper=SLEEPER))], modules={"sleeper": {}})

    assert scene.node.stop() == 0
    assert "stopped node=" in scene.node.log.splitlines()[-1]
