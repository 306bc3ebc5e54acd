"""An XML stream over plain TCP, as cheap as it can be: thousands of messages a second fit one core.

A `Stream` negotiates as a coroutine; from `start` on, everything that comes goes to its `Owner` in one call each.
"""

import asyncio
import base64
import hashlib
import hmac
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol, cast
from xml.parsers import expat

SM: Final = "urn:xmpp:sm:3"
_SASL: Final = "urn:ietf:params:xml:ns:xmpp-sasl"
_BIND: Final = "urn:ietf:params:xml:ns:xmpp-bind"
_RESET: Final = struct.pack("ii", 1, 0)  # SO_LINGER: a close sends RST


class Refused(Exception):
    """The server said no, or went away."""


@dataclass(slots=True)
class Got:
    """An element below the stream's root. `body`: the text of a message's body."""

    tag: str  # "namespace name"
    attributes: dict[str, str]
    text: str = ""
    body: str | None = None
    children: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.tag.rpartition(" ")[2]


class Owner(Protocol):
    def arrived(self, got: Got) -> None: ...

    def over(self) -> None:
        """The connection is gone."""


class Stream(asyncio.Protocol):
    """`await Stream.open(port, owner)`, `authenticate`, then `bind` or `resume`, then `start`."""

    def __init__(self, owner: Owner) -> None:
        self.owner = owner
        self.last_heard = 0.0
        self.lost = False
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._inbox: asyncio.Queue[Got | None] = asyncio.Queue()
        self._started = False
        self._parse: Callable[[bytes, bool], object]
        self._new_parser()

    @classmethod
    async def open(cls, port: int, owner: Owner) -> "Stream":
        """Raises OSError."""
        _, stream = await asyncio.get_running_loop().create_connection(lambda: cls(owner), "127.0.0.1", port)
        return stream

    # -- negotiation

    async def authenticate(self, user: str, password: str, salted: dict[str, bytes]) -> None:
        """SCRAM-SHA-1 (RFC 5802); `salted` remembers what is dear. Raises Refused."""
        await self._begin()
        nonce = base64.b64encode(os.urandom(15)).decode()
        first = f"n={user},r={nonce}"
        self.write(f"<auth xmlns='{_SASL}' mechanism='SCRAM-SHA-1'>{_b64(f'n,,{first}'.encode())}</auth>")
        challenge = base64.b64decode((await self._next("challenge")).text).decode()
        parts = dict(part.split("=", 1) for part in challenge.split(","))
        if (key := salted.get(challenge.partition(",s=")[2])) is None:
            key = hashlib.pbkdf2_hmac("sha1", password.encode(), base64.b64decode(parts["s"]), int(parts["i"]))
            salted[challenge.partition(",s=")[2]] = key
        client_key = hmac.digest(key, b"Client Key", "sha1")
        last = f"c=biws,r={parts['r']}"
        signed = f"{first},{challenge},{last}".encode()
        signature = hmac.digest(hashlib.sha1(client_key).digest(), signed, "sha1")
        proof = bytes(one ^ other for one, other in zip(client_key, signature, strict=True))
        self.write(f"<response xmlns='{_SASL}'>{_b64(f'{last},p={_b64(proof)}'.encode())}</response>")
        await self._next("success")
        await self._begin()

    async def bind(self, resource: str) -> None:
        wanted = f"<bind xmlns='{_BIND}'><resource>{resource}</resource></bind>"
        self.write(f"<iq type='set' id='bind'>{wanted}</iq>")
        answer = await self._next("iq")
        if answer.attributes.get("type") != "result":
            raise Refused(f"bind: {answer.attributes}")

    async def enable(self, max: int) -> Got:
        self.write(f"<enable xmlns='{SM}' resume='true' max='{max}'/>")
        return await self._next("enabled")

    async def resume(self, id: str, h: int) -> Got:
        """<resumed/> or <failed/>."""
        self.write(f"<resume xmlns='{SM}' previd='{id}' h='{h}'/>")
        return await self._next("resumed", "failed")

    def start(self) -> None:
        """From now on the owner gets everything."""
        self._started = True
        while not self._inbox.empty():
            got = self._inbox.get_nowait()
            if got is not None and not self.lost:
                self.owner.arrived(got)

    async def _begin(self) -> None:
        self._new_parser()
        self.write(
            "<stream:stream to='localhost' version='1.0' xmlns='jabber:client' "
            "xmlns:stream='http://etherx.jabber.org/streams'>"
        )
        await self._next("features")

    async def _next(self, *names: str) -> Got:
        got = await self._inbox.get()
        if got is None:
            raise Refused("the connection is gone")
        if got.name not in names:
            raise Refused(f"expected {names}, got {got.name} {got.children}")
        return got

    # -- the connection

    def write(self, xml: str) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(xml.encode())

    def pause(self) -> None:
        """Take nothing more from the server, for now."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def go_on(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def take_rest(self) -> None:
        """What this machine has already got, for a client that cannot say what it has not handled."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        transport.pause_reading()
        number = transport.get_extra_info("socket").fileno()
        try:
            while data := os.read(number, 65536):
                self.data_received(data)
        except OSError:
            return  # there is no more

    def reset(self) -> None:
        """As when a machine forgets its connections."""
        if self._transport is not None and not self.lost:
            self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self._transport.abort()
            self._gone()

    def close(self) -> None:
        """In order. The server's end of it comes after what it still has to say."""
        self.write("</stream:stream>")

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none of asyncio's
        self.last_heard = self._loop.time()

    def data_received(self, data: bytes) -> None:
        self.last_heard = self._loop.time()
        if not self.lost:
            try:
                self._parse(data, False)
            except expat.ExpatError:
                self.reset()

    def connection_lost(self, exc: Exception | None) -> None:
        self._gone()

    def _gone(self) -> None:
        if not self.lost:
            self.lost = True
            self._inbox.put_nowait(None)
            self.owner.over()

    # -- XML

    def _new_parser(self) -> None:
        parser = expat.ParserCreate(namespace_separator=" ")
        parser.buffer_text = True
        depth, got, text = 0, Got("", {}), ""

        def start(tag: str, attributes: dict[str, str]) -> None:
            nonlocal depth, got, text
            depth += 1
            if depth == 2:
                got = Got(tag, attributes)
            elif depth == 3:
                got.children.append(tag)
            text = ""

        def characters(data: str) -> None:
            nonlocal text
            text += data

        def end(tag: str) -> None:
            nonlocal depth
            depth -= 1
            if depth == 2 and tag == "jabber:client body":
                got.body = text
            elif depth == 1:
                got.text = text
                self._arrive(got)
            elif depth == 0:
                self.reset()

        parser.StartElementHandler, parser.EndElementHandler = start, end
        parser.CharacterDataHandler = characters
        self._parse = parser.Parse

    def _arrive(self, got: Got) -> None:
        if self.lost:
            return
        if self._started:
            self.owner.arrived(got)
        else:
            self._inbox.put_nowait(got)


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()
