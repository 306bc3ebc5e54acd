"""The history of the schema (Alembic). A new revision goes into `versions/`, and is never changed once released.

`expands = True` in a revision says that code which does not know it may go on beside it: it adds tables, or columns
with a default, and changes nothing that is there. What takes something away comes a version later, without it.
"""
