"""Group commit, on both databases."""

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import Column, Integer, event, func, insert, select

from xmppd.errors import StorageError, StorageUnavailable
from xmppd.spool import Spool
from xmppd.storage import Batcher, Duplicate, Storage, Utf8, insert_new, module_table, upsert

NUMBERS = module_table(
    "numbers", Column("number", Integer, primary_key=True, autoincrement=False), Column("word", Utf8(1000))
)


async def write_numbers(connection, numbers):
    await connection.execute(
        insert_new(NUMBERS, connection.dialect), [{"number": number, "word": "x"} for number in numbers]
    )
    return [number * 10 for number in numbers]


async def write_odd(connection, items):
    """Even ones are refused."""
    await write_numbers(connection, [item for item in items if item % 2])
    return [item if item % 2 else ValueError(f"{item} is even") for item in items]


@pytest.fixture
async def numbers(storage: Storage) -> Storage:
    await storage.ensure_tables([NUMBERS])
    storage.batcher.define("number", write_numbers)
    return storage


async def stored(storage: Storage) -> list[int]:
    async with storage.connect() as connection:
        return list((await connection.execute(select(NUMBERS.c.number).order_by(NUMBERS.c.number))).scalars())


class Commits:
    """Counts what the server is asked to do."""

    def __init__(self, storage: Storage) -> None:
        self.count = 0
        event.listen(storage._engine.sync_engine, "before_cursor_execute", self._see)

    def _see(self, connection, cursor, statement, *_) -> None:
        self.count += statement == "COMMIT"


async def test_a_thousand_rows_of_one_moment_are_one_commit(numbers):
    commits = Commits(numbers)

    results = await asyncio.gather(*(numbers.batcher.submit("number", number) for number in range(1000)))

    assert results == [number * 10 for number in range(1000)]
    assert commits.count == 1
    assert await stored(numbers) == list(range(1000))


async def test_rows_submitted_one_after_the_other_share_commits_too(database, make_storage):
    storage = make_storage(database, commit_interval=0.05)
    await storage.open()
    await storage.ensure_tables([NUMBERS])
    storage.batcher.define("number", write_numbers)
    commits = Commits(storage)
    loop = asyncio.get_running_loop()
    started = loop.time()

    futures = []
    for number in range(300):
        futures.append(storage.batcher.submit("number", number))
        await asyncio.sleep(0.001)
    await asyncio.gather(*futures)

    assert commits.count <= 2 + (loop.time() - started) / 0.05


async def test_commits_and_their_rows_are_counted_once_each(numbers):
    seen = []
    tries = 0

    async def write(connection, items):
        nonlocal tries
        tries += 1
        if tries == 1:
            raise StorageUnavailable("away for a moment")
        return [ValueError("refused") if item == 2 else item * 10 for item in items]

    numbers.batcher.define("counted", write, committed=lambda item, result: seen.append((item, type(result))))
    futures = [numbers.batcher.submit("counted", item) for item in (1, 2, 3)]
    assert not numbers.batcher.was_away(60)

    results = await asyncio.gather(*futures, return_exceptions=True)

    assert tries == 2
    assert results[0::2] == [10, 30]
    assert seen == [(1, int), (2, ValueError), (3, int)]
    assert sum(numbers.batcher.batch_rows.counts) == sum(numbers.batcher.commit_seconds.counts) == 1
    assert numbers.batcher.batch_rows.sum == 3
    assert (numbers.batcher.away, numbers.batcher.was_away(60), numbers.batcher.was_away(0)) == (False, True, False)
    assert (numbers.batcher.rows_waiting, numbers.batcher.bytes_waiting, numbers.batcher.rows_failed) == (0, 0, 0)


async def test_a_future_is_resolved_when_another_connection_can_see_the_row(numbers):
    for number in range(20):
        future = numbers.batcher.submit("number", number)

        assert await future == number * 10

        assert await stored(numbers) == list(range(number + 1))


async def test_items_of_a_kind_are_written_in_the_order_of_submit(numbers):
    written = []

    async def write(connection, items):
        written.extend(items)
        return items

    numbers.batcher.define("ordered", write)
    futures = []
    for item in range(3000):
        futures.append(numbers.batcher.submit("ordered", item))
        if item % 100 == 0:
            await asyncio.sleep(0)
    await asyncio.gather(*futures)

    assert written == list(range(3000))


