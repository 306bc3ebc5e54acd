"""Nodes with shared tables and a replica each over a cluster on paper, and what must hold of them."""

from functools import partial
from typing import Any

from tests.cluster.sim_net import SimNet
from xmppd.cluster.replica import Replica
from xmppd.cluster.shared import Owner
from xmppd.cluster.tables import Route, RouteTable, SessionRow, SessionTable
from xmppd.protocol.jid import parse

PERIOD = 3.0
Seen = tuple[Owner, int, int | None, bool]


class Session:
    """What a row of this process points to."""

    def __init__(self) -> None:
        self.ended = 0  # how often it was told that somebody else has its address


class Node:
    """One start of one node."""

    def __init__(self, net: SimNet, number: int, incarnation: int) -> None:
        self.owner = Owner(bytes((number,)) * 16, 0, incarnation)
        self.id = self.owner.member
        self.net = net
        self.table, self.routes = SessionTable(), RouteTable()
        self.links = net.start(self.owner, f"xmppd@node{number}")
        self.replica = Replica(
            self.links,
            self.owner,
            [self.table, self.routes],
            call_soon=partial(net.call_soon, self.links),
            call_later=partial(net.call_later, self.links),
            clock=net.clock,
            digest_period=PERIOD,
        )
        self.replica.start()
        self.live: list[SessionRow] = []
        self.ways: list[Route] = []
        self.table.on_conflict.append(self._lost)

    def bind(self, jid: str, at: int, *, anonymous: bool = False) -> SessionRow:
        row = SessionRow(parse(jid), self.owner, at, Session(), anonymous=anonymous)
        displaced = self.table.insert(row)
        self.live.append(row)
        if displaced is not None and displaced.session is not None:
            self._lost(displaced)
        return row

    def close(self, row: SessionRow) -> None:
        self.live.remove(row)
        assert self.table.remove(row)

    def serve(self, domain: str) -> Route:
        route = Route(domain, self.owner, lambda stanza: None)
        self.routes.insert(route)
        self.ways.append(route)
        return route

    def _lost(self, row: SessionRow) -> None:
        row.session.ended += 1
        self.live.remove(row)

    def seen(self) -> dict[str, Seen]:
        """Every session as somebody finds it who looks it up."""
        bares = {row.jid.bare for row in self.table.all()}
        rows = [row for bare in bares for row in self.table.rows(bare).values()]
        return {row.jid.full: _what(row) for row in rows}

    def own(self) -> dict[str, Seen]:
        return {row.jid.full: _what(row) for row in self.live}


def _what(row: SessionRow) -> Seen:
    return (row.owner, row.bound_at, row.priority, row.anonymous)


class Cluster:
    """Nodes by number; a number may be down."""

    def __init__(self, seed: int = 0, size: int = 0) -> None:
        self.net = SimNet(seed)
        self.nodes: dict[int, Node] = {}
        self._starts = 0
        for number in range(size):
            self.start(number)
        if size:
            self.quiet()

    def start(self, number: int) -> Node:
        self._starts += 1
        node = self.nodes[number] = Node(self.net, number, self._starts)
        return node

    def kill(self, number: int) -> None:
        self.net.kill(self.nodes.pop(number).id)

    def quiet(self, periods: int = 1) -> None:
        """All cuts end, and nothing happens for a while."""
        self.net.heal_all()
        self.net.wait(PERIOD * periods + 0.1)

    def check(self) -> None:
        """What must hold after a quiet time."""
        union: dict[str, Any] = {}
        domains: set[str] = set()
        for node in self.nodes.values():
            own = node.own()
            assert not union.keys() & own.keys(), "two nodes have one full JID"
            union |= own
            domains |= {domain for domain in node.routes._routes if node.routes.local(domain)}
        for node in self.nodes.values():
            assert node.seen() == union
            assert node.table.count() == len(union)
            assert node.routes.domains() == sorted(domains)
            for other in self.nodes.values():
                if other is not node:
                    assert node.table.held(other.owner) == other.table.own
                    assert node.table.count_of(other.owner) == len(other.live)
                    assert {d for d in domains if other.owner in node.routes.elsewhere(d)} == set(other.routes._routes)
            status = node.replica.status()
            assert status.converged, status
            assert len(status.peers) == len(self.nodes) - 1
            for row in node.live:
                assert row.session.ended == 0
