"""Which nodes serve from this database, which of them form its cluster, and which of them live.

A database has one cluster: its members are the rows with the state `member`. Every change of the members begins with
the row of the table `cluster`, so that two at once come one after the other. Whether a node lives is the database's
clock against its lease, which a member renews every second.
"""

import time
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import ColumnElement, and_, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from xmppd.errors import NodeIdInUse, NodeNameTaken, NodeRemoved, StorageError
from xmppd.storage.clock import clock
from xmppd.storage.database import Storage
from xmppd.storage.sql import db_now, insert_new
from xmppd.storage.tables import cluster, node

SINGLE: Final = "single"
MEMBER: Final = "member"
REMOVED: Final = "removed"
_ROW: Final = "cluster"  # the name of the one row


@dataclass(frozen=True, slots=True)
class DatabaseIdentity:
    """Both are random: the cluster's id, and the database's own."""

    cluster: bytes
    database: bytes


@dataclass(frozen=True, slots=True)
class Registration:
    """A process that is about to serve as a node."""

    node: bytes
    name: str
    address: str  # host:port for the others; "" when it has none
    incarnation: int
    version: str
    hosts_hash: bytes  # 32 bytes
    instance: bytes  # 16 random bytes, this process's own
    place: bytes  # 32 bytes: the same data folder on the same running machine has the same


@dataclass(frozen=True, slots=True)
class NodeRow:
    """A node as the database knows it; times are the database's."""

    node: bytes
    name: str
    address: str
    state: str  # single, member, removed
    incarnation: int
    version: str
    hosts_hash: bytes
    joined_at: float | None
    left_at: float | None
    left_by: str | None
    left_why: str | None
    last_seen_at: float | None
    lease_left: float  # seconds; 0 when it does not run
    wanted_ago: float | None  # seconds since somebody wanted to reach it; None: never

    @property
    def running(self) -> bool:
        return self.lease_left > 0


@dataclass(frozen=True, slots=True)
class Pulse:
    """What a node learns when it looks at the database."""

    ours: bool  # False: another process has taken this node's id, or the row has gone
    state: str  # "" when there is no row
    revision: int  # has it grown, so have the members changed
    wanted_ago: float | None  # seconds


