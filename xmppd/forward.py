"""Stanzas for sessions of other nodes: one frame per stanza and node, and what became of it comes back.

Bodies of the frames (integers big-endian, texts UTF-8 and separated by NUL, XML neutral as in protocol/stanza.py):

    STANZA    flags u8, number u32, lengths of way and id u32, place u64; way: type, to, from, resource...; id; XML
              flags: 0x03 kind (0 message, 1 presence, 2 iq), 0x0c nodes it has come from, 0x10 a copy (with number
              0: for sessions that wait for resumption, while others have got it), 0x20 passed on by the node where
              the session was before, 0x40 behind what is stored. The place is Stanza.place
    PRESENCE  length of the texts u32; type, id, from, bare JID...; XML without `to`
    OUTCOMES  how many are safe u32, went wrong u32, found nobody u32; their numbers u32 each; JSON list of the
              copies that were refused: [number, condition, type, text, application]

The node of the sender waits for the outcome of what has a number: chat and normal messages, and IQ requests. It keeps
the stanza until then, and when the other node goes down first, the stanza is routed again: it arrives at least once.
Everything else (presence, headlines, errors, IQ answers) has number 0 and is safe when it is queued on the link, which
repeats it until the other node has it; it is lost only with that node.

The receiving node decides what becomes of a stanza, tells the sender if it cannot be delivered, and passes it on where
its session has moved meanwhile. Only where several nodes get *copies* of one message nobody but the sender's node can
decide: such a copy is delivered or not, and no more.
"""

import asyncio
import json
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from struct import Struct, pack, unpack_from
from typing import Any, Final, Protocol

from xmppd.cluster.interfaces import Calls, Kind, Links, Peer
from xmppd.delivery import ERROR, SAFE, Bounce, Outcome, Pending, Record, Settled, Unsettled, as_stanza_error
from xmppd.errors import CallRefused, NodeUnreachable, StanzaError
from xmppd.log import get_logger
from xmppd.protocol.jid import JID, parse
from xmppd.protocol.stanza import Stanza

HOPS: Final = 2  # links a stanza may cross; then it is delivered on that node, kept, or sent back
_KINDS: Final = ("message", "presence", "iq")
_KIND_BITS: Final = 0x03
_HOP_SHIFT: Final = 2
_HOP_BITS: Final = 0x03
_COPY: Final = 0x10
_MOVED: Final = 0x20
_BEHIND_STORED: Final = 0x40
_NUL: Final = "\0"
_HEAD: Final = Struct("!BIIIQ")  # of STANZA
_WAYS: Final = 4096  # that are kept decoded
_WAY_LENGTH: Final = 512  # bytes; longer ones are not kept
_LENGTH: Final = Struct("!I")
_COUNTS: Final = Struct("!III")  # of OUTCOMES
_USERS: Final = 500  # in one PRESENCE frame
_LAST_NUMBER: Final = 0xFFFFFFFF
_BEHIND: Final = 10_000  # stanzas of one sender that wait for an earlier one; more are refused
_HANDOVER: Final = 2.0  # seconds for all nodes to know that a session was ended whose resource was bound elsewhere
_LOOK: Final = 0.02  # seconds between two looks at what still waits
_OWED: Final = 20.0  # seconds for the other node to say so

_log = get_logger("cluster")

_KICK: Final = "sessions.kick"
_HAND_OVER: Final = "sessions.hand_over"
_YIELDED: Final = "sessions.yielded"


class Heirs(Protocol):
    """Sessions of one full JID that follow each other, as the forwarder sees them."""

    def is_older(self, jid: JID, bound_at: int) -> bool:
        """Whether a session of that full JID is here that was bound before that time, and no newer one is known."""
        ...

    def yield_to(self, jid: JID, bound_at: int) -> None:
        """A session of that full JID was bound later on another node: end ours, if it is still there."""
        ...

    def take_over(self, node: bytes, jid: JID) -> None:
        """An older session of that full JID has ended on a node: what it leaves comes first."""
        ...


