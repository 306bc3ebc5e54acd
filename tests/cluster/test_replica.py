"""The replica: snapshots, deltas, digests and repairs, over a cluster on paper."""

from collections import deque

import pytest

from tests.cluster.replicas import PERIOD, Cluster
from xmppd.cluster import snapshots
from xmppd.cluster.frames import varint
from xmppd.cluster.interfaces import Kind
from xmppd.cluster.packed import row_bytes
from xmppd.cluster.shared import Owner, SharedTable
from xmppd.cluster.tables import SessionRow, pack_session
from xmppd.cluster.turns import Turns
from xmppd.protocol.jid import parse


def value(at=1, priority=0):
    row = SessionRow(parse("x@x.org/x"), Owner(bytes(16), 0, 1), at)
    row.priority = priority
    return pack_session(row)


def bound(cluster, number, count=3):
    node = cluster.nodes[number]
    rows = [node.bind(f"user{index}@node{number}.org/phone", index + 1) for index in range(count)]
    for row in rows:
        node.table.set_priority(row, 5)
    cluster.net.settle()
    return rows


def test_a_newcomer_and_those_who_are_there_get_each_others_rows():
    cluster = Cluster(size=2)
    bound(cluster, 0)
    bound(cluster, 1)
    told = []

    newcomer = cluster.start(2)
    newcomer.bind("early@node2.org/phone", 7)
    newcomer.replica.on_synced.append(lambda peer: told.append(peer.name))
    cluster.net.settle()

    cluster.check()
    assert sorted(told) == ["xmppd@node0", "xmppd@node1"]
    for node in cluster.nodes.values():
        for other in cluster.nodes.values():
            assert node is other or (node.replica.synced(other.id) and node.replica.known_to(other.id))
    assert not newcomer.replica.synced(b"nobody's id, no.")
    assert not newcomer.replica.known_to(newcomer.id)


def test_a_change_is_one_frame_and_none_when_nobody_is_there():
    cluster = Cluster(size=1)
    bound(cluster, 0)
    assert cluster.nodes[0].replica.status().deltas_sent == 0
    cluster.start(1)
    cluster.net.settle()

    row = cluster.nodes[0].bind("late@node0.org/phone", 9)
    cluster.nodes[0].table.set_priority(row, 5)
    cluster.nodes[0].table.set_priority(row, 5)  # no change
    cluster.net.settle()

    assert cluster.nodes[0].replica.status().deltas_sent == 2
    assert cluster.nodes[1].replica.status().deltas_applied == 2
    cluster.check()


def test_a_node_that_is_gone_takes_its_rows_along():
    cluster = Cluster(size=2)
    bound(cluster, 0)
    gone = []
    cluster.nodes[1].table.on_vanished.append(lambda owner, rows: gone.extend(row.jid.local for row in rows))

    cluster.kill(0)
    cluster.net.settle()

    assert sorted(gone) == ["user0", "user1", "user2"]
    assert cluster.nodes[1].table.count() == 0
    assert cluster.nodes[1].replica.status().peers == ()


def test_a_row_that_goes_while_the_snapshot_is_under_way_does_not_come_back(monkeypatch):
    monkeypatch.setattr(snapshots, "PIECE_ROWS", 2)
    for seed in range(30):
        cluster = Cluster(seed, size=1)
        rows = bound(cluster, 0, 12)
        cluster.start(1)
        cluster.net.steps(5 + seed)
        for row in rows[3:9]:
            cluster.nodes[0].close(row)
        cluster.quiet()
        cluster.check()
        assert cluster.nodes[1].replica.status().resyncs == 0


# -- repairs


def wrong(table, owner):
    table.put(owner, "user1@node0.org", b"phone", value(2, -7))


def missing(table, owner):
    table.delete(owner, "user1@node0.org", b"phone")


def invented(table, owner):
    table.put(owner, "nobody@node0.org", b"phone", value())


@pytest.mark.parametrize("spoil", [wrong, missing, invented])
def test_a_corrupted_row_is_repaired_within_one_digest_period(spoil, caplog):
    cluster = Cluster(size=3)
    bound(cluster, 0)
    bound(cluster, 1)
    spoil(cluster.nodes[2].table, cluster.nodes[0].owner)

    cluster.net.wait(PERIOD)

    cluster.check()
    status = cluster.nodes[2].replica.status()
    assert status.resyncs == 1
    assert cluster.nodes[1].replica.status().resyncs == 0
    assert "tables differ" in caplog.text
    assert "cause=session" in caplog.text


def test_status_says_who_differs_until_the_repair():
    cluster = Cluster(size=2)
    bound(cluster, 0)
    wrong(cluster.nodes[1].table, cluster.nodes[0].owner)
    cluster.net.cut(*(node.id for node in cluster.nodes.values()))
    cluster.net.settle()
    cluster.net.heal_all()
    cluster.net.settle()  # a new snapshot: all is well
    wrong(cluster.nodes[1].table, cluster.nodes[0].owner)

    ours, theirs = (cluster.nodes[number].replica.status() for number in (0, 1))

    assert theirs.peers[0].owner == ours.owner
    assert theirs.peers[0].version == ours.version
    assert theirs.peers[0].tables["session"] != ours.tables["session"]
    assert theirs.peers[0].tables["route"] == ours.tables["route"]


