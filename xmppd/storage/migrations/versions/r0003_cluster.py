"""Which cluster a database belongs to, and the nodes that serve from it."""

from sqlalchemy import BigInteger, Column, Index

from xmppd.storage.migrations.steps import create_table
from xmppd.storage.tables import Stamp, Utf8, fixed_bytes

revision = "0003"
down_revision = "0002"
expands = True


def upgrade() -> None:
    create_table(
        "cluster",
        Column("name", Utf8(16), primary_key=True),
        Column("cluster_id", fixed_bytes(16), nullable=False),
        Column("database_id", fixed_bytes(16), nullable=False),
        Column("created_at", Stamp, nullable=False),
        Column("revision", BigInteger, nullable=False),
    )
    create_table(
        "node",
        Column("node_id", fixed_bytes(16), primary_key=True),
        Column("name", Utf8(320), nullable=False),
        Column("address", Utf8(320), nullable=False),
        Column("state", Utf8(16), nullable=False),
        Column("incarnation", BigInteger, nullable=False),
        Column("version", Utf8(64), nullable=False),
        Column("hosts_hash", fixed_bytes(32), nullable=False),
        Column("joined_at", Stamp),
        Column("left_at", Stamp),
        Column("left_by", Utf8(320)),
        Column("left_why", Utf8(255)),
        Column("instance", fixed_bytes(16)),
        Column("place", fixed_bytes(32)),
        Column("last_seen_at", Stamp),
        Column("lease_until", Stamp),
        Column("wanted_at", Stamp),
        Index("node_name", "name"),
    )
