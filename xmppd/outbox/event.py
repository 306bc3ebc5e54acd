"""An event on its way to a sink: what is sent, and what decides about its order and its repetitions."""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from xmppd.protocol.jid import JID

_CROCKFORD: Final = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


@dataclass(slots=True, eq=False)
class Event:
    """Not changed once it is made. `id` from `new_id()`; `partition` and `dedup` are 32 bytes: events of one partition
    go out in order, one with the same `dedup` as another of the last 24 hours is dropped."""

    id: bytes
    sink: str
    host: str
    kind: str
    partition: bytes
    payload: bytes
    created_at: float  # Unix time
    headers: tuple[tuple[str, str], ...] = ()
    dedup: bytes | None = None

    @property
    def ulid(self) -> str:
        return ulid(self.id)

    @property
    def size(self) -> int:
        """What it is taken to weigh in memory, in bytes."""
        return 600 + len(self.payload)


def ulid(row_id: bytes) -> str:
    """16 bytes as 26 letters and digits that sort as they do; the first 48 bits are milliseconds since 1970."""
    number = int.from_bytes(row_id, "big")
    return "".join(_CROCKFORD[number >> shift & 31] for shift in range(125, -1, -5))


def conversation(sender: JID, recipient: JID, *, room: bool = False) -> bytes:
    """The partition of a message: both users, whoever writes; or the room."""
    one, other = ("", recipient.bare) if room else (sender.bare, recipient.bare)
    return _pair(one, other) if one < other else _pair(other, one)


@lru_cache(maxsize=4096)  # those who talk do so for a while
def _pair(one: str, other: str) -> bytes:
    return hashlib.sha256(f"{one}\0{other}".encode()).digest()


def repetition(*parts: str) -> bytes:
    """A dedup key out of its parts."""
    return hashlib.sha256("\0".join(parts).encode()).digest()
