"""The first thing a starting node does with its database: is it ours, are we still welcome, and are we the only one?"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final

from xmppd.cluster.membership import MEMBER, REMOVED, Departure, Membership, Node, Store
from xmppd.errors import NodeIdInUse, NodeRemoved, StorageUnavailable, WrongDatabase
from xmppd.log import get_logger

log = get_logger("cluster")

TIMEOUT: Final = 5.0  # seconds for a database that hangs
_LOOK: Final = 0.5  # seconds between two looks whether another process with our node id lives
_MARGIN: Final = 1.0


async def claim(membership: Membership, store: Store, register: Callable[[], Awaitable[Node]], *, where: str) -> None:
    """Become the one process that serves as this node; `membership` has what the database says afterwards.

    `where` names the database for people. Raises NodeRemoved, WrongDatabase, NodeIdInUse, NodeNameTaken; StorageError
    when the database does not do what it was asked.
    """
    try:
        async with asyncio.timeout(TIMEOUT):
            identity = await store.identity()
    except TimeoutError as exc:
        raise StorageUnavailable(f"{where}: no answer within {TIMEOUT:g} s") from exc
    copy = membership.copy
    ours = identity.cluster == copy.cluster
    if copy.state == MEMBER and not ours:
        raise WrongDatabase(
            f"{where} belongs to the cluster {identity.cluster.hex()[:8]}, this node to {copy.cluster.hex()[:8]}: set "
            "`database.url` to the database of its cluster, or make it a new node with `xmppd --new-identity`"
        )
    if copy.state == REMOVED:
        if ours:
            raise NodeRemoved(removed(copy.removed))
        log.warning("removed from the cluster, serving alone", by=copy.removed.by if copy.removed else "")
    row = await _register(register)
    pulse_nodes = await store.all()
    membership.take(identity, pulse_nodes, 0)
    if row.state == REMOVED:
        raise NodeRemoved(removed(membership.copy.removed))


async def _register(register: Callable[[], Awaitable[Node]]) -> Node:
    """A lease of another process with our id may be what is left of one that died in another place: then it ends."""
    give_up = 0.0
    seen = 0.0
    while True:
        try:
            return await register()
        except NodeIdInUse as exc:
            now = time.monotonic()
            if not give_up:
                give_up, seen = now + exc.lease_left + _MARGIN, exc.last_seen
                log.warning("node id in use, waiting whether it is", seconds=round(exc.lease_left, 1))
            if exc.last_seen != seen or now > give_up:
                raise
        await asyncio.sleep(_LOOK)


def removed(departure: Departure | None) -> str:
    """Why a node does not serve."""
    by, at, why = ("somebody", 0.0, "") if departure is None else (departure.by, departure.at, departure.why)
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(at))
    return (
        f"this node was removed from the cluster by {by} at {when}{f' ({why})' if why else ''} and does not serve from "
        "its database any more. To join again start it once with `xmppd --new-identity`, which makes it a new node"
    )
