"""Real nodes that die, are cut off in silence, freeze and come back, while people write to each other all the time.

What is asserted comes from the ledger (tests/harness/ledger.py) and from `cluster_status` of every node."""

import asyncio
import random
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.databases import Databases
from tests.harness.cluster import ClusterNode, RealCluster
from tests.harness.ledger import Ledger, Person
from tests.harness.wires import Wires

pytestmark = pytest.mark.long

TIMEOUT = 2.0  # seconds: cluster.peer_timeout
HEALED = 3.0  # seconds from the end of a cut until nobody notices it any more
CONVERGED = "converged: yes"


def story(node: ClusterNode, *lines: str) -> None:
    """What the operator of a node has read, in this order."""
    at = 0
    for line in lines:
        found = node.log.find(line, at)
        assert found >= 0, f"{node.name} did not say {line!r} (in that order)"
        at = found


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

    def agree(self, *nodes: ClusterNode) -> bool:
        """Whether each of these nodes (all, unless named) sees the others up, with the same tables everywhere."""
        which = nodes or tuple(self.cluster)
        names = sorted(node.name for node in which)
        return all(
            sorted(node.quick("list_cluster").splitlines()) == names and CONVERGED in node.quick("cluster_status")
            for node in which
        )

    def up(self, node: ClusterNode) -> list[str]:
        """The others as one node sees them."""
        return node.quick("nodes").splitlines()

    async def until(self, condition: Callable[[], Any], what: str, patience: float = 15.0) -> None:
        """The same as the ledger's, for what blocks."""
        end = time.monotonic() + patience
        while not await asyncio.to_thread(condition):
            assert time.monotonic() < end, what
            await asyncio.sleep(0.02)

    async def true_again(self, within: float = HEALED) -> None:
        """Tables agree, and everybody sees everybody, so many seconds from now; nothing is lost."""
        began = time.monotonic()
        await self.until(self.agree, "the tables agree")
        agreed = time.monotonic() - began
        await self.ledger.until(lambda: all(self.ledger.truth()), "presence is true again")
        took = time.monotonic() - began
        assert took < within, f"tables after {agreed:.1f} s, presence after {took:.1f} s"

    async def accounts(self) -> int:
        """Everything has arrived, in order; how many more than once."""
        await self.ledger.pause()
        await self.ledger.settle()
        return self.ledger.check()


@pytest.fixture
async def field(
    real_cluster: Callable[..., RealCluster], databases: Databases, tmp_path: Path
) -> AsyncIterator[Callable[..., Any]]:
    """`field()`; with `load=True` on MariaDB, as three processes that write a lot would only wait for each other's
    locks on one SQLite file."""
    made: list[Field] = []

    async def make(count: int = 3, *, load: bool = False, timeout: float = TIMEOUT, **changes: Any) -> Field:
        if load:
            changes["database"] = await databases.migrated("mariadb", tmp_path)
        cluster = real_cluster(count, start=False, cluster={"peer_timeout": timeout}, **changes)
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
        databases.drop(each.cluster.database)


def start(cluster: RealCluster) -> None:
    cluster.start()
    cluster.join()
    cluster.converged()


async def test_after_a_kill_every_contact_hears_once_and_long_before_silence_would_tell(field):
    """Some 0.8 s where the machine is idle; how much more here says little about xmppd."""
    scene = await field(timeout=6.0)
    juliet, romeo, nurse = scene.people
    scene.ledger.begin([romeo, nurse])
    before = {person.name: len(person.seen(juliet)) for person in (romeo, nurse)}

    def gone(person: Person) -> bool:
        return len(person.seen(juliet)) > before[person.name]

    began = time.monotonic()
    await scene.run(scene.cluster[0].kill)
    await scene.ledger.until(lambda: gone(romeo) and gone(nurse), "juliet is gone", 5)
    took = time.monotonic() - began
    await juliet.drop()
    began = time.monotonic()
    await juliet.come(scene.cluster[1])
    served = time.monotonic() - began
    await scene.ledger.until(lambda: all(scene.ledger.truth()), "juliet is back", 5)

    assert took < 4.0, took
    assert served < 4.0, served
    for person in (romeo, nurse):
        assert person.seen(juliet)[before[person.name] :] == ["unavailable", "available"]
    await scene.accounts()
    for node in (scene.cluster[1], scene.cluster[2]):
        story(
            node,
            "node down node=xmppd@node01",
            'reason="its process has gone"',
            "contacts told of lost sessions sessions=1 told=1",
        )


