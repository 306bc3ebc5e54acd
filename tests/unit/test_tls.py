"""Certificates and TLS: which file is served to whom, and handshakes with real clients over loopback."""

import asyncio
import socket
import ssl
import stat
import subprocess
import threading
from datetime import UTC, datetime, timedelta

import pytest
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import NameOID

from xmppd.c2s import certificate as certificates_module
from xmppd.c2s.certificate import dns_name, name_matches, names_of, self_signed
from xmppd.c2s.tls import Certificates
from xmppd.errors import ConfigError, XmppdError

DAY = timedelta(days=1)
NOW = datetime.now(UTC)
V12, V13 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3


class Authority:
    """A root and one intermediate, as public ones have."""

    def __init__(self):
        self.root_key, self.key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
        self.root = self._sign("Test Root", self.root_key, "Test Root", self.root_key, ca=True)
        self.intermediate = self._sign("Test CA", self.key, "Test Root", self.root_key, ca=True)

    def _sign(self, subject, key, issuer, issuer_key, *, ca=False, names=(), ends=90 * DAY, begins=-DAY):
        def named(text):
            return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

        builder = (
            x509.CertificateBuilder()
            .subject_name(named(subject))
            .issuer_name(named(issuer))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(NOW + begins)
            .not_valid_after(NOW + ends)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if names:
            alternatives = x509.SubjectAlternativeName([x509.DNSName(name) for name in names])
            builder = builder.add_extension(alternatives, critical=False)
        return builder.sign(issuer_key, hashes.SHA256())

    def issue(self, *names, key=None, **when):
        """(certificate, key, intermediate), each PEM."""
        key = key or ec.generate_private_key(ec.SECP256R1())
        leaf = self._sign("leaf", key, "Test CA", self.key, names=names, **when)
        return pem(leaf), key_pem(key), pem(self.intermediate)


def pem(certificate):
    return certificate.public_bytes(Encoding.PEM)


def key_pem(key, password=None):
    encryption = BestAvailableEncryption(password) if password else NoEncryption()
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)


@pytest.fixture(scope="module")
def authority():
    return Authority()


@pytest.fixture
def files(tmp_path):
    """Write a PEM file, get its path."""
    folder = tmp_path / "pem"
    folder.mkdir()

    def write(name, *parts):
        path = folder / name
        path.write_bytes(b"".join(parts))
        path.chmod(0o600)
        return str(path)

    return write


@pytest.fixture
def load(tmp_path):
    def make(hosts, *certfiles):
        return Certificates(hosts, certfiles, tmp_path / "var")

    return make


def shake(context, *, trust=None, sni=None, version=V13, alpn=None, strict=False):
    """One handshake over a socket pair of ours; what the client saw."""
    ours, theirs = socket.socketpair()
    failure = []

    def serve():
        try:
            with context.wrap_socket(ours, server_side=True) as connection:
                connection.sendall(b"x")
                connection.recv(1)
        except (OSError, ValueError) as exc:
            failure.append(exc)
        finally:
            ours.close()

    thread = threading.Thread(target=serve)
    thread.start()
    client = ssl.create_default_context(cadata=trust.decode()) if trust else ssl._create_unverified_context()
    client.minimum_version = client.maximum_version = version
    client.verify_flags |= ssl.VERIFY_X509_STRICT if strict else 0  # the default of newer Pythons
    client.check_hostname = bool(trust and sni)
    if alpn:
        client.set_alpn_protocols(alpn)
    try:
        with client.wrap_socket(theirs, server_hostname=sni) as connection:
            connection.recv(1)
            seen = {
                "names": names_of(x509.load_der_x509_certificate(connection.getpeercert(binary_form=True))),
                "version": connection.version(),
                "alpn": connection.selected_alpn_protocol(),
                "compression": connection.compression(),
                "cipher": connection.cipher()[0],
                "reused": connection.session_reused,
                "ticket": connection.session.has_ticket if connection.session else False,
            }
            connection.sendall(b"x")
    finally:
        theirs.close()
        thread.join(10)
    assert not failure
    return seen


@pytest.mark.parametrize("version", [V12, V13])
@pytest.mark.parametrize("alpn", [False, True])
def test_a_self_signed_certificate_for_each_host(load, tmp_path, version, alpn):
    certificates = load(["localhost", "example.org"])
    for host in ("localhost", "example.org"):
        trust = (tmp_path / "var/certs" / f"{host}.pem").read_bytes()
        trust = trust[trust.index(b"-----BEGIN CERTIFICATE") :]
        seen = shake(certificates.context(alpn), trust=trust, sni=host, version=version, strict=True)
        assert seen["names"] == {host}
        assert seen["version"] == version.name.replace("_", ".")
        assert seen["compression"] is None
    assert 822 <= certificates.expiry()["localhost"] <= 824
    assert certificates.report.served["localhost"].self_signed


