"""Looking at the cluster: how each node sees it and whether all see the same, and what is wrong with the way to one."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from xmppd.cluster.cluster import Cluster
from xmppd.cluster.hello import SKEW, differences
from xmppd.cluster.interfaces import Peer
from xmppd.cluster.join import find, missing, open_port
from xmppd.cluster.membership import SINGLE
from xmppd.cluster.probe import Finding
from xmppd.errors import NodeUnreachable, StorageError, XmppdError

VIEW: Final = "cluster.view"  # call: how do you see the cluster?
_STEPS: Final = 5  # seconds for the hello of a test


@dataclass(frozen=True, slots=True)
class LinkView:
    """One node's link to another member."""

    node: str  # whose view it is
    peer: str
    state: str  # up, down, disconnected
    rtt_ms: float | None
    sessions: int  # of the peer, as the node has them
    via: str  # the node through which packets go


@dataclass(frozen=True, slots=True)
class TableView:
    """What one node has of one owner's rows of a table."""

    node: str
    table: str
    owner: str
    version: int  # of the owner's changes
    rows: int
    digest: str


@dataclass(frozen=True, slots=True)
class View:
    """The cluster as one node sees it."""

    node: str
    links: tuple[LinkView, ...]
    tables: tuple[TableView, ...]
    counters: Mapping[str, int]  # deltas, re-syncs, conflicts ...
    missing: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return {
            "node": self.node,
            "links": [[x.node, x.peer, x.state, x.rtt_ms, x.sessions, x.via] for x in self.links],
            "tables": [[x.node, x.table, x.owner, x.version, x.rows, x.digest] for x in self.tables],
            "counters": dict(self.counters),
            "missing": list(self.missing),
        }

    @classmethod
    def from_json(cls, said: Any) -> "View":
        """Raises ValueError."""
        try:
            return cls(
                said["node"],
                tuple(LinkView(*each) for each in said["links"]),
                tuple(TableView(*each) for each in said["tables"]),
                dict(said["counters"]),
                tuple(said["missing"]),
            )
        except (LookupError, TypeError) as exc:
            raise ValueError(f"no view of a cluster: {exc!r}") from exc


def serve(cluster: Cluster) -> None:
    """Answer the other nodes' questions."""
    cluster.calls.on_call(VIEW, lambda peer, payload: view(cluster).as_json())


def view(cluster: Cluster) -> View:
    """How this node sees the cluster now."""
    me = cluster.me.name
    status = cluster.replica.status()
    peers = {peer.owner.member: peer for peer in status.peers}
    states = {link.node: link for link in cluster.links.status()}
    links, tables = [], []
    for name, tally in status.tables.items():
        tables.append(TableView(me, name, me, status.version, tally.rows, f"{tally.digest:016x}"))
    for member in cluster.membership.others:
        peer = peers.get(member.node)
        link = states.get(member.node)
        rows = 0
        if peer is not None:
            for name, tally in peer.tables.items():
                tables.append(TableView(me, name, member.name, peer.version, tally.rows, f"{tally.digest:016x}"))
            rows = peer.tables["session"].rows if "session" in peer.tables else 0
        via = "" if link is None or link.via is None else cluster.membership.name_of(link.via)
        rtt = None if link is None or link.rtt_ms is None else round(link.rtt_ms, 2)
        links.append(LinkView(me, member.name, "down" if link is None else link.state, rtt, rows, via))
    counters = {
        "deltas_sent": status.deltas_sent,
        "deltas_applied": status.deltas_applied,
        "snapshots_sent": status.snapshots_sent,
        "snapshots_applied": status.snapshots_applied,
        "resyncs": status.resyncs,
        "conflicts": status.conflicts,
    }
    return View(me, tuple(links), tuple(tables), counters, tuple(missing(cluster)))


@dataclass(frozen=True, slots=True)
class Status:
    """All views together."""

    views: tuple[View, ...]
    missing: tuple[str, ...]  # why the cluster has not converged; none: it has

    @property
    def converged(self) -> bool:
        return not self.missing


async def status(cluster: Cluster) -> Status:
    """How every node that is up sees the cluster, and what keeps their views apart."""
    try:
        await cluster.refresh()
    except StorageError:
        pass  # the members as we know them
    peers = list(cluster.links.peers.values()) if cluster.joined else []
    answers = await asyncio.gather(*(_ask(cluster, peer) for peer in peers))
    views = [view(cluster), *(answer for answer in answers if isinstance(answer, View))]
    lacking = [f"{seen.node}: {text}" for seen in views for text in seen.missing]
    lacking += [answer for answer in answers if isinstance(answer, str)]
    return Status(tuple(views), tuple(lacking + list(_unequal(views))))


