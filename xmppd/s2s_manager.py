"""The s2s manager: stanzas for other servers. Federation is not there yet, so no other server can be found."""

from xmppd.delivery import Bounce, Outcome
from xmppd.errors import StanzaError
from xmppd.protocol.stanza import Stanza


class S2SManager:
    """Answers for every domain that is not ours, behind the interface that federation fills."""

    def __init__(self, bounce: Bounce) -> None:
        self._bounce = bounce

    def route(self, stanza: Stanza) -> Outcome:
        """Send a stanza to another server; until there is federation, its sender gets `remote-server-not-found`."""
        assert stanza.to is not None
        return self._bounce(stanza, StanzaError("remote-server-not-found", f"no route to {stanza.to.domain}"))