def test_self_signed_files_are_ours_alone_and_stay(load, tmp_path):
    first = load(["localhost"])
    path = tmp_path / "var/certs/localhost.pem"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [entry.name for entry in path.parent.iterdir()] == ["localhost.pem"]
    assert load(["localhost"]).report.served == first.report.served


def test_a_self_signed_certificate_with_less_than_thirty_days_is_renewed(load, tmp_path):
    load(["localhost"])
    path = tmp_path / "var/certs/localhost.pem"
    path.write_bytes(self_signed("localhost", datetime.now(UTC) - certificates_module.LIFETIME + 32 * DAY))
    kept = load(["localhost"])
    assert kept.expiry()["localhost"] == 30
    path.write_bytes(self_signed("localhost", datetime.now(UTC) - certificates_module.LIFETIME + 30 * DAY))
    assert load(["localhost"]).expiry()["localhost"] > 800


def test_a_damaged_self_signed_file_is_named(load, tmp_path):
    load(["localhost"])
    path = tmp_path / "var/certs/localhost.pem"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ConfigError, match=r"certs/localhost\.pem is damaged; delete it"):
        load(["localhost"])


@pytest.mark.parametrize("host", ["localhost", "bücher.example", "127.0.0.1", "[::1]", "x." * 60 + "example"])
def test_what_a_self_signed_certificate_says(load, host, tmp_path):
    certificates = load([host])
    (path,) = (tmp_path / "var/certs").iterdir()
    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    assert names_of(certificate) >= {dns_name(host)}
    assert certificates.context(host=host) is certificates.context()
    alternatives = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    others = {other.type_id: other.value for other in alternatives.get_values_for_type(x509.OtherName)}
    assert others[certificates_module.XMPP_ADDR].endswith(host.encode())


def test_openssl_reads_what_a_self_signed_certificate_says(load, tmp_path):
    load(["localhost"])
    text = subprocess.run(
        ["openssl", "x509", "-noout", "-text", "-in", tmp_path / "var/certs/localhost.pem"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "DNS:localhost" in text
    assert "XmppAddr::localhost" in text
    assert "SRVName::_xmpp-client.localhost" in text
    assert "prime256v1" in text


@pytest.mark.parametrize("version", [V12, V13])
def test_certificates_are_picked_by_sni(load, files, authority, version):
    trust = pem(authority.root)
    one, one_key, chain = authority.issue("example.org")
    wild, wild_key, _ = authority.issue("*.example.net", "example.net")
    certificates = load(
        ["example.org", "chat.example.net", "example.net", "localhost"],
        files("one.pem", one, chain, one_key),
        files("wild.pem", wild, chain, wild_key),
    )
    context = certificates.context()
    for sni, names in (
        ("example.org", {"example.org"}),
        ("EXAMPLE.org", {"example.org"}),
        ("chat.example.net", {"*.example.net", "example.net"}),
        ("example.net", {"*.example.net", "example.net"}),
    ):
        assert shake(context, trust=trust, sni=sni, version=version)["names"] == names
    assert shake(context, sni="localhost", version=version)["names"] == {"localhost"}
    for sni in (None, "other.example.net", "nobody.example"):
        assert shake(context, sni=sni, version=version)["names"] == {"example.org"}  # the first host's


def test_starttls_without_sni_gets_the_host_of_its_stream_header(load):
    certificates = load(["localhost", "example.org"])
    assert shake(certificates.context(host="example.org"))["names"] == {"example.org"}
    assert shake(certificates.context(host="example.org"), sni="localhost")["names"] == {"localhost"}
    assert shake(certificates.context(host="nobody.example"))["names"] == {"localhost"}


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("example.org", "example.org", True),
        ("*.example.org", "chat.example.org", True),
        ("*.example.org", "example.org", False),
        ("*.example.org", "a.b.example.org", False),
        ("c*.example.org", "chat.example.org", False),
        ("*", "localhost", False),
        ("*.", "localhost", False),
    ],
)
def test_wildcards_stand_for_one_label(pattern, name, matches):
    assert name_matches(pattern, name) is matches


