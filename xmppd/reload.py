"""reload_config: a new configuration takes effect whole, or nothing changes.

First everything is made ready that can be wrong (the file, modules' options, rules, certificates), then the modules go
over, which can be undone, and at last comes what cannot fail.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from xmppd import config as configuration
from xmppd import log
from xmppd.access import AccessRules
from xmppd.c2s.tls import Certificates
from xmppd.c2s.tls import Prepared as PreparedCertificates
from xmppd.check import own_certfiles, validator
from xmppd.config import Change, Config
from xmppd.errors import ConfigError, XmppdError
from xmppd.module_loader import ModuleLoader
from xmppd.module_loader import Prepared as PreparedModules


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
