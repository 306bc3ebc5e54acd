"""Says what is wrong with a configuration in plain words: path, value, and the nearest valid word."""

import dataclasses
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ValidationError

_USERINFO: Final = re.compile(r"([a-z][a-z0-9+.-]*://[^:/?#\s]*:).*@", re.IGNORECASE | re.DOTALL)
_SECRET: Final = re.compile(r"pass(word|wd|phrase)?|secret|token|cookie|api_?key|private_?key", re.IGNORECASE)
_HASHES: Final = "api_tokens."  # or what somebody took for one: the token itself
# Below these stand names of the operator's own, and whom they mean: `api_permissions.x.who` names tokens.
_NAMES: Final = re.compile(r"(?:\w*host_config\..*\.)?(?:acl|access_rules|shaper|shaper_rules|api_permissions)\.")

# What each kind of fault expected; the value is added behind it.
_EXPECTED: Final[dict[str, str]] = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a number",
    "decimal": "a number",
    "bool": "true or false",
    "string": "text",
    "bytes": "text",
    "list": "a list",
    "tuple": "a list",
    "set": "a list",
    "frozen": "a list",
    "iterable": "a list",
    "dict": "options (name: value)",
    "mapping": "options (name: value)",
    "model": "options (name: value)",
    "dataclass": "options (name: value)",
    "path": "a path",
    "url": "a URL",
    "date": "a date",
    "time": "a time",
    "datetime": "a date with time",
    "uuid": "a UUID",
    "ip": "an address",
    "none": "nothing",
}


def mask(text: str) -> str:
    """The text with the passwords of all URLs in it replaced."""
    return _USERINFO.sub(r"\1***@", text)


def _is_secret(path: str) -> bool:
    if path.startswith(_HASHES):
        return True
    return _SECRET.search(path.rpartition(".")[2]) is not None and _NAMES.match(path) is None


