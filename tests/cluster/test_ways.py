"""What the log says of the ways to other nodes."""

import pytest

from tests.cluster.sim import Sim


@pytest.fixture
def sim(caplog):
    """Three nodes that see each other."""
    caplog.set_level("INFO", "xmppd.cluster")
    sim = Sim()
    sim.add("one", "two", "three")
    sim.run_until(sim.all_up)
    sim.run(3)
    caplog.clear()
    return sim


def said(caplog):
    return [record.getMessage() for record in caplog.records if "reached" in record.getMessage()]


def test_a_way_around_a_cut_is_told_once_and_so_is_its_end(sim, caplog):
    sim.cut("one", "three")
    sim.run(30)

    assert sorted(said(caplog)) == [
        "node reached through another node=one via=two",
        "node reached through another node=three via=two",
    ]
    caplog.clear()
    sim.heal()
    sim.run(30)

    assert sorted(said(caplog)) == ["node reached directly again node=one", "node reached directly again node=three"]


def test_of_a_node_that_is_cut_off_from_all_no_way_is_told(sim, caplog):
    sim.cut("one", "three")
    sim.cut("two", "three")
    sim.run(30)
    sim.heal()
    sim.run(30)

    assert said(caplog) == []


def test_a_way_that_is_told_ends_with_the_node(sim, caplog):
    sim.cut("one", "three")
    sim.run(10)
    caplog.clear()
    sim.kill("three")
    sim.run(10)

    assert said(caplog) == []
