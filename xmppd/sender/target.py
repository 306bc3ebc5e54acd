"""Where requests go, and what their answers mean. No I/O."""

import ssl
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Final, Literal

from xmppd.sender.forms import Form

_RETRIED: Final = frozenset({408, 425, 429})
_CROCKFORD: Final = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


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
    form: Form | None = None  # of events that are not made yet

    def tls(self) -> ssl.SSLContext | bool:
        """Raises OSError, ssl.SSLError or ValueError where certificates cannot be used."""
        if not self.url.startswith("https:"):
            return True
        context = ssl.create_default_context(cafile=self.cafile)
        if not self.verify:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        if self.certfile is not None:
            context.load_cert_chain(self.certfile)
        return context


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a request. `untried`: nobody has made it, and it may be made at once. `lost`: the process that
    made it has died, which says nothing of the sink."""

    verdict: Literal["done", "retry", "dead", "untried", "lost"]
    reason: str = ""
    not_before: float = 0.0  # seconds to wait at least (`Retry-After`)


DONE: Final = Answer("done")
UNTRIED: Final = Answer("untried")


def judge(target: HttpTarget, status: int, retry: str, now: float) -> Answer:
    """By the status of an answer and its `Retry-After`."""
    if 200 <= status < 300:
        return DONE
    reason = f"HTTP {status}"
    if status >= 500 or status in _RETRIED or (status >= 400 and target.retry_4xx):
        return Answer("retry", reason, retry_after(retry, now))
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


def ulid(row_id: bytes) -> str:
    """16 bytes as 26 letters and digits that sort as they do; the first 48 bits are milliseconds since 1970."""
    number = int.from_bytes(row_id, "big")
    return "".join(_CROCKFORD[number >> shift & 31] for shift in range(125, -1, -5))
