"""What a reload of the configuration would change, and what of it needs a restart."""

from dataclasses import dataclass
from typing import Any, Final, Literal

from .checks import listener_rules
from .loader import Config
from .problems import masked

# Everything below these is taken up at start only.
RESTART: Final = ("node", "data_dir", "hosts", "listen", "database", "cluster", "outbox", "module_paths")


@dataclass(frozen=True, slots=True)
class Change:
    """One option that differs. Values are as they would stand in the file, passwords masked; None: it is not there."""

    path: str
    old: Any
    new: Any
    applies: Literal["now", "restart"]

    def __str__(self) -> str:
        return f"{self.path}: {_text(self.old)} -> {_text(self.new)}"


def _text(value: Any) -> str:
    return "(not set)" if value is None else str(value)


def _leaves(value: Any, path: str) -> dict[str, Any]:
    if isinstance(value, dict) and value:
        found: dict[str, Any] = {}
        for key, item in value.items():
            found |= _leaves(item, f"{path}.{key}" if path else str(key))
        return found
    if isinstance(value, list) and any(isinstance(item, dict) for item in value) and path == "listen":
        found = {}
        for index, item in enumerate(value):
            found |= _leaves(item, f"{path}[{index}]")
        return found
    return {path: value}


def diff(old: Config, new: Config) -> list[Change]:
    """Every option that differs, in the order of the file's schema; lists other than `listen` count as one value."""
    before, after = _leaves(old.model_dump(mode="json"), ""), _leaves(new.model_dump(mode="json"), "")
    changes = []
    for path in dict.fromkeys([*before, *after]):
        one, other = before.get(path), after.get(path)
        if one != other or (path in before) != (path in after):
            top = path.partition(".")[0].partition("[")[0]
            applies: Literal["now", "restart"] = "restart" if top in RESTART else "now"
            changes.append(Change(path, masked(path, one), masked(path, other), applies))
    return changes


def running(old: Config, new: Config) -> tuple[Config, list[str]]:
    """What holds after a reload: `new`, with what needs a restart as it was. And what does not go together then: the
    listeners, which stay, may need rules that the new file has no more."""
    mixed = new.keeping(old, RESTART)
    words = "(the listeners that are open need it until the restart)"
    return mixed, [f"{new.file_of(path)}: {path}: {problem} {words}" for path, problem in listener_rules(mixed)]
