"""Bearer tokens of the HTTP API: kept as SHA-256 in the database, so that every node knows them; shown once.

A token is 32 random bytes, so a fast hash is enough: there is nothing to guess. What it may do stands with it (`what`)
and in `api_permissions` of the configuration, which can also list tokens of its own (`api_tokens`).
"""

import hashlib
import json
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from hmac import compare_digest
from typing import Final

from sqlalchemy import delete, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from xmppd.admin.registry import Arg, command
from xmppd.admin.results import List, Rescode, Restuple, Tuple, string
from xmppd.config.api import GUARDED_TAG, pattern, token_name
from xmppd.errors import CommandError, StorageUnavailable
from xmppd.log import get_logger
from xmppd.storage import Duplicate, Storage
from xmppd.storage.tables import setting

log = get_logger("admin")

_PREFIX: Final = "api_token:"
_BEHIND: Final = "api_token;"  # the next character: what lies between the two begins with the prefix
_MARK: Final = "xmppd_"  # tells people, and programs that look for leaked secrets, what they have found
_FRESH: Final = 5.0  # seconds until what another node created or revoked is seen here
_AGAIN: Final = 1.0  # seconds at least between two look-ups because of tokens nobody knows
_STALE: Final = 60.0  # seconds for which known tokens hold while the database is away


@dataclass(frozen=True, slots=True)
class Token:
    """A token without its secret."""

    name: str
    digest: bytes  # SHA-256
    what: tuple[str, ...] = ()  # besides what `api_permissions` says
    created_at: float | None = None  # None: it stands in the configuration


def digest_of(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()


class ApiTokens:
    """All tokens: those of the configuration and those in the database."""

    def __init__(
        self,
        storage: Storage,
        configured: Callable[[], Mapping[str, bytes]],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`configured` gives name -> SHA-256 as the configuration has them now; `clock` any seconds."""
        self._storage = storage
        self._configured = configured
        self._clock = clock
        self._stored: tuple[Token, ...] = ()
        self._looked_at = float("-inf")

    async def find(self, secret: str) -> Token | None:
        """The token this is, compared in a time that does not depend on how near a guess comes.

        Raises StorageUnavailable where the database is away and the token is not among those known of late.
        """
        digest = digest_of(secret)
        found = _match(self._of_config(), digest)
        if found is not None:
            return found
        if self._clock() - self._looked_at < _FRESH:
            found = _match(self._stored, digest)
            if found is not None or self._clock() - self._looked_at < _AGAIN:
                return found
        try:
            await self._look()
        except StorageUnavailable:
            found = _match(self._stored, digest)
            if found is None or self._clock() - self._looked_at > _STALE:
                raise
            return found
        return _match(self._stored, digest)

    async def all(self) -> list[Token]:
        """Every token, sorted by name."""
        await self._look()
        return sorted((*self._of_config(), *self._stored), key=lambda token: token.name)

    async def create(self, name: str, what: tuple[str, ...]) -> str:
        """A new token; CommandError where the name is taken."""
        taken = f"conflict: there is a token called '{name}'; revoke it first"
        if name in self._configured():
            raise CommandError(taken)
        secret = _MARK + secrets.token_urlsafe(32)
        value = json.dumps({"sha256": digest_of(secret).hex(), "what": what, "created_at": time.time()}).encode()

        async def work(connection: AsyncConnection) -> None:
            await connection.execute(insert(setting).values(name=_PREFIX + name, value=value))

        try:
            await self._storage.run(work)
        except Duplicate as exc:
            raise CommandError(taken) from exc
        self._looked_at = float("-inf")
        return secret

    async def revoke(self, name: str) -> bool:
        """False: there is no such token in the database. Other nodes follow within seconds."""

        async def work(connection: AsyncConnection) -> int:
            return (await connection.execute(delete(setting).where(setting.c.name == _PREFIX + name))).rowcount

        gone = await self._storage.run(work, repeatable=True) > 0
        self._stored = tuple(token for token in self._stored if token.name != name)
        self._looked_at = float("-inf")
        return gone

    def _of_config(self) -> tuple[Token, ...]:
        return tuple(Token(name, digest) for name, digest in self._configured().items())

    async def _look(self) -> None:
        query = select(setting.c.name, setting.c.value).where(setting.c.name >= _PREFIX, setting.c.name < _BEHIND)

        async def work(connection: AsyncConnection) -> list[tuple[str, bytes]]:
            return [(row.name, row.value) for row in await connection.execute(query)]

        rows = await self._storage.read(work)
        found = [_token(name.removeprefix(_PREFIX), value) for name, value in rows]
        self._stored = tuple(token for token in found if token is not None)
        self._looked_at = self._clock()


def _match(tokens: tuple[Token, ...], digest: bytes) -> Token | None:
    found = None
    for token in tokens:  # all of them, always
        if compare_digest(token.digest, digest):
            found = token
    return found


def _token(name: str, value: bytes) -> Token | None:
    try:
        data = json.loads(value)
        return Token(name, bytes.fromhex(data["sha256"]), tuple(map(str, data["what"])), float(data["created_at"]))
    except (ValueError, KeyError, TypeError) as exc:
        log.error("api token in the database is damaged", token=name, error=exc)
        return None


class ApiTokenCommands:
    def __init__(self, tokens: ApiTokens) -> None:
        self._tokens = tokens

    @command(
        "api_token create",
        args=(Arg("name"), Arg("what", "list", optional=True)),
        result=Restuple(),
        tags=(GUARDED_TAG,),
        scope="shared",
        doc="Make a token for the HTTP API and print it, this once. What it may do: commands, patterns or [tag:NAME],"
        " separated by commas, each refused if behind !; without any, only what api_permissions says of its name",
    )
    async def create(self, name: str, what: "list[str] | None" = None) -> str:
        try:
            return await self._tokens.create(token_name(name), tuple(pattern(entry.strip()) for entry in what or ()))
        except ValueError as exc:
            raise CommandError(f"api_token: {exc}", 2) from exc

    @command(
        "api_token list",
        result=List("tokens", Tuple("token", (string("name"), string("what"), string("created")))),
        tags=(GUARDED_TAG,),
        reads=True,
        scope="shared",
        doc="List the tokens of the HTTP API: name, what it may do by itself, when it was made",
    )
    async def list_all(self) -> "list[tuple[str, str, str]]":
        return [(token.name, ",".join(token.what), _when(token.created_at)) for token in await self._tokens.all()]

    @command(
        "api_token revoke",
        args=(Arg("name"),),
        result=Rescode(),
        tags=(GUARDED_TAG,),
        scope="shared",
        doc="Make a token of the HTTP API void; other nodes follow within seconds",
    )
    async def revoke(self, name: str) -> None:
        if not await self._tokens.revoke(name):
            raise CommandError(f"not_found: there is no token called '{name}' in the database")


def _when(created_at: float | None) -> str:
    if created_at is None:
        return "configuration"
    return datetime.fromtimestamp(created_at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
