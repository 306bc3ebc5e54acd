"""Messages posted to a web server: as ejabberd's module of this name does, or as JSON, signed, in batches."""

import asyncio
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

from lxml.etree import _Element

from xmppd.events import Handled, MessageStoring, StanzaDelivering, StanzaSending
from xmppd.module_api import (
    Context,
    Event,
    HttpSink,
    HttpTarget,
    Module,
    conversation,
    hook,
    new_id,
    repetition,
    several,
    ulid,
)
from xmppd.protocol.jid import JID
from xmppd.protocol.stanza import Stanza

from .forms import Message, ejabberd_xml, has_text, json_object, timestamp
from .options import understood

_STATES: Final = {"sent": "accepted", "received": "sent", "offline": "stored-offline"}
_CONTENT_TYPES: Final = {"json": "application/json", "ndjson_batch": "application/x-ndjson"}
_LOOK_UP: Final = 10.0  # seconds for the host's address, at the start


@dataclass(frozen=True, slots=True)
class Config:
    url: str | None = None
    ts_header: str = "X-Message-Timestamp"
    from_header: str = "X-Message-From"
    to_header: str = "X-Message-To"
    headers: tuple[tuple[str, str], ...] | Mapping[str, str] = ()
    content_type: str = "text/xml"
    http_options: Any = ()
    req_options: Any = ()
    format: Literal["ejabberd", "json", "ndjson_batch"] = "ejabberd"
    directions: Annotated[tuple[Literal["sent", "received", "offline"], ...], several] = ("sent",)
    types: Annotated[tuple[Literal["chat", "groupchat", "normal", "headline"], ...], several] = ("chat", "groupchat")
    require_body: bool = True
    confidential: bool = False
    skip_blank_id: bool = False
    secret: Annotated[tuple[str, ...], several] = field(default=(), repr=False)
    retry_4xx: bool = False


