"""From the name of a node to addresses: `cluster.hosts` first, then the operating system."""

import asyncio
import ipaddress
import socket
from collections.abc import Mapping
from typing import Final

from xmppd.errors import NodeUnreachable

PORT: Final = 4369
_TIMEOUT: Final = 5.0  # seconds for the operating system's resolver


def split(name: str, port: int = PORT) -> tuple[str, int]:
    """Host and port of `xmppd@node01`, `node01.example.net:4370`, `192.0.2.1`, `2001:db8::1` or `[2001:db8::1]:4369`.

    Raises ValueError, with a text for the operator.
    """
    host = name.strip().rpartition("@")[2]
    given = ""
    if host.startswith("["):
        host, bracket, rest = host[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise ValueError(f"{name}: expected [IPv6 address]:port")
        given = rest[1:]
        ipaddress.IPv6Address(host.partition("%")[0])
    elif host.count(":") == 1:
        host, _, given = host.partition(":")
    elif ":" in host:
        ipaddress.IPv6Address(host.partition("%")[0])
    if not host or any(char.isspace() for char in host):
        raise ValueError(f"{name}: expected a node such as xmppd@node01, or host:port")
    if given:
        if not (given.isascii() and given.isdigit() and 0 < int(given) < 65536):
            raise ValueError(f"{name}: {given} is no port")
        port = int(given)
    return host, port


def join(host: str, port: int) -> str:
    """`192.0.2.1:4369`, `[2001:db8::1]:4369`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Resolver:
    """Looks up nodes. Nothing is remembered: a change of addresses is seen at the next look-up."""

    def __init__(self, hosts: Mapping[str, str]) -> None:
        self._hosts = {name.lower(): address for name, address in hosts.items()}

    async def resolve(self, name: str) -> list[tuple[str, int]]:
        """All (address, port) of a node, the best one first; see `split` for the forms of a name.

        Raises `NodeUnreachable` with what was tried and the remedy.
        """
        try:
            host, port = split(name)
            mapped = self._hosts.get(host.lower()) or self._hosts.get(name.strip().lower())
            if mapped is not None:
                host, port = split(mapped, port)
        except ValueError as exc:
            raise NodeUnreachable(str(exc)) from exc
        where = f"{host} (cluster.hosts)" if mapped is not None else host
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_TIMEOUT):
                found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except TimeoutError:
            raise NodeUnreachable(f"{where}: the name was not resolved in {_TIMEOUT:g} s; is DNS reachable?") from None
        except (OSError, UnicodeError) as exc:
            raise NodeUnreachable(
                f"{where}: no such host ({getattr(exc, 'strerror', None) or exc}); name it in cluster.hosts, DNS or "
                "/etc/hosts"
            ) from exc
        return list(dict.fromkeys((str(address[0]), port) for _, _, _, _, address in found))
