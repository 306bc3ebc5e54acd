"""SCRAM credentials as XEP-0227 writes them (3.3 in version 1.1). No I/O."""

import base64
import binascii
from typing import Final

from lxml.etree import _Element

from xmppd.protocol import ns
from xmppd.protocol.sasl import MAX_ITERATIONS, MECHANISMS, Secret, usable

TAG: Final = f"{{{ns.PIE_SCRAM}}}scram-credentials"
_KINDS: Final = {name: kind for kind, name in MECHANISMS.items()}
_DIGEST: Final = {"sha1": 20, "sha256": 32, "sha512": 64}
_LONGEST_SALT: Final = 255
_LONGEST_TEXT: Final = 4096


def credentials_xml(secret: Secret) -> bytes:
    """One <scram-credentials/>."""
    values = {
        "iter-count": str(secret.iterations),
        "salt": _text(secret.salt),
        "server-key": _text(secret.server_key),
        "stored-key": _text(secret.stored_key),
    }
    inner = "".join(f"<{name}>{value}</{name}>" for name, value in values.items())
    mechanism = MECHANISMS[secret.kind]
    return f'<scram-credentials xmlns="{ns.PIE_SCRAM}" mechanism="{mechanism}">{inner}</scram-credentials>'.encode()


def read_credentials(element: _Element) -> Secret:
    """The secret in one. ValueError: what is wrong with it, such as a mechanism that is not known here."""
    mechanism = element.get("mechanism") or ""
    kind = _KINDS.get(mechanism)
    if kind is None:
        raise ValueError(f"the mechanism {mechanism[:40]!r} is not known here")
    count = _field(element, "iter-count")
    if not (count.isascii() and count.isdigit() and len(count) <= len(str(MAX_ITERATIONS))):
        raise ValueError(f"iter-count of {mechanism} is no number")
    salt, stored, server = (_bytes(element, name) for name in ("salt", "stored-key", "server-key"))
    if len(stored) != _DIGEST[kind]:
        # ejabberd up to 23.01 at least writes the base64 of the base64 it keeps.
        salt, stored, server = (_decoded(value, mechanism) for value in (salt, stored, server))
    secret = Secret(kind, salt, int(count), stored, server)
    if not usable(secret, kind) or len(salt) > _LONGEST_SALT:
        raise ValueError(f"{mechanism}: nobody could log in with {count} iterations, {len(salt)} bytes of salt")
    return secret


def _text(value: bytes) -> str:
    return base64.b64encode(value).decode()


def _field(element: _Element, name: str) -> str:
    found = element.findall(f"{{{ns.PIE_SCRAM}}}{name}")
    text = (found[0].text or "").strip() if len(found) == 1 else ""
    if not text or len(text) > _LONGEST_TEXT:
        raise ValueError(f"expected one {name}")
    return text


def _bytes(element: _Element, name: str) -> bytes:
    return _decoded(_field(element, name), name)


def _decoded(text: str | bytes, what: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as exc:
        raise ValueError(f"{what} is not base64") from exc
