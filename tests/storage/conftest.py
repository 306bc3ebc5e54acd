"""One suite over both databases; each test has a fresh one."""

import shutil
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


@pytest.fixture(scope="session")
def templates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A migrated database of each kind, made when first asked for: migrating anew for each test takes too long."""
    return {}


@pytest.fixture
async def storage(
    request: pytest.FixtureRequest,
    database: str,
    templates: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
    make_storage: Callable[..., Storage],
) -> Storage:
    """Open, migrated and empty."""
    kind = database.split(":")[0]
    if kind not in templates:
        folder = tmp_path_factory.mktemp("template")
        url = f"sqlite:///{folder}/xmppd.db"
        if kind == "mysql":
            url = request.getfixturevalue("mariadb_server").new_database()
        template = Storage(url, data_dir=folder)
        await template.open()
        await template.close()
        templates[kind] = url
    if kind == "mysql":
        request.getfixturevalue("mariadb_server").copy_schema(templates[kind], database)
    else:
        shutil.copy(templates[kind].removeprefix("sqlite:///"), database.removeprefix("sqlite:///"))
    storage = make_storage(database)
    await storage.open()
    return storage
