"""Sessions that are resumed on another node than the one they were on (XEP-0198 5): calls between the two.

The new node asks (`sm.resume`); the old one ends the stream, waits a little for what came on it to be settled, and
answers with what makes up the session: address, presence, counters, and what modules have put in (SessionLeft). The
new node enters the session in the table, which takes it out on the old one, and goes on with the stream: that is one
round trip. When the old node sees that the session is there, it sends what waits for the client, in order: what was not
acknowledged, then what has come meanwhile. Each of these is a stanza for another node like any other (forward.py): its
sender hears what becomes of it, and when that node dies it is routed again. What others send straight to the new node
is held back there until all nodes have heard of the move and the old one has passed on all it had.

The payload of the call is [id, user, h]; the answer has one of
    session   {jid, bound_at (ns), since (s), name, handled, acknowledged, refused, max, presence,
               luggage {module: ...}}
    error     [condition, text, element]: the stream error for the client
    h         what had arrived of a session that has ended, or null
"""

import asyncio
import base64
import binascii
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from xmppd.c2s.managed import Managed
from xmppd.c2s.session import Parts, Session
from xmppd.cluster.interfaces import Calls, Links, Peer
from xmppd.delivery import SAFE, Pending, Record
from xmppd.errors import CallRefused, NodeUnreachable, StreamError
from xmppd.events import MessagesFound, SessionArrived, SessionLeft
from xmppd.forward import Forwarder
from xmppd.log import get_logger
from xmppd.protocol.jid import JID, parse
from xmppd.protocol.stanza import Stanza

_RESUME: Final = "sm.resume"
_ASKING: Final = 6.0  # seconds for the old node to answer: as long as it may be silent
_PATIENCE: Final = 10.0  # seconds for the session to show up on the new node; then it has ended
_NODE: Final = 16  # bytes of a node's UUID
log = get_logger("c2s")


@dataclass(slots=True)
class _Leaving:
    """A session that is about to show up on another node."""

    session: Session
    node: bytes
    entries: list[tuple[Stanza, Pending | None]]  # what was not acknowledged
    priority: int | None
    presence: Stanza | None
    timer: asyncio.TimerHandle


