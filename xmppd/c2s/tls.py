"""Certificates and TLS contexts of the listeners: picked by SNI, self-signed where the operator has none.

Choices made here, for every context:
- TLS 1.2 and 1.3. No compression, no renegotiation, no resumption: a ticket key that lives as long as the process would
  undo forward secrecy in TLS 1.2, tickets of one node mean nothing to the next, and the stream's own resumption
  (XEP-0198) is what saves time.
- One certificate per host (not one per key type), so that what tls-server-end-point binds to is known.
- ALPN (XEP-0368): `xmpp-client` is answered with itself. A client that sends no ALPN is served, as old ones must be.
  So is one that offers other names only: the `ssl` module can neither refuse it (it goes on without ALPN) nor tell the
  two apart. What such a client sends must still be an XMPP stream header, so no other protocol gets through.
"""

import os
import ssl
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from glob import escape
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives import hashes

from xmppd.errors import ConfigError, XmppdError
from xmppd.log import get_logger

from .certificate import Found, dns_name, name_matches, read_certificates, self_signed
from .channel_binding import HostContext, end_point

log = get_logger("c2s")

ALPN_CLIENT: Final = "xmpp-client"  # XEP-0368 section 3
RENEW_BEFORE: Final = timedelta(days=30)  # a self-signed certificate with less left is made anew


@dataclass(frozen=True, slots=True)
class Served:
    """The certificate a host is served with; `source` is the file it comes from."""

    source: str
    self_signed: bool  # made by us, because the operator has none for this host
    not_after: datetime
    fingerprint: str  # SHA-256, hexadecimal


@dataclass(frozen=True, slots=True)
class Report:
    """What a load did: the certificate of each host, the hosts that have another one than before, warnings."""

    served: Mapping[str, Served]
    changed: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Loaded:
    served: Mapping[str, Served]  # by host
    contexts: Mapping[tuple[str, bool], ssl.SSLContext]  # by the host's name in SNI, and with ALPN or without
    default: str  # the first host's name in SNI


Files = Sequence[str | Path]


@dataclass(frozen=True, slots=True)
class Prepared:
    """Certificates that were read and found good, and are not in use yet."""

    hosts: tuple[str, ...]
    certfiles: tuple[str, ...]
    own: Mapping[str, tuple[str, ...]]
    loaded: _Loaded
    report: Report


