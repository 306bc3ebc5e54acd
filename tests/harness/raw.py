"""A client made of a socket: for tests of the protocol itself, and where there are many."""

import asyncio
import base64
import contextlib
import ssl
from pathlib import Path
from xml.etree.ElementTree import Element, XMLPullParser

from tests.harness.inbox import PATIENCE, Got, Inbox

TLS = "urn:ietf:params:xml:ns:xmpp-tls"
SASL = "urn:ietf:params:xml:ns:xmpp-sasl"
BIND = "urn:ietf:params:xml:ns:xmpp-bind"


def header(to: str | None = "localhost") -> str:
    address = f" to='{to}'" if to is not None else ""
    return (
        f"<stream:stream{address} version='1.0' xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams'>"
    )


def trusting(certificate: Path, *, alpn: str | None = None) -> ssl.SSLContext:
    """A context that believes this certificate and no other."""
    context = ssl.create_default_context(cafile=str(certificate))
    if alpn:
        context.set_alpn_protocols([alpn])
    return context


class Raw(Inbox):
    """Call `connect` (or `connect_tls`) first; `close` in any case."""

    def __init__(self, certificate: Path, host: str = "localhost") -> None:
        super().__init__()
        self.host = host
        self.context = trusting(certificate)
        self.root: Element | None = None  # the server's stream header
        self.at_end = False  # its closing tag has come
        self.received = b""
        self._deaf = False
        self._closing = False  # our closing tag is sent
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None

    async def connect(self, port: int) -> None:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", port)
        self._listen()

    async def connect_tls(
        self, port: int, context: ssl.SSLContext | None = None, name: str | None = None, source: str | None = None
    ) -> None:
        """`source` is the address to come from, any of 127.0.0.0/8."""
        self._reader, self._writer = await asyncio.open_connection(
            "127.0.0.1",
            port,
            ssl=context or self.context,
            server_hostname=name or self.host,
            local_addr=(source, 0) if source else None,
        )
        self._listen()

    @property
    def ssl_object(self) -> ssl.SSLObject:
        assert self._writer is not None
        found: ssl.SSLObject = self._writer.get_extra_info("ssl_object")
        return found

    async def leave(self) -> None:
        """End in whatever way is still possible."""
        if self.jid and not self.is_over and self._reading is not None and not self._deaf:
            with contextlib.suppress(AssertionError, TimeoutError, OSError):
                await self.disconnect()
        await self.close()

    async def disconnect(self) -> None:
        """Close the stream properly."""
        self._closing = True
        self.send_raw("</stream:stream>")
        await self.assert_closed()

    async def close(self) -> None:
        await self._stop_listening()
        if self._writer is not None:
            self._writer.transport.abort()
            with contextlib.suppress(OSError, ssl.SSLError):
                await self._writer.wait_closed()
            self._writer = None

    # -- reading

    def _listen(self) -> None:
        self.parser = XMLPullParser(["start", "end"])
        self._depth = 0
        self.root = None
        self._reading = asyncio.create_task(self._read())

    async def _stop_listening(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reading
            self._reading = None

    async def _read(self) -> None:
        assert self._reader is not None
        try:
            while data := await self._reader.read(65536):
                self.received += data
                self.parser.feed(data)
                for action, element in self.parser.read_events():
                    self._event(action, element)
        except (OSError, ssl.SSLError):
            pass
        self._lost()

    def _event(self, action: str, element: Element) -> None:
        if action == "start":
            self._depth += 1
            if self._depth == 1:
                self.root = element
                self._changed.set()
            return
        self._depth -= 1
        if self._depth == 1:
            self._arrive(element)
            assert self.root is not None
            self.root.remove(element)
        elif self._depth == 0:
            self.at_end = True
            if not self._closing and self._writer is not None and not self._writer.is_closing():
                self._closing = True
                self.send_raw("</stream:stream>")
                self._writer.close()
            self._changed.set()

    def stop_reading(self) -> None:
        """Take nothing more from the server."""
        assert self._writer is not None
        self._deaf = True
        self._writer.transport.pause_reading()  # type: ignore[attr-defined]

    # -- writing

    def send_raw(self, data: str | bytes) -> None:
        assert self._writer is not None
        self._writer.write(data.encode() if isinstance(data, str) else data)

    async def drain(self) -> None:
        assert self._writer is not None
        await asyncio.wait_for(self._writer.drain(), PATIENCE)

    def half_close(self) -> None:
        assert self._writer is not None
        self._writer.write_eof()

    # -- negotiation

    async def next(self) -> Got:
        """The next element of any kind."""
        return await self.wait_for(lambda got: True, "anything")

    async def open(self, to: str | None = "") -> Got:
        """Send a stream header; the features."""
        self.send_raw(header(self.host if to == "" else to))
        return await self.wait_for(lambda got: got.name == "features", "features")

    async def restart(self) -> Got:
        """A new stream after SASL."""
        await self._stop_listening()
        self._listen()
        return await self.open()

    async def starttls(self, *, behind: bytes = b"") -> None:
        """Negotiate TLS; `behind` is sent in the same packet as <starttls/>."""
        self.send_raw(f"<starttls xmlns='{TLS}'/>".encode() + behind)
        proceed = await self.next()
        assert proceed.name == "proceed", proceed
        await self._stop_listening()
        assert self._writer is not None
        await self._writer.start_tls(self.context, server_hostname=self.host)
        self._listen()

    async def plain(self, user: str, password: str) -> Got:
        """SASL PLAIN; <success/> or <failure/>."""
        secret = base64.b64encode(f"\0{user}\0{password}".encode()).decode()
        self.send_raw(f"<auth xmlns='{SASL}' mechanism='PLAIN'>{secret}</auth>")
        return await self.next()

    async def bind(self, resource: str | None = None) -> Got:
        wanted = f"<resource>{resource}</resource>" if resource else ""
        answer = await self.ask("set", f"<bind xmlns='{BIND}'>{wanted}</bind>")
        if answer.type == "result":
            self.jid = answer.payload.findtext(f"{{{BIND}}}jid") or ""
        return answer

    async def authenticate(self, user: str, password: str) -> None:
        """From an encrypted stream to one that can bind."""
        await self.open()
        answer = await self.plain(user, password)
        assert answer.name == "success", answer
        await self.restart()

    async def login(self, port: int, user: str, password: str, resource: str | None = None) -> None:
        """Direct TLS, PLAIN, bind: the shortest way."""
        await self.connect_tls(port)
        await self.authenticate(user, password)
        answer = await self.bind(resource)
        assert answer.type == "result", answer
