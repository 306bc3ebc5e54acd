"""Writes all accounts of some hosts into files (XEP-0227): one for each host, and one that includes them."""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

from lxml import etree

from xmppd.errors import StanzaError, StorageError
from xmppd.events import UserExporting
from xmppd.hooks import Hooks
from xmppd.log import get_logger
from xmppd.piefxis.credentials import credentials_xml
from xmppd.piefxis.report import Problems
from xmppd.protocol import ns
from xmppd.protocol.jid import make
from xmppd.protocol.libxml import read
from xmppd.protocol.sasl import KINDS

log = get_logger("piefxis")

Progress = Callable[[str], Awaitable[None]]
_AT_ONCE: Final = 50  # accounts that are read at the same time
_BUFFER: Final = 1 << 20
_HEAD: Final = b"<?xml version='1.0' encoding='UTF-8'?>\n"
_SPACES: Final = f"xmlns='{ns.PIE}' xmlns:xi='{ns.XINCLUDE}'".encode()


class Account(Protocol):
    @property
    def secrets(self) -> Any: ...


class Accounts(Protocol):
    """xmppd.storage.Accounts. Everything raises StorageUnavailable."""

    async def get(self, host: str, username: str) -> Account | None: ...
    async def names(self, host: str, *, limit: int | None = None, after: str | None = None) -> list[str]: ...


@dataclass(slots=True)
class Exported:
    file: Path  # the one that includes the others
    accounts: int = 0
    problems: Problems = field(default_factory=Problems)


class Exporter:
    def __init__(self, accounts: Accounts, hooks: Hooks, clock: Callable[[], float] = time.time) -> None:
        self._accounts = accounts
        self._hooks = hooks
        self._clock = clock

    async def export(self, folder: Path, hosts: Sequence[str], progress: Progress) -> Exported:
        """Into new files with mode 0600, which are there when they are whole. Raises OSError, StorageError."""
        stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime(self._clock()))
        done = Exported(folder / f"{stamp}.xml")
        files = []
        for host in hosts:
            file = folder / f"{stamp}_{quote(host, safe='')}.xml"
            async with _new_file(file) as out:
                out.write(_HEAD + b"<host " + _SPACES + b" jid=" + quoteattr(host).encode() + b">\n")
                await self._write_users(out, host, done, progress)
                out.write(b"</host>\n")
            files.append(file)
        async with _new_file(done.file) as out:
            out.write(_HEAD + b"<server-data " + _SPACES + b">\n")
            out.writelines(f"<xi:include href={quoteattr(quote(file.name))}/>\n".encode() for file in files)
            out.write(b"</server-data>\n")
        return done

    async def _write_users(self, out: BinaryIO, host: str, done: Exported, progress: Progress) -> None:
        after: str | None = None
        told = time.monotonic()
        while names := await self._accounts.names(host, limit=_AT_ONCE, after=after):
            after = names[-1]
            found = await asyncio.gather(*(self._user(host, name, done.problems) for name in names))
            for user in found:
                out.write(user)
            done.accounts += sum(1 for user in found if user)
            await asyncio.to_thread(out.flush)
            if time.monotonic() - told > 5:
                told = time.monotonic()
                await progress(f"{host}: {done.accounts} accounts")

    async def _user(self, host: str, name: str, problems: Problems) -> bytes:
        """One <user/>, or b"" when the account has gone meanwhile."""
        account = await self._accounts.get(host, name)
        if account is None:
            return b""
        user = make(name, host)
        parts = [credentials_xml(account.secrets[kind]) for kind in KINDS if kind in account.secrets]
        event = UserExporting(user)
        try:
            decided = self._hooks.decide(event)
            if isinstance(decided, Awaitable):
                await decided
        except (StanzaError, StorageError) as exc:
            problems.add(user.bare, f"not all of it could be read: {exc}")
        parts += [part for part in event.parts if _is_whole(part, user.bare, problems)]
        return f"<user name={quoteattr(name)}>".encode() + b"\n".join([b"", *parts, b"</user>\n"])


def _is_whole(part: bytes, who: str, problems: Problems) -> bool:
    """One broken element would make the whole file one that nobody can read."""
    try:
        read(part)
    except etree.XMLSyntaxError as exc:
        problems.add(who, f"something stored cannot be written, since it is not well-formed: {exc.msg}")
        return False
    return True


@contextlib.asynccontextmanager
async def _new_file(file: Path) -> AsyncIterator[BinaryIO]:
    """Written beside its place, and put there at the end. FileExistsError: nothing is overwritten."""
    beside = file.with_name(f".{file.name}.partial")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "wb", _BUFFER) as out:
            yield out
            out.flush()
            await asyncio.to_thread(os.fsync, out.fileno())
        os.link(beside, file)
    finally:
        beside.unlink(missing_ok=True)
