"""Sessions of the self-test on this node: bound like a client's, with no socket behind them.

A puppet answers each message of the test with a receipt (XEP-0184) and hears the receipts for its own. While a test
runs, a probe counts how often the events of its stanzas are raised here: a module that watches one of these events is
called exactly as often. Puppets that nobody asks for anything end by themselves.

    selftest.open   {run, jids}                      makes sessions, available
    selftest.chat   {run, from, to, id}              → ms until the receipt came; refused when none comes
    selftest.online {limit}                          → {count, jids}: sessions of this node, not the test's own
    selftest.seen   {jids}                           → those of them that are not bound, as this node sees it
    selftest.counts {run}                            → {event: {stanza id: times}}
    selftest.close  {run}
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from itertools import islice
from typing import Any, Final, Protocol

from xmppd.cluster.interfaces import Calls, Peer
from xmppd.cluster.tables import SessionTable
from xmppd.errors import CommandError, StreamError
from xmppd.events import StanzaDelivering, StanzaRouting, StanzaSending
from xmppd.hooks import Hooks, event_name
from xmppd.protocol.jid import JID, parse
from xmppd.protocol.stanza import Stanza, build

RECEIPT: Final = 5.0  # seconds
IDLE: Final = 60.0  # seconds after which forgotten puppets end
PREFIX: Final = "selftest-"  # of the accounts, and of the ids of their stanzas
MAX_SEEN: Final = 1000  # sessions that are looked for

_RECEIPTS: Final = "urn:xmpp:receipts"
_OWNER: Final = "selftest"  # of the probe's hooks
PROBED: Final = (StanzaSending, StanzaRouting, StanzaDelivering)


class PuppetSession(Protocol):
    """A session of the server's (c2s/session.py), as the test uses it."""

    def bound(self) -> Awaitable[None] | None: ...
    def receive(self, stanza: Stanza) -> object: ...
    def close(self, *, clean: bool) -> None: ...


class Puppet:
    """One session of the test; fulfils what a session wants of its connection."""

    name = "selftest"
    peer = ("::1", 0)

    def __init__(self, jid: JID, bind: "Callable[[JID, Puppet], PuppetSession]") -> None:
        self.jid = jid
        self._receipts: dict[str, asyncio.Future[None]] = {}
        self._ended = False
        self._session = bind(jid, self)

    async def start(self) -> None:
        waiting = self._session.bound()
        if waiting is not None:
            await waiting
        self._session.receive(build("presence", {"from": self.jid.full}))

    async def chat(self, to: str, id: str) -> float:
        """Send a message; the milliseconds until its receipt has come. Raises CommandError."""
        receipt = self._receipts[id] = asyncio.get_running_loop().create_future()
        began = time.perf_counter()
        inner = f"<body>self-test</body><request xmlns='{_RECEIPTS}'/>"
        self._say(to, id, inner)
        try:
            async with asyncio.timeout(RECEIPT):
                await receipt
        except TimeoutError:
            raise CommandError(f"no receipt within {RECEIPT:g} s") from None
        finally:
            del self._receipts[id]
        return (time.perf_counter() - began) * 1000

    def end_session(self) -> None:
        if not self._ended:
            self._ended = True
            self._session.close(clean=True)

    def _say(self, to: str, id: str, inner: str) -> None:
        attributes = {"type": "chat", "id": id, "from": self.jid.full, "to": to}
        self._session.receive(build("message", attributes, inner.encode()))

    # -- the carrier

    @property
    def last_heard(self) -> float:
        return time.monotonic()

    def write(self, data: bytes) -> None:
        stanza = Stanza.from_bytes(data)
        if stanza.kind != "message" or stanza.from_ is None:
            return
        received = stanza.child(_RECEIPTS, "received")
        if received is not None:
            self._heard(received.get("id", ""), None)
        elif stanza.type == "error":
            self._heard(stanza.id or "", CommandError("it came back as an error"))
        elif stanza.child(_RECEIPTS, "request") is not None and (stanza.id or "").startswith(PREFIX):
            answer = f"<received xmlns='{_RECEIPTS}' id='{stanza.id}'/>"
            loop = asyncio.get_running_loop()
            loop.call_soon(self._answer, stanza.from_.full, f"{stanza.id}-receipt", answer)

    def _answer(self, to: str, id: str, inner: str) -> None:
        if not self._ended:
            self._say(to, id, inner)

    def _heard(self, id: str, error: CommandError | None) -> None:
        receipt = self._receipts.get(id)
        if receipt is not None and not receipt.done():
            receipt.set_result(None) if error is None else receipt.set_exception(error)

    def unsent(self) -> int:
        return 0

    def end(self, error: StreamError) -> None:
        self._ended = True
        for id in list(self._receipts):
            self._heard(id, CommandError(f"its session was ended: {error}"))


