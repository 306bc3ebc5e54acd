"""What can be set, hooked, called or loaded is documented, and the files of the project speak of the project alone."""

import ast
import importlib.util
import re
import subprocess
import tomllib
import types
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest
from pydantic import BaseModel

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


@cache
def document(name: str) -> str:
    file = DOCS / name
    return file.read_text() if file.exists() else ""


def has_heading(text: str, name: str) -> bool:
    return re.search(rf"^#+ .*(?<![\w-]){re.escape(name)}(?![\w-])", text, re.MULTILINE) is not None


def section(text: str, name: str) -> str:
    """What stands under the heading with this name, up to the next one of the same or a higher level."""
    lines = iter(text.splitlines())
    level, found = 0, []
    for line in lines:
        marks = len(line) - len(line.lstrip("#"))
        if not level and marks and has_heading(line, name):
            level = marks
        elif level and 0 < marks <= level:
            break
        elif level:
            found.append(line)
    return "\n".join(found)


def in_code_span(text: str, name: str) -> bool:
    """`name`, or `name and what follows it`."""
    return re.search(rf"`{re.escape(name)}(?![\w.\[-])[^`\n]*`", text) is not None


# ---------------------------------------------------------------------------------------------- configuration


def models_in(annotation: Any, suffix: str = "") -> Iterator[tuple[type[BaseModel], str]]:
    """The groups of options inside a type, each with what stands between its name and theirs: `[]` in a list, `.*` for
    the operator's own name in a mapping, which no document can spell."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, suffix
        return
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        arguments = arguments[:1]
    if origin in (tuple, list):
        suffix += "[]"
    elif origin in (dict, Mapping):
        suffix += ".*"
    elif origin not in (Annotated, types.UnionType) and not arguments:
        return
    for argument in arguments:
        yield from models_in(argument, suffix)


def options_of(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        path = prefix + (field.alias or name)
        below = list(models_in(field.annotation))
        if not below or below[0][1].endswith(".*"):
            yield path  # an option, or a mapping whose values' options are explained with it
        for group, suffix in below:
            yield from options_of(group, f"{path}{suffix}.")


def config_options() -> list[str]:
    if importlib.util.find_spec("xmppd.config.schema") is None:
        return []
    from xmppd.config.schema import Schema

    return sorted(set(options_of(Schema)))


@pytest.mark.parametrize("option", config_options())
def test_every_option_is_documented(option):
    inside_a_mapping = ".*." in option
    name = option.rpartition(".")[2] if inside_a_mapping else option

    assert in_code_span(document("configuration.md"), name), f"docs/configuration.md does not name `{name}`"


# ---------------------------------------------------------------------------------- hooks, commands, modules


def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), str(file))


def decorator_name(node: ast.expr) -> str:
    target = node.func if isinstance(node, ast.Call) else node
    return target.attr if isinstance(target, ast.Attribute) else getattr(target, "id", "")


def event_classes() -> list[str]:
    file = ROOT / "xmppd" / "events.py"
    if not file.exists():
        return []
    return [
        node.name
        for node in tree_of(file).body
        if isinstance(node, ast.ClassDef)
        and not node.name.startswith("_")
        and any(decorator_name(one) == "dataclass" for one in node.decorator_list)
    ]


@pytest.mark.parametrize("event", event_classes())
def test_every_event_is_documented(event):
    assert has_heading(document("hooks.md"), event), f"docs/hooks.md has no heading for {event}"


def admin_commands() -> list[str]:
    """The names in `@command("name", ...)` anywhere in the server and its modules."""
    found = set()
    for file in [*(ROOT / "xmppd").rglob("*.py"), *(ROOT / "modules").rglob("*.py")]:
        for node in ast.walk(tree_of(file)):
            for one in getattr(node, "decorator_list", []):
                if decorator_name(one) == "command" and isinstance(one, ast.Call) and one.args:
                    found.add(ast.literal_eval(one.args[0]))
    return sorted(found)


@pytest.mark.parametrize("command", admin_commands())
def test_every_command_is_documented(command):
    text = document("xmppctl.md")

    assert in_code_span(text, command) or has_heading(text, command), f"docs/xmppctl.md does not name `{command}`"


def modules() -> list[str]:
    entries = (ROOT / "modules").iterdir()
    return sorted(
        entry.stem
        for entry in entries
        if not entry.name.startswith("_") and (entry.suffix == ".py" or (entry / "__init__.py").exists())
    )


def module_options() -> list[tuple[str, str]]:
    """The fields of each module's `Config`."""
    found = []
    for name in modules():
        single = ROOT / "modules" / f"{name}.py"
        for node in tree_of(single if single.exists() else ROOT / "modules" / name / "__init__.py").body:
            if isinstance(node, ast.ClassDef) and node.name == "Config":
                fields = [line for line in node.body if isinstance(line, ast.AnnAssign)]
                found += [
                    (name, line.target.id.removesuffix("_")) for line in fields if isinstance(line.target, ast.Name)
                ]
    return found