def test_a_lost_change_is_noticed_with_the_next_one():
    cluster = Cluster(size=2)
    rows = bound(cluster, 0)
    cluster.nodes[0].close(rows[0])
    cluster.net.lose()

    cluster.nodes[0].close(rows[1])
    cluster.net.settle()

    cluster.check()
    assert cluster.nodes[1].replica.status().resyncs == 1


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind <= Kind.SNAPSHOT_SEEN])
@pytest.mark.parametrize(
    "body", [b"", b"\xff", b"\xff" * 40, b"\x01", b"\x01\x01", b"\x01\x02\x01\x7f\xff", b"\x05\x01\x01\x03abc"]
)
def test_a_frame_that_makes_no_sense_does_no_lasting_harm(kind, body):
    cluster = Cluster(size=2)
    bound(cluster, 0)
    node = cluster.nodes[0]

    node.links.send(cluster.nodes[1].id, kind, body)
    cluster.quiet(periods=4)

    cluster.check()


def test_a_node_that_does_not_know_a_newer_nodes_table_goes_on():
    class Newer(SharedTable):
        number = 200
        name = "newer"

        def own_rows(self):
            yield "group", b"item", b"value"

    cluster = Cluster(size=1)
    bound(cluster, 0)
    node = cluster.nodes[0]
    table = Newer()
    table._own_changed("group", b"item", None, b"value")
    node.replica._tables[200] = table
    table.announce = node.replica._announce
    cluster.start(1)
    cluster.net.settle()

    table._own_changed("group", b"item", b"value", None)
    node.bind("late@node0.org/phone", 9)
    cluster.quiet()

    cluster.check()
    assert cluster.net.crashes == []
    assert cluster.nodes[1].replica.status().resyncs == 0


def test_newer_fields_of_a_row_are_kept_and_counted_in_the_digest():
    cluster = Cluster(size=2)
    ours, theirs = cluster.nodes[0], cluster.nodes[1]
    newer = value(3, 4) + b"newer fields"
    ours.table._own_changed("new@x.org", b"r", None, newer)
    cluster.net.settle()

    assert theirs.table.rows("new@x.org")["r"].priority == 4
    assert theirs.table.held(ours.owner) == ours.table.own
    ours.table._own_changed("new@x.org", b"r", newer, None)
    cluster.quiet()

    cluster.check()
    assert theirs.replica.status().resyncs == 0


def test_frames_of_an_earlier_start_are_not_heard():
    cluster = Cluster(size=2)
    node, old = cluster.nodes[1], cluster.nodes[0]
    bound(cluster, 0)
    cluster.kill(0)
    cluster.start(0)
    cluster.quiet()

    row = row_bytes("ghost@x.org", b"r", value())
    late = [
        (Kind.SNAPSHOT_BEGIN, varint(9) + varint(9)),
        (Kind.SNAPSHOT_ROWS, varint(9) + b"\x01" + row),
        (Kind.DELTA, varint(1) + b"\x01\x01" + row),
        (Kind.RESYNC, b""),
    ]
    for kind, body in late:
        node.links.handlers[kind](old.links.me, body)
    for handler in node.links.downs:
        handler(old.links.me, "late")
    cluster.net.settle()

    cluster.check()
    assert node.table.rows("ghost@x.org") == {}


def test_a_replica_that_was_stopped_says_nothing():
    cluster = Cluster(size=2)
    node = cluster.nodes[0]
    node.replica.stop()

    node.bind("late@node0.org/phone", 9)
    cluster.quiet()

    assert cluster.nodes[1].table.count() == 0
    assert node.replica.status().deltas_sent == 0


# -- in small pieces


def test_no_more_of_a_snapshot_is_on_its_way_than_the_window():
    cluster = Cluster(size=1)
    rows = 100 * snapshots.PIECE_ROWS
    for number in range(rows):
        cluster.nodes[0].bind(f"user{number}@node0.org/phone", 1)
    cluster.start(1)
    most = waiting = 0

    while events := cluster.net._events():
        cluster.net.random.choice(events)()
        for link in cluster.net._links.values():
            for queue in link.frames.values():
                pieces = [body for kind, body in queue if kind is Kind.SNAPSHOT_ROWS]
                assert all(len(body) <= snapshots.PIECE_BYTES for body in pieces)
                most = max(most, len(pieces))
        for incoming in cluster.nodes[1].replica._incoming.values():
            waiting = max(waiting, len(incoming.queue))

    assert cluster.nodes[1].table.count() == rows
    assert 0 < most <= snapshots.WINDOW
    assert 0 < waiting <= snapshots.WINDOW


def test_work_is_done_by_turns_and_a_little_at_a_time(caplog):
    now, soon, done = 0.0, deque(), []

    def step(name, count):
        left = [count]

        def run():
            nonlocal now
            now += 0.001
            done.append(name)
            left[0] -= 1
            return left[0] > 0

        return run

    def crash():
        raise RuntimeError("step")

    turns = Turns(soon.append, lambda: now, slice_=0.003)
    turns.add(crash)
    turns.add(step("long", 8))
    turns.add(step("short", 2))
    spans = []
    while soon:
        start = now
        soon.popleft()()
        spans.append(now - start)
        assert len(soon) <= 1

    assert "".join(name[0] for name in done) == "lslsllllll"
    assert max(spans) == pytest.approx(0.003)
    assert len(spans) == 4
    assert "task failed" in caplog.text
