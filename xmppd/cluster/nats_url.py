"""`cluster.nats_url`: where an existing NATS cluster is, and how to log in there.

    nats://xmppd:secret@nats1.example.net:4222,nats2.example.net:4222
    tls://nats1.example.net,nats2.example.net?ca=/etc/xmppd/nats-ca.pem&cert=/etc/xmppd/nats.pem&key=/etc/xmppd/nats.key

`user:password@` or `token@` before the first server counts for all of them. `tls://` checks certificates: with the
authorities in `ca`, else the machine's; `cert` and `key` are shown where the servers want one.
"""

import ssl
from typing import Final
from urllib.parse import parse_qsl, unquote, urlsplit

from xmppd.cluster.addresses import join, split
from xmppd.cluster.connection import Server
from xmppd.errors import ConfigError

_PORT: Final = 4222
_PATH: Final = "cluster.nats_url"


def parse_nats_url(url: str) -> list[Server]:
    """The servers to try, in order. Raises `ConfigError` without repeating secrets."""
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in ("nats", "tls"):
        raise ConfigError([f"{_PATH}: expected nats://server:4222 or tls://server:4222"])
    parts = urlsplit(f"//{rest}")
    login, _, hosts = parts.netloc.rpartition("@")
    if not hosts or parts.path not in ("", "/") or "@" in login:
        raise ConfigError([f"{_PATH}: expected {scheme}://user:password@server1:4222,server2:4222"])
    try:
        addresses = [join(*split(host, _PORT)) for host in hosts.split(",")]
    except ValueError as exc:
        raise ConfigError([f"{_PATH}: {exc}"]) from exc
    context = _context(scheme, dict(parse_qsl(parts.query)))
    user, colon, password = login.partition(":")
    if login and not colon:
        return [Server(f"{scheme}://{address}", tls=context, token=unquote(user)) for address in addresses]
    if not login:
        return [Server(f"{scheme}://{address}", tls=context) for address in addresses]
    return [Server(f"{scheme}://{address}", unquote(user), unquote(password), context) for address in addresses]


def _context(scheme: str, files: dict[str, str]) -> ssl.SSLContext | None:
    unknown = sorted(files.keys() - {"ca", "cert", "key"})
    if unknown:
        raise ConfigError([f"{_PATH}: unknown parameter {unknown[0]}; there are ca, cert and key"])
    if scheme == "nats":
        if files:
            raise ConfigError([f"{_PATH}: {sorted(files)[0]} needs tls://"])
        return None
    try:
        context = ssl.create_default_context(cafile=files.get("ca"))
        if "cert" in files:
            context.load_cert_chain(files["cert"], files.get("key"))
    except (OSError, ssl.SSLError) as exc:
        raise ConfigError([f"{_PATH}: cannot read its certificates: {exc}"]) from exc
    return context
