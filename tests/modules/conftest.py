"""A node without sockets, over SQLite, and over MariaDB for what stores."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests import mariadb
from tests.modules.world import World
from xmppd.storage import Storage


@pytest.fixture(scope="session")
def mariadb_for_modules() -> Iterator[mariadb.MariaDB]:
    why = mariadb.missing()
    if why is not None:
        if mariadb.required():
            pytest.fail(f"{why}, and XMPPD_REQUIRE_MARIADB=1 asks for it")
        pytest.skip(why)
    server = mariadb.MariaDB()
    try:
        yield server
    finally:
        server.destroy()


async def _world(url: str, folder: Path) -> AsyncIterator[World]:
    storage = Storage(url, data_dir=folder)
    await storage.open()
    try:
        world = World(storage)
        yield world
        await world.close()
    finally:
        await storage.close()


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """Over SQLite."""
    async for world in _world(f"sqlite:///{tmp_path}/xmppd.db", tmp_path):
        yield world


@pytest.fixture(params=["sqlite", pytest.param("mariadb", marks=pytest.mark.mariadb)])
async def any_world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    """Over each database."""
    if request.param == "sqlite":
        async for world in _world(f"sqlite:///{tmp_path}/xmppd.db", tmp_path):
            yield world
        return
    server = request.getfixturevalue("mariadb_for_modules")
    url = server.new_database()
    async for world in _world(url, tmp_path):
        yield world
    server.drop_database(url)
