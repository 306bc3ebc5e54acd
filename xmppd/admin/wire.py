"""What a command returned, as lines of JSON from one node to another.

The first line is the head: `value` for what is no list, `fields` for one (the names of a row's columns, or null where
its elements are scalars), or `error` and `code` for a refusal. The elements follow, one a line, a row as an array in
the order of `fields`. A node of another version may have more columns or fewer: they are matched by name.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from xmppd.admin.results import List, Rescode, Restuple, Result, Scalar, Shape, Tuple, cells_of
from xmppd.errors import CommandError


def line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n"


def lines_of(result: Result) -> Iterator[str]:
    """A whole result; a list is walked as the lines are taken."""
    shape, value = result.shape, result.value
    if not isinstance(shape, List):
        yield line({"value": _plain(shape, value)})
        return
    yield line({"fields": _fields(shape.element)})
    for element in value:
        yield line(_plain(shape.element, element))


def refusal(error: CommandError) -> str:
    return line({"error": error.text, "code": error.code})


def value_of(shape: Shape, lines: Iterable[str]) -> Any:
    """The value again. Raises CommandError for a refusal, ValueError or KeyError for what no node would send."""
    rest = iter(lines)
    head = json.loads(next(rest))
    if "error" in head:
        raise CommandError(str(head["error"]), int(head["code"]))
    if not isinstance(shape, List):
        return head["value"]
    theirs, ours = head["fields"], _fields(shape.element)
    rows = [json.loads(each) for each in rest]
    if theirs == ours or ours is None or theirs is None:
        return rows
    assert isinstance(shape.element, Tuple)
    pick = _picker(theirs, shape.element.fields)
    return [pick(row) for row in rows]


def _picker(theirs: Sequence[str], ours: Sequence[Scalar | List]) -> Callable[[Sequence[Any]], list[Any]]:
    places = [(theirs.index(field.name) if field.name in theirs else -1, _nothing(field)) for field in ours]
    return lambda row: [nothing if place < 0 else row[place] for place, nothing in places]


def _nothing(field: Scalar | List) -> Any:
    if isinstance(field, List):
        return []
    return 0 if field.type == "integer" else ""


def _fields(element: Scalar | Tuple) -> list[str] | None:
    return [field.name for field in element.fields] if isinstance(element, Tuple) else None


def _plain(shape: Shape, value: Any) -> Any:
    if isinstance(shape, Rescode):
        return value is not False
    if isinstance(shape, Restuple):
        return str(value or "")
    if isinstance(shape, List):
        return [_plain(shape.element, item) for item in value]
    if isinstance(shape, Tuple):
        return [_plain(field, item) for field, item in zip(shape.fields, cells_of(shape, value), strict=True)]
    return int(value) if shape.type == "integer" else str(value)
