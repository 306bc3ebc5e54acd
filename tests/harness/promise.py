"""What a node says about unacknowledged messages."""

from collections.abc import Iterator
from contextlib import contextmanager
from sqlite3 import connect

from tests.harness.server import Server

_SPOOL = "node lease waiting unacknowledged held spooled late ended taken_over redelivered duplicates offline oldest_s"
_SESSION = "jid node state resume_s unacknowledged bytes spooled unsettled round_trip_ms"

Row = dict[str, str | int]


def spool_status(node: Server, of: Server | None = None) -> Row:
    """`of`: another node's line."""
    name = (of or node).options["node"]
    return next(row for row in _rows(node.quick("spool_status"), _SPOOL) if row["node"] == name)


def session_info(node: Server, jid: str) -> list[Row]:
    return _rows(node.quick("session_info", jid), _SESSION)


def _rows(text: str, names: str) -> list[Row]:
    return [
        {
            name: int(value) if value.isdigit() else value
            for name, value in zip(names.split(), line.split("\t"), strict=True)
        }
        for line in text.splitlines()
    ]


@contextmanager
def write_locked(node: Server) -> Iterator[None]:
    """Nobody else commits anything to a node's own SQLite file meanwhile."""
    connection = connect(node.data_dir / "xmppd.db", isolation_level=None, timeout=30)
    try:
        connection.execute("BEGIN IMMEDIATE")
        yield
    finally:
        connection.close()
