"""Messages posted to a web server, by real nodes."""

import asyncio
import json
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.harness.cluster import RealCluster
from tests.harness.raw import Raw
from tests.harness.scene import Scene, until
from tests.harness.sink import WebSink
from xmppd.config.schema import DEFAULT_MODULES

RECORDED = json.loads((Path(__file__).parents[1] / "golden" / "post_log-23.01.json").read_text())
LONG = "abcdefghij" * 6000
OF_THE_CONNECTION = {"host", "connection", "te", "content-length"}
EAGER = {"retry": {"base": "100ms", "max": "1s"}, "breaker": {"probe_every": "200ms"}}
STAMP = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}Z")
# ejabberd writes an attribute with a prefix that it does not declare: that is no XML (with namespaces).
OURS = {
    "prefixes": b"<message xml:lang='en' to='juliet@localhost' from='romeo@localhost/orchard' type='chat' id='m32'"
    b" xmlns='jabber:client'><q xmlns='urn:example:p' xmlns:p='urn:example:p' p:r='1'><s xmlns='jabber:client'/></q>"
    b"<body>b</body></message>"
}


@pytest.fixture
async def sink() -> AsyncIterator[WebSink]:
    async with WebSink() as sink:
        yield sink


def with_post_log(sink: WebSink, **options: Any) -> dict[str, Any]:
    """The `modules:` section."""
    return {**{name: {} for name in DEFAULT_MODULES}, "mod_post_log": {"url": sink.url, **options}}


def chat(body: str, to: str = "juliet@localhost", id: str = "m") -> str:
    return f"<message type='chat' to='{to}' id='{id}'><body>{body}</body></message>"


def headers_of(headers: list[Any], *, but: str = "") -> dict[str, str]:
    """Without those of the connection, and the time."""
    found = {name.lower(): value for name, value in headers if name.lower() not in {*OF_THE_CONNECTION, but}}
    assert STAMP.fullmatch(found["x-message-timestamp"])
    return {**found, "x-message-timestamp": "now"}


async def test_requests_are_those_of_ejabberd_with_its_module(fresh, sink):
    """PL-01: the corpus that was sent through ejabberd 23.01."""
    scene: Scene = fresh(modules=with_post_log(sink))
    romeo = await scene.raw_login("romeo", "orchard")
    await scene.raw_login("juliet", "balcony")

    for case in RECORDED["cases"]:
        romeo.send_raw(case["sent"].replace("{long}", LONG))

    expected = [
        (headers_of(post["headers"]), OURS.get(case["name"], post["body"].replace("{long}", LONG).encode()))
        for case in RECORDED["cases"]
        for post in case["posts"]
    ]
    posts = await sink.wait(len(expected))
    keys = {post.key for post in posts}
    assert len(keys) == len(posts)
    ours = [(headers_of(post.headers, but="idempotency-key"), post.body) for post in posts]
    assert sorted(ours, key=repr) == sorted(expected, key=repr)  # byte by byte; conversations overtake each other


async def test_nobody_waits_for_a_sink_that_is_down_and_nothing_is_lost(fresh, sink):
    """PL-03, shorter: what comes while it is down is delivered at once and posted later."""
    await sink.close()
    breaker = {"open_after": 2, "probe_every": "200ms"}
    outbox = {"memory": {"max_events": 20}, "breaker": breaker, "retry": {"base": "50ms"}}
    scene: Scene = fresh(modules=with_post_log(sink), outbox=outbox)
    romeo, juliet = await scene.raw_login("romeo"), await scene.raw_login("juliet")
    for number in range(100):
        romeo.send_raw(chat(f"{number:03}", id=f"m{number}"))
    for number in range(100):
        assert (await juliet.next_message()).body == f"{number:03}"
    await until(lambda: status(scene)[1:3] == ["broken", "100"], "the events to be written")

    await sink.open()

    await sink.wait(100)
    assert [post.body.count(f"<body>{n:03}".encode()) for n, post in enumerate(sink.taken)] == [1] * 100
    assert len({post.key for post in sink.taken}) == 100
    await until(lambda: status(scene)[1:3] == ["open", "0"], "the events to be done")


def status(scene: Scene) -> list[str]:
    """Node, state, queued, in flight, dead."""
    return scene.node.quick("outbox", "status").split("\t")[1:]


async def test_each_message_is_posted_once_in_a_cluster_and_a_dead_nodes_are_posted_by_another(real_cluster, sink):
    """PL-04, PL-05"""
    await a_node_dies(real_cluster(2, modules=with_post_log(sink), outbox=EAGER), sink, 200)


@pytest.mark.long
@pytest.mark.mariadb
async def test_a_thousand_events_of_a_dead_node_are_posted_by_another(real_cluster, sink, databases, tmp_path):
    """PL-04 in full, over MariaDB."""
    url = await databases.migrated("mariadb", tmp_path)
    try:
        cluster = real_cluster(2, modules=with_post_log(sink), outbox=EAGER, database=url)
        await a_node_dies(cluster, sink, 1000)
        cluster.end()
    finally:
        databases.drop(url)


