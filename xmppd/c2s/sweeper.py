"""Settles what was written to clients that acknowledge nothing (delivery.Records), about once a second."""

import asyncio
from typing import Final

from xmppd.c2s.session import Session

_PERIOD: Final = 1.0  # seconds; a record is settled after one to two of them


class RecordSweeper:
    """Visits the sessions that have records, all within one period; idle sessions cost nothing."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._sessions: list[Session] = []
        self._timer: asyncio.TimerHandle | None = None

    def add(self, session: Session) -> None:
        """A session got its first record."""
        self._sessions.append(session)
        if self._timer is None:
            self._timer = self._loop.call_later(_PERIOD, self._sweep)

    def _sweep(self) -> None:
        sessions, self._sessions = self._sessions, []
        self._sessions += [session for session in sessions if session.sweep()]
        self._timer = self._loop.call_later(_PERIOD, self._sweep) if self._sessions else None

    def stop(self) -> None:
        """No more visits."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._sessions.clear()
