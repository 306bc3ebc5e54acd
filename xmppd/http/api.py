"""`POST /api/NAME`: every command of the admin registry, with the arguments as JSON; docs/http-api.md describes it."""

import asyncio
import itertools
import json
from collections.abc import Iterator
from typing import Any, Final

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from xmppd.admin.nodes import NOT_REACHABLE, UNANSWERED, Nodes
from xmppd.admin.registry import USAGE, Call, Caller, Command, InternalError, Registry
from xmppd.admin.results import Result
from xmppd.errors import CommandError, StorageUnavailable
from xmppd.http.access import Access, Client, unauthorized
from xmppd.http.answers import Answer, Refused, only_reads
from xmppd.http.openapi import describe
from xmppd.log import get_logger

_log = get_logger("xmppd.http")

MAX_BODY: Final = 1 << 20
READ: Final = 10.0  # seconds for the body to arrive
DESCRIPTION: Final = "openapi.json"

# By exit code (docs/exit-codes.md); all other refusals are 400.
_STATUS: Final = {3: 503, 13: 404, 14: 409, 15: 503, UNANSWERED: 503}
# ejabberd's commands begin a refusal with these words.
_WORDS: Final = {"conflict": 409, "not_found": 404, "unknown virtual host": 404, "cannot_register: unknown": 404}


class Api:
    """Fulfils answers.Handler."""

    name = "api"
    exact = False

    def __init__(self, registry: Registry, access: Access, *, version: str, prefix: str, nodes: Nodes) -> None:
        self._registry = registry
        self._nodes = nodes
        self._access = access
        self._version = version
        self._prefix = prefix

    async def __call__(self, request: web.BaseRequest, rest: str) -> Answer:
        client = await self._access.identify(request)
        if client.token is None and "Origin" in request.headers:
            # a page in the browser of somebody near: the address is theirs, the wish is not
            raise unauthorized("a browser needs a token")
        if rest == DESCRIPTION:
            only_reads(request)
            return self._describe(client)
        command = self._registry.by_path(rest)
        if command is None or not self._access.may(client, command):
            raise self._refuse(client, command)
        if request.method != "POST":
            raise Refused(405, "commands are called with POST", Allow="POST")
        local, node = _asked(request)
        arguments, caller = await _arguments(request), Caller("http", str(client))
        if node is not None and node != self._nodes.name:
            return await self._elsewhere(node, command, arguments, caller, local=local)
        return await self._call(command, arguments, caller, local=local)

    def _refuse(self, client: Client, command: Command | None) -> Refused:
        if client.token is None and not self._access.may_anything(client):
            return unauthorized("this needs a token")
        if command is None:
            return Refused(404, "there is no such command")
        if client.token is None:
            return unauthorized(f"'{command.name}' needs a token")
        return Refused(403, f"the token '{client.token}' may not call '{command.name}'")

    def _describe(self, client: Client) -> Answer:
        if client.token is None and not self._access.may_anything(client):
            raise unauthorized("this needs a token")
        allowed = [command for command in self._registry.commands() if self._access.may(client, command)]
        document = describe(allowed, version=self._version, prefix=self._prefix)
        return Answer(200, json.dumps(document, ensure_ascii=False).encode() + b"\n")

    async def _call(self, command: Command, arguments: dict[str, Any], caller: Caller, *, local: bool) -> Answer:
        try:
            result = await self._registry.call(command.name, arguments, caller=caller, call=Call(caller, local=local))
        except CommandError as exc:
            raise _refusal(exc) from exc
        if result.notes:  # a part of an answer must not look like the whole
            raise _refusal(CommandError("; ".join(result.notes), result.code))
        return Answer(200, _pieces(result))

    async def _elsewhere(
        self, node: str, command: Command, arguments: dict[str, Any], caller: Caller, *, local: bool
    ) -> Answer:
        """What another node answers; the caller's rights here have been looked at."""
        if node not in self._nodes.names():
            raise Refused(404, f"no node called '{node:.80}' is up", code=NOT_REACHABLE)
        try:
            text = await self._nodes.fetch(node, command.name, arguments, caller, local=local)
        except CommandError as exc:
            raise _refusal(exc) from exc
        return Answer(200, text.encode("utf-8", "replace"))


def _pieces(result: Result) -> Iterator[bytes]:
    """The first piece is made here, so that what fails in it can still be told."""
    pieces = (piece.encode("utf-8", "replace") for piece in result.json_chunks())
    return itertools.chain([next(pieces)], pieces)


def _refusal(exc: CommandError) -> Refused:
    status = _STATUS.get(exc.code, 400)
    if isinstance(exc, InternalError):
        status = 500
    elif isinstance(exc.__cause__, StorageUnavailable):
        status = 503
    elif exc.code == 1:
        text = exc.text.lower()
        status = next((found for words, found in _WORDS.items() if text.startswith(words)), 400)
    return Refused(status, exc.text, code=exc.code)


def _asked(request: web.BaseRequest) -> tuple[bool, str | None]:
    """The query parameters: this node's part alone, and which node is to answer."""
    query = request.rel_url.query
    for name in query:
        if name not in ("local", "node"):
            raise Refused(400, "the query parameters are local and node; arguments go into the body", code=USAGE)
    values, nodes = query.getall("local", ["false"]), query.getall("node", [])
    if len(values) != 1 or values[0] not in ("true", "false"):
        raise Refused(400, "local is true or false", code=USAGE)
    if len(nodes) > 1:
        raise Refused(400, "node is one node's name", code=USAGE)
    return values[0] == "true", nodes[0] if nodes else None


async def _arguments(request: web.BaseRequest) -> dict[str, Any]:
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise Refused(415, "the body must not be compressed")
    body = await _body(request)
    if not body.strip():
        return {}
    if request.content_type != "application/json":
        raise Refused(415, "the arguments are a JSON object: Content-Type: application/json")
    try:
        arguments = json.loads(body.decode(), object_pairs_hook=_object, parse_constant=_no_number)
    except (ValueError, RecursionError):
        raise Refused(400, "the body is no JSON", code=USAGE) from None
    if not isinstance(arguments, dict):
        raise Refused(400, "the arguments are a JSON object", code=USAGE)
    return arguments


async def _body(request: web.BaseRequest) -> bytes:
    too_large = f"the body may have {MAX_BODY} bytes"
    if (request.content_length or 0) > MAX_BODY:
        raise Refused(413, too_large)
    if request.headers.get("Expect", "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    try:
        async with asyncio.timeout(READ):
            return await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise Refused(413, too_large) from None
    except TimeoutError:
        raise Refused(408, f"the body took more than {READ:g} s", Connection="close") from None
    except (web.RequestPayloadError, HttpProcessingError):
        raise Refused(400, "the body is cut off or malformed", code=USAGE) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no JSON")
