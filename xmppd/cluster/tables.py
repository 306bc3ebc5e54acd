"""The shared tables: routes, and sessions (the presence table).

Every row has one writer, its owner, which is named in it. Look-ups go through one narrow interface, the rows of one
bare JID or of one domain, so that a table can later be split over nodes without touching those who ask.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from struct import Struct
from typing import Any, Final

from xmppd.cluster.packed import PackedRows
from xmppd.cluster.shared import Held, SharedTable, tell
from xmppd.cluster.shared import Owner as Owner
from xmppd.protocol.jid import JID
from xmppd.protocol.stanza import Stanza


class SessionRow:
    """One bound resource. `session` is the live object where the row's owner is this process, else None."""

    __slots__ = ("anonymous", "bound_at", "guarded", "hides", "jid", "owner", "priority", "session", "waiting")

    def __init__(self, jid: JID, owner: Owner, bound_at: int, session: Any = None, *, anonymous: bool = False) -> None:
        self.jid = jid  # full
        self.owner = owner
        self.bound_at = bound_at  # nanoseconds since the epoch: of two rows of one full JID the later one counts
        self.priority: int | None = None  # None until available presence; changed by SessionTable.set_priority alone
        self.session = session
        self.waiting = False  # it has no stream and may be resumed; changed by SessionTable.set_waiting alone
        self.anonymous = anonymous  # the account is this session's alone: this row is all there is of it
        self.guarded = False  # a module guards it: not everybody may see it; as set_priority
        # The other node whose older row of the same full JID is there still.
        self.hides: bytes | None = None


_NO_ROWS: Final[dict[str, SessionRow]] = {}
_DECODED: Final = 2048  # bare JIDs per generation of the cache
_VALUE: Final = Struct(">QbB")  # bound_at, priority, flags; new fields go behind these
_AVAILABLE: Final = 1
_ANONYMOUS: Final = 2
_GUARDED: Final = 4
_WAITING: Final = 8


def pack_session(row: SessionRow) -> bytes:
    """A row's value as other nodes get it."""
    flags = (row.priority is not None) * _AVAILABLE + row.anonymous * _ANONYMOUS
    flags += row.guarded * _GUARDED + row.waiting * _WAITING
    return _VALUE.pack(row.bound_at, row.priority or 0, flags)


def unpack_session(owner: Owner, bare: str, item: bytes, value: bytes) -> SessionRow:
    """A row of another node. What a newer version has added to the value is not looked at."""
    bound_at, priority, flags = _VALUE.unpack_from(value)
    local, _, domain = bare.rpartition("@")
    resource = item.decode()
    jid = JID(local, domain, resource, bare, f"{bare}/{resource}" if resource else bare)
    row = SessionRow(jid, owner, bound_at, anonymous=bool(flags & _ANONYMOUS))
    row.priority = priority if flags & _AVAILABLE else None
    row.guarded = bool(flags & _GUARDED)
    row.waiting = bool(flags & _WAITING)
    return row


def _priority(value: bytes | None) -> int | None:
    if value is None:
        return None
    _, priority, flags = _VALUE.unpack_from(value)
    return priority if flags & _AVAILABLE else None


