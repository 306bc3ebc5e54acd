"""Who may call which admin command over HTTP, or as an observer: `api_permissions`, `api_tokens`; ejabberd's words.

    api_tokens: {grafana: 2bb80d53...}                    # SHA-256 of the token, 64 hexadecimal digits
    api_permissions:
      monitoring:
        who: {token: grafana}
        what: [stats, "connected_users*", "[tag:session]", "!kick_user"]
      local:
        who: {acl: loopback}
        what: status

Nobody may do anything until an entry says so.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from ipaddress import IPv4Network, IPv6Network
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, PlainValidator

from .types import parse_network, several

# Commands that give rights away. Whoever may use them may do everything, so no pattern covers them by accident.
GUARDED_TAG: Final = "api"

_TOKEN_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}", re.ASCII)
_HASH: Final = re.compile(r"(?:sha256:)?([0-9a-f]{64})", re.ASCII | re.IGNORECASE)
_PATTERN: Final = re.compile(r"!?(?:\[tag:[a-z0-9_-]{1,40}\]|[a-z0-9_*?][a-z0-9_ *?-]{0,79})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Who:
    """Somebody: every kind that is given must fit, of each kind any one does."""

    token: tuple[str, ...] = ()
    acl: tuple[str, ...] = ()
    ip: tuple[IPv4Network | IPv6Network, ...] = ()
    observer: tuple[str, ...] = ()


def _some(value: object) -> list[object]:
    return list(value) if isinstance(value, list | tuple) else [value]


def token_name(value: object) -> str:
    """The name of a token; ValueError for what cannot be one."""
    if isinstance(value, str) and _TOKEN_NAME.fullmatch(value):
        return value
    raise ValueError("expected a name of letters, digits, _ . - (40 at most)")


def observer_name(value: object) -> str:
    """The name of an observer; ValueError for what cannot be one."""
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_-]{1,40}", value, re.ASCII) and value != "xmppd":
        return value
    raise ValueError("expected a name of letters, digits, _ and - (40 at most) other than xmppd")


def _acl_name(value: object) -> str:
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", value, re.ASCII):
        return value
    raise ValueError("expected the name of an acl, such as loopback")


def _one(value: object) -> Who:
    if isinstance(value, Who):
        return value
    if isinstance(value, str):
        return Who(acl=(_acl_name(value),))
    if not isinstance(value, Mapping) or not value or not value.keys() <= {"token", "acl", "ip", "observer"}:
        raise ValueError("expected token, acl, ip or observer, such as {token: grafana}")
    return Who(
        tuple(token_name(item) for item in _some(value.get("token", []))),
        tuple(_acl_name(item) for item in _some(value.get("acl", []))),
        tuple(parse_network(item) for item in _some(value.get("ip", []))),
        tuple(observer_name(item) for item in _some(value.get("observer", []))),
    )


def _who(value: object) -> tuple[Who, ...]:
    found = tuple(_one(item) for item in _some(value))
    if any(who == Who() for who in found):
        raise ValueError("expected somebody: an empty list of tokens, acls or addresses is nobody")
    return found


def _who_data(value: tuple[Who, ...]) -> list[dict[str, list[str]]]:
    return [
        {kind: [str(item) for item in getattr(who, kind)] for kind in who.__slots__ if getattr(who, kind)}
        for who in value
    ]


def pattern(value: object) -> str:
    """One entry of `what`; ValueError tells the forms there are."""
    if isinstance(value, str) and _PATTERN.fullmatch(value):
        return value
    raise ValueError('expected a command, a pattern such as "connected_*", "[tag:session]", or one of these behind !')


def _hash(value: object) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, str) and (match := _HASH.fullmatch(value)):
        return bytes.fromhex(match[1])
    raise ValueError("expected the SHA-256 of the token, 64 hexadecimal digits")


def covers(patterns: tuple[str, ...], name: str, tags: tuple[str, ...]) -> bool:
    """Whether `what` covers a command: something in it fits, and nothing behind `!` does."""
    allowed = False
    for entry in patterns:
        if _fits(entry.removeprefix("!"), name, tags, refuses=entry.startswith("!")):
            if entry.startswith("!"):
                return False
            allowed = True
    return allowed


def _fits(entry: str, name: str, tags: tuple[str, ...], *, refuses: bool) -> bool:
    if entry in (name, name.replace(" ", "_")):
        return True
    if GUARDED_TAG in tags and not refuses:
        return False
    if entry.startswith("["):
        return entry[5:-1] in tags
    return fnmatchcase(name, entry) or fnmatchcase(name.replace(" ", "_"), entry)


def _from(value: object) -> object:
    return "http" if value == "mod_http_api" else value


Whos = Annotated[tuple[Who, ...], PlainValidator(_who), PlainSerializer(_who_data, when_used="json")]
Pattern = Annotated[str, PlainValidator(pattern)]
ObserverName = Annotated[str, PlainValidator(observer_name)]
TokenName = Annotated[str, PlainValidator(token_name)]
TokenHash = Annotated[
    bytes, PlainValidator(_hash), PlainSerializer(lambda value: value.hex(), return_type=Any, when_used="json")
]


class ApiPermission(BaseModel):
    """These people may call these commands."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), serialize_by_alias=True)

    from_: Annotated[tuple[Annotated[Literal["http", "observer"], BeforeValidator(_from)], ...], several] = Field(
        default=("http",), alias="from"
    )
    who: Whos
    what: Annotated[tuple[Pattern, ...], several, Field(min_length=1)]
