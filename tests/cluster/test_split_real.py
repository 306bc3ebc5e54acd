"""Real nodes that are cut off from each other in silence and see each other again, while people write all the time.

What is asserted comes from the ledger (tests/harness/ledger.py) and from `cluster_status` of every node."""

import asyncio
import random
import statistics

import pytest

from tests.harness.field import A_DOZEN, HEALED, PATIENCE, TIMEOUT

# As in test_death_real.py.
pytestmark = [pytest.mark.long, pytest.mark.alone]


async def test_a_node_that_is_cut_off_in_silence_and_comes_back(field):
    """How soon is that of the best of three, as the machine may be busy with something else."""
    scene = await field()
    juliet, romeo, nurse = scene.people
    scene.ledger.begin(scene.people)
    gone, healed = [], []
    for _ in range(3):
        before = {person.name: len(person.seen(juliet)) for person in (romeo, nurse)}
        scene.mark()
        scene.wires.isolate(scene.cluster[0])
        gone.append(
            await scene.ledger.until(
                lambda: not (juliet.sees(romeo) or juliet.sees(nurse) or romeo.sees(juliet) or nurse.sees(juliet)),
                "both sides take each other for gone",
                PATIENCE,
            )
        )
        assert romeo.sees(nurse)
        assert nurse.sees(romeo)
        await asyncio.sleep(1)
        scene.wires.heal()
        healed.append(await scene.true_again())
        for person in (romeo, nurse):
            assert person.seen(juliet)[before[person.name] :] == ["unavailable", "available"]
        for node in scene.cluster.nodes[1:]:
            assert await scene.run(scene.rows, node, scene.cluster[0]) == 1
        await scene.until_told(
            scene.cluster[0],
            "node down node=xmppd@node02 .* reason=.silent for 2.0 s",
            "stanzas routed again node=xmppd@node02",
            "node up node=xmppd@node02",
            "tables synced node=xmppd@node02",
            "sessions shown to a node node=xmppd@node02",
        )
        if min(gone) < TIMEOUT + 1 and min(healed) < HEALED:
            break

    print("gone after", gone, "healed after", healed)
    assert min(gone) < TIMEOUT + 1, gone
    assert min(healed) < HEALED, healed
    await scene.accounts()


@pytest.mark.parametrize("both", [True, False], ids=["both ways", "one way"])
async def test_a_cut_between_two_of_three_nobody_notices(field, both):
    scene = await field()
    scene.ledger.begin(scene.people)
    before = {person.name: len(person.presences) for person in scene.people}

    scene.wires.cut(scene.cluster[0], scene.cluster[2], both=both)
    await scene.until_told(scene.cluster[0], "node reached through another node=xmppd@node03 via=xmppd@node02")
    await asyncio.sleep(2 * TIMEOUT)
    assert [len(await scene.run(scene.up, node)) for node in scene.cluster] == [2, 2, 2]
    scene.wires.heal()
    await scene.until_told(scene.cluster[0], "node reached directly again node=xmppd@node03")

    await scene.true_again()
    for person in scene.people:
        person.look()
        assert person.presences[before[person.name] :] == []
    assert await scene.accounts() == 0


async def test_a_blink_of_fifty_milliseconds_nobody_notices(field):
    scene = await field()
    scene.ledger.begin(scene.people)
    before = {person.name: len(person.presences) for person in scene.people}

    for _ in range(5):
        for node in scene.cluster:
            scene.wires.isolate(node)
            await asyncio.sleep(0.05)
            scene.wires.heal()
            await asyncio.sleep(0.2)

    await scene.true_again()
    for person in scene.people:
        person.look()
        assert person.presences[before[person.name] :] == []
    assert await scene.accounts() == 0


async def test_a_node_that_speaks_and_hears_nothing_is_gone_for_all(field):
    """No member could relay what is meant for it."""
    scene = await field()
    juliet, romeo, nurse = scene.people
    scene.ledger.begin(scene.people)
    before = {person.name: len(person.seen(juliet)) for person in (romeo, nurse)}

    for other in scene.cluster.nodes[1:]:
        scene.wires.cut(other, scene.cluster[0], both=False)
    await scene.ledger.until(
        lambda: not (juliet.sees(romeo) or juliet.sees(nurse) or romeo.sees(juliet) or nurse.sees(juliet)),
        "both sides take each other for gone",
        PATIENCE,
    )
    assert romeo.sees(nurse)
    scene.wires.heal()

    await scene.true_again()
    for person in (romeo, nurse):
        assert person.seen(juliet)[before[person.name] :] == ["unavailable", "available"]
    await scene.accounts()


@pytest.mark.parametrize("clocks", [(), (6 * 3600.0, -6 * 3600.0)], ids=["right clocks", "wrong clocks"])
async def test_of_one_address_on_both_sides_the_newer_one_stays(field, clocks):
    scene = await field(clocks=clocks)
    juliet, romeo, nurse = scene.people
    scene.wires.isolate(scene.cluster[0])
    await scene.ledger.until(lambda: not (romeo.sees(juliet) or nurse.sees(juliet)), "juliet is gone", PATIENCE)
    older, juliet.client = juliet.client, None
    await juliet.come(scene.cluster[1])
    await scene.ledger.until(lambda: romeo.sees(juliet) and nurse.sees(juliet), "she is back elsewhere", PATIENCE)

    scene.wires.heal()
    assert (await older.wait_for(lambda got: got.name == "error", "conflict")).condition == "conflict"
    await older.close()
    await scene.true_again()

    assert await scene.run(scene.rows, scene.cluster[2], scene.cluster[0]) == 0
    assert await scene.run(scene.rows, scene.cluster[2], scene.cluster[1]) == 2
    scene.ledger.begin(scene.people)
    await scene.ledger.until(lambda: len(scene.ledger.arrived(nurse, juliet)) > 20, "they chat", PATIENCE)
    assert await scene.accounts() == 0


@pytest.mark.mariadb
async def test_a_split_of_half_a_minute_under_load(field):
    scene = await field(load=True)
    scene.ledger.begin(scene.people, every=0.02)
    scene.wires.isolate(scene.cluster[0])
    await asyncio.sleep(30)
    scene.wires.heal()

    assert await scene.true_again() < 3 * HEALED
    await scene.accounts()
    for node in scene.cluster:
        assert len(scene.told(node)) <= A_DOZEN, scene.told(node)


@pytest.mark.mariadb
async def test_twenty_splits_in_a_row(field):
    dice = random.Random(5)
    scene = await field(load=True)
    scene.ledger.begin(scene.people)
    healed = []
    for _ in range(20):
        pattern = dice.choice(("isolate", "isolate", "pair", "one way"))
        one, other = dice.sample(list(scene.cluster), 2)
        if pattern == "isolate":
            scene.wires.isolate(one)
        else:
            scene.wires.cut(one, other, both=pattern == "pair")
        await asyncio.sleep(dice.choice((0.05, 0.5, TIMEOUT, TIMEOUT + 1, TIMEOUT + 2)))
        scene.wires.heal()
        healed.append(await scene.true_again())
    assert statistics.median(healed) < HEALED, healed
    await scene.accounts()
