"""Where messages are posted to, and as what: the module's own options, and those of each of its `sinks`."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, cast

from lxml.etree import _Element

from xmppd.module_api import (
    About,
    Event,
    FileSink,
    Form,
    HttpSink,
    HttpTarget,
    Outcome,
    Posted,
    PostedMessage,
    Profile,
    TableSink,
    conversation,
    json_object,
    new_id,
    posted,
    repetition,
    several,
    timestamp,
    ulid,
    wrong_with,
)
from xmppd.protocol.jid import JID
from xmppd.protocol.stanza import Stanza

from .forwards import Forwards, forward, wrong_with_jid
from .options import HttpOptions
from .table import message_row, message_table

Format = Literal[
    "ejabberd",
    "json",
    "ndjson_batch",
    "form:codepond",
    "form:codepond_json",
    "form:zeropush",
    "form:kadekm",
    "form:rbt",
    "form:mongoose",
]
Headers = tuple[tuple[str, str], ...] | Mapping[str, str]

_KINDS: Final = {"sent": "message.sent", "received": "message.received", "offline": "message.offline"}
_STATES: Final = {"sent": "accepted", "received": "sent", "offline": "stored-offline"}
_ELSE: Final = {  # where a format is chosen that only web servers get
    "file": "a file has lines of JSON",
    "database": "a table has columns",
    "jid": "messages are forwarded as they are",
}
_CONTENT_TYPES: Final = {"json": "application/json", "ndjson_batch": "application/x-ndjson"}


@dataclass(frozen=True, slots=True)
class Sink:
    """One of `sinks`: a `url`; a `file` with a line of JSON for each message; the `table` of a `database` with a row
    for each; or a `jid` that each is forwarded to."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    name: str
    url: str | None = None
    file: str | None = None
    database: str | None = field(default=None, repr=False)  # there is a password in it
    table: str = "post_log"
    jid: str | None = None
    format: Format = "json"
    headers: Headers = ()
    content_type: str = "text/xml"
    confidential: bool = False
    secret: Annotated[tuple[str, ...], several] = field(default=(), repr=False)
    token: str = field(default="", repr=False)
    retry_4xx: bool = False
    http_options: Any = ()

    def faults(self) -> Iterator[str]:
        """What makes no sense, as `option: reason`; of a `url` see `wrong_with`."""
        there = [name for name in ("url", "file", "database", "jid") if getattr(self, name) is not None]
        if len(there) != 1:
            yield ": expected one of url, file, database and jid"
            return
        if self.url is None and self.format != "json":
            yield f".format: {_ELSE[there[0]]}"
        if self.database is not None and (problem := TableSink.wrong_with(self.database)):
            yield f".database: {problem}"
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", self.table):
            yield ".table: expected up to 64 of A-Z, a-z, 0-9 and _"
        if self.jid is not None and (problem := wrong_with_jid(self.jid)):
            yield f".jid: {problem}"
        if self.jid is not None and self.confidential:
            yield ".confidential: messages are forwarded whole"


@dataclass(slots=True)
class Seen:
    """A message that is to be posted."""

    stanza: Stanza
    sender: JID
    recipient: JID
    direction: str
    host: str
    at: float
    element: _Element | None = None  # the stanza's, for who looks inside a moment later


