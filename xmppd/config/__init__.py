"""The configuration: `load` finds and validates xmppd.yml, `diff` says what a reload would change.

Words are ejabberd's where ejabberd has one, and everything is validated before anything starts. All options stand
in schema.py, their meaning in docs/configuration.md.
"""

from xmppd.errors import ConfigError

from .changes import Change, diff, running
from .dump import dump
from .loader import Config, load, parse, validate_dataclass
from .per_host import HostConfig
from .problems import mask, option_name, suggest
from .schema import C2SListen, HttpListen, Listen
from .types import Duration, Network, OptionalRate, Rate, Size, between, host_port, lasting, several, sized

__all__ = [
    "C2SListen",
    "Change",
    "Config",
    "ConfigError",
    "Duration",
    "HostConfig",
    "HttpListen",
    "Listen",
    "Network",
    "OptionalRate",
    "Rate",
    "Size",
    "between",
    "diff",
    "dump",
    "host_port",
    "lasting",
    "load",
    "mask",
    "option_name",
    "parse",
    "running",
    "several",
    "sized",
    "suggest",
    "validate_dataclass",
]
