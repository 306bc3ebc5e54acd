"""What two nodes tell each other before they are members of one cluster, and whether that fits."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final

from xmppd.cluster.refusals import (
    NODE_LOCAL_DATABASE,
    OTHER_DATABASE,
    OTHER_HOSTS,
    OTHER_VERSION,
    REMOVED,
    SELF,
    Refusal,
)

SKEW: Final = 2.0  # seconds two clocks may differ before it is worth a word
_IDS: Final = ("node", "cluster", "database", "machine")
# A hello is asked for at `hello(name)`; the question and the answer are a card with one word more.
LOOK: Final = "look"  # who are you?
REFRESH: Final = "refresh"  # the members have changed: look into the database


@dataclass(frozen=True, slots=True)
class Card:
    """What a node says about itself."""

    node: bytes
    name: str
    address: str  # host:port; "" when it has none
    version: str
    protocol: int  # the newest version of the frames it understands
    hosts: tuple[str, ...]
    cluster: bytes  # what its database says; b"" while that is away
    database: bytes
    node_local: bool  # its database is a file
    machine: bytes  # the same for all processes of one running machine
    state: str
    time: float  # seconds since 1970

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), **{name: getattr(self, name).hex() for name in _IDS}}

    @classmethod
    def from_json(cls, said: Any) -> "Card":
        """Raises ValueError for what is no card."""
        try:
            known = {name: said[name] for name in cls.__dataclass_fields__}
            known |= {name: bytes.fromhex(known[name]) for name in _IDS}
            return cls(**{**known, "hosts": tuple(map(str, known["hosts"])), "time": float(known["time"])})
        except (LookupError, TypeError, AttributeError, ValueError) as exc:
            raise ValueError(f"not what a node says about itself: {exc!r}") from exc


def differences(mine: Card, other: Card) -> Iterator[Refusal]:
    """Every reason why these two cannot be members of one cluster, the one that explains most first."""
    if other.node == mine.node:
        yield Refusal(
            f"{other.name} has the node id of this node: its data folder was copied. `xmppd --new-identity` makes the "
            "copy a node of its own",
            SELF,
            "name",
        )
    if not other.protocol - 1 <= mine.protocol <= other.protocol + 1:
        yield Refusal(
            f"{other.name} runs xmppd {other.version} (protocol {other.protocol}), this node xmppd {mine.version} "
            f"(protocol {mine.protocol}): one step apart is allowed, so upgrade the older one",
            OTHER_VERSION,
            "version",
        )
    if set(mine.hosts) != set(other.hosts):
        yield Refusal(
            f"{other.name} serves other hosts{_only('there', other.hosts, mine.hosts)}"
            f"{_only('here', mine.hosts, other.hosts)}: make `hosts` the same on both",
            OTHER_HOSTS,
            "hosts",
        )
    yield from _of_databases(mine, other)
    for card, where in ((mine, "this node"), (other, other.name)):
        if card.state == "removed":
            yield Refusal(
                f"{where} was removed from the cluster; `xmppd --new-identity` on it, while it does not run, makes it "
                "a new node that can join",
                REMOVED,
                "database",
            )


def _of_databases(mine: Card, other: Card) -> Iterator[Refusal]:
    if mine.machine != other.machine and (mine.node_local or other.node_local):
        local = " and ".join([*(["this node"] * mine.node_local), *([other.name] * other.node_local)])
        yield Refusal(
            f"{local} keeps its data in an SQLite file, which nodes on two machines cannot share: "
            "set `database.url` to one MySQL or MariaDB for both",
            NODE_LOCAL_DATABASE,
            "database",
        )
    elif not other.database or not mine.database:
        where = "this node" if not mine.database else other.name
        yield Refusal(f"the database does not answer {where}: try again when it does", OTHER_DATABASE, "database")
    elif mine.database != other.database:
        yield Refusal(
            f"{other.name} works with another database than this node: set `database.url` to the same on both",
            OTHER_DATABASE,
            "database",
        )


def _only(where: str, some: tuple[str, ...], others: tuple[str, ...]) -> str:
    found = sorted(set(some) - set(others))
    return f"; only {where}: {', '.join(found)}" if found else ""
