"""Finds xmppd.yml, reads it, and makes one validated, frozen Config of it, or names everything that is wrong."""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from ipaddress import IPv4Network, IPv6Network
from operator import attrgetter
from pathlib import Path, PurePath
from typing import Any, Final, TypeVar

from pydantic import ConfigDict as PydanticConfig
from pydantic import PrivateAttr, TypeAdapter, ValidationError

from xmppd.errors import ConfigError

from .checks import contradictions
from .hosts import normalise_host
from .includes import Files, lay_over, read_files
from .per_host import HostConfig, host_config
from .problems import explain, key, option_name
from .schema import (
    DEFAULT_MODULES,
    DEFAULT_NAMES,
    NO_EFFECT_YET,
    AppendHostOptions,
    C2SListen,
    HostOptions,
    Schema,
)
from .types import Rate

T = TypeVar("T")

BUILT_IN: Final = "built-in defaults"
_COMMAND_LINE: Final = "command line"
SEARCH: Final = (Path("etc/xmppd.yml"), Path("/etc/xmppd/xmppd.yml"))
_MODULE_NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,63}", re.ASCII)
_GROUPS: Final = (
    *("auth_scram", "login_limits", "database", "cluster", "routing", "modules", "api_tokens", "api_permissions"),
    *("host_config", "append_host_config", *Schema.MERGED),
)


