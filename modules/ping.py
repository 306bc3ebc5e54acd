"""Pings (XEP-0199): answers them, and asks clients that have been silent for long whether they are still there.

A client that moved to another network leaves a connection that looks alive. Without an answer it is ended, and what was
sent to it goes where it can arrive.
"""

import asyncio
import secrets
from dataclasses import dataclass
from typing import Annotated, Final, Literal

from xmppd.errors import StanzaError
from xmppd.module_api import Duration, IqRequest, Module, Session, iq, lasting
from xmppd.protocol import ns
from xmppd.protocol.stanza import build

_AT_ONCE: Final = 500  # sessions looked at before others have their turn
_PING: Final = f'<ping xmlns="{ns.PING}"/>'.encode()


@dataclass(frozen=True, slots=True)
class Config:
    send_pings: bool = True  # ask silent clients
    ping_interval: Annotated[Duration, lasting(1, 86400)] = 60.0  # seconds of silence before a ping
    ping_ack_timeout: Annotated[Duration, lasting(1, 3600)] = 32.0  # seconds for the answer, or any sign of life
    timeout_action: Literal["none", "kill"] = "kill"  # for those who give none


class Ping(Module[Config]):
    xeps = {199: "2.0.1"}
    features = (ns.PING,)
    account_features = (ns.PING,)

    async def start(self) -> None:
        if self.config.send_pings:
            self.spawn(self._watch(), name="silent clients")

    @iq("get", ns.PING, "ping", at="host")
    def ping_host(self, request: IqRequest) -> None:
        """An empty result."""

    @iq("get", ns.PING, "ping", at="account")
    def ping_account(self, request: IqRequest) -> None:
        """The same for one's own account (XEP-0199 4.2), in the words of a server that knows no such account for
        others: whether somebody exists is not to be found out by asking."""
        if not request.is_own:
            raise StanzaError("service-unavailable")

    async def _watch(self) -> None:
        pause = max(0.5, min(self.config.ping_interval, self.config.ping_ack_timeout) / 4)
        while True:
            await asyncio.sleep(pause)
            for number, session in enumerate(self.sessions.local(), 1):
                self._look_at(session)
                if number % _AT_ONCE == 0:
                    await asyncio.sleep(0)

    def _look_at(self, session: Session) -> None:
        silent = session.idle_seconds
        asked = session.state.get(self.name)
        if silent < self.config.ping_interval:
            if asked is not None:
                del session.state[self.name]
            return
        now = asyncio.get_running_loop().time()
        if not isinstance(asked, float):
            session.state[self.name] = now
            self._ask(session)
        elif now - asked >= self.config.ping_ack_timeout:
            del session.state[self.name]
            if self.config.timeout_action == "kill":
                self.log.info("client does not answer", jid=session.jid, silent_s=int(silent))
                session.unreachable()

    def _ask(self, session: Session) -> None:
        attrs = {
            "type": "get",
            "id": f"ping-{secrets.token_hex(6)}",
            "from": session.user.domain,
            "to": session.jid.full,
        }
        session.send(build("iq", attrs, _PING))
