"""The outbox over both databases, with a real web server at the other end."""

import asyncio
import sqlite3
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import closing

import pytest
from sqlalchemy import insert, select, update

from tests.harness.sink import Post, WebSink
from xmppd.outbox import Event, HttpSink, HttpTarget, Outbox, Retry, Settings
from xmppd.spool import Kept, QuotaReached, Spool
from xmppd.storage import Storage, db_now, new_id
from xmppd.storage.tables import node as node_table
from xmppd.storage.tables import outbox as table

QUICK = Settings(retry=Retry(base=0.01, factor=1.5, jitter="none"), open_after=100, probe_every=0.02)
Make = Callable[..., Awaitable[Outbox]]


@pytest.fixture
async def sink() -> AsyncIterator[WebSink]:
    async with WebSink() as sink:
        yield sink


@pytest.fixture
async def make(database: str, storage: Storage, make_storage: Callable[..., Storage]) -> AsyncIterator[Make]:
    """`await make(name)`: the outbox of a node, with a storage of its own; `living` has a lease in the database."""
    made: list[Outbox] = []

    async def one(name: str = "A", *, settings: Settings = QUICK, incarnation: int = 1, **options) -> Outbox:
        own = storage
        if made:
            own = make_storage(database)
            await own.open()
        await lease(storage, name, incarnation, 1000.0)
        made.append(Outbox(own, name.encode() * 16, incarnation, name=name, settings=settings, **options))
        return made[-1]

    yield one
    for outbox in made:
        await outbox.stop()


async def lease(storage: Storage, name: str, incarnation: int, seconds: float) -> None:
    """The node lives so long, by the database's clock."""
    values = {"name": name, "address": "", "state": "member", "version": "1", "hosts_hash": b"h" * 32}
    async with storage.connect() as connection:
        until = {"incarnation": incarnation, "lease_until": db_now() + seconds}
        done = await connection.execute(
            update(node_table).where(node_table.c.node_id == name.encode() * 16).values(**until)
        )
        if done.rowcount == 0:
            await connection.execute(insert(node_table).values(node_id=name.encode() * 16, **values, **until))


def event(text: str, *, partition: str = "romeo juliet", sink: str = "log", **options) -> Event:
    return Event(
        new_id(), sink, "im.example", "message", partition.encode().ljust(32), text.encode(), time.time(), **options
    )


async def open_sink(outbox: Outbox, web: WebSink, name: str = "log", *, batched: bool = False, **target) -> None:
    target = HttpTarget(web.url, batched=batched, **target)
    await outbox.add_sink(name, HttpSink(target, connections=8), batched=batched)


async def started(outbox: Outbox, web: WebSink, **options) -> Outbox:
    await open_sink(outbox, web, **options)
    await outbox.start()
    return outbox


async def rows(storage: Storage) -> list[tuple[str, str]]:
    """State and payload."""
    async with storage.connect() as connection:
        found = await connection.execute(select(table.c.state, table.c.payload).order_by(table.c.id))
        return [(row.state, row.payload.decode()) for row in found]


async def until_rows(storage: Storage, wanted: int | list[tuple[str, str]]) -> None:
    """So many rows, or exactly these."""
    deadline = time.monotonic() + 30
    while (found := await rows(storage)) != wanted and len(found) != wanted:
        assert time.monotonic() < deadline, found
        await asyncio.sleep(0.01)


def bodies(posts: list[Post]) -> list[str]:
    return [post.body.decode() for post in posts]


async def test_an_event_is_posted_and_its_row_goes(storage, make, sink):
    outbox = await started(await make(), sink)
    one = event("hello", headers=(("Content-Type", "text/plain"), ("X-Who", "jülich")))

    await outbox.submit(one)

    (post,) = await sink.wait(1)
    assert (post.body, post.key, post["x-who"]) == (b"hello", one.ulid, "jülich")
    assert [name for name, _ in post.headers if name in ("User-Agent", "Accept")] == []
    await until_rows(storage, 0)


