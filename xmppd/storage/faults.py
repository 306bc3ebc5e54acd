"""The border where database exceptions end: what leaves this room is a StorageError."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from sqlalchemy import exc as sa

from xmppd.errors import SchemaTooNew, StorageError, StorageUnavailable, XmppdError

__all__ = [
    "BadValue",
    "Duplicate",
    "Fault",
    "SchemaTooNew",
    "StorageError",
    "StorageUnavailable",
    "classify",
    "translated",
]


class Duplicate(StorageError):
    """A row with this key is there already, or another rule of the table forbids it."""


class BadValue(StorageError):
    """A value that the table does not take, now or later."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What a database exception means for the caller.

    `unavailable`: trying again later may work. `transient`: the transaction was undone because of another one; trying
    again at once may work. `lost`: the connection is gone, and whether a COMMIT under way was done is not known.
    `value`: what was to be written is at fault, whenever it is tried.
    `elsewhere`: this server does not serve us, another one of the same cluster might.
    """

    reason: str
    unavailable: bool = False
    transient: bool = False
    lost: bool = False
    duplicate: bool = False
    value: bool = False
    elsewhere: bool = False

    def error(self, where: str) -> StorageError:
        kind = StorageUnavailable if self.unavailable else Duplicate if self.duplicate else StorageError
        if kind is StorageError and self.value:
            kind = BadValue
        return kind(f"{where}: {self.reason}")


# https://mariadb.com/kb/en/mariadb-error-codes/ and the MySQL reference manual, appendix B
_LOST: Final = {2006, 2013, 2014, 2055, 1053, 1077, 1078, 1079, 1080, 1152, 1158, 1159, 1160, 1161, 1184, 1927, 4031}
# lock wait timeout; deadlock, which is also Galera's certification conflict; Galera: this node is not ready
_TRANSIENT: Final = {1205, 1213, 1047}
# Its text has InnoDB's number, of which 149 is a deadlock: Galera's conflict at the COMMIT.
_COMMIT_FAILED: Final = 1180
_ELSEWHERE: Final = {2002, 2003, 2005, 2026, 1040, 1044, 1045, 1047, 1053, 1129, 1130, 1290, 1698, 1836}
_UNAVAILABLE: Final = {
    0,  # the driver's "not connected"
    2002,
    2003,
    2005,
    2026,  # TLS asked for and not given
    1021,  # disk full
    1028,
    1036,  # table read-only
    1037,  # out of memory
    1038,
    1040,  # too many connections
    1041,
    1044,  # access to the database refused
    1045,  # access refused
    1049,  # no such database
    1114,  # table full
    1129,  # host blocked
    1130,  # host not allowed
    1135,
    1180,  # error during COMMIT
    1203,  # max_user_connections
    1226,
    1290,  # --read-only
    1317,  # interrupted
    1698,  # access refused
    1792,
    1836,
    1969,  # statement time-out (MariaDB)
    3024,  # statement time-out (MySQL)
}
_BAD_VALUE: Final = {
    1048,  # NULL where there has to be something
    1153,  # larger than max_allowed_packet
    1264,  # out of range
    1265,
    1292,
    1366,  # a character that the column's set has not
    1406,  # too long
    1690,
    3140,  # no JSON
    3819,  # CHECK (MySQL)
    4025,  # CHECK (MariaDB)
}
_SQLITE_BAD_VALUE: Final = {sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH, sqlite3.SQLITE_TOOBIG}
_SQLITE_TRANSIENT: Final = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL}
_SQLITE_UNAVAILABLE: Final = {
    sqlite3.SQLITE_AUTH,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_INTERRUPT,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_READONLY,
}


def classify(error: BaseException) -> Fault | None:
    """None when the exception has nothing to do with the database."""
    if isinstance(error, sa.TimeoutError):
        return Fault("every connection of the pool is in use", unavailable=True)
    if isinstance(error, sa.DBAPIError):
        return _driver_fault(error)
    if isinstance(error, sa.SQLAlchemyError):  # a value that does not fit its column, a statement that is wrong
        cause = getattr(error, "orig", None)
        return Fault(str(cause or error), value=isinstance(cause, ValueError))
    return None


def _driver_fault(error: sa.DBAPIError) -> Fault:
    cause = error.orig
    duplicate = isinstance(error, sa.IntegrityError)
    if isinstance(cause, sqlite3.Error):
        code = getattr(cause, "sqlite_errorcode", 0) & 0xFF
        transient = code in _SQLITE_TRANSIENT
        unavailable = transient or code in _SQLITE_UNAVAILABLE or error.connection_invalidated
        value = code in _SQLITE_BAD_VALUE
        return Fault(str(cause), unavailable, transient, error.connection_invalidated, duplicate, value)
    args: tuple[object, ...] = getattr(cause, "args", ())
    code = args[0] if args and isinstance(args[0], int) else -1
    reason = f"{args[1]} ({code})" if code > 0 and len(args) > 1 else str(cause)
    value = code in _BAD_VALUE
    lost = not value and (code in _LOST or error.connection_invalidated)
    transient = code in _TRANSIENT or (code == _COMMIT_FAILED and "149" in reason)
    unavailable = lost or transient or code in _UNAVAILABLE
    return Fault(reason, unavailable, transient, lost, duplicate, value, code in _ELSEWHERE)


@contextmanager
def translated(where: str) -> Iterator[None]:
    """Turns database exceptions of the block into StorageError; everything else passes through."""
    try:
        yield
    except XmppdError:
        raise
    except Exception as exc:
        fault = classify(exc)
        if fault is None:
            raise
        raise fault.error(where) from exc
