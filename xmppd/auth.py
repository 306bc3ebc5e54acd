"""Accounts and passwords between the streams and the storage: who may log in, by which mechanisms, with what secret.

A user who does not exist costs the same look-up and the same PBKDF2 as one who does, and shows the same things.
PBKDF2 runs in a few threads (it lets go of the interpreter lock), with a limit on how many wait for them.
Trouble of the storage passes through as `StorageUnavailable`: callers answer `temporary-auth-failure`.
"""

import asyncio
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, Protocol, TypeVar

from xmppd.errors import JidError, XmppdError
from xmppd.login_limits import LoginLimits
from xmppd.protocol import sasl
from xmppd.protocol.sasl import Secret

T = TypeVar("T")

MAX_WAITING: Final = 256  # jobs that run or wait; at 4096 iterations some 0.4 s of work for one thread


class AuthBusy(XmppdError):
    """Too many passwords are being checked already; trying again later works (`temporary-auth-failure`)."""


class Account(Protocol):
    @property
    def secrets(self) -> Mapping[str, Secret]: ...


class Accounts(Protocol):
    """What `xmppd.storage` keeps. Each method may raise `StorageUnavailable`."""

    async def get(self, host: str, username: str) -> Account | None: ...
    async def exists(self, host: str, username: str) -> bool: ...
    async def create(self, host: str, username: str, secrets: Mapping[str, Secret]) -> bool: ...
    async def set_secrets(self, host: str, username: str, secrets: Mapping[str, Secret]) -> bool: ...
    async def remove(self, host: str, username: str) -> bool: ...
    async def fake_salt_key(self) -> bytes: ...


class Scram(Protocol):
    @property
    def hashes(self) -> Sequence[str]: ...
    @property
    def iterations(self) -> int: ...


class HostConfig(Protocol):
    @property
    def auth_method(self) -> Sequence[str]: ...
    @property
    def auth_scram(self) -> Scram: ...
    @property
    def disable_sasl_mechanisms(self) -> Sequence[str]: ...


class Config(Protocol):
    def for_host(self, host: str) -> HostConfig: ...


class Auth:
    """User names are prepared here (`sasl.prep_username`), host names come in prepared."""

    def __init__(
        self,
        accounts: Accounts,
        config: Config,
        *,
        limits: LoginLimits | None = None,
        threads: int | None = None,
        max_waiting: int = MAX_WAITING,
    ) -> None:
        """Without `limits` anybody may guess as often as they like.

        `threads` defaults to all cores but one, which belongs to the event loop; at least 1, at most 4."""
        if threads is None:
            threads = max(1, min(4, (os.cpu_count() or 1) - 1))
        self.config = config  # replaced at a reload
        self.limits = LoginLimits() if limits is None else limits
        self._accounts = accounts
        self._pool = ThreadPoolExecutor(threads, "xmppd-password")
        self._max_waiting = max_waiting
        self._waiting = 0
        self._lock = threading.Lock()
        self._fake_key: bytes | None = None

    def close(self) -> None:
        """Drop what waits; what runs ends within milliseconds."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def mechanisms(self, host: str, tls: bool, bound: bool = False) -> list[str]:
        """What a stream to `host` is offered, strongest first: with channel binding where the connection can be `bound`
        to, PLAIN only when nobody can listen."""
        settings = self.config.for_host(host)
        names: list[str] = []
        if "sql" in settings.auth_method:
            scram = [sasl.MECHANISMS[kind] for kind in self._kinds(host)]
            names += [name + sasl.PLUS for name in scram] if bound else []
            names += scram
            names += ["PLAIN"] if tls else []
        if "anonymous" in settings.auth_method:
            names.append("ANONYMOUS")
        disabled = {name.upper() for name in settings.disable_sasl_mechanisms}
        return [name for name in names if name not in disabled]

    async def secret_for(self, host: str, username: str, kind: str) -> tuple[Secret, bool]:
        """The secret for a SCRAM exchange, and whether it is real.

        It is not for a user who does not exist, or whose account has no secret of that kind: a password must be set,
        or used with PLAIN, before the latter can use this mechanism.
        """
        key = await self._key()
        account = await self._accounts.get(host, username)
        fake = self._fake(key, kind, host, username)  # made for everybody, so that it takes as long for everybody
        secret = account.secrets.get(kind) if account is not None else None
        return (fake, False) if secret is None else (secret, True)

    async def check_password(self, host: str, username: str, password: str) -> bool:
        """Is it this user's password? One look-up and one PBKDF2 for whoever it is. Raises `AuthBusy`."""
        try:
            username = sasl.prep_username(username)
        except JidError:
            return False
        key = await self._key()
        account = await self._accounts.get(host, username)
        kinds = self._kinds(host)
        secret = self._fake(key, kinds[0], host, username)
        if account is not None:
            # older accounts may lack what is configured today, and have what no longer is
            stored = (account.secrets.get(kind) for kind in (*kinds, *sasl.KINDS))
            secret = next((found for found in stored if found is not None), secret)
        return await self._compute(lambda: sasl.verify(secret, password))

    async def register(self, host: str, username: str, password: str) -> bool:
        """Create an account; False if there is one. Raises `JidError`, `PasswordError`, `AuthBusy`.

        The password has 1 to 1024 bytes of UTF-8 and nothing SASLprep forbids.
        """
        username = sasl.prep_username(username)
        sasl.prep_password(password)
        if await self._accounts.exists(host, username):  # spares the work; `create` decides
            return False
        return await self._accounts.create(host, username, await self._derive(host, password))

    async def set_password(self, host: str, username: str, password: str) -> bool:
        """Replace all secrets of an account; False if there is none. Raises as `register` does."""
        username = sasl.prep_username(username)
        sasl.prep_password(password)
        if not await self._accounts.exists(host, username):
            return False
        return await self._accounts.set_secrets(host, username, await self._derive(host, password))

    async def remove(self, host: str, username: str) -> bool:
        """Delete an account and its secrets; False if there is none. Raises `JidError`."""
        return await self._accounts.remove(host, sasl.prep_username(username))

    def _kinds(self, host: str) -> list[str]:
        hashes = self.config.for_host(host).auth_scram.hashes
        return [kind for kind in sasl.KINDS if kind in hashes]

    def _fake(self, key: bytes, kind: str, host: str, username: str) -> Secret:
        return sasl.fake_secret(key, kind, username, host, self.config.for_host(host).auth_scram.iterations)

    async def _key(self) -> bytes:
        if self._fake_key is None:
            self._fake_key = await self._accounts.fake_salt_key()
        return self._fake_key

    async def _derive(self, host: str, password: str) -> dict[str, Secret]:
        kinds, iterations = self._kinds(host), self.config.for_host(host).auth_scram.iterations

        def work() -> dict[str, Secret]:
            return {kind: sasl.derive(kind, password, iterations=iterations) for kind in kinds}

        return await self._compute(work)

    async def _compute(self, work: Callable[[], T]) -> T:
        with self._lock:
            if self._waiting >= self._max_waiting:
                raise AuthBusy(f"{self._waiting} passwords are being checked already")
            self._waiting += 1
        job = self._pool.submit(work)
        job.add_done_callback(self._finished)  # in its thread, or where it is cancelled: a caller may be long gone
        return await asyncio.wrap_future(job)

    def _finished(self, job: Future[T]) -> None:
        with self._lock:
            self._waiting -= 1