class SessionTable(SharedTable):
    """Who is online: bare JID -> resource -> row.

    Rows of this process are objects; those of other nodes are packed, and unpacked when somebody asks. Observers are
    plain functions that return soon; one row of another node may be the first of many thousand.
    """

    number = 1
    name = "session"

    def __init__(self) -> None:
        super().__init__()
        self._rows: dict[str, dict[str, SessionRow]] = {}  # our own, of bare JIDs that nobody else has rows of
        self._mixed: dict[str, dict[str, SessionRow]] = {}  # our own, of those that others may have rows of, too
        self._per_host: dict[str, int] = {}
        # Bare JIDs with rows elsewhere that were asked for lately, in two generations: the older one goes when the
        # younger one is full.
        self._young: dict[str, dict[str, SessionRow]] = {}
        self._old: dict[str, dict[str, SessionRow]] = {}
        # A row of ours is out of the table, because somebody bound its full JID elsewhere, later.
        self.on_conflict: list[Callable[[SessionRow], None]] = []
        # (bare JID, row): a row of another node is available now, or no longer negative.
        self.on_appeared: list[Callable[[str, SessionRow], None]] = []
        # (row of ours, owner): another node has an older row of the same full JID, as after a split; it will go.
        self.on_displacing: list[Callable[[SessionRow, Owner], None]] = []
        # (owner, bare JID, resource): a row of another node has been taken out.
        self.on_left: list[Callable[[Owner, str, str], None]] = []
        # (owner, its rows): they went without being taken out one by one. To be read in pieces, at any later time; a
        # full JID that is bound again by then, and available if it was, is not among them.
        self.on_vanished: list[Callable[[Owner, Lost], None]] = []

    # -- look-ups

    def rows(self, bare: str) -> Mapping[str, SessionRow]:
        """The rows of one bare JID by resource, of all nodes; empty when nobody is there. Not to be changed.

        While two nodes have the same full JID, only the newer row counts."""
        return self._rows.get(bare) or (self._look_further(bare) if self._groups or self._mixed else _NO_ROWS)

    def nodes_of(self, bare: str) -> set[bytes]:
        """The other nodes that have rows of a bare JID."""
        return {node for node, held in self._held.items() if held.has(bare)}

    def is_bound(self, jid: JID) -> bool:
        """Whether a full JID is bound, on any node."""
        return jid.resource in self.rows(jid.bare)

    def count(self, host: str | None = None) -> int:
        """How many sessions there are on all nodes, of one host or of all."""
        own = self._own_count if host is None else self._per_host.get(host, 0)
        return own + sum(held.count(host) for held in self._held.values())

    def count_of(self, owner: Owner) -> int:
        """How many sessions another node has."""
        return self.held(owner).rows

    def own_sessions(self) -> Iterator[SessionRow]:
        """Every row of this process, as it is when it is reached."""
        for bare in [*self._rows, *self._mixed]:  # at once: between two steps one may move from here to there
            yield from list(self._own_rows_of(bare).values())

    def all(self) -> Iterator[SessionRow]:
        """Every row of every node; for operators' commands, never on a path a user waits for.

        Rows may come and go between two steps; those that stay are all named."""
        yield from self.own_sessions()
        for held in list(self._held.values()):
            yield from self._unpacked(held)

    def rows_on(self, node: bytes) -> Iterator[SessionRow]:
        """Every row of another node. Rows may come and go between two steps; those that stay are all named."""
        held = self._held.get(node)
        if held is not None:
            yield from self._unpacked(held)

    @staticmethod
    def _unpacked(held: Held) -> Iterator[SessionRow]:
        for layer in list(held.layers):
            for bare, item, value in layer.all():
                yield unpack_session(held.owner, bare, item, value)

    def pieces(self, size: int = 500) -> Iterator[list[SessionRow]]:
        """Every row, some at a time: let the loop turn between two pieces."""
        rows = self.all()
        while piece := list(islice(rows, size)):
            yield piece

    # -- rows of this process

    def insert(self, row: SessionRow) -> SessionRow | None:
        """Add a row of this process; the row of the same full JID that it displaces, here or elsewhere, comes back.

        Its `bound_at` becomes later than that one's, whatever the clocks say: the last one to bind wins."""
        bare, resource = row.jid.bare, row.jid.resource
        displaced = self.rows(bare).get(resource)
        if displaced is not None and displaced.bound_at >= row.bound_at:
            row.bound_at = displaced.bound_at + 1
        own = self._own_rows_of(bare)
        if own is _NO_ROWS:
            own = {}
            (self._mixed if self._is_elsewhere(bare) else self._rows)[bare] = own
        before = own.get(resource)
        own[resource] = row
        if before is None:
            self._per_host[row.jid.domain] = self._per_host.get(row.jid.domain, 0) + 1
        self._write(row, None if before is None else pack_session(before), pack_session(row))
        return displaced

    def remove(self, row: SessionRow) -> bool:
        """Drop this very row; False when it was displaced already."""
        bare, resource = row.jid.bare, row.jid.resource
        own = self._own_rows_of(bare)
        if own.get(resource) is not row:
            return False
        del own[resource]
        if not own:
            self._rows.pop(bare, None)
            self._mixed.pop(bare, None)
        left = self._per_host[row.jid.domain] - 1
        if left:
            self._per_host[row.jid.domain] = left
        else:
            del self._per_host[row.jid.domain]
        self._write(row, pack_session(row), None)
        return True

    def set_priority(self, row: SessionRow, priority: int | None, *, guarded: bool | None = None) -> None:
        """The priority of a row of this process, -128 to 127, or None when it is no longer available; and whether a
        module guards its session."""
        guarded = row.guarded if guarded is None else guarded
        if self._own_rows_of(row.jid.bare).get(row.jid.resource) is not row:
            row.priority, row.guarded = priority, guarded  # displaced: nobody sees it any more
        elif row.priority != priority or row.guarded != guarded:
            before = pack_session(row)
            row.priority, row.guarded = priority, guarded
            self._write(row, before, pack_session(row))

    def set_waiting(self, row: SessionRow, waiting: bool) -> None:
        """Whether the session of a row of this process has no stream at the moment."""
        if self._own_rows_of(row.jid.bare).get(row.jid.resource) is not row:
            row.waiting = waiting
        elif row.waiting != waiting:
            before = pack_session(row)
            row.waiting = waiting
            self._write(row, before, pack_session(row))

    def own_rows(self) -> Iterator[tuple[str, bytes, bytes]]:
        for row in self.own_sessions():
            yield row.jid.bare, row.jid.resource.encode(), pack_session(row)

    def _own_rows_of(self, bare: str) -> dict[str, SessionRow]:
        return self._rows.get(bare) or self._mixed.get(bare, _NO_ROWS)

    def _write(self, row: SessionRow, old: bytes | None, new: bytes | None) -> None:
        if self._young or self._old:
            self._forget(row.jid.bare)
        self._own_changed(row.jid.bare, row.jid.resource.encode(), old, new)

    # -- rows of other nodes

    def _look_further(self, bare: str) -> Mapping[str, SessionRow]:
        """The rows of a bare JID that others may have rows of."""
        found = self._young.get(bare)
        if found is not None:
            return found
        if not self._is_elsewhere(bare):
            if bare not in self._mixed:
                return _NO_ROWS
            self._rows[bare] = own = self._mixed.pop(bare)  # the others have gone: our own rows stand alone again
            for row in own.values():
                row.hides = None
            return own
        found = self._old.pop(bare, None) or self._unpack(bare)
        if len(self._young) >= _DECODED:
            self._old, self._young = self._young, {}
        self._young[bare] = found
        return found

    def _unpack(self, bare: str) -> dict[str, SessionRow]:
        found: dict[str, SessionRow] = {}
        for held in self._held.values():
            for item, value in held.items(bare):
                row = unpack_session(held.owner, bare, item, value)
                _enter(found, row)
        for row in self._mixed.get(bare, _NO_ROWS).values():
            row.hides = None
            _enter(found, row)
        return found

    def _forget(self, bare: str) -> None:
        self._young.pop(bare, None)
        self._old.pop(bare, None)

    def _changed(self, held: Held, group: str, item: bytes, old: bytes | None, new: bytes | None) -> None:
        self._forget(group)
        if new is None:
            if self.on_left:
                tell(self.on_left, held.owner, group, item.decode())
            return
        own = self._rows.pop(group, None)
        if own is not None:
            self._mixed[group] = own
        else:
            own = self._mixed.get(group)
        if own is not None:
            self._settle(held.owner, own, group, item, new)
        if self.on_appeared:
            self._tell_appeared(held.owner, group, item, old, new)

    def _settle(self, owner: Owner, own: dict[str, SessionRow], bare: str, item: bytes, value: bytes) -> None:
        """A row of ours with the same full JID goes if it is the older one; if not, the other's owner does the same."""
        mine = own.get(item.decode())
        if mine is None:
            return
        if _later(unpack_session(owner, bare, item, value), mine):
            self.remove(mine)
            self.conflicts += 1
            tell(self.on_conflict, mine)
        elif self.on_displacing:
            tell(self.on_displacing, mine, owner)

    def _tell_appeared(self, owner: Owner, bare: str, item: bytes, old: bytes | None, new: bytes) -> None:
        before, now = _priority(old), _priority(new)
        if now is None or (before is not None and (before >= 0 or now < 0)):
            return
        row = self.rows(bare).get(item.decode())
        if row is not None and row.owner == owner:  # not hidden behind a newer one
            tell(self.on_appeared, bare, row)

    def _vanished(self, owner: Owner, layers: list[PackedRows]) -> None:
        self._young, self._old = {}, {}
        tell(self.on_vanished, owner, Lost(self, owner, layers))


