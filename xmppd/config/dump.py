"""The effective configuration as YAML: every value as it holds, and where it came from. Passwords are masked."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from .loader import Config
from .problems import masked

_PLAIN: Final = re.compile(r"[A-Za-z_/][A-Za-z0-9_./@-]*|[0-9]{1,12}(?:ms|[smhdB]|[KMG]iB|/[smhd])", re.ASCII)
_NO_TEXT: Final = frozenset({"true", "false", "null"})
_COLUMN: Final = 40  # where the comments stand, if the values leave room


def dump(config: Config, modules: Mapping[str, Mapping[str, Any]] | None = None) -> str:
    """YAML that reads as the same configuration, apart from masked passwords.

    `modules`: the options of each module with their defaults; without them those of the file are shown."""
    data = config.model_dump(mode="json")
    # Included already: a file that is made of this one must not include them once more.
    included = data.pop("include_config_file", [])
    data["acl"] = {name: {kind: who for kind, who in acl.items() if who} for name, acl in data["acl"].items()}
    if modules is not None:
        data["modules"] = {name: dict(options) for name, options in modules.items()}
    lines = [f"# includes {_flow(each)}" for each in included]
    return "\n".join([*lines, *_mapping(config, data, "", "")]) + "\n"


def _mapping(config: Config, data: Mapping[str, Any], path: str, indent: str) -> Iterator[str]:
    for name, value in data.items():
        at = f"{path}.{name}" if path else name
        yield from _entry(config, f"{indent}{_scalar(name)}:", value, at, indent)


def _entry(config: Config, start: str, value: Any, at: str, indent: str) -> Iterator[str]:
    if isinstance(value, Mapping) and value:
        yield start
        yield from _mapping(config, value, at, indent + "  ")
    elif at == "listen" and value:
        yield start
        for index, item in enumerate(value):
            lines = list(_mapping(config, item, f"{at}[{index}]", indent + "    "))
            yield f"{indent}  - {lines[0].lstrip()}"
            yield from lines[1:]
    else:
        text = f"{start} {_flow(masked(at, value))}"
        yield f"{text:<{_COLUMN}}  # {config.source_of(at)}"


def _flow(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_scalar(name)}: {_flow(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return _scalar(value)


def _scalar(value: Any) -> str:
    if isinstance(value, str):
        return value if _PLAIN.fullmatch(value) and value.lower() not in _NO_TEXT else _quoted(value)
    return json.dumps(value)


def _quoted(text: str) -> str:
    """Double quotes as JSON and YAML both have them; what YAML takes for a line break or refuses is escaped."""
    quoted = json.dumps(text, ensure_ascii=False)
    return re.sub("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]", lambda found: f"\\u{ord(found[0]):04x}", quoted)
