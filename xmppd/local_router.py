"""The local router: stanzas for our own hosts. A user part means the session manager, else it goes by content.

The rules are requirements L-1 to L-8.
"""

from typing import Protocol

from xmppd.delivery import SAFE, Gate, Outcome
from xmppd.errors import StanzaError
from xmppd.events import HostStanzaReceiving
from xmppd.iq import IqDispatcher
from xmppd.protocol.stanza import Stanza


class ToUsers(Protocol):
    """The session manager as the local router sees it."""

    def route(self, stanza: Stanza) -> Outcome: ...


class LocalRouter:
    """Decides by content for the hosts this cluster serves."""

    def __init__(self, users: ToUsers, iqs: IqDispatcher, gate: Gate) -> None:
        self._users = users
        self._iqs = iqs
        self._gate = gate

    def route(self, stanza: Stanza) -> Outcome:
        """Route a stanza whose domain is ours. Raises StanzaError."""
        to = stanza.to
        assert to is not None
        if to.local:
            return self._users.route(stanza)
        if to.resource:
            return self._unknown(stanza)
        if stanza.kind == "iq":
            return self._iqs.dispatch("host", stanza) if stanza.type in ("get", "set") else SAFE
        if stanza.kind == "presence" or stanza.type == "headline":
            return SAFE
        return self._unknown(stanza)

    def _unknown(self, stanza: Stanza) -> Outcome:
        assert stanza.to is not None
        return self._gate.ask(HostStanzaReceiving(stanza.to.domain, stanza), stanza, _not_found)


def _not_found(event: HostStanzaReceiving) -> Outcome:
    raise StanzaError("item-not-found")