class Config(Schema):
    """The whole configuration, validated and frozen. Made by `load` and `parse`."""

    _source: str = PrivateAttr(default=BUILT_IN)
    _path: Path | None = PrivateAttr(default=None)
    _origins: dict[str, str] = PrivateAttr(default_factory=dict)
    _sources: dict[str, str] = PrivateAttr(default_factory=dict)
    _asked: tuple[Mapping[str, Any], str | None] = PrivateAttr(default=({}, None))
    _per_host: dict[str, HostConfig] = PrivateAttr(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        """Equal options; where they came from does not count."""
        return self.__dict__ == other.__dict__ if isinstance(other, Config) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    @property
    def source(self) -> str:
        """The file's name as it was given, or `built-in defaults`."""
        return self._source

    @property
    def path(self) -> Path | None:
        """The file, to read it again on reload_config."""
        return self._path

    def for_host(self, host: str) -> HostConfig:
        """The options as they hold for one of `hosts`; KeyError for any other."""
        if host not in self.hosts:
            raise KeyError(host)
        found = self._per_host.get(host)
        if found is None:
            found = self._per_host[host] = host_config(self, host)
        return found

    def again(self) -> "Config":
        """The same file read anew, under the same options of the command line; ConfigError."""
        overrides, node = self._asked
        return load(self._path, overrides=overrides, node=node)

    def keeping(self, other: "Config", names: Iterable[str]) -> "Config":
        """This configuration with some top-level options as `other` has them."""
        mixed = self.model_copy(update={name: getattr(other, name) for name in names})
        mixed._per_host = {}
        return mixed

    def file_of(self, path: str) -> str:
        """The file to name in a message about this path: that of the value itself, or of what it stands in."""
        return _file_of(self._sources, path, self._source)

    def source_of(self, path: str) -> str:
        """Where the value at a path such as `listen[1].port` came from: `FILE:LINE`, `override` or `default`."""
        for name in (path, re.sub(r"^modules\.", "modules.mod_", path)):
            if name in self._origins:
                return self._origins[name]
        return "default"

    def without_effect(self) -> list[str]:
        """Paths set to something else than the default although nothing acts on them yet; the server warns of them."""
        default = parse({}, source=BUILT_IN)
        return [path for path in NO_EFFECT_YET if _differs(self, default, path)]

    def module_options(self, name: str, kind: type[T]) -> T:
        """The validated options of a module listed under `modules:`; ConfigError names what is wrong with them."""
        return validate_dataclass(kind, self.modules[name], f"modules.{name}", source=self.file_of(f"modules.{name}"))


def _differs(config: Config, default: Config, path: str) -> bool:
    if path.startswith("listen[]."):
        name = path.removeprefix("listen[].")
        usual = C2SListen.model_fields[name].default
        return any(getattr(listener, name) != usual for listener in config.listen if isinstance(listener, C2SListen))
    path, _, value = path.partition(": ")
    get = attrgetter(path)
    return value in get(config) if value else get(config) != get(default)


def validate_dataclass(kind: type[T], options: Mapping[str, Any], path: str, *, source: str = "xmppd.yml") -> T:
    """An instance of a module's `Config` dataclass from its raw options. `path` is such as `modules.offline`.

    Types are taken strictly (`true` is no number, `'5'` is no number). Raises ConfigError with every fault.
    """
    # Deliberately not cached: a module that is reloaded brings a new class, the old one must be free to go.
    kind.__pydantic_config__ = PydanticConfig(  # type: ignore[attr-defined]
        extra="forbid", alias_generator=option_name
    )
    adapter = TypeAdapter(kind)
    data = dict(options)
    try:
        return adapter.validate_json(_encode(data), strict=True)
    except ValidationError as exc:
        raise ConfigError(explain(exc, data, kind, source=source, prefix=path)) from None
    except _Unspeakable as exc:
        raise ConfigError([f"{source}: {path}: {exc}"]) from None


class _Unspeakable(Exception):
    """Something no YAML file could have said."""


def _encode(data: Mapping[str, Any]) -> str:
    """JSON text: pydantic's strict rules for JSON are the ones that fit YAML (a list is a tuple, true is no number)."""

    def other(value: object) -> object:
        if isinstance(value, PurePath | IPv4Network | IPv6Network | Rate):
            return str(value)
        if isinstance(value, Mapping):
            return dict(value)
        raise TypeError(f"a value of type {type(value).__name__} cannot stand in a configuration")

    try:
        text = json.dumps(data, default=other, allow_nan=False)
        text.encode()
        if re.search(r"\\ud[89a-f]", text) and any(0xD800 <= ord(char) < 0xE000 for char in _texts(json.loads(text))):
            raise ValueError("a text contains half a character")
    except (TypeError, ValueError, RecursionError) as exc:
        raise _Unspeakable(str(exc)) from None
    return text


def _texts(data: object) -> str:
    if isinstance(data, dict):
        return "".join(_texts(item) for pair in data.items() for item in pair)
    if isinstance(data, list):
        return "".join(map(_texts, data))
    return data if isinstance(data, str) else ""


def _prepare(data: Mapping[str, Any], at: Callable[[str], str]) -> tuple[dict[str, Any], list[str]]:
    """The data with built-in names merged in and modules under their canonical names, and what was wrong with those."""
    problems: list[str] = []
    ready = dict(data)
    for group in _GROUPS:
        if group in ready and ready[group] is None:
            ready[group] = {}  # `modules:` with everything below it commented out
    for group in Schema.MERGED:
        given = ready.get(group, {})
        if isinstance(given, Mapping):
            ready[group] = {**DEFAULT_NAMES[group], **_names(group, given)}
    for section, kind in (("host_config", HostOptions), ("append_host_config", AppendHostOptions)):
        if isinstance(ready.get(section), Mapping):
            ready[section] = _hosts(section, ready[section], kind, at, problems)
    modules = ready.get("modules", dict.fromkeys(DEFAULT_MODULES))
    if isinstance(modules, Mapping):
        ready["modules"] = {}
        for written, options in modules.items():
            name = str(written).removeprefix("mod_")
            path = f"modules.{written}"
            if not _MODULE_NAME.fullmatch(name):
                problems.append(f"{at(path)}: modules.{written!r}: expected the name of a module such as roster")
            elif name in ready["modules"]:
                words = f"this is {name}, which is listed too; keep one of them"
                problems.append(f"{at(path)}: modules.mod_{name}: {words}")
            else:
                ready["modules"][name] = {} if options is None else options
    return ready, problems


def _hosts(
    section: str,
    given: Mapping[str, Any],
    kind: type[AppendHostOptions],
    at: Callable[[str], str],
    problems: list[str],
) -> dict[str, Any]:
    """A section by host, with prepared names, without the options that cannot stand there."""
    hosts: dict[str, Any] = {}
    for written, options in given.items():
        path = f"{section}.{key(written)}"
        try:
            host = normalise_host(written)
        except ValueError as exc:
            problems.append(f"{at(path)}: {path}: {exc}")
            continue
        if host in hosts:
            problems.append(f"{at(path)}: {path}: {host} is listed twice")
        elif isinstance(options, Mapping):
            for option in options:
                if option in Schema.model_fields and option not in kind.model_fields:
                    one_value = option in HostOptions.model_fields
                    why = "has one value; set it in host_config" if one_value else "cannot differ from host to host"
                    problems.append(f"{at(f'{path}.{option}')}: {path}.{option}: {why}")
            hosts[host] = {
                option: _names(option, value) if option in Schema.MERGED and isinstance(value, Mapping) else value
                for option, value in options.items()
                if option in kind.model_fields or option not in Schema.model_fields
            }
        else:
            hosts[host] = {} if options is None else options
    return hosts


def _names(group: str, given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _named(group, item) for name, item in given.items()}


def _named(group: str, item: Any) -> Any:
    if group == "shaper" and isinstance(item, int | str) and not isinstance(item, bool):
        return {"rate": item}  # ejabberd's short form, `fast: 50000`
    if group == "shaper" and isinstance(item, Mapping) and "burst_size" in item and "burst" not in item:
        return {"burst" if name == "burst_size" else name: value for name, value in item.items()}  # ejabberd's word
    return {} if group == "acl" and item is None else item


def parse(data: Mapping[str, Any], *, source: str, sources: Mapping[str, str] | None = None) -> Config:
    """A Config from values as YAML gives them; `source` stands in front of each problem, or what `sources` has for
    the value's path. `include_config_file` is not followed: `load` does that.

    Raises ConfigError with all problems at once.
    """
    known = dict(sources or {})

    def at(path: str) -> str:
        return _file_of(known, path, source)

    ready, problems = _prepare(data, at)
    broken: set[str] = set()
    try:
        try:
            config = Config.model_validate_json(_encode(ready), strict=True)
        except ValidationError as exc:
            problems += explain(exc, ready, Schema, source=at)
            broken = {str(error["loc"][0]) if error["loc"] else "" for error in exc.errors(include_url=False)}
            sound = {key: value for key, value in ready.items() if key not in broken}
            config = Config.model_validate_json(_encode(sound), strict=True)
    except _Unspeakable as exc:
        raise ConfigError([*problems, f"{source}: {exc}"]) from None
    problems += [f"{at(path)}: {path}: {words}" for path, words in contradictions(config, broken=broken)]
    if problems:
        raise ConfigError(problems)
    url = config.database.url.replace("{data_dir}", str(config.data_dir))  # the one value that is made of two
    config = config.model_copy(update={"database": config.database.model_copy(update={"url": url})})
    config._source = source
    config._sources = known
    config._origins = dict.fromkeys(_paths(dict(data)), source)
    return config


def _file_of(sources: Mapping[str, str], path: str, otherwise: str) -> str:
    while path:
        found = sources.get(path) or sources.get(re.sub(r"^modules\.", "modules.mod_", path))
        if found is not None:
            return found
        path = path[: max(path.rfind("."), path.rfind("["), 0)]
    return otherwise


def _paths(data: Any, path: str = "") -> list[str]:
    found = [path] if path else []
    if isinstance(data, Mapping):
        for key, value in data.items():
            found += _paths(value, f"{path}.{key}" if path else str(key))
    elif isinstance(data, list | tuple):
        for index, value in enumerate(data):
            found += _paths(value, f"{path}[{index}]")
    return found


def _find(path: Path | None) -> Path | None:
    if path is not None:
        return path
    if given := os.environ.get("XMPPD_CONFIG"):
        return Path(given)
    return next((candidate for candidate in SEARCH if os.path.lexists(candidate)), None)


def load(path: Path | None = None, *, overrides: Mapping[str, Any] | None = None, node: str | None = None) -> Config:
    """The configuration of this node.

    Without `path`: $XMPPD_CONFIG, ./etc/xmppd.yml, /etc/xmppd/xmppd.yml, else the built-in defaults. `overrides` are
    laid over the file (mappings are merged, anything else replaces); `node` is the name from the command line.
    Raises ConfigError with all problems at once.
    """
    file = _find(path)
    files = read_files(file) if file is not None else Files({}, {}, {})
    above = {**(overrides or {}), **({"node": node} if node is not None else {})}
    said = _paths(above)
    whole = lay_over(files, Files(above, dict.fromkeys(said, "override"), dict.fromkeys(said, _COMMAND_LINE)))
    config = parse(whole.data, source=str(file) if file else BUILT_IN, sources=whole.sources)
    config._path = file
    config._origins = whole.origins | _other_spellings(whole)
    config._asked = (overrides or {}, node)
    return config


def _other_spellings(files: Files) -> dict[str, str]:
    """Where values came from whose path in the configuration is another than in the file."""
    origins: dict[str, str] = {}
    shapers = files.data.get("shaper")
    for name, value in shapers.items() if isinstance(shapers, Mapping) else ():
        path = f"shaper.{name}"
        if not isinstance(value, Mapping):
            origins[f"{path}.rate"] = files.origins[path]
        elif "burst_size" in value:
            origins[f"{path}.burst"] = files.origins[f"{path}.burst_size"]
    return origins
