"""Receipts from the server for messages it has stored, and what became of messages: docs/offline_receipt.md."""

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Final, Literal

from xmppd.errors import CommandError, JidError, StanzaError, StorageError
from xmppd.events import (
    HANDLED,
    Handled,
    MessageAccepted,
    MessagesAcknowledged,
    MessageSent,
    MessagesFreed,
    MessagesRemoved,
    MessagesTakenOver,
    MessageStored,
    MessageStoring,
    MessageUndeliverable,
    NodeDown,
    StanzaBounced,
    StanzaSending,
    UserDeleted,
)
from xmppd.module_api import (
    SAFE,
    AccessRules,
    Arg,
    Context,
    Duration,
    IqRequest,
    Module,
    Profile,
    Tuple,
    command,
    hook,
    iq,
    several,
    string,
)
from xmppd.protocol import ns
from xmppd.protocol.jid import JID, bare, make, parse
from xmppd.protocol.stanza import Stanza

from .freed import Freed
from .queries import AT_ONCE, answer, asked_for, since, stamp
from .receipts import Style, When, answered, asks, is_receipt_of_ours, may_ask, names, receipt
from .states import Key, State, States, delivery_state, key_of
from .web import Http, Web

Type = Literal["chat", "normal"]

_NOT_SEEN: Final = (0.1, 0.2, 0.5, 1.0, 3.0)  # seconds between looks for a sender whose session is not known here yet
_LATE: Final = 1000  # receipts that wait at once, for that or for a roster; more are not sent
_AFTER_DEATH: Final = 10.0  # seconds
_TIMES: Final = ("accepted", "stored", "sent", "acknowledged", "received", "displayed")
_MARKERS: Final = ns.CHAT_MARKERS.encode()


@dataclass(frozen=True, slots=True)
class Config:
    style: Annotated[tuple[Style, ...], several] = ("received",)
    from_: str = "bare"
    types: Annotated[tuple[Type, ...], several] = ("chat", "normal")
    when: Annotated[tuple[When, ...], several] = ("stored",)
    who: Literal["any", "presence_subscribed"] = "any"
    remote: bool = False
    http: Http | None = None
    http_profile: Profile = "json"
    track: bool = True
    retain: Duration = 30 * 86400.0


