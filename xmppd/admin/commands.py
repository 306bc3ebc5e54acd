"""The core's commands about the server: statistics, the node itself, its modules; and all of the core put together.

What they work on is handed in (needs.py).
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from xmppd.admin.merge import Answers, agreed
from xmppd.admin.needs import Accounts, Auth, Loader, Router, Server, Sessions
from xmppd.admin.registry import Arg, Call, Registry, command, commands_of
from xmppd.admin.results import List, Rescode, Restuple, Tuple, integer, string
from xmppd.admin.user_commands import HOST, AccountCommands, SessionCommands, StanzaCommands, served_host
from xmppd.errors import CommandError, ConfigError
from xmppd.log import LEVELS, get_level, reopen, set_level

# docs/exit-codes.md
CONFIG_INVALID: Final = 10
MODULE_UNKNOWN: Final = 13
MODULE_STATE: Final = 14
NOT_SERVING: Final = 15

MODULE: Final = Arg("name")


class StatisticsCommands:
    def __init__(self, server: Server, accounts: Accounts, sessions: Sessions) -> None:
        self._server, self._accounts, self._sessions = server, accounts, sessions

    @command(
        "stats",
        args=(Arg("name"),),
        result=integer("stat"),
        tags=("statistics",),
        reads=True,
        scope="shared",
        doc="Get a number of the server: registeredusers onlineusers onlineusersnode uptimeseconds processes"
        " (tasks of the event loop)",
    )
    async def stats(self, name: str, call: Call) -> int:
        if name == "registeredusers":
            return sum([await self._accounts.count(host) for host in self._server.hosts])
        if name == "onlineusersnode" or (name == "onlineusers" and call.local):
            return sum(info.node == self._server.node for info in self._sessions.infos())
        if name == "onlineusers":
            return self._sessions.count()
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
        scope="shared",
        doc="Get a number of one host: registeredusers onlineusers",
    )
    async def stats_host(self, name: str, host: str, call: Call) -> int:
        if name not in ("registeredusers", "onlineusers"):
            raise CommandError(f"no statistic of a host is called '{name}'. There are: registeredusers onlineusers")
        served = served_host(self._server, host)
        if served is None:
            return 0
        if name == "registeredusers":
            return await self._accounts.count(served)
        if call.local:
            return sum(info.node == self._server.node for info in self._sessions.infos(served))
        return self._sessions.count(served)


class ServerCommands:
    def __init__(self, server: Server, registry: Registry) -> None:
        self._server, self._registry = server, registry

    @command(
        "status", result=Restuple(), tags=("server",), reads=True, scope="node", doc="Tell whether the node serves"
    )
    def status(self) -> str:
        server = self._server
        if server.status != "started":
            raise CommandError(f"The node {server.node} is {server.status}", NOT_SERVING)
        return f"The node {server.node} is started with status: started\nxmppd {server.version} is running in that node"

    @command(
        "stop", result=Rescode(), tags=("server",), scope="node", doc="Stop the node; returns at once, `stopped` waits"
    )
    def stop(self) -> None:
        self._server.stop()

    @command(
        "restart",
        result=Rescode(),
        tags=("server",),
        scope="node",
        doc="Restart the node; returns at once, `started` waits",
    )
    def restart(self) -> None:
        self._server.restart()

    @command(
        "reload_config",
        result=Restuple(),
        tags=("config",),
        scope="everywhere",
        doc="Read the configuration again, apply all of it or nothing, and tell what changed and what needs a restart",
    )
    async def reload_config(self) -> str:
        try:
            return "\n".join(await self._server.reload_config())
        except ConfigError as exc:
            raise CommandError(f"the configuration is wrong, nothing was applied:\n{exc}", CONFIG_INVALID) from exc

    @command(
        "get_loglevel",
        result=string("levelatom"),
        tags=("logs",),
        reads=True,
        scope="gather",
        merge=agreed,
        doc="Get the level of the log",
    )
    def get_loglevel(self) -> str:
        return get_level()

    @command(
        "set_loglevel",
        args=(Arg("loglevel"),),
        result=Rescode(),
        tags=("logs",),
        scope="everywhere",
        doc="Set the level of the log until the next start",
    )
    def set_loglevel(self, loglevel: str) -> None:
        if loglevel not in LEVELS:
            raise CommandError("Invalid log level")
        set_level(loglevel)

    @command(
        "reopen_log",
        result=Rescode(),
        tags=("logs",),
        scope="node",
        doc="Reopen the log file after it has been renamed",
    )
    def reopen_log(self) -> None:
        try:
            reopen()
        except OSError as exc:
            raise CommandError(f"the log file cannot be opened, the old one is kept: {exc}") from exc

    @command(
        "help",
        args=(Arg("topic", optional=True), Arg("verb", optional=True)),
        result=Restuple(),
        tags=("documentation",),
        reads=True,
        scope="node",
        doc="Describe a command, the commands of a tag, those that fit a pattern, or all",
    )
    def help(self, topic: str = "", verb: str = "") -> str:
        return self._registry.help(f"{topic} {verb}".strip() or None)


def _states(answers: Answers) -> list[tuple[str, str, str]]:
    """A row per module: where a node has it in another state, or not at all, that is said behind the first one's."""
    by_node = {node: {name: (state, source) for name, state, source in rows} for node, rows in answers.items()}
    found = []
    for name in sorted({name for rows in by_node.values() for name in rows}):
        (state, source), *_ = (rows[name] for rows in by_node.values() if name in rows)
        states = {node: rows.get(name, ("unknown", ""))[0] for node, rows in by_node.items()}
        differing = [f"{theirs} on {node}" for node, theirs in states.items() if theirs != state]
        found.append((name, "; ".join([state, *differing]), source))
    return found


