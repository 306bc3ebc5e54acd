"""The process that makes the outbox's requests: whatever becomes of it, nothing is lost and nothing is left behind."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.harness.server import ROOT
from tests.harness.sink import WebSink
from xmppd.outbox import Event, Form, HttpSink, HttpTarget, Outbox, Retry, Settings, process, writing
from xmppd.storage import Storage, new_id

SETTINGS = Settings(retry=Retry(base=0.05, max=0.2))
SECRET = "a secret that nobody else should see"


@pytest.fixture
async def sink() -> AsyncIterator[WebSink]:
    async with WebSink() as sink:
        yield sink


@pytest.fixture
async def storage(tmp_path: Path) -> AsyncIterator[Storage]:
    storage = Storage("sqlite:///{data_dir}/xmppd.db", data_dir=tmp_path)
    await storage.open()
    yield storage
    await storage.close()


@pytest.fixture
async def outbox(storage: Storage, sink: WebSink) -> AsyncIterator[Outbox]:
    outbox = await started(storage, sink)
    yield outbox
    await outbox.stop()


FORM = Form((("Content-Type", "text/xml"),), "X-At", "X-From", "X-To")


async def started(storage: Storage, web: WebSink, node: bytes = b"A", **target: Any) -> Outbox:
    """With a sink whose first look into the database is over."""
    outbox = Outbox(storage, node * 16, 1, settings=SETTINGS)
    await outbox.add_sink("log", HttpSink(HttpTarget(web.url, secrets=(SECRET,), **target), connections=8))
    await outbox.start()
    await until(lambda: not outbox.runners["log"].more)
    return outbox


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def event(text: str, conversation: str = "") -> Event:
    return Event(new_id(), "log", "im.example", "m", conversation.encode().ljust(32), text.encode(), time.time())


def lives(pid: int) -> bool:
    """As a process, not as a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def post_one(outbox: Outbox, sink: WebSink, text: str) -> int:
    """Who has made the request."""
    outbox.submit(event(text))
    await sink.until(lambda: any(post.body == text.encode() for post in sink.taken))
    pid = outbox.sender.pid
    assert pid is not None
    return pid


async def test_a_sender_that_is_killed_under_load_loses_nothing_and_overtakes_nobody(outbox, sink):
    killed = []
    for number in range(600):
        outbox.submit(event(f"{number:03}", f"c{number % 10}"))
        if number in (200, 400):
            await sink.until(lambda number=number: len(sink.taken) > number - 150)
            pid = outbox.sender.pid
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
        if number % 20 == 0:
            await asyncio.sleep(0.005)

    await sink.until(lambda: len({post.key for post in sink.taken}) == 600)

    await until(lambda: outbox.runners["log"].line.events == 0)
    assert len(set(killed)) == 2
    assert outbox.sender.restarts == 2
    bodies = dict.fromkeys(post.body.decode() for post in sink.taken)  # in the order of their first arrivals
    assert len(bodies) == 600
    for conversation in range(10):
        own = [body for body in bodies if int(body) % 10 == conversation]
        assert own == sorted(own)
    keys: dict[bytes, set[str]] = {}
    for post in sink.posts:
        keys.setdefault(post.body, set()).add(post.key)
    assert all(len(each) == 1 for each in keys.values())
    assert outbox.runners["log"].failed == 0  # it was not the sink's fault


async def rows(outbox: Outbox) -> int:
    return len(await outbox.listed("log", "pending", 10))


async def until_rows(outbox: Outbox, count: int) -> None:
    async with asyncio.timeout(60):
        while await rows(outbox) != count:  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_what_the_web_server_does_not_take_soon_has_a_row_until_it_does(outbox, sink):
    sink.hold = asyncio.Event()
    outbox.submit(event("slow"))
    await until_rows(outbox, 1)
    sink.hold.set()
    await sink.until(lambda: len(sink.taken) == 1)
    await until_rows(outbox, 0)


async def test_what_comes_back_has_a_row_at_once(outbox, sink, monkeypatch):
    monkeypatch.setattr(writing, "_SOON", 60.0)
    monkeypatch.setattr(writing, "_LATE", 60.0)
    sink.answer = 500
    outbox.submit(event("refused"))
    await until_rows(outbox, 1)
    sink.answer = 200
    await sink.until(lambda: len(sink.taken) == 1)
    await until_rows(outbox, 0)


async def test_a_sender_that_hangs_is_replaced(storage, sink, monkeypatch):
    monkeypatch.setattr(process, "_SILENCE", 0.3)
    outbox = await started(storage, sink, timeout=1.0)
    try:
        pid = await post_one(outbox, sink, "before")
        os.kill(pid, signal.SIGSTOP)

        assert await post_one(outbox, sink, "after") != pid

        assert not lives(pid)
    finally:
        await outbox.stop()


