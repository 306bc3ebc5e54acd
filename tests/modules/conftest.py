"""A node without sockets, over SQLite, and over MariaDB for what stores."""

import asyncio
import shutil
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


@pytest.fixture(scope="session")
def sqlite_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with all tables and nothing in them, to be copied."""
    folder = tmp_path_factory.mktemp("template")

    async def make() -> None:
        storage = Storage(f"sqlite:///{folder}/xmppd.db", data_dir=folder)
        await storage.open()
        await storage.close()

    asyncio.run(make())
    return folder / "xmppd.db"


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
async def world(sqlite_file: Path, tmp_path: Path) -> AsyncIterator[World]:
    """Over SQLite."""
    shutil.copy(sqlite_file, tmp_path)
    async for world in _world(f"sqlite:///{tmp_path}/xmppd.db", tmp_path):
        yield world


@pytest.fixture(params=["sqlite", pytest.param("mariadb", marks=pytest.mark.mariadb)])
async def any_world(request: pytest.FixtureRequest, sqlite_file: Path, tmp_path: Path) -> AsyncIterator[World]:
    """Over each database."""
    if request.param == "sqlite":
        shutil.copy(sqlite_file, tmp_path)
        async for world in _world(f"sqlite:///{tmp_path}/xmppd.db", tmp_path):
            yield world
        return
    server = request.getfixturevalue("mariadb_for_modules")
    url = server.new_database()
    async for world in _world(url, tmp_path):
        yield world
    server.drop_database(url)