async def a_node_dies(cluster: RealCluster, sink: WebSink, count: int) -> None:
    """While that many events wait, all of one conversation. Its sender is on that node, its recipient on another."""
    one, two = Scene(cluster[0]), Scene(cluster[1])
    try:
        romeo, juliet = await one.raw_login("romeo"), await two.raw_login("juliet")
        for number in range(20):
            romeo.send_raw(chat(f"first {number:04}"))
            await juliet.next_message()
        await sink.wait(20)
        sink.answer = 503
        for number in range(count):
            romeo.send_raw(chat(f"queued {number:04}"))
        for _ in range(count):
            await juliet.next_message()
        # `outbox status` counts what is in memory alone for a moment, too.
        listing = ("outbox", "list", "post_log", "pending", str(count + 1))
        await until(lambda: len(one.node.quick(*listing).splitlines()) == count, "the events to be written")

        one.node.kill()
        asked = len(sink.posts)
        sink.answer = 200

        await sink.wait(20 + count, patience=120)
        await until(lambda: re.search(r"\topen\t0\t0\t", two.node.quick("outbox", "status")) is not None, "the end")
        bodies = {post.key: re.search(rb"<body>(.*)</body>", post.body)[1].decode() for post in sink.taken}
        expected = [f"first {n:04}" for n in range(20)] + [f"queued {n:04}" for n in range(count)]
        assert sorted(bodies.values()) == sorted(expected)
        after = [bodies[post.key] for post in sink.posts[asked:] if post.status == 200]
        assert after == sorted(after)  # the survivor keeps the order of the conversation
    finally:
        await one.leave()
        await two.leave()


RATE = 200  # messages a second
MINUTES = 10 if os.environ.get("XMPPD_LONG_TESTS_FULL") == "1" else 1
HELD = 1000  # events in memory
LISTEN = [
    {"port": 0, "ip": "127.0.0.1", "module": "c2s"},
    {"port": 0, "ip": "127.0.0.1", "module": "c2s", "tls": True},
    {"port": 0, "ip": "127.0.0.1", "module": "http"},
]


@pytest.mark.long
async def test_a_sink_that_is_away_for_minutes_delays_nobody_and_takes_no_memory(fresh, sink):
    """PL-03 at its rate, for a minute; for its ten minutes with XMPPD_LONG_TESTS_FULL=1. What the machine's other work
    delays is told from what the server delays by a node without the module, which carries the same at the same time."""
    outbox = {"memory": {"max_events": HELD}, "breaker": {"probe_every": "1s"}}
    scene: Scene = fresh(modules=with_post_log(sink), outbox=outbox, listen=LISTEN)
    plain: Scene = fresh()
    talk, control = [Talk(await one.raw_login("romeo"), await one.raw_login("juliet")) for one in (scene, plain)]
    await asyncio.gather(talk.go_on(5), control.go_on(5))
    await sink.wait(talk.sent, patience=60)
    await sink.close()
    await asyncio.gather(talk.go_on(10), control.go_on(10))  # what is new to the server has its buffers after that
    memory, held, peak = scene.node.memory, 0.0, 0
    times: list[float] = []
    others: list[float] = []

    for _ in range(MINUTES * 6):
        some, other = await asyncio.gather(talk.go_on(10), control.go_on(10))
        times += some
        others += other
        held = max(held, await in_memory(scene))
        peak = max(peak, scene.node.memory)

    assert 0 < held <= HELD
    assert peak - memory < 40 << 10  # KiB
    for part in (0.5, 0.99):
        took, usual = percentile(times, part), percentile(others, part)
        assert took < 3 * usual + 0.1, f"{part:.0%} of the messages came within {took:.3f} s, without it {usual:.3f} s"
    await until(lambda: status(scene)[1] == "broken", "the breaker")
    await sink.open()
    await sink.wait(talk.sent, patience=300 * MINUTES)
    assert [re.search(rb"<body>(.*)</body>", post.body)[1] for post in sink.taken] == [
        b"%06d" % number for number in range(talk.sent)
    ]


class Talk:
    """One writes to the other, so many messages a second."""

    def __init__(self, sender: Raw, recipient: Raw) -> None:
        self.sent = 0
        self._sender, self._recipient = sender, recipient
        self._loop = asyncio.get_running_loop()

    async def go_on(self, seconds: int) -> list[float]:
        """How long each message took, in seconds from when it was due; fails where one is missing or out of order."""
        count, first, began = RATE * seconds, self.sent, self._loop.time()
        self.sent += count
        self._recipient.send_raw(" ")  # it lives, and answers no pings
        reading = asyncio.create_task(self._read(first, count, began))
        for number in range(count):
            if (wait := began + number / RATE - self._loop.time()) > 0:
                await asyncio.sleep(wait)
            self._sender.send_raw(chat(f"{first + number:06}"))
        return await reading

    async def _read(self, first: int, count: int, began: float) -> list[float]:
        times = []
        for number in range(count):
            assert (await self._recipient.next_message()).body == f"{first + number:06}"
            times.append(self._loop.time() - began - number / RATE)
        return times


def percentile(values: list[float], part: float) -> float:
    return sorted(values)[int(part * (len(values) - 1))]


async def in_memory(scene: Scene) -> float:
    """Events of the sink that the node holds."""
    port = next(one["port"] for one in scene.node.ready["listen"] if one["module"] == "http")
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/metrics") as answer:
        found = re.search(r'^xmppd_outbox_in_memory\{sink="post_log"\} (\S+)$', await answer.text(), re.MULTILINE)
    assert found is not None
    return float(found[1])
