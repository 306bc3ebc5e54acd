"""Options that ejabberd hands to Erlang's HTTP client: what of them means something here."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class HttpOptions:
    """Seconds; files."""

    timeout: float = 30.0
    connect_timeout: float = 10.0
    verify: bool = True
    cafile: str | None = None
    certfile: str | None = None
    unknown: tuple[str, ...] = ()


def pairs(value: Any) -> Iterable[tuple[str, Any]]:
    """Of `{a: 1}`, `[{a: 1}, ...]` and `[[a, 1], ...]`."""
    if isinstance(value, Mapping):
        yield from ((str(name), item) for name, item in value.items())
    elif isinstance(value, list | tuple):
        for item in value:
            if isinstance(item, Mapping):
                yield from pairs(item)
            elif isinstance(item, list | tuple) and len(item) == 2:
                yield str(item[0]), item[1]
            else:
                yield str(item), True


def understood(http_options: Any, req_options: Any) -> HttpOptions:
    """Times are milliseconds there."""
    found: dict[str, Any] = {}
    unknown = [f"req_options.{name}" for name, _ in pairs(req_options)]
    for name, value in pairs(http_options):
        if name in ("timeout", "connect_timeout") and isinstance(value, int | float) and value > 0:
            found[name] = value / 1000
        elif name == "ssl":
            for own, detail in pairs(value):
                if own == "verify":
                    found["verify"] = str(detail) != "verify_none"
                elif own == "cacertfile":
                    found["cafile"] = str(detail)
                elif own == "certfile":
                    found["certfile"] = str(detail)
                else:
                    unknown.append(f"http_options.ssl.{own}")
        else:
            unknown.append(f"http_options.{name}")
    return HttpOptions(**found, unknown=tuple(unknown))
