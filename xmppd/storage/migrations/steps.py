"""Steps that may be done again: on MySQL a killed migration leaves some of its tables behind."""

from typing import Any

from alembic import op
from sqlalchemy import Column, MetaData, Table, inspect
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


def add_column(table: str, column: Column[Any]) -> None:
    """Adds a column that may be null, so that nodes of the version before, which do not know it, go on writing rows."""
    dry = op.get_context().as_sql
    if dry or column.name not in {each["name"] for each in inspect(op.get_bind()).get_columns(table)}:
        op.add_column(table, column)
