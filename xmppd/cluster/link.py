"""One link to another member: frames each once and in order while it is up, over packets that may be lost or late.

Pure: time is handed in (seconds of any clock that only grows), packets leave through `emit`, what happened stands in
`events`, the frames come back from `receive`. links.py drives it.

Each end numbers its lives (`session`, from 1 in each incarnation). The link is up when an end has seen its own number
beside the other's; when one end goes down its next number makes the other go down too. A pair of numbers is an epoch,
and nothing of another epoch is taken.

The frames of one turn of the loop, or of a few turns while each brings more (links.py), make a batch, one packet
(batches.py). Batches are numbered, acknowledged up to a
number and by a bitmap, and sent again as they are.

Which way: directly as long as the other end confirms, within DIRECT_BEATS heartbeats, that packets come directly; else
through a member that both reach, if there is one. Heartbeats try the direct way all the time. The two directions are
judged apart, so a cut of one of them is no different.
"""

from math import inf
from typing import Final

from xmppd.cluster.batches import ACK_DELAY, Pace, Receiving, Sending
from xmppd.cluster.frames import (
    ACK,
    BEAT,
    DATA,
    GAP,
    GOODBYE,
    HEADER,
    MAGIC,
    OLDEST,
    PROBE,
    VERSION,
    Beat,
    FrameError,
    Header,
    beat_body,
    read_beat,
    read_text,
    text,
)
from xmppd.cluster.interfaces import Peer
from xmppd.cluster.link_types import Counts, Down, Event, Farewell, Incompatible, Local, State, Up, Way
from xmppd.cluster.tables import Owner

DIRECT_BEATS: Final = 3
ACK_EVERY: Final = 8  # batches
GREET_EVERY: Final = 0.02  # seconds between two answers to somebody who does not know our session
PROBES: Final = 5
_PROBE_LONGEST: Final = 0.9  # seconds, where the way is long
_MAX_BACKOFF: Final = 6
_DOUBT: Final = 2  # time-outs in a row until another way is tried
_STUCK: Final = 5  # peer_timeouts without progress although the peer is alive
_MAX_RTT: Final = 60.0  # seconds; above it is no measurement
_MASK: Final = 0xFFFFFFFF


