"""Rows of other nodes as bytes: what a row looks like on the wire and in memory.

A row is (group, item, value): a group is what is looked up (a bare JID, a domain), items tell its rows apart (a
resource).

    row    = length group  length item  length value        lengths are varints (frames.py)
    packed = { length item  length value }                  all rows of one group, in memory

Group and item are UTF-8. Fields are only ever added to the end of a value: who does not know them skips them, and keeps
them, so that digests agree between versions.

Hundreds of thousands of rows as objects would cost 1 KiB each and make every collection of garbage slow. A dict of str
to bytes costs a quarter, and the collector never looks into it.
"""

from collections.abc import Iterator
from hashlib import blake2b

from xmppd.cluster.frames import FrameError, read_varint, varint


def row_bytes(group: str, item: bytes, value: bytes) -> bytes:
    """A row as it crosses the wire."""
    name = group.encode()
    if len(name) < 128:
        return b"%c%b%b" % (len(name), name, _entry(item, value))
    return varint(len(name)) + name + _entry(item, value)


def _entry(item: bytes, value: bytes) -> bytes:
    if len(item) < 128 and len(value) < 128:
        return b"%c%b%c%b" % (len(item), item, len(value), value)
    return b"".join((varint(len(item)), item, varint(len(value)), value))


def read_row(data: bytes, at: int) -> tuple[str, bytes, bytes, int]:
    """(group, item, value, where it ends) of the row that begins at `at`. FrameError when it is none."""
    name, at = _read_bytes(data, at)
    item, at = _read_bytes(data, at)
    value, at = _read_bytes(data, at)
    try:
        return name.decode(), item, value, at
    except UnicodeDecodeError as exc:
        raise FrameError("a group is no text") from exc


def _read_bytes(data: bytes, at: int) -> tuple[bytes, int]:
    length, start = (data[at], at + 1) if at < len(data) and data[at] < 128 else read_varint(data, at)
    end = start + length
    if end > len(data):
        raise FrameError("a row is cut off")
    return data[start:end], end


def digest_of(row: bytes) -> int:
    """64 bits of a row's bytes. The digest of many rows is the XOR of theirs, so it is kept up as rows come and go."""
    return int.from_bytes(blake2b(row, digest_size=8).digest(), "big")


def items_in(packed: bytes) -> list[tuple[bytes, bytes]]:
    """(item, value) of each row of one group."""
    at, found = 0, []
    while at < len(packed):
        item, at = _read_bytes(packed, at)
        value, at = _read_bytes(packed, at)
        found.append((item, value))
    return found


class PackedRows:
    """Rows of one owner and table: group -> packed, with their number, digest and number per host."""

    __slots__ = ("count", "digest", "groups", "hosts")

    def __init__(self) -> None:
        self.groups: dict[str, bytes] = {}
        self.count = 0
        self.digest = 0
        self.hosts: dict[str, int] = {}  # by the domain of the group

    def put(self, group: str, item: bytes, value: bytes) -> bytes | None:
        """Add or replace a row; the value it had comes back."""
        entry = _entry(item, value)
        packed = self.groups.get(group)
        if packed is None:
            self.groups[group] = entry
            old = None
        else:
            old, others = _take(packed, item)
            self.groups[group] = others + entry
        if old is None:
            self._count(group, 1)
        else:
            self.digest ^= digest_of(row_bytes(group, item, old))
        self.digest ^= digest_of(row_bytes(group, item, value))
        return old

    def delete(self, group: str, item: bytes) -> bytes | None:
        """Take a row out; its value, or None when there is none."""
        packed = self.groups.get(group)
        if packed is None:
            return None
        old, others = _take(packed, item)
        if old is None:
            return None
        if others:
            self.groups[group] = others
        else:
            del self.groups[group]
        self._count(group, -1)
        self.digest ^= digest_of(row_bytes(group, item, old))
        return old

    def all(self) -> Iterator[tuple[str, bytes, bytes]]:
        """Every (group, item, value). Rows may come and go meanwhile; those that stay are all named."""
        for group in list(self.groups):
            for item, value in items_in(self.groups.get(group, b"")):
                yield group, item, value

    def _count(self, group: str, more: int) -> None:
        self.count += more
        host = group.rpartition("@")[2]
        left = self.hosts.get(host, 0) + more
        if left:
            self.hosts[host] = left
        else:
            del self.hosts[host]


def _take(packed: bytes, wanted: bytes) -> tuple[bytes | None, bytes]:
    """The value of one item, and the rows without it."""
    start = 0
    while start < len(packed):
        item, at = _read_bytes(packed, start)
        value, end = _read_bytes(packed, at)
        if item == wanted:
            return value, packed[:start] + packed[end:]
        start = end
    return None, packed
