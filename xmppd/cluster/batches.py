"""The two directions of a link: frames into numbered batches and out of them again, and how long the way is.

Pure, and without any knowledge of sessions, ways and heartbeats: that is link.py.
"""

from collections import deque
from math import inf
from typing import Final

from xmppd.cluster.frames import CONTINUED, SACK_BITS, FrameError, frame_head, read_frames

WINDOW_MIN, WINDOW_FIRST, WINDOW_MAX = 64 * 1024, 1024 * 1024, 4 * 1024 * 1024  # bytes on their way
MAX_IN_FLIGHT: Final = SACK_BITS  # batches: so that the bitmap of an acknowledgement can name each of them
RESEND_BYTES: Final = 512 * 1024  # at once
ACK_DELAY: Final = 0.02  # seconds a lonely acknowledgement waits for company
_RTO_MIN, _RTO_MAX, _RTO_FIRST = 0.1, 0.5, 0.5  # seconds
_PIECE_HEAD: Final = 8  # bytes, at most, before the body of a piece


class Pace:
    """Round-trip time, and from it how long to wait for an acknowledgement (RFC 6298 2)."""

    __slots__ = ("_rttvar", "backoff", "srtt")

    def __init__(self) -> None:
        self.srtt = 0.0  # seconds, 0 while not measured
        self._rttvar = 0.0
        self.backoff = 0  # time-outs in a row

    def measured(self, rtt: float) -> None:
        """One round trip, in seconds."""
        if not self.srtt:
            self.srtt, self._rttvar = max(rtt, 1e-6), rtt / 2
        else:
            self._rttvar += (abs(self.srtt - rtt) - self._rttvar) / 4
            self.srtt += (rtt - self.srtt) / 8

    def timeout(self) -> float:
        """Seconds until what is not acknowledged is sent again."""
        base = max(self.srtt + 4 * self._rttvar + ACK_DELAY, _RTO_MIN) if self.srtt else _RTO_FIRST
        return min(base * (1 << self.backoff), max(_RTO_MAX, 4 * self.srtt))


class Batch:
    """One that is on its way: its packet as first sent."""

    __slots__ = ("arrived", "first_sent", "frames", "packet", "sent", "size")

    def __init__(self, packet: bytes, size: int, frames: int, now: float) -> None:
        self.packet = packet
        self.size = size  # bytes without the header
        self.frames = frames
        self.first_sent = self.sent = now
        self.arrived = False  # the bitmap said so


