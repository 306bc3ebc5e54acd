"""Steps that may be done again: on MySQL a killed migration leaves some of its tables behind."""

from typing import Any

from alembic import op
from sqlalchemy import Column, MetaData, Table, inspect
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


def add_column(table: str, column: Column[Any]) -> None:
    """Adds a column that may be null, so that nodes of the version before, which do not know it, go on writing rows."""
    there = {each["name"] for each in inspect(op.get_bind()).get_columns(table)}
    if column.name not in there:
        op.add_column(table, column)