class Members:
    """Fulfils cluster.membership.Store. Everything raises StorageError when the database does not do what was asked."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    async def identity(self) -> DatabaseIdentity:
        """Of the database; made by the first node that asks."""

        async def look(connection: AsyncConnection) -> DatabaseIdentity | None:
            query = select(cluster.c.cluster_id, cluster.c.database_id).where(cluster.c.name == _ROW)
            row = (await connection.execute(query)).one_or_none()
            return None if row is None else DatabaseIdentity(row.cluster_id, row.database_id)

        found = await self._storage.read(look)
        if found is not None:
            return found
        made = {
            "name": _ROW,
            "cluster_id": uuid.uuid4().bytes,
            "database_id": uuid.uuid4().bytes,
            "created_at": time.time(),
            "revision": 1,
        }

        async def propose(connection: AsyncConnection) -> DatabaseIdentity | None:
            await connection.execute(insert_new(cluster, connection.dialect), made)
            return await look(connection)

        found = await self._storage.run(propose, repeatable=True)
        if found is None:
            raise StorageError(f"{self._storage.where}: the identity of the cluster was written and is not there")
        return found

    async def register(self, me: Registration, *, lease: float) -> NodeRow:
        """Become the one process that serves as this node, for `lease` seconds; the row as it was before or is now.

        A removed node gets its row and nothing else. Raises NodeIdInUse while another process holds a lease from
        another place, NodeNameTaken when another member has this name.
        """

        async def work(connection: AsyncConnection) -> NodeRow:
            await _bump(connection)
            values = _columns_of(me)
            new = {"node_id": me.node, "state": SINGLE, **values, "instance": None}
            await connection.execute(insert_new(node, connection.dialect), new)
            row = await _row(connection, me.node)
            if row.state == REMOVED:
                return row
            if row.state == MEMBER:
                await _check_name(connection, me.name, me.node)
            free = or_(
                node.c.instance.is_(None),
                node.c.instance == me.instance,
                node.c.place == me.place,
                node.c.lease_until.is_(None),
                node.c.lease_until < db_now(),
            )
            taken = await connection.execute(
                update(node)
                .where(node.c.node_id == me.node, free)
                .values(**values, last_seen_at=db_now(), lease_until=db_now() + lease)
            )
            if taken.rowcount == 0:
                raise NodeIdInUse(row.name, row.address, row.last_seen_at or 0.0, row.lease_left)
            return row

        return await self._storage.run(work, repeatable=True)

    async def renew(self, node_id: bytes, instance: bytes, *, lease: float) -> Pulse:
        """Live on for `lease` seconds from now, and see what there is to know."""

        async def work(connection: AsyncConnection) -> Pulse:
            await connection.execute(
                update(node)
                .where(node.c.node_id == node_id, node.c.instance == instance)
                .values(last_seen_at=db_now(), lease_until=db_now() + lease)
            )
            return await _pulse(connection, node_id, instance)

        # No transaction around the two: neither needs the other.
        return await self._storage.read(work)

    async def look(self, node_id: bytes, instance: bytes) -> Pulse:
        """See what there is to know, and write nothing."""
        return await self._storage.read(lambda connection: _pulse(connection, node_id, instance))

    async def release(self, node_id: bytes, instance: bytes) -> None:
        """This process serves no longer."""

        async def work(connection: AsyncConnection) -> None:
            await connection.execute(
                update(node)
                .where(node.c.node_id == node_id, node.c.instance == instance)
                .values(instance=None, lease_until=None, last_seen_at=db_now())
            )

        await self._storage.run(work, repeatable=True)

    async def all(self) -> Sequence[NodeRow]:
        """Every node this database has ever seen, by name."""

        async def work(connection: AsyncConnection) -> list[NodeRow]:
            return await _rows(connection, None)

        return await self._storage.read(work)

    async def want(self, node_id: bytes) -> None:
        """Ask a node that opens no port to open it for a while."""

        async def work(connection: AsyncConnection) -> None:
            await connection.execute(update(node).where(node.c.node_id == node_id).values(wanted_at=db_now()))

        await self._storage.run(work, repeatable=True)

    async def join(self, nodes: Collection[bytes]) -> Sequence[NodeRow]:
        """Make all of them members, those that are already stay so; all rows as they are then.

        Raises NodeRemoved, NodeNameTaken; then nothing has changed.
        """

        async def work(connection: AsyncConnection) -> list[NodeRow]:
            await _bump(connection)
            for row in await _rows(connection, node.c.node_id.in_(nodes)):
                if row.state == REMOVED:
                    raise NodeRemoved(removed_text(row))
                await _check_name(connection, row.name, row.node)
            await connection.execute(
                update(node)
                .where(node.c.node_id.in_(nodes), node.c.state == SINGLE)
                .values(state=MEMBER, joined_at=db_now(), left_at=None, left_by=None, left_why=None)
            )
            return await _rows(connection, None)

        return await self._storage.run(work, repeatable=True)

    async def remove(self, node_id: bytes, *, by: str, why: str) -> bool:
        """Remove a member for good; False when it was none. Its row stays, as what it is told if it comes back."""

        async def work(connection: AsyncConnection) -> bool:
            await _bump(connection)
            result = await connection.execute(
                update(node)
                .where(node.c.node_id == node_id, node.c.state == MEMBER)
                .values(state=REMOVED, left_at=db_now(), left_by=by, left_why=why)
            )
            return result.rowcount == 1

        return await self._storage.run(work)


def removed_text(row: NodeRow) -> str:
    """`removed from the cluster by xmppd@node01 at 2026-11-21 09:00:00 UTC`."""
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(row.left_at or 0))
    return f"{row.name} was removed from the cluster by {row.left_by} at {when}"


def _columns_of(me: Registration) -> dict[str, Any]:
    return {
        "name": me.name,
        "address": me.address,
        "incarnation": me.incarnation,
        "version": me.version,
        "hosts_hash": me.hosts_hash,
        "instance": me.instance,
        "place": me.place,
    }


_COLUMNS: Final = (
    *(node.c[column] for column in ("node_id", "name", "address", "state", "incarnation", "version", "hosts_hash")),
    *(node.c[column] for column in ("joined_at", "left_at", "left_by", "left_why", "last_seen_at", "lease_until")),
    node.c.wanted_at,
    db_now().label("now"),
)


async def _rows(connection: AsyncConnection, where: ColumnElement[bool] | None) -> list[NodeRow]:
    query = select(*_COLUMNS).order_by(node.c.name, node.c.node_id)
    found = await connection.execute(query if where is None else query.where(where))
    return [_node_row(row) for row in found]


async def _row(connection: AsyncConnection, node_id: bytes) -> NodeRow:
    asked_at = clock.steady()
    row = (await connection.execute(select(*_COLUMNS).where(node.c.node_id == node_id))).one()
    clock.learn(row.now, asked_at)
    return _node_row(row)


def _node_row(row: Any) -> NodeRow:
    values = dict(row._mapping)
    node_id, now = values.pop("node_id"), values.pop("now")
    lease_until, wanted_at = values.pop("lease_until"), values.pop("wanted_at")
    left = 0.0 if lease_until is None else max(0.0, lease_until - now)
    return NodeRow(node_id, lease_left=left, wanted_ago=None if wanted_at is None else now - wanted_at, **values)


async def _pulse(connection: AsyncConnection, node_id: bytes, instance: bytes) -> Pulse:
    revision = select(cluster.c.revision).where(cluster.c.name == _ROW).scalar_subquery().label("revision")
    query = select(node.c.instance, node.c.state, node.c.wanted_at, revision, db_now().label("now"))
    query = query.where(node.c.node_id == node_id)
    asked_at = clock.steady()
    row = (await connection.execute(query)).one_or_none()
    if row is None:
        return Pulse(False, "", 0, None)  # somebody has emptied the tables
    clock.learn(row.now, asked_at)
    wanted = None if row.wanted_at is None else row.now - row.wanted_at
    return Pulse(row.instance == instance, row.state, row.revision or 0, wanted)


async def _bump(connection: AsyncConnection) -> None:
    """First in every change of the members: the row's lock makes them wait for each other."""
    await connection.execute(update(cluster).where(cluster.c.name == _ROW).values(revision=cluster.c.revision + 1))


async def _check_name(connection: AsyncConnection, name: str, node_id: bytes) -> None:
    other = await connection.execute(
        select(node.c.address).where(and_(node.c.name == name, node.c.state == MEMBER, node.c.node_id != node_id))
    )
    row = other.first()
    if row is not None:
        where = f" at {row.address}" if row.address else ""
        raise NodeNameTaken(
            f"another member{where} is called {name}: set `node` in the configuration, or --name, to a name of its own"
        )