class Users(Protocol):
    """The session manager as the forwarder sees it."""

    def arrived(self, stanza: Stanza, resources: Sequence[str]) -> Outcome:
        """Deliver what another node has sent to some resources of a user. Raises StanzaError."""
        ...

    def arrived_copy(self, stanza: Stanza, resources: Sequence[str]) -> Outcome | None:
        """The same for one of several copies; None when none of the resources is there. Raises StanzaError."""
        ...

    def arrived_extra(self, stanza: Stanza, resources: Sequence[str]) -> None:
        """A copy for sessions that wait for resumption, while others have the message."""
        ...

    def comes_behind(self, node: bytes, stanza: Stanza, resources: Sequence[str]) -> None:
        """What that node is storing for some resources of a user is older than this."""
        ...

    def spread(self, stanza: Stanza, users: Sequence[JID]) -> None:
        """Give a presence to the available resources that users have on this node."""
        ...

    def reroute(self, records: list[Record]) -> None: ...

    def kick_here(self, jid: JID, reason: str, condition: str) -> int:
        """End the session of a full JID, or all of a bare one, as far as they are on this node."""
        ...

    @property
    def succession(self) -> Heirs: ...

    async def settled_here(self, user: JID) -> None:
        """Wait until what sessions of a user have left in the spool is free for others."""
        ...


class Forwarded(Stanza):
    """A stanza that has come from another node: `hops` links it has crossed."""

    __slots__ = ("behind", "hops", "moved")

    hops: int  # type: ignore[misc]
    moved: bool  # type: ignore[misc]
    behind: bool  # type: ignore[misc]

    @classmethod
    def again(cls, stanza: Stanza) -> "Forwarded":
        """The stanza as if it had crossed one more link."""
        made = cls(stanza.kind, stanza.type, stanza.id, stanza.to, stanza.from_, stanza.xml)
        made.place = stanza.place
        made.hops = stanza.hops + 1
        made.moved, made.behind = stanza.moved, stanza.behind
        return made


class Copy(Unsettled):
    """The outcome of one of several copies. When it ends as ERROR nobody has told the sender; `error` says why, None
    that there was nobody to take it."""

    __slots__ = ("error",)

    def __init__(self, stanza: Stanza) -> None:
        super().__init__(stanza)
        self.error: StanzaError | None = None


class Channel:
    """One life of the link to a node: what waits for an outcome from there, and the outcomes that are to go there."""

    __slots__ = ("_owed", "_owed_at", "error", "gone", "last", "node", "refused", "safe", "scheduled", "sent")

    def __init__(self, node: bytes) -> None:
        self.node = node
        self.last = 0  # number
        self.sent: dict[int, Unsettled] = {}
        self.safe: list[int] = []
        self.error: list[int] = []
        self.gone: list[int] = []
        self.refused: list[tuple[int, StanzaError]] = []
        self.scheduled = False
        self._owed: dict[str, list[Unsettled]] = {}
        self._owed_at = -1

    def owed(self, user: str) -> "list[Unsettled]":
        """Messages for a user (a bare JID) of which nothing is known yet. Many are asked for at a time."""
        if self._owed_at != self.last:
            self._owed, self._owed_at = {}, self.last
            for sent in self.sent.values():
                stanza = sent.stanza
                if stanza.kind == "message" and stanza.to is not None:
                    self._owed.setdefault(stanza.to.bare, []).append(sent)
            asyncio.get_running_loop().call_soon(self._forget_owed)
        return [sent for sent in self._owed.get(user, ()) if sent.result is None]

    def _forget_owed(self) -> None:
        self._owed, self._owed_at = {}, -1


class Answer:
    """Tells the sender's node what became of a stanza."""

    __slots__ = ("channel", "forwarder", "number")

    def __init__(self, forwarder: "Forwarder", channel: Channel, number: int) -> None:
        self.forwarder = forwarder
        self.channel = channel
        self.number = number

    def __call__(self, result: Settled) -> None:
        self.forwarder.settled(self.channel, self.number, result)