class PostLog(Module[Config]):
    def __init__(self, context: Context, config: Config) -> None:
        super().__init__(context, config)
        self._sink: HttpSink | None = None
        headers = config.headers.items() if isinstance(config.headers, Mapping) else config.headers
        usual = config.content_type == "text/xml"
        content_type = _CONTENT_TYPES.get(config.format, "text/xml") if usual else config.content_type
        self._headers = (("Content-Type", content_type), *((str(name), str(value)) for name, value in headers))
        self._types = frozenset(config.types)
        self._directions = frozenset(config.directions)
        self._seen: list[_Seen] = []
        self._waits = False  # senders wait for the commit, or for room
        self._runs = False

    async def start(self) -> None:
        problem = _wrong_with(self.config.url)
        if problem:
            self.log.error("messages are not posted", option=f"modules.{self.name}.url", problem=problem)
            return
        assert self.config.url is not None
        options = understood(self.config.http_options, self.config.req_options)
        if options.unknown:
            self.log.warning("options without a meaning here", module=self.name, options=", ".join(options.unknown))
        batched = self.config.format == "ndjson_batch"
        target = HttpTarget(
            self.config.url,
            timeout=options.timeout,
            connect_timeout=options.connect_timeout,
            secrets=self.config.secret,
            verify=options.verify,
            cafile=options.cafile,
            certfile=options.certfile,
            batched=batched,
            retry_4xx=self.config.retry_4xx,
        )
        self._sink = HttpSink(target, connections=self.outbox.settings.per_sink)
        try:
            self._sink.check()
        except (OSError, ValueError) as exc:
            self.log.error("messages are not posted", option=f"modules.{self.name}.http_options", problem=str(exc))
            return
        await self.outbox.add_sink(self.name, self._sink, batched=batched)
        self._runs = True
        self._waits = self.outbox.durability == "commit" or self.outbox.when_full == "slow_sender"
        if "sent" in self.config.directions and self._waits:
            self.switch(StanzaSending, True)
        if "received" in self.config.directions:
            self.switch(StanzaDelivering, True)
        self.spawn(self._look_up(), name="address of the sink")

    async def stop(self) -> None:
        if self._runs:
            self._submit()
            await self.outbox.remove_sink(self.name)

    async def _look_up(self) -> None:
        """A name that leads nowhere is worth a word at once; it may lead somewhere later."""
        parts = urlsplit(self.config.url or "")
        try:
            async with asyncio.timeout(_LOOK_UP):
                await asyncio.get_running_loop().getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_STREAM)
        except (OSError, TimeoutError) as exc:
            self.log.warning(
                "sink has no address",
                option=f"modules.{self.name}.url",
                host=parts.hostname,
                error=str(exc) or "no answer",
            )

    # -- messages

    @hook(StanzaSending)
    def sent(self, event: StanzaSending) -> None:
        if self._runs and not self._waits and event.stanza.type in self._types and "sent" in self._directions:
            self._later(
                event.stanza, event.session.jid, event.stanza.to or event.session.user, "sent", event.session.jid
            )

    @hook(StanzaSending, switched=True)
    async def sent_and_waits(self, event: StanzaSending) -> Handled | None:
        """The stream waits until the event is written, or until there is room for it."""
        stanza, session = event.stanza, event.session
        element = stanza.element
        if not (self._waits and self._wants(stanza, element)):
            return None
        if self.outbox.when_full == "slow_sender":
            await self.outbox.room(self.name)
        found = _Seen(stanza, element, session.jid, stanza.to or session.user, "sent", session.jid.domain, self.clock())
        written = self.outbox.submit(self._event(found))
        if written is not None and self.outbox.durability == "commit":
            await written
        return None

    @hook(StanzaDelivering, switched=True)
    def received(self, event: StanzaDelivering) -> None:
        stanza, session = event.stanza, event.session
        if self._runs and stanza.from_ is not None and stanza.type in self._types:
            self._later(stanza, stanza.from_, session.jid, "received", session.jid)

    @hook(MessageStoring)
    def stored(self, event: MessageStoring) -> None:
        stanza = event.message
        if not self._runs or "offline" not in self._directions or stanza.from_ is None:
            return
        if self._wants(stanza, stanza.element):
            user = event.user
            found = _Seen(stanza, stanza.element, stanza.from_, user, "offline", user.domain, self.clock())
            event.rows.append(self.outbox.row(self._event(found)))

    def _later(self, stanza: Stanza, sender: JID, recipient: JID, direction: str, own: JID) -> None:
        """The rest is done when the loop has moved the stanzas that it has now: nobody waits for it."""
        element = stanza.element  # before it is forgotten
        if not self._wants(stanza, element):
            return
        if not self._seen:
            asyncio.get_running_loop().call_soon(self._submit)
        self._seen.append(_Seen(stanza, element, sender, recipient, direction, own.domain, self.clock()))

    def _submit(self) -> None:
        seen, self._seen = self._seen, []
        for each in seen:
            self.outbox.submit(self._event(each))

    def _wants(self, stanza: Stanza, element: _Element) -> bool:
        if stanza.kind != "message" or stanza.type not in self._types:
            return False
        if self.config.skip_blank_id and stanza.id and not stanza.id.strip():
            return False
        return has_text(element) or not self.config.require_body

    def _event(self, seen: "_Seen") -> Event:
        config, stanza, sender, recipient, direction = (
            self.config,
            seen.stanza,
            seen.sender,
            seen.recipient,
            seen.direction,
        )
        event_id = new_id()
        to = seen.element.get("to") or recipient.full
        message = Message(
            stanza, seen.element, sender, recipient, to, direction, _STATES[direction], seen.at, config.confidential
        )
        if config.format == "ejabberd":
            payload = ejabberd_xml(message)
        else:
            payload = json_object(message, id=ulid(event_id), host=seen.host, node=self.server.node)
        headers = self._headers
        if config.format != "ndjson_batch":  # there the headers are those of a whole batch
            own = (config.ts_header, timestamp(seen.at)), (config.from_header, message.from_), (config.to_header, to)
            headers = (*headers, *own)
        in_room = stanza.type == "groupchat"
        return Event(
            event_id,
            self.name,
            seen.host,
            f"message.{direction}",
            conversation(sender, sender if in_room and direction != "sent" else recipient, room=in_room),
            payload,
            seen.at,
            headers,
            _repeated(stanza, sender, recipient) if direction == "offline" else None,
        )


@dataclass(slots=True)
class _Seen:
    """A message that is to be posted."""

    stanza: Stanza
    element: _Element
    sender: JID
    recipient: JID
    direction: str
    host: str
    at: float


def _repeated(stanza: Stanza, sender: JID, recipient: JID) -> bytes | None:
    """A client that sends a message again has it stored once, and so it is told once."""
    if not stanza.id.strip():
        return None
    return repetition("offline", sender.bare, recipient.bare, stanza.id, stanza.inner.decode())


def _wrong_with(url: str | None) -> str:
    """What is wrong with a URL, or nothing."""
    if not url:
        return "it is missing: messages are posted to a web server, https://log.example.net/messages for example"
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or any(char.isspace() for char in url):
        said = repr(url[:200]) if "@" not in url else "it"  # a password may be in it
        return f"{said} is no URL that begins with http:// or https:// and names a host"
    return ""
