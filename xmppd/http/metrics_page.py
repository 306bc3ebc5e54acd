"""/metrics: what the node counted (metrics.py) and what can be asked of it now, for Prometheus."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from aiohttp import web
from prometheus_client import CollectorRegistry, GCCollector, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from xmppd.c2s.resumption import Resumption
from xmppd.c2s.spooling import Spooling
from xmppd.http.answers import Answer, only_reads
from xmppd.http.cluster_metrics import ClusterCollector, ClusterSources
from xmppd.metrics import Counters, Histogram, LoopLag
from xmppd.outbox import Outbox
from xmppd.session_manager import SessionManager
from xmppd.spool import Spool
from xmppd.storage import Batcher, Endpoint

_LONGEST_ACCEPT: Final = 1000


@dataclass(frozen=True, slots=True)
class Sources:
    """Where the numbers come from."""

    node: str
    version: str
    hosts: tuple[str, ...]
    uptime: Callable[[], float]
    connections: Callable[[], Mapping[str, int]]  # by listener
    certificate_days: Callable[[], Mapping[str, int]]  # by host
    sessions: SessionManager
    batcher: Batcher
    spool: Spool
    outbox: Outbox
    counters: Counters
    lag: LoopLag
    requests: Mapping[tuple[str, int], int]  # by handler and status
    resumption: Resumption = field(default_factory=Resumption)
    spooling: Spooling = field(default_factory=Spooling)
    databases: Iterable[Endpoint] = ()


class NodeCollector(Collector):
    """Nothing here depends on how many sessions there are."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources

    def collect(self) -> Iterator[Metric]:
        yield from self._node()
        yield from self._streams()
        yield from self._stanzas()
        yield from self._promise()
        yield from self._storage()
        yield from self._databases()
        yield from self._outbox()

    def _node(self) -> Iterator[Metric]:
        src = self._sources
        yield InfoMetricFamily("xmppd", "This node", value={"node": src.node, "version": src.version})
        yield GaugeMetricFamily("xmppd_uptime_seconds", "Since the start of the node", value=src.uptime())
        yield _histogram("xmppd_event_loop_lag_seconds", "How late the event loop was, sampled", src.lag.histogram)
        yield _count("xmppd_memory_given_back", "Times that freed memory was given back", src.counters.given_back)
        days = _gauge("xmppd_certificate_days_left", "Until a host's certificate ends", "host")
        for host, left in src.certificate_days().items():
            days.add_metric([host], left)
        yield days
        requests = CounterMetricFamily("xmppd_http_requests", "HTTP requests answered", labels=["handler", "status"])
        for (handler, status), count in sorted(src.requests.items()):
            requests.add_metric([handler, str(status)], count)
        yield requests

    def _streams(self) -> Iterator[Metric]:
        src, counters = self._sources, self._sources.counters
        sessions = _gauge("xmppd_sessions", "Bound sessions", "host")
        for host in src.hosts:
            sessions.add_metric([host], src.sessions.count(host))
        yield sessions
        connections = _gauge("xmppd_connections", "Open client connections, those that negotiate included", "listener")
        for listener, count in src.connections().items():
            connections.add_metric([listener], count)
        yield connections
        yield _count("xmppd_connections_accepted", "Client connections accepted", counters.accepted)
        yield _count("xmppd_connections_refused", "Client connections there was no room for", counters.refused)
        yield _counts(
            "xmppd_proxies_refused",
            "Connections without a PROXY header from a trusted balancer",
            "reason",
            counters.proxies_refused,
        )
        yield _counts("xmppd_logins", "Successful authentications", "mechanism", counters.logins)
        yield _counts("xmppd_login_failures", "Failed authentications", "reason", counters.login_failures)
        yield _counts("xmppd_streams_refused", "Streams ended with an error", "condition", counters.stream_errors)
        yield _count("xmppd_tls_failures", "TLS handshakes that failed", counters.tls_failures)
        yield _count("xmppd_negotiations_timed_out", "Connections that began no stream in time", counters.silent)
        yield _count("xmppd_slow_readers", "Connections cut off because they read too slowly", counters.cut_off)
        stalled = list(counters.stalled)
        yield GaugeMetricFamily("xmppd_write_queues", "Connections whose peer takes no more bytes now", len(stalled))
        waiting = sum(queue.queued() for queue in stalled)
        yield GaugeMetricFamily("xmppd_write_queue_bytes", "Bytes that wait for these", value=waiting)

    def _stanzas(self) -> Iterator[Metric]:
        src, kinds = self._sources, self._sources.counters.stanzas
        outcomes = CounterMetricFamily(
            "xmppd_stanzas", "Stanzas of clients and what became of them", labels=["kind", "outcome"]
        )
        pending = _gauge("xmppd_stanzas_pending", "Stanzas of clients whose outcome is not known yet", "kind")
        for kind, count in kinds.items():
            outcomes.add_metric([kind, "safe"], count.safe)
            outcomes.add_metric([kind, "error"], count.error)
            pending.add_metric([kind], count.pending)
        yield outcomes
        yield pending
        received = {kind: count.received for kind, count in kinds.items()}
        yield _counts("xmppd_stanzas_received", "Stanzas that clients sent", "kind", received)
        sent = {kind: count.sent for kind, count in kinds.items()}
        yield _counts("xmppd_stanzas_sent", "Stanzas written to clients", "kind", sent)
        yield _counts("xmppd_stanza_errors", "Stanza errors sent", "condition", src.counters.stanza_errors)
        yield _count("xmppd_stanzas_rerouted", "Stanzas routed again: their session was dead", src.sessions.rerouted)

    def _promise(self) -> Iterator[Metric]:
        src, resumption, spooling = self._sources, self._sources.resumption, self._sources.spooling
        waiting = spooling.unacknowledged
        yield GaugeMetricFamily("xmppd_stanzas_unacknowledged", "Sent to clients, who owe an answer", value=waiting)
        streams = {"here": resumption.here, "elsewhere": resumption.from_elsewhere, "failed": resumption.failed}
        yield _counts("xmppd_resumptions", "Streams to be resumed, by where their session was", "result", streams)
        yield _count("xmppd_stanzas_redelivered", "Stanzas written again to resumed streams", resumption.redelivered)
        rows = {
            "written": spooling.spooled,
            "acknowledged": spooling.acknowledged_late,
            "ended": spooling.ended,
            "taken_over": src.spool.taken_over,
            "duplicate": spooling.duplicates,
        }
        yield _counts("xmppd_unacknowledged_rows", "Unacknowledged messages in the spool", "event", rows)

    def _storage(self) -> Iterator[Metric]:
        batcher, spool = self._sources.batcher, self._sources.spool
        yield GaugeMetricFamily("xmppd_storage_queue_rows", "Rows that wait for a commit", value=batcher.rows_waiting)
        yield GaugeMetricFamily("xmppd_storage_queue_bytes", "Bytes of these rows", value=batcher.bytes_waiting)
        yield _histogram("xmppd_storage_batch_rows", "Rows in one commit", batcher.batch_rows)
        yield _histogram("xmppd_storage_commit_seconds", "Duration of one commit", batcher.commit_seconds)
        yield _count("xmppd_storage_rows_failed", "Rows that were not written", batcher.rows_failed)
        results = {"stored": spool.stored, "duplicate": spool.duplicates, "refused": spool.refused}
        yield _counts("xmppd_spool_rows", "Messages for the spool", "result", results)
        yield _count("xmppd_spool_rows_taken", "Stored messages given to a session", spool.taken)
        yield _count("xmppd_spool_rows_flushed", "Stored messages that have arrived and were deleted", spool.flushed)

    def _databases(self) -> Iterator[Metric]:
        """By server. A replica of which it is not known how late it is has no lag, and is not asked."""
        up = _gauge("xmppd_database_up", "Whether a database server is used", "endpoint")
        lag = _gauge("xmppd_database_lag_seconds", "How late a replica is", "endpoint")
        waiting = _gauge("xmppd_database_waiting", "Who waits for a connection", "endpoint")
        connections = GaugeMetricFamily("xmppd_database_connections", "Connections", labels=["endpoint", "state"])
        counts = {
            name: CounterMetricFamily(f"xmppd_database_{name}", text, labels=["endpoint"])
            for name, text in (
                ("statements", "Statements that ended well"),
                ("slow", "Statements that took longer than database.slow"),
                ("errors", "Statements that did not end well"),
                ("retries", "Transactions and reads done again"),
            )
        }
        for each in self._sources.databases:
            up.add_metric([each.name], each.usable)
            waiting.add_metric([each.name], each.waiting)
            connections.add_metric([each.name, "used"], each.used)
            connections.add_metric([each.name, "idle"], max(0, each.size - each.used))
            if each.lag is not None:
                lag.add_metric([each.name], each.lag)
            for name, family in counts.items():
                family.add_metric([each.name], getattr(each, name))
        yield from (up, lag, waiting, connections, *counts.values())

    def _outbox(self) -> Iterator[Metric]:
        outbox = self._sources.outbox
        tallies, runners = outbox.tallies, sorted(outbox.runners.items())
        yield _of_sinks(
            "queued", "Events in the database for this node to send", {n: t.pending for n, t in tallies.items()}
        )
        yield _of_sinks("dead", "Events that were given up and are kept", {n: t.dead for n, t in tallies.items()})
        yield _of_sinks("in_memory", "Events in memory", {name: runner.held for name, runner in runners})
        yield _of_sinks("in_flight", "Requests under way", {name: runner.in_flight for name, runner in runners})
        yield _of_sinks("broken", "1: the sink takes nothing", {name: int(r.breaker.is_open) for name, r in runners})
        ages = {name: outbox.age(name) for name in {*tallies, *outbox.runners}}
        yield _of_sinks("oldest_seconds", "Age of the oldest event that waits", ages)
        for word, text in (("sent", "taken"), ("failed", "tried in vain"), ("dropped", "dropped for lack of room")):
            counts = {name: getattr(runner, word) for name, runner in runners}
            yield _counts(f"xmppd_outbox_events_{word}", f"Events {text}", "sink", counts)
        given_up = {name: runner.dead for name, runner in runners}
        yield _counts("xmppd_outbox_events_given_up", "Events given up", "sink", given_up)
        repeated = {name: runner.duplicates for name, runner in runners}
        yield _counts("xmppd_outbox_events_repeated", "Events that were there already", "sink", repeated)
        restarts = "Times that the process which makes the requests was started again"
        yield CounterMetricFamily("xmppd_outbox_sender_restarts", restarts, value=outbox.sender.restarts)
        seconds = HistogramMetricFamily(
            "xmppd_outbox_seconds", "From an event to its being taken by the sink", labels=["sink"]
        )
        for name, runner in runners:
            seconds.add_metric([name], buckets=runner.seconds.buckets(), sum_value=runner.seconds.sum)
        yield seconds


