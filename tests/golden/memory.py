"""What the core's commands work on, in memory: as small as it can be, and as strict about names as the real one."""

import asyncio
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from xmppd.admin.commands import register_core
from xmppd.admin.registry import Registry
from xmppd.delivery import SAFE, Outcome
from xmppd.errors import ConfigError
from xmppd.protocol.jid import JID
from xmppd.protocol.sasl import prep_password, prep_username
from xmppd.protocol.stanza import Stanza
from xmppd.session_manager import SessionInfo

NODE = "xmppd@localhost"
VERSION = "0.1.0"


def session(user: str, resource: str, **other: Any) -> SessionInfo:
    """A session with ordinary values where nothing else is said."""
    usual = {"connection": "c2s_tls", "ip": "127.0.0.1", "port": 50000, "priority": 0, "node": NODE}
    usual |= {"uptime_seconds": 7, "show": "available", "status_text": "", "host": "localhost"}
    return SessionInfo(**{**usual, "user": user, "resource": resource, **other})


@dataclass
class Server:
    node: str = NODE
    version: str = VERSION
    status: str = "started"
    hosts: tuple[str, ...] = ("localhost", "capulet.example")
    asked_to_stop: asyncio.Event = field(default_factory=asyncio.Event)
    report: list[str] | ConfigError = field(default_factory=list)

    def uptime(self) -> float:
        return 75.9

    async def reload_config(self) -> list[str]:
        if isinstance(self.report, ConfigError):
            raise self.report
        return self.report

    def stop(self) -> None:
        self.status = "stopping"
        self.asked_to_stop.set()

    def restart(self) -> None:
        self.status = "stopping"
        self.asked_to_stop.set()


class Accounts:
    """Accounts and their passwords: both protocols in one."""

    def __init__(self) -> None:
        self.passwords: dict[tuple[str, str], str] = {}

    async def exists(self, host: str, user: str) -> bool:
        return (host, user) in self.passwords

    async def names(self, host: str) -> list[str]:
        return [user for its_host, user in self.passwords if its_host == host]

    async def count(self, host: str) -> int:
        return len(await self.names(host))

    async def register(self, host: str, user: str, password: str) -> bool:
        if not prep_password(password) or await self.exists(host, prep_username(user)):
            return False
        self.passwords[host, prep_username(user)] = password
        return True

    async def set_password(self, host: str, user: str, password: str) -> bool:
        if not prep_password(password) or not await self.exists(host, prep_username(user)):
            return False
        self.passwords[host, prep_username(user)] = password
        return True

    async def check_password(self, host: str, user: str, password: str) -> bool:
        return self.passwords.get((host, prep_username(user))) == password

    async def remove(self, host: str, user: str) -> bool:
        return self.passwords.pop((host, prep_username(user)), None) is not None


class Sessions:
    def __init__(self) -> None:
        self.rows: list[SessionInfo] = []
        self.kicked: list[tuple[str, str]] = []

    def infos(self, host: str | None = None, user: str | None = None) -> list[SessionInfo]:
        return [row for row in self.rows if host in (None, row.host) and user in (None, row.user)]

    def count(self, host: str | None = None) -> int:
        return len(self.infos(host))

    def kick(
        self, user: str, host: str, resource: str | None, reason: str, *, condition: str = "policy-violation"
    ) -> int:
        gone = [row for row in self.infos(host, user) if resource in (None, row.resource)]
        self.rows = [row for row in self.rows if row not in gone]
        self.kicked += [(f"{row.user}@{row.host}/{row.resource}", reason) for row in gone]
        return len(gone)

    def kick_here(self, jid: JID, reason: str, condition: str) -> int:
        return self.kick(jid.local, jid.domain, jid.resource or None, reason, condition=condition)


class Router:
    def __init__(self) -> None:
        self.sent: list[Stanza] = []
        self.outcome: Outcome = SAFE

    def route(self, stanza: Stanza) -> Outcome:
        self.sent.append(stanza)
        return self.outcome


class Loader:
    def __init__(self) -> None:
        self.loaded = {"ping": "xmppd"}

    def modules(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name=name, state="loaded", source=source) for name, source in self.loaded.items()]

    def uses(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name=name, hooks=0, iqs=2, commands=0, tasks=1) for name in self.loaded]

    async def load(self, name: str) -> None:
        if name == "elopement":
            raise LookupError("there is no module called 'elopement'. Did you mean 'offline'?")
        if name == "broken":
            raise ConfigError(["modules.broken.size: expected a number, got 'big'"])
        if name in self.loaded:
            raise ValueError(f"the module {name} is loaded already")
        self.loaded[name] = "xmppd"

    async def unload(self, name: str) -> None:
        del self.loaded[name]

    async def reload(self, name: str) -> None:
        if name not in self.loaded:
            raise ValueError(f"the module {name} is not loaded")


class Node:
    """A registry with all commands of the core, and what they work on."""

    def __init__(self) -> None:
        self.server = Server()
        self.accounts = Accounts()
        self.sessions = Sessions()
        self.router = Router()
        self.loader = Loader()
        self.registry = Registry()
        register_core(
            self.registry,
            server=self.server,
            accounts=self.accounts,
            auth=self.accounts,
            sessions=self.sessions,
            router=self.router,
            loader=self.loader,
        )
