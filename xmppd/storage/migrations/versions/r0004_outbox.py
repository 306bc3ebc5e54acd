"""Events for web servers that have not taken them yet."""

from sqlalchemy import BigInteger, Column, Index, Integer

from xmppd.storage.migrations.steps import create_table
from xmppd.storage.tables import Stamp, Utf8, fixed_bytes, host_column, long_bytes

revision = "0004"
down_revision = "0003"
expands = True


def upgrade() -> None:
    create_table(
        "outbox",
        Column("id", fixed_bytes(16), primary_key=True),
        Column("sink", Utf8(64), nullable=False),
        host_column(),
        Column("kind", Utf8(32), nullable=False),
        Column("partition_key", fixed_bytes(32), nullable=False),
        Column("dedup_key", fixed_bytes(32)),
        Column("headers", long_bytes(), nullable=False),
        Column("payload", long_bytes(), nullable=False),
        Column("state", Utf8(8), nullable=False),
        Column("attempts", Integer, nullable=False),
        Column("next_at", Stamp),
        Column("lease_node", fixed_bytes(16), nullable=False),
        Column("lease_incarnation", BigInteger, nullable=False),
        Column("take_id", fixed_bytes(16)),
        Column("last_error", Utf8(255)),
        Column("created_at", Stamp, nullable=False),
        Index("outbox_lease", "lease_node", "lease_incarnation", "sink", "state", "take_id", "id"),
        Index("outbox_dedup", "dedup_key", unique=True),
        Index("outbox_state", "state", "sink", "id"),
    )
