"""Reads a YAML file into plain values, remembering the line of each, and refuses what only surprises people.

Narrower than PyYAML's loader on purpose: only true and false are booleans and numbers are decimal (`no` is a word,
`010` is ten, `22:22` is text), keys are text and come once, there are no tags and no merge keys. What an alias
expands to is counted, so that a few lines cannot become a billion values.
"""

import re
from typing import Any, Final

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from xmppd.errors import ConfigError

MAX_BYTES: Final = 1 << 20
MAX_VALUES: Final = 100_000
MAX_DEPTH: Final = 32

_TAG: Final = "tag:yaml.org,2002:"
_ODD: Final = re.compile("[\ud800-\udfff\x00-\x08\x0b-\x1f\x7f]")


class _Fault(Exception):
    def __init__(self, line: int, text: str) -> None:
        super().__init__(text)
        self.line = line
        self.text = text


class _Loader(yaml.SafeLoader):
    """Composes nodes only; the implicit types are ours, and nesting has an end."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    depth = 0

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _Fault(self.line, f"nested deeper than {MAX_DEPTH} levels")
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


for _name, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]{1,18}", "-+0123456789"),
    ("float", r"[-+]?[0-9]{1,18}\.[0-9]{1,18}", "-+0123456789"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})\Z", re.ASCII), list(_first))


class _Builder:
    """Turns nodes into values."""

    def __init__(self) -> None:
        self.lines: dict[str, int] = {}
        self.problems: list[_Fault] = []
        self._count = 0
        self._open: set[int] = set()

    def value(self, node: Node, path: str) -> Any:
        line = node.start_mark.line
        self._count += 1
        if self._count > MAX_VALUES:
            raise _Fault(line, f"more than {MAX_VALUES} values, with all aliases expanded")
        if id(node) in self._open:
            raise _Fault(line, "an alias that contains itself")
        self.lines.setdefault(path, line)
        if isinstance(node, ScalarNode):
            return self._scalar(node)
        self._open.add(id(node))
        try:
            if node.tag == _TAG + "seq" and isinstance(node, SequenceNode):
                return [self.value(item, f"{path}[{index}]") for index, item in enumerate(node.value)]
            if node.tag == _TAG + "map" and isinstance(node, MappingNode):
                return self._mapping(node, path)
        finally:
            self._open.discard(id(node))
        return self._foreign_tag(node)

    def _mapping(self, node: MappingNode, path: str) -> dict[str, Any]:
        values: dict[str, Any] = {}
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line
            key = key_node.value if isinstance(key_node, ScalarNode) else None
            if key is None:
                self.problems.append(_Fault(line, "a key must be a word, not a list or a mapping"))
            elif _ODD.search(key):
                self.problems.append(_Fault(line, f"the key {key!r} contains a control character"))
            elif key == "<<":
                self.problems.append(_Fault(line, "merge keys (<<) are not supported; repeat the options"))
            elif key in seen:
                text = f"{path + '.' if path else ''}{key}: given twice, first on line {seen[key] + 1}"
                self.problems.append(_Fault(line, text))
            else:
                seen[key] = line
                child = f"{path}.{key}" if path else key
                self.lines[child] = line
                values[key] = self.value(value_node, child)
        return values

    def _scalar(self, node: ScalarNode) -> Any:
        text: str = node.value
        if _ODD.search(text):
            self.problems.append(_Fault(node.start_mark.line, "a text contains a control character"))
            return None
        kind = node.tag.removeprefix(_TAG)
        if kind == "str" or node.tag == "!":
            return text
        if kind == "null":
            return None
        if kind == "bool" and text.lower() in ("true", "false"):
            return text.lower() == "true"
        try:
            if kind == "int":
                return int(text)
            if kind == "float":
                return float(text)
        except ValueError:
            pass  # !!int with something else behind it
        return self._foreign_tag(node)

    def _foreign_tag(self, node: Node) -> None:
        tag = node.tag.replace(_TAG, "!!")
        self.problems.append(_Fault(node.start_mark.line, f"the tag {tag[:60]!r} does not belong into this file"))


def _decode(raw: bytes) -> str:
    if len(raw) > MAX_BYTES:
        raise _Fault(0, f"the file is larger than {MAX_BYTES >> 20} MiB")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise _Fault(raw.count(b"\n", 0, exc.start), "not UTF-8 text") from None
    return text


def _plain_words(exc: yaml.MarkedYAMLError) -> _Fault:
    mark = exc.problem_mark or exc.context_mark
    problem = exc.problem or "not valid YAML"
    if r"'\t'" in problem:
        problem = "a tab; YAML is indented with blanks"
    elif problem.startswith(("expected <block end>", "mapping values are not allowed")):
        problem = "the indentation, or a colon, does not fit the lines around it"
    elif "document" in problem and "stream" in (exc.context or ""):
        problem = "a second document (---) in the same file"
    return _Fault(mark.line if mark else 0, problem)


def _compose(text: str) -> Node | None:
    try:
        loader = _Loader(text)  # reads ahead, so it may already fail
        try:
            node: Node | None = loader.get_single_node()
            return node
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as exc:
        raise _plain_words(exc) from None
    except yaml.reader.ReaderError as exc:
        before = text[: exc.position] if isinstance(exc.position, int) else ""
        character = chr(exc.character) if isinstance(exc.character, int) else exc.character
        raise _Fault(before.count("\n"), f"the character {character!r} may not stand in YAML") from None
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError):
        raise _Fault(0, "not valid YAML") from None


def read_yaml(raw: bytes, *, source: str) -> tuple[dict[str, Any], dict[str, int]]:
    """Values of a YAML file and the line (from 1) of each path such as `listen[1].port`. An empty file is `{}`.

    Keys are always text. Raises ConfigError with every problem that could be found in one pass, each with its line.
    """
    builder = _Builder()
    values: Any = None
    try:
        node = _compose(_decode(raw))
        values = None if node is None else builder.value(node, "")
        if values is None:
            values = {}
        elif not isinstance(values, dict):
            raise _Fault(0, "expected options (key: value) at the top, not a list or a single value")
    except _Fault as fault:
        builder.problems.append(fault)
    if builder.problems:
        raise ConfigError([f"{source}: line {fault.line + 1}: {fault.text}" for fault in builder.problems])
    return values, {path: line + 1 for path, line in builder.lines.items()}