async def test_an_item_that_is_refused_fails_alone(numbers):
    numbers.batcher.define("odd", write_odd)

    results = await asyncio.gather(
        *(numbers.batcher.submit("odd", number) for number in range(6)), return_exceptions=True
    )

    assert [result if isinstance(result, int) else str(result) for result in results] == [
        "0 is even",
        1,
        "2 is even",
        3,
        "4 is even",
        5,
    ]
    assert await stored(numbers) == [1, 3, 5]


async def test_a_row_the_database_refuses_fails_alone(numbers):
    async def write_plainly(connection, items):
        await connection.execute(insert(NUMBERS), [{"number": number, "word": word} for number, word in items])
        return items

    numbers.batcher.define("plain", write_plainly)
    await numbers.batcher.submit("number", 5)

    results = await asyncio.gather(
        *(numbers.batcher.submit("plain", (number, "w" * (2000 if number == 7 else 5))) for number in range(10)),
        return_exceptions=True,
    )

    assert isinstance(results[5], Duplicate)
    assert isinstance(results[7], StorageError)
    assert not isinstance(results[7], StorageUnavailable)
    assert await stored(numbers) == [0, 1, 2, 3, 4, 5, 6, 8, 9]


async def test_a_write_function_with_a_bug_fails_its_own_items_and_nobody_hangs(numbers, caplog):
    async def broken(connection, items):
        if "bad" in items:
            raise KeyError("oops")
        return items

    async def forgetful(connection, items):
        return []

    numbers.batcher.define("broken", broken)
    numbers.batcher.define("forgetful", forgetful)

    results = await asyncio.gather(
        numbers.batcher.submit("broken", "good"),
        numbers.batcher.submit("broken", "bad"),
        numbers.batcher.submit("number", 1),
        numbers.batcher.submit("forgetful", 1),
        return_exceptions=True,
    )

    assert results[0] == "good"
    assert isinstance(results[1], StorageError)
    assert results[2] == 10
    assert isinstance(results[3], StorageError)
    assert "write failed kinds=broken" in caplog.text


async def test_a_unit_is_committed_whole_or_left_out_whole(numbers):
    async def refuse_seven(connection, items):
        return [ValueError("seven") if item == 7 else item for item in items]

    numbers.batcher.define("judge", refuse_seven)

    results = await asyncio.gather(
        *(
            numbers.batcher.submit_unit([("number", item), ("judge", item), ("number", item + 100)])
            for item in range(10)
        ),
        return_exceptions=True,
    )

    assert isinstance(results[7], ValueError)
    assert results[6] == [60, 6, 1060]
    assert await stored(numbers) == [*range(7), 8, 9, *range(100, 107), 108, 109]


async def test_a_unit_whose_database_error_comes_late_leaves_nothing(numbers):
    async def write_plainly(connection, items):
        await connection.execute(insert(NUMBERS), [{"number": number, "word": ""} for number in items])
        return items

    numbers.batcher.define("plain", write_plainly)
    await numbers.batcher.submit("number", 50)

    results = await asyncio.gather(
        numbers.batcher.submit_unit([("number", 1), ("plain", 50)]),
        numbers.batcher.submit_unit([("number", 2), ("plain", 51)]),
        return_exceptions=True,
    )

    assert isinstance(results[0], Duplicate)
    assert results[1] == [20, 51]
    assert await stored(numbers) == [2, 50, 51]


async def test_of_items_submitted_together_each_has_its_own_result(numbers):
    numbers.batcher.define("odd", write_odd)

    results = await numbers.batcher.submit_all("odd", [1, 2, 3, 4])

    assert [result if isinstance(result, int) else str(result) for result in results] == [
        1,
        "2 is even",
        3,
        "4 is even",
    ]
    assert await stored(numbers) == [1, 3]
    assert (numbers.batcher.rows_waiting, numbers.batcher.bytes_waiting) == (0, 0)


async def test_of_items_submitted_together_one_that_cannot_be_written_fails_alone(numbers):
    async def write_plainly(connection, items):
        await connection.execute(insert(NUMBERS), [{"number": number, "word": word} for number, word in items])
        return [number for number, word in items]

    numbers.batcher.define("plain", write_plainly)
    await numbers.batcher.submit("number", 5)

    lot = numbers.batcher.submit_all("plain", [(number, "w" * (2000 if number == 7 else 5)) for number in range(10)])
    behind = numbers.batcher.submit("plain", (10, "w"))
    results = await lot

    assert isinstance(results[5], Duplicate)
    assert isinstance(results[7], StorageError)
    assert not isinstance(results[7], StorageUnavailable)
    assert [result for result in results if not isinstance(result, Exception)] == [0, 1, 2, 3, 4, 6, 8, 9]
    assert await behind == 10
    assert await stored(numbers) == [0, 1, 2, 3, 4, 5, 6, 8, 9, 10]
    assert (numbers.batcher.rows_waiting, numbers.batcher.bytes_waiting) == (0, 0)


