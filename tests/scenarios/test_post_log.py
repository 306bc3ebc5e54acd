"""Messages posted to a web server, by real nodes."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness.scene import Scene, until
from tests.harness.sink import WebSink
from xmppd.config.schema import DEFAULT_MODULES
from xmppd.outbox import verify

RECORDED = json.loads((Path(__file__).parents[1] / "golden" / "post_log-23.01.json").read_text())
LONG = "abcdefghij" * 6000
OF_THE_CONNECTION = {"host", "connection", "te", "content-length"}
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


async def test_json_says_all_there_is_and_is_signed(fresh, sink):
    """PL-07, with a receiver of a few lines (xmppd.outbox.verify)."""
    options = {"format": "json", "secret": ["new secret", "old secret"], "headers": [["X-Site", "verona"]]}
    scene: Scene = fresh(modules=with_post_log(sink, **options))
    romeo = await scene.raw_login("romeo", "orchard")
    romeo.send_raw(
        "<message type='chat' to='juliet@localhost' id='m1'><body>hi</body><thread>t</thread>"
        "<origin-id xmlns='urn:xmpp:sid:0' id='o1'/><x xmlns='jabber:x:oob'><url>https://a.example/b</url></x></message>"
    )

    (post,) = await sink.wait(1)

    said = json.loads(post.body)
    assert said.pop("xml").startswith("<message")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", said.pop("ts"))
    assert said.pop("id") == post.key
    assert said == {
        "v": 1,
        "kind": "message",
        "direction": "sent",
        "host": "localhost",
        "node": "xmppd@localhost",
        "type": "chat",
        "stanza_id": "m1",
        "origin_id": "o1",
        "archive_id": None,
        "from": {"jid": "romeo@localhost/orchard", "user": "romeo", "host": "localhost", "resource": "orchard"},
        "to": {"jid": "juliet@localhost", "user": "juliet", "host": "localhost", "resource": None},
        "body": {"": "hi"},
        "thread": "t",
        "oob": ["https://a.example/b"],
        "state": "accepted",
    }
    assert (post["Content-Type"], post["X-Site"]) == ("application/json", "verona")
    signature = post["X-Xmppd-Signature"]
    now = int(signature[2:].partition(",")[0])
    for secret, good in (("new secret", True), ("old secret", True), ("no secret", False)):
        assert verify(secret, post.body, signature, now) is good
    assert not verify("new secret", post.body + b" ", signature, now)
    assert not verify("new secret", post.body, signature, now + 3600)


@pytest.mark.parametrize("url", [None, "loaclhost", "http://no such host/"])
async def test_a_wrong_url_stops_the_module_and_not_the_chat(fresh, sink, url):
    """PL-06"""
    scene: Scene = fresh(start=False, modules=with_post_log(sink, url=url))
    scene.node.expects_trouble = True
    scene.node.start()
    romeo, juliet = await scene.raw_login("romeo"), await scene.raw_login("juliet")

    romeo.send_raw(chat("hello"))

    assert (await juliet.next_message()).body == "hello"
    assert "messages are not posted option=modules.post_log.url" in scene.node.log
    scene.node.new_log()
    scene.node.expects_trouble = True


async def test_nobody_waits_for_a_sink_that_is_down_and_nothing_is_lost(fresh, sink):
    """PL-03, shorter: what comes while it is down is delivered at once and posted later, through a restart."""
    await sink.close()
    memory = {"max_events": 20}
    outbox: dict[str, Any] = {"memory": memory, "breaker": {"open_after": 2, "probe_every": "200ms"}, "retry": {"base": "50ms"}}
    scene: Scene = fresh(modules=with_post_log(sink), outbox=outbox)
    romeo, juliet = await scene.raw_login("romeo"), await scene.raw_login("juliet")
    for number in range(100):
        romeo.send_raw(chat(f"{number:03}", id=f"m{number}"))
    for number in range(100):
        assert (await juliet.next_message()).body == f"{number:03}"
    await until(lambda: status(scene)[1:3] == ["broken", "100"], "the events to be written")
    scene.node.restart()

    await sink.open()

    await sink.wait(100)
    assert [post.body.count(f"<body>{n:03}".encode()) for n, post in enumerate(sink.taken)] == [1] * 100
    assert len({post.key for post in sink.taken}) == 100
    await until(lambda: status(scene)[1:3] == ["open", "0"], "the events to be done")


def status(scene: Scene) -> list[str]:
    """Node, state, queued, in flight, dead."""
    return scene.node.quick("outbox", "status").split("\t")[1:]


async def test_operators_see_pause_and_retry(fresh, sink):
    sink.answer = 404
    scene: Scene = fresh(modules=with_post_log(sink))
    romeo = await scene.raw_login("romeo")
    romeo.send_raw(chat("hello"))
    await until(lambda: status(scene)[4] == "1", "a dead event")
    assert "post_log\tlocalhost\tmessage.sent\tdead" in scene.asked("outbox", "list")
    assert "HTTP 404" in scene.asked("outbox", "list", "post_log", "dead")
    sink.answer = 200

    scene.asked("outbox", "pause", "post_log")
    assert scene.asked("outbox", "retry") == "1"
    assert status(scene)[1] == "paused"
    assert sink.taken == []
    scene.asked("outbox", "resume", "post_log")

    await sink.wait(1)
    assert scene.asked("outbox", "purge", "all") == "0"


async def test_an_offline_message_is_told_when_it_is_stored_and_once(fresh, sink):
    scene: Scene = fresh(modules=with_post_log(sink, format="json", directions="offline"))
    romeo = await scene.raw_login("romeo")
    scene.account("juliet")

    for _ in range(3):
        romeo.send_raw(chat("wait for me"))
    romeo.send_raw(chat("nobody there", to="nobody@localhost"))
    romeo.send_raw(chat("the last", id="last"))

    posts = [json.loads(post.body) for post in await sink.wait(2)]
    assert [(post["body"][""], post["direction"], post["state"]) for post in posts] == [
        ("wait for me", "offline", "stored-offline"),
        ("the last", "offline", "stored-offline"),
    ]
    assert await scene.stored("juliet") == 2


async def test_each_message_is_posted_once_in_a_cluster_and_a_dead_nodes_are_posted_by_another(real_cluster, sink):
    """PL-04, PL-05"""
    outbox = {"retry": {"base": "100ms", "max": "1s"}, "breaker": {"probe_every": "200ms"}}
    cluster = real_cluster(2, modules=with_post_log(sink), outbox=outbox)
    one, two = Scene(cluster[0]), Scene(cluster[1])
    try:
        romeo, juliet = await one.raw_login("romeo"), await two.raw_login("juliet")
        for number in range(20):
            romeo.send_raw(chat(f"first {number:03}"))
            await juliet.next_message()
        await sink.wait(20)
        sink.answer = 503
        for number in range(200):
            romeo.send_raw(chat(f"queued {number:03}"))
            await juliet.next_message()
        await until(lambda: "\t200\t" in one.node.quick("outbox", "status"), "the events to be written")

        one.node.kill()
        asked = len(sink.posts)
        sink.answer = 200

        await sink.wait(220)
        await until(lambda: re.search(r"\topen\t0\t0\t", two.node.quick("outbox", "status")) is not None, "the end")
        bodies = {post.key: re.search(rb"<body>(.*)</body>", post.body)[1].decode() for post in sink.taken}
        assert sorted(bodies.values()) == sorted(
            [f"first {n:03}" for n in range(20)] + [f"queued {n:03}" for n in range(200)]
        )
        after = [bodies[post.key] for post in sink.posts[asked:] if post.status == 200]
        assert after == sorted(after)  # the survivor keeps the order of the conversation
    finally:
        await one.leave()
        await two.leave()


async def test_with_commit_a_message_is_taken_only_once_its_event_is_written(fresh, sink):
    scene: Scene = fresh(modules=with_post_log(sink), outbox={"durability": "commit"})
    romeo, juliet = await scene.raw_login("romeo"), await scene.raw_login("juliet")
    sink.hold = asyncio.Event()

    romeo.send_raw(chat("hello"))

    assert (await juliet.next_message()).body == "hello"
    assert status(scene)[2] == "1"  # written before juliet had it
    sink.hold.set()
    await sink.wait(1)
