"""What the core's commands need of the server, as protocols; server.py hands the objects in."""

from collections.abc import Collection, Sequence
from typing import Protocol

from xmppd.protocol.jid import JID
from xmppd.protocol.stanza import Stanza
from xmppd.session_manager import SessionInfo


class Accounts(Protocol):
    """Look-ups by prepared host and user name; StorageUnavailable when the database is away."""

    async def exists(self, host: str, username: str) -> bool: ...
    async def names(self, host: str) -> Sequence[str]: ...
    async def count(self, host: str) -> int: ...


class Auth(Protocol):
    """xmppd.auth.Auth: passwords in, salted keys out. False: the account was there already, or there is none.

    Host names come in prepared, user names as they are; JidError and PasswordError tell what cannot be one.
    """

    async def register(self, host: str, username: str, password: str) -> bool: ...
    async def set_password(self, host: str, username: str, password: str) -> bool: ...
    async def check_password(self, host: str, username: str, password: str) -> bool: ...
    async def remove(self, host: str, username: str) -> bool: ...


class Sessions(Protocol):
    """xmppd.session_manager.SessionManager; host and user come in prepared."""

    def infos(self, host: str | None = None, user: str | None = None) -> Sequence[SessionInfo]: ...
    def count(self, host: str | None = None) -> int: ...
    def kick(
        self, user: str, host: str, resource: str | None, reason: str, *, condition: str = "policy-violation"
    ) -> int:
        """On whatever node they are."""

    def kick_here(self, jid: JID, reason: str, condition: str) -> int:
        """On this node; a bare JID means all of its sessions."""


class Router(Protocol):
    """xmppd.router.Router. Never raises."""

    def route(self, stanza: Stanza) -> object: ...


class Server(Protocol):
    """The node. `status` is `starting`, `syncing` until the other members' tables and every listener are there, then
    `started`, and from stop() on `stopping`."""

    @property
    def node(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def status(self) -> str: ...
    @property
    def hosts(self) -> Collection[str]: ...
    def uptime(self) -> float: ...
    async def reload_config(self) -> list[str]:
        """What was applied and what needs a restart, line by line, none where nothing changed.

        ConfigError: nothing was applied.
        """

    def stop(self) -> None:
        """Begin to stop, and return at once."""

    def restart(self) -> None:
        """Begin to stop, in order to start again, and return at once."""


class ModuleInfo(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def state(self) -> str: ...
    @property
    def source(self) -> str: ...


class ModuleUse(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def hooks(self) -> int: ...
    @property
    def iqs(self) -> int: ...
    @property
    def commands(self) -> int: ...
    @property
    def tasks(self) -> int: ...


class Loader(Protocol):
    """The module loader.

    CommandError, or LookupError: there is no such module. CommandError, or ValueError: it is loaded already, is not,
    needs another one or is needed. ConfigError: wrong code or options.
    """

    def modules(self) -> Sequence[ModuleInfo]: ...
    def uses(self) -> Sequence[ModuleUse]:
        """What each has registered and runs; `core` is the server itself."""

    async def load(self, name: str) -> None: ...
    async def unload(self, name: str) -> None: ...
    async def reload(self, name: str) -> None: ...
