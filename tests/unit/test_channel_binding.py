"""What a login is bound to: the certificate's hash as OpenSSL computes it, for each kind of signature."""

import ssl
import subprocess

import pytest
from cryptography import x509

from xmppd.c2s.channel_binding import HostContext, bindings, end_point

SIGNATURES = {  # the hash of the signature -> what RFC 5929 4.1 makes of it
    "sha1": "sha256",
    "sha224": "sha224",
    "sha256": "sha256",
    "sha384": "sha384",
    "sha512": "sha512",
}


def made(tmp_path, *options):
    """A self-signed certificate of the openssl program; its file."""
    path = tmp_path / "cert.pem"
    command = ["openssl", "req", "-x509", "-nodes", "-subj", "/CN=localhost", "-keyout", tmp_path / "key.pem"]
    subprocess.run([*command, "-out", path, *options], check=True, capture_output=True)
    return path


def fingerprint(path, digest):
    """Of the whole certificate, as the openssl program says it."""
    command = ["openssl", "x509", "-in", path, "-noout", "-fingerprint", f"-{digest}"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return bytes.fromhex(done.stdout.partition("=")[2].strip().replace(":", ""))


@pytest.mark.parametrize("key", [("rsa:2048",), ("ec", "-pkeyopt", "ec_paramgen_curve:P-256")], ids=["rsa", "ecdsa"])
@pytest.mark.parametrize(("signed", "bound"), SIGNATURES.items())
def test_the_hash_is_that_of_the_signature_unless_it_is_weak(tmp_path, key, signed, bound):
    path = made(tmp_path, "-newkey", *key, f"-{signed}")
    assert end_point(x509.load_pem_x509_certificate(path.read_bytes())) == fingerprint(path, bound)


def test_the_hash_of_a_pss_signature_is_found(tmp_path):
    path = made(tmp_path, "-newkey", "rsa:2048", "-sha384", "-sigopt", "rsa_padding_mode:pss")
    assert end_point(x509.load_pem_x509_certificate(path.read_bytes())) == fingerprint(path, "sha384")


def test_a_signature_without_a_hash_of_its_own_binds_nothing(tmp_path):
    path = made(tmp_path, "-newkey", "ed25519")
    assert end_point(x509.load_pem_x509_certificate(path.read_bytes())) is None


def shaken(server, version):
    """A handshake in memory; the server's end of it."""
    client = ssl._create_unverified_context()
    client.minimum_version = client.maximum_version = version
    wires = [ssl.MemoryBIO() for _ in range(4)]
    ours = server.wrap_bio(wires[0], wires[1], server_side=True)
    theirs = client.wrap_bio(wires[2], wires[3], server_hostname="localhost")
    ends, done = [theirs, ours], set()
    while len(done) < 2:
        for end in ends:
            try:
                end.do_handshake()
                done.add(end)
            except ssl.SSLWantReadError:
                pass
            wires[0].write(wires[3].read())
            wires[2].write(wires[1].read())
    return ours, theirs


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_tls_unique_belongs_to_tls_1_2_alone(tmp_path, version):
    path = made(tmp_path, "-newkey", "rsa:2048")
    context = HostContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path, tmp_path / "key.pem")
    ours, theirs = shaken(context, version)
    unique = theirs.get_channel_binding("tls-unique")
    assert bindings(ours) == ({"tls-unique": unique} if version is ssl.TLSVersion.TLSv1_2 else {})

    context.end_point = b"a hash"
    assert bindings(ours)["tls-server-end-point"] == b"a hash"


def test_a_connection_in_clear_binds_nothing():
    assert bindings(None) == {}
