"""Other files that belong to xmppd.yml: `include_config_file`, in ejabberd's spellings.

`file.yml`, `[a.yml, b.yml]`, `{a.yml: {allow_only: [acl]}}` and a list of such mappings. A relative name counts from
the folder of the including file. An included file lies under the one that includes it: mappings are merged, of anything
else the including file's value counts; of two included files the later one's.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from xmppd.errors import ConfigError

from .problems import key, suggest
from .yaml_file import MAX_BYTES, read_yaml

INCLUDE: Final = "include_config_file"
MAX_DEPTH: Final = 8  # files that include files
MAX_FILES: Final = 64
# xmppctl looks for these in the main file, without following includes (it would need a YAML parser).
MAIN_FILE_ONLY: Final = ("node", "data_dir")
_WORDS: Final = "expected files such as acl.yml, [acl.yml, hosts.yml] or {acl.yml: {allow_only: [acl]}}"


@dataclass(frozen=True, slots=True)
class Include:
    """A file to include. `allow_only`: the only options it may have (None: all); `disallow`: those it may not."""

    file: str
    allow_only: frozenset[str] | None = None
    disallow: frozenset[str] = frozenset()

    def as_data(self) -> str | dict[str, dict[str, list[str]]]:
        """As it stands in a file."""
        limits = {"allow_only": self.allow_only, "disallow": self.disallow or None}
        said = {name: sorted(options) for name, options in limits.items() if options is not None}
        return {self.file: said} if said else self.file


@dataclass(frozen=True, slots=True)
class Files:
    """What the main file and all it includes say. `origins`: `FILE:LINE` of each path; `sources`: its file alone."""

    data: dict[str, Any]
    origins: dict[str, str]
    sources: dict[str, str]


def parse_includes(value: object) -> tuple[Include, ...]:
    """The includes in any of their spellings; ValueError."""
    found: list[Include] = []
    for item in [] if value is None else value if isinstance(value, list | tuple) else [value]:
        if isinstance(item, Include):
            found.append(item)
        elif isinstance(item, Mapping):
            found += [_limited(file, limits) for file, limits in item.items()]
        else:
            found.append(_limited(item, None))
    return tuple(found)


def _limited(file: object, limits: object) -> Include:
    if not isinstance(file, str) or not file.strip() or "\0" in file:
        raise ValueError(_WORDS)
    if limits is None:
        return Include(file)
    if not isinstance(limits, Mapping):
        raise ValueError(_WORDS)
    options: dict[str, frozenset[str]] = {}
    for name, listed in limits.items():
        if name not in ("allow_only", "disallow"):
            near = suggest(name, ("allow_only", "disallow"))
            raise ValueError(f"{key(name)} is neither allow_only nor disallow.{near}")
        options[name] = frozenset(_option_names(listed))
    return Include(file, options.get("allow_only"), options.get("disallow", frozenset()))


def _option_names(listed: object) -> Iterable[str]:
    from .schema import Schema  # which needs this file

    for name in listed if isinstance(listed, list | tuple) else [listed]:
        if not isinstance(name, str):
            raise ValueError(_WORDS)
        if name not in Schema.model_fields:
            raise ValueError(f"there is no option {name[:40]!r}.{suggest(name, Schema.model_fields)}")
        yield name


def read_files(main: Path) -> Files:
    """The main file with everything it includes. Raises ConfigError with all problems that could be found."""
    reader = _Reader()
    files = reader.read(main, (), lambda option: None)
    if reader.problems:
        raise ConfigError(reader.problems)
    return files


Refusal = Callable[[str], str | None]  # option -> why it may not stand here


class _Reader:
    def __init__(self) -> None:
        self.problems: list[str] = []
        self._count = 0

    def read(self, path: Path, chain: tuple[Path, ...], refusal: Refusal) -> Files:
        nothing = Files({}, {}, {})
        self._count += 1
        if self._count > MAX_FILES:
            if self._count == MAX_FILES + 1:
                self.problems.append(f"{path}: {INCLUDE}: more than {MAX_FILES} files")
            return nothing
        try:
            data, lines = read_yaml(_content(path), source=str(path))
        except ConfigError as exc:
            self.problems += exc.problems
            return nothing
        for option in list(data):
            why = refusal(option)
            if why is not None:
                self.problems.append(f"{path}: {option}: {why}")
                del data[option]
        below = self._included(path, data, (*chain, path.resolve()), refusal)
        if chain:
            data.pop(INCLUDE, None)
        own = Files(data, {at: f"{path}:{line}" for at, line in lines.items()}, dict.fromkeys(lines, str(path)))
        return lay_over(below, own)

    def _included(self, path: Path, data: Mapping[str, Any], chain: tuple[Path, ...], refusal: Refusal) -> Files:
        below = Files({}, {}, {})
        try:
            includes = parse_includes(data.get(INCLUDE))
        except ValueError as exc:
            self.problems.append(f"{path}: {INCLUDE}: {exc}")
            return below
        for include in includes:
            file = self._resolved(path, include)
            if file is None:
                continue
            if file.resolve() in chain:
                self.problems.append(f"{path}: {INCLUDE}: {include.file} includes itself, directly or over others")
            elif len(chain) > MAX_DEPTH:
                self.problems.append(f"{path}: {INCLUDE}: {include.file}: nested deeper than {MAX_DEPTH} files")
            else:
                below = lay_over(below, self.read(file, chain, _narrower(refusal, include, path)))
        return below

    def _resolved(self, path: Path, include: Include) -> Path | None:
        try:
            return path.parent / Path(include.file).expanduser()
        except RuntimeError as exc:  # ~nobody
            self.problems.append(f"{path}: {INCLUDE}: {include.file}: {exc}")
            return None


def _narrower(outer: Refusal, include: Include, by: Path) -> Refusal:
    """What an included file may not have: what its includer may not have either, and what that one forbids."""

    def refusal(option: str) -> str | None:
        if option in MAIN_FILE_ONLY:
            return "belongs into the main file, where xmppctl looks for it"
        if option in include.disallow or (include.allow_only is not None and option not in include.allow_only):
            return f"{by} does not let this file have this option"
        return outer(option)

    return refusal


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as exc:
        reason = (exc.strerror if isinstance(exc, OSError) else None) or str(exc)
        raise ConfigError([f"{path}: cannot be read: {reason}"]) from exc


def lay_over(below: Files, above: Files) -> Files:
    """Mappings are merged, of anything else the upper value counts; origins follow the values."""
    replaced: list[str] = []
    data = _merged(below.data, above.data, "", replaced)

    def left(where: dict[str, str]) -> dict[str, str]:
        if not replaced:
            return where
        return {path: at for path, at in where.items() if not any(_is_in(path, gone) for gone in replaced)}

    return Files(data, left(below.origins) | above.origins, left(below.sources) | above.sources)


def _merged(below: Mapping[str, Any], above: Mapping[str, Any], path: str, replaced: list[str]) -> dict[str, Any]:
    merged = dict(below)
    for name, value in above.items():
        at = f"{path}.{name}" if path else name
        old = merged.get(name)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            merged[name] = _merged(old, value, at, replaced)
        else:
            if name in merged:
                replaced.append(at)
            merged[name] = value
    return merged


def _is_in(path: str, whole: str) -> bool:
    return path.startswith(whole) and path[len(whole) : len(whole) + 1] in ("", ".", "[")
