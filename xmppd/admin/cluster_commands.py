"""Commands about the cluster itself: who is in it, joining and leaving, and whether all is well."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Final

from xmppd.admin.registry import Arg, Call, UsageError, command
from xmppd.admin.results import Answer, List, Restuple, Scalar, Tuple, integer, string
from xmppd.cluster import join, survey
from xmppd.cluster.cluster import Cluster
from xmppd.cluster.cookies import Cookies
from xmppd.cluster.interfaces import Peer
from xmppd.cluster.membership import MEMBER
from xmppd.cluster.refusals import NO_SUCH_NODE, NOT_CONVERGED, Refusal
from xmppd.errors import CommandError, StorageError, XmppdError

NODE: Final = Arg("node")
PING: Final = 2.0  # seconds
_INFO: Final = "cluster.info"  # call: how are you?


class ClusterCommands:
    """`info` tells of this node what `list_cluster_detailed` shows: status, online users, processes, uptime."""

    def __init__(self, cluster: Cluster, info: Callable[[], tuple[str, int, int, int]]) -> None:
        self._cluster = cluster
        self._info = info
        cluster.calls.on_call(_INFO, lambda peer, payload: list(info()))

    # -- membership

    @command(
        "join_cluster",
        args=(NODE,),
        result=Restuple(),
        tags=("cluster",),
        scope="node",
        doc="Make this node a member of the cluster of another one; returns when the tables of both agree."
        " Can be repeated; changes no data",
    )
    async def join_cluster(self, node: str, call: Call) -> str:
        return await join.join(self._cluster, node, call.progress)

    @command(
        "join_cluster_here",
        args=(NODE,),
        result=Restuple(),
        tags=("cluster",),
        scope="node",
        doc="Make another node, which shares this node's database, a member of this node's cluster",
    )
    async def join_cluster_here(self, node: str, call: Call) -> str:
        return await join.join(self._cluster, node, call.progress)

    @command(
        "leave_cluster",
        args=(NODE,),
        result=Restuple(),
        tags=("cluster",),
        scope="node",
        doc="Remove a member from the cluster for good, whether it runs or not; a running one stops",
    )
    async def leave_cluster(self, node: str, call: Call) -> str:
        return await join.leave(self._cluster, node, call.progress)

    # -- who is there

    @command(
        "list_cluster",
        result=List("nodes", string("node")),
        tags=("cluster",),
        reads=True,
        scope="node",
        doc="List the members of the cluster that run",
    )
    def list_cluster(self) -> list[str]:
        return sorted([self._cluster.me.name, *(peer.name for peer in self._cluster.links.peers.values())])

    @command(
        "list_cluster_detailed",
        result=List(
            "nodes",
            Tuple(
                "node",
                (
                    string("name"),
                    string("running"),
                    string("status"),
                    integer("online_users"),
                    integer("processes"),
                    integer("uptime_seconds"),
                    string("master_node"),
                ),
            ),
        ),
        tags=("cluster",),
        reads=True,
        scope="node",
        doc="List the members of the cluster, those that run and those that are known, with some statistics",
    )
    async def list_cluster_detailed(self) -> list[tuple[Any, ...]]:
        cluster = self._cluster
        await self._look()
        peers = cluster.links.peers
        said = await asyncio.gather(*(self._ask(peer) for peer in peers.values()))
        known = dict(zip(peers, said, strict=True)) | {cluster.me.node: self._info()}
        names = {each.node: each.name for each in cluster.membership.members} | {cluster.me.node: cluster.me.name}
        rows = [
            (name, "true", *known[node], "none") if node in known else (name, "false", "stopped", 0, 0, 0, "none")
            for node, name in names.items()
        ]
        return sorted(rows)

    async def _ask(self, peer: Peer) -> Sequence[Any]:
        try:
            status, *numbers = await self._cluster.calls.call(peer.node, _INFO, None, timeout=PING)
            return (str(status), *map(int, numbers))
        except (XmppdError, ValueError, TypeError):
            return ("unknown", 0, 0, 0)

    async def _look(self) -> None:
        """Nodes may have started or stopped since we looked last; without the database it is as we know it."""
        try:
            await self._cluster.refresh()
        except StorageError:
            pass

    @command(
        "nodes",
        args=(Arg("which", optional=True),),
        result=List("nodes", string("node")),
        tags=("cluster",),
        reads=True,
        scope="node",
        doc="List the other nodes: those that are up, with --hidden the observers, with --connected both, with --known"
        " all members, up or not",
    )
    async def nodes(self, which: str = "") -> list[str]:
        cluster = self._cluster
        visible = [peer.name for peer in cluster.links.peers.values()]
        if which in ("", "--visible"):
            return sorted(visible)
        if which == "--known":
            await self._look()
            return sorted({*visible, *(member.name for member in cluster.membership.others)})
        if which in ("--hidden", "--connected"):
            hidden = [each.name or each.user for each in (await cluster.engine.state()).observers]
            return sorted(hidden if which == "--hidden" else hidden + visible)
        raise UsageError(f"nodes: expected --hidden, --connected or --known, not {which!r}")

    @command(
        "ping",
        args=(NODE,),
        result=Scalar("res"),
        tags=("cluster",),
        reads=True,
        scope="node",
        doc="Tell whether a node can be reached: pong, or pang and exit code 1",
    )
    async def ping(self, node: str) -> Answer:
        there = node == self._cluster.me.name or await self._reached(node)
        return Answer("pong" if there else "pang", 0 if there else 1)

    async def _reached(self, name: str) -> bool:
        cluster = self._cluster
        peer = next((peer for peer in cluster.links.peers.values() if peer.name == name), None)
        if peer is None:
            row = join.find(cluster, name)
            return (await cluster.engine.probe(row.address if row is not None and row.address else name)).ok
        try:
            await cluster.calls.call(peer.node, _INFO, None, timeout=PING)
        except XmppdError:
            return False
        return True

    @command(
        "disconnect",
        args=(NODE, Arg("for", optional=True), Arg("seconds", optional=True)),
        result=Restuple(),
        tags=("cluster",),
        scope="node",
        doc="Cut the link to a member, and take it up again after so many seconds: `disconnect NODE --for 30`",
    )
    def disconnect(self, node: str, for_: str = "", seconds: str = "") -> str:
        text = seconds or for_.removeprefix("--for") or "10"
        if not text.isascii() or not text.isdigit() or not 0 < int(text) <= 86400:
            raise UsageError(f"disconnect: expected seconds, `disconnect {node} --for 30`, not {text!r}")
        member = self._cluster.membership.by_name(node)
        if member is None or not self._cluster.links.disconnect(member.node, float(text)):
            raise Refusal(f"{node} is no other member of this cluster", NO_SUCH_NODE)
        return f"{node} is disconnected for {int(text)} s"

    # -- is all well?

    @command(
        "test_node",
        args=(NODE,),
        result=List("checks", Tuple("check", (string("name"), string("result"), string("text")))),
        tags=("cluster",),
        reads=True,
        scope="node",
        doc="Look at the way to a node and at what it says about itself: name, tcp, cookie, version, clock, hosts,"
        " database, each ok or fail; exit code 1 when one fails",
    )
    async def test_node(self, node: str) -> Answer:
        checks = [check async for check in survey.test(self._cluster, node)]
        rows = [(check.name, "ok" if check.ok else "fail", check.text) for check in checks]
        return Answer(rows, 0 if all(check.ok for check in checks) else 1)

    @command(
        "cluster_status",
        result=Tuple(
            "status",
            (
                string("cluster"),
                string("state"),
                string("converged"),
                List("missing", string("what")),
                List("members", Tuple("member", tuple(map(string, ("name", "state", "address", "joined", "version"))))),
                List(
                    "links",
                    Tuple(
                        "link",
                        (*map(string, ("node", "peer", "state", "rtt_ms", "via")), integer("sessions")),
                    ),
                ),
                List(
                    "tables",
                    Tuple(
                        "table",
                        (
                            *map(string, ("node", "table", "owner")),
                            *map(integer, ("version", "rows")),
                            string("digest"),
                        ),
                    ),
                ),
                List("counters", Tuple("counter", (string("node"), string("name"), integer("value")))),
            ),
        ),
        tags=("cluster",),
        reads=True,
        scope="node",
        layout=lambda value: _page(value),
        doc="Show members, links, tables and their digests as every node sees them; exit code 26 until all agree",
    )
    async def cluster_status(self) -> Answer:
        cluster = self._cluster
        found = await survey.status(cluster)
        value = {
            "cluster": cluster.membership.copy.cluster.hex(),
            "state": cluster.membership.state,
            "converged": "yes" if found.converged else "no",
            "missing": list(found.missing),
            "members": [
                (each.name, self._state_of(each.node, each.running), each.address, _time(each.joined_at), each.version)
                for each in cluster.membership.nodes
                if each.state == MEMBER
            ],
            "links": [
                (x.node, x.peer, x.state, "" if x.rtt_ms is None else x.rtt_ms, x.via, x.sessions)
                for view in found.views
                for x in view.links
            ],
            "tables": [
                (x.node, x.table, x.owner, x.version, x.rows, x.digest) for view in found.views for x in view.tables
            ],
            "counters": [(view.node, *each) for view in found.views for each in sorted(view.counters.items())],
        }
        return Answer(value, 0 if found.converged else NOT_CONVERGED)

    def _state_of(self, node: bytes, running: bool) -> str:
        if node == self._cluster.me.node or node in self._cluster.links.peers:
            return "up"
        return "not linked" if running else "down"


def _time(at: float | None) -> str:
    import time

    return "" if at is None else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))


def _page(value: Any) -> str:
    """The text form of cluster_status: what matters first, then tables."""
    lines = [f"cluster {value['cluster']}: {value['state']}, converged: {value['converged']}"]
    lines += [f"missing: {text}" for text in value["missing"]]
    for name, head in (
        ("members", ("name", "state", "address", "joined", "version")),
        ("links", ("node", "peer", "state", "rtt_ms", "via", "sessions")),
        ("tables", ("node", "table", "owner", "version", "rows", "digest")),
        ("counters", ("node", "name", "value")),
    ):
        if value[name]:
            lines += ["", f"{name}:", *_columns([head, *value[name]])]
    return "\n".join(lines) + "\n"


def _columns(rows: Sequence[Sequence[Any]]) -> list[str]:
    widths = [max(len(str(row[place])) for row in rows) for place in range(len(rows[0]))]
    return [
        "  " + "  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


class CookieCommands:
    """The cluster's secret; only whoever controls the node by its socket may see or change it."""

    def __init__(self, cookies: Cookies) -> None:
        self._cookies = cookies

    @command(
        "cookie show",
        result=Scalar("cookie"),
        tags=("cluster",),
        scope="node",
        doc="Show the cookie, to be given to a node that is to join: xmppctl cookie show | ssh B xmppctl cookie set -",
    )
    def show(self, call: Call) -> str:
        _only_here(call)
        return self._cookies.cookie

    @command(
        "cookie set",
        args=(Arg("cookie", secret=True, never_argv=True),),
        result=Restuple(),
        tags=("cluster",),
        scope="node",
        doc="Give this node, which is no member yet, the cookie of the cluster it shall join, from standard input",
    )
    async def set(self, cookie: str, call: Call) -> str:
        _only_here(call)
        await self._cookies.set(cookie)
        return "This node has the cookie now"

    @command(
        "cookie rotate",
        args=(Arg("cookie", secret=True, never_argv=True, optional=True),),
        result=Restuple(),
        tags=("cluster",),
        scope="node",
        doc="Change the cookie of all members to a random one, or with - to one from standard input; no link drops",
    )
    async def rotate(self, call: Call, cookie: str = "") -> str:
        _only_here(call)
        await self._cookies.rotate(cookie or None, call.progress)
        return "All members have the new cookie"


def _only_here(call: Call) -> None:
    if call.caller.via not in ("ctl", "test"):
        raise CommandError("the cookie is shown and changed through the control socket alone")
