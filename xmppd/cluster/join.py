"""join_cluster and leave_cluster: one change of the database, and everything that has to be right before and after it.

A join can be repeated, interrupted, and run on several nodes at once: what it changes is that two nodes which work with
one database are members of that database's cluster. Nothing is deleted, no client notices.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from xmppd.cluster.cluster import Cluster
from xmppd.cluster.hello import REFRESH, Card, differences
from xmppd.cluster.membership import MEMBER, REMOVED, SINGLE, Node
from xmppd.cluster.probe import Finding, Probe
from xmppd.cluster.refusals import (
    ALREADY_JOINED,
    NAME_TAKEN,
    NO_SUCH_NODE,
    NOT_CONVERGED,
    SELF,
    UNREACHABLE,
    WRONG_COOKIE,
    Refusal,
)
from xmppd.cluster.refusals import REMOVED as REMOVED_CODE
from xmppd.errors import NodeNameTaken, NodeRemoved, NodeUnreachable

Progress = Callable[[str], Awaitable[None]]

OPENING: Final = 10.0  # seconds for a node that shares our database to open its port
ANSWERING: Final = 15.0  # seconds from the open port to its answer
SYNCING: Final = 50.0  # seconds for links and tables; below the time for which xmppctl waits without a word
LEAVING: Final = 10.0  # seconds for a removed node to stop
_PAUSE: Final = 0.1
_TELL: Final = 2.0  # seconds between two lines of progress


async def join(cluster: Cluster, name: str, progress: Progress) -> str:
    """Make this node and the one called `name` members of one cluster; returns when their tables agree.

    Raises Refusal (nothing has changed, or NOT_CONVERGED), StorageError, XmppdError.
    """
    await cluster.refresh()
    if name == cluster.me.name:
        raise Refusal(f"{name} is this node itself", SELF)
    member = cluster.membership.by_name(name) if cluster.joined else None
    if member is not None:
        if member.node not in cluster.links.peers and not any(n.node == member.node for n in cluster.running_others):
            raise Refusal(f"This node already joined that known node: {name}, which does not run", ALREADY_JOINED)
        if not missing(cluster):
            raise Refusal(f"This node already joined that running node: {name}", ALREADY_JOINED)
        await progress(f"already a member beside {name}; waiting for the tables")
    else:
        card = await reach(cluster, name, progress)
        for refusal in differences(cluster.card(), card):
            raise refusal
        await _become_members(cluster, card, progress)
    await converge(cluster, progress)
    return f"{cluster.me.name} and {name} are in one cluster: {', '.join(m.name for m in cluster.membership.members)}"


async def _become_members(cluster: Cluster, card: Card, progress: Progress) -> None:
    try:
        await cluster.store.join([cluster.me.node, card.node])
    except NodeRemoved as exc:
        raise Refusal(
            f"{exc}: `xmppd --new-identity` on it, while it does not run, makes it a new node", REMOVED_CODE
        ) from exc
    except NodeNameTaken as exc:
        raise Refusal(str(exc), NAME_TAKEN) from exc
    await cluster.refresh()
    try:
        await cluster.ask(card.name, word=REFRESH)
    except NodeUnreachable:
        pass  # it sees the change at its next beat
    cluster.tell_members()
    await progress(f"{card.name} and this node are members of one cluster; waiting for links and tables")


# -- reaching a node that may be no member


def find(cluster: Cluster, name: str) -> Node | None:
    """The node of this name in our database: a member before others, one that runs before others."""
    order = {MEMBER: 0, SINGLE: 1, REMOVED: 2}
    found = [each for each in cluster.membership.nodes if each.name == name and each.node != cluster.me.node]
    return min(found, key=lambda each: (order.get(each.state, 3), not each.running), default=None)


async def reach(cluster: Cluster, name: str, progress: Progress) -> Card:
    """Open the way to a node and ask it who it is. Raises Refusal, XmppdError."""
    row = find(cluster, name)
    if row is not None and row.state == REMOVED:
        raise Refusal(
            f"{name} was removed from the cluster by {row.left_by}: `xmppd --new-identity` on it, while it does not "
            "run, makes it a new node",
            REMOVED_CODE,
        )
    await cluster.wake()
    probe = await open_port(cluster, name, row, progress)
    if not probe.ok:
        raise _unreachable(name, row, probe)
    assert probe.node is not None
    await cluster.route_to(probe.node, probe.address)
    await progress(f"{name} is at {probe.address}; the cookie is right")
    deadline = asyncio.get_running_loop().time() + ANSWERING
    while True:
        try:
            return await cluster.ask(name, timeout=2.0)
        except NodeUnreachable as exc:
            if asyncio.get_running_loop().time() > deadline:
                text = f"{name}: the port {probe.address} is open, but no node of this name answers there ({exc})"
                raise Refusal(text, UNREACHABLE, "name") from exc
            await asyncio.sleep(_PAUSE)


async def open_port(cluster: Cluster, name: str, row: Node | None, progress: Progress) -> Probe:
    """Look at the port of a node; one that shares our database is asked to open it first."""
    where = row.address if row is not None and row.address else name
    if row is not None and row.state == SINGLE:
        await cluster.store.want(row.node)
        await progress(f"asking {name} through the database to open its cluster port")
    deadline = asyncio.get_running_loop().time() + (OPENING if row is not None and row.running else 0)
    while True:
        probe = await cluster.engine.probe(where)
        # Behind a balancer or a forwarded port a port that is not open yet looks like one of somebody else.
        opening = probe.finding in (Finding.REFUSED, Finding.NOT_A_NODE)
        if not opening or asyncio.get_running_loop().time() > deadline:
            return probe
        await asyncio.sleep(_PAUSE * 3)


def _unreachable(name: str, row: Node | None, probe: Probe) -> Refusal:
    if probe.finding is Finding.WRONG_COOKIE:
        return Refusal(f"{name}: {probe.text}", WRONG_COOKIE, "cookie")
    text = f"This node cannot reach {name}: {probe.text}"
    if row is None:
        text += (
            ". A node that never joined anything opens its port only for nodes that share its database, and no node of "
            "this name does: look whether it runs, whether `database.url` is the same on both, and whether the name "
            "leads there (cluster.hosts)"
        )
    elif not row.running:
        text += f". It shares this database, but does not run: start {name}"
    return Refusal(text, UNREACHABLE, "name" if probe.finding is Finding.NO_SUCH_HOST else "tcp")


# -- after the change


def missing(cluster: Cluster) -> list[str]:
    """What is not as it should be between this node and the other members that run, a few words each."""
    replica = {peer.owner.member: peer for peer in cluster.replica.status().peers}
    found = []
    for each in cluster.running_others:
        peer = replica.get(each.node)
        if each.node not in cluster.links.peers or peer is None:
            found.append(f"no link to {each.name}")
        elif not peer.synced:
            found.append(f"the tables of {each.name} are on their way")
        elif not peer.knows_us:
            found.append(f"{each.name} does not have our tables yet")
        elif not peer.agrees:
            found.append(f"{each.name} has not confirmed its tables yet")
    return found


async def converge(cluster: Cluster, progress: Progress) -> None:
    """Wait until nothing is missing. Raises Refusal (NOT_CONVERGED)."""
    loop = asyncio.get_running_loop()
    deadline, told = loop.time() + SYNCING, loop.time()
    while lacking := missing(cluster):
        if loop.time() > deadline:
            text = f"joined, but not in step after {SYNCING:.0f} s: {'; '.join(lacking)}. `cluster_status` goes on"
            raise Refusal(text, NOT_CONVERGED)
        if loop.time() - told >= _TELL:
            told = loop.time()
            await progress("; ".join(lacking))
        await asyncio.sleep(_PAUSE)


# -- leaving


async def leave(cluster: Cluster, name: str, progress: Progress) -> str:
    """Remove a member for good, this node or another one, whether it runs or not; a running one stops.

    Raises Refusal, StorageError.
    """
    await cluster.refresh()
    member = cluster.membership.by_name(name) if cluster.joined else None
    if member is None:
        raise _no_member(cluster, name, cluster.membership.nodes)
    up = member.node == cluster.me.node or member.node in cluster.links.peers
    if not await cluster.store.remove(member.node, by=cluster.me.name, why="leave_cluster"):
        raise _no_member(cluster, name, await cluster.store.all())  # somebody was quicker
    cluster.tell_members()
    if member.node == cluster.me.node:
        return f"{name} has left the cluster for good and stops"
    await progress(f"{name} is removed")
    await cluster.refresh()
    if not up:
        return f"{name} has left the cluster for good; it is not up, and learns it at its next start"
    return f"{name} has left the cluster for good and stops"


def _no_member(cluster: Cluster, name: str, nodes: Sequence[Node]) -> Refusal:
    gone = next((each for each in nodes if each.name == name and each.state == REMOVED), None)
    if gone is not None:
        return Refusal(f"{name} was removed from the cluster already, by {gone.left_by}", NO_SUCH_NODE)
    names = ", ".join(member.name for member in cluster.membership.members)
    there = f"the members are {names}" if names else "this node is in no cluster"
    return Refusal(f"{name} is no member: {there}", NO_SUCH_NODE)