async def test_items_submitted_together_fail_together_when_the_database_stays_away():
    async def run(work, *, repeatable=False):
        raise StorageUnavailable("away")

    batcher = Batcher(run, interval=0.0, deadline=0.2)
    batcher.define("number", write_numbers)

    results = await batcher.submit_all("number", [1, 2, 3])

    assert [type(result) for result in results] == [StorageUnavailable] * 3
    assert (batcher.rows_waiting, batcher.bytes_waiting, batcher.rows_failed) == (0, 0, 3)


async def test_items_submitted_together_are_answered_when_closing_is_cut_short():
    tried = asyncio.Event()

    async def run(work, *, repeatable=False):
        if tried.is_set():
            await asyncio.Event().wait()
        tried.set()
        raise ValueError("one of them cannot be written")

    batcher = Batcher(run, interval=0.0)
    batcher.define("number", write_numbers)
    lot = batcher.submit_all("number", [1, 2, 3])
    await tried.wait()
    closing = asyncio.create_task(batcher.close())
    await asyncio.sleep(0)

    closing.cancel()

    results = await lot
    assert [type(result) for result in results] == [StorageUnavailable] * 3


async def test_a_full_queue_refuses_and_takes_again_when_it_has_emptied(numbers):
    batcher = Batcher(numbers.run, interval=0.01, queue_rows=10, queue_size=1000)
    batcher.define("number", write_numbers, size=lambda number: 300 if number >= 100 else 1)
    first = [batcher.submit("number", number) for number in range(10)]

    with pytest.raises(StorageUnavailable, match="10 rows"):
        batcher.submit("number", 11)
    await asyncio.gather(*first)
    assert batcher.rows_waiting == 0

    heavy = [batcher.submit("number", number) for number in (100, 101, 102)]
    with pytest.raises(StorageUnavailable, match="900 bytes"):
        batcher.submit("number", 103)
    await asyncio.gather(*heavy)
    assert await batcher.submit("number", 103) == 1030


async def test_a_transaction_is_bounded_in_rows_and_bytes(numbers):
    sizes = []

    async def write(connection, items):
        sizes.append(len(items))
        return items

    batcher = Batcher(numbers.run, interval=0.0, rows=10, size=1000)
    batcher.define("row", write, size=lambda item: item)
    await asyncio.gather(*(batcher.submit("row", 1) for _ in range(25)))
    assert sizes == [10, 10, 5]

    sizes.clear()
    await asyncio.gather(*(batcher.submit("row", 400) for _ in range(5)), batcher.submit("row", 5000))
    assert sizes == [2, 2, 1, 1]


async def test_after_a_reload_queued_items_are_written_by_the_old_function(numbers):
    by = []

    def writer(name):
        async def write(connection, items):
            by.extend((name, item) for item in items)
            return items

        return write

    numbers.batcher.define("module", writer("old"))
    first = numbers.batcher.submit("module", 1)
    numbers.batcher.define("module", writer("new"))
    second = numbers.batcher.submit("module", 2)
    numbers.batcher.undefine("module")
    await asyncio.gather(first, second)

    assert by == [("old", 1), ("new", 2)]
    with pytest.raises(StorageError, match="nobody writes module"):
        numbers.batcher.submit("module", 3)


async def test_cancelling_the_waiter_takes_nothing_back_and_harms_nobody(numbers):
    first, second = numbers.batcher.submit("number", 1), numbers.batcher.submit("number", 2)
    first.cancel()

    assert await second == 20
    assert await stored(numbers) == [1, 2]


async def test_closing_writes_what_is_queued_and_refuses_more(database, make_storage):
    storage = make_storage(database)
    await storage.open()
    await storage.ensure_tables([NUMBERS])
    storage.batcher.define("number", write_numbers)
    futures = [storage.batcher.submit("number", number) for number in range(2500)]

    await storage.close()

    assert all(future.done() and not future.exception() for future in futures)
    with pytest.raises(StorageUnavailable):
        storage.batcher.submit("number", 1)
    again = make_storage(database)
    await again.open()
    assert len(await stored(again)) == 2500