async def test_a_terminal_does_not_end_it_and_nobody_can_read_the_secrets(outbox, sink):
    pid = await post_one(outbox, sink, "before")
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        os.kill(pid, number)

    assert await post_one(outbox, sink, "after") == pid

    for name in ("cmdline", "environ"):
        assert SECRET.encode() not in Path(f"/proc/{pid}/{name}").read_bytes()  # noqa: ASYNC240


async def test_it_ends_in_order_also_while_a_request_is_under_way(outbox, sink, storage):
    pid = await post_one(outbox, sink, "done")
    sink.hold = asyncio.Event()
    outbox.submit(event("held"))
    await until(lambda: sink.waiting)

    await outbox.remove_sink("log")

    assert not lives(pid)
    assert outbox.sender.pid is None
    sink.hold.set()
    assert [listed.sink for listed in await outbox.listed("log", "pending", 10)] == ["log"]  # it waits for the next one
    await outbox.add_sink("log", HttpSink(HttpTarget(sink.url), connections=8))
    await sink.until(lambda: sink.taken[-1].body == b"held")


NODE = """
import asyncio, sys
from xmppd.outbox.process import Sender
from xmppd.sender.target import HttpTarget

async def main():
    sender = Sender()
    number = await sender.open(HttpTarget(sys.argv[1]), 8)
    for n in range(20):
        sender.send(number, [(None, (bytes(16), (), b"%d" % n))], lambda token, answer: None)
    while not sender.pid:
        await asyncio.sleep(0.01)
    print(sender.pid, flush=True)
    await asyncio.sleep(3600)

asyncio.run(main())
"""


async def test_it_ends_with_a_node_that_is_killed_and_has_made_what_it_was_given(sink):
    sink.hold = asyncio.Event()
    path = {"PYTHONPATH": str(ROOT)}
    node = await asyncio.create_subprocess_exec(sys.executable, "-c", NODE, sink.url, stdout=subprocess.PIPE, env=path)
    assert node.stdout is not None
    pid = int(await node.stdout.readline())
    await until(lambda: sink.waiting == 8)
    node.kill()
    await node.wait()
    sink.hold.set()

    await until(lambda: not lives(pid))

    assert sorted(int(post.body) for post in sink.posts) == list(range(20))


async def test_what_arrives_at_once_is_never_written(outbox, sink, storage, monkeypatch):
    monkeypatch.setattr(writing, "_SOON", 60.0)
    await post_one(outbox, sink, "warm")
    before = storage.batcher.batch_rows.sum

    for number in range(100):
        outbox.submit(event(f"n{number}", f"c{number % 10}"))
        await asyncio.sleep(0)
    await sink.wait(101)

    await until(lambda: outbox.runners["log"].line.events == 0)
    assert storage.batcher.batch_rows.sum == before
    assert await outbox.listed("log", "pending", 10) == []


async def test_what_does_not_arrive_in_a_moment_is_written_and_outlives_the_node(outbox, sink, storage):
    await post_one(outbox, sink, "warm")
    sink.answer = 503
    outbox.submit(event("later"))

    waiting: list[object] = []
    while not waiting:
        waiting = [*await outbox.listed("log", "pending", 10)]

    await outbox.stop()
    sink.answer = 200
    other = Outbox(storage, b"B" * 16, 1, settings=SETTINGS)
    await other.add_sink("log", HttpSink(HttpTarget(sink.url), connections=8))
    await other.start()
    await sink.until(lambda: sink.taken[-1].body == b"later")
    await other.stop()


def raw_event(xml: str) -> Event:
    raw = (xml.encode(), "juliet@im.example", "romeo@im.example/orchard", 0.5)
    return Event(new_id(), "log", "im.example", "m", b"c" * 32, b"", time.time(), raw=raw, form=FORM)


async def test_what_a_request_says_is_made_there_and_comes_out_of_the_database_the_same(storage, sink):
    outbox = await started(storage, sink, form=FORM)
    xml = "<message to='juliet@im.example' id='1'><body>O</body></message>"
    outbox.submit(raw_event(xml))
    await sink.until(lambda: sink.taken)
    sink.answer = 503
    outbox.submit(raw_event(xml))
    await until_rows(outbox, 1)
    await outbox.stop()

    sink.answer = 200
    again = await started(storage, sink, b"B", form=FORM)
    await sink.until(lambda: len(sink.taken) == 2)
    await again.stop()

    said = [(post.body, *(post[name] for name in ("X-At", "X-From", "X-To"))) for post in sink.taken]
    assert said[0] == said[1]
    assert said[0][0].startswith(
        b"<message xml:lang='en' to='juliet@im.example' from='romeo@im.example/orchard' id='1'"
    )


async def test_what_cannot_be_made_there_is_dead_and_stops_nobody(storage, sink):
    outbox = await started(storage, sink, form=FORM)
    outbox.submit(raw_event("<message"))
    outbox.submit(raw_event("<message><body>O</body></message>"))
    await sink.until(lambda: sink.taken)

    assert outbox.runners["log"].dead == 1
    await outbox.stop()
