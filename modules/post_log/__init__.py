"""Messages posted to a web server: as ejabberd's module of this name does, or as JSON, signed, in batches."""

import asyncio
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from xmppd.events import Handled, MessageStoring, StanzaDelivering, StanzaSending
from xmppd.module_api import AccessRules, Context, Module, hook, several
from xmppd.protocol.jid import JID
from xmppd.protocol.stanza import Stanza

from .forwards import is_forward
from .options import understood
from .targets import Format, Headers, Poster, Seen, Sink

_TOGETHER = 0.01  # seconds
_LOOK_UP = 10.0  # seconds for a host's address, at the start


@dataclass(frozen=True, slots=True)
class Config:
    url: str | None = None
    ts_header: str = "X-Message-Timestamp"
    from_header: str = "X-Message-From"
    to_header: str = "X-Message-To"
    headers: Headers = ()
    content_type: str = "text/xml"
    http_options: Any = ()
    req_options: Any = ()
    format: Format = "ejabberd"
    directions: Annotated[tuple[Literal["sent", "received", "offline"], ...], several] = ("sent",)
    types: Annotated[tuple[Literal["chat", "groupchat", "normal", "headline"], ...], several] = ("chat", "groupchat")
    require_body: bool = True
    confidential: bool = False
    skip_blank_id: bool = False
    secret: Annotated[tuple[str, ...], several] = field(default=(), repr=False)
    token: str = field(default="", repr=False)
    retry_4xx: bool = False
    sinks: tuple[Sink, ...] = ()


