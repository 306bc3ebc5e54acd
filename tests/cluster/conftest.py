"""Nodes that share a database."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.cluster.command_net import Cluster
from xmppd.storage import Storage


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    storage = Storage(f"sqlite:///{tmp_path}/xmppd.db", data_dir=tmp_path)
    await storage.open()
    cluster = Cluster(storage)
    try:
        yield cluster
    finally:
        await cluster.close()
        await storage.close()
