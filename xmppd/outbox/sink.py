"""A web server as a sink: what the node knows of it. The requests are made in a process of their own (xmppd/sender)."""

from collections.abc import Callable
from urllib.parse import urlsplit

from xmppd.outbox.line import Item
from xmppd.outbox.process import Sender
from xmppd.sender.frames import Body
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

    def begin(self, items: list[Item], ended: Callable[[list[Item], Answer], None]) -> None:
        """A request with all of them, where the target is batched; else a request for each, one after the other, up to
        the first that has to be repeated. `ended` is called with the items of each and what became of it, in order."""
        sender, target = self._sender, self.target
        assert sender is not None
        if target.batched:
            first = items[0].event
            payload = b"".join([item.event.payload + b"\n" for item in items])
            sender.send(self._number, [(items, (first.id, first.headers, payload))], ended)
            return
        chain: list[tuple[list[Item], Body]] = []
        for item in items:
            event = item.event
            if event.raw is not None and target.form is not None:
                chain.append(([item], (event.id, None, event.raw)))
            else:
                chain.append(([item], (event.id, *event.made())))
        sender.send(self._number, chain, ended)


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
