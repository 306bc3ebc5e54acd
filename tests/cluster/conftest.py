"""Fixtures of the cluster tests."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.command_net import Cluster
from tests.cluster.nats_nodes import Node
from tests.databases import Databases, opened
from tests.harness.cluster import RealCluster
from tests.harness.field import TIMEOUT, Field
from tests.harness.wires import Wires


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


@pytest.fixture
async def field(
    real_cluster: Callable[..., RealCluster], databases: Databases, tmp_path: Path
) -> AsyncIterator[Callable[..., Any]]:
    """`field()`; with `load=True` on MariaDB, as three processes that write a lot would only wait for each other's
    locks on one SQLite file. `clocks`: seconds by which the clock of each node is wrong."""
    made: list[Field] = []

    async def make(
        count: int = 3, *, load: bool = False, timeout: float = TIMEOUT, clocks: tuple[float, ...] = (), **changes: Any
    ) -> Field:
        if load:
            changes["database"] = await databases.migrated("mariadb", tmp_path)
        cluster = real_cluster(count, start=False, cluster={"peer_timeout": timeout}, **changes)
        for node, clock in zip(cluster, clocks, strict=False):
            node.clock = clock
        field = Field(cluster, Wires(cluster))
        made.append(field)
        await asyncio.to_thread(_start, cluster)
        await field.begin()
        field.mark()
        return field

    yield make
    for each in made:
        await each.ledger.end()
        await asyncio.to_thread(each.cluster.end)
        each.wires.close()
        databases.drop(each.cluster.database)


def _start(cluster: RealCluster) -> None:
    cluster.start()
    cluster.join()
    cluster.converged()
