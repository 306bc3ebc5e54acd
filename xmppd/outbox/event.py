"""An event on its way to a sink: what is sent, and what decides about its order and its repetitions."""

import hashlib
from dataclasses import dataclass, field
from functools import lru_cache

from xmppd.protocol.jid import JID
from xmppd.sender.forms import Form, Headers, Raw
from xmppd.sender.target import ulid


@dataclass(slots=True, eq=False)
class Event:
    """Not changed once it is made. `id` from `new_id()`; `partition` and `dedup` are 32 bytes: events of one partition
    go out in order, one with the same `dedup` as another of the last 24 hours is dropped. `raw`, with its `form`, in
    place of headers and payload: these are made where they are needed, in the process that makes requests as a rule."""

    id: bytes
    sink: str
    host: str
    kind: str
    partition: bytes
    payload: bytes
    created_at: float  # Unix time
    headers: Headers = ()
    dedup: bytes | None = None
    raw: Raw | None = None
    form: Form | None = None
    size: int = field(init=False)  # what it is taken to weigh in memory, in bytes

    def __post_init__(self) -> None:
        self.size = 600 + len(self.payload if self.raw is None else self.raw[0])

    def made(self) -> tuple[Headers, bytes]:
        """Headers and payload."""
        if self.raw is None or self.form is None:
            return self.headers, self.payload
        return self.form.make(self.raw)

    @property
    def ulid(self) -> str:
        return ulid(self.id)


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