class Lost:
    """Rows that went with their owner: read them as often as you like, in pieces."""

    def __init__(self, table: SessionTable, owner: Owner, layers: list[PackedRows]) -> None:
        self._table, self._owner, self._layers = table, owner, layers

    def __iter__(self) -> Iterator[SessionRow]:
        for layer in self._layers:
            for bare, item, value in layer.all():
                row = unpack_session(self._owner, bare, item, value)
                now = self._table.rows(bare).get(row.jid.resource)
                if now is None or (now.priority is None and row.priority is not None):
                    yield row


def _enter(found: dict[str, SessionRow], row: SessionRow) -> None:
    """The newer one of two rows of one full JID counts."""
    resource = row.jid.resource
    other = found.get(resource)
    if other is None:
        found[resource] = row
        return
    newer, older = (row, other) if _later(row, other) else (other, row)
    found[resource] = newer
    newer.hides = older.owner.member


def _later(row: SessionRow, other: SessionRow) -> bool:
    """Whether a row wins over another one of the same full JID: every node must come to the same answer."""
    return (row.bound_at, row.owner.member) > (other.bound_at, other.owner.member)


@dataclass(frozen=True, slots=True)
class Route:
    """One way to a domain. `deliver` takes the stanza where the owner is this process; None elsewhere."""

    domain: str
    owner: Owner
    deliver: Callable[[Stanza], Any] | None


