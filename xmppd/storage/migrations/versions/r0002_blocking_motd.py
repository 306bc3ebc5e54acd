"""Block lists, reports of spam, and the message of the day."""

from sqlalchemy import Column, Index

from xmppd.storage.migrations.steps import create_table
from xmppd.storage.tables import FULL_BYTES, Stamp, Utf8, fixed_bytes, host_column, long_bytes, user_column

revision = "0002"
down_revision = "0001"
expands = True


def upgrade() -> None:
    create_table(
        "block_item",
        host_column(primary_key=True),
        user_column(primary_key=True),
        Column("jid_hash", fixed_bytes(32), primary_key=True),
        Column("jid", Utf8(FULL_BYTES), nullable=False),
    )
    create_table(
        "spam_report",
        Column("id", fixed_bytes(16), primary_key=True),
        host_column(),
        user_column(),
        Column("created_at", Stamp, nullable=False),
        Column("jid", Utf8(FULL_BYTES), nullable=False),
        Column("reason", Utf8(255), nullable=False),
        Column("report", long_bytes(), nullable=False),
        Index("spam_report_user", "server_host", "username"),
    )
    create_table(
        "motd",
        host_column(primary_key=True),
        Column("id", fixed_bytes(16), nullable=False),
        Column("stanza", long_bytes(), nullable=False),
    )
    create_table(
        "motd_seen",
        host_column(primary_key=True),
        user_column(primary_key=True),
        Column("id", fixed_bytes(16), nullable=False),
    )
