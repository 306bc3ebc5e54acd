"""IQ handlers (RFC 6120 8.2.3): who answers which payload, for accounts and for the hosts themselves."""

from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from inspect import isawaitable
from typing import Final, Literal, Protocol

from lxml.etree import QName, _Element

from xmppd.delivery import SAFE, Bounce, Gate, Outcome
from xmppd.errors import StanzaError
from xmppd.protocol.jid import JID
from xmppd.protocol.stanza import Stanza, iq_result

Target = Literal["account", "host"]


class NoReply:
    """A handler returns NO_REPLY when it has sent, or will send, the answer itself."""


NO_REPLY: Final = NoReply()


@dataclass(frozen=True, slots=True)
class IqRequest:
    """An IQ get or set as a handler sees it."""

    stanza: Stanza
    payload: _Element  # the one child
    sender: JID  # full JID of the asker
    target: JID  # the account (bare) or host that was asked
    is_own: bool  # an account asks its own server-side data

    @property
    def type(self) -> str:
        return self.stanza.type


Reply = bytes | _Element | Stanza | NoReply | None
Handler = Callable[[IqRequest], Reply | Awaitable[Reply]]


class Send(Protocol):
    """Routes a stanza of the server's own."""

    def __call__(self, stanza: Stanza) -> Outcome: ...


class IqHandlers:
    """The registered handlers: (target, type, namespace, element name or "") -> handler."""

    def __init__(self) -> None:
        self._handlers: dict[tuple[str, str, str, str], tuple[str, Handler, bool]] = {}

    def add(
        self,
        owner: str,
        target: Target,
        type: str,
        namespace: str,
        name: str,
        handler: Handler,
        *,
        anonymous: bool = False,
    ) -> None:
        """Register; ValueError when another module answers the same already. `name` "" means any element.

        What is set for an account is usually kept, so anonymous accounts, of which nothing may be kept, are refused
        unless the handler says `anonymous`: what it changes ends with the session."""
        key = (target, type, namespace, name)
        if key in self._handlers:
            raise ValueError(f"{self._handlers[key][0]} already answers {type} {namespace} for {target}s")
        self._handlers[key] = (owner, handler, anonymous or type == "get" or target == "host")

    def remove(self, owner: str) -> None:
        """Forget every handler of a module."""
        self._handlers = {key: value for key, value in self._handlers.items() if value[0] != owner}

    def count(self) -> int:
        return len(self._handlers)

    def owners(self) -> Counter[str]:
        """How many handlers each module has."""
        return Counter(owner for owner, _, _ in self._handlers.values())

    def find(self, target: Target, type: str, payload: _Element, *, anonymous: bool = False) -> Handler | None:
        """The handler for a payload, if there is one; StanzaError not-allowed if it is not for anonymous ones."""
        name = QName(payload)
        namespace = name.namespace or ""
        found = self._handlers.get((target, type, namespace, name.localname)) or self._handlers.get(
            (target, type, namespace, "")
        )
        if found is None:
            return None
        _, handler, for_anonymous = found
        if anonymous and not for_anonymous:
            raise StanzaError("not-allowed", "nothing is kept for an anonymous account")
        return handler


class IqDispatcher:
    """Runs handlers and sends what they answer. The stream that asked waits for a handler that is a coroutine."""

    def __init__(self, handlers: IqHandlers, *, send: Send, bounce: Bounce, gate: Gate) -> None:
        self._handlers = handlers
        self._send = send
        self._bounce = bounce
        self._gate = gate

    def dispatch(self, target: Target, stanza: Stanza, *, anonymous: bool = False) -> Outcome:
        """Answer a get or set for an account, which may be an anonymous one, or a host (requirements L-2 to L-4)."""
        assert stanza.to is not None
        assert stanza.from_ is not None
        payload = stanza.payload
        if payload is None:
            raise StanzaError("bad-request", "an IQ request has exactly one child element")
        handler = self._handlers.find(target, stanza.type, payload, anonymous=anonymous)
        if handler is None:
            raise StanzaError("service-unavailable")
        own = stanza.from_.bare == stanza.to.bare
        reply = handler(IqRequest(stanza, payload, stanza.from_, stanza.to, own))
        if isawaitable(reply):
            return self._gate.wait(stanza, self._later(stanza, reply))
        return self._answer(stanza, reply)

    async def _later(self, stanza: Stanza, reply: Awaitable[Reply]) -> Outcome:
        return self._answer(stanza, await reply)

    def _answer(self, stanza: Stanza, reply: Reply) -> Outcome:
        if not isinstance(reply, NoReply):
            self._send(reply if isinstance(reply, Stanza) else iq_result(stanza, reply))
        return SAFE
