"""The first tables: accounts, settings, locks, the spool, and those of the bundled modules."""

from sqlalchemy import BigInteger, Boolean, Column, Index, Integer

from xmppd.storage.migrations.steps import create_table
from xmppd.storage.tables import (
    BARE_BYTES,
    FULL_BYTES,
    PART_BYTES,
    Stamp,
    Utf8,
    fixed_bytes,
    host_column,
    long_bytes,
    long_text,
    short_bytes,
    user_column,
)

revision = "0001"
down_revision = None


def upgrade() -> None:
    accounts()
    create_table("setting", Column("name", Utf8(64), primary_key=True), Column("value", long_bytes(), nullable=False))
    create_table(
        "db_lock",
        Column("name", Utf8(64), primary_key=True),
        Column("token", fixed_bytes(16)),
        Column("holder", Utf8(255)),
        Column("until", Stamp),
    )
    spool()
    modules()


def accounts() -> None:
    create_table(
        "account",
        host_column(primary_key=True),
        user_column(primary_key=True),
        Column("created_at", Stamp, nullable=False),
    )
    create_table(
        "account_secret",
        host_column(primary_key=True),
        user_column(primary_key=True),
        Column("kind", Utf8(16), primary_key=True),
        Column("salt", short_bytes(255), nullable=False),
        Column("iterations", Integer, nullable=False),
        Column("stored_key", short_bytes(64), nullable=False),
        Column("server_key", short_bytes(64), nullable=False),
    )


def spool() -> None:
    create_table(
        "spool",
        Column("id", fixed_bytes(16), primary_key=True),
        host_column(),
        user_column(),
        Column("created_at", Stamp, nullable=False),
        Column("expires_at", Stamp),
        Column("dedup_key", fixed_bytes(32)),
        Column("sender", Utf8(BARE_BYTES), nullable=False),
        Column("stanza", long_bytes(), nullable=False),
        Column("holder_member", fixed_bytes(16)),
        Column("holder_incarnation", BigInteger),
        Column("holder_session", Utf8(PART_BYTES)),
        Column("take_id", fixed_bytes(16)),
        Column("free_since", Stamp),
        Index("spool_user", "server_host", "username", "holder_member", "id", "expires_at"),
        Index("spool_holder", "holder_member", "holder_incarnation"),
        Index("spool_dedup", "dedup_key", unique=True),
        Index("spool_free", "free_since"),
    )


def modules() -> None:
    create_table(
        "roster_item",
        host_column(primary_key=True),
        user_column(primary_key=True),
        Column("jid_hash", fixed_bytes(32), primary_key=True),
        Column("jid", Utf8(FULL_BYTES), nullable=False),
        Column("name", long_text(), nullable=False),
        Column("subscription", Utf8(16), nullable=False),
        Column("ask", Utf8(16)),
        Column("approved", Boolean, nullable=False),
        Column("groups", long_text(), nullable=False),
        Column("request", long_bytes()),
    )
    create_table(
        "roster_version",
        host_column(primary_key=True),
        user_column(primary_key=True),
        Column("version", Utf8(64), nullable=False),
    )
    create_table(
        "last_activity",
        host_column(primary_key=True),
        user_column(primary_key=True),
        Column("seconds", BigInteger, nullable=False),
        Column("status", long_text(), nullable=False),
    )
    create_table(
        "private_xml",
        host_column(primary_key=True),
        user_column(primary_key=True),
        Column("namespace_hash", fixed_bytes(32), primary_key=True),
        Column("namespace", long_text(), nullable=False),
        Column("element", long_text(), nullable=False),
        Column("xml", long_bytes(), nullable=False),
    )
    create_table(
        "vcard",
        host_column(primary_key=True),
        user_column(primary_key=True),
        Column("xml", long_bytes(), nullable=False),
        Column("updated_at", Stamp, nullable=False),
    )
