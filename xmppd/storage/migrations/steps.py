"""Steps that may be done again: on MySQL a killed migration leaves some of its tables behind."""

from alembic import op
from sqlalchemy import MetaData, Table, inspect
from sqlalchemy.schema import SchemaItem

from xmppd.storage.tables import TABLE_OPTIONS


def create_table(name: str, *items: SchemaItem) -> None:
    """Creates the table and its indexes, or those of them that are missing."""
    bind = op.get_bind()
    table = Table(name, MetaData(), *items, **TABLE_OPTIONS)
    inspector = inspect(bind)
    if not inspector.has_table(name):
        table.create(bind)
        return
    there = {index["name"] for index in inspector.get_indexes(name)}
    for index in table.indexes:
        if index.name not in there:
            index.create(bind)