@pytest.mark.parametrize("module", modules())
def test_every_module_is_documented(module):
    assert has_heading(document("modules.md"), module), f"docs/modules.md has no heading for {module}"


@pytest.mark.parametrize(("module", "option"), module_options())
def test_every_option_of_a_module_is_documented(module, option):
    assert in_code_span(section(document("modules.md"), module), option), f"docs/modules.md, {module}: no `{option}`"


# ---------------------------------------------------------------------------------------------- the project's files


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [file for name in listed.stdout.split("\0") if name and (file := ROOT / name).is_file()]


def test_the_changelog_tells_of_this_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]

    text = (ROOT / "CHANGELOG.md").read_text()

    assert re.search(rf"^## \[?(Unreleased|{re.escape(version)})\b", text, re.MULTILINE)


def test_the_readme_starts_with_the_two_commands():
    text = (ROOT / "README.md").read_text()

    assert text.index("scripts/run") < text.index("scripts/test") < 600


def test_no_file_links_to_a_document_that_is_not_there():
    link = re.compile(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)")
    links = [
        (file, target) for file in tracked_files() if file.suffix == ".md" for target in link.findall(file.read_text())
    ]

    broken = [f"{file.relative_to(ROOT)}: {target}" for file, target in links if not (file.parent / target).exists()]

    assert not broken


# In pieces, so that this file does not hold what it looks for. What depends on one machine or one way of working has no
# place in the project: it would be false on the next one.
FOREIGN = [
    *(r"(?<![\w.])/wo" + r"rk/", r"/ro" + r"ot/", r"\.\./sha" + r"red\b"),
    *(r"\bpypi\." + r"org\b", r"\bpython" + r"hosted\b", r"\bnpm" + r"js\b", r"\bdeb\." + r"debian\.org\b"),
    *(r"\bsub" + r"agents?\b", r"\bcla" + r"ude\b", r"\banthro" + r"pic\b", r"\bassis" + r"tants?\b"),
    *(r"\bchat" + r"gpt\b", r"\bcopi" + r"lot\b", r"\bllm" + r"s?\b", r"\bco-authored" + r"-by\b"),
]


def test_the_files_speak_of_the_project_alone():
    foreign = re.compile("|".join(FOREIGN), re.IGNORECASE)
    wrong = []
    for file in tracked_files():
        try:
            lines = file.read_text().splitlines()
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(lines, 1):
            if found := foreign.search(line):
                wrong.append(f"{file.relative_to(ROOT)}:{number}: {found[0]}")

    assert not wrong


@pytest.mark.parametrize(
    "text", ["see /wo" + "rk/x", "the ../sha" + "red folder", "by Cla" + "ude", "an LL" + "M wrote"]
)
def test_foreign_words_are_found(text):
    assert re.search("|".join(FOREIGN), text, re.IGNORECASE)


def test_options_are_found_at_every_depth():
    class Inner(BaseModel):
        deep: int = 0

    class Outer(BaseModel):
        flat: int = 0
        group: Inner = Inner()
        many: tuple[Inner | None, ...] = ()
        named: dict[str, Inner] = {}

    assert set(options_of(Outer)) == {"flat", "group.deep", "many[].deep", "named", "named.*.deep"}


def test_a_longer_name_does_not_document_a_shorter_one():
    assert in_code_span("`register user host password`", "register")
    assert not in_code_span("`registered_users host`", "register")
    assert not in_code_span("`listen[].port`", "listen")
    assert not has_heading("## SessionBoundTwice", "SessionBound")
    assert has_heading("### `offline`", "offline")
