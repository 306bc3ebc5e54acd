"""Announcements: what an administrator sends to `HOST/announce/...` goes to all users, or to those who are online.

    HOST/announce/all           every account, kept for those who are absent
    HOST/announce/online        everybody who is connected
    HOST/announce/motd          everybody who is connected, and everybody else once, at login
    HOST/announce/motd/update   everybody once, at login
    HOST/announce/motd/delete   that no longer

With `announce/all-hosts/` instead of `announce/` it is done for every host (`announce/all-hosts/online`); for the
accounts of all hosts the address is `announce/all-hosts/all`.
"""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Final
from xml.sax.saxutils import escape

from xmppd.errors import StanzaError, StorageError
from xmppd.events import (
    HANDLED,
    Handled,
    HostStanzaReceiving,
    SessionBecameAvailable,
    UserDeleted,
)
from xmppd.module_api import (
    AccessRules,
    Arg,
    Context,
    Module,
    Outcome,
    Pending,
    Rescode,
    Session,
    command,
    from_node,
    hook,
    string,
)
from xmppd.protocol.jid import JID, make
from xmppd.protocol.stanza import Stanza, build

from .motd import Motd, Store, motd, motd_seen

_PATHS: Final = ("all", "online", "motd", "motd/update", "motd/delete")
_PIECE: Final = 500  # recipients between two turns of the loop, or accounts read at once
_REMEMBERED: Final = 10.0  # seconds until one that another node has set is seen here, if its word of it was lost


@dataclass(frozen=True, slots=True)
class Config:
    access: str = "announce"  # access rule: who may announce


