"""The part of /metrics that tells of the other nodes: links, stanzas and calls between nodes, our nats-server."""

from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from xmppd.cluster.calls import NodeCalls
from xmppd.cluster.engine import Engine
from xmppd.cluster.link_status import LinkStatus
from xmppd.cluster.links import LinkSet
from xmppd.cluster.status import EngineState
from xmppd.forward import Forwarder


@dataclass(frozen=True, slots=True)
class ClusterSources:
    """Where the numbers come from."""

    engine: Engine
    links: LinkSet
    calls: NodeCalls
    forwarder: Forwarder


class ClusterCollector(Collector):
    """Ask `refresh` first: what nats-server says is a question to another process."""

    def __init__(self, sources: ClusterSources) -> None:
        self._sources = sources
        self._state: EngineState | None = None

    async def refresh(self) -> None:
        """Ask our nats-server; takes up to two seconds when it does not answer."""
        self._state = await self._sources.engine.state()

    def collect(self) -> Iterator[Metric]:
        status = self._sources.links.status()
        names = {link.node: link.peer.name if link.peer else link.node.hex() for link in status}
        yield from self._links(status, names)
        yield from self._between()
        if self._state is not None:
            yield from _nats(self._state, names)

    def _links(self, status: list[LinkStatus], names: dict[bytes, str]) -> Iterator[Metric]:
        up = GaugeMetricFamily("xmppd_link_up", "Whether the link to another node is up", labels=["node"])
        rtt = GaugeMetricFamily("xmppd_link_rtt_seconds", "Round-trip time of the link", labels=["node"])
        queue = GaugeMetricFamily("xmppd_link_queue_bytes", "Bytes the node has not acknowledged yet", labels=["node"])
        again = CounterMetricFamily("xmppd_link_retransmissions", "Packets that were sent again", labels=["node"])
        families = {
            what: CounterMetricFamily(f"xmppd_link_{what}", text, labels=["node", "direction"])
            for what, text in (
                ("frames", "Frames of the link: stanzas, rows, calls"),
                ("packets", "Packets, heartbeats included"),
                ("bytes", "Bytes of these packets"),
            )
        }
        for link in status:
            name = names[link.node]
            up.add_metric([name], link.state == "up")
            queue.add_metric([name], link.queue_bytes)
            again.add_metric([name], link.retransmitted)
            if link.rtt_ms is not None:
                rtt.add_metric([name], link.rtt_ms / 1000)
            for direction in ("sent", "received"):
                for what, family in families.items():
                    family.add_metric([name, direction], getattr(link, f"{direction}_{what}"))
        yield from (up, rtt, queue, again, *families.values())
        downs = CounterMetricFamily("xmppd_link_downs", "Links that went down", labels=["reason"])
        for reason, count in sorted(self._sources.links.counters.downs.items()):
            downs.add_metric([reason], count)
        yield downs

    def _between(self) -> Iterator[Metric]:
        forwarder, calls = self._sources.forwarder, self._sources.calls.counters
        stanzas = CounterMetricFamily("xmppd_forwarded_stanzas", "Stanzas between nodes", labels=["direction"])
        stanzas.add_metric(["sent"], forwarder.frames_sent)
        stanzas.add_metric(["received"], forwarder.frames_received)
        yield stanzas
        yield GaugeMetricFamily(
            "xmppd_forwarded_stanzas_pending", "Sent to other nodes, outcome not known yet", value=forwarder.pending
        )
        yield CounterMetricFamily(
            "xmppd_forwarded_stanzas_rerouted", "Routed again: their node went down", value=forwarder.rerouted
        )
        outcomes = CounterMetricFamily("xmppd_calls", "Calls between nodes", labels=["outcome"])
        for outcome in ("calls", "answered", "refused", "timeouts", "failed"):
            outcomes.add_metric(["asked" if outcome == "calls" else outcome], getattr(calls, outcome))
        yield outcomes


def _nats(state: EngineState, names: dict[bytes, str]) -> Iterator[Metric]:
    yield CounterMetricFamily("xmppd_nats_restarts", "Deaths of nats-server nobody asked for", value=state.restarts)
    yield CounterMetricFamily("xmppd_nats_dropped", "Packets nats-server could not take", value=state.dropped)
    yield GaugeMetricFamily("xmppd_nats_memory_bytes", "Memory of nats-server", value=state.memory)
    routes = CounterMetricFamily(
        "xmppd_nats_route_bytes", "Bytes between our nats-server and another one's", labels=["node", "direction"]
    )
    for route in state.routes:
        name = names.get(route.node, route.address) if route.node else route.address
        routes.add_metric([name, "sent"], route.sent_bytes)
        routes.add_metric([name, "received"], route.received_bytes)
    yield routes