Bind = Callable[[JID, Puppet], PuppetSession]


class Puppets:
    """All of this node. `bind` makes a session for a full JID and its carrier."""

    def __init__(self, *, hooks: Hooks, table: SessionTable, bind: Bind) -> None:
        self._hooks = hooks
        self._table = table
        self._bind = bind
        self._runs: dict[str, list[Puppet]] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._counts: dict[str, dict[str, dict[str, int]]] = {}
        self.handlers: dict[str, Callable[[Any], Any]] = {
            "selftest.open": self._open,
            "selftest.chat": self._chat,
            "selftest.online": self._online,
            "selftest.seen": self._seen,
            "selftest.counts": self._count,
            "selftest.close": self._close,
        }

    def connect(self, calls: Calls) -> None:
        """Let other nodes ask."""
        for name, handler in self.handlers.items():
            calls.on_call(name, _of_peer(handler))

    def close(self) -> None:
        """The node stops."""
        for run in list(self._runs):
            self._end(run)

    # -- what is asked

    async def _open(self, asked: dict[str, Any]) -> bool:
        run = str(asked["run"])
        puppets = self._runs.setdefault(run, [])
        self._counts.setdefault(run, {event_name(event): {} for event in PROBED})
        if not self._hooks.wants_of(_OWNER):
            self._listen()
        self._rewind(run)
        for text in asked["jids"]:
            puppet = Puppet(parse(text), self._bind)
            puppets.append(puppet)
            await puppet.start()
        return True

    async def _chat(self, asked: dict[str, Any]) -> float:
        run = str(asked["run"])
        self._rewind(run)
        puppet = next((each for each in self._runs.get(run, ()) if each.jid.full == asked["from"]), None)
        if puppet is None:
            raise CommandError("its session is not here")
        return await puppet.chat(str(asked["to"]), str(asked["id"]))

    def _online(self, asked: dict[str, Any]) -> dict[str, Any]:
        rows = (row for row in self._table.all() if row.session is not None)
        jids = [row.jid.full for row in rows if not row.jid.local.startswith(PREFIX)]
        step = max(1, len(jids) // max(1, int(asked["limit"])))
        return {"count": len(jids), "jids": jids[::step][:MAX_SEEN]}

    def _seen(self, asked: dict[str, Any]) -> list[str]:
        jids = (parse(text) for text in islice(asked["jids"], MAX_SEEN))
        return [jid.full for jid in jids if jid.resource not in self._table.rows(jid.bare)]

    def _count(self, asked: dict[str, Any]) -> dict[str, dict[str, int]]:
        return self._counts.get(str(asked["run"]), {})

    def _close(self, asked: dict[str, Any]) -> bool:
        self._end(str(asked["run"]))
        return True

    # -- life

    def _rewind(self, run: str) -> None:
        timer = self._timers.pop(run, None)
        if timer is not None:
            timer.cancel()
        if run in self._runs:
            self._timers[run] = asyncio.get_running_loop().call_later(IDLE, self._end, run)

    def _end(self, run: str) -> None:
        for puppet in self._runs.pop(run, ()):
            puppet.end_session()
        self._counts.pop(run, None)
        self._rewind(run)
        if not self._runs:
            self._hooks.remove(_OWNER)

    def _listen(self) -> None:
        for event in PROBED:
            self._hooks.add(_OWNER, event, self._probe, optional=True, rank=-1)

    def _probe(self, event: StanzaSending | StanzaRouting | StanzaDelivering) -> None:
        id = event.stanza.id or ""
        if id.startswith(PREFIX):
            for run, counts in self._counts.items():
                if id.startswith(f"{run}-"):
                    times = counts[event_name(type(event))]
                    times[id] = times.get(id, 0) + 1


def _of_peer(handler: Callable[[Any], Any]) -> Callable[[Peer, Any], Any]:
    return lambda peer, asked: handler(asked)


def listening(hooks: Hooks) -> Iterator[tuple[str, list[str]]]:
    """(event, the modules that watch it) for the events that the probe counts."""
    for event in PROBED:
        yield event_name(event), [owner for owner in hooks.listeners(event) if owner != _OWNER]