async def test_a_conversation_stays_in_order_and_others_do_not_wait_for_it(make, sink):
    """PL-02: the sink refuses five times; the waits grow and nothing is overtaken."""
    refused: list[float] = []

    def answer(body: bytes) -> int:
        if body == b"r0" and len(refused) < 5:
            refused.append(time.monotonic())
            return 500
        return 200

    sink.answer = answer
    settings = Settings(retry=Retry(base=0.02, factor=2, jitter="none"), open_after=100)
    outbox = await started(await make(settings=settings), sink)

    for number in range(5):
        outbox.submit(event(f"r{number}"))
        outbox.submit(event(f"b{number}", partition="benvolio"))

    taken = bodies(await sink.wait(10))
    assert [body for body in taken if body[0] == "r"] == [f"r{n}" for n in range(5)]
    assert taken[:5] == [f"b{n}" for n in range(5)]  # all of them before the first of the others
    attempts = [post for post in sink.posts if post.body == b"r0"]
    assert [post.status for post in attempts] == [500] * 5 + [200]
    assert len({post.key for post in attempts}) == 1
    waits = [after - before for before, after in zip(refused, [*refused[1:], attempts[-1].at], strict=True)]
    assert all(wait >= 0.02 * 2**n for n, wait in enumerate(waits)), waits


async def test_retry_after_is_honoured(make, sink):
    sink.answer, sink.headers = 429, {"Retry-After": "1"}
    outbox = await started(await make(), sink)

    outbox.submit(event("hello"))
    await sink.until(lambda: sink.posts)
    sink.answer = 200

    await sink.wait(1)
    assert sink.posts[1].at - sink.posts[0].at >= 0.99


async def test_what_is_refused_is_dead_and_an_operator_revives_it(storage, make, sink):
    sink.answer = 422
    outbox = await started(await make(), sink)

    outbox.submit(event("bad"))
    await sink.until(lambda: sink.posts)
    await until_rows(storage, [("dead", "bad")])
    (listed,) = await outbox.listed("log", "dead", 10)
    assert (listed.error, listed.host, listed.kind) == ("HTTP 422", "im.example", "message")
    assert [status.dead for status in await outbox.status()] == [1]

    sink.answer = 200
    assert await outbox.retry("log") == 1

    assert bodies(await sink.wait(1)) == ["bad"]
    await until_rows(storage, 0)


async def test_redirects_are_not_followed(storage, make, sink):
    sink.answer, sink.headers = 302, {"Location": sink.url + "/elsewhere"}
    outbox = await started(await make(), sink)

    outbox.submit(event("hello"))

    await until_rows(storage, [("dead", "hello")])
    assert [post.path for post in sink.posts] == ["/messages"]


async def test_an_event_and_its_message_are_written_together_or_not_at_all(storage, make, sink):
    outbox, spool = await make(), Spool(storage)
    stored = spool.keep_item("im.example", "juliet", "romeo@im.example", b"<message/>", dedup=None, quota=1)
    refused = spool.keep_item("im.example", "juliet", "romeo@im.example", b"<message/>", dedup=None, quota=1)

    first = storage.batcher.submit_unit([stored, outbox.row(event("stored"))])
    second = storage.batcher.submit_unit([refused, outbox.row(event("refused"))])

    assert (await first)[0] is Kept.STORED
    with pytest.raises(QuotaReached):
        await second
    assert await rows(storage) == [("pending", "stored")]
    await started(outbox, sink)
    assert bodies(await sink.wait(1)) == ["stored"]
    await storage.batcher.submit_unit([outbox.row(event("now"))])
    assert bodies(await sink.wait(2)) == ["stored", "now"]


