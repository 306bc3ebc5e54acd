"""Copies of the embedded database: made while it is in use, checked, and put back.

All of it blocks, for as long as the database is large: it belongs into a thread. What goes wrong comes out as
StorageError, SchemaTooNew or OSError.
"""

import contextlib
import os
import secrets
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from urllib.parse import quote

from xmppd.errors import SchemaTooNew, StorageError
from xmppd.storage.migrate import revisions

_OURS: Final = ("account", "account_secret", "spool", "setting")  # tables of every version
_STAYS: Final = ("cluster", "node", "db_lock")  # what the nodes say of themselves: not a matter of a backup
_FREE: Final = (
    "UPDATE spool SET holder_member = NULL, holder_incarnation = NULL, holder_session = NULL, take_id = NULL,"
    " free_since = CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER) WHERE holder_member IS NOT NULL"
)
_WAIT: Final = 30.0  # seconds for other programs that write


class NoBackup(StorageError):
    """The file is damaged, or not a database of this server."""


def back_up(database: Path, target: Path) -> int:
    """Make a consistent, checked copy with mode 0600, in bytes; others read and write meanwhile. FileExistsError: a
    file is never overwritten."""
    if os.path.lexists(target):
        raise FileExistsError(f"{target} is there already")
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    with _own_file(beside):
        with _opened(database) as connection:
            connection.execute("VACUUM INTO ?", (str(beside),))
        check(beside)
        _sync(beside)
        size = beside.stat().st_size
        try:
            os.link(beside, target)  # unlike rename it fails if somebody has put one there meanwhile
        except FileExistsError:
            raise FileExistsError(f"{target} is there already") from None
    _sync(target.parent)
    return size


def check(file: Path) -> str:
    """The schema's revision of a copy that can be restored. Raises NoBackup, SchemaTooNew."""
    with _opened(file, read_only=True) as connection:
        try:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            missing = [name for name in ("alembic_version", *_OURS) if name not in tables]
            if missing:
                raise NoBackup(f"{file} is a database, but none of xmppd's: it has no table {missing[0]}")
            row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
            faults = [str(line) for (line,) in connection.execute("PRAGMA integrity_check(5)")]
        except sqlite3.DatabaseError as exc:
            raise NoBackup(f"{file} cannot be read: {exc}") from exc
    if faults != ["ok"]:
        raise NoBackup(f"{file} is damaged: {'; '.join(faults)}")
    known = revisions()
    if row is None or row[0] not in known:
        found = "none" if row is None else row[0]
        raise SchemaTooNew(f"{file}: the schema is at revision {found}, this version knows those up to {known[-1]}")
    return str(row[0])


@contextlib.contextmanager
def working_copy(backup: Path, database: Path) -> Iterator[Path]:
    """A copy of a backup beside the database, to be migrated and given to `put_back`; it goes at the end."""
    copy = database.with_name(f".{database.name}.restore-{secrets.token_hex(4)}")
    with _own_file(copy):
        with _opened(backup, read_only=True) as source, _opened(copy) as target:
            source.backup(target)
        check(copy)
        yield copy


def put_back(copy: Path, database: Path) -> None:
    """Replace all of a database with a copy of the same revision, in one transaction: whoever reads sees all of the one
    or all of the other. The nodes and their cluster stay as they are; what sessions of the past held is free."""
    with _opened(copy) as source:
        _adapt(source, database)
        with _opened(database) as target:
            source.backup(target)
    _sync(database)


def _adapt(copy: sqlite3.Connection, database: Path) -> None:
    copy.execute("ATTACH DATABASE ? AS live", (str(database),))
    (size,), (live_size,) = (copy.execute(f"PRAGMA {name}.page_size").fetchone() for name in ("main", "live"))
    copy.execute("BEGIN IMMEDIATE")
    for table in _STAYS:
        columns = ", ".join(f'"{row[1]}"' for row in copy.execute(f"PRAGMA main.table_info({table})"))
        copy.execute(f"DELETE FROM main.{table}")
        copy.execute(f"INSERT INTO main.{table} ({columns}) SELECT {columns} FROM live.{table}")
    copy.execute(_FREE)
    copy.execute("COMMIT")
    copy.execute("DETACH DATABASE live")
    copy.execute("PRAGMA journal_mode = DELETE")
    if size != live_size:
        copy.execute(f"PRAGMA page_size = {live_size}")
        copy.execute("VACUUM")


@contextlib.contextmanager
def _opened(file: Path, *, read_only: bool = False) -> Iterator[sqlite3.Connection]:
    try:
        if read_only:
            # By a descriptor, so that it is there and a file; SQLite itself would only say "unable to open".
            os.close(os.open(file, os.O_RDONLY | os.O_CLOEXEC))
        # Without a log of its own nobody writes to it, and it may lie where nobody can.
        still = read_only and not os.path.exists(f"{file}-wal")
        connection = sqlite3.connect(
            f"file:{quote(str(file))}?mode={'ro' if read_only else 'rw'}{'&immutable=1' if still else ''}",
            uri=True,
            isolation_level=None,
            timeout=_WAIT,
        )
    except sqlite3.Error as exc:
        raise StorageError(f"{file} cannot be opened: {exc}") from exc
    try:
        yield connection
    except sqlite3.DatabaseError as exc:
        raise StorageError(f"{file}: {exc}") from exc
    finally:
        connection.close()


@contextlib.contextmanager
def _own_file(file: Path) -> Iterator[None]:
    """A new file that nobody else can read, and that is gone at the end, with what SQLite has put beside it."""
    os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
    try:
        yield
    finally:
        for end in ("", "-journal", "-wal", "-shm"):
            file.with_name(file.name + end).unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
