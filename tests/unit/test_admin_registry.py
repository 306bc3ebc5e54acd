"""The command registry: declarations, arguments, refusals, crashes, what is logged."""

import json
import logging

import pytest

from tests.golden.memory import Node, session
from xmppd.admin.registry import Arg, Call, Caller, Registry, UsageError, command, commands_of
from xmppd.admin.results import List, Rescode, Restuple, Result, Scalar, Tuple, describe, integer, string
from xmppd.errors import CommandError, StorageUnavailable

CTL = Caller("ctl", "uid=0")


class Orchard:
    def __init__(self) -> None:
        self.called: list[object] = []

    @property
    def tree(self) -> str:
        raise AssertionError("a property was run while commands were looked for")

    @command("climb", args=(Arg("wall"), Arg("times", "integer", optional=True)), result=Rescode(), doc="Climb a wall")
    def climb(self, wall: str, times: int = 1) -> bool:
        self.called.append((wall, times))
        return times < 3

    @command("send", args=(Arg("from"), Arg("to", "list")), result=Restuple(), doc="Send")
    async def send(self, from_: str, to: list[str]) -> str:
        return f"{from_} -> {to}"

    @command("swear", args=(Arg("oath", secret=True),), result=Rescode(), doc="Swear")
    def swear(self, oath: str) -> None:
        raise ZeroDivisionError(f"statement with {oath}")

    @command("pray", result=Rescode(), doc="Pray", reads=True)
    def pray(self) -> None:
        raise StorageUnavailable("the database is away")

    @command("wait long", args=(), result=Restuple(), doc="Wait")
    async def wait(self, call: Call) -> str:
        await call.progress("half")
        return "local" if call.local else "everywhere"


@pytest.fixture
def orchard():
    return Orchard()


@pytest.fixture
def registry(orchard):
    registry = Registry()
    registry.register("orchard", commands_of(orchard))
    return registry


async def test_arguments_arrive_with_their_types_by_position_and_by_name(registry, orchard):
    assert (await registry.call("climb", ["high", "2"], caller=CTL)).code == 0
    assert (await registry.call("climb", {"wall": "low", "times": 3}, caller=CTL)).code == 1
    assert (await registry.call("climb", ["low"], caller=CTL)).code == 0
    assert orchard.called == [("high", 2), ("low", 3), ("low", 1)]
    assert (await registry.call("send", ["r", "a,b"], caller=CTL)).text() == "r -> ['a', 'b']\n"
    assert (await registry.call("send", {"from": "r", "to": []}, caller=CTL)).text() == "r -> []\n"


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        ("climb", [], "requires 1 more argument"),
        ("climb", ["a", "1", "b"], "requires 1 less argument"),
        ("climb", ["a", "one"], "argument 'times': expected a whole number, got 'one'"),
        ("climb", ["a", "1_0"], "expected a whole number"),
        ("climb", ["a", "9" * 5000], "expected a whole number"),
        ("climb", {"wall": "a", "times": True}, "expected a whole number"),
        ("climb", {"wall": 1}, "argument 'wall': expected a text, got 1"),
        ("climb", {"times": 1}, "lacks the argument 'wall'"),
        ("climb", {"wall": "a", "height": 1}, "has no argument 'height'"),
        ("send", {"from": "a", "to": "b", "from_": "c"}, "has no argument 'from_'"),
        ("send", {"from": "a", "to": [1]}, "expected a list of texts"),
        ("climb", ["\udc80"], "argument 'wall': not UTF-8"),
        ("climb", ["a\0b"], "NUL"),
        ("clim", ["a"], "unknown command 'clim'. Did you mean 'climb'?"),
    ],
)
async def test_wrong_usage_is_code_2_and_reaches_no_handler(registry, orchard, name, args, words):
    with pytest.raises(CommandError) as caught:
        await registry.call(name, args, caller=CTL)
    assert words in caught.value.text
    assert caught.value.code == 2
    assert orchard.called == []


async def test_a_secret_of_the_wrong_type_is_not_shown(registry):
    with pytest.raises(UsageError) as caught:
        await registry.call("swear", {"oath": 12345}, caller=CTL)
    assert "12345" not in caught.value.text


async def test_a_crash_is_an_error_with_text_and_its_traceback_is_in_the_log(registry, caplog):
    with pytest.raises(CommandError) as caught:
        await registry.call("swear", ["by the moon"], caller=CTL)
    assert caught.value.code == 1
    assert "swear" in caught.value.text
    assert "by the moon" not in caught.value.text
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert record.exc_info
    assert record.exc_info[0] is ZeroDivisionError
    assert "command=swear" in record.getMessage()
    assert "by the moon" not in record.getMessage()
    assert (await registry.call("climb", ["w"], caller=CTL)).code == 0


async def test_errors_of_the_server_are_shown_with_their_text(registry):
    with pytest.raises(CommandError, match="the database is away") as caught:
        await registry.call("pray", [], caller=CTL)
    assert caught.value.code == 1


async def test_changes_are_logged_with_their_caller_and_without_arguments(registry, caplog):
    caplog.set_level(logging.INFO, logger="xmppd")
    await registry.call("climb", ["w", "5"], caller=CTL)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("command done command=climb via=ctl ")
    assert "code=1" in line
    with pytest.raises(CommandError):
        await registry.call("pray", [], caller=CTL)
    assert len(caplog.records) == 1