class PostLog(Module[Config]):
    xeps = {297: "1.0"}

    def __init__(self, context: Context, config: Config) -> None:
        super().__init__(context, config)
        self._types = frozenset(config.types)
        self._directions = frozenset(config.directions)
        self._posters: list[Poster] = []  # those that work
        self._seen: list[Seen] = []  # to be posted in a moment
        self._forwards = any(sink.jid is not None for sink in config.sinks)
        self._waits = False  # senders wait for the commit, or for room
        self._looks_inside = False  # a poster does

    @classmethod
    def check_options(cls, config: Config, access: AccessRules) -> Iterator[str]:
        names = [sink.name for sink in config.sinks]
        for index, sink in enumerate(config.sinks):
            if not re.fullmatch(r"[a-z0-9_-]{1,24}", sink.name):
                yield f"sinks[{index}].name: expected up to 24 of a-z, 0-9, _ and -"
            elif sink.name in names[:index]:
                yield f"sinks[{index}].name: {sink.name} is there twice"
            for fault in sink.faults():
                yield f"sinks[{index}]{fault}"

    async def start(self) -> None:
        for path, poster in self._wanted():
            await self._open(path, poster)
        if not self._posters:
            return
        self._waits = self.outbox.durability == "commit" or self.outbox.when_full == "slow_sender"
        if "sent" in self._directions and self._waits:
            self.switch(StanzaSending, True)
        if "received" in self._directions:
            self.switch(StanzaDelivering, True)

    async def stop(self) -> None:
        self._submit()
        posters, self._posters = self._posters, []
        for poster in posters:
            await self.outbox.remove_sink(poster.name)

    def _wanted(self) -> Iterator[tuple[str, Poster]]:
        """Each with the path of its options."""
        config, path = self.config, f"modules.{self.name}."
        names = (config.ts_header, config.from_header, config.to_header)
        if config.url is not None or not config.sinks:
            own = Sink(
                name="",
                url=config.url,
                format=config.format,
                headers=config.headers,
                content_type=config.content_type,
                confidential=config.confidential,
                secret=config.secret,
                token=config.token,
                retry_4xx=config.retry_4xx,
                http_options=config.http_options,
            )
            yield path, Poster(self.name, own, names, self.server.node)
        for index, sink in enumerate(config.sinks):
            yield f"{path}sinks[{index}].", Poster(f"{self.name}.{sink.name}", sink, names, self.server.node)

    async def _open(self, path: str, poster: Poster) -> None:
        """A sink that cannot work is told of, and chat goes on."""
        option, problem = f"{path}url", poster.problem()
        options = understood(poster.sink.http_options, self.config.req_options)
        if not problem:
            try:
                target = poster.target(options, self.outbox.settings.per_sink, self.route)
            except (OSError, ValueError) as exc:
                option, problem = f"{path}http_options", str(exc)
        if problem:
            self.log.error("messages are not posted", option=option, problem=problem)
            return
        if options.unknown:
            self.log.warning("options without a meaning here", module=self.name, options=", ".join(options.unknown))
        await self.outbox.add_sink(poster.name, target, batched=poster.batched)
        self._posters.append(poster)
        self._looks_inside |= poster.looks_inside
        if poster.sink.url is not None:
            self.spawn(self._look_up(option, poster.sink.url), name="address of the sink")

    async def _look_up(self, option: str, url: str) -> None:
        """A name that leads nowhere is worth a word at once; it may lead somewhere later."""
        parts = urlsplit(url)
        try:
            async with asyncio.timeout(_LOOK_UP):
                await asyncio.get_running_loop().getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_STREAM)
        except (OSError, TimeoutError) as exc:
            self.log.warning("sink has no address", option=option, host=parts.hostname, error=str(exc) or "no answer")

    # -- messages

    @hook(StanzaSending)
    def sent(self, event: StanzaSending) -> None:
        if event.stanza.type in self._types and not self._waits and "sent" in self._directions:
            jid = event.session.jid
            self._later(event.stanza, jid, event.stanza.to or event.session.user, "sent", jid)

    @hook(StanzaSending, switched=True)
    async def sent_and_waits(self, event: StanzaSending) -> Handled | None:
        """The stream waits until the event is written, or until there is room for it."""
        stanza, session = event.stanza, event.session
        if not (self._waits and self._wants(stanza)):
            return None
        seen = Seen(stanza, session.jid, stanza.to or session.user, "sent", session.jid.domain, self.clock())
        for poster in self._posters:
            if self.outbox.when_full == "slow_sender":
                await self.outbox.room(poster.name)
            written = self.outbox.submit(poster.event(seen))
            if written is not None and self.outbox.durability == "commit":
                await written
        return None

    @hook(StanzaDelivering, switched=True)
    def received(self, event: StanzaDelivering) -> None:
        stanza, session = event.stanza, event.session
        if stanza.type in self._types and stanza.from_ is not None:
            self._later(stanza, stanza.from_, session.jid, "received", session.jid)

    @hook(MessageStoring)
    def stored(self, event: MessageStoring) -> None:
        stanza, user = event.message, event.user
        if "offline" not in self._directions or stanza.from_ is None or not self._wants(stanza):
            return
        self._submit()  # what came before it is posted before it
        seen = Seen(stanza, stanza.from_, user, "offline", user.domain, self.clock())
        event.rows += [self.outbox.row(poster.event(seen)) for poster in self._posters]

    def _later(self, stanza: Stanza, sender: JID, recipient: JID, direction: str, own: JID) -> None:
        """The rest is done in a moment, for all that have come until then: nobody waits for it, and many at once cost
        a fraction of as many one by one."""
        if not self._wants(stanza):
            return
        if not self._seen:
            asyncio.get_running_loop().call_later(_TOGETHER, self._submit)
        seen = Seen(stanza, sender, recipient, direction, own.domain, self.clock())
        if self._looks_inside:
            seen.element = stanza.element  # before it is forgotten
        self._seen.append(seen)

    def _submit(self) -> None:
        all_seen, self._seen = self._seen, []
        for seen in all_seen:
            for poster in self._posters:
                self.outbox.submit(poster.event(seen))

    def _wants(self, stanza: Stanza) -> bool:
        if stanza.kind != "message" or stanza.type not in self._types or not self._posters:
            return False
        if self._forwards and is_forward(stanza, self.server.hosts):
            return False
        if self.config.skip_blank_id and stanza.id and not stanza.id.strip():
            return False
        return stanza.has_text or not self.config.require_body
