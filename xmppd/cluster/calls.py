"""Questions and news between nodes: JSON payloads under a closed list of names.

Bodies of the frames (numbers are varints, JSON is UTF-8; `name` is its length and its bytes):

    CALL           id, name, JSON payload
    REPLY          id, status byte, rest:
                     0 ANSWER   JSON, whole or the last piece of it
                     1 PIECE    a piece of JSON; more follows
                     2 REFUSED  JSON [code, text]
                     3 MORE     from the asker: so many pieces have come so far (number)
    CAST           name, JSON payload
    BARRIER        id
    BARRIER_REPLY  id

A long answer is cut into pieces of PIECE_SIZE of which WINDOW are on their way at once, so that it neither fills the
link's queue nor holds up what others send meanwhile. A call or a cast is one frame, so casts keep their order.
"""

import asyncio
import inspect
import json
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Any, Final

from xmppd.cluster.frames import FrameError, read_varint, varint
from xmppd.cluster.interfaces import Kind, Links, Peer
from xmppd.errors import CallRefused, CommandError, NodeUnreachable
from xmppd.log import get_logger

PIECE_SIZE: Final = 128 * 1024  # bytes
WINDOW: Final = 8  # pieces
MAX_ANSWER: Final = 64 * 1024 * 1024  # bytes of JSON
MAX_PAYLOAD: Final = 4 * 1024 * 1024  # bytes of JSON of a call or a cast
MAX_RUNNING: Final = 512  # handlers of one node's calls that have not ended yet; a call beyond is refused

ANSWER, PIECE, REFUSED, MORE = range(4)

_log = get_logger("cluster")


class CallCounters:
    """What happened to calls and casts since the start."""

    __slots__ = ("answered", "calls", "casts", "failed", "malformed", "refused", "timeouts", "unknown")

    def __init__(self) -> None:
        self.calls = 0  # asked by us
        self.casts = 0  # sent by us, per node
        self.answered = 0  # asked by others, answered by us
        self.refused = 0  # asked by others, refused by us for any reason
        self.unknown = 0  # of a name we do not have: calls and casts of others
        self.malformed = 0  # frames that could not be read
        self.failed = 0  # handlers of ours that crashed
        self.timeouts = 0  # our own calls and barriers


class _Call:
    """One of our calls that waits for its answer."""

    __slots__ = ("answer", "count", "name", "node", "pieces", "size")

    def __init__(self, node: bytes, name: str, answer: "asyncio.Future[Any]") -> None:
        self.node = node
        self.name = name
        self.answer = answer
        self.pieces: list[bytes] = []
        self.count = 0
        self.size = 0


class _LongAnswer:
    """An answer of ours that does not fit one frame; `taken` pieces have come there."""

    __slots__ = ("data", "sent", "taken")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.sent = 0  # pieces
        self.taken = 0