async def test_a_repetition_is_dropped_within_a_day(storage, make, sink):
    outbox = await started(await make(), sink)
    key = b"d" * 32

    for text in ("one", "two", "three"):
        await outbox.submit(event(text, dedup=key))
    await outbox.submit(event("other", dedup=b"e" * 32))
    await sink.wait(2)
    async with storage.connect() as connection:
        await connection.execute(update(table).values(created_at=time.time() - 86500))
    await outbox.submit(event("a day later", dedup=key))

    assert bodies(await sink.wait(3)) == ["one", "other", "a day later"]
    assert outbox.runners["log"].duplicates == 2


async def test_a_dead_node_is_replaced_by_one_of_the_others(storage, make, sink):
    """PL-04: what the dead one had queued is posted by a survivor, in order."""
    sink.answer = 503
    dying = await started(await make("A"), sink)
    for number in range(50):
        await dying.submit(event(f"{number:02}"))
    await dying.stop()  # as far as the database knows it lives on: its lease does
    sink.posts.clear()
    sink.answer = 200
    others = [await started(await make(name), sink) for name in ("B", "C")]
    await asyncio.gather(*(other._look() for other in others))
    assert sink.taken == []

    await lease(storage, "A", 1, -1.0)

    posts = await sink.wait(50)
    assert bodies(posts) == [f"{number:02}" for number in range(50)]
    await until_rows(storage, 0)


async def test_the_next_run_of_a_node_goes_on_at_once(storage, make, sink):
    sink.answer = 503
    first = await started(await make("A"), sink)
    await first.submit(event("left over"))
    await sink.until(lambda: sink.posts)
    await first.stop()
    sink.answer = 200

    await started(await make("A", incarnation=2), sink)

    assert bodies(await sink.wait(1)) == ["left over"]
    assert len({post.key for post in sink.posts}) == 1


async def test_memory_is_bounded_while_the_sink_is_down_and_all_arrive_in_order(storage, make, sink):
    """PL-03: what does not fit waits in the database, and nothing is lost or overtaken."""
    settings = Settings(retry=QUICK.retry, open_after=3, probe_every=0.2, max_events=20)
    sink.answer = 503
    outbox = await started(await make(settings=settings), sink)
    runner = outbox.runners["log"]
    await asyncio.sleep(0)
    for number in range(300):
        future = outbox.submit(event(f"{number:03}", partition=f"p{number % 7}"))
        if number % 50 == 0 and future is not None:
            await future
        assert runner.held <= 20
    await until_rows(storage, 300)
    await sink.until(lambda: runner.breaker.is_open)
    asked = len(sink.posts)
    await asyncio.sleep(0.3)
    assert len(sink.posts) - asked <= 3  # a probe now and then

    sink.answer = 200

    await sink.wait(300)
    seen = defaultdict(list)
    for body in bodies(sink.taken):
        seen[int(body) % 7].append(body)
        assert runner.held <= 20
    assert all(texts == sorted(texts) for texts in seen.values())
    assert sum(map(len, seen.values())) == 300
    await until_rows(storage, 0)


async def test_a_full_memory_drops_where_it_was_told_to(storage, make, sink):
    sink.answer = 503
    settings = Settings(retry=QUICK.retry, per_sink=1, open_after=1, probe_every=30, max_events=3)
    outbox = await started(await make(settings=settings, durability="none", when_full="drop_new"), sink)

    for number in range(5):
        outbox.submit(event(str(number), partition=str(number)))

    runner = outbox.runners["log"]
    assert (runner.held, runner.dropped) == (3, 2)
    assert await rows(storage) == []


