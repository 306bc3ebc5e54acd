"""The commands of the core: accounts, sessions, messages, statistics, modules, the node itself.

What they work on is handed in; the protocols below say what they need of it. Roster and offline commands belong to their modules.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from secrets import token_hex
from typing import Final, Protocol
from xml.sax.saxutils import escape, quoteattr

from lxml import etree

from xmppd.admin.registry import Arg, Call, Registry, command, commands_of
from xmppd.admin.results import List, Rescode, Restuple, Tuple, integer, string
from xmppd.errors import CommandError, ConfigError, JidError, StanzaError

# docs/exit-codes.md
CONFIG_INVALID: Final = 10
MODULE_UNKNOWN: Final = 13
MODULE_STATE: Final = 14
NOT_SERVING: Final = 15

STANZAS: Final = ("message", "presence", "iq")
CLIENT: Final = "jabber:client"


class SessionInfo(Protocol):
    """One session as it is shown (xmppd.session_manager.SessionInfo)."""

    @property
    def user(self) -> str: ...
    @property
    def host(self) -> str: ...
    @property
    def resource(self) -> str: ...
    @property
    def connection(self) -> str: ...
    @property
    def ip(self) -> str: ...
    @property
    def port(self) -> int: ...
    @property
    def priority(self) -> int | None: ...
    @property
    def node(self) -> str: ...
    @property
    def uptime_seconds(self) -> int: ...
    @property
    def show(self) -> str: ...
    @property
    def status_text(self) -> str: ...


class Accounts(Protocol):
    async def exists(self, host: str, user: str) -> bool: ...
    async def names(self, host: str) -> Sequence[str]: ...
    async def count(self, host: str) -> int: ...


class Auth(Protocol):
    """Passwords in, salted keys out. False: the account was there already, or was not there; JidError: no local part."""

    async def register(self, host: str, user: str, password: str) -> bool: ...
    async def set_password(self, host: str, user: str, password: str) -> bool: ...
    async def check_password(self, host: str, user: str, password: str) -> bool: ...
    async def remove(self, host: str, user: str) -> bool: ...


class Sessions(Protocol):
    def infos(self, host: str | None = None, user: str | None = None) -> Sequence[SessionInfo]: ...
    def count(self, host: str | None = None) -> int: ...
    def kick(self, user: str, host: str, resource: str | None, reason: str) -> int: ...


class Router(Protocol):
    def inject(self, from_jid: str, to_jid: str, xml: bytes) -> None:
        """Route a stanza (one element, `from` and `to` as given) as if its sender were connected here.

        Raises JidError and StanzaError.
        """


class Server(Protocol):
    """The node. `status` is `started` once every listener is open, before `starting`, from stop() on `stopping`."""

    @property
    def node(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def status(self) -> str: ...
    @property
    def hosts(self) -> Collection[str]: ...
    @property
    def loglevel(self) -> str: ...
    def uptime(self) -> float: ...
    def set_loglevel(self, level: str) -> None:
        """ValueError: there is no such level."""

    async def reload_config(self) -> list[str]:
        """Lines on what was applied and what needs a restart, none where nothing changed; ConfigError: nothing was applied."""

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


class Loader(Protocol):
    """LookupError: there is no such module. ValueError: it is loaded already, or is not. ConfigError: its options are wrong."""

    def modules(self) -> Sequence[ModuleInfo]: ...
    async def load(self, name: str) -> None: ...
    async def unload(self, name: str) -> None: ...
    async def reload(self, name: str) -> None: ...


USER: Final = Arg("user")
HOST: Final = Arg("host")
PASSWORD: Final = Arg("password", secret=True)
MODULE: Final = Arg("name")

_SESSION_FIELDS: Final = (
    string("connection"),
    string("ip"),
    integer("port"),
    integer("priority"),
    string("node"),
    integer("uptime"),
    string("status"),
    string("resource"),
    string("statustext"),
)


def _jid(user: str, host: str, resource: str = "") -> str:
    return f"{user}@{host}/{resource}" if resource else f"{user}@{host}"


def _row(info: SessionInfo) -> tuple[str | int, ...]:
    """A session's columns; one that sent no presence has priority -1 and is `unavailable`, as in ejabberd."""
    priority = -1 if info.priority is None else info.priority
    show = "unavailable" if info.priority is None else info.show
    return (
        info.connection,
        info.ip,
        info.port,
        priority,
        info.node,
        info.uptime_seconds,
        show,
        info.resource,
        info.status_text,
    )


