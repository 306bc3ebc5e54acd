"""The tables of the core, and the column types that make one schema behave alike on SQLite and MySQL.

Every per-user key begins with (server_host, username). JID parts are compared byte by byte: no collation, no
trailing blanks. Times are seconds since 1970 in Python, milliseconds in the database.
"""

import hashlib
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Column,
    Dialect,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    TypeDecorator,
)
from sqlalchemy.dialects import mysql
from sqlalchemy.schema import SchemaItem
from sqlalchemy.types import TypeEngine

HOST_BYTES: Final = 255
PART_BYTES: Final = 1023  # RFC 7622 3.3, 3.4: a localpart or resourcepart
BARE_BYTES: Final = PART_BYTES + 1 + HOST_BYTES
FULL_BYTES: Final = BARE_BYTES + 1 + PART_BYTES
NODE_NAME_BYTES: Final = 320  # 64 in front of the @, 253 behind it
ADDRESS_BYTES: Final = 320


class Utf8(TypeDecorator[str]):
    """Text of at most `size` bytes of UTF-8, compared byte by byte: VARBINARY on MySQL, TEXT on SQLite.

    A longer value is refused before it is sent (StorageError), whatever the server's mode.
    """

    impl = Text
    cache_ok = True

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        return dialect.type_descriptor(mysql.VARBINARY(self.size) if dialect.name == "mysql" else Text())

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | bytes | None:
        if value is None:
            return None
        data = value.encode()
        if len(data) > self.size:
            raise ValueError(f"text of {len(data)} bytes for a column of {self.size}")
        return data if dialect.name == "mysql" else value

    def process_result_value(self, value: str | bytes | None, dialect: Dialect) -> str | None:
        return value.decode() if isinstance(value, bytes) else value


