"""The core's commands against what ejabberdctl 23.01 printed (tests/golden/README.md)."""

import re
from typing import Any

import pytest

from tests.golden import compare
from tests.golden.memory import NODE, VERSION, Node, session
from xmppd.admin.registry import Caller, UsageError
from xmppd.errors import CommandError
from xmppd.log import get_level, set_level
from xmppd.session_manager import SessionInfo

OF_MODULES = ("add_rosteritem", "delete_rosteritem", "get_roster", "get_offline_count")
OF_XMPPCTL = ("started", "stopped", "start")
FILES = [file for file in compare.files() if file["command"] not in OF_MODULES]


@pytest.fixture(autouse=True)
def _loglevel():
    before = get_level()
    yield
    set_level(before)


async def run(node: Node, argv: list[str]) -> tuple[str, int]:
    try:
        spec, args = node.registry.split(argv)
        result = await node.registry.call(spec.name, args, caller=Caller("test", "test"))
        return result.text(), result.code
    except UsageError as exc:
        return (f"{exc.help}\n" if exc.help else "") + f"Error: {exc.text}\n", exc.code
    except CommandError as exc:
        return f"Error: {exc.text}\n", exc.code


def online(spec: dict[str, Any]) -> SessionInfo:
    """The session row a client's presence makes."""
    found = {name: re.search(f"<{name}>(.*?)</{name}>", spec["presence"]) for name in ("show", "status", "priority")}
    show, status, priority = (match[1] if match else "" for match in found.values())
    return session(
        spec["user"],
        spec["resource"],
        priority=int(priority or 0) if spec["presence"] else None,
        show=show or "available",
        status_text=status,
    )


async def prepared(given: dict[str, Any]) -> Node:
    node = Node()
    for user, password in given["accounts"].items():
        assert await node.accounts.register("localhost", user, password)
    node.sessions.rows = [online(spec) for spec in given["online"]]
    return node


@pytest.mark.parametrize("file", FILES, ids=lambda file: file["command"])
async def test_every_command_answers_as_ejabberdctl_does(file):
    node = await prepared(file["given"])
    for case in file["cases"]:
        if case["argv"][0] in OF_XMPPCTL or case["code"] == 3:
            continue  # these need no node, or need that there is none: tests/scenarios/test_xmppctl.py
        stdout, code = await run(node, case["argv"])
        compare.check(file["command"], case, stdout, code, node=NODE, version=VERSION)
        if case["argv"][0] in ("stop", "restart"):
            node.server.status = "started"


def test_every_deviation_belongs_to_a_recorded_case():
    recorded = {file["command"]: {case["name"] for case in file["cases"]} for file in compare.files()}
    for command, cases in compare.DEVIATIONS.items():
        assert set(cases) <= recorded[command]
        assert all(len(case["why"]) > 10 for case in cases.values())


def test_a_wrong_answer_is_told_from_a_right_one():
    case = {"name": "x", "argv": ["registered_users", "localhost"], "stdout": "juliet\nromeo\n", "code": 0}
    compare.check("registered_users", case, "romeo\njuliet\n", 0, node=NODE, version=VERSION)
    for stdout, code in (("juliet\n", 0), ("juliet\nromeo\n", 1), ("juliet\nromeo", 0), ("juliet\nparis\n", 0)):
        with pytest.raises(AssertionError):
            compare.check("registered_users", case, stdout, code, node=NODE, version=VERSION)