def _order(info: SessionInfo) -> tuple[str, str, str]:
    return info.host, info.user, info.resource


class AccountCommands:
    def __init__(self, server: Server, accounts: Accounts, auth: Auth, sessions: Sessions) -> None:
        self._server, self._accounts, self._auth, self._sessions = server, accounts, auth, sessions

    def _host(self, host: str, prefix: str = "") -> str:
        host = host.lower()
        if host not in self._server.hosts:
            raise CommandError(f"{prefix}Unknown virtual host")
        return host

    @command("register", args=(USER, HOST, PASSWORD), result=Restuple(), tags=("accounts",), doc="Create an account")
    async def register(self, user: str, host: str, password: str) -> str:
        name = self._host(host, "cannot_register: ")
        cannot = f"cannot_register: Can't register user {user}@{host} at node {self._server.node}:"
        if not password:
            raise CommandError(f"{cannot} The password contains unacceptable characters")
        if not user:
            raise CommandError(f"{cannot} Malformed username")
        try:
            created = await self._auth.register(name, user, password)
        except JidError as exc:
            raise CommandError(f"{cannot} Malformed username") from exc
        except ValueError as exc:  # SASLprep refuses the password
            raise CommandError(f"{cannot} The password contains unacceptable characters") from exc
        if not created:
            raise CommandError(f"conflict: User {user}@{host} already registered")
        return f"User {user}@{host} successfully registered"

    @command(
        "unregister",
        args=(USER, HOST),
        result=Restuple(),
        tags=("accounts",),
        doc="Delete an account with all its data, and end its sessions",
    )
    async def unregister(self, user: str, host: str) -> str:
        name = self._host(host)
        try:
            await self._auth.remove(name, user)
            self._sessions.kick(user, name, None, "User removed")
        except JidError:
            pass  # nobody can have such a name, so it is as gone as one unregistered twice
        return ""

    @command(
        "change_password",
        args=(USER, HOST, Arg("newpass", secret=True)),
        result=Rescode(),
        tags=("accounts",),
        doc="Change the password of an account",
    )
    async def change_password(self, user: str, host: str, newpass: str) -> None:
        if not newpass:
            raise CommandError("invalid_password: the password is empty")
        try:
            changed = await self._auth.set_password(host.lower(), user, newpass)
        except JidError:
            changed = False
        except ValueError as exc:
            raise CommandError("invalid_password: the password contains unacceptable characters") from exc
        if not changed:
            raise CommandError(f"not_found: unknown_user {user}@{host}")

    @command(
        "check_password",
        args=(USER, HOST, PASSWORD),
        result=Rescode(),
        tags=("accounts",),
        reads=True,
        doc="Tell by the exit code whether a password is right",
    )
    async def check_password(self, user: str, host: str, password: str) -> bool:
        try:
            return host.lower() in self._server.hosts and await self._auth.check_password(host.lower(), user, password)
        except (JidError, ValueError):
            return False

    @command(
        "check_account",
        args=(USER, HOST),
        result=Rescode(),
        tags=("accounts",),
        reads=True,
        doc="Tell by the exit code whether an account exists",
    )
    async def check_account(self, user: str, host: str) -> bool:
        try:
            return host.lower() in self._server.hosts and await self._accounts.exists(host.lower(), user)
        except JidError:
            return False

    @command(
        "registered_users",
        args=(HOST,),
        result=List("users", string("username")),
        tags=("accounts",),
        reads=True,
        doc="List the accounts of a host",
    )
    async def registered_users(self, host: str) -> list[str]:
        return sorted(await self._accounts.names(self._host(host)))

    @command(
        "registered_vhosts",
        result=List("vhosts", string("vhost")),
        tags=("server",),
        reads=True,
        doc="List the hosts this server serves",
    )
    def registered_vhosts(self) -> list[str]:
        return list(self._server.hosts)