class RouteTable(SharedTable):
    """Which domains are served in this cluster, and by whom."""

    number = 2
    name = "route"

    def __init__(self) -> None:
        super().__init__()
        self._routes: dict[str, tuple[Route, ...]] = {}

    def routes(self, domain: str) -> tuple[Route, ...]:
        """The ways to a domain, ours first; empty when it is not one of the cluster's."""
        own = self._routes.get(domain, ())
        if not self._held:
            return own
        return own + tuple(Route(domain, owner, None) for owner in self.elsewhere(domain))

    def local(self, domain: str) -> Callable[[Stanza], Any] | None:
        """The handler on this node, if there is one (requirements R-3, R-5: the local one first)."""
        for route in self._routes.get(domain, ()):
            if route.deliver is not None:
                return route.deliver
        return None

    def elsewhere(self, domain: str) -> tuple[Owner, ...]:
        """The other nodes that serve a domain, in an order that is the same everywhere."""
        if not self._held:
            return ()
        return tuple(held.owner for _, held in sorted(self._held.items()) if held.has(domain))

    def insert(self, route: Route) -> None:
        """Add a way of this process to a domain; the other nodes hear of the first one."""
        first = self.local(route.domain) is None
        self._routes[route.domain] = (*self._routes.get(route.domain, ()), route)
        if first and route.deliver is not None:
            self._own_changed(route.domain, b"", None, b"")

    def remove(self, route: Route) -> None:
        before = self.local(route.domain)
        left = tuple(other for other in self._routes.get(route.domain, ()) if other is not route)
        if left:
            self._routes[route.domain] = left
        else:
            self._routes.pop(route.domain, None)
        if before is not None and self.local(route.domain) is None:
            self._own_changed(route.domain, b"", b"", None)

    def domains(self) -> list[str]:
        """Every domain that somebody serves, sorted."""
        found = set(self._routes)
        for held in self._held.values():
            for layer in held.layers:
                found.update(layer.groups)
        return sorted(found)

    def own_rows(self) -> Iterator[tuple[str, bytes, bytes]]:
        for domain in list(self._routes):
            if self.local(domain) is not None:
                yield domain, b"", b""
