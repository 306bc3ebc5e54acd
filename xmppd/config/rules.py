"""Access rules and shaper rules: ordered lists of `value: acl`, of which the first that matches counts.

`[{deny: blocked}, {allow: all}]`, ejabberd's mapping `{deny: blocked, allow: all}` and a single value such as `allow`
or `10` (for all) are the same kind of thing and all accepted.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Final

from pydantic import PlainSerializer, PlainValidator

INFINITY: Final = "infinity"
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Rule:
    """Whoever is in `acl` gets `value`: allow, deny, none, infinity, a shaper's name or a number."""

    value: str | int
    acl: str


def _rule(value: object, acl: object, check: Callable[[str], bool], words: str) -> Rule:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(words)
    if not isinstance(acl, str) or not _NAME.fullmatch(acl):
        raise ValueError(f"expected the name of an acl behind {str(value)[:40]!r}")
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,12}", value, re.ASCII):
        value = int(value)  # keys of a mapping are text
    if value == "unlimited":
        value = INFINITY
    if isinstance(value, str) and not check(value):
        raise ValueError(words)
    if isinstance(value, int) and value < 0:
        raise ValueError(words)
    return Rule(value, acl)


def _rules(check: Callable[[str], bool], words: str) -> Callable[[object], tuple[Rule, ...]]:
    def parse(data: object) -> tuple[Rule, ...]:
        rules = []
        for item in data if isinstance(data, list | tuple) else [data]:
            if isinstance(item, Rule):
                rules.append(item)
            elif isinstance(item, dict) and item:
                rules += [_rule(value, acl, check, words) for value, acl in item.items()]
            else:
                rules.append(_rule(item, "all", check, words))
        if not rules:
            raise ValueError(words)
        return tuple(rules)

    return parse


def _as_data(rules: tuple[Rule, ...]) -> list[dict[str, str]]:
    return [{str(rule.value): rule.acl} for rule in rules]


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
