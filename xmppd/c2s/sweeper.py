"""Settles what was written to clients that acknowledge nothing (delivery.Records), about once a second."""

import asyncio
from typing import Final

from xmppd.c2s.session import Session

_PERIOD: Final = 1.0  # seconds; a record is settled after one to two of them
_LATE: Final = 0.5  # seconds by which a visit may come too late


class RecordSweeper:
    """Visits the sessions that have records, all within one period; idle sessions cost nothing.

    A process that was frozen is visited by its timers first, and hears then what has become of its connections: what
    looks as if it had been taken for seconds may be lost. So a visit that comes much too late is put off.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._sessions: list[Session] = []
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0
        self._put_off = False

    def add(self, session: Session) -> None:
        """A session got its first record."""
        self._sessions.append(session)
        if self._timer is None:
            self._wind_up()

    def _wind_up(self) -> None:
        self._due = self._loop.time() + _PERIOD
        self._timer = self._loop.call_at(self._due, self._sweep)

    def _sweep(self) -> None:
        self._put_off = not self._put_off and self._loop.time() - self._due > _LATE
        if self._put_off:  # once: a loop that is always late has heard everything until the next time
            self._wind_up()
            return
        sessions, self._sessions = self._sessions, []
        self._sessions += [session for session in sessions if session.sweep()]
        self._timer = None
        if self._sessions:
            self._wind_up()

    def stop(self) -> None:
        """No more visits."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._sessions.clear()
