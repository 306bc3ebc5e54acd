"""A look at another node's route port: each way in which a join can fail gets its own words."""

import asyncio
import errno
import json
import ssl
import time
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.x509.oid import NameOID

from xmppd.cluster import pki
from xmppd.cluster.addresses import Resolver, join
from xmppd.errors import NodeUnreachable

_TIMEOUT: Final = 3.0  # seconds for each step
_LONGEST_LINE: Final = 32 * 1024


class Finding(Enum):
    """How far we got."""

    OK = "ok"
    NO_SUCH_HOST = "no such host"
    REFUSED = "connection refused"
    TIMEOUT = "timeout"
    UNREACHABLE = "unreachable"
    NOT_A_NODE = "not a node"
    WRONG_COOKIE = "wrong cookie"


@dataclass(frozen=True, slots=True)
class Probe:
    """What was found. `text` is a sentence for the operator."""

    finding: Finding
    text: str
    addresses: tuple[str, ...] = ()  # address:port, what the name resolved to
    address: str = ""  # the one that was looked at
    connect_seconds: float = 0.0
    node: bytes | None = None  # its UUID
    nats_version: str = ""

    @property
    def ok(self) -> bool:
        return self.finding is Finding.OK


async def probe(
    name: str, resolver: Resolver, cookies: tuple[str, ...], node: bytes, folder: Path, *, timeout: float = _TIMEOUT
) -> Probe:
    """Look at the node `name`. The first of `cookies` is shown, all of them are accepted; `node` is our own UUID.

    Never raises for what is wrong over there; OSError when `folder` cannot be written.
    """
    try:
        found = await resolver.resolve(name)
    except NodeUnreachable as exc:
        return Probe(Finding.NO_SUCH_HOST, str(exc))
    addresses = tuple(join(host, port) for host, port in found)
    result = Probe(Finding.UNREACHABLE, f"{name} has no address", addresses)
    context = pki.client_context(cookies[0], node, folder)
    for host, port in found:
        result = replace(await _look(host, port, cookies, context, timeout), addresses=addresses)
        if result.finding not in (Finding.REFUSED, Finding.TIMEOUT, Finding.UNREACHABLE):
            break
    return result


async def _look(host: str, port: int, cookies: tuple[str, ...], context: ssl.SSLContext, timeout: float) -> Probe:
    where = join(host, port)
    started = time.monotonic()
    try:
        async with asyncio.timeout(timeout):
            reader, writer = await asyncio.open_connection(host, port)
    except TimeoutError:
        return Probe(Finding.TIMEOUT, f"{where} does not answer: a firewall, or a machine that is down", address=where)
    except ConnectionRefusedError:
        text = f"nothing listens on {where}: the node is stopped, or has not joined anything and shares no database"
        return Probe(Finding.REFUSED, text, address=where)
    except OSError as exc:
        reason = errno.errorcode.get(exc.errno or 0, "") and exc.strerror
        return Probe(Finding.UNREACHABLE, f"{where} cannot be reached: {reason or exc}", address=where)
    result = Probe(Finding.OK, f"{where} is a node of our cookie", address=where)
    result = replace(result, connect_seconds=time.monotonic() - started)
    try:
        async with asyncio.timeout(timeout):
            return await _talk(reader, writer, cookies, context, result)
    except TimeoutError:
        return replace(result, finding=Finding.NOT_A_NODE, text=f"{where} is open, but does not talk as a node does")
    finally:
        writer.transport.abort()


async def _talk(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    cookies: tuple[str, ...],
    context: ssl.SSLContext,
    result: Probe,
) -> Probe:
    not_a_node = replace(
        result, finding=Finding.NOT_A_NODE, text=f"{result.address} is not the cluster port of a node (cluster.listen)"
    )
    refused = replace(
        result,
        finding=Finding.WRONG_COOKIE,
        text=f"{result.address} has another cookie: copy .xmppd.cookie from there, or from here",
    )
    try:
        await writer.start_tls(context)
    except (OSError, ssl.SSLError, EOFError):
        return not_a_node
    presented = _certificate(writer)
    if presented is None:
        return not_a_node
    if not any(pki.authority(cookie).issued(presented) for cookie in cookies):
        return refused
    try:
        line = await reader.readline()
    except (OSError, ssl.SSLError, ValueError):
        return refused  # it has looked at our certificate by now
    info = _info(line)
    if info is None:
        return not_a_node if line else refused
    name = str(info.get("server_name", ""))
    node = bytes.fromhex(name) if len(name) == 32 and all(char in "0123456789abcdef" for char in name) else None
    if node is None:
        return not_a_node
    return replace(result, node=node, nats_version=str(info.get("version", "")))


def _certificate(writer: asyncio.StreamWriter) -> x509.Certificate | None:
    """What the other end has shown; None when it is not of a node of any cluster."""
    tls = writer.get_extra_info("ssl_object")
    data = tls.getpeercert(True) if tls is not None else None
    if not data:
        return None
    try:
        certificate = x509.load_der_x509_certificate(data)
        names = certificate.issuer.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
    except ValueError:
        return None
    return certificate if any(name.value == pki.ORGANIZATION for name in names) else None


def _info(line: bytes) -> dict[str, Any] | None:
    """The JSON of `INFO {...}`, the first thing a NATS server says."""
    if not line.startswith(b"INFO ") or len(line) > _LONGEST_LINE:
        return None
    try:
        found = json.loads(line[5:])
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
