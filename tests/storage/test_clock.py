"""The time of the cluster."""

import time

from tests.databases import opened
from tests.storage.test_members import registration
from xmppd.storage.clock import Clock
from xmppd.storage.members import Members


class Times:
    """A wall clock that is wrong by hours, and one that nobody can set."""

    def __init__(self, wrong_by: float) -> None:
        self.steady = 50.0
        self.wrong_by = wrong_by
        self.clock = Clock(lambda: self.right + self.wrong_by, lambda: self.steady)

    @property
    def right(self) -> float:
        return 1_800_000_000 + self.steady


def test_nodes_agree_once_they_have_asked_whatever_their_own_clocks_say():
    ahead, behind = Times(6 * 3600), Times(-6 * 3600)
    for node in (ahead, behind):
        assert abs(node.clock() - node.right) > 3600
        node.clock.learn(node.right, node.steady)
        node.steady += 100
        node.wrong_by = 99

    assert abs(ahead.clock() - ahead.right) < 0.001
    assert abs(behind.clock() - behind.right) < 0.001


def test_an_answer_that_took_long_changes_nothing_that_it_does_not_contradict():
    node = Times(0)
    node.clock.learn(node.right, node.steady)
    before = node.clock() - node.right

    node.clock.learn(node.right, node.steady - 3)
    assert node.clock() - node.right == before

    node.clock.learn(node.right + 10, node.steady - 3)
    assert abs(node.clock() - node.right - 10) < 0.001


async def test_whoever_looks_at_the_members_learns_the_time(databases, tmp_path, monkeypatch):
    wrong = Clock(lambda: time.time() - 6 * 3600)
    monkeypatch.setattr("xmppd.storage.members.clock", wrong)
    async with opened(await databases.migrated("sqlite", tmp_path), tmp_path) as storage:
        members = Members(storage)
        await members.look(b"n" * 16, b"i" * 16)  # there is no such row, and so no answer
        assert wrong() < time.time() - 3600

        await members.register(registration(), lease=5)

    assert abs(wrong() - time.time()) < 1
