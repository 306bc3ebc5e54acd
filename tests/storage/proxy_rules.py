"""What a statement may be, so that the proxies which people have in front of MySQL understand it.

kingshard and its like know no procedures, views, triggers, savepoints, XA and prepared statements; they may give each
statement to another server, so nothing may lean on the session; and Galera has neither GET_LOCK nor LOCK TABLES.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from sqlalchemy import Engine, TextClause, event

_FIRST: Final = {"SELECT", "INSERT", "UPDATE", "DELETE", "START", "COMMIT", "ROLLBACK", "BEGIN", "PRAGMA"}
_SCHEMA: Final = {"CREATE", "ALTER", "DROP", "SHOW", "DESCRIBE"}  # migrations, which have a connection of their own
_REFUSED: Final = {
    "session state": r"^SET\b|@\w|\bLAST_INSERT_ID\b|\bFOUND_ROWS\b|\bROW_COUNT\b|\bTEMPORARY\b|^USE\b",
    "a savepoint": r"\bSAVEPOINT\b",
    "a procedure": r"^CALL\b|\b(PROCEDURE|FUNCTION|TRIGGER)\b|\bCREATE (OR REPLACE )?VIEW\b",
    "a server-side prepared statement": r"^(PREPARE|EXECUTE|DEALLOCATE)\b",
    "XA": r"^XA\b",
    "a lock": r"\bGET_LOCK\b|\bRELEASE_LOCK\b|\bLOCK TABLES\b|\bSKIP LOCKED\b|\bNOWAIT\b",
    "several statements": r";\s*\S",
}
# Their keys begin with server_host and username, by which a proxy may spread them over servers.
_SPREAD: Final = ("account", "account_secret", "roster_item", "roster_version", "vcard", "private_xml", "last_activity")
_TABLE: Final = re.compile(r"\b(?:FROM|UPDATE|INTO)\s+(\w+)")


def problem(sql: str, *, strict: bool = True) -> str | None:
    """What is wrong with it, or None; where it was not built but written as text, as tests do, less is asked."""
    plain = re.sub(r"/\*.*?\*/|`|'[^']*'", "", " ".join(sql.split())).strip()
    for what, pattern in _REFUSED.items():
        if re.search(pattern, plain):
            return what
    if not strict:
        return None
    first = plain.partition(" ")[0].upper()
    if first not in _FIRST | _SCHEMA:
        return f"no statement that proxies know: {first}"
    table = _TABLE.search(plain)
    spread = first in ("SELECT", "UPDATE", "DELETE") and table is not None and table[1] in _SPREAD
    if spread and not re.search(r"\bWHERE\b.*\bserver_host (=|IN)", plain):
        return "a statement that names no host"
    return None


@contextmanager
def watched() -> Iterator[list[str]]:
    """Statements of every engine that break a rule, with the rule."""
    found: list[str] = []

    def look(connection: Any, cursor: Any, sql: str, values: Any, context: Any, many: bool) -> None:
        what = problem(
            sql,
            strict=context is not None
            and context.compiled is not None
            and not context.isddl
            and not isinstance(context.invoked_statement, TextClause),
        )
        if what is not None:
            found.append(f"{what}: {sql}")

    event.listen(Engine, "before_cursor_execute", look)
    try:
        yield found
    finally:
        event.remove(Engine, "before_cursor_execute", look)
