"""Run by Alembic; the connection and the guard come from `xmppd.storage.migrate`."""

from typing import Any

from alembic import context


def still_ours(*_: Any, **__: Any) -> None:
    context.config.attributes["guard"].check()


if context.is_offline_mode():
    context.configure(dialect_name=context.config.attributes["dialect"], literal_binds=True)
else:
    context.configure(
        connection=context.config.attributes["connection"],
        transactional_ddl=False,  # SQLite's transaction is begun by the caller; MySQL has none for DDL
        on_version_apply=still_ours,
    )
context.run_migrations()
