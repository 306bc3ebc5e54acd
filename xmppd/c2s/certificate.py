"""X.509 as XMPP uses it (RFC 6120 13.7): reading PEM files, names in certificates, self-signed ones."""

import ipaddress
import re
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from glob import glob, has_magic
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from xmppd.errors import ConfigError

XMPP_ADDR: Final = x509.ObjectIdentifier("1.3.6.1.5.5.7.8.5")  # RFC 6120 13.7.1.4
SRV_NAME: Final = x509.ObjectIdentifier("1.3.6.1.5.5.7.8.7")  # RFC 4985
_UTF8_STRING, _IA5_STRING = 0x0C, 0x16  # DER tags
_SRV_PREFIXES: Final = ("_xmpp-client.", "_xmpp-server.")

LIFETIME: Final = timedelta(days=825)  # the longest some clients accept
MAX_FILE: Final = 1024 * 1024  # bytes; a glob that catches something else is a mistake worth naming
_BLOCK: Final = re.compile(rb"-----BEGIN ([A-Z0-9 ]+)-----.+?-----END \1-----", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Found:
    """A certificate with its key. `names` are what it is good for: dNSName, SRVName, xmppAddr, addresses."""

    source: str
    names: frozenset[str]
    not_before: datetime
    not_after: datetime
    chain: tuple[x509.Certificate, ...]  # itself first, then the intermediates, without the root
    key: bytes = field(repr=False)  # PEM

    @property
    def pem(self) -> bytes:
        """Key and chain, as OpenSSL loads them."""
        return self.key + b"".join(certificate.public_bytes(Encoding.PEM) for certificate in self.chain)

    def valid(self, now: datetime) -> bool:
        return self.not_before <= now < self.not_after


def dns_name(host: str) -> str:
    """A host as SNI and certificates write it: A-labels; an IP address without brackets."""
    try:
        return str(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        pass
    try:
        return host.encode("idna").decode().lower()
    except UnicodeError:
        return host.lower()


def name_matches(pattern: str, name: str) -> bool:
    """RFC 6125 6.4: a wildcard stands for one label, the leftmost, and for all of it."""
    return pattern == name or (pattern.startswith("*.") and name.partition(".")[2] == pattern[2:] != "")


def read_certificates(patterns: Sequence[str]) -> tuple[list[Found], list[str]]:
    """All certificates in these files or globs, each with its key and chain, wherever among them those are; warnings.

    Raises `ConfigError` with all that is wrong, each line naming its file.
    """
    pile = _Pile()
    for pattern in patterns:
        paths = sorted(glob(pattern, recursive=True)) if has_magic(pattern) else [pattern]
        if not paths:
            pile.problems.append(f"certfiles: {pattern}: no file matches")
        for path in paths:
            pile.read(path)
    found = pile.match()
    if pile.problems:
        raise ConfigError(pile.problems)
    return found, pile.warnings


class _Pile:
    """What the files hold, before it is known what belongs together."""

    def __init__(self) -> None:
        self.certificates: dict[bytes, tuple[str, x509.Certificate]] = {}  # by fingerprint
        self.keys: dict[bytes, tuple[str, bytes]] = {}  # by public key
        self.problems: list[str] = []
        self.warnings: list[str] = []
        self._read: set[Path] = set()

    def read(self, path: str) -> None:
        try:
            real = Path(path).resolve()
            if real in self._read:  # two globs, or a link beside its target
                return
            self._read.add(real)
            about = real.stat()
            if about.st_size > MAX_FILE:
                self.problems.append(f"certfiles: {path}: too large to be a certificate")
                return
            data = real.read_bytes()
        except OSError as exc:
            self.problems.append(f"certfiles: {path}: {exc.strerror}")
            return
        useful = [self._take(path, about.st_mode, block[1], block[0]) for block in _BLOCK.finditer(data)]
        if not any(useful):
            self.problems.append(f"certfiles: {path}: neither a certificate nor a key in PEM format in it")

    def _take(self, path: str, mode: int, label: bytes, block: bytes) -> bool:
        try:
            if label == b"CERTIFICATE":
                certificate = x509.load_pem_x509_certificate(block)
                self.certificates.setdefault(certificate.fingerprint(hashes.SHA256()), (path, certificate))
                return True
            if label.endswith(b"PRIVATE KEY"):
                key = load_pem_private_key(block, None)
                public = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
                self.keys.setdefault(public, (path, block + b"\n"))
                if mode & stat.S_IROTH:
                    self.warnings.append(f"certfiles: {path}: everybody can read this private key; chmod o-r {path}")
                return True
        except TypeError:
            self.problems.append(f"certfiles: {path}: the private key is encrypted; store it without a passphrase")
            return True
        except (ValueError, UnsupportedAlgorithm) as exc:
            self.problems.append(f"certfiles: {path}: damaged or of an unknown kind: {exc}")
            return True
        return False  # DH parameters and the like: no harm in them

    def match(self) -> list[Found]:
        found: list[Found] = []
        used: set[bytes] = set()
        for path, certificate in self.certificates.values():
            public = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
            if public in self.keys:
                used.add(public)
                key = self.keys[public][1]
                before, after = certificate.not_valid_before_utc, certificate.not_valid_after_utc
                chain = (certificate, *self._issuers(path, certificate))
                found.append(Found(path, frozenset(names_of(certificate)), before, after, chain, key))
            elif not _is_ca(certificate):
                names = ", ".join(sorted(names_of(certificate))) or "no name"
                self.problems.append(f"certfiles: {path}: no file has the private key of this certificate ({names})")
        for public, (path, _) in self.keys.items():
            if public not in used:
                self.problems.append(f"certfiles: {path}: this private key fits none of the certificates")
        return found

    def _issuers(self, path: str, certificate: x509.Certificate) -> Iterable[x509.Certificate]:
        """Up to the root, which clients have; what stands in the certificate's own file is preferred."""
        pool = [c for _, c in sorted(self.certificates.values(), key=lambda entry: entry[0] != path)]
        seen = {certificate}
        while certificate.issuer != certificate.subject:
            issuer = next((c for c in pool if c not in seen and _issued(c, certificate)), None)
            if issuer is None or issuer.issuer == issuer.subject:
                return
            yield issuer
            seen.add(issuer)
            certificate = issuer


def _issued(issuer: x509.Certificate, certificate: x509.Certificate) -> bool:
    if issuer.subject != certificate.issuer:
        return False
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def _is_ca(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (x509.ExtensionNotFound, ValueError):
        return False


def names_of(certificate: x509.Certificate) -> set[str]:
    """The hosts a certificate stands for, in lower case; wildcards as they are."""
    try:
        alternatives = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        common = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        return {str(attribute.value).lower() for attribute in common}
    names = {name.lower() for name in alternatives.get_values_for_type(x509.DNSName)}
    names.update(str(address) for address in alternatives.get_values_for_type(x509.IPAddress))
    for other in alternatives.get_values_for_type(x509.OtherName):
        text = _text(other.value).lower()
        if other.type_id == XMPP_ADDR and text:
            names.add(dns_name(text))
        elif other.type_id == SRV_NAME and text.startswith(_SRV_PREFIXES):
            names.add(text.partition(".")[2])
    return names


def self_signed(host: str, now: datetime) -> bytes:
    """Key (ECDSA P-256) and certificate for one host, PEM. Good for a client that has been told to trust it."""
    key = ec.generate_private_key(ec.SECP256R1())
    public = key.public_key()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, dns_name(host)[:64])])
    identifier = x509.SubjectKeyIdentifier.from_public_key(public)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))  # clients' clocks
        .not_valid_after(now + LIFETIME - timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(_alternatives(host)), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(identifier, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return pem + certificate.public_bytes(Encoding.PEM)


def _alternatives(host: str) -> list[x509.GeneralName]:
    name = dns_name(host)
    try:
        return [x509.IPAddress(ipaddress.ip_address(name)), x509.OtherName(XMPP_ADDR, _der(_UTF8_STRING, host))]
    except ValueError:
        services = [x509.OtherName(SRV_NAME, _der(_IA5_STRING, prefix + name)) for prefix in _SRV_PREFIXES]
        return [x509.DNSName(name), x509.OtherName(XMPP_ADDR, _der(_UTF8_STRING, host)), *services]


def _der(tag: int, text: str) -> bytes:
    data = text.encode()
    size = len(data).to_bytes(2, "big")
    length = size[1:] if len(data) < 0x80 else b"\x81" + size[1:] if len(data) < 0x100 else b"\x82" + size
    return bytes([tag]) + length + data


def _text(der: bytes) -> str:
    """The text of one DER string; empty for anything else."""
    if len(der) < 2 or der[0] not in (_UTF8_STRING, _IA5_STRING):
        return ""
    start = 2 if der[1] < 0x80 else 2 + (der[1] & 0x7F)
    return der[start:].decode("utf-8", "replace")
