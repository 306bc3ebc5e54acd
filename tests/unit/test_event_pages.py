"""The pages on what may happen to a cluster begin with what an operator sees, and say so in the words of the log."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "events").glob("*.md"))
SAID = re.compile(r"^(?:INFO |WARN |ERROR) +\S+ +(.*?)(?: [a-z_]+=|$)")


def phrases(page: Path) -> list[str]:
    """Those of the lines the page begins with."""
    block = page.read_text().split("```")[1]
    found = [SAID.match(line) for line in block.strip().splitlines()]
    assert all(found), block
    return [match[1] for match in found if match]


def test_there_is_a_page_for_each_event():
    assert [page.stem for page in PAGES] == ["cookie-mismatch", "database-lost", "node-lost", "split", "version-skew"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_begins_with_what_the_operator_sees(page):
    assert re.match(r"# [^\n]+\n\n```\n", page.read_text())
    explained = (ROOT / "docs" / "log-lines.md").read_text()

    for phrase in phrases(page):
        assert f"| `{phrase}` |" in explained


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_line_of_a_page_is_triggered_by_a_test(page):
    here = Path(__file__)
    tests = "".join(file.read_text() for file in (ROOT / "tests").rglob("*.py") if file != here)

    for phrase in phrases(page):
        assert phrase in tests, f"no test looks for {phrase!r}"
