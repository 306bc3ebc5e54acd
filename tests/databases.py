"""Databases for tests: empty, or with all tables and nothing in them, of either kind."""

import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests import mariadb
from xmppd.storage import Storage

BOTH = [pytest.param("sqlite"), pytest.param("mariadb", marks=pytest.mark.mariadb)]


class Databases:
    """`server` starts MariaDB when it is first wanted. Who asks for a MariaDB database drops it."""

    def __init__(self, folder: Path, server: Callable[[], mariadb.MariaDB]) -> None:
        self._folder = folder
        self._server = server
        self._templates: dict[str, str] = {}  # by kind: migrating anew for each test takes too long

    def empty(self, kind: str, folder: Path) -> str:
        """Its URL."""
        return _sqlite(folder) if kind == "sqlite" else self._server().new_database()

    async def migrated(self, kind: str, folder: Path) -> str:
        """The URL of one that a node of this version has made and left."""
        url = self.empty(kind, folder)
        await self.migrate(url)
        return url

    async def migrate(self, url: str) -> None:
        """Give an empty one its tables."""
        kind = "sqlite" if url.startswith("sqlite") else "mariadb"
        if kind not in self._templates:
            self._templates[kind] = self.empty(kind, self._folder)
            async with opened(self._templates[kind], self._folder):
                pass
        template = self._templates[kind]
        if kind == "sqlite":
            shutil.copy(template.removeprefix("sqlite:///"), url.removeprefix("sqlite:///"))
        else:
            self._server().copy_schema(template, url)

    def drop(self, url: str) -> None:
        if not url.startswith("sqlite"):
            self._server().start()  # a test may have stopped it
            self._server().drop_database(url)


def _sqlite(folder: Path) -> str:
    return f"sqlite:///{folder}/xmppd.db"


@asynccontextmanager
async def opened(url: str, folder: Path) -> AsyncIterator[Storage]:
    storage = Storage(url, data_dir=folder)
    await storage.open()
    try:
        yield storage
    finally:
        await storage.close()
