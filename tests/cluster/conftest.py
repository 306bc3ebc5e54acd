"""Clusters in memory, over SQLite, and over MariaDB for what stores."""

import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.cluster.command_net import Cluster
from tests.modules.conftest import mariadb_for_modules, sqlite_file
from xmppd.storage import Storage

__all__ = ["mariadb_for_modules", "sqlite_file"]


@pytest.fixture
async def cluster(sqlite_file: Path, tmp_path: Path) -> AsyncIterator[Cluster]:
    """Nodes that answer commands, none yet."""
    shutil.copy(sqlite_file, tmp_path)
    storage = Storage(f"sqlite:///{tmp_path}/xmppd.db", data_dir=tmp_path)
    await storage.open()
    cluster = Cluster(storage)
    try:
        yield cluster
    finally:
        await cluster.close()
        await storage.close()
