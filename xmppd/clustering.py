"""What makes a node one of a cluster, put together: its row in the database, the engine, links, tables and calls."""

import asyncio
import hashlib
import secrets
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from xmppd.cluster import survey
from xmppd.cluster.addresses import join
from xmppd.cluster.calls import NodeCalls
from xmppd.cluster.claim import claim
from xmppd.cluster.cluster import LEASE, Cluster, Myself
from xmppd.cluster.engine import Engine
from xmppd.cluster.link_types import Settings
from xmppd.cluster.links import LinkSet
from xmppd.cluster.membership import Membership
from xmppd.cluster.replica import Replica
from xmppd.cluster.tables import Owner, RouteTable, SessionTable
from xmppd.config import Config
from xmppd.config.types import host_port
from xmppd.hooks import Hooks
from xmppd.identity import DataFolder, machine
from xmppd.storage import Storage
from xmppd.storage.members import Members, NodeRow, Registration

PROTOCOL: Final = 1  # of hellos and link frames: one step apart is understood
_ANYWHERE: Final = ("0.0.0.0", "::")


@dataclass(frozen=True, slots=True)
class Place:
    """This node's place among those that use its database."""

    me: Myself
    owner: Owner
    members: Members
    membership: Membership
    claim: Callable[[], Any]


def advertised(config: Config) -> str:
    """host:port under which other nodes reach this one: as configured, else where it listens, else by its name."""
    if config.cluster.advertise is not None:
        return config.cluster.advertise
    host, port = host_port(config.cluster.listen)
    return join(config.node.partition("@")[2] if host in _ANYWHERE else host, port)


async def take_place(config: Config, folder: DataFolder, storage: Storage, version: str) -> Place:
    """Become the one process that serves as this node. Raises as `xmppd.cluster.claim.claim`."""
    node = uuid.UUID(folder.node_id).bytes
    me = Myself(
        node,
        config.node,
        advertised(config),
        secrets.token_bytes(16),
        version,
        PROTOCOL,
        config.hosts,
        storage.node_local,
        machine(),
    )
    members, membership = Members(storage), Membership(node, folder)
    place = folder.place

    def registration() -> Registration:
        hosts_hash = hashlib.sha256("\n".join(sorted(me.hosts)).encode()).digest()
        return Registration(
            node, me.name, me.address, folder.incarnation, version, hosts_hash, me.instance, place
        )  # fmt: skip

    async def register() -> NodeRow:
        row = await members.register(registration(), lease=LEASE)
        if row.incarnation > folder.incarnation:  # the folder is a backup
            folder.advance(row.incarnation)
            row = await members.register(registration(), lease=LEASE)
        return row

    async def take() -> None:
        await claim(membership, members, register, where=storage.where)

    await take()
    return Place(me, Owner(node, 0, folder.incarnation), members, membership, take)


def build(
    config: Config,
    folder: DataFolder,
    place: Place,
    *,
    tables: tuple[RouteTable, SessionTable],
    hooks: Hooks,
    spawn: Callable[..., Any],
    removed: Callable[[], None],
    ousted: Callable[[], None],
) -> Cluster:
    """All parts of the cluster layer, wired and at rest."""
    loop = asyncio.get_running_loop()
    me, membership = place.me, place.membership
    engine = Engine(config.cluster, node=me.node, name=me.name, cookie=folder.cookie, folder=folder.path)
    links = LinkSet(
        place.owner,
        me.name,
        me.version,
        membership.copy.cluster,
        loop,
        is_member=membership.is_member,
        settings=Settings(peer_timeout=config.cluster.peer_timeout),
    )
    calls = NodeCalls(links)
    replica = Replica(links, place.owner, tables, call_soon=loop.call_soon, call_later=loop.call_later)
    cluster = Cluster(
        me,
        membership,
        place.members,
        engine=engine,
        links=links,
        calls=calls,
        replica=replica,
        hooks=hooks,
        spawn=spawn,
        removed=removed,
        ousted=ousted,
        claim=place.claim,
    )
    survey.serve(cluster)
    return cluster