def _uses(answers: Answers) -> list[tuple[str, int, int, int, int]]:
    """A row per module, its numbers those of all nodes together."""
    sums: dict[str, list[int]] = {}
    for rows in answers.values():
        for name, *numbers in rows:
            sums[name] = [a + b for a, b in zip(sums.get(name, [0] * len(numbers)), numbers, strict=True)]
    return [(name, *numbers) for name, numbers in sums.items()]  # type: ignore[misc]


class ModuleCommands:
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    @command(
        "module list",
        result=List("modules", Tuple("module", (string("name"), string("state"), string("source")))),
        tags=("modules",),
        reads=True,
        scope="gather",
        merge=_states,
        doc="List the modules with their state and where they come from",
    )
    def list(self) -> "Sequence[tuple[str, str, str]]":
        return [(m.name, m.state, m.source) for m in sorted(self._loader.modules(), key=lambda m: m.name)]

    @command(
        "module stats",
        result=List(
            "modules", Tuple("module", (string("name"), *map(integer, ("hooks", "iq_handlers", "commands", "tasks"))))
        ),
        tags=("modules", "statistics"),
        reads=True,
        scope="gather",
        merge=_uses,
        doc="Count the hooks, IQ handlers, commands and running tasks of each module, and of the server itself (core)",
    )
    def stats(self) -> "Sequence[tuple[str, int, int, int, int]]":
        return [(use.name, use.hooks, use.iqs, use.commands, use.tasks) for use in self._loader.uses()]

    @command(
        "module load",
        args=(MODULE,),
        result=Restuple(),
        tags=("modules",),
        scope="everywhere",
        doc="Start a module with its options",
    )
    async def load(self, name: str) -> str:
        return await self._do(self._loader.load, name, "loaded")

    @command(
        "module unload", args=(MODULE,), result=Restuple(), tags=("modules",), scope="everywhere", doc="Stop a module"
    )
    async def unload(self, name: str) -> str:
        return await self._do(self._loader.unload, name, "unloaded")

    @command(
        "module reload",
        args=(MODULE,),
        result=Restuple(),
        tags=("modules",),
        scope="everywhere",
        doc="Start a module again with its code of now",
    )
    async def reload(self, name: str) -> str:
        return await self._do(self._loader.reload, name, "reloaded")

    async def _do(self, action: Callable[[str], Awaitable[None]], name: str, done: str) -> str:
        name = name.removeprefix("mod_")  # ejabberd's
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