class Certificates:
    """All TLS contexts of a node.

    A context that was handed out stays good over a reload: it asks for the current certificate at each handshake.
    """

    def __init__(
        self, hosts: Sequence[str], certfiles: Files, data_dir: str | Path, own: Mapping[str, Files] | None = None
    ) -> None:
        """`hosts` as they are compared, at least one; `certfiles`: paths or globs of PEM files, certificate, chain and
        key in one file or several; `own`: hosts for which others are looked at instead. A host they do not cover gets
        `data_dir/certs/HOST.pem`, self-signed.

        Raises `ConfigError`, each line naming its file: absent, no PEM, expired, without its key; `XmppdError` if the
        data folder cannot be written.
        """
        self._data_dir = Path(data_dir)
        self._loaded = _Loaded({}, {}, "")
        self.commit(self.prepare(hosts, certfiles, own or {}))

    def reload(
        self,
        hosts: Sequence[str] | None = None,
        certfiles: Files | None = None,
        own: Mapping[str, Files] | None = None,
    ) -> Report:
        """Read all files again, or others from now on. Blocks for some milliseconds: call it in a thread.

        All or nothing: if it raises (as the constructor does), everything is as it was.
        """
        now = self._now
        self.commit(
            self.prepare(
                now.hosts if hosts is None else hosts,
                now.certfiles if certfiles is None else certfiles,
                now.own if own is None else own,
            )
        )
        return self.report

    def prepare(self, hosts: Sequence[str], certfiles: Files, own: Mapping[str, Files]) -> Prepared:
        """The first half of `reload`, which may fail and changes nothing."""
        files = tuple(map(str, certfiles))
        others = {host: tuple(map(str, paths)) for host, paths in own.items()}
        loaded, report = self._load(hosts, files, others, self._loaded.served)
        return Prepared(tuple(hosts), files, others, loaded, report)

    def commit(self, prepared: Prepared) -> None:
        """The second half, which cannot fail."""
        self._now, self._loaded, self.report = prepared, prepared.loaded, prepared.report

    def context(self, alpn: bool = False, host: str | None = None) -> ssl.SSLContext:
        """For a direct TLS listener (with `alpn`) or for STARTTLS; the same object each time, until a reload.

        A client that sends no SNI, or a name we do not serve, is shown the certificate of `host` (a STARTTLS client
        has named it in its stream header), else the first host's.
        """
        loaded = self._loaded
        name = dns_name(host) if host is not None else loaded.default
        return loaded.contexts.get((name, alpn)) or loaded.contexts[loaded.default, alpn]

    def expiry(self) -> dict[str, int]:
        """Whole days until each host's certificate ends; negative when it has."""
        now = datetime.now(UTC)
        return {host: (served.not_after - now).days for host, served in self._loaded.served.items()}

    def _load(
        self,
        hosts: Sequence[str],
        certfiles: Sequence[str],
        own: Mapping[str, Sequence[str]],
        before: Mapping[str, Served],
    ) -> tuple[_Loaded, Report]:
        now = datetime.now(UTC)
        found, warnings = _choose(hosts, certfiles, own, now)
        chosen = {
            host: (one, False) if one is not None else (self._self_signed(host, now), True)
            for host, one in found.items()
        }
        served = {host: _served(one, made) for host, (one, made) in chosen.items()}
        contexts = self._contexts(chosen)
        changed = tuple(
            host for host, one in served.items() if host not in before or before[host].fingerprint != one.fingerprint
        )
        return _Loaded(served, contexts, dns_name(hosts[0])), Report(served, changed, tuple(warnings))

    def _contexts(self, chosen: Mapping[str, tuple[Found, bool]]) -> dict[tuple[str, bool], ssl.SSLContext]:
        contexts: dict[tuple[str, bool], ssl.SSLContext] = {}
        for host, (one, _) in chosen.items():
            name = dns_name(host)
            for alpn in (False, True):
                contexts[name, alpn] = context = _context(one, self._folder(), alpn)
                context.sni_callback = self._picker(name, alpn)
        return contexts

    def _picker(self, own: str, alpn: bool) -> Callable[[ssl.SSLObject, str | None, ssl.SSLContext], None]:
        """Called at each ClientHello, with None if it names no host; `own` is what the listener or STARTTLS assumed."""

        def pick(connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
            loaded = self._loaded
            for wanted in (name and name.lower(), own, loaded.default):
                if wanted and (current := loaded.contexts.get((wanted, alpn))) is not None:
                    connection.context = current
                    return

        return pick

    def _self_signed(self, host: str, now: datetime) -> Found:
        """The one in the data folder, or a new one if it has none or an old one."""
        path = self._folder() / f"{dns_name(host)}.pem"
        if path.exists():
            try:
                found, _ = read_certificates([escape(str(path))])
            except ConfigError as exc:
                raise ConfigError([f"{path} is damaged; delete it to have a new one made"]) from exc
            current = [one for one in found if dns_name(host) in one.names and one.not_after - now >= RENEW_BEFORE]
            if current:
                return current[0]
        try:
            _write(path, self_signed(host, now))
        except OSError as exc:
            raise XmppdError(f"{path}: cannot write the self-signed certificate: {exc.strerror}") from exc
        log.info("self-signed certificate made", host=host, file=path)
        return read_certificates([escape(str(path))])[0][0]

    def _folder(self) -> Path:
        folder = self._data_dir / "certs"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as exc:
            raise XmppdError(f"{folder}: cannot make this folder: {exc.strerror}") from exc
        return folder


def feed(protocol: Any, data: bytes) -> None:
    """Give a protocol that the loop has just put in (`loop.start_tls`) what was read before."""
    while data:
        buffer = protocol.get_buffer(len(data))  # as asyncio.BufferedProtocol has it
        size = min(len(buffer), len(data))
        buffer[:size] = data[:size]
        data = data[size:]
        protocol.buffer_updated(size)


def check_certificates(hosts: Sequence[str], certfiles: Files, own: Mapping[str, Files]) -> list[str]:
    """Warnings about these files, as a start with them would give; nothing is made. Raises as Certificates does."""
    others = {host: tuple(map(str, paths)) for host, paths in own.items()}
    found, warnings = _choose(hosts, tuple(map(str, certfiles)), others, datetime.now(UTC))
    with tempfile.TemporaryDirectory(prefix="xmppd-check-") as folder:
        for one in found.values():
            if one is not None:
                _context(one, Path(folder), False)
    return warnings


def _choose(
    hosts: Sequence[str], certfiles: Sequence[str], own: Mapping[str, Sequence[str]], now: datetime
) -> tuple[dict[str, Found | None], list[str]]:
    """The best certificate for each host, None where there is none; warnings. ConfigError."""
    common, warnings = read_certificates(certfiles)
    problems: list[str] = []
    chosen: dict[str, Found | None] = {}
    unused = {id(one): one for one in common if not one.valid(now)}
    for host in hosts:
        found = common
        if host in own:
            found, more = read_certificates(own[host])
            warnings += more
            unused |= {id(one): one for one in found if not one.valid(now)}
        fitting = [one for one in found if any(name_matches(name, dns_name(host)) for name in one.names)]
        usable = [one for one in fitting if one.valid(now)]
        if usable:
            chosen[host] = max(usable, key=lambda one: (dns_name(host) in one.names, one.not_after))
        elif fitting:
            problems += [f"certfiles: {one.source}: the certificate for {host} {_when(one, now)}" for one in fitting]
        else:
            if own.get(host, certfiles):
                warnings.append(f"certfiles: none covers {host}; it is served with a self-signed certificate")
            chosen[host] = None
    if problems:
        raise ConfigError(problems)
    warnings += [f"certfiles: {one.source}: {_when(one, now)}; not used" for one in unused.values()]
    return chosen, warnings


def _context(found: Found, folder: Path, alpn: bool) -> ssl.SSLContext:
    context = HostContext(ssl.PROTOCOL_TLS_SERVER)
    context.end_point = end_point(found.chain[0])
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_TICKET
    context.num_tickets = 0  # TLS 1.3; OP_NO_TICKET alone makes them stateful there
    if alpn:
        context.set_alpn_protocols([ALPN_CLIENT])
    try:
        # `ssl` loads files only, and key and chain may stand in several: for the moment they become one, 0600
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".loading-", suffix=".pem") as together:
            together.write(found.pem)
            together.flush()
            context.load_cert_chain(together.name)
    except ssl.SSLError as exc:
        raise ConfigError([f"certfiles: {found.source}: OpenSSL refuses it: {exc.reason or exc}"]) from exc
    except OSError as exc:
        raise XmppdError(f"{folder}: cannot write here: {exc.strerror}") from exc
    return context


def _served(found: Found, own: bool) -> Served:
    return Served(found.source, own, found.not_after, found.chain[0].fingerprint(hashes.SHA256()).hex())


def _when(found: Found, now: datetime) -> str:
    if now >= found.not_after:
        return f"expired on {found.not_after:%Y-%m-%d}"
    return f"is not valid before {found.not_before:%Y-%m-%d}"


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all, readable by us alone."""
    beside = path.with_name(f".{path.name}.new")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with open(descriptor, "wb") as file:
        os.fchmod(descriptor, 0o600)
        file.write(data)
        file.flush()
        os.fsync(descriptor)
    os.replace(beside, path)
