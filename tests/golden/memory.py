"""The command layer's collaborators in memory: as small as they can be, and as strict as the real ones about addresses."""

from dataclasses import dataclass, field
from types import SimpleNamespace

from slixmpp.jid import JID, InvalidJID
from xmppd.admin.commands import register_core
from xmppd.admin.registry import Registry
from xmppd.errors import ConfigError, JidError

NODE = "xmppd@localhost"
VERSION = "0.1.0"


def local_part(user: str) -> str:
    try:
        if not user or "@" in user or "/" in user or " " in user:
            raise InvalidJID
        return JID(f"{user}@localhost").local
    except InvalidJID as exc:
        raise JidError(user) from exc


@dataclass(frozen=True, slots=True)
class Session:
    user: str
    host: str
    resource: str
    connection: str = "c2s_tls"
    ip: str = "127.0.0.1"
    port: int = 50000
    priority: int | None = 0
    node: str = NODE
    uptime_seconds: int = 7
    show: str = "available"
    status_text: str = ""


@dataclass
class Server:
    node: str = NODE
    version: str = VERSION
    status: str = "started"
    hosts: tuple[str, ...] = ("localhost", "capulet.example")
    loglevel: str = "info"
    asked: list[str] = field(default_factory=list)
    report: list[str] | ConfigError = field(default_factory=list)

    def uptime(self) -> float:
        return 75.9

    def set_loglevel(self, level: str) -> None:
        if level not in ("none", "critical", "error", "warning", "info", "debug"):
            raise ValueError(level)
        self.loglevel = level

    async def reload_config(self) -> list[str]:
        if isinstance(self.report, ConfigError):
            raise self.report
        return self.report

    def stop(self) -> None:
        self.status = "stopping"
        self.asked.append("stop")

    def restart(self) -> None:
        self.status = "stopping"
        self.asked.append("restart")


class Accounts:
    """Accounts and their passwords: both protocols in one."""

    def __init__(self) -> None:
        self.passwords: dict[tuple[str, str], str] = {}

    async def exists(self, host: str, user: str) -> bool:
        return (host, local_part(user)) in self.passwords

    async def names(self, host: str) -> list[str]:
        return [user for its_host, user in self.passwords if its_host == host]

    async def count(self, host: str) -> int:
        return len(await self.names(host))

    async def register(self, host: str, user: str, password: str) -> bool:
        if await self.exists(host, user):
            return False
        self.passwords[host, local_part(user)] = password
        return True

    async def set_password(self, host: str, user: str, password: str) -> bool:
        if not await self.exists(host, user):
            return False
        self.passwords[host, local_part(user)] = password
        return True

    async def check_password(self, host: str, user: str, password: str) -> bool:
        return self.passwords.get((host, local_part(user))) == password

    async def remove(self, host: str, user: str) -> bool:
        return self.passwords.pop((host, local_part(user)), None) is not None


class Sessions:
    def __init__(self) -> None:
        self.rows: list[Session] = []
        self.kicked: list[tuple[str, str]] = []

    def infos(self, host: str | None = None, user: str | None = None) -> list[Session]:
        name = None if user is None else local_part(user)
        return [row for row in self.rows if host in (None, row.host) and name in (None, row.user)]

    def count(self, host: str | None = None) -> int:
        return len(self.infos(host))

    def kick(self, user: str, host: str, resource: str | None, reason: str) -> int:
        gone = [row for row in self.infos(host, user) if resource in (None, row.resource)]
        self.rows = [row for row in self.rows if row not in gone]
        self.kicked += [(f"{row.user}@{row.host}/{row.resource}", reason) for row in gone]
        return len(gone)


class Router:
    def __init__(self) -> None:
        self.sent: list[tuple[str, str, bytes]] = []

    def inject(self, from_jid: str, to_jid: str, xml: bytes) -> None:
        for address in (from_jid, to_jid):
            local, at, rest = address.rpartition("@")
            if at and (not local or not rest):
                raise JidError(f"{address}: no address")
        self.sent.append((from_jid, to_jid, xml))


class Loader:
    def __init__(self) -> None:
        self.loaded = {"ping": "xmppd"}

    def modules(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name=name, state="loaded", source=source) for name, source in self.loaded.items()]

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
