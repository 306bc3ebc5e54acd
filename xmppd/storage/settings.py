"""Values that all nodes of a cluster share and that one of them made."""

from collections.abc import Callable

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from xmppd.errors import StorageError
from xmppd.storage.database import Storage
from xmppd.storage.sql import insert_new
from xmppd.storage.tables import setting


async def shared_setting(storage: Storage, name: str, make: Callable[[], bytes]) -> bytes:
    """The value called `name`, made by `make` if there is none; when two nodes make one at once, one of them wins."""

    async def look(connection: AsyncConnection) -> bytes | None:
        return (await connection.execute(select(setting.c.value).where(setting.c.name == name))).scalar_one_or_none()

    value = await storage.read(look)
    if value is not None:
        return value
    proposal = make()

    async def propose(connection: AsyncConnection) -> bytes | None:
        await connection.execute(insert_new(setting, connection.dialect), {"name": name, "value": proposal})
        return await look(connection)  # here, not in a read of its own, which a proxy may send to a late replica

    value = await storage.run(propose, repeatable=True)
    if value is None:
        raise StorageError(f"{storage.where}: the setting {name} was written and is not there")
    return value
