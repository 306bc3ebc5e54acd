"""Clusters in memory, over SQLite, over MariaDB for what stores, and engines with real servers behind them."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.command_net import Cluster
from tests.cluster.nats_nodes import Node
from tests.modules.conftest import mariadb_for_modules, sqlite_file
from xmppd.storage import Storage

__all__ = ["mariadb_for_modules", "sqlite_file"]


@pytest.fixture
async def make_node(tmp_path: Path) -> AsyncIterator[Callable[..., Node]]:
    nodes: list[Node] = []

    def make(name: str = "", **options: Any) -> Node:
        nodes.append(Node(tmp_path / (name or f"node{len(nodes) + 1}"), **options))
        return nodes[-1]

    yield make
    await asyncio.gather(*(node.engine.stop() for node in nodes))


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