async def test_batches_are_lines_and_one_bad_event_does_not_kill_the_others(storage, make, sink):
    sink.answer = lambda body: 400 if b"bad" in body else 200
    outbox = await started(await make(), sink, batched=True)

    for number in range(20):
        outbox.submit(event("bad" if number == 7 else f"n{number}", partition=f"p{number % 3}"))

    await sink.until(lambda: sum(body.count("\n") for body in bodies(sink.taken)) == 19)
    lines = [line for body in bodies(sink.taken) for line in body.splitlines()]
    assert sorted(lines) == sorted(f"n{n}" for n in range(20) if n != 7)
    for third in range(3):
        own = [int(line[1:]) for line in lines if int(line[1:]) % 3 == third]
        assert own == sorted(own)
    await until_rows(storage, [("dead", "bad")])


async def test_a_paused_sink_keeps_its_events_on_every_node(storage, make, sink):
    outbox = await started(await make("A"), sink)
    other = await started(await make("B"), sink)

    await other.pause("log", True)
    await outbox._look()
    outbox.submit(event("hello"))
    await asyncio.sleep(0.1)
    assert sink.posts == []
    assert [status.state for status in await outbox.status()] == ["paused"]

    await outbox.pause("log", False)

    assert bodies(await sink.wait(1)) == ["hello"]


async def test_an_unloaded_sink_leaves_its_events_for_the_next_one(storage, make, sink):
    sink.answer = 503
    outbox = await started(await make(), sink)
    await outbox.submit(event("one"))
    await sink.until(lambda: sink.posts)

    await outbox.remove_sink("log")
    await outbox.submit(event("two"))
    sink.answer = 200
    await open_sink(outbox, sink)

    assert bodies(await sink.wait(2)) == ["one", "two"]


async def test_what_waits_for_a_commit_is_not_overtaken_by_what_does_not(storage, make, sink):
    outbox = await started(await make(), sink)
    outbox.submit(event("warm"))
    await sink.wait(1)
    while outbox.runners["log"].more:  # noqa: ASYNC110
        await asyncio.sleep(0.01)

    written = storage.batcher.submit_unit([outbox.row(event("one"))])
    outbox.submit(event("two"))
    outbox.submit(event("another", partition="others"))

    posts = bodies(await sink.wait(4))
    assert posts.index("one") < posts.index("two")
    assert written.done()


async def test_purged_events_are_gone(storage, make, sink):
    outbox = await make()
    await outbox.submit(event("one"))
    await outbox.submit(event("two", sink="other"))

    assert await outbox.purge("log", "pending") == 1

    assert await rows(storage) == [("pending", "two")]


async def test_what_the_database_does_not_take_is_sent_from_memory(storage, make, sink):
    outbox = await started(await make(), sink)
    await outbox.submit(event("one"))
    await sink.wait(1)
    await storage.batcher.close()

    assert outbox.submit(event("two")) is None

    assert bodies(await sink.wait(2)) == ["one", "two"]


async def test_a_database_that_is_away_delays_no_event_for_long(databases, tmp_path, sink, make_storage):
    url = await databases.migrated("sqlite", tmp_path)
    storage = make_storage(url, pool_timeout=0.1)
    await storage.open()
    outbox = await started(Outbox(storage, b"A" * 16, 1, settings=QUICK), sink)
    try:
        await outbox.submit(event("before"))
        await sink.wait(1)
        await until_rows(storage, 0)
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")  # for as long as this test wants
            first = outbox.submit(event("first", dedup=b"d" * 32))  # it has to be compared with what is there
            deadline = time.monotonic() + 30
            while not storage.batcher.away:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.01)

            assert outbox.submit(event("meanwhile", partition="others")) is None

            assert bodies(await sink.wait(2)) == ["before", "meanwhile"]
        await first
        assert bodies(await sink.wait(3))[2] == "first"
        await until_rows(storage, [("done", "")])
    finally:
        await outbox.stop()


async def test_events_of_a_sink_that_nobody_serves_any_more_can_be_purged(storage, make):
    await (await make("A")).submit(event("left"))
    other = await make("B")
    assert await other.purge("log", "pending") == 0  # its node lives

    await lease(storage, "A", 1, -1.0)

    assert await other.purge("log", "pending") == 1
