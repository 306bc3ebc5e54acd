"""Who may import whom. The table is the architecture: a lower room that needs a higher one names a Protocol instead."""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]

# From the bottom to the top: a room may use its own row and every row before it.
LAYERS = (
    {"errors", "protocol"},
    {"children", "events", "hooks", "config", "log", "log_limits", "metrics", "notify"},
    {"storage", "cluster", "identity", "sender"},
    {"spool", "chores", "delivery", "outbox", "login_limits", "auth", "access", "shaper"},
    {
        "iq",
        "housekeeping",
        "piefxis",
        "router",
        "local_router",
        "session_manager",
        "succession",
        "s2s_manager",
        "forward",
        "nodes",
        "removals",
    },
    {"admin", "module_api", "module_loader"},
    {"c2s", "s2s", "http"},
    {
        "server",
        "allocator",
        "clustering",
        "commanding",
        "serving",
        "signals",
        "accountant",
        "reload",
        "check",
        "spool_watch",
        "migration",
    },
    {"__main__"},
)
# Rooms of one row that must not see each other, (user, used). http may use c2s: WebSocket and BOSH carry c2s sessions.
STRANGERS = {
    ("errors", "protocol"),
    ("storage", "cluster"),
    ("cluster", "storage"),
    ("c2s", "s2s"),
    ("c2s", "http"),
    ("s2s", "c2s"),
    ("s2s", "http"),
}
APART = {"ctl", "__init__"}  # ctl has a rule of its own below; xmppd/__init__.py belongs to nobody
PURE_LIBRARIES = {"lxml", "scramp"}
IO_LIBRARIES = {
    "asyncio",
    "socket",
    "socketserver",
    "selectors",
    "subprocess",
    "threading",
    "multiprocessing",
    "sqlite3",
}
CTL_MAY_USE = {"errors", "ctl"}
MODULES_MAY_USE = {"module_api", "events", "protocol", "errors"}


class Import(NamedTuple):
    file: Path
    line: int
    name: str  # dotted and absolute, down to the imported name: "xmppd.protocol.jid.JID"
    level: int = 0  # dots in front of a relative import

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line} imports {self.name}"


def imports_in(source: str, file: Path) -> Iterator[Import]:
    """Every import of a file, also inside functions and under TYPE_CHECKING; relative ones made absolute."""
    package = file.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(source, str(file))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = (*base, node.module) if node.module else base
            for alias in node.names:
                yield Import(file, node.lineno, ".".join((*module, alias.name)), node.level)


@cache
def imports_of(file: Path) -> list[Import]:
    return list(imports_in(file.read_text(), file))


def python_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


SERVER_FILES = python_files("xmppd")
MODULE_FILES = python_files("modules")
PURE_FILES = [*python_files("xmppd/protocol"), ROOT / "xmppd" / "errors.py"]
each_server_file = pytest.mark.parametrize("file", SERVER_FILES, ids=lambda file: str(file.relative_to(ROOT)))
each_module_file = pytest.mark.parametrize("file", MODULE_FILES, ids=lambda file: str(file.relative_to(ROOT)))


def top_of(name: str) -> str:
    return name.split(".")[0]


def room_of(name: str) -> str | None:
    """The room of xmppd a dotted name lives in, or None."""
    parts = name.split(".")
    return parts[1] if parts[0] == "xmppd" and len(parts) > 1 else None


def room_holding(file: Path) -> str:
    return file.relative_to(ROOT / "xmppd").parts[0].removesuffix(".py")


def layer_of(room: str) -> int | None:
    return next((number for number, rooms in enumerate(LAYERS) if room in rooms), None)


def may_use(room: str, used: str) -> bool:
    mine, theirs = layer_of(room), layer_of(used)
    if mine is None or theirs is None:
        return False
    return room == used or ((room, used) not in STRANGERS and theirs <= mine)


def is_a_room(name: str) -> bool:
    return (ROOT / "xmppd" / name).is_dir() or (ROOT / "xmppd" / f"{name}.py").is_file()


def test_every_room_of_the_server_stands_in_the_table():
    unknown = {room_holding(file) for file in SERVER_FILES} - set().union(*LAYERS) - APART

    assert not unknown, f"give them a row: {sorted(unknown)}"