def masked(path: str, value: Any) -> Any:
    """The value as it may be shown: whole for harmless paths, `***` behind a key such as `password`."""
    if isinstance(value, str):
        return "***" if _is_secret(path) else mask(value)
    if isinstance(value, Mapping):
        return {key: masked(f"{path}.{key}", item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [masked(path, item) for item in value]
    return value


def suggest(word: object, candidates: Iterable[str]) -> str:
    """` Did you mean X?` for the nearest candidate, or nothing."""
    near = get_close_matches(str(word), list(candidates), n=1, cutoff=0.6)
    return f" Did you mean {near[0]}?" if near else ""


def shown(value: object, path: str = "") -> str:
    """A value as it stands in a message: short, on one line, without secrets."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return "options"
    if isinstance(value, list | tuple | set):
        return "a list"
    text = repr(masked(path, value)) if isinstance(value, str) else str(value)
    return text if len(text) <= 80 else f"{text[:76]}...{text[-1]}"


def key(part: object) -> str:
    """A mapping key as it stands in a path; quoted when it is not plain text."""
    text = str(part)
    return text if text.isprintable() and 0 < len(text) <= 80 else repr(text[:80])


def path_of(location: Sequence[int | str], data: Any, prefix: str = "") -> str:
    """`listen[1].port` for a location of pydantic's; names of union members in it are left out."""
    path = prefix
    for number, part in enumerate(location):
        last = number == len(location) - 1
        if isinstance(part, int) and isinstance(data, list | tuple):
            path += f"[{part}]"
            data = data[part] if part < len(data) else None
        elif isinstance(data, Mapping) and (part in data or last) and part != "[key]":
            path += f".{key(part)}" if path else key(part)
            data = data.get(part)
    return path


def option_name(field: str) -> str:
    """The option that a field of a module's `Config` stands for: `from` for `from_`, which Python has taken."""
    return field.removesuffix("_")


def _hints(kind: Any) -> dict[str, Any] | None:
    if isinstance(kind, type) and (issubclass(kind, BaseModel) or dataclasses.is_dataclass(kind)):
        hints = get_type_hints(kind, include_extras=True)
        if issubclass(kind, BaseModel):
            return {name: hints[name] for name in kind.model_fields}
        return {option_name(field.name): hints[field.name] for field in dataclasses.fields(kind) if field.init}
    return None


def options_at(kind: Any, location: Sequence[int | str]) -> list[str]:
    """Names of the options the schema knows at a location, for `Did you mean`."""
    while get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if get_origin(kind) in (Union, types.UnionType):
        return _options_of_member(get_args(kind), location)
    hints = _hints(kind)
    if hints is not None:
        if not location:
            return list(hints)
        return options_at(hints[str(location[0])], location[1:]) if location[0] in hints else []
    arguments = get_args(kind)
    if location and arguments:
        return options_at(arguments[-1 if isinstance(location[0], str) else 0], location[1:])
    return []


def _options_of_member(members: Sequence[Any], location: Sequence[int | str]) -> list[str]:
    for member in members:
        hints = _hints(member) or {}
        for hint in hints.values():
            if location and get_origin(hint) is Literal and location[0] in get_args(hint):
                return options_at(member, location[1:])  # a tagged union: the location names the tag
    names = [name for member in members for name in options_at(member, location)]
    return names or [name for member in members for name in options_at(member, location[1:])] if location else names


def _choices(text: str) -> list[str]:
    return re.findall(r"'([^']*)'", text)


def _one_of(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"one of {', '.join(words)}"


def _tag(context: Mapping[str, Any]) -> str:
    return str(context["discriminator"]).strip("'")


def _bound(context: Mapping[str, Any]) -> str:
    for name, words in (("ge", "at least"), ("gt", "more than"), ("le", "at most"), ("lt", "less than")):
        if name in context:
            return f"a number of {words} {context[name]}"
    for name, words in (("min_length", "at least"), ("max_length", "at most")):
        if name in context:
            what = "entry" if context[name] == 1 else "entries"
            return f"{words} {context[name]} {what}"
    return f"a multiple of {context['multiple_of']}" if "multiple_of" in context else "another value"


def _describe(kind: str, context: Mapping[str, Any], value: object, path: str) -> tuple[str, str]:
    """What was expected (or a whole sentence) and what to add behind the value."""
    if kind in ("literal_error", "enum"):
        words = _choices(str(context.get("expected", "")))
        return f"expected {_one_of(words)}" if words else "expected another value", suggest(value, words)
    if kind in ("value_error", "assertion_error"):
        return mask(str(context.get("error", "") or "not acceptable")), ""
    if kind.startswith("string_too_"):
        length = context.get("min_length", context.get("max_length"))
        return f"expected text of {'at least' if 'min_length' in context else 'at most'} {length} characters", ""
    if kind == "string_pattern_mismatch":
        return f"expected text that matches {context.get('pattern')}", ""
    if kind.startswith(("greater_than", "less_than", "multiple_of")) or kind in ("too_short", "too_long"):
        return f"expected {_bound(context)}", ""
    what = _EXPECTED.get(kind.partition("_")[0], "another value")
    quotes = what == "text" and isinstance(value, bool | int | float)
    return f"expected {what}", "; put it in quotes" if quotes else ""


def explain(
    exc: ValidationError, data: Any, schema: Any, *, source: str | Callable[[str], str], prefix: str = ""
) -> list[str]:
    """One line per fault: `etc/xmppd.yml: listen[1].port: expected a number from 0 to 65535, got '5222x'`.

    `source` is the file, or tells the file of a path; `data` is what was validated, `schema` its type; `prefix` stands
    before each path, such as `modules.offline`.
    """
    lines: dict[str, list[str]] = {}
    tails: dict[str, str] = {}
    for error in exc.errors(include_url=False):
        kind, context, value = error["type"], error.get("ctx", {}), error["input"]
        location = error["loc"]
        if kind == "default_factory_not_called":  # its default hangs on an option that is itself at fault
            continue
        path = path_of(location, data, prefix)
        if kind in ("extra_forbidden", "unexpected_keyword_argument"):
            near = suggest(location[-1], options_at(schema, location[:-1]))
            lines.setdefault(path, []).append(f"unknown option.{near}" if near else "unknown option")
            continue
        if kind in ("missing", "missing_argument", "union_tag_not_found"):
            tag = f".{_tag(context)}" if kind == "union_tag_not_found" else ""
            lines.setdefault(path + tag, []).append("this option is required")
            continue
        if kind == "union_tag_invalid":
            words, value = _choices(str(context["expected_tags"])), context["tag"]
            path = f"{path}.{_tag(context)}"
            text, extra = f"expected {_one_of(words)}", suggest(value, words)
        else:
            text, extra = _describe(kind, context, value, path)
        lines.setdefault(path, []).append(text)
        if not text.startswith("expected"):  # a sentence of its own, which has said what there was
            continue
        tails[path] = f", got {shown(value, path)}{'.' if extra.startswith(' ') else ''}{extra}"

    def line(path: str, texts: list[str]) -> str:
        file = source if isinstance(source, str) else source(path)
        words = " or ".join(dict.fromkeys(texts)).replace(" or expected", " or")
        return f"{file}: {path}: {words}{tails.get(path, '')}"

    return [line(path, texts) for path, texts in lines.items()]
