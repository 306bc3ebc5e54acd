"""PROXY headers: whose connection it is, wherever the network cuts them, and what is refused."""

import random
import struct
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest

from xmppd.protocol.proxy_protocol import LONGEST, LONGEST_TEXT, SIGNATURE, ProxyHeader, ProxyHeaderError

HELLO = b"<?xml version='1.0'?><stream:stream to='localhost'>"


def text(line: str) -> bytes:
    return f"PROXY {line}\r\n".encode()


def binary(command: int, family: int, body: bytes = b"") -> bytes:
    return SIGNATURE + struct.pack("!BBH", command, family, len(body)) + body


def four(source: str, port: int, more: bytes = b"") -> bytes:
    return binary(
        0x21, 0x11, IPv4Address(source).packed + IPv4Address("10.0.0.10").packed + struct.pack("!HH", port, 5222) + more
    )


def six(source: str, port: int, more: bytes = b"") -> bytes:
    return binary(
        0x21, 0x21, IPv6Address(source).packed + IPv6Address("fd00::1").packed + struct.pack("!HH", port, 5222) + more
    )


TLVS = b"\x01\0\x0bxmpp-client" + b"\x03\0\x04\xde\xad\xbe\xef" + b"\x04\0\x20" + b"\0" * 32  # a wrong checksum, too
GOOD = [
    (text("TCP4 192.0.2.7 10.0.0.10 40112 5222"), ("192.0.2.7", 40112)),
    (text("TCP4 0.0.0.0 255.255.255.255 0 65535"), ("0.0.0.0", 0)),
    (text("TCP6 2001:db8::7 fd00::1 40112 5222"), ("2001:db8::7", 40112)),
    (text("TCP6 2001:0DB8:0000:0000:0000:0000:0000:0007 fd00::1 1 2"), ("2001:db8::7", 1)),
    (text("TCP6 ::ffff:192.0.2.7 ::ffff:10.0.0.10 40112 5222"), ("192.0.2.7", 40112)),
    (text("UNKNOWN"), None),
    (text("UNKNOWN ffff:f... whatever \x01 it says"), None),
    (four("192.0.2.7", 40112), ("192.0.2.7", 40112)),
    (four("192.0.2.7", 40112, TLVS), ("192.0.2.7", 40112)),
    (six("2001:db8::7", 65535), ("2001:db8::7", 65535)),
    (six("::ffff:192.0.2.7", 40112, TLVS), ("192.0.2.7", 40112)),
    (binary(0x20, 0x00), None),
    (binary(0x20, 0x11, b"\xff" * 12), None),  # a health check; the block says nothing then
    (binary(0x20, 0x77, TLVS), None),
    (binary(0x21, 0x00), None),
    (binary(0x21, 0x00, TLVS), None),
    (binary(0x21, 0x31, b"/run/haproxy".ljust(216, b"\0")), None),
]
BAD = [
    b"<?xml version='1.0'?><stream:stream",
    b"\x16\x03\x01\x02\x00\x01",
    b"GET /readyz HTTP/1.1\r\n",
    b"PROXI",
    b"proxy TCP4 192.0.2.7 10.0.0.10 40112 5222\r\n",
    b"\r\n\r\n\0\r\nQUIZ\n",
    text(""),
    text("TCP4"),
    text("TCP5 192.0.2.7 10.0.0.10 40112 5222"),
    text("TCP4 192.0.2.7 10.0.0.10 40112"),
    text("TCP4 192.0.2.7 10.0.0.10 40112 5222 1"),
    text("TCP4  192.0.2.7 10.0.0.10 40112 5222"),
    text("TCP4 192.0.2.7 10.0.0.10 40112 5222 "),
    text("TCP4 192.0.2.07 10.0.0.10 40112 5222"),
    text("TCP4 192.0.2.256 10.0.0.10 40112 5222"),
    text("TCP4 2001:db8::7 10.0.0.10 40112 5222"),
    text("TCP6 192.0.2.7 10.0.0.10 40112 5222"),
    text("TCP6 fe80::1%eth0 fd00::1 40112 5222"),
    text("TCP4 192.0.2.7 10.0.0.10 65536 5222"),
    text("TCP4 192.0.2.7 10.0.0.10 -1 5222"),
    text("TCP4 192.0.2.7 10.0.0.10 +1 5222"),
    text("TCP4 192.0.2.7 10.0.0.10 01 5222"),
    text("TCP4 192.0.2.7 10.0.0.10 1_0 5222"),
    text("TCP4 192.0.2.7 10.0.0.10  5222"),
    text("TCP4 192.0.2.7 10.0.0.10 ٣ 5222"),
    b"PROXY TCP4 192.0.2.7 10.0.0.10 40112 5222\n",
    b"PROXY UNKNOWN" + b" " * LONGEST_TEXT + b"\r\n",
    b"PROXY " + b"A" * LONGEST_TEXT,
    binary(0x11, 0x11, b"\0" * 12),  # another version
    binary(0x22, 0x11, b"\0" * 12),  # another command
    binary(0x21, 0x12, b"\0" * 12),  # datagrams
    binary(0x21, 0x41, b"\0" * 12),  # another family
    binary(0x21, 0x11, b"\0" * 11),
    binary(0x21, 0x21, b"\0" * 35),
    binary(0x21, 0x31, b"\0" * 215),
    binary(0x21, 0x99, b"\0" * LONGEST),
    binary(0x21, 0x11, b"\0" * (LONGEST - 15)),
    binary(0x20, 0x00, b"\0" * (LONGEST - 15)),
]


