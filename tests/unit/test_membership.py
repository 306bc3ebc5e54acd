"""What two nodes tell each other before they join, the members' copy on disk, and who may start where."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest

from xmppd.cluster import claim as claiming
from xmppd.cluster import refusals, survey
from xmppd.cluster.claim import claim
from xmppd.cluster.hello import Card, differences
from xmppd.cluster.membership import Copy, Departure, Member, Membership
from xmppd.cluster.probe import Finding, Probe
from xmppd.errors import NodeIdInUse, NodeRemoved, WrongDatabase
from xmppd.storage.members import DatabaseIdentity, NodeRow

MINE = Card(
    node=b"1" * 16,
    name="xmppd@node01",
    address="192.0.2.1:4369",
    version="1.0",
    protocol=3,
    hosts=("example.net", "localhost"),
    cluster=b"c" * 16,
    database=b"d" * 16,
    node_local=False,
    machine=b"m" * 16,
    state="single",
    time=1000.0,
)
OTHER = replace(MINE, node=b"2" * 16, name="xmppd@node02", address="192.0.2.2:4369", machine=b"n" * 16)


def test_two_nodes_of_one_database_and_version_fit():
    assert list(differences(MINE, OTHER)) == []


@pytest.mark.parametrize(
    ("mine", "other", "code", "words"),
    [
        ({}, {"node": b"1" * 16}, refusals.SELF, "its data folder was copied"),
        ({}, {"protocol": 5}, refusals.OTHER_VERSION, "protocol 5"),
        ({}, {"protocol": 1}, refusals.OTHER_VERSION, "upgrade the older one"),
        ({}, {"hosts": ("localhost",)}, refusals.OTHER_HOSTS, "only here: example.net"),
        ({}, {"hosts": ("localhost", "example.net", "x.org")}, refusals.OTHER_HOSTS, "only there: x.org"),
        ({"node_local": True}, {}, refusals.NODE_LOCAL_DATABASE, "this node keeps its data in an SQLite file"),
        ({}, {"node_local": True}, refusals.NODE_LOCAL_DATABASE, "xmppd@node02 keeps its data in an SQLite file"),
        ({}, {"database": b"e" * 16}, refusals.OTHER_DATABASE, "another database"),
        ({}, {"database": b""}, refusals.OTHER_DATABASE, "does not answer xmppd@node02"),
        ({"state": "removed"}, {}, refusals.REMOVED, "this node was removed"),
    ],
)
def test_each_difference_has_its_own_code_and_words(mine, other, code, words):
    (refusal,) = differences(replace(MINE, **mine), replace(OTHER, **other))

    assert refusal.code == code
    assert words in refusal.text


@pytest.mark.parametrize("step", [-1, 0, 1])
def test_one_step_of_the_protocol_apart_is_understood(step):
    assert list(differences(MINE, replace(OTHER, protocol=MINE.protocol + step))) == []


def test_processes_of_one_machine_may_share_a_file():
    local = {"node_local": True, "machine": b"m" * 16}

    assert list(differences(replace(MINE, **local), replace(OTHER, **local))) == []


def test_all_refusals_have_codes_of_their_own():
    codes = [value for name, value in vars(refusals).items() if name.isupper()]

    assert len(codes) == len(set(codes))
    assert all(10 <= code <= 29 for code in codes)


def test_a_card_survives_the_way():
    assert Card.from_json(MINE.as_json()) == MINE


@pytest.mark.parametrize("said", [None, [], {}, {**MINE.as_json(), "node": "zz"}, {**MINE.as_json(), "time": "soon"}])
def test_what_is_no_card_is_refused(said):
    with pytest.raises(ValueError, match="not what a node says"):
        Card.from_json(said)


# -- test_node, without a net


@pytest.mark.parametrize(
    ("broken", "check"),
    [
        ({"protocol": 9}, "version"),
        ({"hosts": ("localhost",)}, "hosts"),
        ({"database": b"e" * 16}, "database"),
        ({"node_local": True}, "database"),
        ({"time": 1003.0}, "clock"),
    ],
)
async def test_test_node_fails_the_one_check_that_is_broken(broken, check):
    card = replace(OTHER, **broken)

    async def nothing(*_: Any, **__: Any) -> None: ...

    async def ask(name: str, **_: Any) -> Card:
        return card

    async def probe(name: str) -> Probe:
        return Probe(Finding.OK, "", ("192.0.2.2:4369",), "192.0.2.2:4369", 0.001, OTHER.node)

    cluster: Any = SimpleNamespace(
        refresh=nothing,
        wake=nothing,
        route_to=nothing,
        ask=ask,
        card=lambda: MINE,
        skews={OTHER.node: card.time - MINE.time},
        engine=SimpleNamespace(probe=probe),
        membership=Membership(MINE.node, Memory()),
        me=SimpleNamespace(node=MINE.node, name=MINE.name),
    )

    found = [each async for each in survey.test(cluster, OTHER.name)]

    assert [each.name for each in found] == list(survey.CHECKS)
    assert [each.name for each in found if not each.ok] == [check]


# -- the copy


class Memory:
    """A data folder."""

    def __init__(self, text: str | None = None) -> None:
        self.text = text

    def read_members(self) -> str | None:
        return self.text

    def write_members(self, text: str) -> None:
        self.text = text


COPY = Copy(
    b"c" * 16, b"d" * 16, "removed", (Member(b"1" * 16, "a@b", "h:1"),), Departure("xmppd@node01", 1_000_000.0, "asked")
)


def test_the_copy_is_read_back_as_it_was_written():
    assert Copy.parse(COPY.text()) == COPY


@pytest.mark.parametrize("damage", [lambda t: t[:-10], lambda t: t.replace("a@b", "b@a"), lambda t: "{}", lambda t: ""])
def test_a_damaged_copy_counts_as_none(damage):
    membership = Membership(b"1" * 16, Memory(damage(COPY.text())))

    assert membership.copy == Copy()


# -- claim


def row(state: str = "single", **changes: Any) -> NodeRow:
    values: dict[str, Any] = {
        "node": b"1" * 16,
        "name": "xmppd@node01",
        "address": "",
        "state": state,
        "incarnation": 1,
        "version": "1",
        "hosts_hash": b"h" * 32,
        "joined_at": None,
        "left_at": None,
        "left_by": None,
        "left_why": None,
        "last_seen_at": None,
        "lease_left": 0.0,
        "wanted_ago": None,
    }
    return NodeRow(**{**values, **changes})


@dataclass
class Database:
    rows: Sequence[NodeRow]
    cluster: bytes = b"c" * 16

    async def identity(self) -> DatabaseIdentity:
        return DatabaseIdentity(self.cluster, b"d" * 16)

    async def all(self) -> Sequence[NodeRow]:
        return self.rows


async def start(copy: Copy, database: Any, register: Any = None) -> Membership:
    membership = Membership(b"1" * 16, Memory(copy.text()))

    async def plain() -> NodeRow:
        return next(each for each in database.rows if each.node == b"1" * 16)

    await claim(membership, database, register or plain, where="the database")
    return membership


async def test_a_member_finds_the_others_in_the_database():
    other = row("member", node=b"2" * 16, name="xmppd@node02", address="192.0.2.2:4369")

    membership = await start(Copy(), Database([row("member"), other]))

    assert [member.name for member in membership.others] == ["xmppd@node02"]
    assert membership.is_member(b"2" * 16)


async def test_a_single_node_may_move_to_another_database():
    membership = await start(Copy(b"x" * 16, b"y" * 16, "single"), Database([row()]))

    assert membership.copy.cluster == b"c" * 16


async def test_a_member_does_not_serve_from_the_database_of_another_cluster():
    with pytest.raises(WrongDatabase, match="belongs to the cluster 63636363, this node to 78787878"):
        await start(Copy(b"x" * 16, b"y" * 16, "member"), Database([row()]))


async def test_a_removed_node_does_not_serve_from_the_clusters_database():
    gone = row("removed", left_by="xmppd@node02", left_at=0.0, left_why="leave_cluster")

    with pytest.raises(NodeRemoved, match=r"by xmppd@node02 at 1970-01-01 00:00:00 UTC \(leave_cluster\)"):
        await start(Copy(b"c" * 16, b"d" * 16, "member"), Database([gone]))


async def test_a_removed_node_may_serve_alone_from_a_database_of_its_own():
    membership = await start(COPY, Database([row()], cluster=b"o" * 16))

    assert membership.state == "single"


async def test_a_node_waits_for_the_lease_of_a_process_that_may_have_died_elsewhere(monkeypatch):
    monkeypatch.setattr(claiming, "_LOOK", 0)
    tries = 0

    async def register() -> NodeRow:
        nonlocal tries
        tries += 1
        if tries < 4:
            raise NodeIdInUse("xmppd@node01", "", 10.0, 1.0)
        return row()

    await start(Copy(), Database([row()]), register)

    assert tries == 4


async def test_a_lease_that_is_renewed_meanwhile_shows_a_living_process(monkeypatch):
    monkeypatch.setattr(claiming, "_LOOK", 0)
    seen = iter(range(100))

    async def register() -> NodeRow:
        raise NodeIdInUse("xmppd@node01", "192.0.2.1:4369", float(next(seen)), 5.0)

    async with asyncio.timeout(5):
        with pytest.raises(NodeIdInUse, match=r"two nodes claim one node id: xmppd@node01 at 192\.0\.2\.1:4369"):
            await start(Copy(), Database([row()]), register)
