"""The shared tables: routes, and sessions (the presence table).

Every row has one writer, its owner, which is named in it. Look-ups go through one narrow interface, the rows of one
bare JID or of one domain, so that a table can later be split over nodes without touching those who ask.
"""

import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from xmppd.protocol.jid import JID
from xmppd.protocol.stanza import Stanza


@dataclass(frozen=True, slots=True)
class Owner:
    """Who holds a row or a message: node UUID, worker number on that node, and which start of that worker.

    A node's name is a label and may change; this does not.
    """

    member: bytes  # 16 bytes, the node's UUID
    worker: int
    incarnation: int  # grows with every start

    def __str__(self) -> str:
        return f"{uuid.UUID(bytes=self.member)}/{self.worker}#{self.incarnation}"


class SessionRow:
    """One bound resource. `session` is the live object where the row's owner is this process, else None."""

    __slots__ = ("anonymous", "bound_at", "jid", "owner", "priority", "session")

    def __init__(self, jid: JID, owner: Owner, bound_at: int, session: Any = None, *, anonymous: bool = False) -> None:
        self.jid = jid  # full
        self.owner = owner
        self.bound_at = bound_at  # nanoseconds since the epoch: of two rows of one full JID the later one counts
        self.priority: int | None = None  # None until available presence
        self.session = session
        self.anonymous = anonymous  # the account is this session's alone: this row is all there is of it


_NO_ROWS: Final[dict[str, SessionRow]] = {}


class SessionTable:
    """Who is online: bare JID -> resource -> row."""

    def __init__(self) -> None:
        self._rows: dict[str, dict[str, SessionRow]] = {}
        self._per_host: dict[str, int] = {}

    def rows(self, bare: str) -> Mapping[str, SessionRow]:
        """The rows of one bare JID by resource; empty when nobody is there. Not to be changed by the caller."""
        return self._rows.get(bare, _NO_ROWS)

    def insert(self, row: SessionRow) -> SessionRow | None:
        """Add a row; the row of the same full JID that it displaces comes back."""
        rows = self._rows.setdefault(row.jid.bare, {})
        displaced = rows.get(row.jid.resource)
        rows[row.jid.resource] = row
        if displaced is None:
            self._per_host[row.jid.domain] = self._per_host.get(row.jid.domain, 0) + 1
        return displaced

    def remove(self, row: SessionRow) -> bool:
        """Drop this very row; False when it was displaced already."""
        rows = self._rows.get(row.jid.bare)
        if rows is None or rows.get(row.jid.resource) is not row:
            return False
        del rows[row.jid.resource]
        if not rows:
            del self._rows[row.jid.bare]
        self._per_host[row.jid.domain] -= 1
        return True

    def count(self, host: str | None = None) -> int:
        """How many sessions there are, of one host or of all."""
        return sum(self._per_host.values()) if host is None else self._per_host.get(host, 0)

    def all(self) -> Iterator[SessionRow]:
        """Every row; for operators' commands, never on a path a user waits for."""
        for rows in list(self._rows.values()):
            yield from list(rows.values())


@dataclass(frozen=True, slots=True)
class Route:
    """One way to a domain. `deliver` takes the stanza where the owner is this process; None elsewhere."""

    domain: str
    owner: Owner
    deliver: Callable[[Stanza], Any] | None


class RouteTable:
    """Which domains are served in this cluster, and by whom."""

    def __init__(self) -> None:
        self._routes: dict[str, tuple[Route, ...]] = {}

    def routes(self, domain: str) -> tuple[Route, ...]:
        """The ways to a domain; empty when it is not one of ours."""
        return self._routes.get(domain, ())

    def local(self, domain: str) -> Callable[[Stanza], Any] | None:
        """The handler on this node, if there is one (requirements R-3, R-5: the local one first)."""
        for route in self._routes.get(domain, ()):
            if route.deliver is not None:
                return route.deliver
        return None

    def insert(self, route: Route) -> None:
        self._routes[route.domain] = (*self._routes.get(route.domain, ()), route)

    def remove(self, route: Route) -> None:
        left = tuple(other for other in self._routes.get(route.domain, ()) if other is not route)
        if left:
            self._routes[route.domain] = left
        else:
            self._routes.pop(route.domain, None)

    def domains(self) -> list[str]:
        return sorted(self._routes)
