"""The configuration file of our nats-server child, as text.

Two accounts: XMPPD for the nodes and observers, SYS for what the server says about itself. The few subjects of SYS that
a node needs are imported into XMPPD, so that one connection is enough.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from xmppd.cluster.pki import MEMBER, Bundle

CLUSTER: Final = "xmppd"
MAX_PACKET: Final = 1024 * 1024  # bytes; links stay far below it
USER: Final = "xmppd"

DISCONNECTED: Final = "$SYS.ACCOUNT.XMPPD.DISCONNECT"  # a client of any server in the cluster has gone
SHUTDOWN: Final = "$SYS.SERVER.*.SHUTDOWN"
QUESTIONS: Final = ("ROUTEZ", "VARZ", "CONNZ")


@dataclass(frozen=True, slots=True)
class Observer:
    """A client that is no member: its name, its secret and what it may do. A subject may hold `*` and `>`."""

    name: str
    password: str
    publish: tuple[str, ...] = ()
    subscribe: tuple[str, ...] = ()
    answers: int = 0  # how many answers it may give to each question it was asked


@dataclass(frozen=True, slots=True)
class ObserverPort:
    """Where observers connect: an address of this machine, and the certificate it shows.

    Without one everything, their passwords too, goes in clear: for loopback and trusted networks only.
    """

    host: str
    port: int
    certificate: Path | None = None
    key: Path | None = None


@dataclass(frozen=True, slots=True)
class NatsConfig:
    """What varies between two nodes, or between two moments of one."""

    node: bytes  # UUID, 16 bytes: the name of the server
    password: str  # of our own connection
    ports_folder: Path
    route_host: str
    route_port: int  # 0: any free one
    bundle: Bundle
    routes: tuple[str, ...] = ()  # `address:port` of each other member; addresses, not names
    advertise: str | None = None
    client_port: int = 0  # on loopback; 0: any free one
    observers: tuple[Observer, ...] = ()
    observer_port: ObserverPort | None = None

    def render(self, *, starting: bool) -> str:
        """The file's text. `starting` for the one a child begins with; the next one goes without it.

        Routes are dialled by address, but nats-server wants to know which name the other one's certificate must have:
        it takes the first name it is ever told in a route. So there is one in the beginning, which leads nowhere, and
        then never again.
        """
        routes = [f"nats-route://{MEMBER}:1"] if starting else []
        routes += [f"nats-route://{address}" for address in self.routes]
        port = self.observer_port
        lines = [
            f"server_name: {quoted(self.node.hex())}",
            f"host: {quoted(port.host if port else '127.0.0.1')}",
            f"port: {port.port if port else self.client_port or -1}",
            *(_client_tls(port) if port else ()),
            f"ports_file_dir: {quoted(str(self.ports_folder))}",
            f"max_payload: {MAX_PACKET}",
            f"max_pending: {128 * 1024 * 1024}",  # a node that is busy for a moment is not cut off
            'write_deadline: "10s"',
            "connect_error_reports: 3",
            "reconnect_error_reports: 3",
            f"system_account: {quoted('SYS')}",
            *self._accounts(),
            "cluster {",
            f"  name: {quoted(CLUSTER)}",
            f"  host: {quoted(self.route_host)}",
            f"  port: {self.route_port or -1}",
            *([f"  cluster_advertise: {quoted(self.advertise)}"] if self.advertise else ()),
            "  no_advertise: true",  # clients connect to their own server only
            "  pool_size: -1",  # one connection for each pair of nodes
            # a peer that is silent, not gone, is noticed after 4 to 6 s
            '  ping_interval: "2s"',
            "  ping_max: 2",
            '  write_deadline: "5s"',
            f"  connect_retries: {2**31 - 1}",  # otherwise a route learned from others is tried once
            "  tls {",
            f"    cert_file: {quoted(str(self.bundle.certificate))}",
            f"    key_file: {quoted(str(self.bundle.key))}",
            f"    ca_file: {quoted(str(self.bundle.trusted))}",
            "    verify: true",
            '    min_version: "1.3"',
            "    timeout: 3",
            "  }",
            f"  routes: {_list(routes)}",
            "}",
        ]
        return "\n".join(lines) + "\n"

    def _accounts(self) -> list[str]:
        streams = (DISCONNECTED, SHUTDOWN)
        questions = [f"$SYS.REQ.SERVER.PING.{question}" for question in QUESTIONS]
        exports = [f"{{stream: {quoted(subject)}}}" for subject in streams]
        exports += [f"{{service: {quoted(subject)}}}" for subject in questions]
        imports = [f"{{stream: {{account: SYS, subject: {quoted(subject)}}}}}" for subject in streams]
        imports += [f"{{service: {{account: SYS, subject: {quoted(subject)}}}}}" for subject in questions]
        users = [f"{{user: {USER}, password: {quoted(self.password)}}}", *map(_user, self.observers)]
        return [
            "accounts {",
            f"  SYS: {{ exports: [{', '.join(exports)}] }}",
            "  XMPPD: {",
            f"    users: [{', '.join(users)}]",
            f"    imports: [{', '.join(imports)}]",
            "  }",
            "}",
        ]


def _client_tls(port: ObserverPort) -> Iterable[str]:
    if port.certificate is None:
        return ()
    key = port.key or port.certificate
    files = f"cert_file: {quoted(str(port.certificate))}, key_file: {quoted(str(key))}"
    # our own connection stays on this machine and goes without
    return (f"tls {{ {files}, timeout: 5 }}", "allow_non_tls: true")


def _user(observer: Observer) -> str:
    answers = f', allow_responses: {{max: {observer.answers}, expires: "1m"}}' if observer.answers else ""
    return (
        f"{{user: {quoted(observer.name)}, password: {quoted(observer.password)}, permissions: {{"
        f"publish: {_allow(observer.publish)}, subscribe: {_allow(observer.subscribe)}{answers}}}}}"
    )


def _allow(subjects: Iterable[str]) -> str:
    # an empty list would mean that everything is allowed
    found = list(subjects)
    return f"{{allow: {_list(found)}}}" if found else '{deny: ">"}'


def _list(values: Iterable[str]) -> str:
    return f"[{', '.join(map(quoted, values))}]"


def quoted(text: str) -> str:
    """The text as a string of nats-server's configuration language. ValueError for what no string can hold."""
    if any(ord(char) < 32 for char in text):
        raise ValueError(f"control characters in {text!r}")
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
