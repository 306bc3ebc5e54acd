"""The NATS subjects of a cluster (docs/cluster-protocol.md); the number is the version of this layout."""

import uuid
from typing import Final

_ROOT: Final = "xmppd.1"


def packets(cluster: bytes, node: bytes) -> str:
    """Where a member takes packets of other members. `cluster` and `node` are UUIDs, 16 bytes each."""
    return f"{_ROOT}.{cluster.hex()}.to.{node.hex()}"


def hello(name: str) -> str:
    """Where a node answers to those who are no members yet; `name` as in `node: xmppd@node01`."""
    return f"{_ROOT}.hello.{name.lower().encode().hex()}"


def event(cluster: bytes, kind: str) -> str:
    """Where observers hear of events; `kind` is one, or `>`."""
    return f"{_ROOT}.{cluster.hex()}.events.{kind}"


def tables(cluster: bytes, observer: str) -> str:
    """Where an observer, or `*` for all, asks for rows."""
    return f"{_ROOT}.{cluster.hex()}.tables.{observer}"


def api(cluster: bytes, observer: str) -> str:
    """Where an observer, or `*` for all, calls commands."""
    return f"{_ROOT}.{cluster.hex()}.api.{observer}"


def about(observer: str) -> str:
    """Where an observer, or `*` for all, asks which cluster this is."""
    return f"{_ROOT}.about.{observer}"


def inbox(observer: str) -> str:
    """The subjects below which an observer takes answers; nobody else may listen there."""
    return f"_INBOX.{observer}.>"


def node_of(text: str) -> bytes | None:
    """The UUID that a server or a client bears as its name; None for all others."""
    try:
        return uuid.UUID(hex=text).bytes if len(text) == 32 else None
    except ValueError:
        return None