async def _ask(cluster: Cluster, peer: Peer) -> View | str:
    try:
        return View.from_json(await cluster.calls.call(peer.node, VIEW, None))
    except (XmppdError, ValueError) as exc:
        return f"{peer.name} does not answer: {exc}"


def _unequal(views: list[View]) -> Iterator[str]:
    """Rows of one owner at one of its versions have one digest everywhere."""
    owners = {(x.table, x.owner): x for seen in views for x in seen.tables if x.node == x.owner}
    for seen in views:
        for row in seen.tables:
            own = owners.get((row.table, row.owner))
            if own is not None and own.version == row.version and (own.rows, own.digest) != (row.rows, row.digest):
                yield f"{row.node}: {row.rows} rows of {row.owner} in {row.table}, which has {own.rows}"


# -- test_node


@dataclass(frozen=True, slots=True)
class Check:
    """One line of `test_node`."""

    name: str
    ok: bool
    text: str


CHECKS: Final = ("name", "tcp", "cookie", "version", "clock", "hosts", "database")


async def test(cluster: Cluster, name: str) -> AsyncIterator[Check]:
    """One check after the other; those behind one that says everything about the way are not reached, and fail."""
    try:
        await cluster.refresh()
    except StorageError:
        pass
    row = find(cluster, name)
    trouble = ""
    try:
        await cluster.wake()
    except XmppdError as exc:
        trouble = str(exc)
    probe = await open_port(cluster, name, row, _silent)
    if probe.finding is Finding.NO_SUCH_HOST:
        yield Check("name", False, probe.text)
        for check in _unreached("name"):
            yield check
        return
    yield Check("name", True, f"{', '.join(probe.addresses) or probe.address}")
    if probe.finding in (Finding.REFUSED, Finding.TIMEOUT, Finding.UNREACHABLE, Finding.NOT_A_NODE):
        yield Check("tcp", False, probe.text + _hint(row))
        for check in _unreached("tcp"):
            yield check
        return
    yield Check("tcp", True, f"{probe.address} answers in {probe.connect_seconds * 1000:.1f} ms")
    if not probe.ok or probe.node is None:
        yield Check("cookie", False, probe.text)
        for check in _unreached("cookie"):
            yield check
        return
    yield Check("cookie", True, "the same")
    async for check in _tell(cluster, name, probe.node, probe.address, trouble):
        yield check


async def _tell(cluster: Cluster, name: str, node: bytes, address: str, trouble: str) -> AsyncIterator[Check]:
    """What depends on what the node says about itself."""
    try:
        if trouble:
            raise NodeUnreachable(f"our own engine does not run: {trouble}")
        if not cluster.membership.is_member(node):
            await cluster.route_to(node, address)
        card = await _hello(cluster, name)
    except NodeUnreachable as exc:
        for check in CHECKS[3:]:
            yield Check(check, False, f"no node of the name {name} answers at {address}: {exc}")
        return
    mine = cluster.card()
    wrong: dict[str, str] = {}
    for refusal in differences(mine, card):
        wrong.setdefault(refusal.check, refusal.text)
    skew = cluster.skews.get(card.node, 0.0)
    right = {
        "version": f"xmppd {card.version}, protocol {card.protocol}",
        "clock": f"{skew:+.3f} s",
        "hosts": ", ".join(card.hosts),
        "database": f"the same, {card.database.hex()[:8]}",
    }
    if abs(skew) > SKEW:
        wrong["clock"] = f"{skew:+.1f} s: more than {SKEW:g} s apart, set the clocks (NTP)"
    if "name" in wrong:
        wrong["database"] = wrong.pop("name")
    for check in CHECKS[3:]:
        yield Check(check, check not in wrong, wrong.get(check, right[check]))


async def _hello(cluster: Cluster, name: str) -> Any:
    deadline = asyncio.get_running_loop().time() + _STEPS
    while True:
        try:
            return await cluster.ask(name, timeout=1.0)
        except NodeUnreachable:
            if asyncio.get_running_loop().time() > deadline:
                raise
            await asyncio.sleep(0.1)


def _unreached(last: str) -> Iterator[Check]:
    for check in CHECKS[CHECKS.index(last) + 1 :]:
        yield Check(check, False, f"not reached, see {last}")


def _hint(row: Any) -> str:
    if row is None:
        return "; no node of this name shares our database"
    if not row.running:
        return "; it shares our database, but does not run"
    return "; it shares our database and runs: look at cluster.listen and the firewall" if row.state == SINGLE else ""


async def _silent(text: str) -> None:
    pass
