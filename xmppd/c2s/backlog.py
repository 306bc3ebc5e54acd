"""What a client has not acknowledged: when that is overdue, what of it is in the spool, and what becomes of it when the
session ends or moves to another node."""

import asyncio
import time
from functools import partial
from secrets import token_hex
from typing import TYPE_CHECKING, Final, TypeGuard

from xmppd.c2s.spooling import Flight
from xmppd.c2s.stream_management import ELSEWHERE, ROUTED, Outbound, Sent
from xmppd.chores import KeptMessage
from xmppd.delivery import SAFE, Pending, Record, Settled, Unsettled
from xmppd.errors import StorageError, StorageUnavailable
from xmppd.log import get_logger
from xmppd.protocol.stanza import Stanza
from xmppd.spool import Holder, KeepItem, Kept

if TYPE_CHECKING:
    from xmppd.c2s.session import Session

SOON: Final = 0.1  # seconds an acknowledgement may take, at least
LATE: Final = 1.0  # and at most
_ROUND_TRIPS: Final = 3  # one for a request that is under way already, one for the next, and some air
_AGAIN: Final = 0.5  # seconds until what could not be written is tried again
_NONE: Final[set[bytes]] = set()  # never changed
_PARTS: Final = 8  # of the measured round trip, of which the last measurement is two
log = get_logger("c2s")


