"""What our nats-server says about itself, as far as an operator or a test wants to know."""

from dataclasses import dataclass, field, replace
from typing import Any

from xmppd.cluster.subjects import node_of


@dataclass(frozen=True, slots=True)
class RouteState:
    """The connection of our nats-server to another one; counters from our side, since it was made."""

    node: bytes | None  # UUID of the other node
    address: str
    route_id: int  # another number: it was made anew
    rtt_seconds: float | None
    started: str  # RFC 3339
    sent_bytes: int
    received_bytes: int
    sent_messages: int
    received_messages: int
    pending_bytes: int


@dataclass(frozen=True, slots=True)
class ObserverState:
    """A connected client that is no member."""

    name: str
    user: str
    address: str
    library: str


@dataclass(frozen=True, slots=True)
class EngineState:
    """All of it; counters since the engine was made."""

    connected: bool
    external: bool  # cluster.nats_url: no child, no routes to tell of
    child_pid: int | None
    route_port: int
    restarts: int  # of the child, after deaths nobody asked for
    gaps: int
    sent: int  # packets
    received: int
    dropped: int
    refused: int  # connections of or to nodes with another cookie
    unresolved: dict[str, str] = field(default_factory=dict)  # routes without an address: name -> why
    nats_version: str = ""
    routes: tuple[RouteState, ...] = ()
    observers: tuple[ObserverState, ...] = ()
    memory: int = 0  # bytes, of the child
    slow_consumers: int = 0
    client_bytes_in: int = 0  # from clients into the child: us and observers, questions for this state included
    client_bytes_out: int = 0

    @property
    def route_bytes(self) -> int:
        """What went to and came from all other nodes."""
        return sum(route.sent_bytes + route.received_bytes for route in self.routes)


def read_state(state: EngineState, answers: dict[str, Any]) -> EngineState:
    """The state completed by the server's answers to ROUTEZ, VARZ and CONNZ."""
    server = answers["VARZ"]
    return replace(
        state,
        nats_version=str(server.get("version", "")),
        routes=tuple(_route(one) for one in answers["ROUTEZ"].get("routes") or ()),
        observers=tuple(
            ObserverState(
                name=str(one.get("name", "")),
                user=str(one.get("authorized_user", "")),
                address=f"{one.get('ip', '')}:{one.get('port', '')}",
                library=f"{one.get('lang', '')} {one.get('version', '')}".strip(),
            )
            for one in answers["CONNZ"].get("connections") or ()
            if node_of(str(one.get("name", ""))) is None
        ),
        memory=int(server.get("mem", 0)),
        slow_consumers=int(server.get("slow_consumers", 0)),
        client_bytes_in=int(server.get("in_client_bytes", 0)),
        client_bytes_out=int(server.get("out_client_bytes", 0)),
    )


def _route(one: dict[str, Any]) -> RouteState:
    return RouteState(
        node=node_of(str(one.get("remote_name", ""))),
        address=f"{one.get('ip', '')}:{one.get('port', '')}",
        route_id=int(one.get("rid", 0)),
        rtt_seconds=seconds(str(one.get("rtt", ""))) or None,
        started=str(one.get("start", "")),
        sent_bytes=int(one.get("out_bytes", 0)),
        received_bytes=int(one.get("in_bytes", 0)),
        sent_messages=int(one.get("out_msgs", 0)),
        received_messages=int(one.get("in_msgs", 0)),
        pending_bytes=int(one.get("pending_size", 0)),
    )


def seconds(duration: str) -> float:
    """Seconds out of Go's way of writing durations, `1.425739ms`; 0 for what cannot be read."""
    for unit, factor in (("ns", 1e-9), ("µs", 1e-6), ("ms", 1e-3), ("s", 1.0)):
        if duration.endswith(unit):
            try:
                return float(duration.removesuffix(unit)) * factor
            except ValueError:
                return 0.0
    return 0.0
