"""Whatever happens to nodes and links: after quiet all nodes hold the union of what the owners hold."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.cluster.replicas import Cluster
from xmppd.cluster import snapshots
from xmppd.cluster.tables import SessionRow

NODES = 4
JIDS = [f"{user}@{host}/{r}" for user in ("a", "ü") for host in ("x.org", "y.org") for r in "pqrs"]
WEIGHTS = {
    "bind": 30,
    "priority": 25,
    "close": 15,
    "serve": 3,
    "unserve": 2,
    "start": 3,
    "kill": 2,
    "cut": 4,
    "heal": 6,
    "wait": 2,
    "look": 5,
}
seeds = st.integers(0, 2**32)
lengths = st.sampled_from((20, 60, 150))


@pytest.fixture(autouse=True)
def small_snapshots():
    """So that snapshots have many pieces, and more of them than may be on their way."""
    before = snapshots.PIECE_ROWS, snapshots.WINDOW
    snapshots.PIECE_ROWS, snapshots.WINDOW = 1, 2
    yield
    snapshots.PIECE_ROWS, snapshots.WINDOW = before


class World:
    """Random things happen to four nodes, while frames are on their way."""

    def __init__(self, seed, length, *, losing=False):
        self.cluster = Cluster(seed)
        self.random = self.cluster.net.random
        self.bound: list[SessionRow] = []
        for number in range(2):
            self.cluster.start(number)
        weights = WEIGHTS | {"lose": 3 * losing}
        for what in self.random.choices(list(weights), list(weights.values()), k=length):
            getattr(self, what)()
            self.cluster.net.steps(self.random.choice((0, 0, 1, 2, 4, 8, 30)))

    def a_node(self):
        return self.random.choice(list(self.cluster.nodes.values())) if self.cluster.nodes else None

    def a_row(self):
        node = self.a_node()
        return (node, self.random.choice(node.live)) if node and node.live else (None, None)

    def bind(self):
        if node := self.a_node():
            jid, at = self.random.choice(JIDS), self.random.randint(1, 50)
            self.bound.append(node.bind(jid, at, anonymous=self.random.random() < 0.2))

    def priority(self):
        node, row = self.a_row()
        if node:
            node.table.set_priority(row, self.random.choice((None, -128, -1, 0, 1, 127)))

    def close(self):
        node, row = self.a_row()
        if node:
            node.close(row)

    def serve(self):
        if node := self.a_node():
            node.serve(self.random.choice(("x.org", "rooms.x.org")))

    def unserve(self):
        if (node := self.a_node()) and node.ways:
            node.routes.remove(node.ways.pop(self.random.randrange(len(node.ways))))

    def start(self):
        number = self.random.randrange(NODES)
        if number not in self.cluster.nodes:
            self.cluster.start(number)

    def kill(self):
        if self.cluster.nodes:
            self.cluster.kill(self.random.choice(list(self.cluster.nodes)))

    def cut(self):
        self.cluster.net.cut(*self.two())

    def heal(self):
        self.cluster.net.heal(*self.two())

    def two(self):
        return (bytes((number,)) * 16 for number in self.random.sample(range(NODES), 2))

    def wait(self):
        self.cluster.net.wait(self.random.random() * 10)

    def lose(self):
        self.cluster.net.lose()

    def look(self):
        """Whatever state it is in: a look-up says what the table holds, and of one full JID the newest."""
        node = self.a_node()
        if node is None:
            return
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

    def check(self):
        self.cluster.check()
        assert self.cluster.net.crashes == []
        for row in self.bound:  # who lost its address lost it once, and to somebody later
            assert row.session.ended <= 1
            if row.session.ended:
                rivals = [other for other in self.bound if other.jid == row.jid and other is not row]
                assert any((o.bound_at, o.owner.member) > (row.bound_at, row.owner.member) for o in rivals)


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(seeds, lengths)
def test_after_quiet_all_nodes_hold_what_the_owners_hold(seed, length):
    world = World(seed, length)

    world.cluster.quiet()

    world.check()
    assert all(node.replica.resyncs == 0 for node in world.cluster.nodes.values())


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(seeds, lengths)
def test_frames_that_nobody_could_handle_are_made_good(seed, length):
    world = World(seed, length, losing=True)

    world.cluster.quiet(periods=8)

    world.check()