async def test_two_words_name_a_command_and_so_does_its_path(registry):
    said = []

    async def progress(text: str) -> None:
        said.append(text)

    spec, rest = registry.split(["wait", "long"])
    assert (spec.name, list(rest)) == ("wait long", [])
    call = Call(CTL, local=True, progress=progress)
    assert (await registry.call("wait_long", [], caller=CTL, call=call)).text() == "local\n"
    assert said == ["half"]
    assert (await registry.call("wait long", [], caller=CTL)).text() == "everywhere\n"
    for argv in (["wait"], ["wait", "short"]):
        with pytest.raises(UsageError, match="wait long"):
            registry.split(argv)


def test_registering_is_all_or_nothing_and_unregistering_leaves_nothing(registry):
    class Other:
        @command("aaa", result=Rescode(), doc="New")
        def aaa(self) -> None: ...

        @command("climb", result=Rescode(), doc="Taken")
        def climb(self) -> None: ...

    before = registry.names()
    with pytest.raises(ValueError, match=r"'climb' of other is already one of orchard"):
        registry.register("other", commands_of(Other()))
    assert registry.names() == before
    registry.unregister("orchard")
    assert registry.names() == []
    registry.register("other", commands_of(Other()))
    assert registry.get("climb").owner == "other"


def test_a_declaration_that_does_not_fit_its_function_is_refused_at_import():
    with pytest.raises(TypeError, match="declares"):

        @command("x", args=(Arg("a"),), result=Rescode(), doc="")
        def other_name(b: str) -> None: ...

    with pytest.raises(TypeError, match="optional"):

        @command("x", args=(Arg("a", optional=True), Arg("b")), result=Rescode(), doc="")
        def wrong_order(b: str, a: str = "") -> None: ...


GROUPS = List("g", Tuple("t", (string("jid"), List("groups", string("group")), integer("n"))))


@pytest.mark.parametrize(
    ("shape", "value", "text", "plain"),
    [
        (Rescode(), None, "", 0),
        (Rescode(), True, "", 0),
        (Rescode(), False, "Error: false\n", 1),
        (Restuple(), "done", "done\n", "done"),
        (Restuple(), "", "", ""),
        (integer("n"), 3, "3\n", 3),
        (Scalar("s"), "info", "info\n", "info"),
        (List("l", string("s")), [], "", []),
        (List("l", string("s")), ["a", "b"], "a\nb\n", ["a", "b"]),
        (Tuple("t", (string("a"), integer("b"))), {"b": 2, "a": "x"}, "x\t2\n", {"a": "x", "b": 2}),
        (GROUPS, [("r@h", ["x", "y"], 1)], "r@h\tx;y\t1\n", [{"jid": "r@h", "groups": ["x", "y"], "n": 1}]),
    ],
)
def test_results_are_printed_as_ejabberdctl_prints_them(shape, value, text, plain):
    result = Result(shape, value)
    assert result.text() == text
    assert json.loads(result.json()) == plain
    assert result.json().count("\n") == 1


@pytest.mark.parametrize("length", [999, 1000, 1001, 2500])
def test_a_long_list_comes_in_pieces_and_whole(length):
    result = Result(List("l", integer("n")), range(length))
    pieces = list(result.chunks())
    assert len(pieces) == -(-length // 1000)
    assert "".join(pieces).split() == [str(n) for n in range(length)]


@pytest.mark.parametrize("evil", ["a\tb", "a\nb", "a\rb", "a\x1b[2Jb", "a\x9b31mb", "a\u2028b"])
def test_what_a_client_wrote_forges_no_row_and_no_column(evil):
    rows = List("l", Tuple("t", (string("a"), string("b"))))
    assert Result(rows, [(evil, "x")]).text().count("\t") == 1
    assert len(Result(rows, [(evil, "x")]).text().splitlines()) == 1
    assert all(c.isprintable() or c in "\t\n" for c in Result(rows, [(evil, "x")]).text())
    assert json.loads(Result(rows, [(evil, "x")]).json())[0]["a"] == evil


def test_the_wrong_number_of_fields_is_our_bug_and_said_so():
    with pytest.raises(TypeError, match="t has 2 fields, the handler returned 1"):
        Result(Tuple("t", (string("a"), string("b"))), ("x",)).text()


def test_shapes_are_described_as_ejabberd_describes_them():
    assert describe(List("sessions", string("jid"))) == "sessions::[ jid::string ]"
    assert describe(Tuple("t", (string("a"), integer("b")))) == "t::{ a::string,\n" + " " * 16 + "b::integer }"


async def test_every_core_command_has_help_and_survives_json():
    node = Node()
    node.sessions.rows = [session("juliet", "balcony")]
    for spec in node.registry.commands():
        text = node.registry.help(spec.name)
        assert f"Command Name: {spec.name}\n" in text
        assert spec.doc
        assert spec.tags
        assert spec.owner == "core"
        assert node.registry.help("_".join(spec.name.split(" "))) == text
    for name in ("connected_users_info", "registered_vhosts", "module list", "get_loglevel", "help", "status"):
        json.loads((await node.registry.call(name, [], caller=CTL)).json())
    for topic in (None, "commands", "tags", "accounts", "module", "regist*"):
        assert "register" in node.registry.help(topic) or "module" in node.registry.help(topic)
