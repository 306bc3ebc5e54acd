"""Certificates that follow from a cookie."""

import uuid
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID

from xmppd.cluster import pki

NODE = uuid.UUID("2f0a5f52-0c5b-4e3c-8f0e-3d4a7a2b9c11").bytes
COOKIE = "5d" * 32
FINGERPRINT = "5b29a2a69c090988035f9f898871f5096b1531c23fe1b731337570e6519523e1"


def leaf(cookie: str = COOKIE) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pki.leaf(pki.authority(cookie), NODE, ["node01", "not a name", "::1"])[0])


def test_one_cookie_makes_one_authority_wherever_it_is_made():
    first = pki.authority(COOKIE)
    pki.authority.cache_clear()

    again = pki.authority(COOKIE)

    assert again is not first
    assert again.pem == first.pem


def test_the_authority_of_a_cookie_is_the_same_in_every_version():
    # a node that is updated must still get along with those that are not
    assert pki.authority(COOKIE).fingerprint == FINGERPRINT


def test_two_cookies_make_two_authorities_with_two_names():
    one, two = pki.authority(COOKIE), pki.authority(COOKIE + "0")

    assert one.fingerprint != two.fingerprint
    assert one.certificate.subject != two.certificate.subject
    assert one.certificate.serial_number != two.certificate.serial_number


def test_a_leaf_belongs_to_the_authority_of_its_cookie_alone():
    assert pki.authority(COOKIE).issued(leaf())
    assert not pki.authority("another cookie of 32 characters.").issued(leaf())


def test_a_leaf_serves_both_ends_of_a_route():
    usage = leaf().extensions.get_extension_for_class(x509.ExtendedKeyUsage).value

    assert {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH} == set(usage)


def test_a_leaf_names_the_node():
    names = leaf().extensions.get_extension_for_class(x509.SubjectAlternativeName).value

    assert names.get_values_for_type(x509.DNSName) == [pki.MEMBER, NODE.hex(), "node01"]
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [uuid.UUID(bytes=NODE).urn]


def test_no_two_leaves_share_a_key():
    assert leaf().public_key() != leaf().public_key()


def test_a_leaf_cannot_make_others():
    assert not leaf().extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_the_cookie_is_in_no_file_and_no_certificate(tmp_path: Path):
    bundle = pki.Bundle.write(tmp_path, NODE, COOKIE, ["another cookie of 32 characters."])

    written = b"".join(file.read_bytes() for file in tmp_path.iterdir())

    assert COOKIE.encode() not in written
    assert sorted(file.name for file in tmp_path.iterdir()) == ["route-ca.crt", "route.crt", "route.key"]
    key = load_pem_private_key(bundle.key.read_bytes(), None)
    shown = x509.load_pem_x509_certificate(bundle.certificate.read_bytes())
    assert key.public_key() == shown.public_key()
    assert key.public_key() != pki.authority(COOKIE).key.public_key()


def test_during_a_change_two_cookies_are_trusted(tmp_path: Path):
    bundle = pki.Bundle.write(tmp_path, NODE, COOKIE, ["another cookie of 32 characters.", COOKIE])

    trusted = x509.load_pem_x509_certificates(bundle.trusted.read_bytes())

    assert trusted == [
        pki.authority(COOKIE).certificate,
        pki.authority("another cookie of 32 characters.").certificate,
    ]


def test_files_are_ours_alone_and_replaced_whole(tmp_path: Path):
    file = tmp_path / "x"
    file.write_bytes(b"former")
    file.chmod(0o644)

    pki.private_file(file, b"new")

    assert file.read_bytes() == b"new"
    assert file.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("text", ["route.key.new", "link"])
def test_a_link_in_the_way_is_not_followed(tmp_path: Path, text: str):
    target = tmp_path / "target"
    target.write_bytes(b"precious")
    (tmp_path / "route.key.new").symlink_to(target)
    (tmp_path / "route.key").symlink_to(target)

    pki.private_file(tmp_path / "route.key", text.encode())

    assert target.read_bytes() == b"precious"
