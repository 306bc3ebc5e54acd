"""The history of the schema (Alembic). A new revision goes into `versions/`, and is never changed once released."""
