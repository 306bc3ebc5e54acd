"""A node without sockets, over SQLite, and over MariaDB for what stores."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.databases import BOTH, Databases, opened
from tests.modules.world import World
from tests.storage import proxy_rules


@pytest.fixture(autouse=True)
def _every_statement_is_one_that_proxies_know() -> Iterator[None]:
    with proxy_rules.watched() as broken:
        yield
    assert not broken


@pytest.fixture
async def sqlite_url(databases: Databases, tmp_path: Path) -> str:
    """A database with all tables and nothing in them."""
    return await databases.migrated("sqlite", tmp_path)


@pytest.fixture(params=BOTH)
async def any_url(request: pytest.FixtureRequest, databases: Databases, tmp_path: Path) -> AsyncIterator[str]:
    """The same, once for each kind of database."""
    url = await databases.migrated(request.param, tmp_path)
    yield url
    databases.drop(url)


@pytest.fixture
async def world(sqlite_url: str, tmp_path: Path) -> AsyncIterator[World]:
    """Over SQLite."""
    async with opened(sqlite_url, tmp_path) as storage, World(storage) as world:
        yield world


@pytest.fixture
async def any_world(any_url: str, tmp_path: Path) -> AsyncIterator[World]:
    """Over each database."""
    async with opened(any_url, tmp_path) as storage, World(storage) as world:
        yield world
