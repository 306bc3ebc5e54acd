"""Signatures of requests: `t=<Unix time>,v1=<hex HMAC-SHA256(secret, t + "." + body)>`.

While a secret is being changed there are two, and a signature by each: a receiver accepts one that it knows.
"""

import hmac
from collections.abc import Iterable
from typing import Final

HEADER: Final = "X-Xmppd-Signature"


def sign(secrets: Iterable[str], body: bytes, now: float) -> str:
    """The value of the header."""
    stamp = str(int(now))
    return ",".join((f"t={stamp}", *(f"v1={_mac(secret, stamp, body)}" for secret in secrets)))


def verify(secret: str, body: bytes, header: str, now: float, *, tolerance: float = 300.0) -> bool:
    """What a receiver does: one of the signatures is by this secret, and made within `tolerance` seconds of now."""
    pairs = [part.partition("=")[::2] for part in header.split(",")]
    stamp = next((value for name, value in pairs if name == "t"), "")
    if not (stamp.isascii() and stamp.isdigit() and len(stamp) < 16) or abs(now - int(stamp)) > tolerance:
        return False
    wanted = _mac(secret, stamp, body)
    return any(name == "v1" and hmac.compare_digest(value.encode(), wanted.encode()) for name, value in pairs)


def _mac(secret: str, stamp: str, body: bytes) -> str:
    return hmac.new(secret.encode(), stamp.encode() + b"." + body, "sha256").hexdigest()