class NodeCalls:
    """Calls, casts and barriers over the links (interfaces.Calls)."""

    def __init__(self, links: Links) -> None:
        self.counters = CallCounters()
        self._links = links
        self._on_call: dict[str, Callable[[Peer, Any], Awaitable[Any] | Any]] = {}
        self._on_cast: dict[str, Callable[[Peer, Any], None]] = {}
        self._last_id = 0
        self._calls: dict[int, _Call] = {}
        self._barriers: dict[int, tuple[bytes, asyncio.Future[None]]] = {}
        self._long: dict[tuple[bytes, int], _LongAnswer] = {}
        self._tasks: dict[asyncio.Task[None], bytes] = {}
        self._closed = False
        self._running: dict[bytes, int] = {}
        links.on(Kind.CALL, self._called)
        links.on(Kind.REPLY, self._replied)
        links.on(Kind.CAST, self._told)
        links.on(Kind.BARRIER, self._asked_barrier)
        links.on(Kind.BARRIER_REPLY, self._passed_barrier)
        links.on_down(self._down)

    def on_call(self, name: str, handler: Callable[[Peer, Any], Awaitable[Any] | Any]) -> None:
        """Who answers the calls of this name: a function or coroutine function whose result goes back as JSON. It
        refuses with CallRefused or CommandError; any other exception is logged and refused as a crash."""
        if name in self._on_call:
            raise ValueError(f"somebody answers {name} already")
        self._on_call[name] = handler

    def on_cast(self, name: str, handler: Callable[[Peer, Any], None]) -> None:
        """Who hears the casts of this name: a plain function; a crash is logged."""
        if name in self._on_cast:
            raise ValueError(f"somebody hears {name} already")
        self._on_cast[name] = handler

    def off(self, name: str) -> None:
        """Nobody answers or hears that name any more (a module was unloaded)."""
        self._on_call.pop(name, None)
        self._on_cast.pop(name, None)

    async def call(self, node: bytes, name: str, payload: Any, *, timeout: float = 5.0) -> Any:
        """The answer of that node. `timeout` in seconds; for a long answer it counts from one piece to the next.

        Raises NodeUnreachable when the node is or goes down or does not answer in time, CallRefused with the other
        side's text and code, ValueError or TypeError for a payload that is no JSON or longer than MAX_PAYLOAD.
        """
        data = _encode(payload, MAX_PAYLOAD)
        self._last_id += 1
        number, call = self._last_id, _Call(node, name, asyncio.get_running_loop().create_future())
        self.counters.calls += 1
        if not self._links.send(node, Kind.CALL, varint(number) + _name(name) + data):
            raise NodeUnreachable(f"{name}: that node is not up")
        self._calls[number] = call
        try:
            while True:
                count = call.count
                await asyncio.wait((call.answer,), timeout=timeout)
                if call.answer.done():
                    return call.answer.result()
                if call.count == count:
                    self.counters.timeouts += 1
                    raise NodeUnreachable(f"{name}: no answer within {timeout:g} s")
        finally:
            del self._calls[number]

    def cast(self, name: str, payload: Any, nodes: Iterable[bytes] | None = None) -> None:
        """Tell some nodes, or all that are up; in order with everything else on each link. Nodes that are not up are
        not told. Raises ValueError or TypeError for a payload that is no JSON or longer than MAX_PAYLOAD."""
        peers = self._links.peers
        if not peers:
            return
        body = _name(name) + _encode(payload, MAX_PAYLOAD)
        for node in peers if nodes is None else nodes:
            self.counters.casts += self._links.send(node, Kind.CAST, body)

    async def barrier(self, *, timeout: float = 5.0) -> None:
        """Wait until every peer that is up has seen all we sent so far and we have seen all it had sent by then.
        Peers that go down meanwhile, or do not answer in time (seconds), are not waited for."""
        loop = asyncio.get_running_loop()
        waiting: dict[int, asyncio.Future[None]] = {}
        for node in self._links.peers:
            self._last_id += 1
            if self._links.send(node, Kind.BARRIER, varint(self._last_id)):
                passed = waiting[self._last_id] = loop.create_future()
                self._barriers[self._last_id] = (node, passed)
        if not waiting:
            return
        try:
            _, late = await asyncio.wait(waiting.values(), timeout=timeout)
            self.counters.timeouts += len(late)
        finally:
            for number in waiting:
                self._barriers.pop(number, None)

    async def close(self) -> None:
        """End the handlers that still run; calls that wait fail, and new ones are not heard."""
        self._closed = True
        for call in self._calls.values():
            _fail(call.answer, NodeUnreachable(f"{call.name}: this node stops"))
        for _, passed in self._barriers.values():
            _finish(passed)
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # What others ask of us

    def _called(self, peer: Peer, body: bytes) -> None:
        if self._closed:
            return
        try:
            number, at = read_varint(body, 0)
        except FrameError:
            self.counters.malformed += 1
            return
        try:
            name, payload = _decode(body, at)
        except FrameError as exc:
            self.counters.malformed += 1
            return self._refuse(peer.node, number, 1, str(exc))
        handler = self._on_call.get(name)
        if handler is None:
            self.counters.unknown += 1
            return self._refuse(peer.node, number, 1, f"unknown call {name}")
        if self._running.get(peer.node, 0) >= MAX_RUNNING:
            return self._refuse(peer.node, number, 1, f"{name}: too many calls at once")
        try:
            answer = handler(peer, payload)
        except Exception as exc:
            return self._crashed(peer.node, number, name, exc)
        if not inspect.isawaitable(answer):
            return self._answer(peer.node, number, name, answer)
        task = asyncio.ensure_future(self._await(peer.node, number, name, answer))
        task.set_name(f"call {name}")
        self._running[peer.node] = self._running.get(peer.node, 0) + 1
        self._tasks[task] = peer.node
        task.add_done_callback(partial(self._ended, answer))

    async def _await(self, node: bytes, number: int, name: str, answer: Awaitable[Any]) -> None:
        try:
            result = await answer
        except Exception as exc:
            self._crashed(node, number, name, exc)
        else:
            self._answer(node, number, name, result)

    def _ended(self, answer: Awaitable[Any], task: "asyncio.Task[None]") -> None:
        if inspect.iscoroutine(answer):
            answer.close()  # of a task that was cancelled before it began
        node = self._tasks.pop(task)
        self._running[node] -= 1
        if not self._running[node]:
            del self._running[node]

    def _crashed(self, node: bytes, number: int, name: str, exc: Exception) -> None:
        if isinstance(exc, CallRefused | CommandError):
            return self._refuse(node, number, exc.code, exc.text)
        self.counters.failed += 1
        _log.error("call failed", exc=exc, name=name)
        self._refuse(node, number, 1, f"{name} failed there: {type(exc).__name__}: {exc}")

    def _refuse(self, node: bytes, number: int, code: int, text: str) -> None:
        self.counters.refused += 1
        self._links.send(node, Kind.REPLY, varint(number) + bytes((REFUSED,)) + _encode([code, text], MAX_PAYLOAD))

    def _answer(self, node: bytes, number: int, name: str, result: Any) -> None:
        try:
            data = _encode(result, MAX_ANSWER)
        except (TypeError, ValueError) as exc:
            return self._crashed(node, number, name, exc)
        self.counters.answered += 1
        if len(data) <= PIECE_SIZE:
            self._links.send(node, Kind.REPLY, varint(number) + bytes((ANSWER,)) + data)
            return
        long = self._long[node, number] = _LongAnswer(data)
        self._go_on(node, number, long)

    def _go_on(self, node: bytes, number: int, long: _LongAnswer) -> None:
        while long.sent - long.taken < WINDOW:
            start = long.sent * PIECE_SIZE
            last = start + PIECE_SIZE >= len(long.data)
            head = varint(number) + bytes((ANSWER if last else PIECE,))
            sent = self._links.send(node, Kind.REPLY, head + long.data[start : start + PIECE_SIZE])
            if last or not sent:
                del self._long[node, number]
                return
            long.sent += 1

    # What they answer

    def _replied(self, peer: Peer, body: bytes) -> None:
        try:
            number, at = read_varint(body, 0)
            status = body[at]
            if status == MORE:
                taken, _ = read_varint(body, at + 1)
        except (FrameError, IndexError):
            self.counters.malformed += 1
            return
        if status == MORE:
            long = self._long.get((peer.node, number))
            if long is not None and long.taken < taken <= long.sent:
                long.taken = taken
                self._go_on(peer.node, number, long)
            return
        call = self._calls.get(number)
        if call is None or call.node != peer.node or call.answer.done():
            return  # too late: nobody waits any more; without MORE a long answer ends by itself
        if status == PIECE:
            self._take_piece(number, call, body[at + 1 :])
        elif status == ANSWER:
            call.pieces.append(body[at + 1 :])
            self._finish_call(call)
        elif status == REFUSED:
            self._refused(call, body[at + 1 :])
        else:
            self.counters.malformed += 1

    def _take_piece(self, number: int, call: _Call, piece: bytes) -> None:
        call.pieces.append(piece)
        call.count += 1
        call.size += len(piece)
        if call.size > MAX_ANSWER:
            call.pieces.clear()
            _fail(call.answer, CallRefused(f"{call.name}: the answer is longer than {MAX_ANSWER} bytes"))
        elif call.count % (WINDOW // 2) == 0:
            self._links.send(call.node, Kind.REPLY, varint(number) + bytes((MORE,)) + varint(call.count))

    def _finish_call(self, call: _Call) -> None:
        try:
            call.answer.set_result(json.loads(b"".join(call.pieces)))
        except (ValueError, RecursionError):
            self.counters.malformed += 1
            call.answer.set_exception(CallRefused(f"{call.name}: the answer cannot be read"))
        call.pieces.clear()

    def _refused(self, call: _Call, rest: bytes) -> None:
        try:
            code, text = json.loads(rest)
            refused = CallRefused(str(text), int(code))
        except (ValueError, TypeError, RecursionError):
            self.counters.malformed += 1
            refused = CallRefused(f"{call.name}: refused")
        call.answer.set_exception(refused)

    def _told(self, peer: Peer, body: bytes) -> None:
        try:
            name, payload = _decode(body, 0)
        except FrameError:
            self.counters.malformed += 1
            return
        handler = self._on_cast.get(name)
        if handler is None:  # a newer node has news we know nothing of
            self.counters.unknown += 1
            _log.debug("unknown cast", name=name, node=peer.name)
            return
        try:
            handler(peer, payload)
        except Exception as exc:
            self.counters.failed += 1
            _log.error("cast failed", exc=exc, name=name)

    # Barriers, and links that go down

    def _asked_barrier(self, peer: Peer, body: bytes) -> None:
        self._links.send(peer.node, Kind.BARRIER_REPLY, body)

    def _passed_barrier(self, peer: Peer, body: bytes) -> None:
        try:
            number, _ = read_varint(body, 0)
        except FrameError:
            self.counters.malformed += 1
            return
        node, passed = self._barriers.get(number, (b"", None))
        if passed is not None and node == peer.node:
            _finish(passed)

    def _down(self, peer: Peer, reason: str) -> None:
        for call in self._calls.values():
            if call.node == peer.node:
                _fail(call.answer, NodeUnreachable(f"{call.name}: {peer.name} went down: {reason}"))
        for node, passed in self._barriers.values():
            if node == peer.node:
                _finish(passed)
        for key in [key for key in self._long if key[0] == peer.node]:
            del self._long[key]


def _finish(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


def _fail(future: "asyncio.Future[Any]", exc: Exception) -> None:
    if not future.done():
        future.set_exception(exc)


def _name(name: str) -> bytes:
    data = name.encode()
    return varint(len(data)) + data


def _encode(payload: Any, limit: int) -> bytes:
    # a lone surrogate, which JSON can say and UTF-8 cannot, becomes JSON's own escape for it
    text = json.dumps(payload, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    data = text.encode("utf-8", "backslashreplace")
    if len(data) > limit:
        raise ValueError(f"{len(data)} bytes of JSON are more than {limit}")
    return data


def _decode(body: bytes, at: int) -> tuple[str, Any]:
    """Name and payload of a call or cast."""
    length, at = read_varint(body, at)
    end = at + length
    if end > len(body):
        raise FrameError("a name is cut off")
    try:
        return body[at:end].decode(), json.loads(body[end:])
    except (ValueError, RecursionError) as exc:
        raise FrameError("neither name nor payload can be read") from exc
