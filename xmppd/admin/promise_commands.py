"""What waits for whom: of a session, and of a node's part of the spool."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from xmppd.admin.merge import ordered
from xmppd.admin.registry import Arg, command
from xmppd.admin.results import List, Tuple, integer, string
from xmppd.admin.user_commands import user_jid
from xmppd.protocol.jid import JID
from xmppd.session_manager import Waiting
from xmppd.spool import Totals
from xmppd.storage import clock

_SESSION: Final = (
    *map(string, ("jid", "node", "state")),
    *map(integer, ("resume_s", "unacknowledged", "bytes", "spooled", "unsettled", "round_trip_ms")),
)
_SPOOL: Final = (
    *map(string, ("node", "lease")),
    *map(integer, ("waiting", "unacknowledged", "held", "spooled", "late", "ended", "taken_over", "redelivered")),
    *map(integer, ("duplicates", "offline", "oldest_s")),
)


class Sessions(Protocol):
    """xmppd.session_manager.SessionManager."""

    def waiting(self, user: JID) -> Sequence[Waiting]:
        """Of the sessions of a user on this node."""


@dataclass(frozen=True, slots=True)
class Numbers:
    """What a node counts; since its start, but for the first three."""

    lease: bool
    waiting: int  # sessions without a stream
    unacknowledged: int
    spooled: int
    late: int  # of these, acknowledged after all
    ended: int  # of these, offline messages now
    taken_over: int
    redelivered: int
    duplicates: int


class Spool(Protocol):
    """xmppd.spool.Spool."""

    async def totals(self, member: bytes) -> Totals: ...


class PromiseCommands:
    """`numbers` are this node's, whose UUID is `member`."""

    def __init__(
        self, node: str, member: bytes, sessions: Sessions, spool: Spool, numbers: Callable[[], Numbers]
    ) -> None:
        self._node, self._member = node, member
        self._sessions, self._spool, self._numbers = sessions, spool, numbers

    @command(
        "session_info",
        args=(Arg("jid"),),
        result=List("sessions", Tuple("session", _SESSION)),
        tags=("session",),
        reads=True,
        scope="owner",
        of=lambda values: user_jid(values["jid"]).bare,
        merge=ordered(lambda row: row[0]),
        doc="Tell what waits for the clients of a user, or of a full JID: whether the session has a stream "
        "(`connected`, `waiting` to be resumed, `plain` without stream management), what is not acknowledged, how much "
        "of it is in the spool, what came from it and is not settled",
    )
    def session_info(self, jid: str) -> list[tuple[str | int, ...]]:
        of = user_jid(jid)
        found = [each for each in self._sessions.waiting(of) if of.resource in ("", each.jid.resource)]
        return [
            (
                each.jid.full,
                self._node,
                each.state,
                round(each.resume_left),
                each.unacknowledged,
                each.bytes,
                each.spooled,
                each.unsettled,
                round(each.round_trip * 1000),
            )
            for each in sorted(found, key=lambda each: each.jid.full)
        ]

    @command(
        "spool_status",
        result=List("nodes", Tuple("node", _SPOOL)),
        tags=("offline", "statistics"),
        reads=True,
        scope="gather",
        merge=ordered(lambda row: row[0]),
        doc="Tell what waits for acknowledgements and in the spool, a line for each node",
    )
    async def spool_status(self) -> list[tuple[str | int, ...]]:
        totals = await self._spool.totals(self._member)
        numbers = self._numbers()
        oldest = 0 if totals.oldest is None else max(0, round(clock() - totals.oldest))
        return [
            (
                self._node,
                "held" if numbers.lease else "ended",
                numbers.waiting,
                numbers.unacknowledged,
                totals.held,
                numbers.spooled,
                numbers.late,
                numbers.ended,
                numbers.taken_over,
                numbers.redelivered,
                numbers.duplicates,
                totals.offline,
                oldest,
            )
        ]
