"""Values of the configuration as people write them: durations, sizes, rates, networks, addresses.

Each parser takes what YAML gives (text or a number), returns the plain value, and raises `ValueError` with words
that fit behind `path: `. The annotated types are for pydantic models and for the `Config` dataclasses of modules.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from math import isfinite
from typing import Annotated, Any, Final

from pydantic import AfterValidator, BeforeValidator, PlainSerializer, PlainValidator
from pydantic_core import core_schema

_DURATION: Final = re.compile(r"([0-9]{1,12})(?:\.([0-9]{1,6}))?\s*(ms|s|m|h|d)?", re.ASCII)
_SIZE: Final = re.compile(r"([0-9]{1,19})\s*(B|KiB|MiB|GiB)?", re.ASCII)
_RATE: Final = re.compile(r"([0-9]{1,9})\s*/\s*([0-9]{1,6})?(ms|s|m|h|d)", re.ASCII)
_HOST_PORT: Final = re.compile(r"(?:\[([0-9a-fA-F:.]+)\]|([A-Za-z0-9._-]+)):([0-9]{1,5})", re.ASCII)

MILLISECONDS: Final = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
BYTES: Final = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
LONGEST: Final = 3650 * 86400.0  # ten years: further ahead event loops and databases begin to disagree


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def parse_duration(value: object) -> float:
    """Seconds out of `30s`, `5m`, `2h`, `1d`, `100ms`, `1.5h` or a bare number of seconds."""
    words = "expected a duration such as 30s, 5m, 2h, 1d or 100ms"
    if _is_number(value):
        seconds = float(value)  # type: ignore[arg-type]
        if not isfinite(seconds) or seconds < 0:
            raise ValueError(words)
    elif isinstance(value, str) and (match := _DURATION.fullmatch(value.strip())):
        whole, fraction, unit = match.groups()
        # decimal, so that 0.1s and 100ms are the same number
        seconds = float(Decimal(f"{whole}.{fraction or 0}") * MILLISECONDS[unit or "s"] / 1000)
    else:
        raise ValueError(words)
    if seconds > LONGEST:
        raise ValueError("expected a duration of at most 3650d")
    return seconds


def format_duration(seconds: float) -> str:
    """The shortest text that `parse_duration` reads as the same number of milliseconds."""
    total = round(seconds * 1000)
    if total == 0:
        return "0"
    unit = max((unit for unit, size in MILLISECONDS.items() if total % size == 0), key=MILLISECONDS.__getitem__)
    return f"{total // MILLISECONDS[unit]}{unit}"


def parse_size(value: object) -> int:
    """Bytes out of `64KiB`, `1MiB`, `1GiB`, `4096B` or a bare number."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 60:
        return value
    if isinstance(value, str) and (match := _SIZE.fullmatch(value.strip())):
        size = int(match[1]) * BYTES[match[2] or "B"]
        if size < 1 << 60:
            return size
    raise ValueError("expected a size such as 64KiB, 1MiB or a number of bytes")


def format_size(size: int) -> str:
    """The shortest text that `parse_size` reads as the same number of bytes."""
    if size == 0:
        return "0"
    unit = max((unit for unit, factor in BYTES.items() if size % factor == 0), key=BYTES.__getitem__)
    return str(size) if unit == "B" else f"{size // BYTES[unit]}{unit}"


def each_server(url: str) -> list[str]:
    """A URL for each of the hosts between which there are commas: `mysql://u:p@db1,db2:3307/name`."""
    scheme, slashes, rest = url.partition("://")
    at = rest.find("/")
    netloc, path = (rest, "") if at < 0 else (rest[:at], rest[at:])
    who, sign, hosts = netloc.rpartition("@")
    return [f"{scheme}{slashes}{who}{sign}{host}{path}" for host in hosts.split(",")]


@dataclass(frozen=True, slots=True)
class Rate:
    """So many events in so many seconds: `20/m` is `Rate(20, 60.0)`."""

    count: int
    period: float

    def __str__(self) -> str:
        period = format_duration(self.period)
        return f"{self.count}/{period[1:] if period[0] == '1' and period[1:].isalpha() else period}"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> core_schema.CoreSchema:
        text = core_schema.plain_serializer_function_ser_schema(str, when_used="json")
        return core_schema.no_info_plain_validator_function(parse_rate, serialization=text)


