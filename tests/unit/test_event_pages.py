"""The pages on what may happen to a cluster begin with what an operator sees, and say so in the words of the log; each
of these lines some test makes a node say."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "events").glob("*.md"))
LINE = re.compile(r"(INFO|WARN|ERROR) +(\S+) +(.+?)((?: [a-z_]+=(?:\"[^\"]*\"|\S+))*)")
LEVELS = {"INFO": "info", "WARN": "warning", "ERROR": "error"}

DEATH = "cluster/test_kill_real.py", "test_after_a_kill_every_contact_hears_once_and_nothing_on_its_way_is_lost"
HELD = "cluster/test_promise_real.py", "test_what_a_killed_node_had_in_its_hands_arrives_in_the_new_session_in_order"
SPLIT = "cluster/test_split_real.py", "test_a_node_that_is_cut_off_in_silence_and_comes_back"
RELAY = "cluster/test_split_real.py", "test_a_cut_between_two_of_three_nobody_notices"
COOKIE = "cluster/test_engine.py", "test_another_cookie_is_refused_on_both_sides"
VERSION = "cluster/test_links.py", "test_a_node_without_a_version_in_common_is_no_peer_and_is_named_in_the_log"
LEASE = "cluster/test_life.py", "test_a_lease_that_cannot_be_renewed_is_not_claimed_to_be_held"
WRITES = "scenarios/test_database_trouble.py", "test_a_locked_database_delays_writes_only"
READY = "scenarios/test_http.py", "test_readiness_goes_and_comes_back_with_the_database"
START = "cluster/test_join.py", "test_members_start_and_find_each_other_without_the_database"
# Which test makes a node say it, and looks whether it does.
SHOWN = {
    "contacts told of lost sessions": DEATH,
    "database takes writes again": WRITES,
    "messages of a dead node are free": HELD,
    "members not readable": LEASE,
    "members readable again": LEASE,
    "node down": DEATH,
    "node reached through another": RELAY,
    "node speaks another protocol": VERSION,
    "node up": SPLIT,
    "not ready: the database does not answer": READY,
    "peer refused, wrong cookie": COOKIE,
    "ready again: the database answers": READY,
    "serving without the database": START,
    "sessions shown to a node": SPLIT,
    "stanzas routed again": SPLIT,
    "tables synced": SPLIT,
    "writes wait for the database": WRITES,
}


@cache
def explained() -> dict[str, tuple[str, frozenset[str]]]:
    """Phrase -> levels and fields, as docs/log-lines.md has them; a test holds that page and the source equal."""
    page = (ROOT / "docs" / "log-lines.md").read_text()
    rows = re.findall(r"^\| `([^`]+)` \| ([a-z, ]+) \| (.*?) ?\| .* \|$", page, re.MULTILINE)
    return {phrase: (levels, frozenset(re.findall(r"`([^`]+)`", fields))) for phrase, levels, fields in rows}


def lines(page: Path) -> list[tuple[str, str, set[str]]]:
    """Level, phrase and fields of the lines the page begins with."""
    found = [(line, LINE.fullmatch(line)) for line in page.read_text().split("```")[1].strip().splitlines()]
    assert all(match for _, match in found), [line for line, match in found if match is None]
    return [(LEVELS[match[1]], match[3], set(re.findall(r" ([a-z_]+)=", match[4]))) for _, match in found if match]


def named(page: Path) -> set[str]:
    """The log lines that a page speaks of, at its beginning or later."""
    quoted = {" ".join(text.split()) for text in re.findall(r"`([^`]+)`", page.read_text().split("```")[2])}
    return {phrase for _, phrase, _ in lines(page)} | (quoted & explained().keys())


def test_there_is_a_page_for_each_event():
    assert [page.stem for page in PAGES] == ["cookie-mismatch", "database-lost", "node-lost", "split", "version-skew"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_begins_with_what_the_operator_sees(page):
    assert re.match(r"# [^\n]+\n\n```\n", page.read_text())

    for level, phrase, fields in lines(page):
        levels, possible = explained()[phrase]
        assert level in levels.split(", ")
        assert fields <= possible


def test_every_line_of_the_pages_is_triggered_by_a_test():
    assert SHOWN.keys() == {phrase for page in PAGES for phrase in named(page)}


@pytest.mark.parametrize(("phrase", "test"), SHOWN.items(), ids=lambda value: value if isinstance(value, str) else "")
def test_a_test_looks_for_the_line_that_it_triggers(phrase, test):
    source = (ROOT / "tests" / test[0]).read_text()
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    (function,) = [node for node in functions if node.name == test[1]]
    texts = [
        node.value for node in ast.walk(function) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]

    assert any(phrase in text for text in texts), f"{test[1]} does not look for {phrase!r}"
    assert not any("skip" in ast.unparse(each) or "xfail" in ast.unparse(each) for each in function.decorator_list)
