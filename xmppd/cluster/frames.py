"""Packets and frames on the wire (docs/cluster-protocol.md has the same in tables).

Numbers are big-endian. A packet is a header and what its type says:

    magic          2   "xC"
    version        1   of this layout
    type           1   BEAT, DATA, ACK, GOODBYE
    flags          1   PROBE, GAP
    hops           1   0 as sent, 1 after a relay
    cluster       16   cluster id
    from          16   node UUID of the sender
    incarnation    8   of the sender
    session        4   of the sender's end of the link: grows by one each time the link goes down, from 1
    to            16   node UUID of the receiver
    incarnation    8   of the receiver, 0 while unknown
    session        4   of the receiver's end, 0 while unknown
    sent           4   when, microseconds of a clock of the sender's own, modulo 2^32, never 0
    echo           4   `sent` of the packet that came last plus the time since then; 0: none
    direct         4   `sent` of the latest packet that came without a relay; 0: none
    ack            8   all batches up to this number have come
    sack           8   bit i: batch ack + 2 + i has come
    number         8   DATA: of this batch; else: of the last batch that was sent

    BEAT     protocol u8, oldest u8, worker varint, name, version, how many varint, as many node UUIDs: those the sender
             reaches without a relay. `name` and `version` are their length (varint) and UTF-8. More may follow.
    DATA     one batch: frames up to the end
    ACK      nothing
    GOODBYE  the reason: length (varint) and UTF-8

A frame is kind u8 (1 to 127), length varint, body. A kind with 128 added is a piece of a frame that goes on in the
next frame, which has the same kind.

Versions: a node writes the lower of its own and the other side's `protocol`, and OLDEST while it does not know that.
It reads OLDEST to VERSION, which are this version and the one before. Everything up to the sender's incarnation stays
where it is in all versions. Kinds and flags that a reader does not know it passes over.
"""

from dataclasses import dataclass
from struct import Struct
from struct import error as StructError
from typing import Final, NamedTuple

from xmppd.errors import XmppdError

VERSION: Final = 1
OLDEST: Final = 1
MAGIC: Final = b"xC"

BEAT, DATA, ACK, GOODBYE = range(1, 5)
PROBE: Final = 1  # answer with a BEAT at once
GAP: Final = 2  # packets were lost on their way here: send again what is not acknowledged
CONTINUED: Final = 128
SACK_BITS: Final = 64

HEADER: Final = Struct(">2sBBBB16s16sQI16sQIIIIQQQ")
HOPS_AT: Final = 5  # offset
_VERSION_AT: Final = 2
_MAX_BEAT_NODES: Final = 4096
_SENDER: Final = Struct(">2sBBBB16s16sQ")


class FrameError(XmppdError):
    """Bytes from another node that are not what docs/cluster-protocol.md allows."""


class Header(NamedTuple):
    """The fields in their order on the wire."""

    magic: bytes
    version: int
    type: int
    flags: int
    hops: int
    cluster: bytes
    sender: bytes
    sender_incarnation: int
    sender_session: int
    target: bytes
    target_incarnation: int
    target_session: int
    sent: int
    echo: int
    direct: int
    ack: int
    sack: int
    number: int


@dataclass(frozen=True, slots=True)
class Beat:
    """What a heartbeat says about its sender."""

    protocol: int
    oldest: int
    worker: int
    name: str
    version: str
    reaches: tuple[bytes, ...]  # node UUIDs


def varint(number: int) -> bytes:
    """A number from 0 as LEB128: seven bits a byte, the lowest first, the high bit says that more follow."""
    if number < 128:
        return bytes((number,))
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    found.append(number)
    return bytes(found)


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """(the number that begins there, where it ends). FrameError when it is cut off or does not fit 63 bits."""
    number = shift = 0
    while shift < 63:
        if at >= len(data):
            raise FrameError("a number is cut off")
        byte = data[at]
        at += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, at
        shift += 7
    raise FrameError("a number is too large")


def frame_head(kind: int, length: int) -> bytes:
    """What stands before the body of a frame."""
    if length < 128:
        return bytes((kind, length))
    if length < 16384:
        return bytes((kind, length & 127 | 128, length >> 7))
    return bytes((kind,)) + varint(length)


def read_frames(data: bytes, at: int = 0) -> list[tuple[int, bytes]]:
    """(kind, body) of all frames from there to the end. FrameError when they do not end where the data does."""
    frames: list[tuple[int, bytes]] = []
    end = len(data)
    try:
        while at < end:
            kind = data[at]
            length = data[at + 1]
            at += 2
            if length > 127:
                more = data[at]
                if more < 128:  # spelled out: most stanzas are of this length
                    length += (more << 7) - 128
                    at += 1
                else:
                    length, at = read_varint(data, at - 1)
            body = data[at : at + length]
            at += length
            if not kind & 127:
                raise FrameError("kind 0")
            frames.append((kind, body))
    except IndexError:
        raise FrameError("a frame is cut off") from None
    if at != end:
        raise FrameError("a frame is cut off")
    return frames


def read_header(data: bytes) -> Header:
    """The header of a packet of a version we read. FrameError for anything else."""
    try:
        header = Header._make(HEADER.unpack_from(data))
    except StructError:
        raise FrameError("a packet is cut off") from None
    if header.magic != MAGIC:
        raise FrameError("no packet of ours")
    if not OLDEST <= header.version <= VERSION:
        raise FrameError(f"version {header.version}")
    if not BEAT <= header.type <= GOODBYE:
        raise FrameError(f"type {header.type}")
    return header


def strange_version(data: bytes) -> tuple[bytes, bytes, int] | None:
    """(cluster id, node UUID of the sender, version) of a packet of ours in a version we cannot read, else None."""
    if len(data) < _SENDER.size or data[:2] != MAGIC or OLDEST <= data[_VERSION_AT] <= VERSION:
        return None
    fields = _SENDER.unpack_from(data)
    return fields[5], fields[6], fields[1]


def relayed(packet: bytes) -> bytes:
    """The same packet as a relay passes it on."""
    return packet[:HOPS_AT] + b"\x01" + packet[HOPS_AT + 1 :]


def text(value: str) -> bytes:
    """A text as its length and UTF-8."""
    data = value.encode("utf-8", "replace")
    return varint(len(data)) + data


def read_text(data: bytes, at: int) -> tuple[str, int]:
    """(the text that begins there, where it ends)."""
    length, at = read_varint(data, at)
    end = at + length
    if end > len(data):
        raise FrameError("a text is cut off")
    try:
        return data[at:end].decode(), end
    except UnicodeDecodeError:
        raise FrameError("a text is not UTF-8") from None


def beat_body(beat: Beat) -> bytes:
    """What follows the header of a BEAT."""
    head = bytes((beat.protocol, beat.oldest)) + varint(beat.worker) + text(beat.name) + text(beat.version)
    return head + varint(len(beat.reaches)) + b"".join(beat.reaches)


def read_beat(data: bytes, at: int = HEADER.size) -> Beat:
    """The BEAT whose body begins there; what a newer version adds at the end is passed over."""
    if len(data) < at + 2:
        raise FrameError("a beat is cut off")
    protocol, oldest = data[at], data[at + 1]
    worker, at = read_varint(data, at + 2)
    name, at = read_text(data, at)
    version, at = read_text(data, at)
    count, at = read_varint(data, at)
    if count > _MAX_BEAT_NODES or at + 16 * count > len(data):
        raise FrameError("a beat is cut off")
    reaches = tuple(data[start : start + 16] for start in range(at, at + 16 * count, 16))
    return Beat(protocol, oldest, worker, name, version, reaches)
