"""Counters that cost nothing, and the page that shows them."""

from types import SimpleNamespace
from typing import ClassVar

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from xmppd.delivery import ERROR, SAFE, Pending
from xmppd.http.metrics_page import NodeCollector, Sources
from xmppd.metrics import Counters, Histogram, LoopLag, StanzaCount, add
from xmppd.outbox.rows import Tally


def test_a_value_on_a_bound_belongs_below_it():
    histogram = Histogram((1, 5))

    for value in (0.5, 1, 1.1, 5, 9):
        histogram.observe(value)

    assert histogram.buckets() == [("1", 2.0), ("5", 4.0), ("+Inf", 5.0)]
    assert histogram.sum == pytest.approx(16.6)


def test_a_pending_stanza_counts_as_such_until_it_is_settled():
    count = StanzaCount()
    outcomes = [Pending(), Pending(), Pending()]
    count.received = 3
    for outcome in outcomes:
        outcome.then(count.settled)

    outcomes[0].settle(SAFE)
    outcomes[1].settle(ERROR)

    assert (count.safe, count.error, count.pending) == (1, 1, 1)


class Clock:
    """An event loop of which only the clock and the timers are looked at."""

    def __init__(self):
        self.now = 0.0
        self.timers = []

    def time(self):
        return self.now

    def call_at(self, when, callback):
        self.timers.append((when, callback))
        return self

    def cancel(self):
        self.timers.clear()


def test_the_lag_is_how_late_the_loop_came():
    clock = Clock()
    lag = LoopLag(clock)

    when, look = clock.timers.pop()
    clock.now = when + 0.3
    look()
    when, look = clock.timers.pop()
    clock.now = when
    look()
    lag.stop()

    assert lag.histogram.sum == pytest.approx(0.3)
    assert dict(lag.histogram.buckets())["0.25"] == 1
    assert dict(lag.histogram.buckets())["0.5"] == 2
    assert not clock.timers


class Queue:
    def queued(self):
        return 700


class Sessions:
    rerouted = 4

    def count(self, host):
        return {"montague.example": 3}.get(host, 0)


class Batcher:
    rows_waiting, bytes_waiting, rows_failed = 5, 1280, 1
    batch_rows, commit_seconds = Histogram((10,)), Histogram((0.1,))


class Spool:
    stored, duplicates, refused, taken, flushed, taken_over = 1, 2, 3, 4, 5, 6


class Outbox:
    tallies: ClassVar = {"log": Tally(3, 1, 5.0)}
    runners: ClassVar = {}
    sender = SimpleNamespace(restarts=4)

    def age(self, sink):
        return 7.0


@pytest.fixture
def counters():
    return Counters()


@pytest.fixture
def page(counters):
    """The text of the page, parsed: (name, sorted labels) -> value."""
    sources = Sources(
        node="xmppd@verona",
        version="9",
        hosts=("montague.example", "capulet.example"),
        uptime=lambda: 12.5,
        connections=lambda: {"c2s": 7},
        certificate_days=lambda: {"montague.example": -1},
        sessions=Sessions(),
        batcher=Batcher(),
        spool=Spool(),
        outbox=Outbox(),
        counters=counters,
        lag=LoopLag(Clock()),
        requests={("api", 401): 2},
    )
    registry = CollectorRegistry()
    registry.register(NodeCollector(sources))

    def read():
        families: list[Metric] = list(text_string_to_metric_families(generate_latest(registry).decode()))
        return {(s.name, *sorted(s.labels.values())): s.value for family in families for s in family.samples}

    return read


def test_the_page_shows_what_was_counted(counters, page):
    counters.stanzas["message"].received = 9
    counters.stanzas["message"].safe = 6
    counters.stanzas["message"].error = 1
    counters.stanzas["iq"].sent = 2
    add(counters.logins, "SCRAM-SHA-1")
    add(counters.login_failures, "not-authorized")
    add(counters.login_failures, "not-authorized")
    add(counters.stream_errors, "host-unknown")
    counters.stalled.add(Queue())

    shown = page()

    assert shown["xmppd_stanzas_total", "message", "safe"] == 6
    assert shown["xmppd_stanzas_total", "error", "message"] == 1
    assert shown["xmppd_stanzas_pending", "message"] == 2
    assert shown["xmppd_stanzas_received_total", "message"] == 9
    assert shown["xmppd_stanzas_sent_total", "iq"] == 2
    assert shown["xmppd_logins_total", "SCRAM-SHA-1"] == 1
    assert shown["xmppd_login_failures_total", "not-authorized"] == 2
    assert shown["xmppd_streams_refused_total", "host-unknown"] == 1
    assert (shown["xmppd_write_queues",], shown["xmppd_write_queue_bytes",]) == (1, 700)


def test_the_page_shows_what_is_asked_for_at_the_moment(page):
    shown = page()

    assert shown["xmppd_sessions", "montague.example"] == 3
    assert shown["xmppd_sessions", "capulet.example"] == 0
    assert shown["xmppd_connections", "c2s"] == 7
    assert shown["xmppd_certificate_days_left", "montague.example"] == -1
    assert shown["xmppd_uptime_seconds",] == 12.5
    assert shown["xmppd_info", "9", "xmppd@verona"] == 1
    assert shown["xmppd_http_requests_total", "401", "api"] == 2
    assert (shown["xmppd_storage_queue_rows",], shown["xmppd_storage_queue_bytes",]) == (5, 1280)
    assert shown["xmppd_spool_rows_total", "refused"] == 3
    assert shown["xmppd_spool_rows_flushed_total",] == 5
    assert shown["xmppd_outbox_queued", "log"] == 3
    assert shown["xmppd_outbox_dead", "log"] == 1
    assert shown["xmppd_outbox_oldest_seconds", "log"] == 7
    assert shown["xmppd_outbox_sender_restarts_total",] == 4
    assert shown["xmppd_stanzas_rerouted_total",] == 4
    assert shown["xmppd_unacknowledged_rows_total", "taken_over"] == 6