class SessionCommands:
    def __init__(self, server: Server, sessions: Sessions) -> None:
        self._server, self._sessions = server, sessions

    def _infos(self, call: Call, host: str | None = None, user: str | None = None) -> list[SessionInfo]:
        try:
            infos = self._sessions.infos(host, user)
        except JidError:
            return []
        node = self._server.node
        return sorted((info for info in infos if not call.local or info.node == node), key=_order)

    @command(
        "connected_users",
        result=List("connected_users", string("sessions")),
        tags=("session",),
        reads=True,
        doc="List the full JIDs of all sessions",
    )
    def connected_users(self, call: Call) -> list[str]:
        return [_jid(info.user, info.host, info.resource) for info in self._infos(call)]

    @command(
        "connected_users_info",
        result=List("connected_users_info", Tuple("session", (string("jid"), *_SESSION_FIELDS))),
        tags=("session",),
        reads=True,
        doc="List all sessions with their connection, priority, node, uptime and presence",
    )
    def connected_users_info(self, call: Call) -> list[tuple[str | int, ...]]:
        return [(_jid(info.user, info.host, info.resource), *_row(info)) for info in self._infos(call)]

    @command(
        "connected_users_number",
        result=integer("num_sessions"),
        tags=("session", "statistics"),
        reads=True,
        doc="Count all sessions",
    )
    def connected_users_number(self, call: Call) -> int:
        return len(self._infos(call)) if call.local else self._sessions.count()

    @command(
        "user_resources",
        args=(USER, HOST),
        result=List("resources", string("resource")),
        tags=("session",),
        reads=True,
        doc="List the resources a user is connected with",
    )
    def user_resources(self, user: str, host: str, call: Call) -> list[str]:
        return [info.resource for info in self._infos(call, host, user)]

    @command(
        "user_sessions_info",
        args=(USER, HOST),
        result=List("sessions_info", Tuple("session", _SESSION_FIELDS)),
        tags=("session",),
        reads=True,
        doc="List the sessions of a user with their connection, priority, node, uptime and presence",
    )
    def user_sessions_info(self, user: str, host: str, call: Call) -> list[tuple[str | int, ...]]:
        return [_row(info) for info in self._infos(call, host, user)]

    @command(
        "kick_user",
        args=(USER, HOST),
        result=integer("num_resources"),
        tags=("session",),
        doc="End all sessions of a user, and tell how many there were",
    )
    def kick_user(self, user: str, host: str) -> int:
        return self._kick(user, host, None, "has been kicked")

    @command(
        "kick_session",
        args=(USER, HOST, Arg("resource"), Arg("reason")),
        result=Rescode(),
        tags=("session",),
        doc="End one session of a user; the client is told the reason",
    )
    def kick_session(self, user: str, host: str, resource: str, reason: str) -> None:
        self._kick(user, host, resource, reason)

    def _kick(self, user: str, host: str, resource: str | None, reason: str) -> int:
        try:
            return self._sessions.kick(user, host, resource, reason)
        except JidError:
            return 0


class StanzaCommands:
    def __init__(self, router: Router) -> None:
        self._router = router

    @command(
        "send_message",
        args=(Arg("type"), Arg("from"), Arg("to"), Arg("subject"), Arg("body")),
        result=Rescode(),
        tags=("stanza",),
        doc="Send a message of a type (normal, chat, headline, groupchat) with subject and body to a bare or full JID",
    )
    def send_message(self, type: str, from_: str, to: str, subject: str, body: str) -> None:
        # any other type counts as normal (RFC 6121 5.2.2), and normal is said by saying nothing
        kind = f" type={quoteattr(type)}" if type in ("chat", "headline", "groupchat") else ""
        title = f"<subject>{escape(subject)}</subject>" if subject else ""
        self._send(from_, to, f"<message id='{token_hex(8)}'{kind}><body>{escape(body)}</body>{title}</message>")

    @command(
        "send_stanza",
        args=(Arg("from"), Arg("to"), Arg("stanza")),
        result=Rescode(),
        tags=("stanza",),
        doc="Send a stanza, given as XML, from one JID to another; they replace the addresses in it",
    )
    def send_stanza(self, from_: str, to: str, stanza: str) -> None:
        self._send(from_, to, stanza)

    def _send(self, sender: str, recipient: str, xml: str) -> None:
        stanza = _stanza(xml)
        try:
            stanza.set("from", sender)
            stanza.set("to", recipient)
        except ValueError as exc:
            raise CommandError("malformed JID: contains characters that XML forbids") from exc
        try:
            self._router.inject(sender, recipient, etree.tostring(stanza, encoding="utf-8"))
        except JidError as exc:
            raise CommandError(f"malformed JID: {exc}") from exc
        except StanzaError as exc:
            raise CommandError(f"the stanza was refused: {exc}") from exc


