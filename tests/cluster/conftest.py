"""Fixtures of the cluster tests."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.command_net import Cluster
from tests.cluster.nats_nodes import Node
from tests.databases import Databases, opened


@pytest.fixture
async def make_node(tmp_path: Path) -> AsyncIterator[Callable[..., Node]]:
    nodes: list[Node] = []

    def make(name: str = "", **options: Any) -> Node:
        nodes.append(Node(tmp_path / (name or f"node{len(nodes) + 1}"), **options))
        return nodes[-1]

    yield make
    await asyncio.gather(*(node.engine.stop() for node in nodes))


@pytest.fixture
async def cluster(databases: Databases, tmp_path: Path) -> AsyncIterator[Cluster]:
    """Nodes that share a database."""
    async with opened(await databases.migrated("sqlite", tmp_path), tmp_path) as storage:
        cluster = Cluster(storage)
        try:
            yield cluster
        finally:
            await cluster.close()