class Handover:
    """One per node."""

    def __init__(self, links: Links, calls: Calls, forwarder: Forwarder, parts: Callable[[], Parts]) -> None:
        self._links = links
        self._calls = calls
        self._forwarder = forwarder
        self._parts = parts
        self._leaving: dict[str, _Leaving] = {}  # by full JID
        # What is waited for before a client that comes from another node goes on, or None.
        self.look_first: Callable[[JID], Coroutine[Any, Any, None] | None] = lambda user: None
        calls.on_call(_RESUME, self._asked)

    # -- the old node

    async def _asked(self, peer: Peer, payload: Any) -> dict[str, Any]:
        id, bare, h = payload
        user, resumption = parse(bare), self._parts().resumption
        session = resumption.find(id, user)
        managed = None if session is None else session.managed
        try:
            if session is None or managed is None or not await managed.come_back(h):
                return {"h": resumption.handled(id, user)}
        except StreamError as error:
            return {"error": [error.condition, error.text, error.application.decode()]}
        return {"session": self._give(session, managed, peer)}

    def _give(self, session: Session, managed: Managed, peer: Peer) -> dict[str, Any]:
        presence = session.presence
        state: dict[str, Any] = {
            "jid": session.jid.full,
            "bound_at": session.row.bound_at,
            "since": session.bound_at,
            "name": session.carrier.name,
            "handled": managed.inbound.handled,
            "acknowledged": managed.outbound.acknowledged,
            "refused": managed.inbound.refused,
            "max": managed.max,
            "presence": None if presence is None else presence.xml.decode(),
        }
        luggage: dict[str, Any] = {}
        timer = asyncio.get_running_loop().call_later(_PATIENCE, self._did_not_come, session)
        leaving = _Leaving(session, peer.node, [], session.priority, presence, timer)
        self._leaving[session.jid.full] = leaving
        leaving.entries = session.leave(SessionLeft(session, luggage))
        log.info("session left", jid=session.jid.full, node=peer.name)
        return {**state, "luggage": luggage}

    def displaced(self, session: Session) -> None:
        """A session that was leaving is on the other node, or was bound anew."""
        leaving = self._leaving.pop(session.jid.full, None)
        if leaving is None:
            return
        leaving.timer.cancel()
        manager = self._parts().manager
        if session in manager.sessions(session.user):
            # A node says so, whose row has not come yet: from now on what comes for it must not come here.
            manager.close(session.row)
            node: bytes | None = leaving.node
        else:
            resources = manager.resources(session.user)
            there = any(each.jid == session.jid and each.node == leaving.node for each in resources)
            node = leaving.node if there else None
        for stanza, pending in leaving.entries:
            self._pass_on(session, stanza, pending, node)
        for stanza, pending in session.left():
            self._pass_on(session, stanza, pending, node, behind=True)

    def _pass_on(
        self, session: Session, stanza: Stanza, pending: Pending | None, node: bytes | None, *, behind: bool = False
    ) -> None:
        """`behind`: it has not been written to the client, and what is stored comes before it."""
        if pending is not None and pending.result is not None:
            return
        if stanza.copy and pending is not None:
            pending.settle(SAFE)  # nobody waits for it
        if node is not None:
            to = stanza.to
            if to is None or to.bare != session.user.bare:
                stanza = stanza.replace(to=session.jid.full)
            outcome = self._forwarder.pass_on(node, stanza, session.jid.resource, behind=behind)
            if outcome is not None:
                if pending is not None:
                    pending.follow(outcome)
                return
        if pending is not None and not stanza.copy:
            self._parts().manager.reroute([Record(stanza, pending)])

    def _did_not_come(self, session: Session) -> None:
        """The other node has died, or had no use for it."""
        leaving = self._leaving.pop(session.jid.full, None)
        if leaving is not None:
            log.info("session closed", jid=session.jid.full, reason="lost on its way to another node")
            session.priority, session.presence = leaving.priority, leaving.presence
            left = leaving.entries + session.left()
            session.end_leaving()
            for stanza, pending in left:
                self._pass_on(session, stanza, pending, None)

    def close(self) -> None:
        """The node stops."""
        for leaving in list(self._leaving.values()):
            leaving.timer.cancel()
            self._did_not_come(leaving.session)

    # -- the new node

    async def fetch(self, id: str, user: JID, h: int) -> "Session | int | None":
        """The session with that id, from the node that has it; it waits for its stream. Or what had arrived of one that
        has ended, or None. StreamError."""
        result: asyncio.Future[Session | int | None] = asyncio.get_running_loop().create_future()

        async def bring() -> None:
            # Not ended with the connection that asks: what another node has given away must not be lost.
            try:
                found = await self._fetch(id, user, h)
                if isinstance(found, Session) and (look := self.look_first(user)) is not None:
                    await look
            except StreamError as error:
                if not result.done():
                    result.set_exception(error)
            else:
                if not result.done():
                    result.set_result(found)
            finally:
                if not result.done():
                    result.set_result(None)

        self._parts().spawn(bring(), name="session from another node")
        return await result

    async def _fetch(self, id: str, user: JID, h: int) -> "Session | int | None":
        known: int | None = None
        for node in self._candidates(id, user):
            try:
                answer = await self._calls.call(node, _RESUME, [id, user.bare, h], timeout=_ASKING)
            except (NodeUnreachable, CallRefused):
                continue
            if "error" in answer:
                condition, text, element = answer["error"]
                raise StreamError(condition, text, application=element.encode())
            if "session" in answer:
                return self._take(id, node, answer["session"])
            if answer["h"] is not None:
                known = answer["h"]
        return known

    def _candidates(self, id: str, user: JID) -> list[bytes]:
        """The node that made the id, where it may have gone on since, or may be remembered."""
        nodes = sorted(self._parts().manager.nodes_of(user))
        with suppress(ValueError, binascii.Error):
            made = base64.urlsafe_b64decode(id + "=" * (-len(id) % 4))[:_NODE]
            if made in self._links.peers:
                nodes = [made, *(node for node in nodes if node != made)]
        return nodes

    def _take(self, id: str, node: bytes, state: dict[str, Any]) -> Session:
        parts = self._parts()
        session = Session.arrived(state, parts, log)
        managed = session.managed = Managed.arrived(session, id, state)
        parts.resumption.take(session, managed)
        waiting = parts.hooks.notify(SessionArrived(session, state["luggage"]))
        told: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if waiting is not None:
            session.hold_messages(told)  # a module that has not been told yet may know of older ones

        async def settle_in() -> None:
            try:
                if waiting is not None:
                    try:
                        await waiting
                    finally:
                        told.set_result(None)
                # All nodes know where it is; then the old one has all that was on its way to it, and has passed it on.
                await self._calls.barrier()
                if not await self._forwarder.hand_over(node, session.jid, session.row.bound_at):
                    # It still has what it should have passed on, and that is in the database: it will be free soon.
                    parts.hooks.notify_aside(MessagesFound(session.user), parts.spawn, name="messages found")
            finally:
                session.settled_in()

        parts.spawn(settle_in(), name="session from another node")
        return session
