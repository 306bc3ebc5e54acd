"""What a handler gives back: an answer, or a refusal in the form of ejabberd's HTTP API."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from aiohttp import web

TEXT: Final = "text/plain; charset=utf-8"
JSON: Final = "application/json"


@dataclass(frozen=True, slots=True)
class Answer:
    """`body` is bytes, or pieces that are sent one by one, of which there is at least one."""

    status: int
    body: bytes | Iterator[bytes] = b""
    content_type: str = JSON
    headers: Mapping[str, str] = field(default_factory=dict)


class Refused(Exception):
    """A request that is not carried out: an HTTP status, and a body of `status`, `code` and `message`."""

    def __init__(self, status: int, message: str, *, code: int | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = status if code is None else code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def answer(self) -> Answer:
        body: dict[str, Any] = {"status": "error", "code": self.code, "message": self.message}
        text = json.dumps(body, ensure_ascii=False) + "\n"
        return Answer(self.status, text.encode("utf-8", "replace"), headers=self.headers)


class Handler(Protocol):
    """Answers requests below one path. `rest` is what follows that path, without the slash between them."""

    name: str  # for metrics
    exact: bool  # nothing may follow the path

    async def __call__(self, request: web.BaseRequest, rest: str) -> Answer:
        """Raises Refused."""
        ...


def only_reads(request: web.BaseRequest) -> None:
    """Refuse every method but GET and HEAD."""
    if request.method not in ("GET", "HEAD"):
        raise Refused(405, "only GET and HEAD are answered here", Allow="GET, HEAD")
