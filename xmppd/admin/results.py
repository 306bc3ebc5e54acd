"""Shapes of what a command returns, and how each is printed for people and for programs.

The printed form is ejabberdctl's: a scalar on a line, a list one element a line, a tuple separated by tabs, a list
inside a tuple separated by `;`, a `Rescode` prints nothing and sets the exit code, a `Restuple` prints its text. The
JSON form is the one of ejabberd's HTTP API: numbers and strings bare, lists as arrays, tuples as objects, a `Rescode`
as 0 or 1.
"""

import itertools
import json
from collections.abc import AsyncIterable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

ScalarType = Literal["string", "integer"]

# A status text or a resource is the client's; without this it could forge rows, columns and terminal sequences.
_CONTROLS: Final = dict.fromkeys((*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029), " ")

ROWS_PER_CHUNK: Final = 1000


@dataclass(frozen=True, slots=True)
class Rescode:
    """True or None: done, exit code 0. False: `Error: false`, exit code 1."""

    name: str = "res"


@dataclass(frozen=True, slots=True)
class Restuple:
    """A text for the operator; the empty text prints nothing. A refusal is raised as `CommandError`."""

    name: str = "res"


@dataclass(frozen=True, slots=True)
class Scalar:
    """One string or integer, or one field of a tuple."""

    name: str
    type: ScalarType = "string"


@dataclass(frozen=True, slots=True)
class Tuple:
    """A row: the handler returns a mapping by field name, or a sequence in the order of the fields."""

    name: str
    fields: tuple["Scalar | List", ...]


@dataclass(frozen=True, slots=True)
class List:
    """Any iterable of elements."""

    name: str
    element: "Scalar | Tuple"


Shape = Rescode | Restuple | Scalar | Tuple | List


def integer(name: str) -> Scalar:
    return Scalar(name, "integer")


def string(name: str) -> Scalar:
    return Scalar(name, "string")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command's function returns where there is more to say than the value: an exit code, and lines that
    xmppctl prints to standard error. Over HTTP an answer with notes is a refusal that bears them."""

    value: Any
    code: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Result:
    """What a command gave back: the value and its shape; a list is not walked before it is printed.

    A list may be an asynchronous iterable: then `live` is true and its elements come when they happen."""

    shape: Shape
    value: Any = None
    exit: int = 0
    notes: tuple[str, ...] = ()
    layout: Callable[[Any], str] | None = None

    @property
    def code(self) -> int:
        """The exit code."""
        return self.exit or (1 if isinstance(self.shape, Rescode) and self.value is False else 0)

    @property
    def live(self) -> bool:
        return isinstance(self.value, AsyncIterable)

    def one(self, element: Any, *, as_json: bool) -> str:
        """One element of a live list, as a line."""
        assert isinstance(self.shape, List)
        if as_json:
            return json.dumps(_plain(self.shape.element, element), ensure_ascii=False) + "\n"
        return _line(self.shape.element, element) + "\n"

    def text(self) -> str:
        """The whole printed form, with the newline at its end, or nothing."""
        return "".join(self.chunks())

    def chunks(self) -> Iterator[str]:
        """The printed form in pieces of ROWS_PER_CHUNK lines, so that a long list need not stop the event loop."""
        shape, value = self.shape, self.value
        if self.layout is not None:
            yield self.layout(value)
        elif isinstance(shape, Rescode):
            if value is False:
                yield "Error: false\n"
        elif isinstance(shape, Restuple):
            if value:
                yield f"{value}\n"
        elif isinstance(shape, List):
            rows: list[str] = []
            for element in value:
                rows.append(_line(shape.element, element))
                if len(rows) == ROWS_PER_CHUNK:
                    yield "\n".join(rows) + "\n"
                    rows = []
            if rows:
                yield "\n".join(rows) + "\n"
        elif isinstance(shape, Scalar):
            yield f"{value}\n"  # a scalar is the server's own word and may have several lines
        else:
            yield _line(shape, value) + "\n"

    def plain(self) -> Any:
        """The value as JSON knows it."""
        if isinstance(self.shape, Rescode):
            return self.code
        if isinstance(self.shape, Restuple):
            return str(self.value or "")
        return _plain(self.shape, self.value)

    def json(self) -> str:
        """The JSON form on one line, with the newline at its end."""
        return "".join(self.json_chunks())

    def json_chunks(self) -> Iterator[str]:
        """The JSON form in pieces of ROWS_PER_CHUNK elements, so that a long list need not stop the event loop."""
        if not isinstance(self.shape, List):
            yield json.dumps(self.plain(), ensure_ascii=False) + "\n"
            return
        element, rows, before = self.shape.element, iter(self.value), "["
        part = list(itertools.islice(rows, ROWS_PER_CHUNK))
        while True:
            following = list(itertools.islice(rows, ROWS_PER_CHUNK))
            body = json.dumps([_plain(element, item) for item in part], ensure_ascii=False)[1:-1]
            yield before + body + ("" if following else "]\n")
            if not following:
                return
            part, before = following, ", "


def error_json(text: str, code: int) -> str:
    """A refusal as JSON, on one line."""
    return json.dumps({"status": "error", "code": code, "message": text}, ensure_ascii=False) + "\n"


def cells_of(shape: Tuple, value: Any) -> Sequence[Any]:
    if isinstance(value, Mapping):
        return [value[field.name] for field in shape.fields]
    row: Sequence[Any] = tuple(value)
    if len(row) != len(shape.fields):
        raise TypeError(f"{shape.name} has {len(shape.fields)} fields, the handler returned {len(row)}")
    return row


def _line(shape: Scalar | Tuple, value: Any) -> str:
    if isinstance(shape, Scalar):
        return _clean(value)
    cells = [_cell(field, item) for field, item in zip(shape.fields, cells_of(shape, value), strict=True)]
    return "\t".join(cells)


def _cell(shape: Scalar | List, value: Any) -> str:
    if isinstance(shape, List):
        return ";".join(_line(shape.element, item) for item in value)
    return _clean(value)


def _clean(value: Any) -> str:
    text = str(value)
    return text if text.isprintable() else text.translate(_CONTROLS)


def _plain(shape: Shape, value: Any) -> Any:
    if isinstance(shape, List):
        items: Iterable[Any] = value
        return [_plain(shape.element, item) for item in items]
    if isinstance(shape, Tuple):
        row = cells_of(shape, value)
        return {field.name: _plain(field, item) for field, item in zip(shape.fields, row, strict=True)}
    if isinstance(shape, Scalar) and shape.type == "integer":
        return int(value)
    return str(value)


def describe(shape: Shape) -> str:
    """`sessions::[ session::{ jid::string, ... } ]`, fields below each other, as `help` prints it."""
    return _describe(shape, 11)


def _describe(shape: Shape, column: int) -> str:
    if isinstance(shape, Rescode | Restuple):
        return f"{shape.name}::{type(shape).__name__.lower()}"
    if isinstance(shape, Scalar):
        return f"{shape.name}::{shape.type}"
    if isinstance(shape, List):
        head = f"{shape.name}::[ "
        return f"{head}{_describe(shape.element, column + len(head))} ]"
    head = f"{shape.name}::{{ "
    inner = column + len(head)
    return head + (",\n" + " " * inner).join(_describe(field, inner) for field in shape.fields) + " }"