class Backlog:
    """Of one session: what of it is overdue, and what is in the spool."""

    __slots__ = (
        "_again",
        "_again_at",
        "_examined",
        "_flying",
        "_free",
        "_holder",
        "_left",
        "_let_go",
        "_marks",
        "_moved",
        "_outbound",
        "_over",
        "_session",
        "_spooling",
        "_to_free",
        "aside",
        "round_trip",
        "rows",
        "watched",
    )

    def __init__(self, session: "Session", outbound: Outbound) -> None:
        self.watched = False
        self.round_trip = 0.0  # seconds, as measured
        self.rows = 0  # in the spool, or on their way there
        self.aside = False  # what is in the spool is left to whoever comes
        self._session = session
        self._outbound = outbound
        self._spooling = session.parts.spooling
        self._holder: Holder | None = None
        self._examined = 0  # stanzas, of all there have been
        self._marks: list[tuple[float, int]] = []  # when there had been how many
        self._again: list[tuple[Sent, KeepItem]] = []  # could not be written
        self._again_at = 0.0
        self._over = False
        self._left = False  # it is on another node
        self._flying: set[Flight] = set()
        self._free = _NONE  # rows of messages that wait here which are
        self._to_free: list[Sent] = []
        self._let_go = _NONE  # rows on their way to the database of messages that do not wait here any more
        self._moved: dict[bytes, KeptMessage] = {}  # by row: on their way to where the session is now

    def watch(self) -> None:
        """Something was sent that somebody waits for."""
        self.watched = True
        self._spooling.watch(self)

    def answered(self, seconds: float) -> None:
        """An acknowledgement took so long."""
        took = min(seconds, LATE)
        self.round_trip = took if not self.round_trip else (self.round_trip * (_PARTS - 2) + took * 2) / _PARTS

    @property
    def patience(self) -> float:
        """Seconds an acknowledgement may take."""
        return min(LATE, max(SOON, self.round_trip * _ROUND_TRIPS))

    def visit(self, now: float) -> bool:
        """Write what is overdue. False: there is nothing left to look at."""
        if self._over:
            return False
        outbound, marks = self._outbound, self._marks
        if self._again and now >= self._again_at:
            self._retry()
        end = outbound.end
        self._examined = max(self._examined, outbound.acknowledged)
        managed = self._session.managed
        asked = now if managed is None or managed.waiting else managed.ask(now)
        if self._examined < end and (not marks or marks[-1][1] < end):
            marks.append((asked, end))
        patience = 0.0 if managed is None or managed.waiting else self.patience
        due = 0
        while marks and marks[0][0] + patience <= now:
            due = marks.pop(0)[1]
        if due > self._examined:
            self._write(due)
        self.watched = self._examined < end or bool(self._again) or asked > now
        return self.watched

    def at_once(self) -> None:
        """There is no stream: nothing will be acknowledged soon."""
        if not self._over:
            self._marks.clear()
            self._write(self._outbound.end)

    def _write(self, due: int) -> None:
        first, self._examined = self._examined, due
        for entry in self._outbound.between(first, due):
            if isinstance(entry, Sent):
                self._put(entry)

    def _put(self, entry: Sent) -> None:
        stanza = entry.stanza
        if stanza.kept and self.aside:
            self._set_free([entry])
        if entry.result is not None or entry.row is not None or stanza.kept or stanza.copy:
            return
        item: KeepItem | bool | None = False
        if stanza.kind == "message":
            item = self._spooling.item(self._session, stanza, self.holder)
        if item is None:
            return
        if isinstance(item, KeepItem):
            entry.row = item.id
            self.rows += 1
            self._spooling.submit(self, entry, item)
        elif self._spooling.spool is not None:
            entry.row = ROUTED
            entry.settle(SAFE)

    @property
    def holder(self) -> Holder:
        if self._holder is None:
            owner = self._spooling.owner
            assert owner is not None
            self._holder = Holder(owner.member, owner.incarnation, token_hex(8))
        return self._holder

    def flying(self) -> set[Flight]:
        """Rows on their way to the database."""
        return set(self._flying)

    def flies(self, future: Flight) -> None:
        self._flying.add(future)

    def landed(self, future: Flight) -> None:
        self._flying.discard(future)

    def written(self, entry: Sent, item: KeepItem, kept: Kept) -> None:
        """It is in the database, in one form or another."""
        self._spooling.spooled += 1
        if entry.row != item.id:
            return  # acknowledged meanwhile, and deleted
        if kept is Kept.DUPLICATE:
            self._spooling.duplicates += 1
            entry.row = ELSEWHERE
            self.rows -= item.id not in self._let_go
        elif entry.result is not None and not self._over:
            self._forget(entry)  # another session has it
            return
        if self._let_go:
            self._let_go.discard(item.id)
        self._spooling.promise(self, entry)

    def promised(self, entry: Sent) -> None:
        """Its sender may know that it is in the database."""
        entry.settle(SAFE)
        if self.aside and not self._over and _is_row(entry.row):
            if not self._to_free:
                asyncio.get_running_loop().call_soon(self._free_promised)
            self._to_free.append(entry)

    def _free_promised(self) -> None:
        entries, self._to_free = self._to_free, []
        if self.aside and not self._over:
            self._set_free(entries)

    def not_written(self, entry: Sent, item: KeepItem, error: Exception) -> None:
        """It is not, as far as anybody knows."""
        if entry.row != item.id:
            return
        if self._left or item.id in self._let_go:
            if self._let_go:
                self._let_go.discard(item.id)  # once: routed again it may come back, and its row has the same id
            entry.row = None
            moved = self._moved.get(item.id)
            if entry.result is None and (moved is None or moved.holder is None):
                self._spooling.reroute(entry.stanza, entry)
            return
        if entry.result is None and self._over:
            self._spooling.reroute(entry.stanza, entry)
        elif isinstance(error, StorageUnavailable) and entry.result is None:
            # With the same id: it may have been committed all the same.
            self._again.append((entry, item))
            self._again_at = time.monotonic() + _AGAIN
            if not self.watched and not self._over:
                self.watch()
        else:
            if not isinstance(error, StorageError):
                log.error("unacknowledged message not stored", user=self._session.user, exc=error)
            entry.row = None  # its client alone can tell
            self.rows -= 1

    def _retry(self) -> None:
        again, self._again = self._again, []
        for entry, item in again:
            if entry.result is None and entry.row == item.id:
                self._spooling.submit(self, entry, item)

    def _forget(self, entry: Sent) -> None:
        row, entry.row = entry.row, None
        if _is_row(row):
            self.rows -= 1
            if self._free:
                self._free.discard(row)
            self._spooling.delete(row)

    def acknowledged(self, entry: Sent) -> None:
        """The client has it."""
        if _is_row(entry.row):
            self._spooling.acknowledged_late += 1
        self._forget(entry)

    # -- aside

    def set_aside(self) -> None:
        """Its client may be on a node that is not seen, and get what is newer there: what is in the spool is free from
        now on, as soon as it is written, until there is a stream again."""
        if not self.aside and self._spooling.spool is not None and not self._session.anonymous:
            self.aside = True
            self._set_free([entry for entry in self._outbound.entries() if _is_message(entry)])

    def _set_free(self, entries: list[Sent], *, flying: bool = False) -> None:
        """`flying`: also what is on its way to the database, where it is free then at once."""
        rows: dict[Holder, list[bytes]] = {}
        for entry in entries:
            stanza, row = entry.stanza, entry.row
            if row in self._free:
                continue
            if isinstance(stanza, KeptMessage):
                if stanza.holder is None:
                    continue
                holder, stanza.holder = stanza.holder, None
                row = entry.row = stanza.row_id  # which goes if its client has it after all
                self.rows += 1
                entry.settle(SAFE)
            elif _is_row(row) and (flying or entry.result is not None):
                holder = self.holder
            else:
                continue  # not there, or not yet
            self._free = self._free or set()
            self._free.add(row)
            rows.setdefault(holder, []).append(row)
        if rows:
            self._spooling.release(self._session.user, rows)

    def _is_free(self, entry: Stanza | Unsettled) -> bool:
        return isinstance(entry, Sent) and entry.row in self._free

    def resume(self) -> list[tuple[Stanza, Pending]]:
        """There is a stream. What was set aside comes from the spool, like all that is there; what is not comes back,
        to be delivered behind that."""
        if not self.aside:
            return []
        behind = self._leave_to_spool()
        self._examined = self._outbound.end
        return behind

    def _leave_to_spool(self) -> list[tuple[Stanza, Pending]]:
        self.aside = False
        self._give_up()
        entries = [entry for entry in self._outbound.entries() if _is_message(entry)]
        self._outbound.drop(_is_message)
        self._set_free(entries, flying=True)
        free, self._free = self._free, _NONE
        self.rows -= len(free)
        self._let_go = {entry.row for entry in entries if _is_row(entry.row) and entry.result is None} or _NONE
        self._spooling.return_to(self._session.user)
        return [
            (entry.stanza, entry if entry.result is None else Pending()) for entry in entries if entry.row not in free
        ]

    # -- the end

    def end(self, left: list[Unsettled]) -> list[Record]:
        """The session is over. What is to be routed again comes back; what is in the spool is free soon. What may be
        kept goes along where some of it is there, or nobody else is: now, since what is stored from here on, on
        whatever node, must not come before it."""
        self._over = True
        self._spooling.write_deletes()  # whoever comes next need not wait for that
        session = self._session
        spooled = not session.parts.manager.is_available(session.user) or any(
            isinstance(entry.stanza, KeptMessage) or _is_row(_row_of(entry)) for entry in left
        )
        records: list[Record] = []
        rows: dict[Holder, list[bytes]] = {}
        for entry in left:
            if self._is_free(entry):
                continue
            if spooled and isinstance(entry, Sent) and entry.row is None:
                self._put(entry)
            stanza, row = entry.stanza, _row_of(entry)
            if isinstance(stanza, KeptMessage) and stanza.holder is not None and self._spooling.spool is not None:
                holder, stanza.holder = stanza.holder, None
                rows.setdefault(holder, []).append(stanza.row_id)
                entry.settle(SAFE)
            elif _is_row(row):
                rows.setdefault(self.holder, []).append(row)
            elif row != ELSEWHERE:
                records.append(Record(stanza, entry if entry.result is None else Pending()))
        if rows:
            self._spooling.release(self._session.user, rows)
        self._retry()  # for the last time
        return records

    def leaving(self) -> list[tuple[Stanza, Pending | None]]:
        """The session goes on on another node. What waits for its client, with whoever waits for what becomes of it: a
        row here is deleted when that is safe there."""
        behind = self._leave_to_spool() if self.aside else []
        self._over = self._left = True
        self._spooling.write_deletes()
        self._give_up()
        return [*(self._leave(entry) for entry in self._outbound.entries()), *behind]

    def _give_up(self) -> None:
        """What could not be written will not be, from here."""
        for entry, item in self._again:
            if entry.row == item.id:
                entry.row = None
                self.rows -= 1
        self._again = []

    def _leave(self, entry: Stanza | Unsettled) -> tuple[Stanza, Pending | None]:
        if not isinstance(entry, Sent):
            return (entry.stanza, entry) if isinstance(entry, Unsettled) else (entry, None)
        stanza = entry.stanza
        if entry.row is None:
            return stanza, entry
        outcome = Pending()
        if not _is_row(entry.row):
            return stanza, outcome
        moved = KeptMessage(stanza.kind, stanza.type, stanza.id, stanza.to, stanza.from_, stanza.xml)
        moved.place = stanza.place
        moved.row_id, moved.holder = entry.row, self.holder
        self._moved[entry.row] = moved
        outcome.then(partial(self._arrived, entry, moved))
        return moved, outcome

    def _arrived(self, entry: Sent, moved: KeptMessage, result: Settled) -> None:
        self._moved.pop(moved.row_id, None)
        if moved.holder is not None:
            promised = entry.result is SAFE
            entry.settle(result)
            if promised and result is not SAFE:  # its sender may not hear of the error
                self._spooling.give_back(moved)
            else:
                self._spooling.delete(moved.row_id)
        elif entry.row is None and entry.result is None:
            self._spooling.reroute(entry.stanza, entry)  # it has come back, and is not in the database
        # Else it has come back and is free.


def _is_message(entry: Stanza | Unsettled) -> TypeGuard[Sent]:
    return isinstance(entry, Sent) and entry.stanza.kind == "message"


def _row_of(entry: Unsettled) -> bytes | None:
    return entry.row if isinstance(entry, Sent) else None


def _is_row(row: bytes | None) -> TypeGuard[bytes]:
    return row is not None and len(row) > 1
