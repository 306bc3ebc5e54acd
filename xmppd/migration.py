"""`xmppd --migrate`: bring the tables to this version without serving, or say what that would do."""

from xmppd.config import Config
from xmppd.storage import Storage


async def run(config: Config, *, dry: bool) -> int:
    """The exit code. Raises StorageError."""
    storage = Storage(config.database.url, data_dir=config.data_dir, pool_timeout=config.database.pool.timeout)
    try:
        plan = await storage.plan_migration()
        print(f"{storage.where}: {f'at revision {plan.current}' if plan.current else 'empty'}")
        for revision, title, expands in plan.steps:
            beside = (
                "nodes that do not know it may go on" if expands else "nodes that do not know it have to stop first"
            )
            print(f"{'would apply' if dry else 'applying'} {revision}: {title} ({beside})")
        if not plan.steps:
            print("nothing to do")
        elif dry:
            print(f"\n{plan.sql}", end="")
        else:
            await storage.open()
            print("done")
    finally:
        await storage.close()
    return 0