class Announce(Module[Config]):
    tables = (motd, motd_seen)

    def __init__(self, context: Context, config: Config) -> None:
        super().__init__(context, config)
        self._store = Store(self.storage)
        self._motds: dict[str, tuple[float, Motd | None]] = {}  # by host: when it was looked up, and what it was
        self._showing: set[str] = set()  # users who are being shown it, until that is written down

    async def start(self) -> None:
        self._store.open()

    async def stop(self) -> None:
        self._store.close()

    @classmethod
    def check_options(cls, config: Config, access: AccessRules) -> Iterator[str]:
        if not access.has_rule(config.access):
            yield f"access: there is no access rule {config.access!r}"

    # -- what administrators send

    @hook(HostStanzaReceiving)
    async def receive(self, event: HostStanzaReceiving) -> Handled | None:
        stanza, sender = event.stanza, event.stanza.from_
        assert stanza.to is not None
        path = stanza.to.resource
        if stanza.kind != "message" or stanza.type == "error" or sender is None or not path.startswith("announce/"):
            return None
        hosts, path = self._wanted(event.host, path.removeprefix("announce/"))
        if path not in _PATHS:
            return None
        for host in hosts:  # each has rules of its own; nothing is done unless all of them agree
            if not self.access.allowed(self.config.access, sender, host=host):
                raise StanzaError("forbidden", f"you may not announce to the users of {host}")
        if path != "motd/delete" and stanza.body is None:
            raise StanzaError("bad-request", "an announcement has a body")
        for host in hosts:
            await self._announce(host, path, stanza)
        self.log.info("announcement", by=sender.bare, to=path, hosts=",".join(hosts))
        return HANDLED

    def _wanted(self, host: str, path: str) -> tuple[tuple[str, ...], str]:
        """The hosts, and what to do for each."""
        everywhere = path.removeprefix("all-hosts/")
        return ((host,), path) if everywhere == path else (tuple(self.server.hosts), everywhere)

    async def _announce(self, host: str, path: str, stanza: Stanza) -> None:
        """StorageUnavailable."""
        if path == "motd/delete":
            await self._delete(host)
            return
        text = _from_host(stanza, host, keep=path != "online")
        if path.startswith("motd"):
            new = await self._store.set(host, text.xml)
            self._motds[host] = (self.clock(), new)
            self.nodes.cast("motd", host)
            if path == "motd":
                self._everywhere(host, text, new)
        elif path == "online":
            self._everywhere(host, text)
        else:
            self.spawn(self._to_all(host, text), name="announcement")

    async def _delete(self, host: str) -> bool:
        self._motds[host] = (self.clock(), None)
        deleted = await self._store.delete(host)
        self.nodes.cast("motd", host)
        return deleted

    # -- sending

    def _everywhere(self, host: str, text: Stanza, new: Motd | None = None) -> None:
        self.nodes.cast("online", [host, text.xml.decode(), None if new is None else new.id.hex()])
        self.spawn(self._to_online(host, text, new), name="announcement")

    @from_node("online")
    def send_too(self, node: bytes, news: list[Any]) -> None:
        host, text, shown = news[0], Stanza.from_bytes(news[1].encode()), news[2]
        new = None if shown is None else Motd(bytes.fromhex(shown), text.xml)
        self.spawn(self._to_online(host, text, new), name="announcement")

    @from_node("motd")
    def look_again(self, node: bytes, host: str) -> None:
        """Another node has set, or deleted, the message of the day."""
        self._motds.pop(host, None)

    async def _to_online(self, host: str, text: Stanza, new: Motd | None = None) -> None:
        """Every session of this node, with whatever priority."""
        found = (session for session in self.sessions.local() if session.user.domain == host)
        sessions = list(found)
        told: set[JID] = set()
        for some in _pieces(sessions):
            for session in some:
                if any(session is other for other in self.sessions.sessions(session.user)):
                    self.route(text.addressed(session.jid))
                    told.add(session.user)
            if new is not None:
                self._mark(told, new)
                told.clear()
            await asyncio.sleep(0)
        self.log.info("announcement delivered", host=host, sessions=len(sessions))

    async def _to_all(self, host: str, text: Stanza) -> None:
        """Every account, in pieces: the next one when what was to be stored for this one is stored."""
        after, count = None, 0
        while names := await self.accounts.names(host, limit=_PIECE, after=after):
            waiting: list[Outcome] = []
            for name in names:
                user = make(name, host)
                outcome = self.route(text.addressed(user))
                if not self.sessions.is_available(user):
                    waiting.append(outcome)  # the others answer for themselves, in their clients' time
            for outcome in waiting:
                await _settled(outcome)
            count, after = count + len(names), names[-1]
        self.log.info("announcement delivered", host=host, accounts=count)

    # -- the message of the day

    @hook(SessionBecameAvailable, after=("presence", "roster", "offline"))
    async def show(self, event: SessionBecameAvailable) -> None:
        session, user = event.session, event.session.user
        if event.priority < 0 or user.bare in self._showing:
            return
        if session.anonymous and event.old_priority is not None:
            return
        self._showing.add(user.bare)
        current = None
        try:
            current = await self._unseen(user)
        except StorageError as exc:
            self.log.warning("message of the day not shown", user=user.bare, error=exc)
        finally:
            if current is None:
                self._showing.discard(user.bare)
        if current is not None:
            session.send(Stanza.from_bytes(current.stanza).addressed(user))
            self._mark((user,), current)

    async def _unseen(self, user: JID) -> Motd | None:
        current = await self._current(user.domain)
        if current is None or self.sessions.is_anonymous(user):
            return current
        return None if await self._store.seen(user) == current.id else current

    async def _current(self, host: str) -> Motd | None:
        looked, found = self._motds.get(host, (0.0, None))
        if self.clock() - looked >= _REMEMBERED:
            found = await self._store.get(host)
            self._motds[host] = (self.clock(), found)
        return found

    def _mark(self, users: "set[JID] | tuple[JID, ...]", shown: Motd) -> None:
        for user in users:
            if self.sessions.is_anonymous(user):
                self._showing.discard(user.bare)
                continue  # nothing is kept about them
            self._showing.add(user.bare)
            try:
                self._store.mark(user, shown.id).add_done_callback(partial(self._marked, user))
            except StorageError as exc:
                self._showing.discard(user.bare)
                self.log.warning("message of the day will be shown again", user=user.bare, error=exc)

    def _marked(self, user: JID, future: "asyncio.Future[None]") -> None:
        self._showing.discard(user.bare)
        if not future.cancelled() and (error := future.exception()) is not None:
            self.log.warning("message of the day will be shown again", error=error)

    @hook(UserDeleted)
    async def forget(self, event: UserDeleted) -> None:
        await self._store.mark(event.user, None)

    # -- for operators

    @command(
        "announce_send_all",
        args=(Arg("host"), Arg("subject"), Arg("body")),
        result=Rescode(),
        tags=("announce",),
        scope="shared",
        doc="Send an announcement to every account of a host",
    )
    async def announce_send_all(self, host: str, subject: str, body: str) -> None:
        await self._command(host, "all", subject, body)

    @command(
        "announce_send_online",
        args=(Arg("host"), Arg("subject"), Arg("body")),
        result=Rescode(),
        tags=("announce",),
        scope="shared",
        doc="Send an announcement to everybody who is connected to a host",
    )
    async def announce_send_online(self, host: str, subject: str, body: str) -> None:
        await self._command(host, "online", subject, body)

    @command(
        "announce_motd_set_online",
        args=(Arg("host"), Arg("subject"), Arg("body")),
        result=Rescode(),
        tags=("announce",),
        scope="shared",
        doc="Set the message of the day and send it to everybody who is connected",
    )
    async def announce_motd_set_online(self, host: str, subject: str, body: str) -> None:
        await self._command(host, "motd", subject, body)

    @command(
        "announce_motd_update",
        args=(Arg("host"), Arg("subject"), Arg("body")),
        result=Rescode(),
        tags=("announce",),
        scope="shared",
        doc="Set the message of the day, which everybody is shown at the next login",
    )
    async def announce_motd_update(self, host: str, subject: str, body: str) -> None:
        await self._command(host, "motd/update", subject, body)

    @command(
        "announce_motd_delete",
        args=(Arg("host"),),
        result=Rescode(),
        tags=("announce",),
        scope="shared",
        doc="Delete the message of the day",
    )
    async def announce_motd_delete(self, host: str) -> None:
        await self._delete(self.own_host(host))

    @command(
        "announce_motd_get",
        args=(Arg("host"),),
        result=string("motd"),
        tags=("announce",),
        scope="shared",
        doc="Show the message of the day",
        reads=True,
    )
    async def announce_motd_get(self, host: str) -> str:
        found = await self._store.get(self.own_host(host))
        return "" if found is None else Stanza.from_bytes(found.stanza).body or ""

    async def _command(self, host: str, path: str, subject: str, body: str) -> None:
        title = f"<subject>{escape(subject)}</subject>" if subject else ""
        text = build("message", {"type": "normal"}, f"{title}<body>{escape(body)}</body>".encode())
        await self._announce(self.own_host(host), path, text)


def _from_host(stanza: Stanza, host: str, *, keep: bool) -> Stanza:
    """As the host says it, still without a recipient. `keep`: it has to be one that is stored for the absent."""
    kind = stanza.type if stanza.type in ("normal", "chat") or (stanza.type == "headline" and not keep) else "normal"
    return stanza.replace(from_=host, to=None, type=kind)


def _pieces(sessions: list[Session]) -> Iterator[list[Session]]:
    left = iter(sessions)
    while some := list(islice(left, _PIECE)):
        yield some


async def _settled(outcome: Outcome) -> None:
    if not isinstance(outcome, Pending) or outcome.result is not None:
        return
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    outcome.then(lambda result: None if done.done() else done.set_result(None))
    await done
