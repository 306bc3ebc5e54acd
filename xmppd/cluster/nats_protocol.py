"""The client protocol of NATS, without I/O: bytes of the server become events, our commands become bytes.

Lines end with CR LF, fields are divided by one space: `INFO {json}`, `MSG subject sid [reply] size` and as many bytes,
`HMSG subject sid [reply] size-of-headers size` likewise, `PING`, `PONG`, `+OK`, `-ERR 'text'`.
Source: https://docs.nats.io/reference/reference-protocols/nats-protocol
"""

import json
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

MAX_LINE: Final = 64 * 1024  # bytes; INFO names all servers of a cluster
MAX_PAYLOAD: Final = 64 * 1024 * 1024  # bytes; the most that a nats-server can be configured for
_SLACK: Final = 8 * 1024 * 1024  # bytes; what a server says itself, and what came by a route, may be above its limit
_USUAL_PAYLOAD: Final = 1024 * 1024
_HIGHEST: Final = 9_999_999_999  # number of a subscription
_VERSION_LINE: Final = b"NATS/1.0"

PING: Final = b"PING\r\n"
PONG: Final = b"PONG\r\n"


class NatsError(Exception):
    """The server refuses something, has gone, or says what is not NATS."""


class Message(NamedTuple):
    """What came to a subscription; not a dataclass since there is one for each packet."""

    sid: int
    subject: str
    reply: str  # the subject where an answer goes; "": nowhere
    data: bytes
    status: str = ""  # "503": nobody listens to what we have asked


@dataclass(frozen=True, slots=True)
class Info:
    """What the server says of itself."""

    max_payload: int = _USUAL_PAYLOAD  # bytes
    tls_required: bool = False
    tls_available: bool = False


@dataclass(frozen=True, slots=True)
class Ping:
    """The server wants a PONG."""


@dataclass(frozen=True, slots=True)
class Pong:
    """The answer to the oldest PING of ours."""


@dataclass(frozen=True, slots=True)
class Refused:
    """`-ERR`; the server closes the connection unless it is about a permission or a subject."""

    text: str


Event = Message | Info | Ping | Pong | Refused


class Parser:
    """What the server says, whatever the pieces in which it comes."""

    def __init__(self) -> None:
        self._kept: list[bytes] = []  # the beginning of something
        self._size = 0  # bytes in it
        self._need = 0  # nothing can be whole before there are so many
        self._longest = _USUAL_PAYLOAD + _SLACK

    @property
    def idle(self) -> bool:
        """Whether all that came has been used."""
        return not self._kept

    def receive(self, data: bytes) -> list[Event]:
        """The events that end in this piece. Raises `NatsError` for what is not NATS, or too long; that is the end."""
        if self._kept:
            self._kept.append(data)
            self._size += len(data)
            if self._size < self._need:
                return []
            data = b"".join(self._kept)
            self._kept.clear()
        events: list[Event] = []
        position, end = 0, len(data)
        while position < end:
            eol = data.find(b"\r\n", position, position + MAX_LINE)
            if eol < 0:
                if end - position >= MAX_LINE:
                    raise NatsError("the server sends a line without end")
                self._keep(data[position:], end - position + 1)
                break
            # A message is by far what comes most often, and without headers.
            plain = data.startswith(b"MSG ", position)
            if not plain and not data.startswith(b"HMSG ", position):
                events += self._line(data[position:eol])
                position = eol + 2
                continue
            fields = data[position + (4 if plain else 5) : eol].split(b" ")
            begin = eol + 2
            stop = begin + _number(fields[-1], self._longest)
            if stop + 2 > end:
                self._keep(data[position:], stop + 2 - position)
                break
            if not data.startswith(b"\r\n", stop):
                raise NatsError("the server sends a message of another length than it says")
            if not 3 <= len(fields) - (not plain) <= 4:
                raise NatsError("the server sends a message of another form")
            status = ""
            if not plain:
                headers = data[begin : begin + _number(fields.pop(-2), stop - begin)]
                begin, status = begin + len(headers), _status(headers)
            # Whoever may publish chooses the bytes of the subjects: no reason to think ill of the server.
            subject = str(fields[0], "utf-8", "replace")
            reply = str(fields[2], "utf-8", "replace") if len(fields) == 4 else ""
            events.append(Message(_number(fields[1], _HIGHEST), subject, reply, data[begin:stop], status))
            position = stop + 2
        return events

    def _keep(self, rest: bytes, need: int) -> None:
        self._kept.append(rest)
        self._size, self._need = len(rest), need

    def _line(self, line: bytes) -> list[Event]:
        verb, _, rest = line.partition(b" ")
        match verb.upper():
            case b"PING":
                return [Ping()]
            case b"PONG":
                return [Pong()]
            case b"INFO":
                info = _info(rest)
                self._longest = info.max_payload + _SLACK
                return [info]
            case b"-ERR":
                return [Refused(str(rest, "utf-8", "replace").strip(" \t'"))]
            case b"+OK":
                return []
        raise NatsError("the server does not speak NATS")


def _number(field: bytes, most: int) -> int:
    if not field.isdigit() or len(field) > 10:
        raise NatsError("the server sends a message without length or number")
    if (number := int(field)) > most:
        raise NatsError(f"the server sends {number} where {most} is the most")
    return number


def _status(headers: bytes) -> str:
    first = headers.partition(b"\r\n")[0].split()
    return str(first[1], "ascii", "replace") if len(first) > 1 and first[0] == _VERSION_LINE else ""


def _info(text: bytes) -> Info:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise NatsError("the server does not speak NATS")
    most = found.get("max_payload")
    return Info(
        min(most, MAX_PAYLOAD) if type(most) is int and most > 0 else _USUAL_PAYLOAD,
        found.get("tls_required") is True,
        found.get("tls_available") is True,
    )


def connect(name: str, user: str | None, password: str | None, token: str | None, *, tls: bool) -> bytes:
    """The first command, with the login."""
    options: dict[str, Any] = {
        "verbose": False,
        "pedantic": False,
        "lang": "xmppd",
        "version": "1",
        "protocol": 1,  # INFO may come at any time
        "name": name,
        "tls_required": tls,
        "headers": True,
        "no_responders": True,
    }
    options |= {} if user is None else {"user": user, "pass": password or ""}
    options |= {} if token is None else {"auth_token": token}
    return b"CONNECT %b\r\n" % json.dumps(options).encode()


def subscribe(sid: int, subject: str, queue: str) -> bytes:
    """Messages to the subject come with this number from now on."""
    return b"SUB %b %b%d\r\n" % (subject.encode(), b"%b " % queue.encode() if queue else b"", sid)


def unsubscribe(sid: int) -> bytes:
    """No more of them; some may be under way."""
    return b"UNSUB %d\r\n" % sid


def publish(subject: str, payload: bytes, reply: str = "") -> bytes:
    """A message; `reply` is where an answer is to go."""
    if reply:
        return b"PUB %b %b %d\r\n%b\r\n" % (subject.encode(), reply.encode(), len(payload), payload)
    return b"PUB %b %d\r\n%b\r\n" % (subject.encode(), len(payload), payload)
