# ruff: noqa: E501 -- the table of faults reads best with one on a line
"""The reader of YAML files: what it makes of values, and what it refuses."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xmppd.config import ConfigError
from xmppd.config.yaml_file import MAX_BYTES, read_yaml


def problems(raw: bytes) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read_yaml(raw, source="x.yml")
    return caught.value.problems


@pytest.mark.parametrize("raw", [b"", b"# nothing\n", b"---\n", b"~\n", b"\xef\xbb\xbf", b"--- {}\n...\n"])
def test_an_empty_file_is_no_options(raw: bytes) -> None:
    assert read_yaml(raw, source="x.yml")[0] == {}


def test_values_are_what_they_look_like() -> None:
    raw = b"""
a: true
b: no
c: 010
d: 22:22
e: 1.5
f: 2026-01-01
g: ~
h:
i: "5"
j: !!str 5
10: all
k: .inf
l: 0x10
"""
    assert read_yaml(raw, source="x.yml")[0] == {
        "a": True,
        "b": "no",
        "c": 10,
        "d": "22:22",
        "e": 1.5,
        "f": "2026-01-01",
        "g": None,
        "h": None,
        "i": "5",
        "j": "5",
        "10": "all",
        "k": ".inf",
        "l": "0x10",
    }


def test_every_value_knows_its_line() -> None:
    values, lines = read_yaml(b"a: 1\nb:\n  - c: 2\n  - {c: 3,\n     d: 4}\n", source="x.yml")

    assert values == {"a": 1, "b": [{"c": 2}, {"c": 3, "d": 4}]}
    assert (lines["a"], lines["b"], lines["b[0].c"], lines["b[1].c"], lines["b[1].d"]) == (1, 2, 3, 4, 5)


def test_aliases_stand_for_their_value() -> None:
    assert read_yaml(b"a: &x [1]\nb: *x\n", source="x.yml")[0] == {"a": [1], "b": [1]}


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"a: 1\nb: 2\na: 3\n", "line 3: a: given twice, first on line 1"),
        (b"l:\n  - a: 1\n    a: 2\n", "line 3: l[0].a: given twice, first on line 2"),
        (b"10: a\n'10': b\n", "line 2: 10: given twice, first on line 1"),
        (b"- a\n", "line 1: expected options (key: value) at the top, not a list or a single value"),
        (b"word\n", "line 1: expected options (key: value) at the top, not a list or a single value"),
        (b"a: 1\nb:\n\tc: 2\n", "line 3: a tab; YAML is indented with blanks"),
        (b"a: 1\n b: 2\n", "line 2: the indentation, or a colon, does not fit the lines around it"),
        (b"a: b: c\n", "line 1: the indentation, or a colon, does not fit the lines around it"),
        (b"a: 1\nb: '\xff'\n", "line 2: not UTF-8 text"),
        (b"a: 1\nb: \x00\n", "line 2: the character '\\x00' may not stand in YAML"),
        (b"a: 1\nb: \"x\\0\"\n", "line 2: a text contains a control character"),
        (b'"\\e": 1\n', "line 1: the key '\\x1b' contains a control character"),
        (b"a: 1\n---\nb: 2\n", "line 2: a second document (---) in the same file"),
        (b"a: !!python/object/apply:os.system [ls]\n", "line 1: the tag '!!python/object/apply:os.system' does not belong into this file"),
        (b"a: !!int x\n", "line 1: the tag '!!int' does not belong into this file"),
        (b"a: !!set {x: }\n", "line 1: the tag '!!set' does not belong into this file"),
        (b"a: &x {b: 1}\nc:\n  <<: *x\n", "line 3: merge keys (<<) are not supported; repeat the options"),
        (b"? [a]\n: 1\n", "line 1: a key must be a word, not a list or a mapping"),
        (b"a: &x [*x]\n", "line 1: an alias that contains itself"),
        (b"a: *x\n", "line 1: found undefined alias 'x'"),
        (b"a: " + b"[" * 40 + b"]" * 40, "line 1: nested deeper than 32 levels"),
        (b"[" * 100_000, "line 1: nested deeper than 32 levels"),
        (b"#" * (MAX_BYTES + 1), "line 1: the file is larger than 1 MiB"),
        (b'a: "\\UFFFFFFFF"\n', "line 1: not valid YAML"),
    ],
)  # fmt: skip
def test_what_only_surprises_people_is_refused_with_its_line(raw: bytes, words: str) -> None:
    assert problems(raw) == [f"x.yml: {words}"]


def test_a_few_lines_do_not_become_a_billion_values() -> None:
    bomb = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    bomb += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, 12)]

    assert "more than 100000 values, with all aliases expanded" in problems("\n".join(bomb).encode())[0]


def test_all_doubled_keys_are_named_at_once() -> None:
    assert len(problems(b"a: 1\na: 2\nb: 1\nb: 2\n")) == 2


YAMLISH = st.text(alphabet=st.sampled_from("ab1:-,[]{}&*!|>'\"%@#?\\ \n\t~<.U0\x00\ud800é"), max_size=60)


@given(YAMLISH.map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=60))
def test_no_file_raises_anything_but_config_error(raw: bytes) -> None:
    values: object = None
    found: list[str] = []
    try:
        values, _ = read_yaml(raw, source="x.yml")
    except ConfigError as exc:
        found = exc.problems
    assert isinstance(values, dict) is not bool(found)
    assert all(line.startswith("x.yml: line ") and line.isprintable() for line in found)
