"""Messages as rows of a table."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

from sqlalchemy import CHAR, VARCHAR, Column, DateTime, Table
from sqlalchemy.dialects import mysql

from xmppd.module_api import FULL_BYTES, Event, long_text, module_table

_ASCII: Final = "ascii"


def message_table(name: str) -> Table:
    """Documented in docs/modules.md. `json` is written where a table has it, and left out of one that is created."""
    return module_table(
        name,
        Column(
            "id",
            CHAR(26).with_variant(mysql.CHAR(26, charset=_ASCII, collation="ascii_bin"), "mysql"),
            primary_key=True,
        ),
        Column("ts", DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql"), nullable=False),
        Column("direction", VARCHAR(16), nullable=False),
        Column("host", VARCHAR(255), nullable=False),
        Column("node", VARCHAR(320), nullable=False),
        Column("type", VARCHAR(16), nullable=False),
        Column("stanza_id", long_text()),
        Column("origin_id", long_text()),
        Column("from_jid", VARCHAR(FULL_BYTES), nullable=False),
        Column("to_jid", VARCHAR(FULL_BYTES), nullable=False),
        Column("thread", long_text()),
        Column("body", long_text()),
        Column("state", VARCHAR(32), nullable=False),
        Column("xml", long_text()),
        Column("json", long_text(), system=True),
    )


def message_row(event: Event) -> Mapping[str, Any]:
    """Of an event whose payload is the JSON of a message."""
    said = json.loads(event.payload)
    row = {name: said[name] for name in ("id", "direction", "host", "node", "type", "stanza_id", "origin_id")}
    body = next(iter(said["body"].values()), None)  # that in no language, else the first
    body = said["body"].get("", body)
    return {
        **row,
        "ts": datetime.fromtimestamp(event.created_at, UTC).replace(tzinfo=None),
        "from_jid": said["from"]["jid"],
        "to_jid": said["to"]["jid"],
        "thread": said["thread"],
        "body": json.dumps(body) if isinstance(body, dict) else body,
        "state": said["state"],
        "xml": said["xml"],
        "json": event.payload.decode(),
    }
