"""What a presence says, apart from who is told; no I/O."""

import hashlib
from datetime import UTC, datetime

from lxml import etree

from xmppd.protocol.stanza import Stanza, delay_element, with_child


def digest(presence: Stanza) -> bytes:
    """Equal for presences that say the same: ids, prefixes, and the order of attributes and children do not matter."""
    element = presence.element
    parts = sorted(etree.tostring(child, method="c14n", with_tail=False) for child in element.iterchildren("*"))
    parts.append((element.get("{http://www.w3.org/XML/1998/namespace}lang") or "").encode())
    return hashlib.blake2b(b"\0".join(parts), digest_size=16).digest()


def delayed(presence: Stanza, since: float) -> Stanza:
    """The presence with the time at which it was sent (XEP-0203), in seconds since 1970."""
    stamp = datetime.fromtimestamp(since, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return with_child(presence, delay_element(stamp, presence.from_.full if presence.from_ else ""))
