"""The bus that calls the handlers of events (events.py).

Watchers look at what happened (`notify`); deciders may change or end what is about to happen (`decide`). The order is
said in words ("after these modules") and sorted once, when a handler is added. An event nobody listens to costs one
dict look-up: `if hooks.wants(MessageRouting): ...`.
"""

from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from inspect import iscoroutinefunction
from types import CoroutineType
from typing import Any, Protocol, TypeVar, cast

from xmppd.errors import ConfigError, StanzaError, StorageError
from xmppd.events import Handled
from xmppd.log import get_logger

_log = get_logger("xmppd.hooks")
E = TypeVar("E")


class Spawn(Protocol):
    """Runs a coroutine as a task that somebody owns; a crash is logged."""

    def __call__(self, coroutine: Coroutine[Any, Any, None], *, name: str) -> object: ...


@dataclass(frozen=True, slots=True)
class Handler:
    """One registered handler."""

    owner: str  # the module's name
    call: Callable[[Any], Any]
    after: tuple[str, ...]  # modules whose handlers of the same event come first
    optional: bool  # its crash does not end the stanza
    is_async: bool
    rank: int  # among handlers that say nothing about each other


class Hooks:
    """All handlers, by event class."""

    def __init__(self) -> None:
        self._handlers: dict[type, list[Handler]] = {}

    def add(
        self,
        owner: str,
        event: type,
        call: Callable[[Any], Any],
        *,
        after: Sequence[str] = (),
        optional: bool = False,
        rank: int = 0,
    ) -> None:
        """Register a handler; ConfigError when the order asked for is a circle. Where `after` says nothing the order is
        that of `rank`, then that of the calls."""
        handler = Handler(owner, call, tuple(after), optional, iscoroutinefunction(call), rank)
        self._handlers[event] = _sorted(event, [*self._handlers.get(event, ()), handler])

    def remove(self, owner: str, event: type | None = None) -> None:
        """Forget every handler of a module, or those of one event."""
        for each in [each for each in self._handlers if event is None or each is event]:
            left = [handler for handler in self._handlers[each] if handler.owner != owner]
            if left:
                self._handlers[each] = left
            else:
                del self._handlers[each]

    def wants(self, event: type) -> bool:
        """Whether anybody listens."""
        return event in self._handlers

    def wants_of(self, owner: str) -> bool:
        """Whether this module listens to anything."""
        return any(handler.owner == owner for handlers in self._handlers.values() for handler in handlers)

    def listeners(self, event: type) -> list[str]:
        """The modules that listen to an event, in the order in which they are asked."""
        return [handler.owner for handler in self._handlers.get(event, ())]

    def count(self) -> int:
        """How many handlers are registered in all."""
        return sum(len(handlers) for handlers in self._handlers.values())

    def owners(self) -> Counter[str]:
        """How many handlers each module has."""
        return Counter(handler.owner for handlers in self._handlers.values() for handler in handlers)

    def notify(self, event: object) -> Coroutine[Any, Any, None] | None:
        """Tell the watchers. Those that are plain functions have run when this returns; if there are coroutines among
        them, the awaitable that comes back runs the rest in order, and the caller must await it."""
        handlers = self._handlers.get(type(event))
        return None if handlers is None else _tell(event, iter(handlers))

    def notify_aside(self, event: object, spawn: Spawn, *, name: str) -> None:
        """The same for a caller who cannot wait: the rest runs in a task of that name."""
        rest = self.notify(event)
        if rest is not None:
            spawn(rest, name=name)

    def decide(self, event: E) -> E | Handled | Awaitable[E | Handled]:
        """Ask the deciders: the event as they leave it, HANDLED when one of them took it over, or an awaitable of
        either when a coroutine is among them. Raises StanzaError when a handler refuses or crashes."""
        handlers = self._handlers.get(type(event))
        return event if handlers is None else _ask(event, iter(handlers))


def _tell(event: object, handlers: Iterator[Handler]) -> Coroutine[Any, Any, None] | None:
    """Up to the first coroutine; the awaitable is that one and all behind it."""
    for handler in handlers:
        try:
            result = handler.call(event)
        except Exception as exc:
            _log_crash(handler, event, exc)
            continue
        if handler.is_async:
            return _tell_on(event, handler, result, handlers)
    return None


async def _tell_on(event: object, handler: Handler, told: Awaitable[None], behind: Iterator[Handler]) -> None:
    try:
        await told
    except Exception as exc:
        _log_crash(handler, event, exc)
    rest = _tell(event, behind)
    if rest is not None:
        await rest


def _ask(event: E, handlers: Iterator[Handler]) -> E | Handled | Awaitable[E | Handled]:
    """The same for deciders."""
    for handler in handlers:
        try:
            result = handler.call(event)
        except Exception as exc:
            _refuse(handler, event, exc)
            continue
        if handler.is_async:
            return _ask_on(event, handler, result, handlers)
        if result is not None:
            if isinstance(result, Handled):
                return result
            event = result
    return event


async def _ask_on(
    event: E, handler: Handler, answer: Awaitable[E | Handled | None], behind: Iterator[Handler]
) -> E | Handled:
    try:
        result = await answer
    except Exception as exc:
        _refuse(handler, event, exc)
        result = None
    if isinstance(result, Handled):
        return result
    rest = _ask(event if result is None else result, behind)
    return await rest if isinstance(rest, CoroutineType) else cast("E | Handled", rest)


def _sorted(event: type, handlers: list[Handler]) -> list[Handler]:
    """The handlers, everybody behind those they want to come after; else by rank, then as they were added."""
    graph: dict[int, list[int]] = {
        index: [other for other, candidate in enumerate(handlers) if candidate.owner in handler.after]
        for index, handler in enumerate(handlers)
    }
    sorter = TopologicalSorter(graph)
    try:
        sorter.prepare()
    except CycleError as exc:
        owners = ", ".join(handlers[index].owner for index in exc.args[1])
        raise ConfigError([f"the handlers of {event_name(event)} cannot be ordered: {owners} form a circle"]) from exc
    ordered: list[Handler] = []
    while sorter.is_active():
        ready = sorted(sorter.get_ready(), key=lambda index: (handlers[index].rank, index))
        ordered += [handlers[index] for index in ready]
        sorter.done(*ready)
    return ordered


def _refuse(handler: Handler, event: object, exc: Exception) -> None:
    """A decider raised: blocking must fail closed, so the stanza ends here unless the handler is optional."""
    if isinstance(exc, StanzaError | StorageError):
        raise exc
    _log_crash(handler, event, exc)
    if not handler.optional:
        raise StanzaError("internal-server-error") from exc


def _log_crash(handler: Handler, event: object, exc: Exception) -> None:
    if isinstance(exc, StorageError):
        # Trouble with the database is the operator's, not a bug; the storage room has logged it.
        _log.warning("hook could not store", module=handler.owner, event=event_name(type(event)), error=exc)
        return
    _log.error("hook failed", module=handler.owner, event=event_name(type(event)), exc=exc)


def event_name(event: type) -> str:
    """`MessageUndeliverable` as logs and metrics call it: message_undeliverable."""
    name = event.__name__
    return "".join(f"_{char.lower()}" if char.isupper() and index else char.lower() for index, char in enumerate(name))
