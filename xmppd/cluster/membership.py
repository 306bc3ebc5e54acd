"""Who is a member: as the database says, or while it is away as the copy in the data folder says.

The copy holds what a node needs to find the others again, and whether it was removed. It is written whole and with a
checksum; one that is damaged counts as none.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Protocol

from xmppd.log import get_logger

log = get_logger("cluster")

SINGLE: Final = "single"
MEMBER: Final = "member"
REMOVED: Final = "removed"
_FORMAT: Final = 1


class Node(Protocol):
    """A node as the database knows it (storage.members.NodeRow)."""

    @property
    def node(self) -> bytes: ...
    @property
    def name(self) -> str: ...
    @property
    def address(self) -> str: ...
    @property
    def state(self) -> str: ...
    @property
    def incarnation(self) -> int: ...
    @property
    def version(self) -> str: ...
    @property
    def joined_at(self) -> float | None: ...
    @property
    def left_at(self) -> float | None: ...
    @property
    def left_by(self) -> str | None: ...
    @property
    def left_why(self) -> str | None: ...
    @property
    def running(self) -> bool: ...


class Identity(Protocol):
    """Of the database (storage.members.DatabaseIdentity)."""

    @property
    def cluster(self) -> bytes: ...
    @property
    def database(self) -> bytes: ...


class Pulse(Protocol):
    """What a look at the database told (storage.members.Pulse)."""

    @property
    def ours(self) -> bool: ...
    @property
    def state(self) -> str: ...
    @property
    def revision(self) -> int: ...
    @property
    def wanted_ago(self) -> float | None: ...


class Store(Protocol):
    """The database (storage.members.Members). Everything raises StorageError when it does not do what was asked."""

    async def identity(self) -> Identity: ...
    async def renew(self, node_id: bytes, instance: bytes, *, lease: float) -> Pulse: ...
    async def look(self, node_id: bytes, instance: bytes) -> Pulse: ...
    async def release(self, node_id: bytes, instance: bytes) -> None: ...
    async def all(self) -> Sequence[Node]: ...
    async def want(self, node_id: bytes) -> None: ...
    async def join(self, nodes: Collection[bytes]) -> Sequence[Node]: ...
    async def remove(self, node_id: bytes, *, by: str, why: str) -> bool: ...


class Folder(Protocol):
    """The data folder (identity.DataFolder)."""

    def read_members(self) -> str | None: ...
    def write_members(self, text: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Member:
    """One member of this cluster."""

    node: bytes  # UUID
    name: str
    address: str  # host:port

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Departure:
    """That a node was removed: by whom, when (seconds since 1970), why."""

    by: str
    at: float
    why: str


@dataclass(frozen=True, slots=True)
class Copy:
    """What the data folder knows of the cluster."""

    cluster: bytes = b""
    database: bytes = b""
    state: str = SINGLE  # this node's
    members: tuple[Member, ...] = ()
    removed: Departure | None = None

    def text(self) -> str:
        body = {
            "format": _FORMAT,
            "cluster": self.cluster.hex(),
            "database": self.database.hex(),
            "state": self.state,
            "members": [{**asdict(member), "node": member.node.hex()} for member in self.members],
            "removed": None if self.removed is None else asdict(self.removed),
        }
        return json.dumps({**body, "checksum": _checksum(body)}, indent=1) + "\n"

    @classmethod
    def parse(cls, text: str) -> "Copy":
        """Raises ValueError."""
        try:
            body = json.loads(text)
            checksum = body.pop("checksum")
            if checksum != _checksum(body) or body["format"] != _FORMAT:
                raise ValueError("the checksum is wrong")
            return cls(
                bytes.fromhex(body["cluster"]),
                bytes.fromhex(body["database"]),
                body["state"],
                tuple(Member(bytes.fromhex(each["node"]), each["name"], each["address"]) for each in body["members"]),
                None if body["removed"] is None else Departure(**body["removed"]),
            )
        except (LookupError, TypeError, AttributeError, ValueError) as exc:
            raise ValueError(str(exc)) from exc


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


class Membership:
    """The members as this node knows them now, and their copy in the data folder."""

    def __init__(self, me: bytes, folder: Folder) -> None:
        self.me = me
        self._folder = folder
        self.copy = self._read()
        self.revision = 0  # of what came from the database; 0: nothing yet
        self.nodes: tuple[Node, ...] = ()  # every row of the database when it was last read

    def _read(self) -> Copy:
        text = self._folder.read_members()
        if text is None:
            return Copy()
        try:
            return Copy.parse(text)
        except ValueError as exc:
            log.warning("copy of the members is damaged", problem=exc)
            return Copy()

    @property
    def state(self) -> str:
        return self.copy.state

    @property
    def members(self) -> tuple[Member, ...]:
        """All of them, this node too if it is one."""
        return self.copy.members

    @property
    def others(self) -> tuple[Member, ...]:
        return tuple(member for member in self.copy.members if member.node != self.me)

    def is_member(self, node: bytes) -> bool:
        return any(member.node == node for member in self.copy.members)

    def by_name(self, name: str) -> Member | None:
        return next((member for member in self.copy.members if member.name == name), None)

    def name_of(self, node: bytes) -> str:
        """For people; the UUID of one that is no member."""
        names = {each.node: each.name for each in self.nodes} | {each.node: each.name for each in self.copy.members}
        return names.get(node) or node.hex()

    def take(self, identity: Identity, nodes: Iterable[Node], revision: int) -> bool:
        """Believe the database; True when the members are others than before, or have other names or addresses."""
        self.nodes, self.revision = tuple(nodes), revision
        mine = next((each for each in self.nodes if each.node == self.me), None)
        state = SINGLE if mine is None else mine.state
        members = tuple(Member(n.node, n.name, n.address) for n in self.nodes if n.state == MEMBER)
        removed = None
        if mine is not None and state == REMOVED:
            removed = Departure(mine.left_by or "", mine.left_at or 0.0, mine.left_why or "")
        copy = replace(
            self.copy,
            cluster=identity.cluster,
            database=identity.database,
            state=state,
            members=members if state == MEMBER else (),
            removed=removed,
        )
        if copy == self.copy:
            return False
        self.copy = copy
        self._folder.write_members(copy.text())
        return True