def _stanza(xml: str) -> "etree._Element":
    """The one stanza a text holds, in the namespace of clients, with no comment, DTD or processing instruction in it."""
    # inside a wrapper a DOCTYPE or an XML declaration is not well-formed, and what has no namespace gets the clients'
    wrapped = f'<stream xmlns="{CLIENT}">{xml}</stream>'
    parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False)
    try:
        root = etree.fromstring(wrapped.encode(), parser)
    except etree.XMLSyntaxError as exc:
        raise CommandError(f"invalid xml: {(exc.msg or 'syntax error').partition(', line ')[0]}") from exc
    if len(root) != 1 or (root.text or "").strip() or (root[0].tail or "").strip():
        raise CommandError("invalid xml: expected one stanza")
    stanza = root[0]
    if any(not isinstance(node.tag, str) for node in stanza.iter()):
        raise CommandError("invalid xml: comments, entities and processing instructions are not allowed")
    name = etree.QName(stanza)
    if name.namespace != CLIENT or name.localname not in STANZAS:
        raise CommandError(
            f"incorrect stanza: Unknown tag <{name.localname}/> qualified by namespace '{name.namespace}'"
        )
    stanza.tail = None
    return stanza


class StatisticsCommands:
    def __init__(self, server: Server, accounts: Accounts, sessions: Sessions) -> None:
        self._server, self._accounts, self._sessions = server, accounts, sessions

    @command(
        "stats",
        args=(Arg("name"),),
        result=integer("stat"),
        tags=("statistics",),
        reads=True,
        doc="Get a number of the server: registeredusers onlineusers onlineusersnode uptimeseconds processes (tasks of the event loop)",
    )
    async def stats(self, name: str) -> int:
        if name == "registeredusers":
            return sum([await self._accounts.count(host) for host in self._server.hosts])
        if name == "onlineusers":
            return self._sessions.count()
        if name == "onlineusersnode":
            return sum(info.node == self._server.node for info in self._sessions.infos())
        if name == "uptimeseconds":
            return int(self._server.uptime())
        if name == "processes":
            return len(asyncio.all_tasks())
        names = "registeredusers onlineusers onlineusersnode uptimeseconds processes"
        raise CommandError(f"no statistic is called '{name}'. There are: {names}")

    @command(
        "stats_host",
        args=(Arg("name"), HOST),
        result=integer("stat"),
        tags=("statistics",),
        reads=True,
        doc="Get a number of one host: registeredusers onlineusers",
    )
    async def stats_host(self, name: str, host: str) -> int:
        if name not in ("registeredusers", "onlineusers"):
            raise CommandError(f"no statistic of a host is called '{name}'. There are: registeredusers onlineusers")
        host = host.lower()
        if host not in self._server.hosts:
            return 0
        return await self._accounts.count(host) if name == "registeredusers" else self._sessions.count(host)