async def test_a_node_that_is_cut_off_in_silence_and_comes_back(field):
    scene = await field()
    juliet, romeo, nurse = scene.people
    scene.ledger.begin(scene.people)
    before = {person.name: len(person.seen(juliet)) for person in (romeo, nurse)}

    scene.wires.isolate(scene.cluster[0])
    await scene.ledger.until(
        lambda: not (juliet.sees(romeo) or juliet.sees(nurse) or romeo.sees(juliet) or nurse.sees(juliet)),
        "both sides take each other for gone",
        TIMEOUT + 4,
    )
    assert romeo.sees(nurse)
    assert nurse.sees(romeo)
    await asyncio.sleep(1)
    scene.wires.heal()

    await scene.true_again()
    for person in (romeo, nurse):
        assert person.seen(juliet)[before[person.name] :] == ["unavailable", "available"]
    await scene.accounts()
    await asyncio.sleep(0.2)
    story(
        scene.cluster[0],
        "node down node=xmppd@node02",
        "stanzas routed again node=xmppd@node02",
        "node up node=xmppd@node02",
        "tables synced node=xmppd@node02",
        "sessions shown to a node node=xmppd@node02",
    )


async def test_a_cut_between_two_of_three_nobody_notices(field):
    scene = await field()
    scene.ledger.begin(scene.people)
    before = {person.name: len(person.presences) for person in scene.people}

    for both in (True, False):
        scene.wires.cut(scene.cluster[0], scene.cluster[2], both=both)
        await asyncio.sleep(2 * TIMEOUT)
        assert [len(await scene.run(scene.up, node)) for node in scene.cluster] == [2, 2, 2]
        scene.wires.heal()
        await asyncio.sleep(0.5)
    scene.wires.isolate(scene.cluster[1])
    await asyncio.sleep(0.05)
    scene.wires.heal()

    await scene.true_again()
    for person in scene.people:
        person.look()
        assert person.presences[before[person.name] :] == []
    await scene.accounts()


@pytest.mark.mariadb
async def test_a_split_of_half_a_minute_under_load(field):
    scene = await field(load=True)
    scene.ledger.begin(scene.people, every=0.02)
    scene.wires.isolate(scene.cluster[0])
    await asyncio.sleep(30)
    scene.wires.heal()
    await scene.true_again()
    await scene.accounts()


@pytest.mark.mariadb
async def test_twenty_splits_in_a_row(field):
    dice = random.Random(5)
    scene = await field(load=True)
    scene.ledger.begin(scene.people)
    for _ in range(20):
        pattern = dice.choice(("isolate", "isolate", "pair", "one way"))
        one, other = dice.sample(list(scene.cluster), 2)
        if pattern == "isolate":
            scene.wires.isolate(one)
        else:
            scene.wires.cut(one, other, both=pattern == "pair")
        await asyncio.sleep(dice.choice((0.05, 0.5, TIMEOUT, TIMEOUT + 1, TIMEOUT + 2)))
        scene.wires.heal()
        await scene.true_again()
    await scene.accounts()


async def test_a_node_that_is_frozen_for_twenty_seconds(field):
    """Its people are gone for the others and the others for them; they may write to each other all the same."""
    scene = await field()
    juliet, romeo, nurse = scene.people
    scene.ledger.begin([romeo, nurse])
    before = {person.name: len(person.seen(juliet)) for person in (romeo, nurse)}
    for person in (romeo, nurse):
        scene.ledger.write(juliet, person)

    scene.cluster[0].send_signal(signal.SIGSTOP)
    await scene.ledger.until(lambda: not (romeo.sees(juliet) or nurse.sees(juliet)), "juliet is gone", TIMEOUT + 4)
    for person in (romeo, nurse):
        for _ in range(20):
            scene.ledger.write(person, juliet)
    await asyncio.sleep(20)
    scene.cluster[0].send_signal(signal.SIGCONT)

    await scene.true_again(within=6)
    for person in (romeo, nurse):
        assert person.seen(juliet)[before[person.name] :] == ["unavailable", "available"]
    await scene.accounts()


async def test_two_nodes_that_die_at_once(field):
    scene = await field()
    juliet, romeo, nurse = scene.people
    before = {person.name: len(nurse.seen(person)) for person in (juliet, romeo)}

    for node in (scene.cluster[0], scene.cluster[1]):
        node.send_signal(signal.SIGKILL)
    await scene.ledger.until(lambda: not (nurse.sees(juliet) or nurse.sees(romeo)), "both are gone", 5)

    for person in (juliet, romeo):
        assert nurse.seen(person)[before[person.name] :] == ["unavailable"]
        await person.drop()
    for node in (scene.cluster[0], scene.cluster[1]):
        await scene.run(node.kill)
        await person_come(scene, node)
    await scene.true_again(within=10)
    await scene.accounts()


async def person_come(scene: Field, node: ClusterNode) -> None:
    """Start a node, and let its person log in."""
    await scene.run(node.start)
    for person in scene.people:
        if person.node is node:
            await person.come()


async def test_all_nodes_start_again_in_any_order(field):
    scene = await field()
    for seed in range(3):
        dice = random.Random(seed)
        for person in scene.people:
            await person.leave()
        for node in dice.sample(list(scene.cluster), 3):
            await scene.run(dice.choice((node.stop, node.kill)))
        for node in dice.sample(list(scene.cluster), 3):
            await person_come(scene, node)
        await scene.true_again(within=10)
        scene.ledger.begin(scene.people)
        await asyncio.sleep(1)
        await scene.accounts()
