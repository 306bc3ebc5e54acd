"""The sessions of a node that can be resumed (XEP-0198 5), by the ids their clients were given."""

import base64
import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from lxml.etree import _Element

from xmppd.c2s.managed import Managed
from xmppd.c2s.stream_management import MODULO, Inbound, enabled, failed
from xmppd.config.schema import StreamManagement
from xmppd.protocol.jid import JID

if TYPE_CHECKING:
    from xmppd.c2s.handover import Handover
    from xmppd.c2s.session import Session

_REMEMBERED: Final = 10_000  # sessions that have ended, whose clients may ask what had arrived
_SECRET: Final = 18  # bytes
_TRUE: Final = frozenset({"true", "1"})


class Resumption:
    """`options` gives the configuration as it is now; `node` is the UUID of this one."""

    def __init__(self, options: Callable[[], StreamManagement] = StreamManagement, node: bytes = b"") -> None:
        self.options = options
        self.handover: Handover | None = None  # to and from other nodes
        self.here = 0  # resumed so far
        self.from_elsewhere = 0
        self.failed = 0
        self.redelivered = 0  # stanzas written again
        self._node = node
        self._sessions: dict[str, Session] = {}
        self._ended: dict[str, tuple[str, Inbound]] = {}  # by id: the bare JID, and what came from it

    @property
    def waiting(self) -> int:
        """Sessions that have no stream."""
        return sum(session.managed is not None and session.managed.waiting for session in self._sessions.values())

    def enable(self, session: "Session", request: _Element) -> bytes:
        """<enable/>: turn stream management on for a session. The answer."""
        wanted = request.get("max")
        if wanted is not None and not (wanted.isascii() and wanted.isdigit() and 0 < len(wanted) < 11):
            return failed("bad-request")
        options = self.options()
        session.managed = managed = Managed(session)
        longest = int(options.max_resume_timeout)
        seconds = int(options.resume_timeout) if not wanted else min(int(wanted), longest)
        offered = options.resume_timeout >= 1 and seconds and not session.anonymous
        if request.get("resume") not in _TRUE or not offered:
            return enabled()
        managed.id = self._new_id()
        managed.max = seconds
        self._sessions[managed.id] = session
        return enabled(managed.id, seconds, options.location or "")

    def _new_id(self) -> str:
        """Not to be guessed; it names the node, so that others know whom to ask."""
        return base64.urlsafe_b64encode(self._node + secrets.token_bytes(_SECRET)).decode().rstrip("=")

    def find(self, id: str, user: JID) -> "Session | None":
        """The session of this user (a bare JID) with that id."""
        session = self._sessions.get(id)
        return session if session is not None and session.user.full == user.bare else None

    def handled(self, id: str, user: JID) -> int | None:
        """What had arrived of a session of the user that has ended, modulo 2^32. None where some of that was refused
        and the error may have been lost with the session: the client is to send again what it knows nothing of."""
        bare, inbound = self._ended.get(id, ("", None))
        if inbound is None or bare != user.bare or inbound.refused:
            return None
        return inbound.handled % MODULO

    def set_aside(self) -> None:
        """Not every node is seen: leave what waits for sessions without a stream to whoever comes."""
        for session in list(self._sessions.values()):
            if session.managed is not None and session.managed.waiting:
                session.managed.backlog.set_aside()

    def take(self, session: "Session", managed: Managed) -> None:
        """A session has come from another node."""
        self._sessions[managed.id] = session

    def forget(self, managed: Managed) -> None:
        """A session has gone to another node."""
        self._sessions.pop(managed.id, None)

    def leave(self, managed: Managed, user: str) -> None:
        """A session has ended."""
        if self._sessions.pop(managed.id, None) is None:
            return
        if len(self._ended) >= _REMEMBERED:
            del self._ended[next(iter(self._ended))]
        self._ended[managed.id] = (user, managed.inbound)

    def close(self) -> None:
        """The node stops: what waits for these sessions is stored, or goes where they may still be."""
        for session in list(self._sessions.values()):
            session.close(clean=False)
        if self.handover is not None:
            self.handover.close()