class Link:
    """One end. After each call that takes `now`: look at `events`, then ask `deadline` when `tick` is due."""

    __slots__ = (
        "_ack_at",
        "_beat_at",
        "_blocked_until",
        "_direct_stamp",
        "_direct_until",
        "_doubted_at",
        "_echo_at",
        "_echo_stamp",
        "_greeted_at",
        "_heard",
        "_in",
        "_local",
        "_out",
        "_pace",
        "_probe_at",
        "_probes_left",
        "_probing_since",
        "_relay_turn",
        "_rto_at",
        "_theirs",
        "_unacked",
        "_up_at",
        "counts",
        "dirty",
        "events",
        "node",
        "peer",
        "reaches",
        "session",
        "state",
        "up_since",
        "via",
    )

    def __init__(self, local: Local, node: bytes, now: float) -> None:
        self._local = local
        self.node = node
        self.peer: Peer | None = None  # as it last said; kept while down
        self.state = State.TRYING
        self.session = 1
        self.events: list[Event] = []
        self.counts = Counts()
        self.dirty = False  # for the driver: it stands on the list of those to flush
        self.up_since = 0.0  # for the driver
        self._blocked_until = -inf
        self._reset(now)

    def _reset(self, now: float) -> None:
        """Nothing sent, nothing heard: the state of a new session."""
        self._out = Sending(self._local.max_packet - HEADER.size)
        self._in = Receiving(self._local.settings.max_frame)
        self._pace = Pace()
        self._theirs = (0, 0)  # incarnation and session of the other end
        self._heard = self._up_at = self._beat_at = now
        self._greeted_at = -inf
        self._unacked = 0  # batches that came since we last sent anything
        self._ack_at = self._rto_at = self._probe_at = inf
        self._probing_since = -inf
        self._probes_left = 0
        self._echo_stamp = self._direct_stamp = 0  # `sent` of their latest packet, of the latest without a relay
        self._echo_at = 0.0
        self._direct_until = self._doubted_at = -inf
        self._relay_turn = 0
        self.via: bytes | None = None  # the node our packets go through
        self.reaches: frozenset[bytes] = frozenset()  # whom the other end reaches directly

    # What others ask

    @property
    def queue_frames(self) -> int:
        """Frames that wait or are not acknowledged."""
        return self._out.waiting_frames

    @property
    def queue_bytes(self) -> int:
        """Bytes that wait or are not acknowledged."""
        return self._out.waiting_bytes

    @property
    def rtt(self) -> float:
        """Seconds, 0 while not measured."""
        return self._pace.srtt

    @property
    def epoch(self) -> str:
        """Our number and theirs, the same two on both ends."""
        return f"{self.session}/{self._theirs[1]}"

    def direct(self, now: float) -> bool:
        """Whether the other end gets what we send without a relay, by its own latest word."""
        return self.state is State.UP and now < self._direct_until

    def silence(self, now: float) -> float:
        """Seconds since something came from the other end, on whatever way."""
        return now - self._heard

    def deadline(self) -> float:
        """When `tick` has something to do."""
        if self.state is State.UP:
            silent_at = self._heard + self._local.settings.peer_timeout
            return min(self._beat_at, self._ack_at, self._rto_at, self._probe_at, silent_at)
        return self._blocked_until if self.state is State.BLOCKED else self._beat_at

    def wants_flush(self, now: float) -> bool:
        """Whether something could leave now."""
        return self.state is State.UP and (self._ack_at <= now or self._out.ready)

    # Sending

    def send(self, kind: int, body: bytes) -> None:
        """Queue a frame for the next `flush`; only while up. ValueError when it is longer than `max_frame`."""
        if len(body) > self._local.settings.max_frame:
            raise ValueError(f"a frame of {len(body)} bytes, at most {self._local.settings.max_frame} are possible")
        self._out.push(kind, body)

    def flush(self, now: float) -> None:
        """Send what waits, as much as the window allows, and an acknowledgement that is due."""
        out = self._out
        if out.waiting_bytes > self._local.settings.max_queue:
            return self._go_down("too much waits for it", "overflow", now)
        while (batch := out.next_batch()) is not None:
            parts, size, frames = batch
            parts.insert(0, self._header(DATA, 0, out.number, now))
            packet = b"".join(parts)
            out.sent(packet, size, frames, now)
            self.counts.sent_frames += frames
            if self._rto_at == inf:
                self._rto_at = now + self._pace.timeout()
            self._emit(packet, now)
        if self._ack_at <= now:
            self._emit(self._header(ACK, 0, out.number, now), now)

    def _header(self, type: int, flags: int, number: int, now: float) -> bytes:
        """The header of a packet; whatever goes out acknowledges what came in."""
        local, owner = self._local, self._local.owner
        echo = 0
        if self._echo_stamp:
            echo = (self._echo_stamp + int((now - self._echo_at) * 1e6)) & _MASK or 1
        version = OLDEST
        if self.state is State.UP and self.peer is not None:
            version = min(VERSION, self.peer.protocol)
        self._ack_at = inf
        self._unacked = 0
        return HEADER.pack(
            MAGIC, version, type, flags, 0, local.cluster,
            owner.member, owner.incarnation, self.session, self.node, *self._theirs,
            int(now * 1e6) & _MASK or 1, echo, self._direct_stamp,
            self._in.number, self._in.sack() if self._in.early else 0, number,
        )  # fmt: skip

    def _emit(self, packet: bytes, now: float) -> None:
        self._hand(self._way(now) or self.node, packet)

    def _hand(self, node: bytes, packet: bytes) -> None:
        self.counts.sent_packets += 1
        self.counts.sent_bytes += len(packet)
        self._local.emit(node, packet)

    def _way(self, now: float) -> bytes | None:
        """The node to hand packets to instead of the other end itself."""
        via = None
        if now >= self._direct_until and (relays := self._local.relays(self.node)):
            via = relays[self._relay_turn % len(relays)]
        if via != self.via and self.state is State.UP and self.peer is not None:
            self.via = via
            self.events.append(Way(self.peer, via))
        return via

    def _beat(self, now: float, flags: int = 0) -> None:
        """A heartbeat: always directly, and through a relay too where the direct way is not known to work."""
        local = self._local
        beat = Beat(VERSION, OLDEST, local.owner.worker, local.name, local.version, local.reaches())
        packet = self._header(BEAT, flags, self._out.number, now) + beat_body(beat)
        self._hand(self.node, packet)
        if (via := self._way(now)) is not None:
            self._hand(via, packet)

    # Time

    def tick(self, now: float) -> None:
        """Do what is due."""
        if self.state is State.BLOCKED:
            if now < self._blocked_until:
                return
            self.state = State.TRYING
            self._beat_at = now
        if self.state is State.UP:
            if now >= self._heard + self._local.settings.peer_timeout:
                self._go_down(f"silent for {now - self._heard:.1f} s", "silent", now)
            elif now >= self._probe_at:
                self._probe(now)
            elif now >= self._rto_at:
                self._time_out(now)
        if now >= self._beat_at:
            self._beat_at = now + self._local.settings.heartbeat
            if self.state is State.TRYING:
                self._relay_turn += 1
            self._beat(now)
        if self.state is State.UP:
            self.flush(now)

    def paused(self, seconds: float) -> None:
        """This process did not run for so long: nobody else is to blame for the silence."""
        self._heard += seconds
        self._probing_since += seconds
        self._probe_at += seconds
        self._direct_until += seconds

    def suspect(self, now: float) -> None:
        """Somebody says that the other process has gone: ask it, and be quick to believe it."""
        if self.state is State.UP and not self._probes_left:
            self._probing_since = now
            self._probes_left = PROBES + 1
            self._probe(now)

    def _probe(self, now: float) -> None:
        self._probes_left -= 1
        if not self._probes_left:
            return self._go_down("its process has gone", "gone", now)
        whole = max(self._local.settings.suspect, min(3 * self.rtt, _PROBE_LONGEST))
        self._probe_at = self._probing_since + whole * (PROBES + 1 - self._probes_left) / PROBES
        self._beat(now, PROBE)

    def _time_out(self, now: float) -> None:
        oldest = next(iter(self._out.flight.values()))
        if now - oldest.first_sent > _STUCK * self._local.settings.peer_timeout:
            return self._go_down("it does not acknowledge what it gets", "stuck", now)
        self._pace.backoff = min(self._pace.backoff + 1, _MAX_BACKOFF)
        self._out.narrow()
        if self._pace.backoff >= _DOUBT:  # this way may be cut, whatever we heard of it before
            self._doubted_at = now
            self._direct_until = -inf
            self._relay_turn += 1
        self._out.recover_at = now - self.rtt  # what is younger may well be on its way
        self._send_again(self._out.to_recover(), now)
        self._rto_at = now + self._pace.timeout()

    def _send_again(self, numbers: list[int], now: float) -> None:
        for number in numbers:
            batch = self._out.flight[number]
            batch.sent = now
            self.counts.retransmitted += 1
            self._emit(self._header(DATA, 0, number, now) + batch.packet[HEADER.size :], now)

    # Receiving

    def receive(self, header: Header, data: bytes, now: float) -> list[tuple[int, bytes]]:
        """A packet from that node to us: the frames that are next. `events` come before them."""
        counts = self.counts
        counts.received_packets += 1
        counts.received_bytes += len(data)
        try:
            if not self._is_current(header, data, now):
                return []
            self._heard = now
            self._times(header, now)
            if self._out.flight:
                self._acknowledged(header, now)
            if header.type == DATA:
                return self._take(header.number, data, now)
            self._take_other(header, data, now)
        except FrameError:
            counts.malformed += 1
        return []

    def _is_current(self, header: Header, data: bytes, now: float) -> bool:
        """Whether the packet belongs to this epoch, which may begin with it."""
        sender = header[7:9]
        if self.state is State.UP:
            if sender == self._theirs and header[10:12] == (self._local.owner.incarnation, self.session):
                return True
            if sender <= self._theirs:
                self.counts.stale += 1
                return False
            if sender[0] > self._theirs[0]:
                self._go_down("it was restarted", "restarted", now)
            else:
                self._go_down("it began anew", "renewed", now)
        return self._greet(header, sender, data, now)

    def _greet(self, header: Header, sender: tuple[int, int], data: bytes, now: float) -> bool:
        """A packet while down; True when the link is up with it."""
        if self.state is State.BLOCKED or header.type == GOODBYE:
            return False
        known = header[10:12] == (self._local.owner.incarnation, self.session)
        if header.type == BEAT:
            beat = read_beat(data)
            if beat.oldest > VERSION or beat.protocol < OLDEST:
                self.events.append(Incompatible(beat))
                return False
            self._theirs = sender
            self.peer = Peer(Owner(self.node, beat.worker, sender[0]), beat.name, beat.version, beat.protocol)
            self._times(header, now)
        elif self._theirs != sender:  # its heartbeat has not come yet, or this is an old packet
            known = False
        if not known:
            if now - self._greeted_at >= GREET_EVERY:
                self._greeted_at = now
                self._beat(now)
            return False
        assert self.peer is not None
        self.state = State.UP
        self._up_at = now
        self._out = Sending(self._local.max_packet - HEADER.size)  # the transport may be another by now
        self.events.append(Up(self.peer))
        self._beat_at = now + self._local.settings.heartbeat
        self._beat(now)
        return True

    def _times(self, header: Header, now: float) -> None:
        stamp = int(now * 1e6) & _MASK
        self._echo_stamp, self._echo_at = header.sent, now
        # a packet that was overtaken does not make the latest one older
        if header.hops == 0 and (not self._direct_stamp or (header.sent - self._direct_stamp) & _MASK <= _MASK // 2):
            self._direct_stamp = header.sent
        if header.echo:
            rtt = ((stamp - header.echo) & _MASK) / 1e6
            if rtt < _MAX_RTT:
                self._pace.measured(rtt)
                if self._probes_left and now - rtt >= self._probing_since:  # it was sent after we had begun to doubt
                    self._probes_left = 0
                    self._probe_at = inf
        if header.direct:
            sent_at = now - ((stamp - header.direct) & _MASK) / 1e6
            if sent_at > self._doubted_at:
                until = sent_at + DIRECT_BEATS * self._local.settings.heartbeat
                self._direct_until = max(self._direct_until, until)

    def _acknowledged(self, header: Header, now: float) -> None:
        out = self._out
        if out.acknowledged(header.ack):
            self._pace.backoff = 0
            self._rto_at = now + self._pace.timeout() if out.flight else inf
            if out.recover_at > -inf:
                self._send_again(out.to_recover(), now)
        if header.sack:  # what is missing is lost, or was overtaken: wait for a round trip
            missing = out.missing(header.ack, header.sack, now, self.rtt or ACK_DELAY)
            if missing:
                self._send_again(missing, now)
                self._rto_at = now + self._pace.timeout()
        if header.flags & GAP:
            out.recover_at = now - self.rtt
            self._send_again(out.to_recover(), now)

    def _take(self, number: int, data: bytes, now: float) -> list[tuple[int, bytes]]:
        frames = self._in.take(number, data, HEADER.size)
        if not frames or self._in.early:
            self._ack_at = now
            if frames is None:
                self.counts.duplicates += 1
                return []
        self._unacked += 1
        if self._unacked >= ACK_EVERY:
            self._ack_at = now
        elif self._ack_at == inf:
            self._ack_at = now + ACK_DELAY
        self.counts.received_frames += len(frames)
        if self._in.overflows:
            self._go_down("it sends a frame that is too large", "stuck", now)
            return []
        return frames

    def _take_other(self, header: Header, data: bytes, now: float) -> None:
        if header.type == BEAT:
            self.reaches = frozenset(read_beat(data).reaches)
            if header.flags & PROBE:
                self._beat(now)
        elif header.type == GOODBYE:
            reason, _ = read_text(data, HEADER.size)
            self._go_down(reason or "goodbye", "goodbye", now)
            self._beat_at = now + self._local.settings.heartbeat
            self._beat(now)  # of another session: so it knows that we have understood
            return
        if header.number > self._in.number and not self._in.early and now - self._greeted_at >= GREET_EVERY:
            self._greeted_at = now
            self.lost(now)  # the last ones did not come

    def lost(self, now: float) -> None:
        """Packets for us were dropped on this side: ask for them."""
        if self.state is State.UP:
            self._emit(self._header(ACK, GAP, self._out.number, now), now)

    # The end

    def close(self, reason: str, now: float) -> Farewell | None:
        """Go down and say so; what was said, None when the link was down."""
        if self.state is not State.UP:
            return None
        farewell = Farewell(self._theirs, self._header(GOODBYE, 0, self._out.number, now) + text(reason))
        self._emit(farewell.packet, now)
        self._go_down(reason, "local", now)
        return farewell

    def block(self, seconds: float, reason: str, now: float) -> None:
        """Go down, and neither send nor listen for so long."""
        self.close(reason, now)
        self.state = State.BLOCKED
        self._blocked_until = now + seconds

    def _go_down(self, reason: str, kind: str, now: float) -> None:
        assert self.peer is not None
        self.events.append(Down(self.peer, reason, kind, now - self._up_at))
        self.state = State.TRYING
        self.session += 1
        self._reset(now)
