"""One suite over both databases; each test has a fresh one."""

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from tests.databases import BOTH, Databases
from tests.storage import proxy_rules
from xmppd.storage import Storage


@pytest.fixture(autouse=True)
def _every_statement_is_one_that_proxies_know() -> Iterator[None]:
    with proxy_rules.watched() as broken:
        yield
    assert not broken


@pytest.fixture(params=BOTH)
def database(request: pytest.FixtureRequest, databases: Databases, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database, once for each kind."""
    url = databases.empty(request.param, tmp_path)
    yield url
    databases.drop(url)


@pytest.fixture
def mariadb_database(databases: Databases, tmp_path: Path) -> Iterator[str]:
    url = databases.empty("mariadb", tmp_path)
    yield url
    databases.drop(url)


@pytest.fixture
async def make_storage(tmp_path: Path) -> AsyncIterator[Callable[..., Storage]]:
    """Storages that are closed after the test; the caller opens them."""
    made: list[Storage] = []

    def make(url: str, **options: object) -> Storage:
        storage = Storage(url, data_dir=tmp_path, **options)
        made.append(storage)
        return storage

    yield make
    for storage in made:
        await storage.close()


@pytest.fixture
async def storage(database: str, databases: Databases, make_storage: Callable[..., Storage]) -> Storage:
    """Open, migrated and empty."""
    await databases.migrate(database)
    storage = make_storage(database)
    await storage.open()
    return storage