class ServerCommands:
    def __init__(self, server: Server, registry: Registry) -> None:
        self._server, self._registry = server, registry

    @command("status", result=Restuple(), tags=("server",), reads=True, doc="Tell whether the node serves")
    def status(self) -> str:
        server = self._server
        if server.status != "started":
            raise CommandError(f"The node {server.node} is {server.status}", NOT_SERVING)
        return f"The node {server.node} is started with status: started\nxmppd {server.version} is running in that node"

    @command("stop", result=Rescode(), tags=("server",), doc="Stop the node; returns at once, `stopped` waits")
    def stop(self) -> None:
        self._server.stop()

    @command("restart", result=Rescode(), tags=("server",), doc="Restart the node; returns at once, `started` waits")
    def restart(self) -> None:
        self._server.restart()

    @command(
        "reload_config",
        result=Restuple(),
        tags=("config",),
        doc="Read the configuration again, apply all of it or nothing, and tell what changed and what needs a restart",
    )
    async def reload_config(self) -> str:
        try:
            return "\n".join(await self._server.reload_config())
        except ConfigError as exc:
            raise CommandError(f"the configuration is wrong, nothing was applied:\n{exc}", CONFIG_INVALID) from exc

    @command("get_loglevel", result=string("levelatom"), tags=("logs",), reads=True, doc="Get the level of the log")
    def get_loglevel(self) -> str:
        return self._server.loglevel

    @command(
        "set_loglevel",
        args=(Arg("loglevel"),),
        result=Rescode(),
        tags=("logs",),
        doc="Set the level of the log until the next start",
    )
    def set_loglevel(self, loglevel: str) -> None:
        try:
            self._server.set_loglevel(loglevel)
        except ValueError as exc:
            raise CommandError("Invalid log level") from exc

    @command(
        "help",
        args=(Arg("topic", optional=True), Arg("verb", optional=True)),
        result=Restuple(),
        tags=("documentation",),
        reads=True,
        doc="Describe a command, the commands of a tag, those that fit a pattern, or all",
    )
    def help(self, topic: str = "", verb: str = "") -> str:
        return self._registry.help(f"{topic} {verb}".strip() or None)


class ModuleCommands:
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    @command(
        "module list",
        result=List("modules", Tuple("module", (string("name"), string("state"), string("source")))),
        tags=("modules",),
        reads=True,
        doc="List the modules with their state and where they come from",
    )
    def list(self) -> "Sequence[tuple[str, str, str]]":
        return [(m.name, m.state, m.source) for m in sorted(self._loader.modules(), key=lambda m: m.name)]

    @command("module load", args=(MODULE,), result=Restuple(), tags=("modules",), doc="Start a module with its options")
    async def load(self, name: str) -> str:
        return await self._do(self._loader.load, name, "loaded")

    @command("module unload", args=(MODULE,), result=Restuple(), tags=("modules",), doc="Stop a module")
    async def unload(self, name: str) -> str:
        return await self._do(self._loader.unload, name, "unloaded")

    @command(
        "module reload",
        args=(MODULE,),
        result=Restuple(),
        tags=("modules",),
        doc="Start a module again with its code of now",
    )
    async def reload(self, name: str) -> str:
        return await self._do(self._loader.reload, name, "reloaded")

    async def _do(self, action: Callable[[str], Awaitable[None]], name: str, done: str) -> str:
        try:
            await action(name)
        except LookupError as exc:
            raise CommandError(_words(exc) or f"there is no module called '{name}'", MODULE_UNKNOWN) from exc
        except ConfigError as exc:
            raise CommandError(str(exc), CONFIG_INVALID) from exc
        except ValueError as exc:
            raise CommandError(str(exc), MODULE_STATE) from exc
        return f"Module {name} {done}"


def _words(exc: LookupError) -> str:
    # KeyError's own str() is the repr of the key; a sentence has blanks
    text = str(exc.args[0]) if exc.args else ""
    return text if " " in text else ""


def register_core(
    registry: Registry,
    *,
    server: Server,
    accounts: Accounts,
    auth: Auth,
    sessions: Sessions,
    router: Router,
    loader: Loader,
) -> None:
    """Put every command of the core into the registry, under the owner `core`."""
    sources = (
        AccountCommands(server, accounts, auth, sessions),
        SessionCommands(server, sessions),
        StanzaCommands(router),
        StatisticsCommands(server, accounts, sessions),
        ServerCommands(server, registry),
        ModuleCommands(loader),
    )
    registry.register("core", [spec for source in sources for spec in commands_of(source)])
