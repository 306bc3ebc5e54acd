"""Names of the domains we serve."""

import re
from typing import Final

from xmppd.errors import JidError
from xmppd.protocol.jid import make

_WORDS: Final = "expected a domain such as example.net"
# Addresses may hold more, but these names also become files (certs/HOST.pem) and names in certificates.
_SERVABLE: Final = re.compile(r"(?:[A-Za-z0-9_-]|[^\x00-\x7f])+(?:\.(?:[A-Za-z0-9_-]|[^\x00-\x7f])+)*|\[[0-9a-f:.]+\]")


def normalise_host(value: object) -> str:
    """`example.net` for `Example.NET.`, as the addresses of stanzas are prepared; ValueError for what is no domain."""
    if not isinstance(value, str):
        raise ValueError(_WORDS)
    try:
        host = make("", value.strip().removesuffix(".")).domain
    except JidError:
        raise ValueError(f"{_WORDS}: labels of letters, digits and hyphens") from None
    if not _SERVABLE.fullmatch(host):
        raise ValueError(f"{_WORDS}: labels of letters, digits and hyphens")
    return host
