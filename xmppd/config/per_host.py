"""The options as they hold for one host: the general ones, `host_config` in their place, `append_host_config` behind.

Of the mappings (acl, access_rules, shaper_rules) `host_config` replaces single names; `append_host_config` adds
conditions to an acl and rules behind those of a name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from .rules import Rule
from .schema import Acl, AppendHostOptions, AuthMethod, AuthScram, HostOptions, ResourceConflict, Schema

T = TypeVar("T")
Rules = Mapping[str, tuple[Rule, ...]]


@dataclass(frozen=True, slots=True)
class HostConfig:
    """The options that may differ from host to host."""

    host: str
    certfiles: tuple[Path, ...]
    auth_method: tuple[AuthMethod, ...]
    auth_scram: AuthScram
    disable_sasl_mechanisms: tuple[str, ...]
    resource_conflict: ResourceConflict
    acl: Mapping[str, Acl]
    access_rules: Rules
    shaper_rules: Rules


def host_config(config: Schema, host: str) -> HostConfig:
    """The options of one host, whether it is in `hosts` or not."""
    own = config.host_config.get(host, HostOptions())
    more = config.append_host_config.get(host, AppendHostOptions())

    def one(name: str) -> Any:
        return getattr(own if name in own.model_fields_set else config, name)

    def several(name: str) -> Any:
        return tuple(dict.fromkeys((*one(name), *getattr(more, name))))

    def rules(name: str) -> Rules:
        named: dict[str, tuple[Rule, ...]] = {**getattr(config, name), **getattr(own, name)}
        for key, added in getattr(more, name).items():
            named[key] = (*named.get(key, ()), *added)
        return named

    return HostConfig(
        host,
        several("certfiles"),
        several("auth_method"),
        one("auth_scram"),
        several("disable_sasl_mechanisms"),
        one("resource_conflict"),
        _acls(config, own, more),
        rules("access_rules"),
        rules("shaper_rules"),
    )


def _acls(config: Schema, own: HostOptions, more: AppendHostOptions) -> Mapping[str, Acl]:
    named = {**config.acl, **own.acl}
    for name, added in more.acl.items():
        old = named.get(name, Acl())
        fields = {field: getattr(old, field) + getattr(added, field) for field in Acl.model_fields}
        named[name] = old.model_copy(update=fields)
    return named