def test_a_folder_as_certbot_leaves_it(load, files, authority):
    """cert.pem, chain.pem, fullchain.pem, privkey.pem, and the glob that catches them all."""
    leaf, key, chain = authority.issue("example.org")
    files("cert.pem", leaf)
    files("chain.pem", chain)
    files("fullchain.pem", leaf, chain)
    path = files("privkey.pem", key)
    certificates = load(["example.org"], path.replace("privkey", "*"))
    assert shake(certificates.context(), trust=pem(authority.root), sni="example.org")["names"] == {"example.org"}
    assert certificates.report.warnings == ()


def test_the_better_of_two_certificates_is_served(load, files, authority):
    old = authority.issue("example.org", ends=10 * DAY)
    new = authority.issue("example.org", ends=80 * DAY)
    dead = authority.issue("example.org", ends=-DAY / 2)
    wild = authority.issue("*.org", ends=88 * DAY)
    paths = [files(f"{n}.pem", *parts) for n, parts in enumerate((old, new, dead, wild))]
    certificates = load(["example.org"], *paths)
    assert certificates.report.served["example.org"].source == paths[1]
    assert certificates.expiry() == {"example.org": 79}
    (warning,) = certificates.report.warnings
    assert paths[2] in warning
    assert "expired" in warning


def faults(load, *certfiles, hosts=("example.org",)):
    with pytest.raises(ConfigError) as caught:
        load(list(hosts), *certfiles)
    return "\n".join(caught.value.problems)


def test_faulty_files_are_named_with_what_is_wrong(load, files, authority, tmp_path):
    leaf, key, chain = authority.issue("example.org")
    _, other_key, _ = authority.issue("example.org")
    dead = files("dead.pem", *authority.issue("example.org", ends=-DAY / 2))
    early = files("early.pem", *authority.issue("example.org", begins=DAY))
    mismatch = files("mismatch.pem", leaf, other_key)
    secret = files("secret.pem", leaf, key_pem(ec.generate_private_key(ec.SECP256R1()), b"friar"))
    keyless = files("keyless.pem", leaf, chain)
    lonely = files("lonely.pem", key)
    damaged = files("damaged.pem", leaf[:200] + leaf[250:], key)
    nothing = files("nothing.pem", b"-----BEGIN CERTIFICATE-----\n")
    weak = files("weak.pem", *authority.issue("example.org", key=rsa.generate_private_key(65537, 1024)))
    large = files("large.pem", b"x" * (1024 * 1024 + 1))

    def expect(path, *words):
        text = faults(load, path)
        assert path in text
        assert all(word in text for word in words), text

    expect(dead, "example.org expired on")
    expect(early, "not valid before")
    expect(mismatch, "fits none of the certificates", "no file has the private key", "example.org")
    expect(secret, "encrypted")
    expect(keyless, "no file has the private key")
    expect(lonely, "fits none")
    expect(damaged, "damaged")
    expect(nothing, "neither a certificate nor a key")
    expect(weak, "OpenSSL refuses it")
    expect(large, "too large")
    expect(str(tmp_path / "absent.pem"), "No such file")
    expect(str(tmp_path / "absent*.pem"), "no file matches")
    expect(str(tmp_path), "directory")
    assert len(faults(load, dead, nothing, lonely).splitlines()) == 2  # all at once; dates when the files are whole


def test_a_readable_key_and_a_host_without_certificate_are_warned_about(load, files, authority, tmp_path):
    path = files("one.pem", *authority.issue("example.org"))
    (tmp_path / "pem/one.pem").chmod(0o644)
    certificates = load(["example.org", "localhost"], path)
    readable, uncovered = certificates.report.warnings
    assert f"chmod o-r {path}" in readable
    assert "none covers localhost" in uncovered
    assert certificates.report.served["localhost"].self_signed


def test_reload_serves_the_new_certificate_through_the_old_context(load, files, authority):
    trust = pem(authority.root)
    path = files("one.pem", *authority.issue("example.org", ends=10 * DAY))
    certificates = load(["localhost", "example.org"], path)
    held = certificates.context(alpn=True)  # as a listener holds it
    assert certificates.reload().changed == ()

    files("one.pem", *authority.issue("example.org", "new.example", ends=80 * DAY))
    report = certificates.reload(hosts=["localhost", "example.org", "new.example"])

    assert report.changed == ("example.org", "new.example")
    assert certificates.expiry()["example.org"] == 79
    for sni in ("example.org", "new.example"):
        seen = shake(held, trust=trust, sni=sni, alpn=["xmpp-client"])
        assert seen["names"] == {"example.org", "new.example"}
        assert seen["alpn"] == "xmpp-client"
    assert shake(held)["names"] == {"localhost"}