Way = tuple[str, JID, JID | None, list[str]]  # type, to, from, resources
Arrival = tuple[Channel, Forwarded, list[str], int, int]  # with its resources, number, and whether it is a copy


class Forwarder:
    """Between the session manager and the links; one per node. Fulfils the session manager's Remote."""

    def __init__(
        self,
        links: Links,
        calls: Calls,
        users: Users,
        *,
        bounce: Bounce,
        call_soon: Callable[[Callable[[], None]], object] | None = None,
    ) -> None:
        """`call_soon` runs something at the end of this turn of the loop; by default it is the running loop's."""
        self._links = links
        self._calls = calls
        self._users = users
        self._bounce = bounce
        self._call_soon = call_soon or asyncio.get_running_loop().call_soon
        self._channels = {node: Channel(node) for node in links.peers}
        self._ways: dict[bytes, Way] = {}
        self._behind: dict[str, deque[Arrival]] = {}  # by sender: what waits for an earlier stanza to be decided
        self._held: dict[bytes, deque[Arrival]] = {}  # by node: messages from there that wait
        self._deciding: dict[str, JID | None] = {}  # by sender: whom that one is for
        self.frames_sent = 0  # STANZA and PRESENCE frames since the start
        self.frames_received = 0
        self.rerouted = 0  # stanzas whose node went down before their outcome was known
        links.on(Kind.STANZA, self._stanza)
        links.on(Kind.PRESENCE, self._presence)
        links.on(Kind.OUTCOMES, self._outcomes)
        links.on_up(self._up)
        links.on_down(self._down)
        calls.on_cast(_KICK, self._kicked)
        calls.on_call(_HAND_OVER, self._handed_over)
        calls.on_cast(_YIELDED, lambda peer, jid: self._users.succession.take_over(peer.node, parse(jid)))

    @property
    def pending(self) -> int:
        """Stanzas sent to other nodes of which nothing is known yet."""
        return sum(len(channel.sent) for channel in self._channels.values())

    def is_up(self, node: bytes) -> bool:
        """Whether there is a link to a node."""
        return node in self._channels

    def owes(self, node: bytes, user: str) -> bool:
        """Whether a message was sent to a node for a user (a bare JID) of which nothing is known yet."""
        channel = self._channels.get(node)
        return channel is not None and bool(channel.sent) and bool(channel.owed(user))

    def _up(self, peer: Peer) -> None:
        self._channels[peer.node] = Channel(peer.node)

    def hold(self, node: bytes, until: "asyncio.Future[None]") -> None:
        """Have messages that come from a node wait until that is done, or there are too many. When it goes down before
        they are forgotten: it routes them again."""
        waiting = self._held.setdefault(node, deque())
        until.add_done_callback(lambda done: self._let_go(node, waiting))

    def _let_go(self, node: bytes, waiting: "deque[Arrival]") -> None:
        if self._held.get(node) is waiting:
            del self._held[node]
        while waiting:
            self._arrive(waiting.popleft())

    def _down(self, peer: Peer, reason: str) -> None:
        if (waiting := self._held.pop(peer.node, None)) is not None:
            waiting.clear()
        channel = self._channels.pop(peer.node, None)
        if channel is None:
            return
        unsettled, channel.sent = list(channel.sent.values()), {}
        for sent in unsettled:
            if isinstance(sent, Copy):
                sent.settle(ERROR)  # whoever sent the copies decides what follows
        self.rerouted += len(unsettled)
        if unsettled:
            _log.info("stanzas routed again", node=peer.name, stanzas=len(unsettled))
        self._users.reroute([Record(sent.stanza, sent) for sent in unsettled])

    # -- to other nodes

    def send_extra(self, node: bytes, stanza: Stanza, resources: Sequence[str]) -> None:
        """Send a copy to sessions that wait for resumption; what becomes of it is nobody's business."""
        self.send(node, stanza, resources, extra=True)

    def pass_on(self, node: bytes, stanza: Stanza, resource: str, *, behind: bool = False) -> Outcome | None:
        """Send what waited for a session that was here and is there now; None when that node is not up. `behind`: what
        is stored for the user is older."""
        return self.send(node, stanza, (resource,), extra=stanza.copy, moved=True, behind=behind)

    def send(
        self,
        node: bytes,
        stanza: Stanza,
        resources: Sequence[str],
        *,
        copy: bool = False,
        extra: bool = False,
        moved: bool = False,
        behind: bool = False,
    ) -> Outcome | None:
        """Send a stanza to some resources of its recipient, all of them on one node; None when that node is not up."""
        channel = self._channels.get(node)
        if channel is None:
            return None
        kind, type = stanza.kind, stanza.type
        flags = min(stanza.hops + 1, HOPS) << _HOP_SHIFT | (moved or stanza.moved) * _MOVED | behind * _BEHIND_STORED
        if kind == "message":
            wanted = type not in ("headline", "error")
        elif kind == "iq":
            flags |= 2
            wanted = type in ("get", "set")
        else:
            flags |= 1
            wanted = False
        number = 0
        if extra:
            wanted = False
        if wanted:
            number = channel.last = channel.last + 1 if channel.last < _LAST_NUMBER else 1
        if (wanted and copy) or extra:
            flags |= _COPY
        to, from_ = stanza.to, stanza.from_
        assert to is not None
        sender = "" if from_ is None else from_.full
        way = f"{type}\0{to.full}\0{sender}\0{_NUL.join(resources)}".encode()
        id = stanza.id.encode()
        body = b"%b%b%b%b" % (_HEAD.pack(flags, number, len(way), len(id), stanza.place), way, id, stanza.xml)
        if not self._links.send(node, Kind.STANZA, body):
            return None
        self.frames_sent += 1
        if not wanted:
            return SAFE
        stanza.forget_element()
        outcome = channel.sent[number] = Copy(stanza) if copy else Unsettled(stanza)
        return outcome

    def spread(self, node: bytes, stanza: Stanza, users: Sequence[str]) -> None:
        """Send one presence without `to` to users (bare JIDs), for their available resources on a node."""
        head = f"{stanza.type}\0{stanza.id}\0{'' if stanza.from_ is None else stanza.from_.full}\0"
        for first in range(0, len(users), _USERS):
            texts = (head + _NUL.join(users[first : first + _USERS])).encode()
            if self._links.send(node, Kind.PRESENCE, _LENGTH.pack(len(texts)) + texts + stanza.xml):
                self.frames_sent += 1

    def kick(self, nodes: Sequence[bytes], jid: JID, reason: str, condition: str) -> None:
        """End sessions on other nodes with a stream error: the one of a full JID, or all of a bare one."""
        self._calls.cast(_KICK, [jid.full, reason, condition], nodes)

    def yielded(self, node: bytes, jid: JID) -> None:
        """Say there that an older session of a full JID has ended here, and leaves something."""
        self._calls.cast(_YIELDED, jid.full, (node,))

    async def hand_over(self, node: bytes, jid: JID, bound_at: int) -> bool:
        """Wait until a node has ended its session of a full JID that was bound elsewhere at that time (0: it is known
        to have ended), and every node has heard of it, so that what is said of the new one comes behind; and until what
        that node had for the user is where it belongs. False when it is down, or does not answer in 20 s."""
        try:
            await self._calls.call(node, _HAND_OVER, [jid.full, bound_at], timeout=_OWED)
        except (NodeUnreachable, CallRefused):
            return False
        return True

    # -- from other nodes

    def _stanza(self, peer: Peer, body: bytes) -> None:
        flags, number, way_length, id_length, place = _HEAD.unpack_from(body)
        at = _HEAD.size + way_length
        end = at + id_length
        way = body[_HEAD.size : at]
        type, to, from_, resources = self._ways.get(way) or self._decode(way)
        stanza = Forwarded(_KINDS[flags & _KIND_BITS], type, body[at:end].decode(), to, from_, body[end:])
        stanza.place = place
        stanza.hops = flags >> _HOP_SHIFT & _HOP_BITS
        stanza.moved, stanza.behind = bool(flags & _MOVED), bool(flags & _BEHIND_STORED)
        self.frames_received += 1
        arrival = (self._channels[peer.owner.member], stanza, resources, number, flags & _COPY)
        if self._held and number and not flags & (_KIND_BITS | _MOVED):  # a message that somebody answers for
            waiting = self._held.get(peer.owner.member)
            if waiting is not None:
                waiting.append(arrival)
                if len(waiting) >= _BEHIND:
                    self._let_go(peer.owner.member, waiting)
                return
        self._arrive(arrival)

    def _arrive(self, arrival: Arrival) -> None:
        stanza = arrival[1]
        sender = "" if stanza.from_ is None else stanza.from_.full
        if self._behind and sender in self._behind:
            self._queue(self._behind[sender], arrival)
            return
        outcome = self._take(*arrival)
        if isinstance(outcome, Pending) and not outcome.decided:
            self._behind[sender] = deque()
            self._deciding[sender] = stanza.to
            outcome.when_decided(partial(self._go_on, sender))

    def _decode(self, way: bytes) -> "Way":
        """Those who talk to each other do so for a while."""
        type, to, sender, *resources = way.decode().split(_NUL)
        decoded = (type, parse(to), parse(sender) if sender else None, resources)
        if len(way) <= _WAY_LENGTH:
            if len(self._ways) >= _WAYS:
                self._ways.clear()
            self._ways[way] = decoded
        return decoded

    def _queue(self, waiting: "deque[Arrival]", arrival: "Arrival") -> None:
        if len(waiting) < _BEHIND:
            waiting.append(arrival)
            return
        channel, stanza, _, number, _ = arrival
        error = StanzaError("resource-constraint", "too many messages wait for this recipient")
        self._refuse(channel, stanza, number, arrival[4], error)

    def _go_on(self, sender: str) -> None:
        """The stanza that held back the others of this sender is decided."""
        waiting = self._behind[sender]
        while waiting:
            arrival = waiting.popleft()
            outcome = self._take(*arrival)
            if isinstance(outcome, Pending) and not outcome.decided:
                self._deciding[sender] = arrival[1].to
                outcome.when_decided(partial(self._go_on, sender))
                return
        del self._behind[sender], self._deciding[sender]

    def _undecided(self, user: str) -> bool:
        """Whether something for a user (a bare JID) has come that waits to be decided."""
        return any(to is not None and to.bare == user for to in self._deciding.values()) or any(
            arrival[1].to is not None and arrival[1].to.bare == user
            for waiting in (*self._behind.values(), *self._held.values())
            for arrival in waiting
        )

    def _take(
        self, channel: Channel, stanza: Forwarded, resources: list[str], number: int, copy: int
    ) -> Outcome | None:
        """Deliver, and see to it that the sender's node hears of the outcome."""
        if copy and not number:
            self._users.arrived_extra(stanza, resources)
            return None
        if stanza.behind:
            self._users.comes_behind(channel.node, stanza, resources)
        try:
            outcome = self._users.arrived_copy(stanza, resources) if copy else self._users.arrived(stanza, resources)
        except Exception as exc:
            self._refuse(channel, stanza, number, copy, as_stanza_error(exc))
            return None
        if not number:
            pass
        elif outcome is None:
            channel.gone.append(number)
            self._report(channel)
        elif isinstance(outcome, Pending):
            outcome.then(Answer(self, channel, number))
        else:
            self.settled(channel, number, outcome)
        return outcome

    def _refuse(self, channel: Channel, stanza: Stanza, number: int, copy: int, error: StanzaError) -> None:
        if copy:
            channel.refused.append((number, error))
            self._report(channel)
            return
        outcome = self._bounce(stanza, error)
        if not number:
            return
        if isinstance(outcome, Pending):
            outcome.then(Answer(self, channel, number))
        else:
            self.settled(channel, number, outcome)

    def _presence(self, peer: Peer, body: bytes) -> None:
        (length,) = _LENGTH.unpack_from(body)
        end = _LENGTH.size + length
        type, id, sender, *users = body[_LENGTH.size : end].decode().split(_NUL)
        self.frames_received += 1
        presence = Stanza("presence", type, id, None, parse(sender) if sender else None, body[end:])
        self._users.spread(presence, [parse(user) for user in users])

    # -- outcomes

    def settled(self, channel: Channel, number: int, result: Settled) -> None:
        """Report that with the other outcomes of this turn of the loop."""
        (channel.safe if result is SAFE else channel.error).append(number)
        if not channel.scheduled:
            self._report(channel)

    def _report(self, channel: Channel) -> None:
        """With all the others of this turn of the loop."""
        if not channel.scheduled:
            channel.scheduled = True
            self._call_soon(partial(self._flush, channel))

    def _flush(self, channel: Channel) -> None:
        channel.scheduled = False
        safe, channel.safe = channel.safe, []
        error, channel.error = channel.error, []
        gone, channel.gone = channel.gone, []
        refused, channel.refused = channel.refused, []
        if self._channels.get(channel.node) is not channel:
            return  # that link is gone, and the sender's node routes them again
        counts = len(safe), len(error), len(gone)
        body = pack(f"!III{sum(counts)}I", *counts, *safe, *error, *gone)
        if refused:
            body += json.dumps([_refusal(*each) for each in refused]).encode()
        self._links.send(channel.node, Kind.OUTCOMES, body)

    def _outcomes(self, peer: Peer, body: bytes) -> None:
        sent = self._channels[peer.owner.member].sent
        safe, error, gone = _COUNTS.unpack_from(body)
        total = safe + error + gone
        numbers = unpack_from(f"!{total}I", body, _COUNTS.size)
        result: Settled = SAFE
        for index, number in enumerate(numbers):
            if index == safe:
                result = ERROR  # those that found nobody too
            outcome = sent.pop(number, None)
            if outcome is not None:
                outcome.settle(result)
        rest = body[_COUNTS.size + 4 * total :]
        for number, *why in json.loads(rest) if rest else ():
            outcome = sent.pop(number, None)
            if outcome is not None:
                if isinstance(outcome, Copy):
                    outcome.error = _error(*why)
                outcome.settle(ERROR)

    # -- sessions

    def _kicked(self, peer: Peer, payload: Any) -> None:
        jid, reason, condition = payload
        self._users.kick_here(parse(jid), reason, condition)

    async def _handed_over(self, peer: Peer, payload: Any) -> None:
        jid, bound_at = payload
        user = parse(jid)
        await self._has_come(user, bound_at)
        self._users.succession.yield_to(user, bound_at)
        with suppress(TimeoutError):  # the caller waits no longer
            async with asyncio.timeout(_OWED - 2 * _HANDOVER):
                waits = self._undecided(user.bare)
                while waits:
                    await asyncio.sleep(_LOOK)
                    waits = self._undecided(user.bare)
                await self._users.settled_here(user)
        await self._calls.barrier(timeout=_HANDOVER)

    async def _has_come(self, user: JID, bound_at: int) -> None:
        """The newer session is in the table here, which ends the older one: nobody is told that this resource has gone.
        The question may be ahead of it when the asking node has just come up and its table is still being read."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_HANDOVER):
                while self._users.succession.is_older(user, bound_at):  # noqa: ASYNC110 - nothing tells us
                    await asyncio.sleep(_LOOK)


def _refusal(number: int, error: StanzaError) -> list[object]:
    return [number, error.condition, error.type, error.text, error.application.decode()]


def _error(condition: str, type: str, text: str, application: str) -> StanzaError:
    return StanzaError(condition, text, type=type, application=application.encode())
