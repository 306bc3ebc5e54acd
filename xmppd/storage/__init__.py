"""The database: SQLite inside the node, or MySQL/MariaDB for a cluster."""

from xmppd.protocol.sasl import Secret
from xmppd.storage.accounts import Account, Accounts
from xmppd.storage.batcher import Batcher
from xmppd.storage.clock import clock
from xmppd.storage.database import Storage
from xmppd.storage.endpoint import Endpoint
from xmppd.storage.faults import BadValue, Duplicate
from xmppd.storage.ids import first_id, id_at, id_of, id_time, new_id, next_place, place_of
from xmppd.storage.lease import Lease
from xmppd.storage.loader import Loader
from xmppd.storage.settings import shared_setting
from xmppd.storage.sql import by_host, db_now, insert_new, upsert
from xmppd.storage.tables import (
    Stamp,
    Utf8,
    fixed_bytes,
    host_column,
    key_hash,
    long_bytes,
    long_text,
    module_table,
    short_bytes,
    user_column,
)

__all__ = [
    "Account",
    "Accounts",
    "BadValue",
    "Batcher",
    "Duplicate",
    "Endpoint",
    "Lease",
    "Loader",
    "Secret",
    "Stamp",
    "Storage",
    "Utf8",
    "by_host",
    "clock",
    "db_now",
    "first_id",
    "fixed_bytes",
    "host_column",
    "id_at",
    "id_of",
    "id_time",
    "insert_new",
    "key_hash",
    "long_bytes",
    "long_text",
    "module_table",
    "new_id",
    "next_place",
    "place_of",
    "shared_setting",
    "short_bytes",
    "upsert",
    "user_column",
]
