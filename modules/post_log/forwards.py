"""Messages forwarded (XEP-0297) to a JID: a service, or a user, that logs."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

from xmppd.errors import JidError
from xmppd.module_api import DONE, SAFE, Answer, Event, Outcome, Pending, PostedMessage, timestamp
from xmppd.protocol import ns
from xmppd.protocol.jid import parse
from xmppd.protocol.stanza import Stanza, build, delay_element

_PATIENCE: Final = 30.0  # seconds until what nobody has confirmed is sent again
_STORE: Final = f"<store xmlns='{ns.HINTS}'/>".encode()  # who logs may be away


def forward(message: PostedMessage, *, to: str, id: str, host: str) -> bytes:
    """The stanza that brings a message to who logs it. `id` makes a repetition known."""
    stanza = message.stanza
    if stanza.from_ is None or stanza.to is None:
        stanza = stanza.replace(from_=message.from_, to=message.to)
    delay = delay_element(timestamp(message.at, "T"), host)
    inner = stanza.xml.replace(b"<message", f"<message xmlns='{ns.CLIENT}'".encode(), 1)
    forwarded = f"<forwarded xmlns='{ns.FORWARD}'>".encode() + delay + inner + b"</forwarded>"
    return build("message", {"from": host, "to": to, "id": id}, forwarded + _STORE).xml


def is_forward(stanza: Stanza, hosts: tuple[str, ...]) -> bool:
    """Whether it is one of those that are made here: to log them too would never end."""
    return stanza.from_ is not None and stanza.from_.full in hosts and stanza.child(ns.FORWARD, "forwarded") is not None


def wrong_with_jid(text: str) -> str:
    """What is wrong with an address, or nothing."""
    try:
        parse(text)
    except JidError as exc:
        return str(exc)
    return ""


class Forwards:
    """A sink: an event is done when its stanza is safe, as that of a user would be."""

    def __init__(self, route: Callable[[Stanza], Outcome]) -> None:
        self._route = route

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def send(self, events: Sequence[Event]) -> Answer:
        """Where one of them is not taken, all are sent again: who logs them knows their ids."""
        try:
            async with asyncio.timeout(_PATIENCE):
                outcomes = [await self._sent(event) for event in events]
                taken = [await _settled(outcome) for outcome in outcomes]
        except TimeoutError:
            return Answer("retry", "nobody has confirmed it in time")
        return DONE if all(taken) else Answer("retry", "the recipient does not take it")

    async def _sent(self, event: Event) -> Outcome:
        """The next one is sent when this one is on its way, so that they stay in order."""
        outcome = self._route(Stanza.from_bytes(event.payload))
        if isinstance(outcome, Pending) and not outcome.decided:
            decided = asyncio.Event()
            outcome.when_decided(decided.set)
            await decided.wait()
        return outcome


async def _settled(outcome: Outcome) -> bool:
    """Whether it is safe."""
    if isinstance(outcome, Pending):
        settled = asyncio.Event()
        outcome.then(lambda _: settled.set())
        await settled.wait()
        return outcome.result is SAFE
    return outcome is SAFE
