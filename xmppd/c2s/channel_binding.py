"""What a login can be bound to (RFC 5056), so that nobody in the middle of two TLS connections can pass it on.

- tls-server-end-point (RFC 5929 section 4): a hash of the certificate this very connection was served. The `ssl` module
  does not tell a server which one that was, but it keeps the context that SNI chose, and each context has one
  certificate. After a reload older connections go on with the context, and the certificate, they began with.
- tls-unique (RFC 5929 section 3), with TLS 1.2 only: it means nothing in TLS 1.3 (RFC 9266 section 3). Its known
  weakness needs renegotiation or resumption, and the contexts here have neither.
- tls-exporter (RFC 9266): not until the `ssl` module gives it out.
"""

import ssl
from typing import Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.x509 import Certificate

END_POINT: Final = "tls-server-end-point"
UNIQUE: Final = "tls-unique"
_TOO_WEAK: Final = (hashes.MD5, hashes.SHA1)


class HostContext(ssl.SSLContext):
    """A context that knows what its certificate is bound by; None where RFC 5929 defines nothing for it."""

    end_point: bytes | None = None


def end_point(certificate: Certificate) -> bytes | None:
    """The hash of RFC 5929 4.1: that of the certificate's signature, but SHA-256 instead of MD5 and SHA-1. None for
    signatures without a hash of their own (Ed25519)."""
    try:
        algorithm = certificate.signature_hash_algorithm
    except UnsupportedAlgorithm:
        return None
    if algorithm is None:
        return None
    return certificate.fingerprint(hashes.SHA256() if isinstance(algorithm, _TOO_WEAK) else algorithm)


def bindings(connection: ssl.SSLObject | None) -> dict[str, bytes]:
    """The types and data of an established TLS connection; nothing for a connection in clear."""
    found: dict[str, bytes] = {}
    if connection is None:
        return found
    context = connection.context
    if isinstance(context, HostContext) and context.end_point is not None:
        found[END_POINT] = context.end_point
    if connection.version() == "TLSv1.2" and (unique := connection.get_channel_binding(UNIQUE)):
        found[UNIQUE] = unique
    return found
