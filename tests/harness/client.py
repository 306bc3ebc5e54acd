"""A client as people use it: slixmpp, over real TLS, the server's certificate verified."""

import asyncio
import contextlib
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import slixmpp

from tests.harness.inbox import PATIENCE, Inbox


class LoginFailed(AssertionError):
    pass


class Client(Inbox):
    """All that comes once the session is bound goes to the inbox; slixmpp sees it, too, and answers requests."""

    def __init__(self, jid: str, password: str, certificate: Path, *, mechanism: str | None = None) -> None:
        super().__init__()
        self.xmpp = slixmpp.ClientXMPP(jid, password, sasl_mech=mechanism, loop=asyncio.get_running_loop())
        self.xmpp.ca_certs = certificate
        self.xmpp.whitespace_keepalive = False
        self.xmpp.auto_authorize = None
        self.xmpp.auto_subscribe = False
        self.xmpp.add_filter("in", self._see)
        self.xmpp.add_event_handler("stream_error", lambda error: self._arrive(error.xml))
        self.xmpp.add_event_handler("disconnected", lambda reason: self._lost())
        self._bound = False

    def _see(self, stanza: Any) -> Any:
        xml: Element = stanza.xml
        if self._bound and xml.tag.startswith("{jabber:client}"):
            self._arrive(xml)
        return stanza

    async def connect(self, port: int, *, direct_tls: bool = False) -> None:
        """Connect, authenticate and bind; LoginFailed says why not."""
        xmpp = self.xmpp
        xmpp.enable_direct_tls = direct_tls
        xmpp.enable_starttls = not direct_tls
        started: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        def settle(value: str) -> None:
            if not started.done():
                started.set_result(value)

        xmpp.add_event_handler("session_start", lambda _: self._start(settle))
        xmpp.add_event_handler("failed_auth", lambda failure: settle(f"failed: {failure['condition']}"))
        xmpp.add_event_handler("disconnected", lambda reason: settle(f"disconnected: {reason}"))
        xmpp.connect("127.0.0.1", port)
        outcome = await asyncio.wait_for(started, PATIENCE)
        if outcome:
            await self.close()
            raise LoginFailed(outcome)
        self.jid = str(xmpp.boundjid.full)

    def _start(self, settle: Any) -> None:
        self._bound = True
        settle("")

    def send_raw(self, data: str | bytes) -> None:
        self.xmpp.send_raw(data)

    async def leave(self) -> None:
        """End in whatever way is still possible."""
        if self._bound and self.xmpp.transport is not None:
            await self.disconnect()
        await self.close()

    async def disconnect(self) -> None:
        """Close the stream properly."""
        if not self.is_over:
            await self.xmpp.disconnect()
            await self.assert_closed()
        await self.close()

    async def vanish(self) -> None:
        """Lose the connection without a word."""
        if self.xmpp.transport is not None:
            self.xmpp.transport.abort()
            await self.assert_closed()
        await self.close()

    async def close(self) -> None:
        """Leave nothing behind."""
        if self.xmpp.transport is not None:
            self.xmpp.transport.abort()
            with contextlib.suppress(AssertionError, TimeoutError):
                await self.assert_closed()
        for task in (self.xmpp._run_out_filters, self.xmpp._current_connection_attempt):
            if task is not None and not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task
        self.xmpp.cancel_connection_attempt()
