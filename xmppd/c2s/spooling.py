"""What clients with stream management do not acknowledge soon goes to the spool (XEP-0198 and the promise).

A message whose acknowledgement takes longer than its client's round trip lets expect is written there, with this
session as its holder; with that commit it is safe, and its sender may forget it. The row goes when the client has
acknowledged. When the session ends instead, its rows become offline messages, with all that is as old or younger.
What may not be kept (IQ requests, `no-store`) is safe as soon as it is routed: its sender waits no longer.

One timer per node visits the sessions that have something overdue to come; clients that acknowledge promptly cost a
look now and then, and no write.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Final

from xmppd.c2s.stream_management import Sent
from xmppd.chores import Chores, KeptMessage
from xmppd.cluster.tables import Owner
from xmppd.delivery import Pending, Record
from xmppd.errors import StorageUnavailable
from xmppd.events import MessagesFreeing, MessageSpooling
from xmppd.hooks import Hooks
from xmppd.log import get_logger
from xmppd.protocol.jid import JID, bare
from xmppd.protocol.stanza import Stanza
from xmppd.spool import Holder, KeepItem, Kept, Spool
from xmppd.storage.ids import id_of, new_id

if TYPE_CHECKING:
    from xmppd.c2s.backlog import Backlog
    from xmppd.c2s.session import Session

_TICK: Final = 0.05  # seconds between two visits
_TOGETHER: Final = 250  # rows that are written as one lot
_TOGETHER_SIZE: Final = 512 * 1024  # bytes of them
log = get_logger("c2s")

Flight = asyncio.Future[list[Kept | Exception]]  # of rows that are written as one lot


class Spooling:
    """One per node; without a spool nothing is written, and senders wait for acknowledgements."""

    def __init__(
        self,
        spool: Spool | None = None,
        hooks: Hooks | None = None,
        owner: Owner | None = None,
        *,
        reroute: Callable[[list[Record]], None] = lambda records: None,
    ) -> None:
        self.spool = spool
        self.owner = owner
        self._hooks = hooks
        self._reroute = reroute
        self._chores = None if spool is None else Chores(spool, log)
        self._watched: list[Backlog] = []
        self._timer: asyncio.TimerHandle | None = None
        self._unpromised: list[tuple[Backlog, Sent]] = []  # committed while this node had no lease
        self._overdue: list[_Overdue] | None = None  # of a round of visits that goes on
        self._deleted: list[bytes] = []  # rows that the next tick deletes
        self.freeing: dict[str, set[asyncio.Future[None]]] = {}  # by bare JID: rows on their way to be free
        self.unacknowledged = 0  # stanzas that clients have not acknowledged yet
        self.spooled = 0  # written because of that
        self.acknowledged_late = 0  # of which were acknowledged after all
        self.ended = 0  # of which are offline messages now, because their session has ended
        self.duplicates = 0  # of which were there already

    # -- the timer

    def watch(self, backlog: "Backlog") -> None:
        """Something may become overdue."""
        self._watched.append(backlog)
        self._wind_up()

    def _wind_up(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_TICK, self._tick)

    def _tick(self) -> None:
        watched, self._watched = self._watched, []
        now = time.monotonic()
        overdue: list[_Overdue] = []
        self._overdue = overdue
        try:
            self._watched += [backlog for backlog in watched if backlog.visit(now)]
        finally:
            self._overdue = None
            self._submit_all(overdue)
        self.write_deletes()  # behind what is stored: as a rule that is one transaction
        if self._unpromised and self.holds_lease():
            unpromised, self._unpromised = self._unpromised, []
            for backlog, entry in unpromised:
                backlog.promised(entry)
        again = self._watched or self._unpromised or self._deleted
        self._timer = asyncio.get_running_loop().call_later(_TICK, self._tick) if again else None

    def holds_lease(self) -> bool:
        return self.spool is None or self.spool.standing.holds_lease()

    def promise(self, backlog: "Backlog", entry: Sent) -> None:
        """It is in the database: its sender may know, unless others may be about to take over what this node holds."""
        if not self._unpromised and self.holds_lease():
            backlog.promised(entry)
            return
        self._unpromised.append((backlog, entry))
        self._wind_up()

    def stop(self) -> None:
        """No more visits."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._watched.clear()
        self.write_deletes()

    # -- rows

    def submit(self, backlog: "Backlog", entry: Sent, item: KeepItem) -> None:
        """Have a row written, and its backlog told. All that is overdue in a round of visits is written as one lot,
        which takes less than half the time."""
        one = _Overdue(backlog, entry, item)
        if self._overdue is not None:
            self._overdue.append(one)
        else:
            self._submit_all([one])

    def _submit_all(self, overdue: "list[_Overdue]") -> None:
        some: list[_Overdue] = []
        size = 0
        for one in overdue:
            some.append(one)
            size += len(one.item.stanza)
            if len(some) >= _TOGETHER or size >= _TOGETHER_SIZE:
                self._submit_some(some)
                some, size = [], 0
        if some:
            self._submit_some(some)

    def _submit_some(self, some: "list[_Overdue]") -> None:
        assert self.spool is not None
        try:
            future = self.spool.submit_all([one.item for one in some])
        except StorageUnavailable as exc:
            for one in some:
                one.backlog.not_written(one.entry, one.item, exc)
            return
        for one in some:
            one.backlog.flies(future)
        future.add_done_callback(partial(_landed, some))

    def item(self, session: "Session", stanza: Stanza, holder: Holder) -> KeepItem | bool | None:
        """The row a message would be; False when it may not be kept, None when nobody can tell."""
        if self.spool is None or self._hooks is None or session.anonymous:
            return None
        event = MessageSpooling(session.user, stanza)
        self._hooks.notify(event)
        stanza.forget_element()
        if not event.keep:
            return event.keep
        sender = "" if stanza.from_ is None else stanza.from_.bare
        # One that comes with its session from another node is a row there, which goes when this one is written.
        _, item = self.spool.keep_item(
            session.user.domain,
            session.user.local,
            sender,
            event.stanza,
            dedup=None if stanza.moved else event.dedup,
            quota=None,
            expires_at=event.expires_at,
            holder=holder,
            row_id=id_of(stanza.place) if stanza.place else new_id(),
            for_account=True,
        )
        return item

    def delete(self, row: bytes) -> None:
        """Its client has it: there is no hurry, and many together take less time."""
        self._deleted.append(row)
        self._wind_up()

    def write_deletes(self, done: Callable[[], None] = lambda: None) -> None:
        """What was to be deleted is, now; `done` is called when that is committed."""
        deleted, self._deleted = self._deleted, []
        if self._chores is None:
            done()
        else:
            self._chores.delete_all(deleted, done)

    def is_apart(self) -> bool:
        """Whether clients may be on nodes that are not seen."""
        return self.spool is not None and not self.spool.standing.sees_all()

    def return_to(self, user: JID) -> None:
        """A session of the user goes on for which nothing was held: it is to get what is free, but for what its client
        has acknowledged."""
        assert self._hooks is not None
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._hooks.notify(MessagesFreeing(user, done))
        self.write_deletes(lambda: done.set_result(None))

    def give_back(self, message: Stanza) -> None:
        """One that is a row, and cannot be delivered now, is free for whoever comes."""
        if isinstance(message, KeptMessage) and message.holder is not None and message.to is not None:
            holder, message.holder = message.holder, None
            self.release(bare(message.to), {holder: [message.row_id]})

    def release(self, user: JID, rows: Mapping[Holder, list[bytes]]) -> None:
        """They are offline messages from now on."""
        assert self._chores is not None
        assert self._hooks is not None
        self.ended += sum(map(len, rows.values()))
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        freeing = self.freeing.setdefault(user.bare, set())
        freeing.add(done)
        left = len(rows)

        def freed() -> None:
            nonlocal left
            left -= 1
            if left:
                return
            freeing.discard(done)
            if not freeing and self.freeing.get(user.bare) is freeing:
                del self.freeing[user.bare]
            if not done.done():
                done.set_result(None)

        self._hooks.notify(MessagesFreeing(user, done))
        for holder, ids in rows.items():
            self._chores.release(ids, holder, freed)

    def reroute(self, stanza: Stanza, outcome: Pending) -> None:
        self._reroute([Record(stanza, outcome)])


class _Overdue:
    """A row on its way to the database, and who is to be told."""

    __slots__ = ("backlog", "entry", "item")

    def __init__(self, backlog: "Backlog", entry: Sent, item: KeepItem) -> None:
        self.backlog = backlog
        self.entry = entry
        self.item = item


def _landed(some: list[_Overdue], future: Flight) -> None:
    for one in some:
        one.backlog.landed(future)
    if future.cancelled():
        return
    for one, result in zip(some, future.result(), strict=True):
        if isinstance(result, Exception):
            one.backlog.not_written(one.entry, one.item, result)
        else:
            one.backlog.written(one.entry, one.item, result)
