"""The header with which a balancer tells whose connection it passes on (HAProxy's PROXY protocol, versions 1 and 2).

It is the first thing on the connection, before TLS, and comes once. Bytes in, an address out; no I/O. What is read is
bounded (LONGEST), whatever a peer sends: a header that cannot become a good one is refused at the first wrong byte of
its signature, at the latest when it is longer than it may be.
"""

import struct
from ipaddress import IPv4Address, IPv6Address
from typing import Final

SIGNATURE: Final = b"\r\n\r\n\0\r\nQUIT\n"  # of version 2 (2.2)
LONGEST_TEXT: Final = 107  # bytes of version 1, its CRLF included (2.1)
LONGEST: Final = 2048  # bytes of version 2 with all its extensions; balancers send 536 at most (2.2)
_TEXT: Final = b"PROXY "
_FIXED: Final = 16  # signature, version and command, family and transport, length
_LOCAL, _PROXY = 0x20, 0x21
_UNKNOWN, _TCP4, _TCP6, _UNIX = 0x00, 0x11, 0x21, 0x31
_ADDRESSES: Final = {_UNKNOWN: 0, _TCP4: 12, _TCP6: 36, _UNIX: 216}  # bytes


class ProxyHeaderError(ValueError):
    """These bytes are no PROXY header, or one that a balancer of TCP connections does not send."""


class ProxyHeader:
    """Reads one header: `receive` until it says True, then `client` and `rest` are there.

    `client` is (address, port) of whoever connected to the balancer, IPv4 in its own spelling also where it came mapped
    into IPv6; None where the header says that the connection is the balancer's own (LOCAL, a health check) or does not
    say whose it is (UNKNOWN, AF_UNSPEC, AF_UNIX): then the connection's own address counts. `rest` is what came behind
    the header. Extensions (TLVs), the checksum among them, are passed over.
    """

    __slots__ = ("_data", "client", "rest")

    def __init__(self) -> None:
        self._data = b""
        self.client: tuple[str, int] | None = None
        self.rest = b""

    @property
    def begun(self) -> bool:
        """Whether anything has come, and the end has not."""
        return bool(self._data)

    def receive(self, data: bytes) -> bool:
        """True when the header is whole. Raises ProxyHeaderError; then nothing more may be fed to it."""
        self._data += data
        if self._data.startswith(_TEXT):
            size = self._text()
        elif self._data.startswith(SIGNATURE):
            size = self._binary()
        elif _TEXT.startswith(self._data) or SIGNATURE.startswith(self._data):
            size = 0
        else:
            raise ProxyHeaderError("it begins with no PROXY header")
        if not size:
            return False
        self.rest, self._data = self._data[size:], b""
        return True

    def _text(self) -> int:
        """Version 1; its size, or 0 while it is not whole."""
        end = self._data.find(b"\n", 0, LONGEST_TEXT)
        if end < 0:
            if len(self._data) >= LONGEST_TEXT:
                raise ProxyHeaderError("the line is too long")
            return 0
        line = self._data[:end]
        if not line.endswith(b"\r"):
            raise ProxyHeaderError("the line does not end with CRLF")
        self.client = _parse_line(line[len(_TEXT) : -1])
        return end + 1

    def _binary(self) -> int:
        """Version 2; its size, or 0 while it is not whole."""
        if len(self._data) < _FIXED:
            return 0
        command, family, length = struct.unpack_from("!BBH", self._data, len(SIGNATURE))
        if command not in (_LOCAL, _PROXY):
            raise ProxyHeaderError("an unknown version or command")
        if command == _PROXY and length < _ADDRESSES.get(family, LONGEST):
            raise ProxyHeaderError("an unknown family or transport, or too short for its addresses")
        size: int = _FIXED + length
        if size > LONGEST:
            raise ProxyHeaderError("the header is too long")
        if len(self._data) < size:
            return 0
        if command == _PROXY and family == _TCP4:
            source, port = struct.unpack_from("!4s4xH", self._data, _FIXED)
            self.client = (str(IPv4Address(source)), port)
        elif command == _PROXY and family == _TCP6:
            source, port = struct.unpack_from("!16s16xH", self._data, _FIXED)
            self.client = (_plain(IPv6Address(source)), port)
        return size


def _parse_line(line: bytes) -> tuple[str, int] | None:
    """`TCP4 192.0.2.7 10.0.0.10 40112 5222`; whatever stands behind UNKNOWN is not looked at."""
    family, *fields = line.split(b" ")
    if family == b"UNKNOWN":
        return None
    if family not in (b"TCP4", b"TCP6") or len(fields) != 4:
        raise ProxyHeaderError("expected TCP4 or TCP6 with two addresses and two ports, or UNKNOWN")
    source, _ = (_address(family, text) for text in fields[:2])
    port, _ = map(_port, fields[2:])
    return source, port


def _address(family: bytes, text: bytes) -> str:
    try:
        if family == b"TCP4":
            return str(IPv4Address(text.decode("ascii")))
        if b"%" not in text:  # a scope is nobody else's business
            return _plain(IPv6Address(text.decode("ascii")))
    except ValueError:
        pass
    raise ProxyHeaderError(f"no address of the family {family.decode()}")


def _plain(address: IPv6Address) -> str:
    return str(address.ipv4_mapped or address)


def _port(text: bytes) -> int:
    if not (1 <= len(text) <= 5 and text.isdigit()) or (len(text) > 1 and text.startswith(b"0")) or int(text) > 65535:
        raise ProxyHeaderError("no port")
    return int(text)
