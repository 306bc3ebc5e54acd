"""Values of a batch as one piece of SQL, for MySQL: made in one go, they take a fifth of the time that SQLAlchemy and
the driver need for one value after the other. Everything is a hexadecimal literal, or a number.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

from sqlalchemy import BindParameter, Dialect, bindparam
from sqlalchemy.types import UserDefinedType

_STATEMENT: Final = 1 << 20  # bytes; servers take 16 MiB unless told otherwise


class Literals:
    """Goes into a statement as it is (engine.MysqlConnection); in logs and exceptions it is a value, and hidden."""

    __slots__ = ("sql",)

    def __init__(self, sql: str) -> None:
        self.sql = sql


class _Hex(UserDefinedType[Any]):
    """`(x'…',x'…')`."""

    cache_ok = True

    def bind_processor(self, dialect: Dialect) -> Callable[[Any], Literals]:
        def process(values: Sequence[bytes | str]) -> Literals:
            if isinstance(values[0], str):
                values = [value.encode() for value in values]  # type: ignore[union-attr]
            return Literals("(x'" + "',x'".join([value.hex() for value in values]) + "')")  # type: ignore[union-attr]

        return process


class _Rows(UserDefinedType[Any]):
    cache_ok = True

    def bind_processor(self, dialect: Dialect) -> Callable[[Any], Literals]:
        return Literals


def hex_param(name: str) -> BindParameter[Any]:
    """The parameter of a text for `… IN :name`: bytes, or strings for a column of `Utf8`, at least one."""
    return bindparam(name, type_=_Hex())


def rows_param(name: str) -> BindParameter[str]:
    """The parameter of a text for what `in_statements` gives: `INSERT INTO … VALUES :name`."""
    return bindparam(name, type_=_Rows())


def in_statements(rows: Iterable[str]) -> Iterator[str]:
    """`(…),(…)` of rows that are written like that already, as many as a statement should have."""
    some: list[str] = []
    size = 0
    for row in rows:
        if some and size + len(row) > _STATEMENT:
            yield ",".join(some)
            some, size = [], 0
        some.append(row)
        size += len(row) + 1
    if some:
        yield ",".join(some)


def hex_or_null(value: bytes | None) -> str:
    return "NULL" if value is None else f"x'{value.hex()}'"


def millis_or_null(value: float | None) -> str:
    """As a `Stamp` column has it."""
    return "NULL" if value is None else str(round(value * 1000))
