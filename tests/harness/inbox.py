"""What a client has received, in the words of XMPP; shared by the slixmpp client and the raw one."""

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from xml.etree.ElementTree import Element, tostring
from xml.sax.saxutils import escape, quoteattr

PATIENCE = 30.0  # seconds; what is waited for comes in milliseconds, unless the machine is busy
CLIENT = "{jabber:client}"
STREAMS = "{http://etherx.jabber.org/streams}"
STREAM_ERRORS = "{urn:ietf:params:xml:ns:xmpp-streams}"
STANZA_ERRORS = "{urn:ietf:params:xml:ns:xmpp-stanzas}"
DELAY = "{urn:xmpp:delay}delay"
_ids = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Delay:
    sender: str
    stamp: str


class Got:
    """One element that came from the server."""

    def __init__(self, xml: Element) -> None:
        self.xml = xml
        self.name = xml.tag.rpartition("}")[2]
        self.id = xml.get("id", "")
        self.to = xml.get("to", "")
        self.sender = xml.get("from", "")
        self.type = xml.get("type", {"message": "normal", "presence": "available"}.get(self.name, ""))

    @property
    def is_stanza(self) -> bool:
        return self.xml.tag in (f"{CLIENT}message", f"{CLIENT}presence", f"{CLIENT}iq")

    @property
    def body(self) -> str | None:
        return self.xml.findtext(f"{CLIENT}body")

    @property
    def delay(self) -> Delay:
        found = self.xml.find(DELAY)
        assert found is not None, f"no delay in {self}"
        return Delay(found.get("from", ""), found.get("stamp", ""))

    @property
    def is_delayed(self) -> bool:
        return self.xml.find(DELAY) is not None

    @property
    def condition(self) -> str:
        """Of an error stanza or a stream error."""
        namespace = STREAM_ERRORS if self.xml.tag == f"{STREAMS}error" else STANZA_ERRORS
        error = self.xml if self.xml.tag == f"{STREAMS}error" else self.xml.find(f"{CLIENT}error")
        assert error is not None, f"no error: {self}"
        return next(child.tag[len(namespace) :] for child in error if child.tag.startswith(namespace))

    @property
    def error_type(self) -> str:
        error = self.xml.find(f"{CLIENT}error")
        assert error is not None, f"no error: {self}"
        return error.get("type", "")

    def child(self, namespace: str, name: str = "*") -> Element | None:
        return self.xml.find(f"{{{namespace}}}{name}")

    @property
    def payload(self) -> Element:
        return self.xml[0]

    def __repr__(self) -> str:
        return tostring(self.xml, encoding="unicode")


class Inbox:
    """A client as the tests see it: whatever carries it fills `_arrive` and `_lost`, and has `send_raw`."""

    jid = ""  # full, once bound

    def __init__(self) -> None:
        self._inbox: list[Got] = []
        self._changed = asyncio.Event()
        self.is_over = False  # the connection is gone

    def send_raw(self, data: str | bytes) -> None:
        raise NotImplementedError

    def _arrive(self, element: Element) -> None:
        self._inbox.append(Got(element))
        self._changed.set()

    def _lost(self) -> None:
        self.is_over = True
        self._changed.set()

    # -- what has come

    async def wait_for(self, wanted: Callable[[Got], bool], what: str = "that") -> Got:
        """Take the first thing of a kind out of the inbox, waiting for it if need be."""

        async def look() -> Got:
            while True:
                for index, got in enumerate(self._inbox):
                    if wanted(got):
                        return self._inbox.pop(index)
                assert not self.is_over, f"{self.jid or 'the client'} lost its connection; {what} did not come"
                self._changed.clear()
                await self._changed.wait()

        try:
            return await asyncio.wait_for(look(), PATIENCE)
        except TimeoutError:
            raise AssertionError(f"{self.jid}: {what} did not come; there is {self._inbox}") from None

    async def next_stanza(self, name: str | None = None) -> Got:
        """The next stanza, or the next of that name."""
        return await self.wait_for(lambda got: got.is_stanza and name in (None, got.name), name or "a stanza")

    async def next_message(self) -> Got:
        return await self.next_stanza("message")

    async def next_presence(self) -> Got:
        return await self.next_stanza("presence")

    async def expect_nothing(self) -> None:
        """Nothing is waiting, and nothing was under way when this was called: the server answers in order."""
        await self.sync()
        assert self._inbox == []

    def forget(self, wanted: Callable[[Got], bool] = lambda got: True) -> list[Got]:
        """Take out what has come so far."""
        taken = [got for got in self._inbox if wanted(got)]
        self._inbox = [got for got in self._inbox if not wanted(got)]
        return taken

    async def assert_stream_error(self, condition: str) -> Got:
        """The server ends the stream with this error, and closes."""
        error = await self.wait_for(lambda got: got.xml.tag == f"{STREAMS}error", "a stream error")
        assert error.condition == condition, error
        await self.assert_closed()
        return error

    async def assert_closed(self) -> None:
        async def closed() -> None:
            while not self.is_over:
                self._changed.clear()
                await self._changed.wait()

        await asyncio.wait_for(closed(), PATIENCE)

    # -- what is sent

    def send_message(
        self, to: str | None, body: str | None = None, *, type: str = "chat", inner: str = "", **more: Any
    ) -> str:
        """Send a message; its id."""
        id = more.pop("id", None) or f"m{next(_ids)}"
        text = f"<body>{escape(body)}</body>" if body is not None else ""
        self.send_raw(f"<message{attributes(to=to, type=type, id=id, **more)}>{text}{inner}</message>")
        return str(id)

    def send_presence(
        self, to: str | None = None, *, type: str | None = None, priority: int | None = None, inner: str = ""
    ) -> None:
        if priority is not None:
            inner += f"<priority>{priority}</priority>"
        self.send_raw(f"<presence{attributes(to=to, type=type)}>{inner}</presence>")

    async def ask(self, type: str, inner: str, to: str | None = None) -> Got:
        """Send an IQ request and wait for its result or error."""
        id = f"q{next(_ids)}"
        self.send_raw(f"<iq{attributes(to=to, type=type, id=id)}>{inner}</iq>")
        return await self.wait_for(
            lambda got: got.name == "iq" and got.id == id and got.type in ("result", "error"), f"the answer to {inner}"
        )

    async def query(self, type: str, inner: str, to: str | None = None) -> Got:
        """The same, but it must succeed."""
        answer = await self.ask(type, inner, to)
        assert answer.type == "result", answer
        return answer

    async def refusal(self, type: str, inner: str, to: str | None = None) -> str:
        """The same, but it must fail; the condition."""
        answer = await self.ask(type, inner, to)
        assert answer.type == "error", answer
        return answer.condition

    async def sync(self) -> None:
        """A round trip: the server has dealt with everything sent, and everything it had written has come."""
        await self.ask("get", "<ping xmlns='urn:xmpp:ping'/>", to=self.jid.partition("@")[2].partition("/")[0])

    async def become_available(self, priority: int | None = None) -> None:
        self.send_presence(priority=priority)
        await self.sync()
        own = self.jid.partition("/")[0]
        self.forget(lambda got: got.name == "presence" and got.sender.partition("/")[0] == own)


def attributes(**values: Any) -> str:
    return "".join(
        f" {name.rstrip('_').replace('xml_', 'xml:')}={quoteattr(str(value))}"
        for name, value in values.items()
        if value is not None
    )
