"""Who may connect to whom: every certificate of a cluster hangs on a key that follows from the cookie.

    cookie --HKDF--> private key of a CA --signs--> a leaf per node, made anew at each start

Nodes with one cookie arrive at one CA without ever having talked, and both ends of a route must show a leaf of it: the
cookie itself never crosses the wire, and changing it is a matter of trusting two CAs for a while (`Bundle`).
"""

import datetime
import os
import ssl
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

# What a dialling node expects to find in the other one's certificate, whatever address it dialled: having the cookie is
# all there is to prove, and addresses change.
MEMBER: Final = "localhost"
ORGANIZATION: Final = "xmppd cluster"

_SALT: Final = b"xmppd route CA 1"
_ORDER: Final = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551  # of P-256 (SEC 2, 2.4.2)
# A machine whose clock is wrong, or not yet set, must not split the cluster: what ends a certificate is another cookie.
_FROM: Final = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_UNTIL: Final = datetime.datetime(2120, 1, 1, tzinfo=datetime.UTC)


@dataclass(frozen=True, slots=True)
class Authority:
    """The CA of one cookie. Two of the same cookie are the same, byte by byte."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @property
    def pem(self) -> bytes:
        """The certificate."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the certificate in hex: two operators can compare cookies without showing them."""
        return self.certificate.fingerprint(hashes.SHA256()).hex()

    def issued(self, leaf: x509.Certificate) -> bool:
        """Whether this is a certificate of a node that has our cookie."""
        try:
            leaf.verify_directly_issued_by(self.certificate)
        except (ValueError, TypeError, InvalidSignature):
            return False
        return True


@lru_cache(maxsize=16)
def authority(cookie: str) -> Authority:
    """The CA that follows from a cookie (RFC 5869 for the key, RFC 6979 for its own signature)."""
    material = HKDF(hashes.SHA256(), 48, _SALT, b"P-256 private key").derive(cookie.encode())
    # 128 bits more than needed, so that the remainder is as good as uniform (FIPS 186-5, A.2.1)
    key = ec.derive_private_key(int.from_bytes(material, "big") % (_ORDER - 1) + 1, ec.SECP256R1())
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    # two CAs in one bundle must have two names, or a verifier may try the wrong one only
    name = _name(f"CA {identifier.digest.hex()}")
    serial = int.from_bytes(HKDF(hashes.SHA256(), 16, _SALT, b"serial").derive(cookie.encode()), "big") >> 1
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(serial + 1)
        .not_valid_before(_FROM)
        .not_valid_after(_UNTIL)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(identifier, critical=False)
        .sign(key, hashes.SHA256(), ecdsa_deterministic=True)
    )
    return Authority(key, certificate)


def leaf(issuer: Authority, node: bytes, names: Iterable[str] = ()) -> tuple[bytes, bytes]:
    """A fresh key and the certificate of a node (its UUID, 16 bytes): (certificate PEM, key PEM).

    `names` are of use to a person who looks at it; what counts is who has issued it.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    identity = uuid.UUID(bytes=node)
    wanted = dict.fromkeys([MEMBER, node.hex(), *names])
    alternative: list[x509.GeneralName] = [x509.DNSName(name) for name in wanted if _is_dns_name(name)]
    alternative.append(x509.UniformResourceIdentifier(identity.urn))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(_name(f"node {identity}"))
        .issuer_name(issuer.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_FROM)
        .not_valid_after(_UNTIL)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .add_extension(x509.SubjectAlternativeName(alternative), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key()), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(issuer.key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return certificate.public_bytes(serialization.Encoding.PEM), private


@dataclass(frozen=True, slots=True)
class Bundle:
    """The files of a node: what it shows, and whom it trusts."""

    certificate: Path
    key: Path
    trusted: Path

    @classmethod
    def write(
        cls, folder: Path, node: bytes, cookie: str, also_trusted: Iterable[str] = (), names: Iterable[str] = ()
    ) -> "Bundle":
        """Write a fresh leaf of `cookie`, and the CAs of it and of the cookies `also_trusted`. Raises OSError.

        The CA keys stay in memory: from these files nobody can make the certificate of another node.
        """
        bundle = cls(folder / "route.crt", folder / "route.key", folder / "route-ca.crt")
        issuer = authority(cookie)
        certificate, key = leaf(issuer, node, names)
        others = [authority(other) for other in dict.fromkeys(also_trusted) if other != cookie]
        private_file(bundle.key, key)
        private_file(bundle.certificate, certificate)
        private_file(bundle.trusted, b"".join(one.pem for one in (issuer, *others)))
        return bundle


def client_context(cookie: str, node: bytes, folder: Path) -> ssl.SSLContext:
    """For a look at another node's route port: shows a leaf of the cookie, checks nothing (see probe.py).

    `ssl` reads keys from files only: one is written to `folder` (0600) and removed again. Raises OSError.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    certificate, key = leaf(authority(cookie), node)
    file = folder / f"probe-{os.urandom(8).hex()}.pem"
    try:
        private_file(file, certificate + key)
        context.load_cert_chain(file)
    finally:
        file.unlink(missing_ok=True)
    return context


def private_file(path: Path, data: bytes) -> None:
    """Write a file that only we can read, whole at once; what had its name is gone. Raises OSError."""
    beside = path.with_name(f"{path.name}.new")
    beside.unlink(missing_ok=True)
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, 0o600)  # whatever the umask says
        file.write(data)
    os.replace(beside, path)


def _name(common: str) -> x509.Name:
    return x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, ORGANIZATION), x509.NameAttribute(NameOID.COMMON_NAME, common)]
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


def _is_dns_name(name: str) -> bool:
    return name.isascii() and 0 < len(name) < 254 and all(part.replace("-", "").isalnum() for part in name.split("."))