def parse_rate(value: object) -> Rate:
    """A rate out of `20/m`, `5/s`, `100/h` or `20/5m`. Unlimited is said with `none` where an option allows it."""
    if isinstance(value, Rate):
        return value
    if isinstance(value, str) and (match := _RATE.fullmatch(value.strip())):
        count, number, unit = match.groups()
        period = int(number or 1) * MILLISECONDS[unit] / 1000
        if int(count) > 0 and 0 < period <= LONGEST:
            return Rate(int(count), period)
    raise ValueError("expected a rate such as 20/m, 5/s or 100/h")


def parse_optional_rate(value: object) -> Rate | None:
    """As `parse_rate`; `none` is no limit."""
    if value is None or value == "none":
        return None
    try:
        return parse_rate(value)
    except ValueError as exc:
        raise ValueError(f"{exc}, or none") from None


def parse_network(value: object) -> IPv4Network | IPv6Network:
    """A network or a single address, IPv4 or IPv6."""
    words = "expected an address or a network such as 192.0.2.0/24 or 2001:db8::/32"
    if not isinstance(value, str):
        raise ValueError(words)
    try:
        network = ip_network(value.strip(), strict=False)
    except ValueError:
        raise ValueError(words) from None
    if "/" in value and ip_address(value.strip().partition("/")[0]) != network.network_address:
        raise ValueError(f"{value.strip()} is an address inside a network. Did you mean {network}?")
    return network


def parse_ip(value: object) -> str:
    """One address to listen on, in its shortest spelling."""
    try:
        if not isinstance(value, str):
            raise ValueError
        return str(ip_address(value.strip()))
    except ValueError:
        raise ValueError('expected an address such as 0.0.0.0, 127.0.0.1 or "::"') from None


def host_port(value: object) -> tuple[str, int]:
    """`("node01.example.net", 4369)` out of `node01.example.net:4369`; IPv6 stands in brackets."""
    if isinstance(value, str) and (match := _HOST_PORT.fullmatch(value.strip())) and int(match[3]) <= 65535:
        return match[1] or match[2], int(match[3])
    raise ValueError('expected address:port such as 192.0.2.7:4369 or "[2001:db8::7]:4369"')


def parse_host_port(value: object) -> str:
    """The text itself, after `host_port` has understood it."""
    host_port(value)
    return str(value).strip()


def between(low: int, high: int) -> PlainValidator:
    """For `Annotated[int, between(0, 65535)]`: a whole number in a range, and words that name the range."""

    def check(value: object) -> int:
        if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
            return value
        raise ValueError(f"expected a number from {low} to {high}")

    return PlainValidator(check)


def _within(low: float, high: float, what: str, text: Callable[[Any], str]) -> AfterValidator:
    def check(value: float) -> float:
        if low <= value <= high:
            return value
        raise ValueError(f"expected a {what} from {text(low)} to {text(high)}")

    return AfterValidator(check)


def lasting(low: float, high: float) -> AfterValidator:
    """For `Annotated[Duration, lasting(1, 3600)]`: bounds in seconds."""
    return _within(low, high, "duration", format_duration)


def sized(low: int, high: int) -> AfterValidator:
    """For `Annotated[Size, sized(1024, 1 << 20)]`: bounds in bytes."""
    return _within(low, high, "size", format_size)


def _several(value: Any) -> Any:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (value,)


Duration = Annotated[float, PlainValidator(parse_duration), PlainSerializer(format_duration, when_used="json")]
Size = Annotated[int, PlainValidator(parse_size), PlainSerializer(format_size, when_used="json")]
OptionalRate = Annotated[
    Rate | None,
    PlainValidator(parse_optional_rate),
    PlainSerializer(lambda rate: "none" if rate is None else str(rate), when_used="json"),
]
Network = Annotated[IPv4Network | IPv6Network, PlainValidator(parse_network), PlainSerializer(str, when_used="json")]
IpAddress = Annotated[str, PlainValidator(parse_ip)]
HostPort = Annotated[str, PlainValidator(parse_host_port)]
Port = Annotated[int, between(0, 65535)]

several = BeforeValidator(_several)
"""For `Annotated[tuple[str, ...], several]`: one value may stand for a list of one, as ejabberd allows."""
