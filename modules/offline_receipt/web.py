"""The same for a web server: an event for each message that is stored, in the commit that stores it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final

from xmppd.module_api import (
    About,
    Duration,
    Event,
    HttpSink,
    HttpTarget,
    Module,
    PostedMessage,
    Profile,
    conversation,
    new_id,
    posted,
    repetition,
    several,
    ulid,
    wrong_with,
)
from xmppd.protocol import ns
from xmppd.protocol.jid import JID
from xmppd.protocol.stanza import Stanza

if TYPE_CHECKING:
    from typing import Self

_KIND: Final = "message.offline"


@dataclass(frozen=True, slots=True)
class Http:
    """Where to, and how."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    url: str
    token: str = field(default="", repr=False)
    headers: tuple[tuple[str, str], ...] | Mapping[str, str] = ()
    secret: Annotated[tuple[str, ...], several] = field(default=(), repr=False)
    confidential: bool = False
    require_body: bool = True
    retry_4xx: bool = False
    timeout: Duration = 30.0
    connect_timeout: Duration = 10.0
    verify: bool = True
    cafile: str | None = None
    certfile: str | None = None


class Web:
    """Makes the events; `name` is the sink's."""

    def __init__(self, name: str, node: str, http: Http, profile: Profile) -> None:
        self._name = name
        self._node = node
        self._http = http
        self._profile: Profile = profile
        headers = http.headers.items() if isinstance(http.headers, Mapping) else http.headers
        self._headers = tuple((str(name), str(value)) for name, value in headers)

    @classmethod
    async def opened(cls, module: Module[Any], http: Http, profile: Profile) -> "Self | None":
        """None where it cannot work, which is logged: chat goes on."""
        option, problem = "url", wrong_with(http.url)
        if not problem:
            target = HttpTarget(
                http.url,
                timeout=http.timeout,
                connect_timeout=http.connect_timeout,
                secrets=http.secret,
                verify=http.verify,
                cafile=http.cafile,
                certfile=http.certfile,
                retry_4xx=http.retry_4xx,
            )
            sink = HttpSink(target, connections=module.outbox.settings.per_sink)
            try:
                sink.check()
            except (OSError, ValueError) as exc:
                option, problem = "certfile" if http.certfile else "cafile", str(exc)
        if problem:
            option = f"modules.{module.name}.http.{option}"
            module.log.error("messages are not posted", option=option, problem=problem)
            return None
        await module.outbox.add_sink(module.name, sink)
        return cls(module.name, module.server.node, http, profile)

    def event(self, user: JID, message: Stanza, now: float) -> Event | None:
        """None for what is not told of: by default, a message without a text."""
        sender, element = message.from_, message.element
        if sender is None or (self._http.require_body and not message.has_text):
            return None
        event_id = new_id()
        to = element.get("to") or user.full
        hides = self._http.confidential
        about = About(ulid(event_id), user.domain, self._node, self._http.token)
        said = PostedMessage(message, element, sender, user, to, "offline", "stored-offline", now, hides)
        made = posted(self._profile, said, about)
        return Event(
            event_id,
            self._name,
            user.domain,
            _KIND,
            conversation(sender, user),
            made.payload,
            now,
            (("Content-Type", made.content_type), *made.headers, *self._headers),
            self._repeated(message, sender, user),
        )

    def _repeated(self, message: Stanza, sender: JID, user: JID) -> bytes | None:
        """A client that sends a message again has it told once: the same id and text, whatever the server has added."""
        origin = message.child(ns.STANZA_ID, "origin-id")
        sent_as = (origin.get("id") if origin is not None else None) or message.id
        if not sent_as.strip():
            return None
        return repetition(_KIND, self._name, user.domain, sender.bare, user.bare, sent_as, message.body or "")