class Sending:
    """Frames that wait, batches that are on their way. `limit`: bytes of frames in one batch."""

    __slots__ = (
        "_closed",
        "_frames",
        "_limit",
        "_parts",
        "_size",
        "_window",
        "acked",
        "flight",
        "flight_bytes",
        "number",
        "recover_at",
        "waiting_bytes",
        "waiting_frames",
    )

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._parts: list[bytes] = []  # of the open batch: heads and bodies in turn
        self._size = self._frames = 0
        self._closed: deque[tuple[list[bytes], int, int]] = deque()  # parts, size, frames
        self._window = WINDOW_FIRST
        self.flight: dict[int, Batch] = {}  # in order of their numbers
        self.flight_bytes = 0
        self.waiting_bytes = self.waiting_frames = 0  # not acknowledged, whether sent or not
        self.number = 0  # of the batch that was sent last
        self.acked = 0
        self.recover_at = -inf  # what was last sent before is to be sent again

    def push(self, kind: int, body: bytes) -> None:
        """Queue a frame; in pieces, when it does not fit one packet."""
        length = len(body)
        head = frame_head(kind, length)
        size = len(head) + length
        if self._size + size > self._limit:
            self._close()
            if size > self._limit:
                return self._push_pieces(kind, body)
        self._parts += (head, body)
        self._size += size
        self._frames += 1
        self.waiting_frames += 1
        self.waiting_bytes += size

    def _push_pieces(self, kind: int, body: bytes) -> None:
        step = self._limit - _PIECE_HEAD
        for start in range(0, len(body), step):
            more = CONTINUED if start + step < len(body) else 0
            self.push(kind | more, body[start : start + step])

    def _close(self) -> None:
        if self._parts:
            self._closed.append((self._parts, self._size, self._frames))
            self._parts, self._size, self._frames = [], 0, 0

    @property
    def ready(self) -> bool:
        """Whether there is a batch that may be sent now."""
        if not self._parts and not self._closed:
            return False
        return self.flight_bytes < self._window and len(self.flight) < MAX_IN_FLIGHT

    def next_batch(self) -> tuple[list[bytes], int, int] | None:
        """(parts, size, frames) of the batch to send next, which counts as sent; None: nothing, or not now."""
        if not self.ready:
            return None
        if not self._closed:
            self._close()
        self.number += 1
        return self._closed.popleft()

    def sent(self, packet: bytes, size: int, frames: int, now: float) -> None:
        """That batch is on its way in this packet."""
        self.flight[self.number] = Batch(packet, size, frames, now)
        self.flight_bytes += size

    def acknowledged(self, ack: int) -> bool:
        """All up to that number came; True when this is news. FrameError for one that was never sent."""
        if ack > self.number:
            raise FrameError("an acknowledgement of what was never sent")
        if ack <= self.acked:
            return False
        for number in range(self.acked + 1, ack + 1):
            batch = self.flight.pop(number)
            self.flight_bytes -= batch.size
            self.waiting_bytes -= batch.size
            self.waiting_frames -= batch.frames
            self._window = min(self._window + batch.size, WINDOW_MAX)
        self.acked = ack
        return True

    def missing(self, ack: int, sack: int, now: float, rtt: float) -> list[int]:
        """Of the batches before the last that came: those which did not, and should have been acknowledged by now."""
        last = ack + 1 + sack.bit_length()
        first, again = now - 0.9 * rtt, now - 1.25 * rtt  # sent once; sent again already
        found = []
        for number, batch in self.flight.items():
            if number > last:
                break
            if number >= ack + 2 and sack >> (number - ack - 2) & 1:
                batch.arrived = True
            elif not batch.arrived and batch.sent <= (first if batch.sent == batch.first_sent else again):
                found.append(number)
        return found

    def to_recover(self) -> list[int]:
        """The next batches to send again, RESEND_BYTES at most, until none is left from before `recover_at`."""
        found, budget = [], RESEND_BYTES
        for number, batch in self.flight.items():
            if not batch.arrived and batch.sent < self.recover_at:
                found.append(number)
                budget -= batch.size
                if budget < 0:
                    return found
        self.recover_at = -inf
        return found

    def narrow(self) -> None:
        """Something was lost: send less at once."""
        self._window = max(self._window // 2, WINDOW_MIN)


class Receiving:
    """Batches of the other end, put in order."""

    __slots__ = ("_max_frame", "_partial", "_partial_size", "early", "number")

    def __init__(self, max_frame: int) -> None:
        self._max_frame = max_frame
        self.number = 0  # all batches up to this one have come
        self.early: dict[int, list[tuple[int, bytes]]] = {}  # their frames
        self._partial: list[bytes] = []
        self._partial_size = 0

    def sack(self) -> int:
        """The bitmap that goes with `number`."""
        sack = 0
        for early in self.early:
            sack |= 1 << early - self.number - 2
        return sack

    def take(self, number: int, data: bytes, at: int) -> list[tuple[int, bytes]] | None:
        """The frames that are next, with this batch and those that waited for it; None when it came already.
        FrameError when it cannot be read: then it has not come."""
        expected = self.number + 1
        if number < expected or number in self.early:
            return None
        if number > expected:
            if number - expected <= SACK_BITS:
                self.early[number] = read_frames(data, at)
            return []
        frames = read_frames(data, at)
        self.number = number
        while self.early:
            early = self.early.pop(self.number + 1, None)
            if early is None:
                break
            frames += early
            self.number += 1
        if self._partial or any(kind >= CONTINUED for kind, _ in frames):
            return self._join(frames)
        return frames

    @property
    def overflows(self) -> bool:
        """The other end sends a frame larger than any may be."""
        return self._partial_size > self._max_frame

    def _join(self, frames: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
        """The frames, with pieces put together."""
        joined: list[tuple[int, bytes]] = []
        for kind, body in frames:
            if kind >= CONTINUED:
                self._partial.append(body)
                self._partial_size += len(body)
                if self.overflows:
                    break
                continue
            if self._partial:
                body = b"".join((*self._partial, body))
                self._partial.clear()
                self._partial_size = 0
            joined.append((kind, body))
        return joined