class Poster:
    """Makes the events of one sink. `names`: of the headers for time, sender and recipient."""

    def __init__(self, name: str, sink: Sink, names: tuple[str, str, str], node: str) -> None:
        self.name = name
        self.sink = sink
        self.batched = sink.format == "ndjson_batch" or sink.url is None
        self._names = names
        self._node = node
        form = sink.format.removeprefix("form:")
        self._profile: Profile | None = cast("Profile", form) if form != sink.format else None
        self._usual = usual = sink.content_type == "text/xml"
        content_type = _CONTENT_TYPES.get(sink.format, "text/xml") if usual else sink.content_type
        headers = sink.headers.items() if isinstance(sink.headers, Mapping) else sink.headers
        self._content_type = content_type
        self._headers = tuple((str(name), str(value)) for name, value in headers)
        self._form: Form | None = None
        if sink.format == "ejabberd":
            self._form = Form((("Content-Type", content_type), *self._headers), *names, hides=sink.confidential)

    @property
    def looks_inside(self) -> bool:
        """Whether its events are made out of the parsed message."""
        return self._form is None

    def problem(self) -> str:
        """What is wrong with where it goes, or nothing."""
        sink = self.sink
        elsewhere = (sink.file, sink.database, sink.jid) != (None, None, None)
        return "" if elsewhere else wrong_with(sink.url)

    def target(
        self, options: HttpOptions, connections: int, route: Callable[[Stanza], Outcome]
    ) -> HttpSink | FileSink | TableSink | Forwards:
        """Raises OSError and ValueError where certificates cannot be used."""
        if self.sink.file is not None:
            return FileSink(Path(self.sink.file))
        if self.sink.database is not None:
            return TableSink(self.sink.database, message_table(self.sink.table), message_row)
        if self.sink.jid is not None:
            return Forwards(route)
        assert self.sink.url is not None
        target = HttpTarget(
            self.sink.url,
            timeout=options.timeout,
            connect_timeout=options.connect_timeout,
            secrets=self.sink.secret,
            verify=options.verify,
            cafile=options.cafile,
            certfile=options.certfile,
            batched=self.batched,
            retry_4xx=self.sink.retry_4xx,
            form=self._form,
        )
        sink = HttpSink(target, connections=connections)
        sink.check()
        return sink

    def event(self, seen: Seen) -> Event:
        stanza, sender, recipient, direction = seen.stanza, seen.sender, seen.recipient, seen.direction
        event_id = new_id()
        headers, payload = ((), b"") if self._form is not None else self._made(seen, event_id)
        raw = None if self._form is None else (stanza.xml, recipient.full, sender.full, seen.at)
        in_room = stanza.type == "groupchat"
        return Event(
            event_id,
            self.name,
            seen.host,
            _KINDS[direction],
            conversation(sender, sender if in_room and direction != "sent" else recipient, room=in_room),
            payload,
            seen.at,
            headers,
            _repeated(self.name, stanza, sender, recipient) if direction == "offline" else None,
            raw,
            self._form,
        )

    def _made(self, seen: Seen, event_id: bytes) -> tuple[tuple[tuple[str, str], ...], bytes]:
        """Headers and payload, of all but what `ejabberd` means."""
        stanza, sender, recipient = seen.stanza, seen.sender, seen.recipient
        element = stanza.element if seen.element is None else seen.element
        to, from_ = element.get("to") or recipient.full, element.get("from") or sender.full
        state, hides = _STATES[seen.direction], self.sink.confidential
        message = PostedMessage(stanza, element, sender, recipient, to, seen.direction, state, seen.at, hides)
        if self.sink.jid is not None:
            return (), forward(message, to=self.sink.jid, id=ulid(event_id), host=seen.host)
        about = About(ulid(event_id), seen.host, self._node, self.sink.token)
        if self._profile is None:
            made = Posted(self._content_type, json_object(message, id=about.id, host=about.host, node=self._node))
        else:
            made = posted(self._profile, message, about)
        content_type = made.content_type if self._usual else self._content_type
        headers = (("Content-Type", content_type), *made.headers, *self._headers)
        if not self.batched:  # there the headers are those of a whole batch
            at_name, from_name, to_name = self._names
            headers = (*headers, (at_name, timestamp(seen.at)), (from_name, from_), (to_name, to))
        return headers, made.payload


def _repeated(sink: str, stanza: Stanza, sender: JID, recipient: JID) -> bytes | None:
    """A client that sends a message again has it stored once, and so it is told once."""
    if not stanza.id.strip():
        return None
    return repetition("offline", sink, sender.bare, recipient.bare, stanza.id, stanza.inner.decode())
