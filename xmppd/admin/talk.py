"""A command on another node: its output comes back as lines of text, in pieces, for as long as it takes.

    talk.begin {"request": {...}, "caller": name, "rows": bool}  → {"id": n, "text": "...", "end": bool}
    talk.more  {"id": n}                                         → the same
    talk.quit  {"id": n}                                           nobody wants the rest (a cast)

`text` is a piece of a sequence of lines and may end in the middle of one. A question is answered within POLL seconds,
with an empty piece where nothing has been said since: so the asker knows a node that works from one that hangs, and a
long list leaves in pieces which the asker takes at its own pace. With `rows` the lines are those of wire.py, else the
frames of the control socket.
"""

import asyncio
import json
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, Final, Protocol

from xmppd.admin import request, wire
from xmppd.admin.registry import Call, Caller, Registry
from xmppd.cluster.interfaces import Calls, Peer
from xmppd.errors import CommandError, NodeUnreachable

POLL: Final = 2.0  # seconds
ANSWERS_WITHIN: Final = 5.0  # seconds: what the network and a busy node may add to POLL are in it
ABANDONED: Final = 20.0  # seconds without a question: whoever asked is gone
MAX_TALKS: Final = 256  # of all peers; more are refused
PIECE: Final = 64 * 1024  # characters
_WIDE_PIECE: Final = 16 * 1024  # where they may take several bytes each
_WAITING: Final = 256 * 1024  # characters said and not yet taken, until whoever says more has to wait

_BEGIN, _MORE, _QUIT = "talk.begin", "talk.more", "talk.quit"


class Gone(Exception):
    """Whoever asked does not listen any more."""


class Spawn(Protocol):
    def __call__(self, coroutine: Coroutine[Any, Any, None], *, name: str) -> "asyncio.Task[None]": ...


class _Talk:
    """The speaking side of one."""

    def __init__(self, peer: Peer, id: int) -> None:
        self.peer, self.id = peer, id
        self.left: asyncio.TimerHandle | None = None
        self._said: deque[str] = deque()
        self._size = 0
        self._ended = self._quit = False
        self._changed = asyncio.Event()

    async def say(self, text: str) -> None:
        """Wait where too much waits to be taken; Gone."""
        while self._size > _WAITING and not self._quit:
            self._changed.clear()
            await self._changed.wait()
        if self._quit:
            raise Gone
        self._said.append(text)
        self._size += len(text)
        self._changed.set()

    def end(self) -> None:
        self._ended = True
        self._changed.set()

    def quit(self) -> None:
        self._quit = True
        self._changed.set()

    async def piece(self) -> dict[str, Any]:
        """What is there, after POLL seconds at the latest."""
        if not self._said and not self._ended:
            try:
                async with asyncio.timeout(POLL):
                    while not self._said and not self._ended and not self._quit:
                        self._changed.clear()
                        await self._changed.wait()
            except TimeoutError:
                pass
        text = self._take()
        return {"id": self.id, "text": text, "end": self._ended and not self._said}

    def _take(self) -> str:
        taken: list[str] = []
        size, limit = 0, PIECE
        while self._said and size < limit:
            text = self._said.popleft()
            if not text.isascii():
                limit = _WIDE_PIECE
            room = max(0, limit - size)
            if len(text) > room:
                self._said.appendleft(text[room:])
                text = text[:room]
            taken.append(text)
            size += len(text)
        self._size -= size
        self._changed.set()
        return "".join(taken)


