"""What makes a node one of a cluster, put together: its row in the database, the engine, links, tables and calls."""

import asyncio
import hashlib
import secrets
import uuid
from collections.abc import Callable
from typing import Any, Final

from xmppd.cluster import survey
from xmppd.cluster.addresses import join
from xmppd.cluster.calls import NodeCalls
from xmppd.cluster.claim import claim, removed
from xmppd.cluster.cluster import LEASE, Cluster, Myself
from xmppd.cluster.engine import Engine
from xmppd.cluster.link_types import Settings
from xmppd.cluster.links import LinkSet
from xmppd.cluster.membership import REMOVED, Membership
from xmppd.cluster.replica import Replica
from xmppd.cluster.tables import Owner, RouteTable, SessionTable
from xmppd.config import Config
from xmppd.config.types import host_port
from xmppd.errors import NodeRemoved, StorageUnavailable, XmppdError
from xmppd.hooks import Hooks
from xmppd.identity import DataFolder, machine
from xmppd.storage import Storage
from xmppd.storage.members import Members, NodeRow, Registration

PROTOCOL: Final = 1  # of hellos and link frames: one step apart is understood
OPEN: Final = 5.0  # seconds for the database at the start of a node that can do without
_ANYWHERE: Final = ("0.0.0.0", "::")


def advertised(config: Config) -> str:
    """host:port under which other nodes reach this one: as configured, else where it listens, else by its name."""
    if config.cluster.advertise is not None:
        return config.cluster.advertise
    host, port = host_port(config.cluster.listen)
    return join(config.node.partition("@")[2] if host in _ANYWHERE else host, port)


class Place:
    """This node's place among those that use its database: its row there, and what it knows of the others."""

    def __init__(self, config: Config, folder: DataFolder, storage: Storage, version: str) -> None:
        node = uuid.UUID(folder.node_id).bytes
        self.me = Myself(
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
        self.members = Members(storage)
        self.membership = Membership(node, folder)
        self._folder = folder
        self._storage = storage
        self._owner: Owner | None = None
        self.lease_until = 0.0  # by the loop's clock

    @property
    def owner(self) -> Owner:
        """The same for the whole life of the process."""
        if self._owner is None:
            self._owner = Owner(self.me.node, 0, self._folder.incarnation)
        return self._owner

    async def open(self) -> StorageUnavailable | None:
        """Open the database and become the one process that serves as this node.

        A node that has been here before serves without the database, which then is returned as the reason; `claim` is
        for later. Raises as `claim`, and StorageError from the opening.
        """
        try:
            async with asyncio.timeout(None if self.known is None else OPEN):
                await self._storage.open()
            await self.claim()
        except (StorageUnavailable, TimeoutError) as exc:
            if self.known is None:
                raise
            if self.membership.state == REMOVED:
                raise NodeRemoved(removed(self.membership.copy.removed)) from exc
            return exc if isinstance(exc, StorageUnavailable) else StorageUnavailable(f"no answer in {OPEN:g} s")
        return None

    @property
    def known(self) -> bytes | None:
        """The cluster id that this node remembers; None before it has ever seen its database."""
        return self.membership.copy.cluster or None

    async def claim(self) -> None:
        """Raises as `xmppd.cluster.claim.claim`."""
        await claim(self.membership, self.members, self._register, where=self._storage.where)

    async def claim_late(self) -> None:
        """Open the database if it is not open yet, and claim. Raises StorageUnavailable while it is away."""
        if not self._storage.is_open:
            await self._storage.open()
        await self.claim()

    async def _register(self) -> NodeRow:
        began = asyncio.get_running_loop().time()
        row = await self.members.register(self._registration(), lease=LEASE)
        if row.incarnation > self._folder.incarnation:  # the folder is a backup: others have seen later runs
            self._folder.advance(row.incarnation)
            if self._owner is not None:
                raise XmppdError("the data folder is older than what the database knows of this node: start it again")
            row = await self.members.register(self._registration(), lease=LEASE)
        self.lease_until = began + LEASE
        return row

    def _registration(self) -> Registration:
        me, folder = self.me, self._folder
        hosts_hash = hashlib.sha256("\n".join(sorted(me.hosts)).encode()).digest()
        return Registration(
            me.node, me.name, me.address, folder.incarnation, me.version, hosts_hash, me.instance, folder.place
        )


def build(
    config: Config,
    folder: DataFolder,
    place: Place,
    *,
    tables: tuple[RouteTable, SessionTable],
    hooks: Hooks,
    spawn: Callable[..., Any],
    leave: Callable[[], None],
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
        removed=leave,
        ousted=ousted,
        claim=place.claim,
    )
    cluster.lease_until = place.lease_until
    survey.serve(cluster)
    return cluster