class OfflineReceipt(Module[Config]):
    xeps = {22: "1.4", 184: "1.4.0"}
    features = (ns.DELIVERY,)
    account_features = (ns.DELIVERY,)
    requires = ("offline",)
    tables = (delivery_state,)

    def __init__(self, context: Context, config: Config) -> None:
        super().__init__(context, config)
        self._types: frozenset[str] = frozenset(config.types)
        self._styles = tuple(style for style in dict.fromkeys(config.style) if style != "none")
        self._when: frozenset[When] = frozenset(config.when) if self._styles else frozenset()
        self._states = States(self.storage, self.log, self.clock)
        self._web: Web | None = None
        self._late = 0
        self._freed = Freed(
            self.spool,
            self.log,
            self.clock,
            self.clock(),
            self.spawn,
            is_available=self.sessions.is_available,
            rows=self._rows,
            told=lambda user, message: self._answer(message, user, "stored"),
        )

    @classmethod
    def check_options(cls, config: Config, access: AccessRules) -> Iterator[str]:
        if config.from_ not in ("bare", "full"):
            prefix = config.from_.removeprefix("prefix:")
            try:
                good = prefix not in ("", config.from_) and bool(make("", f"{prefix}example.net"))
            except JidError:
                good = False
            if not good:
                yield f"from: expected bare, full or prefix: and what comes before the host, got {config.from_!r}"
        if "none" in config.style and len(config.style) > 1:
            yield "style: none stands alone"

    async def start(self) -> None:
        if self.config.track:
            self._states.open()  # first of all: the hooks are there, and their rows need it
            self.switch(StanzaSending, True)
            self.switch(MessageSent, True)
            self.switch(MessagesAcknowledged, True)
            self.switch(MessagesRemoved, True)
            self.retention("delivery states", self.config.retain, self._states.delete_older)
        if "accepted" in self._when:
            self.switch(MessageAccepted, True)
        if self.config.http is not None:
            self._web = await Web.opened(self, self.config.http, self.config.http_profile)
        self._freed.look()  # at what earlier runs of this node had held

    async def stop(self) -> None:
        self._freed.stop()
        if self.config.track:
            await self._states.close()
        if self._web is not None:
            await self.outbox.remove_sink(self.name)

    # -- receipts

    @hook(MessageStored)
    def stored(self, event: MessageStored) -> None:
        if not event.replayed:
            self._answer(event.message, event.user, "stored")

    @hook(MessagesFreed)
    def freed(self, event: MessagesFreed) -> None:
        self._freed.look()

    @hook(MessagesTakenOver)
    def taken_over(self, event: MessagesTakenOver) -> None:
        self._freed.look()

    @hook(NodeDown)
    def node_down(self, event: NodeDown) -> None:
        """It may have made messages free, and told nobody."""
        asyncio.get_running_loop().call_later(_AFTER_DEATH, self._freed.look)

    @hook(MessageAccepted, switched=True)
    def accepted(self, event: MessageAccepted) -> None:
        message = event.message
        if message.to is not None and message.to.local and may_ask(message):
            self._answer(message, bare(message.to), "accepted")

    @hook(StanzaBounced)
    def bounced(self, event: StanzaBounced) -> None:
        message, to = event.stanza, event.stanza.to
        if message.kind != "message" or to is None or not to.local or not may_ask(message) or not asks(message):
            return
        if self.config.track:
            self._note(message, to, reason=event.error.condition, bounced_at=self.clock())
        self._answer(message, bare(to), "bounced", event.error.condition)

    @hook(MessageUndeliverable)
    def drop_own(self, event: MessageUndeliverable) -> Handled | None:
        """A receipt is for a session that is there: who missed it asks (queries.py)."""
        if not is_receipt_of_ours(event.message):
            return None
        event.outcome.follow(SAFE)
        return HANDLED

    def _answer(self, message: Stanza, user: JID, when: When, reason: str = "") -> None:
        sender = message.from_
        if when not in self._when or sender is None:
            return
        styles = [style for style in self._styles if answered(message, self._types, style)]
        message.forget_element()
        if not styles:
            return
        if not (self.config.remote or self._is_ours(sender)):
            return
        if self.config.who == "any" and (self._is_here(sender) or not self._is_ours(sender)):
            self._send(message, user, when, reason, styles)
        elif self._late < _LATE:
            self._late += 1
            self.spawn(self._answer_late(message, user, when, reason, styles), name="receipt")
        else:
            self.log.warning("receipt not sent", to=sender, reason="too many wait")

    async def _answer_late(self, message: Stanza, user: JID, when: When, reason: str, styles: Sequence[Style]) -> None:
        """After a look at the recipient's roster, or when the table shows the session: here it may lag behind."""
        sender = message.from_
        assert sender is not None
        try:
            if self.config.who == "presence_subscribed" and not await self.sees_presence(bare(sender), user):
                return
            for pause in _NOT_SEEN:
                if self._is_here(sender) or not self._is_ours(sender):
                    self._send(message, user, when, reason, styles)
                    return
                await asyncio.sleep(pause)
        except StorageError as exc:
            self.log.warning("receipt not sent", to=sender, reason=exc)
        finally:
            self._late -= 1

    def _send(self, message: Stanza, user: JID, when: When, reason: str, styles: Sequence[Style]) -> None:
        for style in styles:
            made = receipt(
                message, user, style, when, from_=self.config.from_, stamp=stamp(self.clock()), reason=reason
            )
            if made is not None:
                self.route(made)

    def _is_ours(self, jid: JID) -> bool:
        return jid.domain in self.server.hosts

    def _is_here(self, sender: JID) -> bool:
        """Whether that very session is there, on whatever node."""
        return any(resource.jid == sender for resource in self.sessions.resources(bare(sender)))

    # -- what is written with a stored message

    @hook(MessageStoring)
    def storing(self, event: MessageStoring) -> None:
        if not event.replayed:
            event.rows += self._rows(event.user, event.message, event.expires_at)
        elif self.config.track:
            event.rows += self._state_row(event.user, event.message, event.expires_at)

    def _rows(self, user: JID, message: Stanza, expires_at: float | None) -> Iterator[tuple[str, object]]:
        if self.config.track:
            yield from self._state_row(user, message, expires_at)
        if self._web is not None and message.type in self._types:
            event = self._web.event(user, message, self.clock())
            if event is not None:
                yield self.outbox.row(event)

    def _state_row(self, user: JID, message: Stanza, expires_at: float | None) -> Iterator[tuple[str, object]]:
        key = self._key(message, user)
        if key is not None and message.type in self._types:
            expiry = {} if expires_at is None else {"expires_at": expires_at}
            yield self._states.item(key, stored_at=self.clock(), **expiry)

    # -- states

    def _key(self, message: Stanza, recipient: JID) -> Key | None:
        sender = message.from_
        if sender is None or not (self.config.remote or self._is_ours(sender)):
            return None
        return key_of(sender, recipient, message.id)

    def _note(self, message: Stanza, recipient: JID, *, reason: str | None = None, **times: float) -> None:
        key = self._key(message, recipient)
        if key is not None and message.type in self._types:
            self._states.note(key, reason=reason, **times)

    @hook(StanzaSending, after=("blocking", "privacy"), switched=True)
    def sending(self, event: StanzaSending) -> None:
        stanza = event.stanza
        if stanza.kind != "message" or not (may_ask(stanza) or _MARKERS in stanza.xml):
            return
        to = stanza.to or event.session.user
        if asks(stanza):
            self._note(stanza, to, accepted_at=self.clock())
        else:
            self._note_answer(event.session.user, to, names(stanza, ns.RECEIPTS, "received"), "received_at")
            self._note_answer(event.session.user, to, names(stanza, ns.CHAT_MARKERS, "displayed"), "displayed_at")

    def _note_answer(self, recipient: JID, sender: JID, id: str, column: str) -> None:
        """What the recipient's client says about a message that it got."""
        key = key_of(sender, recipient, id)
        if key is not None and (self.config.remote or self._is_ours(sender)):
            self._states.note(key, reason=None, **{column: self.clock()})

    @hook(MessageSent, switched=True)
    def sent(self, event: MessageSent) -> None:
        if self._is_tracked(event.message):
            self._note(event.message, event.session.user, sent_at=self.clock())

    @hook(MessagesAcknowledged, switched=True)
    def acknowledged(self, event: MessagesAcknowledged) -> None:
        for message in event.messages:
            if self._is_tracked(message):
                self._note(message, event.session.user, acknowledged_at=self.clock())

    def _is_tracked(self, message: Stanza) -> bool:
        """It was stored, or its sender wants to know; all else costs this look."""
        if message.kept:
            return True
        if not may_ask(message):
            return False
        asked = asks(message)
        message.forget_element()
        return asked

    @hook(MessagesRemoved, switched=True)
    def removed(self, event: MessagesRemoved) -> None:
        if event.messages is None:
            self._states.removed_all(event.user)
            return
        for message in event.messages:
            self._note(message, event.user, removed_at=self.clock())

    @hook(UserDeleted)
    async def forget(self, event: UserDeleted) -> None:
        if self.config.track:
            self._states.removed_all(event.user)
            await self._states.flush()
            await self._states.forget(event.user)

    # -- questions

    @iq("get", ns.DELIVERY, "query")
    async def query(self, request: IqRequest) -> bytes:
        """What became of one's own messages: of those that are named, or of all since a time."""
        if not request.is_own:
            raise StanzaError("forbidden", "what became of messages is their sender's business")
        if not self.config.track:
            raise StanzaError("feature-not-implemented", "no delivery states are kept")
        sender, when = bare(request.sender), since(request.payload)
        keys = asked_for(request.payload, sender)
        if bool(keys) is (when is not None):
            raise StanzaError("bad-request", "expected messages, or since")
        await self._states.flush()
        if when is None:
            return answer(await self._find(keys))
        found, go_on = await self._states.since(sender, when, limit=AT_ONCE)
        return answer(found, go_on)

    async def _find(self, keys: Iterable[Key]) -> list[State]:
        """In the order of the keys."""
        keys = list(keys)
        known = {(state.recipient, state.id): state for state in await self._states.find(keys)}
        found = (known.get((key.recipient.bare, key.id)) for key in keys)
        return [state for state in found if state is not None]

    @command(
        "message_state",
        args=(Arg("from"), Arg("to"), Arg("id")),
        result=Tuple("state", (string("state"), string("stamp"), string("reason"), *(string(name) for name in _TIMES))),
        tags=("offline",),
        scope="shared",
        doc="Tell what became of a message: its state, since when, why, and when it was accepted, stored, sent, "
        "acknowledged, received, displayed",
        reads=True,
    )
    async def message_state(self, from_: str, to: str, id: str) -> tuple[str, ...]:
        if not self.config.track:
            raise CommandError("no delivery states are kept: modules.offline_receipt.track is false")
        try:
            key = key_of(parse(from_), parse(to), id)
        except JidError as exc:
            raise CommandError(str(exc)) from exc
        if key is None:
            raise CommandError("a message is kept track of by its id, which is blank or too long")
        await self._states.flush()
        found = await self._find([key])
        if not found:
            raise CommandError(f"nothing is known of a message {id} from {key.sender} to {key.recipient}")
        (state,) = found
        times = ((stamp(at) if (at := state.times.get(f"{name}_at")) else "") for name in _TIMES)
        return (state.state, stamp(state.at), state.reason, *times)