def test_a_reload_that_fails_changes_nothing(load, files, authority):
    path = files("one.pem", *authority.issue("example.org"))
    certificates = load(["example.org"], path)
    before, held = certificates.report, certificates.context()
    files("one.pem", b"")
    with pytest.raises(ConfigError):
        certificates.reload(hosts=["localhost", "example.org"])
    assert certificates.report is before
    assert certificates.context() is held
    assert shake(held, trust=pem(authority.root), sni="example.org")["names"] == {"example.org"}
    assert set(certificates.expiry()) == {"example.org"}


@pytest.mark.parametrize(
    ("offered", "selected"),
    [(["xmpp-client"], "xmpp-client"), (["h2", "xmpp-client"], "xmpp-client"), (["h2"], None), (None, None)],
)
@pytest.mark.parametrize("sni", [None, "example.org"])
def test_alpn_of_direct_tls(load, offered, selected, sni):
    certificates = load(["localhost", "example.org"])
    assert shake(certificates.context(alpn=True), alpn=offered, sni=sni)["alpn"] == selected
    assert shake(certificates.context(alpn=False), alpn=offered, sni=sni)["alpn"] is None


@pytest.mark.parametrize("version", [V12, V13])
def test_no_tickets(load, version):
    assert shake(load(["localhost"]).context(), version=version)["ticket"] is False


def test_forward_secrecy_with_tls_12(load):
    assert shake(load(["localhost"]).context(), version=V12)["cipher"].startswith("ECDHE-")


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated")
def test_tls_11_is_refused(load):
    context = load(["localhost"]).context()
    client = ssl._create_unverified_context()
    client.set_ciphers("ALL:@SECLEVEL=0")
    client.minimum_version = client.maximum_version = ssl.TLSVersion.TLSv1_1
    server_in, server_out = ssl.MemoryBIO(), ssl.MemoryBIO()
    client_in, client_out = ssl.MemoryBIO(), ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        client.wrap_bio(client_in, client_out).do_handshake()
    server_in.write(client_out.read())
    with pytest.raises(ssl.SSLError, match="unsupported protocol"):
        context.wrap_bio(server_in, server_out, server_side=True).do_handshake()


def test_a_data_folder_that_cannot_be_written(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(XmppdError, match="cannot make this folder: Not a directory"):
        Certificates(["localhost"], [], blocked)


class StartTls(asyncio.Protocol):
    """Waits for a line, answers it and turns TLS on, as c2s does after <starttls/>."""

    def __init__(self, context):
        self.context = context
        self.tasks = []

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        if data == b"starttls\n":
            self.transport.write(b"proceed\n")
            self.tasks.append(asyncio.ensure_future(self.upgrade()))
        else:
            self.transport.write(data.upper())

    async def upgrade(self):
        loop = asyncio.get_running_loop()
        self.transport = await loop.start_tls(self.transport, self, self.context, server_side=True)


@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_starttls_on_uvloop_with_openssls_client(load, version):
    """Direct TLS and STARTTLS, against the openssl command."""
    certificates = load(["localhost", "example.org"])

    async def run():
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: StartTls(None), "127.0.0.1", 0, ssl=certificates.context(alpn=True))
        port = server.sockets[0].getsockname()[1]
        client = await asyncio.create_subprocess_exec(
            *("openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-servername", "example.org"),
            *("-alpn", "xmpp-client", f"-tls{version.replace('.', '_')}"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            client.stdin.write(b"o romeo\n")
            seen = await asyncio.wait_for(client.stdout.readuntil(b"O ROMEO"), 20)
            client.stdin.write(b"R\n")  # the command that renegotiates in TLS 1.2
            if version == "1.2":
                assert await asyncio.wait_for(client.wait(), 20) != 0  # refused, and the client gives up
        finally:
            if client.returncode is None:
                client.kill()
            await client.wait()
            server.close()
        assert b"CN = example.org" in seen
        assert b"ALPN protocol: xmpp-client" in seen
        assert f"TLSv{version}".encode() in seen

        server = await loop.create_server(lambda: StartTls(certificates.context(host="example.org")), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        names = await loop.run_in_executor(None, upgrade, port, V12 if version == "1.2" else V13)
        server.close()
        assert names == {"example.org"}

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())


def upgrade(port, version):
    client = ssl._create_unverified_context()
    client.minimum_version = client.maximum_version = version
    with socket.create_connection(("127.0.0.1", port), timeout=20) as plain:
        plain.sendall(b"starttls\n")
        assert plain.recv(8) == b"proceed\n"
        with client.wrap_socket(plain) as connection:
            connection.sendall(b"romeo")
            assert connection.recv(5) == b"ROMEO"
            return names_of(x509.load_der_x509_certificate(connection.getpeercert(binary_form=True)))
