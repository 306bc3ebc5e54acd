"""Whatever happens to nodes and links: after quiet all nodes hold the union of what the owners hold."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.cluster.replicas import Cluster
from xmppd.cluster import snapshots
from xmppd.cluster.tables import SessionRow

NODES = 4
numbers = st.integers(0, NODES - 1)
jids = st.sampled_from([f"{user}@{host}/{r}" for user in ("a", "ü") for host in ("x.org", "y.org") for r in "pqrs"])
priorities = st.none() | st.integers(-128, 127)
picks = st.integers(0, 30)
happenings = st.one_of(
    st.tuples(st.just("bind"), numbers, jids, st.integers(1, 50), st.booleans()),
    st.tuples(st.just("priority"), numbers, picks, priorities),
    st.tuples(st.just("close"), numbers, picks),
    st.tuples(st.just("serve"), numbers, st.sampled_from(["x.org", "rooms.x.org"])),
    st.tuples(st.just("unserve"), numbers, picks),
    st.tuples(st.just("start"), numbers),
    st.tuples(st.just("kill"), numbers),
    st.tuples(st.just("cut"), numbers, numbers),
    st.tuples(st.just("heal"), numbers, numbers),
    st.tuples(st.just("steps"), st.integers(1, 60)),
    st.tuples(st.just("wait"), st.floats(0, 10)),
    st.tuples(st.just("look"), numbers),
)


@pytest.fixture(autouse=True)
def small_snapshots():
    """So that snapshots have many pieces, and more of them than may be on their way."""
    before = snapshots.PIECE_ROWS, snapshots.WINDOW
    snapshots.PIECE_ROWS, snapshots.WINDOW = 1, 2
    yield
    snapshots.PIECE_ROWS, snapshots.WINDOW = before


class World:
    def __init__(self, seed):
        self.cluster = Cluster(seed)
        self.bound: list[SessionRow] = []
        self.ways = {}
        for number in range(2):
            self.cluster.start(number)

    def do(self, what, *args):
        if what in ("steps", "wait"):
            getattr(self.cluster.net, what)(*args)
        elif what == "lose":
            self.cluster.net.lose()
        elif what == "start":
            if args[0] not in self.cluster.nodes:
                self.cluster.start(*args)
        elif what in ("cut", "heal"):
            one, other = (bytes((number,)) * 16 for number in args)
            if one != other:
                getattr(self.cluster.net, what)(one, other)
        elif args[0] in self.cluster.nodes:
            if what == "kill":
                self.cluster.kill(args[0])
            else:
                getattr(self, what)(self.cluster.nodes[args[0]], *args[1:])

    def bind(self, node, jid, at, anonymous):
        self.bound.append(node.bind(jid, at, anonymous=anonymous))

    def priority(self, node, pick, priority):
        if node.live:
            node.table.set_priority(node.live[pick % len(node.live)], priority)

    def close(self, node, pick):
        if node.live:
            node.close(node.live[pick % len(node.live)])

    def serve(self, node, domain):
        if node.routes.local(domain) is None:
            self.ways.setdefault(node, []).append(node.serve(domain))

    def unserve(self, node, pick):
        ways = self.ways.get(node)
        if ways:
            node.routes.remove(ways.pop(pick % len(ways)))

    def look(self, node):
        """Whatever state it is in: a look-up says what the table holds, and of one full JID the newest."""
        table = node.table
        newest = {}
        for row in table.all():
            key = (row.bound_at, row.owner.member)
            newest[row.jid.full] = max(newest.get(row.jid.full, (0, b"")), key)
        seen = node.seen()
        assert {full: (at, owner.member) for full, (owner, at, _, _) in seen.items()} == newest
        for row in node.live:  # nothing elsewhere is newer, else it would have gone
            assert seen[row.jid.full] == (row.owner, row.bound_at, row.priority, row.anonymous)
        for row in table.all():
            if row.owner != node.owner:
                assert row.owner.member in table.nodes_of(row.jid.bare)


def run(seed, happenings):
    world = World(seed)
    for happening in happenings:
        world.do(*happening)
    return world


def check_losers(world):
    """Who lost its address lost it once, and to somebody later."""
    for row in world.bound:
        assert row.session.ended <= 1
        if row.session.ended:
            rivals = [other for other in world.bound if other.jid == row.jid and other is not row]
            assert any((o.bound_at, o.owner.member) > (row.bound_at, row.owner.member) for o in rivals)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**32), st.lists(happenings, max_size=60))
def test_after_quiet_all_nodes_hold_what_the_owners_hold(seed, happenings):
    world = run(seed, happenings)

    world.cluster.quiet()

    world.cluster.check()
    check_losers(world)
    assert all(node.replica.resyncs == 0 for node in world.cluster.nodes.values())


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**32), st.lists(happenings | st.tuples(st.just("lose")), max_size=60))
def test_frames_that_nobody_could_handle_are_made_good(seed, happenings):
    world = run(seed, happenings)

    world.cluster.quiet(periods=8)

    world.cluster.check()
    check_losers(world)
