"""One suite over both databases; each test has a fresh one."""

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from tests import mariadb
from xmppd.storage import Storage

BOTH = [pytest.param("sqlite"), pytest.param("mariadb", marks=pytest.mark.mariadb)]


@pytest.fixture(scope="session")
def mariadb_server() -> Iterator[mariadb.MariaDB]:
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


@pytest.fixture(params=BOTH)
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database, once for each kind."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/xmppd.db"
        return
    server = request.getfixturevalue("mariadb_server")
    url = server.new_database()
    yield url
    server.start()  # a test may have stopped it
    server.drop_database(url)


@pytest.fixture
def mariadb_database(mariadb_server: mariadb.MariaDB) -> Iterator[str]:
    url = mariadb_server.new_database()
    yield url
    mariadb_server.start()
    mariadb_server.drop_database(url)


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
async def storage(database: str, make_storage: Callable[..., Storage]) -> Storage:
    storage = make_storage(database)
    await storage.open()
    return storage
