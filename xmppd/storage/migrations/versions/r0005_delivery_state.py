"""What became of messages; and which rows of the spool somebody has still to be told of."""

from sqlalchemy import Column, Index

from xmppd.storage.migrations.steps import add_column, create_table
from xmppd.storage.tables import BARE_BYTES, PART_BYTES, Stamp, Utf8, fixed_bytes, host_column, user_column

revision = "0005"
down_revision = "0004"
expands = True


def upgrade() -> None:
    add_column("spool", Column("told", fixed_bytes(16)))
    create_table(
        "delivery_state",
        Column("id_hash", fixed_bytes(32), primary_key=True),
        host_column(),
        user_column(),
        Column("recipient", Utf8(BARE_BYTES), nullable=False),
        Column("recipient_hash", fixed_bytes(32), nullable=False),
        Column("message_id", Utf8(PART_BYTES), nullable=False),
        Column("updated_at", Stamp, nullable=False),
        Column("accepted_at", Stamp),
        Column("stored_at", Stamp),
        Column("sent_at", Stamp),
        Column("acknowledged_at", Stamp),
        Column("received_at", Stamp),
        Column("displayed_at", Stamp),
        Column("bounced_at", Stamp),
        Column("removed_at", Stamp),
        Column("expires_at", Stamp),
        Column("reason", Utf8(255)),
        Index("delivery_state_sender", "server_host", "username", "updated_at"),
        Index("delivery_state_recipient", "recipient_hash"),
        Index("delivery_state_age", "updated_at"),
    )