VICTIM = """
import asyncio, sys
from pathlib import Path
from xmppd.spool import Spool
from xmppd.storage import Storage, new_id

async def main(url):
    storage = Storage(url, data_dir=Path("."))
    await storage.open()
    spool = Spool(storage)
    number = 0

    def tell(row_id, future):
        if not future.cancelled() and not future.exception():
            sys.stdout.write(f"ok {row_id.hex()}\\n")
            sys.stdout.flush()

    while True:
        for _ in range(50):
            row_id = new_id()
            future = spool.keep("example.net", "juliet", "r@x", b"x" * 200, dedup=None, quota=None, row_id=row_id)
            sys.stdout.write(f"queued {row_id.hex()}\\n")
            future.add_done_callback(lambda future, row_id=row_id: tell(row_id, future))
        sys.stdout.flush()
        await asyncio.sleep(0.0005)

asyncio.run(main(sys.argv[1]))
"""


async def test_a_killed_process_has_told_of_no_row_that_is_not_there(database, make_storage):
    """Killed between enqueue and commit: what was reported is in the database; what was not reported may be or not."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        VICTIM,
        database,
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        limit=1 << 24,
    )
    told = []
    while sum(line.startswith(b"ok") for line in told) < 500:
        told.append(await process.stdout.readline())
    process.kill()
    told += (await process.stdout.read()).split(b"\n")[:-1]
    await process.wait()

    whole = [line.split() for line in told if line.count(b" ") == 1 and len(line.split()[1]) == 32]
    queued = {bytes.fromhex(row_id.decode()) for word, row_id in whole if word == b"queued"}
    reported = {bytes.fromhex(row_id.decode()) for word, row_id in whole if word == b"ok"}
    storage = make_storage(database)
    await storage.open()
    there = await spool_ids(storage)
    assert len(reported) >= 500
    assert reported <= there
    assert queued - reported, "it was killed with nothing on its way, which proves nothing"


async def spool_ids(storage: Storage) -> set[bytes]:
    from xmppd.storage.tables import spool

    async with storage.connect() as connection:
        return set((await connection.execute(select(spool.c.id))).scalars())


async def test_while_a_transaction_runs_the_next_one_gathers(numbers, make_storage: Callable[..., Storage]):
    begun, gate = asyncio.Event(), asyncio.Event()
    batches = []

    async def slow(connection, items):
        batches.append(len(items))
        begun.set()
        await gate.wait()
        return items

    numbers.batcher.define("slow", slow)
    first = numbers.batcher.submit("slow", 0)
    await begun.wait()
    rest = []
    for item in range(20):
        rest.append(numbers.batcher.submit("slow", item))
        await asyncio.sleep(0.001)
    assert not first.done()
    gate.set()
    await asyncio.gather(first, *rest)

    assert batches == [1, 20]
    async with numbers.connect() as connection:
        assert (await connection.execute(select(func.count()).select_from(NUMBERS))).scalar_one() == 0


@pytest.mark.mariadb
async def test_the_rows_of_a_group_reach_the_server_in_one_statement(mariadb_server, mariadb_database, make_storage):
    storage = make_storage(mariadb_database)
    await storage.open()
    spool = Spool(storage)

    def inserts() -> int:
        return int(mariadb_server.query("SHOW GLOBAL STATUS LIKE 'Com_insert'")[0][1])

    before = inserts()
    await asyncio.gather(
        *(spool.keep("example.net", "juliet", "r@x", b"<message/>", dedup=None, quota=None) for _ in range(500))
    )

    assert inserts() - before == 1


async def test_insert_new_leaves_a_row_alone_and_upsert_overwrites_it(numbers):
    async def write(connection):
        await connection.execute(insert_new(NUMBERS, connection.dialect), {"number": 1, "word": "first"})
        await connection.execute(
            insert_new(NUMBERS, connection.dialect), [{"number": 1, "word": "late"}, {"number": 2, "word": "second"}]
        )
        await connection.execute(
            upsert(NUMBERS, connection.dialect), [{"number": 2, "word": "newer"}, {"number": 3, "word": "third"}]
        )
        return (await connection.execute(select(NUMBERS).order_by(NUMBERS.c.number))).all()

    assert await numbers.run(write) == [(1, "first"), (2, "newer"), (3, "third")]
