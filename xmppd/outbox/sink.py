"""A web server as a sink: what the node knows of it. The requests are made in a process of their own (xmppd/sender)."""

from collections.abc import Callable
from urllib.parse import urlsplit

from xmppd.outbox.line import Item
from xmppd.outbox.process import Body, Sender
from xmppd.sender.target import Answer, HttpTarget


class HttpSink:
    """Requests to one URL over a few connections that are kept open. `Outbox.add_sink` says through whom."""

    def __init__(self, target: HttpTarget, *, connections: int) -> None:
        self.target = target
        self._connections = connections
        self._sender: Sender | None = None
        self._number = 0

    def check(self) -> None:
        """Raises OSError, ssl.SSLError or ValueError where certificates cannot be used."""
        self.target.tls()

    def through(self, sender: Sender) -> None:
        """Whose process makes the requests; before `open`."""
        self._sender = sender

    async def open(self) -> None:
        assert self._sender is not None
        self._number = await self._sender.open(self.target, self._connections)

    async def close(self) -> None:
        """Requests under way are forgotten."""
        assert self._sender is not None
        await self._sender.close(self._number)

    def begin(self, requests: list[list[Item]], ended: Callable[[list[Item], Answer], None]) -> None:
        """Requests that are made one after the other, up to the first that has to be repeated; several events in one
        only where the target is batched. `ended` is called with each and what became of it, in order."""
        assert self._sender is not None
        chain: list[tuple[list[Item], Body]] = []
        for items in requests:
            first = items[0].event
            payload = first.payload
            if self.target.batched:
                payload = b"".join([item.event.payload + b"\n" for item in items])
            chain.append((items, (first.id, first.headers, payload)))
        self._sender.send(self._number, chain, ended)


def wrong_with(url: str | None) -> str:
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
