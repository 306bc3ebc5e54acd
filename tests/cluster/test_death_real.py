"""Real nodes that die, are cut off in silence, freeze and come back, while people write to each other all the time.

What is asserted comes from the ledger (tests/harness/ledger.py) and from `cluster_status` of every node."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from tests.harness.cluster import ClusterNode, RealCluster
from tests.harness.ledger import Ledger, Person
from tests.harness.wires import Wires

TIMEOUT = 2.0  # seconds: cluster.peer_timeout


class Field:
    """Three nodes with wires that can be cut, and one person on each."""

    def __init__(self, cluster: RealCluster, wires: Wires) -> None:
        self.cluster, self.wires, self.ledger = cluster, wires, Ledger(cluster)
        self.people: list[Person] = []

    async def begin(self) -> None:
        names = ("juliet", "romeo", "nurse")
        self.people = await self.ledger.add(*zip(names, self.cluster, strict=False))

    async def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Something that blocks, beside the clients."""
        return await asyncio.to_thread(function, *arguments)

    async def link(self, node: ClusterNode, other: ClusterNode, state: str, patience: float = 15.0) -> None:
        """Wait until one node says this of its link to another one."""
        end = time.monotonic() + patience
        while (said := await self.run(self.state, node, other)) != state:
            assert time.monotonic() < end, f"{node.name} says {said} of {other.name}, not {state}"

    @staticmethod
    def state(node: ClusterNode, other: ClusterNode) -> str:
        for line in node.quick("nodes").splitlines():
            fields = line.split("\t")
            if fields[0] == other.name:
                return fields[1]
        return ""

    async def true_again(self, within: float) -> None:
        """Tables agree, and everybody sees everybody, so many seconds from now."""
        began = time.monotonic()
        await self.run(lambda: self.cluster.converged(patience=within + 10))
        agreed = time.monotonic() - began
        await self.ledger.until(lambda: all(self.ledger.truth()), "presence is true again", within + 10)
        took = time.monotonic() - began
        assert took < within, f"tables after {agreed:.1f} s, presence after {took:.1f} s"


@pytest.fixture
async def field(real_cluster: Callable[..., RealCluster]) -> AsyncIterator[Callable[..., Any]]:
    made: list[Field] = []

    async def make(count: int = 3, **changes: Any) -> Field:
        cluster = real_cluster(count, start=False, cluster={"peer_timeout": TIMEOUT}, **changes)
        field = Field(cluster, Wires(cluster))
        made.append(field)
        await asyncio.to_thread(start, cluster)
        await field.begin()
        return field

    yield make
    for each in made:
        await each.ledger.end()
        await asyncio.to_thread(each.cluster.end)
        each.wires.close()


def start(cluster: RealCluster) -> None:
    cluster.start()
    cluster.join()
    cluster.converged()


async def test_after_a_kill_every_contact_hears_once_within_a_second(field):
    scene = await field()
    juliet, romeo, nurse = scene.people
    scene.ledger.begin([romeo, nurse])
    for person in (romeo, nurse):
        person.seen(juliet)
        person.presences.clear()

    began = time.monotonic()
    await scene.run(scene.cluster[0].kill)
    await scene.ledger.until(lambda: romeo.seen(juliet) and nurse.seen(juliet), "juliet is gone", 5)
    took = time.monotonic() - began
    await juliet.drop()
    began = time.monotonic()
    await juliet.come(scene.cluster[1])
    served = time.monotonic() - began
    await scene.ledger.until(lambda: all(scene.ledger.truth()), "juliet is back", 5)

    assert took < 2.0, took
    assert served < 2.0, served
    for person in (romeo, nurse):
        assert person.seen(juliet) == ["unavailable", "available"]
    await scene.ledger.pause()
    await scene.ledger.settle()
    scene.ledger.check()