class Speaker:
    """Carries out what other nodes ask for."""

    def __init__(self, registry: Registry, calls: Calls, spawn: Spawn) -> None:
        self._registry = registry
        self._spawn = spawn
        self.talks: dict[tuple[bytes, int], _Talk] = {}
        self._last = 0
        calls.on_call(_BEGIN, self._begin)
        calls.on_call(_MORE, self._more)
        calls.on_cast(_QUIT, self._quit)

    async def _begin(self, peer: Peer, asked: Any) -> dict[str, Any]:
        if len(self.talks) >= MAX_TALKS:
            raise CommandError("too many commands of other nodes are carried out here already")
        self._last += 1
        talk = _Talk(peer, self._last)
        self.talks[peer.node, talk.id] = talk
        self._rewind(talk)
        work = self._rows if asked["rows"] else self._frames
        self._spawn(self._carry_out(work, talk, asked), name="command of another node")
        return await self._answer(talk)

    async def _more(self, peer: Peer, asked: Any) -> dict[str, Any]:
        talk = self.talks.get((peer.node, asked["id"]))
        if talk is None:
            raise CommandError("the command was given up: nobody had asked for its answer for too long")
        self._rewind(talk)
        return await self._answer(talk)

    async def _answer(self, talk: _Talk) -> dict[str, Any]:
        piece = await talk.piece()
        if piece["end"]:
            self._forget(talk)
        return piece

    def _quit(self, peer: Peer, asked: Any) -> None:
        talk = self.talks.get((peer.node, asked["id"]))
        if talk is not None:
            self._forget(talk)

    def _rewind(self, talk: _Talk) -> None:
        if talk.left is not None:
            talk.left.cancel()
        talk.left = asyncio.get_running_loop().call_later(ABANDONED, self._forget, talk)

    def _forget(self, talk: _Talk) -> None:
        if talk.left is not None:
            talk.left.cancel()
        self.talks.pop((talk.peer.node, talk.id), None)
        talk.quit()

    async def _carry_out(
        self, work: Callable[[_Talk, dict[str, Any], Caller], Coroutine[Any, Any, None]], talk: _Talk, asked: Any
    ) -> None:
        """What was begun goes on to its end, heard or not; only what has no end of its own stops with the listener."""
        try:
            await work(talk, asked["request"], Caller("node", f"{talk.peer.name} {asked['caller']}"))
        except Gone:
            pass
        finally:
            talk.end()

    async def _rows(self, talk: _Talk, asked: dict[str, Any], caller: Caller) -> None:
        try:
            call = Call(caller, local=True)
            result = await self._registry.call(asked["command"], asked["args"], caller=caller, call=call)
            for line in wire.lines_of(result):
                await talk.say(line)
        except CommandError as exc:
            await talk.say(wire.refusal(exc))

    async def _frames(self, talk: _Talk, asked: dict[str, Any], caller: Caller) -> None:
        async def send(frame: request.Frame) -> None:
            await talk.say(wire.line(frame))

        async def ask(name: str) -> str | None:
            await talk.say(wire.line({"need": name}))
            raise Gone  # it is begun again with the secret

        await request.answer(self._registry, asked, caller, send, ask)


async def listen(
    calls: Calls, node: bytes, asked: dict[str, Any], caller: Caller, *, rows: bool, timeout: float | None = None
) -> AsyncGenerator[str, None]:
    """The lines that `node` answers to a request, as they come. Raises NodeUnreachable, also when it takes longer than
    `timeout` seconds in all, and CallRefused."""
    loop = asyncio.get_running_loop()
    until = None if timeout is None else loop.time() + timeout
    begin = {"request": asked, "caller": f"{caller.via} {caller.name}", "rows": rows}
    piece = await calls.call(node, _BEGIN, begin, timeout=ANSWERS_WITHIN)
    rest = ""
    ended = False
    try:
        while True:
            *lines, rest = (rest + piece["text"]).split("\n")
            for line in lines:
                yield line
            if ended := bool(piece["end"]):
                return
            if until is not None and loop.time() > until:
                raise NodeUnreachable(f"not done within {timeout:g} s")
            if not lines and not piece["text"]:
                yield ""  # nothing was said for POLL seconds
            piece = await calls.call(node, _MORE, {"id": piece["id"]}, timeout=ANSWERS_WITHIN)
    finally:
        if not ended:
            calls.cast(_QUIT, {"id": piece["id"]}, [node])


def frame_of(line: str) -> request.Frame | None:
    """A line of frames; None for a sign of life."""
    if not line:
        return None
    frame = json.loads(line)
    return frame if isinstance(frame, dict) else None
