"""Addresses (RFC 7622): the one place that knows how a JID is prepared.

The parsing and preparation (nodeprep, IDNA, resourceprep) is slixmpp's, in Rust. Its JID is mutable and
computes each part anew when asked, so it is turned at once into a frozen value whose parts are plain strings.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from slixmpp.jid import JID as RustJID
from slixmpp.jid import InvalidJID

from xmppd.errors import JidError

# Longer strings are parsed each time, so that a hostile client cannot fill the cache with 3 KiB keys.
_CACHED_LENGTH: Final = 192


@dataclass(frozen=True, slots=True)
class JID:
    """A prepared address. `local` and `resource` are "" where the address has none; compare and hash by `full`."""

    local: str
    domain: str
    resource: str
    bare: str
    full: str

    def __str__(self) -> str:
        return self.full

    def __eq__(self, other: object) -> bool:
        return isinstance(other, JID) and self.full == other.full

    def __hash__(self) -> int:
        return hash(self.full)


def _parse(text: str) -> JID:
    try:
        parsed = RustJID(text)
    except (InvalidJID, UnicodeEncodeError) as exc:  # the latter for a lone surrogate, from an argument for instance
        raise JidError(f"{text[:80]!r} is no address: {exc}") from exc
    domain: str = parsed.domain
    if not domain or len(domain.encode()) > 255:
        raise JidError(f"{text[:80]!r} has no usable domain")
    return JID(parsed.local, domain, parsed.resource, parsed.bare, parsed.full)


_parse_cached = lru_cache(maxsize=16384)(_parse)


def parse(text: str) -> JID:
    """The address that `text` spells, prepared; raises JidError (RFC 7622 3)."""
    return _parse_cached(text) if len(text) <= _CACHED_LENGTH else _parse(text)


def make(local: str, domain: str, resource: str = "") -> JID:
    """An address from its parts, prepared; raises JidError, also when a part holds a separator."""
    if "/" in domain or "@" in domain or "@" in local or "/" in local:
        raise JidError(f"{local[:40]!r} at {domain[:40]!r}: a part holds a separator")
    text = f"{local}@{domain}" if local else domain
    return parse(f"{text}/{resource}" if resource else text)


def bare(jid: JID) -> JID:
    """The same address without its resource."""
    return jid if not jid.resource else JID(jid.local, jid.domain, "", jid.bare, jid.bare)


def prepare_local(text: str) -> str:
    """A user name as nodeprep leaves it; raises JidError."""
    if not text:
        raise JidError("a user name cannot be empty")
    return make(text, "localhost").local
