"""Commands about events on their way to web servers (xmppd/outbox)."""

import time
from typing import Final

from xmppd.admin.merge import ordered
from xmppd.admin.registry import Arg, command
from xmppd.admin.results import List, Restuple, Tuple, integer, string
from xmppd.errors import CommandError
from xmppd.outbox import Outbox, SinkStatus, ulid

_SINK: Final = Arg("sink", optional=True)
_STATES: Final = ("pending", "dead")
_ALL: Final = "all"
_MOST: Final = 10_000


class OutboxCommands:
    """A node answers for the events it has; commands ask all nodes."""

    def __init__(self, outbox: Outbox, node: str) -> None:
        self._outbox = outbox
        self._node = node

    @command(
        "outbox status",
        args=(_SINK,),
        result=List(
            "sinks",
            Tuple(
                "sink",
                (
                    string("name"),
                    string("node"),
                    string("state"),
                    integer("queued"),
                    integer("in_flight"),
                    integer("dead"),
                    integer("oldest_seconds"),
                    integer("sent"),
                    integer("failed"),
                ),
            ),
        ),
        tags=("outbox",),
        reads=True,
        scope="gather",
        merge=ordered(lambda row: (row[0], row[1])),
        doc="Show the sinks of every node: open, broken (it takes nothing), paused or none (no module serves it), and"
        " how many events wait, are on their way, are dead, were sent and were tried in vain",
    )
    async def status(self, sink: str = "") -> list[tuple[str | int, ...]]:
        found = await self._outbox.status()
        return [self._row(each) for each in found if _any(sink) in ("", each.name)]

    def _row(self, status: SinkStatus) -> tuple[str | int, ...]:
        numbers = (status.queued, status.in_flight, status.dead, int(status.oldest), status.sent, status.failed)
        return (status.name, self._node, status.state, *numbers)

    @command(
        "outbox list",
        args=(_SINK, Arg("state", optional=True), Arg("limit", "integer", optional=True)),
        result=List(
            "events",
            Tuple(
                "event",
                (
                    string("id"),
                    string("sink"),
                    string("host"),
                    string("kind"),
                    string("state"),
                    integer("attempts"),
                    string("made"),
                    string("next"),
                    string("error"),
                ),
            ),
        ),
        tags=("outbox",),
        reads=True,
        scope="shared",
        doc="List events that wait (pending) or were given up (dead), the oldest first; 100 unless told otherwise",
    )
    async def list_events(self, sink: str = "", state: str = "", limit: int = 100) -> list[tuple[str | int, ...]]:
        wanted = "" if state in ("", _ALL) else _state(state)
        rows = await self._outbox.listed(_any(sink), wanted, max(1, min(limit, _MOST)))
        return [
            (
                ulid(row.id),
                row.sink,
                row.host,
                row.kind,
                row.state,
                row.attempts,
                _time(row.created_at),
                "" if row.next_at is None else _time(row.next_at),
                row.error or "",
            )
            for row in rows
        ]

    @command(
        "outbox retry",
        args=(_SINK,),
        result=integer("events"),
        tags=("outbox",),
        scope="everywhere",
        doc="Try dead events again, and at once those that wait for another attempt; how many were dead",
    )
    async def retry(self, sink: str = "") -> int:
        return await self._outbox.retry(_any(sink))

    @command(
        "outbox purge",
        args=(Arg("sink"), Arg("state", optional=True)),
        result=integer("events"),
        tags=("outbox",),
        scope="everywhere",
        doc="Give up events for good: dead ones, or with STATE pending those that wait; SINK all means every sink",
    )
    async def purge(self, sink: str, state: str = "dead") -> int:
        return await self._outbox.purge(_any(sink), _state(state))

    @command(
        "outbox pause",
        args=(Arg("sink"),),
        result=Restuple(),
        tags=("outbox",),
        scope="shared",
        doc="Send nothing more to a sink, on no node, until it is resumed; events wait",
    )
    async def pause(self, sink: str) -> str:
        await self._outbox.pause(sink, True)
        return f"{sink} is paused; other nodes follow within seconds"

    @command(
        "outbox resume",
        args=(Arg("sink"),),
        result=Restuple(),
        tags=("outbox",),
        scope="shared",
        doc="Send to a paused sink again",
    )
    async def resume(self, sink: str) -> str:
        await self._outbox.pause(sink, False)
        return f"{sink} is resumed; other nodes follow within seconds"


def _any(sink: str) -> str:
    return "" if sink == _ALL else sink


def _state(state: str) -> str:
    if state not in _STATES:
        raise CommandError(f"no state of events: {state} (there are {' and '.join(_STATES)})")
    return state


def _time(when: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(when))