def _of_sinks(name: str, text: str, values: Mapping[str, float]) -> GaugeMetricFamily:
    family = _gauge(f"xmppd_outbox_{name}", text, "sink")
    for sink, value in sorted(values.items()):
        family.add_metric([sink], value)
    return family


def _count(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(name, text, value=value)


def _counts(name: str, text: str, label: str, values: Mapping[str, int]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=[label])
    for value, count in sorted(values.items()):
        family.add_metric([value], count)
    return family


def _gauge(name: str, text: str, label: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, labels=[label])


def _histogram(name: str, text: str, histogram: Histogram) -> HistogramMetricFamily:
    return HistogramMetricFamily(name, text, buckets=histogram.buckets(), sum_value=histogram.sum)


class MetricsPage:
    """Fulfils answers.Handler."""

    name = "metrics"
    exact = True

    def __init__(self, sources: Sources, cluster: ClusterSources) -> None:
        self._registry = CollectorRegistry(auto_describe=False)  # our own: nothing a library registers gets in
        self._registry.register(NodeCollector(sources))
        self._cluster = ClusterCollector(cluster)
        self._registry.register(self._cluster)
        ProcessCollector(registry=self._registry)  # memory, CPU time, open files
        GCCollector(registry=self._registry)

    async def __call__(self, request: web.BaseRequest, rest: str) -> Answer:
        only_reads(request)
        accept = request.headers.get("Accept", "")[:_LONGEST_ACCEPT]
        encoder, content_type = _encoder(accept)
        await self._cluster.refresh()
        return Answer(200, encoder(self._registry), content_type)


def _encoder(accept: str) -> tuple[Callable[[Any], bytes], str]:
    try:
        return choose_encoder(accept)
    except (ValueError, IndexError, KeyError):  # a header no scraper sends
        return choose_encoder("")
