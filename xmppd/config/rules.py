"""Access rules and shaper rules: ordered lists of `value: acl`, of which the first that matches counts.

`[{deny: blocked}, {allow: all}]`, ejabberd's mapping `{deny: blocked, allow: all}` and a single value such as `allow`
or `10` (for all) are the same kind of thing and all accepted. Behind a value may stand several acls, of which all must
match: `{allow: [admin, office]}`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Final

from pydantic import PlainSerializer, PlainValidator

INFINITY: Final = "infinity"
BUILT_IN_ACLS: Final = ("all", "none", "loopback")
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Rule:
    """Whoever is in every one of `acls` gets `value`: allow, deny, none, infinity, a shaper's name or a number."""

    value: str | int
    acls: tuple[str, ...]


def _acls(data: object, value: object) -> tuple[str, ...]:
    """Names out of `admin`, `[admin, office]` or ejabberd's `{acl: admin}`."""
    names = []
    for item in data if isinstance(data, list | tuple) else [data]:
        name = item["acl"] if isinstance(item, dict) and list(item) == ["acl"] else item
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"expected the name of an acl behind {str(value)[:40]!r}")
        names.append(name)
    if not names:
        raise ValueError(f"expected the name of an acl behind {str(value)[:40]!r}")
    return tuple(names)


def _rule(value: object, acls: object, check: Callable[[str], bool], words: str) -> Rule:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(words)
    names = _acls(acls, value)
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,12}", value, re.ASCII):
        value = int(value)  # keys of a mapping are text
    if value == "unlimited":
        value = INFINITY
    if isinstance(value, str) and not check(value):
        raise ValueError(words)
    if isinstance(value, int) and value < 0:
        raise ValueError(words)
    return Rule(value, names)


def _rules(check: Callable[[str], bool], words: str) -> Callable[[object], tuple[Rule, ...]]:
    def parse(data: object) -> tuple[Rule, ...]:
        rules = []
        for item in data if isinstance(data, list | tuple) else [data]:
            if isinstance(item, Rule):
                rules.append(item)
            elif isinstance(item, dict) and item:
                rules += [_rule(value, acls, check, words) for value, acls in item.items()]
            else:
                rules.append(_rule(item, "all", check, words))
        if not rules:
            raise ValueError(words)
        return tuple(rules)

    return parse


def _as_data(rules: tuple[Rule, ...]) -> list[dict[str, str | list[str]]]:
    return [{str(rule.value): rule.acls[0] if len(rule.acls) == 1 else list(rule.acls)} for rule in rules]


_plain: Final[Any] = PlainSerializer(_as_data, when_used="json")

AccessRules = Annotated[
    tuple[Rule, ...],
    PlainValidator(
        _rules(
            lambda word: word in ("allow", "deny", INFINITY),
            "expected rules such as [{deny: blocked}, {allow: all}] or [{10: all}]",
        )
    ),
    _plain,
]
ShaperRules = Annotated[
    tuple[Rule, ...],
    PlainValidator(
        _rules(
            lambda word: _NAME.fullmatch(word) is not None,
            "expected rules such as [{none: admin}, {normal: all}] or [{100: all}]",
        )
    ),
    _plain,
]
