"""Numbers of variable length, and the errors of everything that is read from the wire."""

from xmppd.errors import XmppdError


class FrameError(XmppdError):
    """Bytes from another node that are not what docs/cluster-protocol.md allows."""


def varint(number: int) -> bytes:
    """A number from 0 as LEB128: seven bits a byte, the lowest first, the high bit says that more follow."""
    if number < 128:
        return bytes((number,))
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    found.append(number)
    return bytes(found)


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """(the number that begins there, where it ends). FrameError when it is cut off or does not fit 63 bits."""
    number = shift = 0
    while shift < 63:
        if at >= len(data):
            raise FrameError("a number is cut off")
        byte = data[at]
        at += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, at
        shift += 7
    raise FrameError("a number is too large")
