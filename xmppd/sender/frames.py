"""What a node and its sender say to each other: frames of a length, a kind and a body. No I/O.

Requests are many and cross in one direction: `marshal`, as both ends are the same Python and one has started the other.
What comes back is JSON, since the sender reads what strangers send.
"""

import json
import marshal
import struct
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any, Final

from xmppd.sender.forms import Form, Headers
from xmppd.sender.target import DONE, Answer, HttpTarget

OPEN: Final = b"O"  # a sink: its number, its connections, its target
CLOSE: Final = b"C"  # its number
SEND: Final = b"S"  # chains of requests
ANSWER: Final = b"A"  # what became of some

_HEAD: Final = struct.Struct("!Ic")
_LONGEST: Final = 256 << 20  # bytes; what is longer has lost its place

# The key of an event, headers and body; or None, and what the target's form makes them of (`Raw`).
Body = tuple[bytes, Headers | None, Any]
# The number of the request, and these.
Request = tuple[int, bytes, Headers | None, Any]
# The number of the sink, and requests that are made one after the other, up to the first that has to be repeated.
Chain = tuple[int, list[Request]]


class BadFrame(ValueError):
    """What has come is no frame."""


def frame(kind: bytes, body: bytes) -> bytes:
    return _HEAD.pack(len(body), kind) + body


def opening(number: int, connections: int, target: HttpTarget) -> bytes:
    return frame(OPEN, json.dumps([number, connections, asdict(target)]).encode())


def opened(body: bytes) -> tuple[int, int, HttpTarget]:
    number, connections, target = json.loads(body)
    form = target.pop("form")
    if form is not None:
        headers = tuple((name, value) for name, value in form.pop("headers"))
        form = Form(headers, **form)
    return number, connections, HttpTarget(**{**target, "secrets": tuple(target["secrets"])}, form=form)


def closing(number: int) -> bytes:
    return frame(CLOSE, str(number).encode())


def sending(chains: list[Chain]) -> bytes:
    return frame(SEND, marshal.dumps(chains))


def sent(body: bytes) -> list[Chain]:
    chains: list[Chain] = marshal.loads(body)
    return chains


def answering(answers: Iterable[tuple[int, Answer]]) -> bytes:
    """In order; of what is done the number says all."""
    said: list[Any] = []
    for number, answer in answers:
        done = answer is DONE
        said.append(number if done else [number, answer.verdict, answer.reason, answer.not_before])
    return frame(ANSWER, json.dumps(said).encode())


def answered(body: bytes) -> Iterator[tuple[int, Answer]]:
    for said in json.loads(body):
        yield (said, DONE) if isinstance(said, int) else (said[0], Answer(*said[1:]))


class Frames:
    """Cuts what comes into frames."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Kind and body of each that is whole; BadFrame."""
        rest = self._rest
        rest += data
        place = 0
        while len(rest) - place >= _HEAD.size:
            length, kind = _HEAD.unpack_from(rest, place)
            if length > _LONGEST:
                raise BadFrame(f"a frame of {length} bytes")
            end = place + _HEAD.size + length
            if len(rest) < end:
                break
            yield kind, bytes(rest[place + _HEAD.size : end])
            place = end
        del rest[:place]
