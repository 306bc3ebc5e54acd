"""The HTTP side: one request, and what its answer means."""

import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Final, Literal
from urllib.parse import urlsplit

import aiohttp

from xmppd.outbox.event import Event, ulid
from xmppd.outbox.signature import HEADER, sign

_RETRIED: Final = frozenset({408, 425, 429})
_ANSWER: Final = 64 << 10  # bytes of an answer that are read so that the connection can be used again
_OURS: Final = ("User-Agent", "Accept", "Accept-Encoding", "Content-Type")  # not sent unless an event asks for it


@dataclass(frozen=True, slots=True)
class HttpTarget:
    """Where events go. Times in seconds."""

    url: str
    timeout: float = 30.0
    connect_timeout: float = 10.0
    secrets: tuple[str, ...] = ()  # sign with each of these
    verify: bool = True  # the server's certificate
    cafile: str | None = None
    certfile: str | None = None  # our own, with its key, for mutual TLS
    batched: bool = False  # several events in one request, a line each
    retry_4xx: bool = False  # else an answer that refuses ends the event


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a request."""

    verdict: Literal["done", "retry", "dead"]
    reason: str = ""
    not_before: float = 0.0  # seconds to wait at least (`Retry-After`)


DONE: Final = Answer("done")


class HttpSink:
    """Requests to one URL over a few connections that are kept open. `open` before the first one."""

    def __init__(self, target: HttpTarget, *, connections: int) -> None:
        self.target = target
        self._connections = connections
        self._session: aiohttp.ClientSession | None = None

    def check(self) -> None:
        """Raises OSError, ssl.SSLError or ValueError where certificates cannot be used."""
        self._tls()

    def _tls(self) -> ssl.SSLContext | bool:
        target = self.target
        if not target.url.startswith("https:"):
            return True
        context = ssl.create_default_context(cafile=target.cafile)
        if not target.verify:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        if target.certfile is not None:
            context.load_cert_chain(target.certfile)
        return context

    async def open(self) -> None:
        target = self.target
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._connections, ssl=self._tls(), keepalive_timeout=30),
            timeout=aiohttp.ClientTimeout(total=target.timeout, connect=target.connect_timeout),
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=_OURS,
        )

    async def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def send(self, events: Sequence[Event]) -> Answer:
        """One request; several events only where the target is batched. Never raises but when cancelled."""
        assert self._session is not None
        first = events[0]
        body = first.payload if not self.target.batched else b"".join(event.payload + b"\n" for event in events)
        headers = [*first.headers, ("Idempotency-Key", ulid(first.id))]
        if self.target.secrets:
            headers.append((HEADER, sign(self.target.secrets, body, time.time())))
        try:
            async with self._session.post(
                self.target.url, data=body, headers=headers, allow_redirects=False
            ) as response:
                await response.content.read(_ANSWER)
                return self._judge(response)
        except TimeoutError:
            return Answer("retry", "no answer in time")
        except (aiohttp.ClientError, OSError) as exc:
            return Answer("retry", f"{type(exc).__name__}: {exc}"[:200])
        except ValueError as exc:  # a header that cannot be written: no other attempt would go better
            return Answer("dead", f"cannot be sent: {exc}"[:200])

    def _judge(self, response: aiohttp.ClientResponse) -> Answer:
        status = response.status
        if 200 <= status < 300:
            return DONE
        reason = f"HTTP {status}"
        if status >= 500 or status in _RETRIED or (status >= 400 and self.target.retry_4xx):
            return Answer("retry", reason, retry_after(response.headers.get("Retry-After", ""), time.time()))
        return Answer("dead", f"{reason}, redirects are not followed" if 300 <= status < 400 else reason)


def retry_after(value: str, now: float) -> float:
    """Seconds out of a `Retry-After` (RFC 9110 10.2.3), at most a day; 0 where it says nothing we understand."""
    text = value.strip()
    if text.isascii() and text.isdigit():
        return min(float(text[:9]), 86400.0)
    try:
        when = parsedate_to_datetime(text).timestamp()
    except (ValueError, TypeError, OverflowError):
        return 0.0
    return min(max(0.0, when - now), 86400.0)


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
