"""`xmppd --check` and `xmppd --dump-config`: a configuration is looked at, and nothing is started or made."""

import os
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from xmppd import config as configuration
from xmppd.access import Access, AccessRules
from xmppd.admin.registry import Registry
from xmppd.c2s.tls import check_certificates
from xmppd.config import Config
from xmppd.errors import ConfigError
from xmppd.hooks import Hooks
from xmppd.iq import IqHandlers
from xmppd.module_api import Context
from xmppd.module_loader import ModuleLoader, Prepared


def check(config: Config) -> tuple[Prepared, list[str]]:
    """All that a start would find wrong before it opens the database: the modules with their options, and warnings.

    ConfigError with all problems."""
    problems: list[str] = []
    warnings: list[str] = []
    try:
        warnings += check_certificates(config.hosts, config.certfiles, own_certfiles(config))
    except ConfigError as exc:
        problems += exc.problems
    if config.log_file is not None and not _can_write(config.log_file):
        problems.append(f"{config.file_of('log_file')}: log_file: cannot write {config.log_file}")
    try:
        prepared = _loader(config).prepare(config.modules)
    except ConfigError as exc:
        problems += exc.problems
    if problems:
        raise ConfigError(problems)
    return prepared, warnings + [f"{path}: has no effect yet" for path in config.without_effect()]


def effective_options(prepared: Prepared) -> dict[str, dict[str, Any]]:
    """The options of every module with their defaults, as they would stand in the file."""
    return {name: _as_data(options) for name, (_, options) in prepared.modules.items()}


def own_certfiles(config: Config) -> Mapping[str, tuple[Path, ...]]:
    """The certificate files of hosts that have others than all the rest."""
    files = {host: config.for_host(host).certfiles for host in config.hosts}
    return {host: own for host, own in files.items() if own != config.certfiles}


def validator(config: Config) -> Any:
    """Validates modules' options, and names the file they came from."""

    def validate(kind: type[Any], options: Mapping[str, Any], path: str) -> Any:
        return configuration.validate_dataclass(kind, options, path, source=config.file_of(path))

    return validate


def _loader(config: Config) -> ModuleLoader:
    return ModuleLoader(
        hooks=Hooks(),
        iqs=IqHandlers(),
        registry=Registry(),
        context=_nothing_starts,
        validate=validator(config),
        access=Access(AccessRules(config)),
        paths=config.module_paths,
    )


def _nothing_starts(name: str) -> Context:
    raise AssertionError(f"{name} is only to be checked")


def _can_write(file: Path) -> bool:
    if file.exists():
        return file.is_file() and os.access(file, os.W_OK)
    return file.parent.is_dir() and os.access(file.parent, os.W_OK)


def _as_data(options: Any) -> dict[str, Any]:
    if not is_dataclass(options):
        return {}
    data: dict[str, Any] = TypeAdapter(type(options)).dump_python(options, mode="json", fallback=str)
    return {configuration.option_name(field.name): data[field.name] for field in fields(options)}
