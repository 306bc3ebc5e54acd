"""The router: by destination domain, over the global route table; no route means the s2s manager.

Nothing that happens to one stanza may reach another: `route` never raises. The stream that sent the stanza gets the
outcome (delivery.py), the sender the error, if there is one.
"""

from collections.abc import Callable
from typing import Protocol

from xmppd.cluster.tables import RouteTable
from xmppd.delivery import ERROR, SAFE, Gate, Outcome, as_stanza_error
from xmppd.errors import StanzaError
from xmppd.events import StanzaBounced, StanzaRouting
from xmppd.hooks import Hooks, Spawn
from xmppd.metrics import Counters, add
from xmppd.protocol.stanza import Stanza, error_reply


class ToOtherServers(Protocol):
    """The s2s manager as the router sees it."""

    def route(self, stanza: Stanza) -> Outcome: ...


class Router:
    """Decides by domain. One per node."""

    def __init__(self, routes: RouteTable, hooks: Hooks, spawn: Spawn, counters: Counters | None = None) -> None:
        self._routes = routes
        self._errors = (counters or Counters()).stanza_errors
        self._hooks = hooks
        self._gate = Gate(hooks, spawn, self.bounce)
        self._s2s: ToOtherServers | None = None
        self._give_back: Callable[[Stanza], object] = lambda stanza: None

    def connect(self, s2s: ToOtherServers) -> None:
        """Hand in the s2s manager."""
        self._s2s = s2s

    def on_kept(self, give_back: Callable[[Stanza], object]) -> None:
        """Hand in what becomes of a row of the spool that cannot be delivered now."""
        self._give_back = give_back

    def route(self, stanza: Stanza) -> Outcome:
        """Send a stanza, which must have a `to`, on its way; what became of it comes back."""
        try:
            if self._hooks.wants(StanzaRouting):
                return self._gate.ask(StanzaRouting(stanza), stanza, lambda event: self._forward(event.stanza))
            return self._forward(stanza)
        except Exception as exc:
            return self.bounce(stanza, as_stanza_error(exc))

    def bounce(self, stanza: Stanza, error: StanzaError) -> Outcome:
        """Tell the sender, unless no error may be sent for this stanza (requirements R-1), or they were told long ago
        that it is safe: then it waits for another occasion."""
        if stanza.kept:
            self._give_back(stanza)
            return SAFE
        reply = error_reply(stanza, error)
        if reply is None or reply.to is None:
            return SAFE
        add(self._errors, error.condition)
        if self._hooks.wants(StanzaBounced):
            self._hooks.notify(StanzaBounced(stanza, error))
        self.route(reply)
        return ERROR

    def _forward(self, stanza: Stanza) -> Outcome:
        assert stanza.to is not None
        deliver = self._routes.local(stanza.to.domain)
        if deliver is not None:
            outcome: Outcome = deliver(stanza)
            return outcome
        assert self._s2s is not None
        return self._s2s.route(stanza)
