"""Three real nodes with wires that can be cut, one person on each who writes to the others, and what is to hold."""

import asyncio
import re
import time
from collections.abc import Callable
from typing import Any, Final

from tests.harness.cluster import ClusterNode, RealCluster
from tests.harness.ledger import Ledger, Person
from tests.harness.wires import Wires

TIMEOUT: Final = 2.0  # seconds: cluster.peer_timeout
LOUD: Final = 6.0  # seconds: a `cluster.peer_timeout` that cannot be what told of a death
A_DOZEN: Final = 12  # lines that tell the story of an outage
HEALED: Final = 3.0  # seconds from the end of a cut until nobody notices it any more
PATIENCE: Final = 60.0  # seconds; what is waited for comes in one or two, unless the machine is busy
_CONVERGED: Final = "converged: yes"
_LINE: Final = re.compile(r"^\S+ (?:INFO|NOTE|WARN|ERROR|CRIT) +(\S+) +(.*)$", re.MULTILINE)


class Field:
    """`people` are juliet, romeo and nurse, on the nodes 0, 1 and 2."""

    def __init__(self, cluster: RealCluster, wires: Wires) -> None:
        self.cluster, self.wires, self.ledger = cluster, wires, Ledger(cluster)
        self.people: list[Person] = []
        self._marks: dict[str, int] = {}

    async def begin(self) -> None:
        names = ("juliet", "romeo", "nurse")
        self.people = await self.ledger.add(*zip(names, self.cluster, strict=False))

    async def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Something that blocks, beside the clients."""
        return await asyncio.to_thread(function, *arguments)

    # -- what the nodes say when they are asked

    def agree(self, *nodes: ClusterNode) -> bool:
        """Whether each of these nodes (all, unless named) sees the others up, with the same tables everywhere."""
        which = nodes or tuple(self.cluster)
        names = sorted(node.name for node in which)
        return all(
            sorted(node.quick("list_cluster").splitlines()) == names and _CONVERGED in node.quick("cluster_status")
            for node in which
        )

    def up(self, node: ClusterNode) -> list[str]:
        """The others as one node sees them."""
        return node.quick("nodes").splitlines()

    def rows(self, node: ClusterNode, of: ClusterNode) -> int:
        """How many sessions of another node one has in its table, as `cluster_status` says it."""
        for line in node.quick("cluster_status").splitlines():
            words = line.split()
            if words[:2] == [node.name, of.name]:
                return int(words[-1])
        raise AssertionError(f"{node.name} says nothing of {of.name}")

    # -- waiting

    async def until(self, condition: Callable[[], Any], what: str, patience: float = PATIENCE) -> float:
        """The same as the ledger's, for what blocks."""
        began = time.monotonic()
        while not await asyncio.to_thread(condition):
            assert time.monotonic() < began + patience, f"{what}: not within {patience} s"
            await asyncio.sleep(0.02)
        return time.monotonic() - began

    async def true_again(self) -> float:
        """Tables agree, and everybody sees everybody; how many seconds from now that took."""
        began = time.monotonic()
        await self.until(self.agree, "the tables agree")
        agreed = time.monotonic() - began
        await self.ledger.until(lambda: all(self.ledger.truth()), "presence is true again", PATIENCE)
        took = time.monotonic() - began
        print(f"tables after {agreed:.2f} s, presence after {took:.2f} s")
        return took

    async def accounts(self) -> int:
        """Everything has arrived, in order; how many more than once."""
        await self.ledger.pause()
        await self.ledger.settle(PATIENCE)
        repeated = self.ledger.check()
        print(f"{self.ledger.sent()} messages, {repeated} of them came again")
        return repeated

    # -- what operators read

    def mark(self) -> None:
        """What is logged from here on is the story."""
        self._marks = {node.name: len(node.log) for node in self.cluster}

    def told(self, node: ClusterNode) -> list[str]:
        """What an operator has read since `mark`; clients that come and go are another story."""
        found = _LINE.findall(node.log[self._marks.get(node.name, 0) :])
        return [line for part, line in found if not part.startswith(("c2s", "admin"))]

    def story(self, node: ClusterNode, *phrases: str) -> bool:
        """Whether an operator has read this (regular expressions), in this order."""
        lines = iter(self.told(node))
        return all(any(re.search(phrase, line) for line in lines) for phrase in phrases)

    async def until_told(self, node: ClusterNode, *phrases: str) -> None:
        """Wait until the whole story is in the log."""
        end = time.monotonic() + PATIENCE
        while not self.story(node, *phrases):
            assert time.monotonic() < end, f"{node.name} did not say {phrases} in that order:\n" + "\n".join(
                self.told(node)
            )
            await asyncio.sleep(0.02)

    # -- nodes that come and go

    async def start_with_person(self, node: ClusterNode) -> None:
        """Start a node, and let its person log in."""
        await self.run(node.start)
        for person in self.people:
            if person.node is node:
                await person.come()
