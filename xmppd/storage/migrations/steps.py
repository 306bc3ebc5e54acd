"""Steps that may be done again: on MySQL a killed migration leaves some of its tables behind."""

from alembic import op
from sqlalchemy import MetaData, Table, inspect
from sqlalchemy.schema import CreateIndex, CreateTable, SchemaItem

from xmppd.storage.tables import TABLE_OPTIONS


def create_table(name: str, *items: SchemaItem) -> None:
    """Creates the table and its indexes, or those of them that are missing."""
    table = Table(name, MetaData(), *items, **TABLE_OPTIONS)
    if op.get_context().as_sql:  # a dry run
        op.execute(CreateTable(table))
        for index in sorted(table.indexes, key=lambda index: str(index.name)):
            op.execute(CreateIndex(index))
        return
    bind = op.get_bind()
    inspector = inspect(bind)
    if not inspector.has_table(name):
        table.create(bind)
        return
    there = {index["name"] for index in inspector.get_indexes(name)}
    for index in table.indexes:
        if index.name not in there:
            index.create(bind)
