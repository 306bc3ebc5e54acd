"""Nodes that share a database."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.cluster.command_net import Cluster
from xmppd.storage import Storage


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with all tables and nothing in them, to be copied."""
    folder = tmp_path_factory.mktemp("template")

    async def make() -> None:
        storage = Storage(f"sqlite:///{folder}/xmppd.db", data_dir=folder)
        await storage.open()
        await storage.close()

    asyncio.run(make())
    return folder / "xmppd.db"


@pytest.fixture
async def cluster(empty_database: Path, tmp_path: Path) -> AsyncIterator[Cluster]:
    shutil.copy(empty_database, tmp_path)
    storage = Storage(f"sqlite:///{tmp_path}/xmppd.db", data_dir=tmp_path)
    await storage.open()
    cluster = Cluster(storage)
    try:
        yield cluster
    finally:
        await cluster.close()
        await storage.close()
