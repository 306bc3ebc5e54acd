"""Fixtures of the cluster tests."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.command_net import Cluster
from tests.cluster.nats_nodes import Node
from xmppd.storage import Storage


@pytest.fixture
async def make_node(tmp_path: Path) -> AsyncIterator[Callable[..., Node]]:
    nodes: list[Node] = []

    def make(name: str = "", **options: Any) -> Node:
        nodes.append(Node(tmp_path / (name or f"node{len(nodes) + 1}"), **options))
        return nodes[-1]

    yield make
    await asyncio.gather(*(node.engine.stop() for node in nodes))


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
    """Nodes that answer commands, none yet."""
    shutil.copy(empty_database, tmp_path)
    storage = Storage(f"sqlite:///{tmp_path}/xmppd.db", data_dir=tmp_path)
    await storage.open()
    cluster = Cluster(storage)
    try:
        yield cluster
    finally:
        await cluster.close()
        await storage.close()