class Stamp(TypeDecorator[float]):
    """Seconds since 1970, kept as whole milliseconds."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: float | None, dialect: Dialect) -> int | None:
        return None if value is None else round(value * 1000)

    def process_result_value(self, value: int | None, dialect: Dialect) -> float | None:
        return None if value is None else value / 1000


def host_column(**options: Any) -> Column[str]:
    return Column("server_host", Utf8(HOST_BYTES), nullable=False, **options)


def user_column(**options: Any) -> Column[str]:
    return Column("username", Utf8(PART_BYTES), nullable=False, **options)


def fixed_bytes(size: int) -> TypeEngine[bytes]:
    """Exactly `size` bytes: ids (16), SHA-256 hashes (32)."""
    return LargeBinary().with_variant(mysql.BINARY(size), "mysql")


def short_bytes(size: int) -> TypeEngine[bytes]:
    """At most `size` bytes, fit for keys."""
    return LargeBinary().with_variant(mysql.VARBINARY(size), "mysql")


def long_bytes() -> TypeEngine[bytes]:
    """At most 16 MiB: serialised stanzas and other XML."""
    return LargeBinary().with_variant(mysql.MEDIUMBLOB(), "mysql")


def long_text() -> TypeEngine[str]:
    """At most 16 MiB of UTF-8, not for keys."""
    return Text().with_variant(mysql.MEDIUMTEXT(), "mysql")


def key_hash(text: str) -> bytes:
    """The 32 bytes that stand for a text too long for a key, such as a JID."""
    return hashlib.sha256(text.encode()).digest()


TABLE_OPTIONS: Final[dict[str, Any]] = {
    "mysql_engine": "InnoDB",
    "mysql_charset": "utf8mb4",
    "mysql_collate": "utf8mb4_bin",
    "mysql_row_format": "DYNAMIC",  # keys of up to 3072 bytes
}


def module_table(name: str, *items: SchemaItem) -> Table:
    """A module's own table. Each has its own MetaData, so that the module's file can be run again at a reload."""
    return Table(name, MetaData(), *items, **TABLE_OPTIONS)


metadata = MetaData()


def _core(name: str, *items: SchemaItem) -> Table:
    return Table(name, metadata, *items, **TABLE_OPTIONS)


account = _core(
    "account",
    host_column(primary_key=True),
    user_column(primary_key=True),
    Column("created_at", Stamp, nullable=False),
)

account_secret = _core(
    "account_secret",
    host_column(primary_key=True),
    user_column(primary_key=True),
    Column("kind", Utf8(16), primary_key=True),  # sha1, sha256, sha512
    Column("salt", short_bytes(255), nullable=False),
    Column("iterations", Integer, nullable=False),
    Column("stored_key", short_bytes(64), nullable=False),
    Column("server_key", short_bytes(64), nullable=False),
)

setting = _core(
    "setting",
    Column("name", Utf8(64), primary_key=True),
    Column("value", long_bytes(), nullable=False),
)

db_lock = _core(
    "db_lock",
    Column("name", Utf8(64), primary_key=True),
    Column("token", fixed_bytes(16)),  # who holds it; null: nobody
    Column("holder", Utf8(255)),  # for operators
    Column("until", Stamp),  # by the database's clock; past: free again
)

spool = _core(
    "spool",
    Column("id", fixed_bytes(16), primary_key=True),
    host_column(),
    user_column(),
    Column("created_at", Stamp, nullable=False),
    Column("expires_at", Stamp),
    Column("dedup_key", fixed_bytes(32)),  # null once the window has passed, so that the same may be stored again
    Column("sender", Utf8(BARE_BYTES), nullable=False),
    Column("stanza", long_bytes(), nullable=False),
    Column("holder_member", fixed_bytes(16)),  # all three null: an offline message
    Column("holder_incarnation", BigInteger),
    Column("holder_session", Utf8(PART_BYTES)),
    Column("take_id", fixed_bytes(16)),  # the `take` that set the holder: what it reads back, and nothing else
    Column("free_since", Stamp),  # when it became, or came back as, a row without holder; null: held
    # Who has told that it is an offline message now, having been held before; zeros: nobody yet; null: it was one from
    # the beginning, which is told with its storing.
    Column("told", fixed_bytes(16)),
    Index("spool_user", "server_host", "username", "holder_member", "id", "expires_at"),
    Index("spool_holder", "holder_member", "holder_incarnation"),
    Index("spool_dedup", "dedup_key", unique=True),
    Index("spool_free", "free_since"),
)

outbox = _core(  # events for web servers that have not taken them yet (xmppd/outbox)
    "outbox",
    Column("id", fixed_bytes(16), primary_key=True),
    Column("sink", Utf8(64), nullable=False),
    host_column(),
    Column("kind", Utf8(32), nullable=False),
    Column("partition_key", fixed_bytes(32), nullable=False),  # events with the same one go out in order
    Column("dedup_key", fixed_bytes(32)),  # null once the window has passed
    Column("headers", long_bytes(), nullable=False),  # JSON: [[name, value], …]
    Column("payload", long_bytes(), nullable=False),
    Column("state", Utf8(8), nullable=False),  # pending, dead; done: kept for its dedup_key
    Column("attempts", Integer, nullable=False),
    Column("next_at", Stamp),  # not before; by the clock of the node that tried
    Column("lease_node", fixed_bytes(16), nullable=False),  # the run of the node that sends it, while that one's
    Column("lease_incarnation", BigInteger, nullable=False),  # row in `node` says that it lives
    Column("take_id", fixed_bytes(16)),  # null: that node does not have it in memory yet
    Column("last_error", Utf8(255)),
    Column("created_at", Stamp, nullable=False),
    Index("outbox_lease", "lease_node", "lease_incarnation", "sink", "state", "take_id", "id"),
    Index("outbox_dedup", "dedup_key", unique=True),
    Index("outbox_state", "state", "sink", "id"),
)

cluster = _core(  # one row: which cluster this database belongs to
    "cluster",
    Column("name", Utf8(16), primary_key=True),  # always "cluster"
    Column("cluster_id", fixed_bytes(16), nullable=False),
    Column("database_id", fixed_bytes(16), nullable=False),  # do two nodes look at the same database?
    Column("created_at", Stamp, nullable=False),
    Column("revision", BigInteger, nullable=False),  # grows with every change of the members
)

node = _core(  # every node that has ever served from this database
    "node",
    Column("node_id", fixed_bytes(16), primary_key=True),
    Column("name", Utf8(NODE_NAME_BYTES), nullable=False),  # a label, may change
    Column("address", Utf8(ADDRESS_BYTES), nullable=False),  # host:port under which the others reach it; "" unknown
    Column("state", Utf8(16), nullable=False),  # single, member, removed
    Column("incarnation", BigInteger, nullable=False),
    Column("version", Utf8(64), nullable=False),
    Column("hosts_hash", fixed_bytes(32), nullable=False),
    Column("joined_at", Stamp),
    Column("left_at", Stamp),
    Column("left_by", Utf8(NODE_NAME_BYTES)),
    Column("left_why", Utf8(255)),
    Column("instance", fixed_bytes(16)),  # the process that serves as this node; null: none
    Column("place", fixed_bytes(32)),  # the data folder it serves from, as a hash
    Column("last_seen_at", Stamp),
    Column("lease_until", Stamp),  # by the database's clock; past or null: it does not run
    Column("wanted_at", Stamp),  # when somebody last wanted to reach it
    Index("node_name", "name"),
)

__all__ = [
    "ADDRESS_BYTES",
    "BARE_BYTES",
    "FULL_BYTES",
    "HOST_BYTES",
    "NODE_NAME_BYTES",
    "PART_BYTES",
    "Stamp",
    "Utf8",
    "account",
    "account_secret",
    "cluster",
    "db_lock",
    "fixed_bytes",
    "host_column",
    "key_hash",
    "long_bytes",
    "long_text",
    "metadata",
    "module_table",
    "node",
    "outbox",
    "setting",
    "short_bytes",
    "spool",
    "user_column",
]