@each_server_file
def test_a_room_uses_only_its_row_and_the_rows_below(file):
    room = room_holding(file)
    if room in APART:
        return

    used = [(found, room_of(found.name)) for found in imports_of(file)]
    wrong = [str(found) for found, theirs in used if theirs and is_a_room(theirs) and not may_use(room, theirs)]

    assert not wrong


@each_server_file
def test_the_server_knows_no_plug_in_by_name(file):
    wrong = [str(found) for found in imports_of(file) if top_of(found.name) == "modules"]

    assert not wrong


@pytest.mark.parametrize(
    "file", [*python_files("xmppd/protocol"), ROOT / "xmppd/errors.py"], ids=lambda file: file.name
)
def test_protocol_opens_no_socket_and_uses_its_two_libraries_only(file):
    allowed = (set(sys.stdlib_module_names) - IO_LIBRARIES) | PURE_LIBRARIES | {"xmppd"}
    if file.name == "jid.py":
        allowed |= {"slixmpp"}  # and of it the JID type alone, see below

    wrong = [str(found) for found in imports_of(file) if top_of(found.name) not in allowed]

    assert not wrong


@pytest.mark.parametrize("file", python_files("xmppd/protocol"), ids=lambda file: file.name)
def test_nothing_in_protocol_awaits(file):
    kinds = (ast.AsyncFunctionDef, ast.Await, ast.AsyncFor, ast.AsyncWith)

    wrong = [node.lineno for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, kinds)]

    assert not wrong


def test_slixmpp_gives_its_jid_type_to_one_file_and_nothing_else():
    every = [found for file in SERVER_FILES + MODULE_FILES for found in imports_of(file)]

    wrong = [
        str(found)
        for found in every
        if top_of(found.name) == "slixmpp"
        and not (found.file == ROOT / "xmppd" / "protocol" / "jid.py" and found.name.startswith("slixmpp.jid"))
    ]

    assert not wrong


@pytest.mark.parametrize("file", python_files("xmppd/ctl"), ids=lambda file: file.name)
def test_xmppctl_needs_the_standard_library_only(file):
    wrong = [
        str(found)
        for found in imports_of(file)
        if top_of(found.name) not in sys.stdlib_module_names and room_of(found.name) not in CTL_MAY_USE
    ]

    assert not wrong


@each_module_file
def test_a_plug_in_sees_its_door_and_its_own_files_only(file):
    folders_deep = len(file.relative_to(ROOT / "modules").parts) - 1

    def is_wrong(found: Import) -> bool:
        if found.level:  # its own files: never out of its own folder
            return found.level > folders_deep
        if top_of(found.name) == "xmppd":
            return room_of(found.name) not in MODULES_MAY_USE
        return top_of(found.name) in {"modules", "slixmpp"}

    wrong = [str(found) for found in imports_of(file) if is_wrong(found)]

    assert not wrong


def test_only_main_imports_the_server():
    users = {found.file for file in SERVER_FILES for found in imports_of(file) if room_of(found.name) == "server"}

    assert users <= {ROOT / "xmppd" / "__main__.py", ROOT / "xmppd" / "server.py"}


@pytest.mark.parametrize(
    ("room", "used", "allowed"),
    [
        ("c2s", "router", True),
        ("router", "c2s", False),
        ("protocol", "errors", True),
        ("protocol", "config", False),
        ("hooks", "events", True),
        ("http", "c2s", True),
        ("c2s", "http", False),
        ("s2s", "c2s", False),
        ("local_router", "session_manager", True),
        ("storage", "router", False),
        ("module_api", "server", False),
        ("c2s", "ctl", False),
        ("server", "c2s", True),
    ],
)
def test_the_table_says_what_it_should(room, used, allowed):
    assert may_use(room, used) is allowed


def test_no_import_hides_from_the_walls():
    source = """
from . import a
from ..router import Router
from .b.c import d
def f():
    import xmppd.server
    from xmppd import c2s
"""

    names = {found.name for found in imports_in(source, ROOT / "xmppd/storage/x.py")}

    assert names == {"xmppd.storage.a", "xmppd.router.Router", "xmppd.storage.b.c.d", "xmppd.server", "xmppd.c2s"}