def read(*pieces: bytes) -> tuple[tuple[str, int] | None, bytes]:
    """The client, and what came behind the header."""
    header = ProxyHeader()
    pieces = (*pieces,)
    for number, piece in enumerate(pieces):
        if header.receive(piece):
            return header.client, header.rest + b"".join(pieces[number + 1 :])
        assert header.begun or not piece
    raise AssertionError("the header did not end")


def test_the_examples_are_of_every_kind():
    assert len({data[:6] for data, _ in GOOD}) == 2
    assert len(BAD) == len(set(BAD))


@pytest.mark.parametrize(("data", "client"), GOOD)
def test_a_header_says_whose_connection_it_is_and_leaves_what_is_behind_it(data, client):
    assert read(data) == (client, b"")
    assert read(data + HELLO) == (client, HELLO)


@pytest.mark.parametrize(("data", "client"), GOOD)
def test_a_header_does_not_care_where_tcp_cuts(data, client):
    for cut in range(len(data) + len(HELLO)):
        whole = data + HELLO
        assert read(whole[:cut], whole[cut:]) == (client, HELLO)
    assert read(*(bytes([byte]) for byte in data), HELLO) == (client, HELLO)


@pytest.mark.parametrize("data", BAD)
def test_what_is_no_header_is_refused_however_it_is_cut(data):
    with pytest.raises(ProxyHeaderError):
        ProxyHeader().receive(data)
    assert read_by_bytes(data) < len(data)


def read_by_bytes(data: bytes) -> int:
    """How many bytes were taken before one was refused."""
    header = ProxyHeader()
    for number, byte in enumerate(data):
        try:
            assert not header.receive(bytes([byte]))
        except ProxyHeaderError:
            return number
    raise AssertionError("nothing was refused")


@pytest.mark.parametrize("first", [b"<", b"\x16", b"G", b"PX", b"\r\n\r\r"])
def test_garbage_is_refused_at_its_first_wrong_byte(first):
    with pytest.raises(ProxyHeaderError):
        ProxyHeader().receive(first)


def test_nothing_is_kept_beyond_the_longest_header():
    for start, longest in ((b"PROXY ", LONGEST_TEXT), (SIGNATURE + b"\x21\x11\xff\xff", LONGEST)):
        assert read_by_bytes(start + b"0" * LONGEST) < longest


def test_the_longest_headers_are_read():
    line = b"PROXY UNKNOWN ".ljust(LONGEST_TEXT - 2, b"x") + b"\r\n"
    block = four("192.0.2.7", 40112, b"\0" * (LONGEST - 16 - 12))

    assert read(line + HELLO) == (None, HELLO)
    assert len(block) == LONGEST
    assert read(block + HELLO) == (("192.0.2.7", 40112), HELLO)


def test_random_clients_in_random_pieces_are_themselves():
    rng = random.Random(5222)
    for _ in range(500):
        port = rng.randrange(65536)
        if rng.random() < 0.5:
            source = str(IPv4Address(rng.getrandbits(32)))
            data = rng.choice([four(source, port, TLVS), text(f"TCP4 {source} 10.0.0.10 {port} 5222")])
        else:
            source = str(IPv6Address(rng.getrandbits(128)))
            data = rng.choice([six(source, port), text(f"TCP6 {source} fd00::1 {port} 5222")])
        whole = data + rng.randbytes(rng.randrange(40))
        cuts = sorted(rng.randrange(len(whole) + 1) for _ in range(rng.randrange(6)))
        pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]

        assert read(*pieces) == ((source, port), whole[len(data) :])


def test_damaged_headers_are_read_or_refused_and_never_anything_else():
    """Whatever it comes to, it comes to the same however it is cut."""

    def outcome(data: bytes, *cuts: int) -> object:
        header = ProxyHeader()
        try:
            for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True):
                if header.receive(data[a:b]):
                    return header.client, header.rest + data[b:]
        except ProxyHeaderError:
            return "refused"
        return "waits"

    rng = random.Random(5223)
    seen = set()
    for _ in range(4000):
        data = bytearray(rng.choice(GOOD)[0] + b"\r\n" * rng.randrange(2))
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(data))
            data[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
            if not data:
                data = bytearray(b"P")
        whole = outcome(bytes(data))
        cuts = sorted(rng.randrange(len(data) + 1) for _ in range(3))
        assert outcome(bytes(data), *cuts) == whole
        if isinstance(whole, tuple):
            seen.add("read")
            if whole[0] is not None:
                assert str(ip_address(whole[0][0])) == whole[0][0]
                assert 0 <= whole[0][1] <= 65535
        else:
            seen.add(whole)
    assert seen == {"read", "refused", "waits"}
