"""Sessions that went with their node: whoever on this node saw them is told that they are gone.

Every node tells its own people, so nothing has to cross between nodes that are in trouble. Who saw a session is known
from the rosters of those who are here, and of directed presence from what has come. Only of users who block somebody
it is not: their block list is read before.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from typing import Any, Final, Protocol

from xmppd.errors import StorageError
from xmppd.events import LostSession
from xmppd.module_api import Contact, Session, Sessions
from xmppd.protocol.jid import JID, bare
from xmppd.protocol.stanza import Stanza, build

from .blocked import Blocks
from .slices import Slice, sliced

MET: Final = "presence met"  # in a session's state: full JIDs of other nodes that sent it directed presence
CAME: Final = "presence came"  # in a session's state: when it became available, by `time.monotonic`, which nobody sets
_MANY: Final = 1000  # of them for one session; of those beyond no end is told
_RETRY: Final = 5.0  # seconds between two looks for a database that is away

LostByUser = Mapping[str, Mapping[str, LostSession]]  # bare JID -> full JID -> it


class Log(Protocol):
    def info(self, phrase: str, /, **fields: Any) -> None: ...

    def warning(self, phrase: str, /, **fields: Any) -> None: ...


class Losses:
    """`contacts` gives the roster of a user who is here without waiting, `later` one that is not at hand."""

    def __init__(
        self,
        sessions: Sessions,
        blocks: Blocks,
        *,
        contacts: Callable[[JID], Mapping[str, Contact] | None],
        later: Callable[[JID], Coroutine[Any, Any, Mapping[str, Contact]]],
        route: Callable[[Stanza], object],
        log: Log,
    ) -> None:
        self._sessions = sessions
        self._blocks = blocks
        self._contacts = contacts
        self._later = later
        self._route = route
        self._log = log
        self._under_way: dict[int, Iterator[None]] = {}
        self._last = 0

    # -- who has met whom

    def met(self, presence: Stanza, to: Iterable[Session]) -> None:
        """Directed presence has come from another node for sessions here that do not see the sender anyway."""
        assert presence.from_ is not None
        for session in to:
            met = session.state.setdefault(MET, {})
            assert isinstance(met, dict)
            if presence.type == "unavailable":
                met.pop(presence.from_.full, None)
            elif len(met) < _MANY:
                met[presence.from_.full] = None

    # -- the loss

    async def tell(self, lost: Iterable[LostSession], now: float) -> None:
        """Tell everybody here who saw them and was here before."""
        self._last = number = self._last + 1
        work = _Work(self, lost, now)
        self._under_way[number] = work.steps
        try:
            for _ in work.steps:
                await asyncio.sleep(0)
        finally:
            self._under_way.pop(number, None)
        await self._unknown(work)
        await self._guarded(work)
        if work.sessions:
            self._log.info("contacts told of lost sessions", sessions=work.sessions, told=work.told)

    def finish(self) -> None:
        """Tell all that is left, now: the tasks are gone."""
        for steps in list(self._under_way.values()):
            for _ in steps:
                pass
        self._under_way.clear()

    async def _unknown(self, work: "_Work") -> None:
        """Those whose roster was not at hand."""
        while work.unknown:
            sessions, work.unknown = work.unknown, []
            for session in sessions:
                try:
                    work.look(session, await self._later(session.user))
                except StorageError as exc:
                    self._log.warning("presence waits for the roster", user=session.user.bare, error=exc)
                    work.unknown.append(session)
            if work.unknown:
                await asyncio.sleep(_RETRY)

    async def _guarded(self, work: "_Work") -> None:
        """Of a user who blocks somebody, the one who is blocked must hear nothing at all."""
        slice_ = Slice()
        while work.guarded:
            pairs, work.guarded = work.guarded, {}
            for user, of_user in pairs.items():
                try:
                    blocked = await self._blocks.newest(bare(of_user[0][0].jid))
                except StorageError as exc:
                    self._log.warning("presence waits for a block list", user=user, error=exc)
                    work.guarded[user] = of_user
                    continue
                for lost, session in of_user:
                    if session.user.bare == user or not blocked.blocks(session.jid):
                        work.say(lost, session)
                if slice_.over:
                    await asyncio.sleep(0)
            if work.guarded:
                await asyncio.sleep(_RETRY)


class _Work:
    """One loss."""

    def __init__(self, losses: Losses, lost: Iterable[LostSession], now: float) -> None:
        self._losses = losses
        self._now = now
        self._lost: dict[str, dict[str, LostSession]] = {}
        self._said: dict[str, Stanza] = {}
        self.sessions = 0
        self.told = 0
        self.unknown: list[Session] = []
        self.guarded: dict[str, list[tuple[LostSession, Session]]] = {}
        self.steps = self._steps(lost)

    def _steps(self, lost: Iterable[LostSession]) -> Iterator[None]:
        slice_ = Slice()
        for session in sliced(lost, slice_):
            if session is None:
                yield
            else:
                self._lost.setdefault(session.jid.bare, {})[session.jid.full] = session
                self.sessions += 1
        if not self._lost:
            return
        for local in sliced(self._losses._sessions.local(), slice_):
            if local is None:
                yield
            elif local.priority is not None and not self._is_new(local):
                contacts = self._losses._contacts(local.user)
                if contacts is None:
                    self.unknown.append(local)
                else:
                    yield from self._look_on(local, contacts, slice_)

    def _is_new(self, session: Session) -> bool:
        came = session.state.get(CAME, 0.0)
        return isinstance(came, float) and came >= self._now

    def look(self, session: Session, contacts: Mapping[str, Contact]) -> None:
        for _ in self._look_on(session, contacts, Slice()):
            pass

    def _look_on(self, session: Session, contacts: Mapping[str, Contact], slice_: Slice) -> Iterator[None]:
        for lost in self._seen_by(session, contacts):
            if lost.guarded:
                self.guarded.setdefault(lost.jid.bare, []).append((lost, session))
            else:
                self.say(lost, session)
            if slice_.over:
                yield

    def _seen_by(self, session: Session, contacts: Mapping[str, Contact]) -> list[LostSession]:
        found: dict[str, LostSession] = {}
        for user in self._lost.keys() & contacts.keys():
            if contacts[user].is_seen:
                found |= self._lost[user]
        found |= self._lost.get(session.user.bare, {})
        met = session.state.get(MET)
        if isinstance(met, dict):
            for full in list(met):
                lost = self._lost.get(full.partition("/")[0], {}).get(full)
                if lost is not None:
                    del met[full]
                    found[full] = lost
        return list(found.values())

    def say(self, lost: LostSession, session: Session) -> None:
        """Unless it has come back meanwhile."""
        if session.priority is None:
            return
        for resource in self._losses._sessions.resources(bare(lost.jid)):
            if resource.jid == lost.jid and resource.priority is not None:
                return
        said = self._said.get(lost.jid.full)
        if said is None:
            said = self._said[lost.jid.full] = build("presence", {"from": lost.jid.full, "type": "unavailable"})
        self.told += 1
        self._losses._route(said.addressed(session.jid))
