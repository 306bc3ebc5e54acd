"""reload_config: a new configuration takes effect whole, or nothing changes.

First everything is made ready that can be wrong (the file, modules' options, rules, certificates), then the modules go
over, which can be undone, and at last comes what cannot fail.
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from xmppd import config as configuration
from xmppd import log
from xmppd.access import AccessRules
from xmppd.c2s.tls import Certificates
from xmppd.c2s.tls import Prepared as PreparedCertificates
from xmppd.check import own_certfiles, validator
from xmppd.config import Change, Config
from xmppd.errors import CommandError, ConfigError, XmppdError
from xmppd.events import ConfigReloaded
from xmppd.hooks import Hooks
from xmppd.log import get_logger
from xmppd.module_loader import ModuleLoader
from xmppd.module_loader import Prepared as PreparedModules

_log = get_logger("xmppd.server")


@dataclass(frozen=True, slots=True)
class Plan:
    """A new configuration that was found to be right."""

    config: Config  # as it holds until the next restart
    access: AccessRules
    modules: PreparedModules
    certificates: PreparedCertificates
    changes: Sequence[Change]

    def report(self) -> list[str]:
        """What is applied and what needs a restart, a line each."""
        now = [f"applied: {change}" for change in self.changes if change.applies == "now"]
        now += [f"applied: the certificate of {host} has changed" for host in self.certificates.report.changed]
        return now + [f"needs a restart: {change}" for change in self.changes if change.applies == "restart"]


async def prepare(old: Config, loader: ModuleLoader, certificates: Certificates) -> Plan:
    """Read the file again and make everything ready; ConfigError with all problems that were found."""
    new = await asyncio.to_thread(old.again)
    config, problems = configuration.running(old, new)
    access = AccessRules(config)
    modules: PreparedModules | None = None
    try:
        modules = loader.prepare(new.modules, validate=validator(new), access=access)
    except ConfigError as exc:
        problems += exc.problems
    ready: PreparedCertificates | None = None
    try:
        own = own_certfiles(config)
        ready = await asyncio.to_thread(certificates.prepare, config.hosts, config.certfiles, own)
    except XmppdError as exc:
        problems += exc.problems if isinstance(exc, ConfigError) else [str(exc)]
    if problems or modules is None or ready is None:
        raise ConfigError(problems)
    return Plan(config, access, modules, ready, configuration.diff(old, new))


async def carry_out(
    plan: Plan, old: Config, loader: ModuleLoader, certificates: Certificates, commit: Callable[[Plan], None]
) -> None:
    """Let the log and the modules go over, then everything else; ConfigError when the file of the log cannot be opened
    or a module refuses, and all is as it was."""
    level = log.get_level()
    other_log = (plan.config.log_file, plan.config.log_format) != (old.log_file, old.log_format)
    if other_log:
        log.setup_from(plan.config)
    try:
        await loader.apply(plan.modules)
    except BaseException:
        if other_log:
            log.setup_from(old)
            log.set_level(level)
        raise
    certificates.commit(plan.certificates)
    commit(plan)


class Node(Protocol):
    """What of the server is reloaded."""

    config: Config
    loader: ModuleLoader
    certificates: Certificates
    hooks: Hooks

    def spawn(self, coroutine: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]: ...
    def commit(self, plan: Plan) -> None:
        """Put into effect what cannot fail."""


class Reloader:
    """Reloads one node, one time after the other."""

    def __init__(self, node: Node, *, begins: Callable[[], None], ends: Callable[[], None]) -> None:
        self._node = node
        self._begins, self._ends = begins, ends  # told when a signal asked for it
        self._by_signal = asyncio.Lock()
        self._applying = asyncio.Lock()

    async def after_signal(self) -> None:
        """Open the log anew and reload; nobody reads an answer, so what goes wrong is logged."""
        async with self._by_signal:
            self._begins()
            try:
                log.reopen()
                await self.reload()
            except (XmppdError, OSError) as exc:
                _log.error("not reloaded", problem=exc)
            finally:
                self._ends()

    async def reload(self) -> list[str]:
        """Read the file again; all or nothing. What was applied, and what needs a restart, comes back; ConfigError:
        nothing was applied."""
        if self._node.config.path is None:
            raise CommandError("there is no configuration file: the node runs with the built-in defaults")
        # To its end, even if whoever asked for it has left meanwhile.
        done: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()
        self._node.spawn(self._into(done), name="reload of the configuration")
        return await asyncio.shield(done)

    async def _into(self, done: "asyncio.Future[list[str]]") -> None:
        try:
            done.set_result(await self._whole())
        except BaseException as exc:
            done.set_exception(exc if isinstance(exc, Exception) else CommandError("the node stops"))
            done.exception()  # somebody has looked
            if not isinstance(exc, XmppdError):
                raise

    async def _whole(self) -> list[str]:
        node = self._node
        async with self._applying:
            try:
                plan = await prepare(node.config, node.loader, node.certificates)
                await carry_out(plan, node.config, node.loader, node.certificates, node.commit)
            except ConfigError as exc:
                _log.warning("configuration refused", problems=len(exc.problems), first=exc.problems[0])
                raise
            for warning in node.certificates.report.warnings:
                _log.warning("certificate needs attention", problem=warning)
            waiting = node.hooks.notify(ConfigReloaded())
            if waiting is not None:
                await waiting
            report = plan.report()
            _log.info("configuration reloaded", changes=len(report))
            return report
