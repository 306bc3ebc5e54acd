"""Messages posted to a web server: as ejabberd's module of this name does, or as JSON, signed, in batches."""

import asyncio
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

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
        self._headers = tuple((str(name), str(value)) for name, value in headers)
        self._types = frozenset(config.types)
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
        if self._runs and not self._waits and self._is_sent(event):
            self.outbox.submit(self._of_sender(event))

    @hook(StanzaSending, switched=True)
    async def sent_and_waits(self, event: StanzaSending) -> Handled | None:
        """The stream waits until the event is written, or until there is room for it."""
        if not (self._waits and self._is_sent(event)):
            return None
        if self.outbox.when_full == "slow_sender":
            await self.outbox.room(self.name)
        written = self.outbox.submit(self._of_sender(event))
        if written is not None and self.outbox.durability == "commit":
            await written
        return None

    @hook(StanzaDelivering, switched=True)
    def received(self, event: StanzaDelivering) -> None:
        stanza, session = event.stanza, event.session
        if self._runs and stanza.from_ is not None and self._wants(stanza):
            self.outbox.submit(self._event(stanza, stanza.from_, session.jid, "received", session.user.domain))

    @hook(MessageStoring)
    def stored(self, event: MessageStoring) -> None:
        stanza = event.message
        if not self._runs or "offline" not in self.config.directions or not self._wants(stanza):
            return
        if stanza.from_ is not None:
            event.rows.append(
                self.outbox.row(self._event(stanza, stanza.from_, event.user, "offline", event.user.domain))
            )

    def _is_sent(self, event: StanzaSending) -> bool:
        return "sent" in self.config.directions and self._wants(event.stanza)

    def _wants(self, stanza: Stanza) -> bool:
        if stanza.kind != "message" or stanza.type not in self._types:
            return False
        if self.config.skip_blank_id and stanza.id and not stanza.id.strip():
            return False
        return has_text(stanza) or not self.config.require_body

    def _of_sender(self, event: StanzaSending) -> Event:
        session = event.session
        return self._event(event.stanza, session.jid, event.stanza.to or session.user, "sent", session.user.domain)

    def _event(self, stanza: Stanza, sender: JID, recipient: JID, direction: str, host: str) -> Event:
        config, now, event_id = self.config, self.clock(), new_id()
        to = stanza.element.get("to") or recipient.full
        message = Message(stanza, sender, recipient, to, direction, _STATES[direction], now, config.confidential)
        content_type = config.content_type
        if config.format == "ejabberd":
            payload = ejabberd_xml(message)
        else:
            payload = json_object(message, id=ulid(event_id), host=host, node=self.server.node)
            content_type = _CONTENT_TYPES[config.format] if content_type == "text/xml" else content_type
        headers = [("Content-Type", content_type)]
        if config.format != "ndjson_batch":  # there the headers are those of a whole batch
            headers.append((config.ts_header, timestamp(now)))
            headers += [(config.from_header, message.from_), (config.to_header, to)]
        in_room = stanza.type == "groupchat"
        return Event(
            event_id,
            self.name,
            host,
            f"message.{direction}",
            conversation(sender, sender if in_room and direction != "sent" else recipient, room=in_room),
            payload,
            now,
            (*headers, *self._headers),
            _repeated(stanza, sender, recipient) if direction == "offline" else None,
        )


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
        return f"{url[:200]!r} is no URL that begins with http:// or https:// and names a host"
    return ""
