"""Every line an operator may see is explained in docs/log-lines.md, and the page explains no other."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from xmppd.log import RESERVED

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "log-lines.md"
LEVELS = ("info", "notice", "warning", "error", "critical")
FILES = sorted([*(ROOT / "xmppd").rglob("*.py"), *(ROOT / "modules").rglob("*.py")])


class Said(NamedTuple):
    """One call that logs; `phrase` is None where it is put together at run time, which hides it from searches."""

    where: str
    phrase: str | None
    level: str
    fields: frozenset[str]


class Line(NamedTuple):
    """A phrase with everything that is said with it anywhere."""

    levels: frozenset[str]
    fields: frozenset[str]

    def row(self, phrase: str) -> str:
        fields = ", ".join(f"`{field}`" for field in sorted(self.fields))
        return f"| `{phrase}` | {', '.join(sorted(self.levels))} | {fields} | what it means, and what to do |"


def calls_in(source: str, name: str) -> Iterator[Said]:
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        fields = frozenset(keyword.arg for keyword in node.keywords if keyword.arg) - {"exc"}
        where = f"{name}:{node.lineno}"
        if isinstance(node.func, ast.Attribute) and node.func.attr in LEVELS:
            if re.search(r"(^|[._])log(ger)?$", ast.unparse(node.func.value)):
                yield Said(where, text_of(node.args[0]), node.func.attr, fields)
        elif isinstance(node.func, ast.Name) and node.func.id == "_note" and len(node.args) == 2:  # xmppd/log.py
            yield Said(where, text_of(node.args[1]), ast.unparse(node.args[0]).rpartition(".")[2].lower(), fields)


def text_of(node: ast.expr) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


@cache
def all_calls() -> list[Said]:
    return [said for file in FILES for said in calls_in(file.read_text(), str(file.relative_to(ROOT)))]


def said() -> dict[str, Line]:
    lines: dict[str, Line] = {}
    for call in all_calls():
        if call.phrase is not None:
            before = lines.get(call.phrase, Line(frozenset(), frozenset()))
            lines[call.phrase] = Line(before.levels | {call.level}, before.fields | call.fields)
    return lines


def rows() -> list[tuple[str, str, str, str]]:
    return re.findall(r"^\| `([^`]+)` \| ([a-z, ]+) \| (.*?) ?\| (.*) \|$", PAGE.read_text(), re.MULTILINE)


def explained() -> dict[str, Line]:
    """The rows of the page's tables; those without an explanation do not count."""
    return {
        phrase: Line(frozenset(levels.split(", ")), frozenset(re.findall(r"`([^`]+)`", fields)))
        for phrase, levels, fields, meaning in rows()
        if len(meaning) > 10 and "what it means, and what to do" not in meaning
    }


def test_every_line_is_explained():
    page, lines = explained(), said()

    wrong = [lines[phrase].row(phrase) for phrase in sorted(lines) if page.get(phrase) != lines[phrase]]

    assert not wrong, "docs/log-lines.md lacks these rows, or has other levels or fields:\n" + "\n".join(wrong)


def test_the_page_explains_no_line_that_nobody_writes():
    assert not explained().keys() - said().keys()


def test_the_page_explains_each_line_once():
    assert [phrase for phrase, times in Counter(row[0] for row in rows()).items() if times > 1] == []


def test_a_phrase_is_fixed_so_that_it_can_be_searched_for():
    wrong = [call.where for call in all_calls() if call.phrase is None or "%" in call.phrase or "{" in call.phrase]

    assert not wrong


def test_no_field_is_called_as_what_each_json_line_has():
    wrong = [call.where for call in all_calls() if call.fields & RESERVED]

    assert not wrong


@pytest.mark.parametrize(
    "call",
    [
        'log.warning("no room", host=1)',
        'self._log.warning("no room", host=1)',
        'self._connection.log.warning("no room", exc=exc, host=1)',
        '_note(logging.WARNING, "no room", host=1)',
    ],
)
def test_no_way_of_logging_escapes_the_search(call):
    found = next(calls_in(f"def f():\n    {call}", "x.py"))

    assert found == Said("x.py:2", "no room", "warning", frozenset({"host"}))


def test_the_search_finds_what_is_there():
    assert {"serving", "session bound", "offline messages wait", "log lines lost"} <= said().keys()
