"""The spool, on both databases."""

import asyncio
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import event, func, select, update

from tests.storage.proxy_rules import problem
from xmppd.errors import StorageUnavailable
from xmppd.spool import FREE, Alone, Holder, Kept, NoAccount, NotToTell, QuotaReached, Spool
from xmppd.storage import Accounts, Storage, new_id, next_place
from xmppd.storage.members import Members, Registration
from xmppd.storage.tables import spool as spool_table

HOST = "example.net"
ROMEO = "romeo@montague.example"
BALCONY = Holder(b"A" * 16, 1, "juliet/balcony")
CHAMBER = Holder(b"B" * 16, 7, "juliet/chamber")


class Clock:
    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def spool(storage: Storage, clock: Clock) -> Spool:
    return Spool(storage, clock=clock)


@pytest.fixture
async def other_spool(database: str, storage: Storage, make_storage: Callable[..., Storage], clock: Clock) -> Spool:
    """The same spool seen by another node."""
    other = make_storage(database)
    await other.open()
    return Spool(other, clock=clock)


def keep(spool: Spool, stanza: bytes = b"<message/>", *, to: str = "juliet", dedup=None, quota=None, **options):
    return spool.keep(HOST, to, ROMEO, stanza, dedup=dedup, quota=quota, **options)


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


async def stanzas(spool: Spool, holder: Holder = BALCONY, **options) -> list[bytes]:
    return [row.stanza for row in await spool.take(HOST, "juliet", holder, **options)]


async def rows_in(storage: Storage) -> int:
    async with storage.connect() as connection:
        return (await connection.execute(select(func.count()).select_from(spool_table))).scalar_one()


async def test_rows_come_back_in_the_order_of_their_places_whenever_they_were_stored(spool):
    first, second, third = next_place(), next_place(), next_place()
    await keep(spool, b"<third/>", place=third)
    await keep(spool, b"<first/>", place=first)
    await keep(spool, b"<second/>", place=second, holder=CHAMBER)
    await keep(spool, b"<fourth/>")
    (held,) = await spool.take(HOST, "juliet", BALCONY, limit=1)
    assert held.stanza == b"<first/>"

    await spool.free_stale(CHAMBER.member, CHAMBER.incarnation + 1)

    assert await stanzas(spool) == [b"<second/>", b"<third/>", b"<fourth/>"]


async def test_offline_message_waits_and_comes_back_byte_by_byte(spool, clock):
    stanza = "<message xmlns='jabber:client'><body>O, speak again 😀 \\ '\" % \0</body></message>".encode() + bytes(
        range(256)
    )

    assert await keep(spool, stanza) is Kept.STORED

    assert await spool.count(HOST, "juliet") == 1
    (row,) = await spool.take(HOST, "juliet", BALCONY)
    assert (row.stanza, row.sender, row.created_at) == (stanza, ROMEO, clock.now)


async def test_a_large_stanza_fits(spool):
    stanza = b"<message>" + bytes(range(256)) * 4096 + b"</message>"

    await keep(spool, stanza)

    assert await stanzas(spool) == [stanza]


async def test_rows_come_in_the_order_of_keep_even_when_the_clock_goes_back(spool, clock):
    kept = []
    for number in range(300):
        clock.now -= 1
        kept.append(keep(spool, b"%d" % number))
    await asyncio.gather(*kept)

    assert await stanzas(spool) == [b"%d" % number for number in range(300)]


async def test_a_taken_row_is_out_of_sight_until_it_is_released(spool):
    await keep(spool)
    (row,) = await spool.take(HOST, "juliet", BALCONY)

    assert await spool.count(HOST, "juliet") == 0
    assert await spool.take(HOST, "juliet", CHAMBER) == []
    assert await spool.take(HOST, "juliet", BALCONY) == []

    await spool.release([row.id], BALCONY)

    assert await spool.count(HOST, "juliet") == 1
    assert await spool.take(HOST, "juliet", CHAMBER) == [row]


async def test_only_the_holder_can_release(spool):
    await keep(spool)
    (row,) = await spool.take(HOST, "juliet", BALCONY)

    later_life = Holder(BALCONY.member, BALCONY.incarnation + 1, BALCONY.session)
    for stranger in (CHAMBER, later_life, Holder(BALCONY.member, BALCONY.incarnation, "juliet/garden")):
        await spool.release([row.id], stranger)

    assert await spool.count(HOST, "juliet") == 0


async def test_take_gives_the_oldest_first_and_the_rest_the_next_time(spool):
    for number in range(5):
        await keep(spool, b"%d" % number)

    assert await stanzas(spool, limit=3) == [b"0", b"1", b"2"]
    assert await stanzas(spool, limit=3) == [b"3", b"4"]
    assert await stanzas(spool, limit=3) == []


async def test_take_leaves_alone_what_its_own_session_holds_already(spool):
    await keep(spool, b"live, waits for its acknowledgement", holder=BALCONY)
    await keep(spool, b"offline")

    assert await stanzas(spool, BALCONY) == [b"offline"]


async def test_take_touches_one_user_only(spool):
    await keep(spool, b"for juliet")
    await keep(spool, b"for the nurse", to="nurse")

    assert await stanzas(spool) == [b"for juliet"]
    assert await spool.count(HOST, "nurse") == 1


async def test_delete_removes_the_named_rows_whoever_holds_them(storage, spool):
    ids = [new_id() for _ in range(4)]
    await asyncio.gather(
        keep(spool, row_id=ids[0], holder=BALCONY),
        keep(spool, row_id=ids[1], holder=CHAMBER),
        keep(spool, row_id=ids[2]),
        keep(spool, row_id=ids[3]),
    )

    await spool.delete(ids[:3])

    assert await rows_in(storage) == 1
    await spool.delete(ids)
    assert await rows_in(storage) == 0


async def test_a_row_acknowledged_before_it_was_written_is_gone_afterwards(storage, spool):
    warm_up = spool.delete([new_id()])  # so that a delete stands in the queue ahead of the keep
    row_id = new_id()

    kept = keep(spool, row_id=row_id, holder=BALCONY)
    deleted = spool.delete([row_id])
    await asyncio.gather(warm_up, kept, deleted)

    assert await rows_in(storage) == 0


async def test_more_ids_than_one_statement_takes(storage, spool):
    ids = [new_id() for _ in range(1203)]
    await asyncio.gather(*(keep(spool, row_id=row_id) for row_id in ids))
    rows = await spool.take(HOST, "juliet", BALCONY, limit=5000)
    assert [row.id for row in rows] == ids

    await spool.release(ids[:600], BALCONY)
    await spool.delete(ids[600:])

    assert await spool.count(HOST, "juliet") == 600
    assert await rows_in(storage) == 600


# -- quota -----------------------------------------------------------------------------------------------------------


async def test_quota_refuses_the_message_after_the_last_that_fits(spool):
    results = await asyncio.gather(
        *(keep(spool, b"%d" % number, quota=3) for number in range(5)), return_exceptions=True
    )

    assert results[:3] == [Kept.STORED] * 3
    assert [type(result) for result in results[3:]] == [QuotaReached, QuotaReached]
    with pytest.raises(QuotaReached, match=r"juliet@example\.net has 3 offline messages"):
        await keep(spool, quota=3)
    assert await stanzas(spool) == [b"0", b"1", b"2"]
    assert await keep(spool, quota=3) is Kept.STORED


async def test_quota_counts_each_user_alone(spool):
    await keep(spool, quota=1)

    assert await keep(spool, to="nurse", quota=1) is Kept.STORED
    with pytest.raises(QuotaReached):
        await keep(spool, quota=1)


async def test_quota_neither_counts_nor_refuses_rows_with_a_holder(spool):
    for _ in range(3):
        await keep(spool, holder=BALCONY, quota=1)

    assert await keep(spool, quota=1) is Kept.STORED
    assert await keep(spool, holder=BALCONY, quota=1) is Kept.STORED
    assert await keep(spool, holder=BALCONY, quota=0) is Kept.STORED
    with pytest.raises(QuotaReached):
        await keep(spool, quota=1)


async def test_expired_messages_make_room(storage, spool, clock):
    for _ in range(3):
        await keep(spool, quota=3, expires_at=clock.now + 60)
    clock.now += 61

    assert await keep(spool, quota=1) is Kept.STORED

    assert await rows_in(storage) == 1  # a flood of short-lived messages does not pile up either


# -- expiry ----------------------------------------------------------------------------------------------------------


async def test_expired_messages_are_neither_counted_nor_delivered_and_go_at_the_next_take(storage, spool, clock):
    await keep(spool, b"short", expires_at=clock.now + 60)
    await keep(spool, b"long", expires_at=clock.now + 3600)
    await keep(spool, b"for ever")
    clock.now += 60

    assert await spool.count(HOST, "juliet") == 2
    assert await stanzas(spool) == [b"long", b"for ever"]
    assert await rows_in(storage) == 2


async def test_a_held_row_does_not_expire_under_its_holder(storage, spool, clock):
    await keep(spool, holder=BALCONY, expires_at=clock.now + 1)
    await keep(spool)
    clock.now += 60

    await spool.take(HOST, "juliet", CHAMBER)

    assert await rows_in(storage) == 2


# -- duplicates ------------------------------------------------------------------------------------------------------


async def test_the_same_message_sent_three_times_is_one_row(spool):
    key = digest("m1")

    assert await keep(spool, dedup=key) is Kept.STORED
    assert await keep(spool, dedup=key) is Kept.DUPLICATE
    together = await asyncio.gather(*(keep(spool, dedup=digest("m2")) for _ in range(3)))

    assert together == [Kept.STORED, Kept.DUPLICATE, Kept.DUPLICATE]
    assert await spool.count(HOST, "juliet") == 2


async def test_a_repetition_that_was_stored_first_gets_the_place_of_what_it_repeats(spool):
    """A client that has reconnected sends again what waited in the old connection, which is still read."""
    first, second, third = (next_place() for _ in range(3))
    await keep(spool, b"<second/>", place=second)
    assert await keep(spool, b"<first/>", dedup=digest("m1"), place=third) is Kept.STORED
    assert await keep(spool, b"<first/>", dedup=digest("m1"), place=first) is Kept.DUPLICATE
    assert await keep(spool, b"<first/>", dedup=digest("m1"), place=next_place()) is Kept.DUPLICATE

    assert [row.stanza for row in await spool.take(HOST, "juliet", CHAMBER)] == [b"<first/>", b"<second/>"]


async def test_a_row_that_is_on_its_way_keeps_its_place(spool):
    first, second = next_place(), next_place()
    await keep(spool, b"<first/>", dedup=digest("m1"), place=second)
    [row] = await spool.take(HOST, "juliet", CHAMBER)
    assert await keep(spool, b"<first/>", dedup=digest("m1"), place=first) is Kept.DUPLICATE

    await spool.release((row.id,), CHAMBER)
    assert [again.id for again in await spool.take(HOST, "juliet", CHAMBER)] == [row.id]


async def test_a_key_repeats_for_one_user_only_and_none_never_does(spool):
    key = digest("m1")
    await keep(spool, dedup=key)

    assert await keep(spool, to="nurse", dedup=key) is Kept.STORED
    assert [await keep(spool, dedup=None) for _ in range(2)] == [Kept.STORED] * 2


async def test_a_duplicate_is_no_matter_of_quota(spool):
    await keep(spool, dedup=digest("m1"), quota=1)

    assert await keep(spool, dedup=digest("m1"), quota=1) is Kept.DUPLICATE


async def test_a_message_refused_by_quota_is_not_remembered_as_stored(spool):
    await keep(spool, quota=1)
    refused = await asyncio.gather(
        *(keep(spool, dedup=digest("m1"), quota=1) for _ in range(2)), return_exceptions=True
    )

    assert [type(result) for result in refused] == [QuotaReached, QuotaReached]


async def test_after_ten_minutes_the_same_message_is_stored_again(spool, clock):
    key = digest("m1")
    await keep(spool, dedup=key)
    clock.now += 599
    assert await keep(spool, dedup=key) is Kept.DUPLICATE
    clock.now += 2

    assert await keep(spool, dedup=key) is Kept.STORED
    assert await keep(spool, dedup=key) is Kept.DUPLICATE
    assert await spool.count(HOST, "juliet") == 2


async def test_an_expired_row_does_not_swallow_the_same_message(spool, clock):
    await keep(spool, dedup=digest("m1"), expires_at=clock.now + 5)
    clock.now += 6

    assert await keep(spool, dedup=digest("m1"), expires_at=clock.now + 5) is Kept.STORED


async def test_two_nodes_that_store_the_same_message_at_once_make_one_row(spool, other_spool):
    for number in range(30):
        key = digest(f"m{number}")
        results = await asyncio.gather(keep(spool, dedup=key), keep(other_spool, dedup=key))
        assert Kept.STORED in results

    assert await spool.count(HOST, "juliet") == 30


async def test_doing_a_keep_again_after_an_unanswered_commit_changes_nothing(storage, spool):
    """What the batcher does when the answer to COMMIT was lost: the same items, once more."""
    _, with_key = spool.keep_item(HOST, "juliet", ROMEO, b"1", dedup=digest("m1"), quota=2)
    _, without = spool.keep_item(HOST, "juliet", ROMEO, b"2", dedup=None, quota=2)
    _, too_many = spool.keep_item(HOST, "juliet", ROMEO, b"3", dedup=None, quota=2)
    items = [with_key, without, too_many]

    first = await storage.run(lambda connection: spool._write_keeps(connection, items))
    second = await storage.run(lambda connection: spool._write_keeps(connection, items))

    for results in (first, second):
        assert results[:2] == [Kept.STORED, Kept.STORED]
        assert isinstance(results[2], QuotaReached)
    assert await rows_in(storage) == 2


async def test_of_a_lot_each_row_is_stored_or_a_repetition(storage, spool, clock):
    await Accounts(storage).create(HOST, "juliet", {})
    await keep(spool, b"<old/>", dedup=digest("old"), holder=CHAMBER)
    clock.now += 601
    await keep(spool, b"<before/>", dedup=digest("before"), holder=CHAMBER)

    def item(stanza, text, to="juliet"):
        key = digest(text) if text else None
        options = {"dedup": key, "quota": None, "holder": BALCONY, "for_account": True}
        return spool.keep_item(HOST, to, ROMEO, stanza, **options)[1]

    lot = [item(b"<1/>", "old"), item(b"<2/>", "before"), item(b"<3/>", "new"), item(b"<4/>", "new"), item(b"<5/>", "")]
    results = await spool.submit_all([*lot, item(b"<6/>", "gone", to="nobody")])

    assert results[:5] == [Kept.STORED, Kept.DUPLICATE, Kept.STORED, Kept.DUPLICATE, Kept.STORED]
    assert isinstance(results[5], NoAccount)
    assert [row.stanza for row in await spool.every(HOST, "juliet")] == [
        b"<old/>",
        b"<before/>",
        b"<1/>",
        b"<3/>",
        b"<5/>",
    ]
    again = await spool.submit_all(lot)  # as if nobody knew what had become of it
    assert again == results[:5]
    assert await rows_in(storage) == 5


async def test_a_lot_arrives_byte_by_byte_and_is_deleted_in_one_go(storage, spool, clock):
    name = "o'hara\\%s:x'\u00fc"
    await Accounts(storage).create(HOST, name, {})
    stanzas = [
        bytes(range(256)),
        b"'); DELETE FROM spool; --",
        b"%(some)s :rows \\",
        b"x" * 400_000,
        b"y" * 900_000,
        b"",
    ]
    options = {"dedup": None, "quota": None, "holder": BALCONY, "expires_at": clock.now + 1.5, "for_account": True}
    lot = [spool.keep_item(HOST, name, ROMEO, stanza, **options)[1] for stanza in stanzas]

    assert await spool.submit_all(lot) == [Kept.STORED] * len(lot)

    rows = await spool.every(HOST, name)
    assert [row.stanza for row in rows] == stanzas
    assert {(row.sender, row.created_at) for row in rows} == {(ROMEO, clock.now)}
    async with storage.connect() as connection:
        [row] = await connection.execute(select(spool_table).where(spool_table.c.id == lot[0].id))
    assert (row.server_host, row.username, row.expires_at) == (HOST, name, clock.now + 1.5)
    assert (row.holder_member, row.holder_incarnation, row.holder_session) == (b"A" * 16, 1, "juliet/balcony")
    assert (row.dedup_key, row.take_id, row.free_since, row.told) == (None, None, None, bytes(16))
    await spool.delete([item.id for item in lot])
    assert await rows_in(storage) == 0


@pytest.mark.mariadb
async def test_what_a_lot_says_is_in_no_statement_that_may_be_logged(mariadb_database, make_storage):
    storage = make_storage(mariadb_database)
    await storage.open()
    spool = Spool(storage)
    seen: list[str] = []
    event.listen(
        storage._engine.sync_engine, "before_cursor_execute", lambda connection, cursor, sql, *others: seen.append(sql)
    )

    options = {"dedup": digest("m1"), "quota": 10, "for_account": False}
    await spool.submit_all([spool.keep_item(HOST, "juliet", ROMEO, b"a secret", **options)[1] for _ in range(3)])
    options |= {"quota": None, "holder": BALCONY}
    await spool.submit_all([spool.keep_item(HOST, "juliet", ROMEO, b"a secret", **options)[1] for _ in range(3)])
    await spool.delete([b"1" * 16, b"2" * 16])

    assert any(sql.startswith("INSERT") for sql in seen)
    assert any(sql.startswith("DELETE") for sql in seen)
    assert not any(b"secret".hex() in sql or (b"1" * 16).hex() in sql for sql in seen)
    assert [problem(sql) for sql in seen] == [None] * len(seen)


# -- several nodes ---------------------------------------------------------------------------------------------------


async def test_no_row_is_given_to_two_takers(spool, other_spool):
    for _ in range(10):
        kept = [keep(spool, b"%d" % number) for number in range(40)]
        await asyncio.gather(*kept)

        taken = await asyncio.gather(
            *(
                node.take(HOST, "juliet", Holder(bytes([number]) * 16, 1, f"s{number}"), limit=15)
                for number, node in enumerate([spool, other_spool] * 3)
            )
        )

        ids = [row.id for rows in taken for row in rows]
        assert len(ids) == len(set(ids)) == 40
        assert all(rows == sorted(rows, key=lambda row: row.id) for rows in taken)
        await spool.delete(ids)


async def test_two_takes_of_one_session_share_out_the_rows(spool):
    await asyncio.gather(*(keep(spool, b"%d" % number) for number in range(50)))

    first, second = await asyncio.gather(
        spool.take(HOST, "juliet", BALCONY, limit=30), spool.take(HOST, "juliet", BALCONY, limit=30)
    )

    assert len({row.id for row in first} | {row.id for row in second}) == len(first) + len(second) == 50


TAKER = """
import asyncio, sys
from pathlib import Path
from xmppd.spool import Holder, Spool
from xmppd.storage import Storage

async def main(url, name):
    storage = Storage(url, data_dir=Path("."), pool_timeout=20.0)
    await storage.open()
    spool = Spool(storage)
    print("ready", flush=True)
    sys.stdin.readline()
    taken = []
    while rows := await spool.take("example.net", "juliet", Holder(name.encode() * 16, 1, name), limit=7):
        taken += [row.id.hex() for row in rows]
    await storage.close()
    print(" ".join(taken), flush=True)

asyncio.run(main(*sys.argv[1:]))
"""


async def test_processes_that_race_for_the_rows_get_each_one_once(database, spool):
    await asyncio.gather(*(keep(spool, b"%d" % number) for number in range(400)))
    takers = [
        await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            TAKER,
            database,
            name,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        for name in "ab"
    ]
    for taker in takers:
        assert await taker.stdout.readline() == b"ready\n"

    answers = await asyncio.gather(*(taker.communicate(b"go\n") for taker in takers))

    taken = [row_id for answer, _ in answers for row_id in answer.split()]
    assert len(taken) == len(set(taken)) == 400
    assert await spool.count(HOST, "juliet") == 0


async def test_a_starting_node_frees_the_rows_of_its_own_older_lives_only(spool):
    for number in range(1100):
        last = keep(spool, b"%d" % number, holder=Holder(b"A" * 16, 1 + number % 2, f"s{number}"))
    await last
    await keep(spool, b"this life", holder=Holder(b"A" * 16, 3, "s"))
    await keep(spool, b"other member", holder=Holder(b"B" * 16, 1, "s"))

    assert await spool.free_stale(b"A" * 16, 3) == 1100

    assert await spool.count(HOST, "juliet") == 1100
    assert await stanzas(spool, CHAMBER, limit=2000) == [b"%d" % number for number in range(1100)]
    assert await spool.free_stale(b"A" * 16, 3) == 0


def node(member: bytes, incarnation: int = 1) -> Registration:
    name = f"xmppd@{member[:1].decode()}"
    return Registration(member, name, "", incarnation, "0.1.0", b"h" * 32, b"i" + member[1:], b"p" * 31 + member[:1])


async def test_what_a_dead_member_holds_is_taken_over_and_nothing_else(spool, other_spool, storage):
    members = Members(storage)
    await members.identity()
    dead, stopped, alive = b"D" * 16, b"S" * 16, b"L" * 16
    await members.register(node(dead, 2), lease=0.01)
    await members.register(node(stopped), lease=30)
    await members.release(stopped, node(stopped).instance)
    await members.register(node(alive), lease=30)
    for number in range(1100):
        last = keep(spool, b"%d" % number, holder=Holder(dead, 1 + number % 2, f"s{number}"))
    await last
    await keep(spool, b"1100", holder=Holder(stopped, 1, "s"))
    await keep(spool, b"its own", holder=Holder(alive, 1, "s"))
    assert await spool.holders(HOST, "juliet") == {dead, stopped, alive}

    freed = await asyncio.gather(spool.take_over(BALCONY.member), other_spool.take_over(CHAMBER.member))

    assert sum(freed) == 1101
    assert await stanzas(spool, CHAMBER, limit=2000) == [b"%d" % number for number in range(1101)]
    assert await spool.holders(HOST, "juliet") == {alive, CHAMBER.member}


async def test_a_member_that_has_come_back_keeps_what_it_holds(spool, storage, monkeypatch):
    members = Members(storage)
    await members.identity()
    await members.register(node(b"D" * 16), lease=0.01)
    await keep(spool, holder=Holder(b"D" * 16, 1, "s"))
    await asyncio.sleep(0.05)
    read = storage.read

    async def read_and_come_back(work):
        found = await read(work)
        await members.register(node(b"D" * 16), lease=30)
        return found

    monkeypatch.setattr(storage, "read", read_and_come_back)

    assert await spool.take_over(BALCONY.member) == 0
    assert await spool.holders(HOST, "juliet") == {b"D" * 16}


async def test_both_sides_of_a_split_take_each_row_once(spool, other_spool, storage):
    """Both live and look at one database, free what a third one held, and deliver what is free."""
    members = Members(storage)
    await members.identity()
    await members.register(node(b"D" * 16), lease=0.01)
    for number in range(600):
        last = keep(spool, b"%d" % number, holder=Holder(b"D" * 16, 1, f"s{number}") if number % 2 else None)
    await last
    await asyncio.sleep(0.05)

    async def side(one: Spool, holder: Holder) -> list[bytes]:
        got = []
        while True:
            freed = await one.take_over(holder.member)
            rows = await one.take(HOST, "juliet", holder, limit=7)
            got += [row.stanza for row in rows]
            if not freed and not rows and b"D" * 16 not in await one.holders(HOST, "juliet"):
                return got

    one, other = await asyncio.gather(side(spool, BALCONY), side(other_spool, CHAMBER))
    assert len(one + other) == len(set(one + other)) == 600
    assert one
    assert other


async def test_a_node_without_a_lease_takes_nothing(spool):
    class Late(Alone):
        held = True

        def holds_lease(self) -> bool:
            return self.held

    await keep(spool)
    spool.standing = late = Late()
    late.held = False
    with pytest.raises(StorageUnavailable):
        await spool.take(HOST, "juliet", BALCONY)
    late.held = True
    assert len(await spool.take(HOST, "juliet", BALCONY)) == 1


async def test_users_whose_rows_became_free_are_found_again(spool, clock):
    await keep(spool, to="early")
    await keep(spool, to="held", holder=BALCONY)
    clock.now += 100
    since = clock.now
    row_id = new_id()
    await keep(spool, to="new")
    await keep(spool, to="released", holder=BALCONY, row_id=row_id)
    assert sorted(await spool.freed_since(since)) == [(HOST, "new")]

    await spool.release([row_id], BALCONY)
    await spool.take(HOST, "new", BALCONY)

    assert await spool.freed_since(since) == [(HOST, "released")]


# -- trouble ---------------------------------------------------------------------------------------------------------


async def test_rows_of_a_take_that_reported_failure_do_not_stay_held(storage, spool, monkeypatch):
    """The worst case: it was committed, and only the answer was lost."""
    await asyncio.gather(*(keep(spool, b"%d" % number) for number in range(3)))
    run = storage.run

    async def lose_the_answer(work, **options):
        await run(work, **options)
        raise StorageUnavailable("connection lost during COMMIT")

    with monkeypatch.context() as patched:
        patched.setattr(storage, "run", lose_the_answer)
        with pytest.raises(StorageUnavailable):
            await spool.take(HOST, "juliet", BALCONY)
    await storage.batcher.drain()

    assert await stanzas(spool) == [b"0", b"1", b"2"]


async def test_rows_of_a_take_become_free_when_the_database_is_back_however_late(storage, spool, monkeypatch):
    await keep(spool, b"<message id='1'/>")
    run, submit = storage.run, storage.batcher.submit
    refusals = iter(range(3))

    async def answer_is_lost(work, **options):
        await run(work, **options)
        raise StorageUnavailable("gone")

    def away(kind, item):
        if kind == FREE and next(refusals, None) is not None:
            raise StorageUnavailable("the write queue is full")
        return submit(kind, item)

    monkeypatch.setattr(storage, "run", answer_is_lost)
    monkeypatch.setattr(storage.batcher, "submit", away)
    with pytest.raises(StorageUnavailable):
        await stanzas(spool)
    monkeypatch.setattr(storage, "run", run)
    with pytest.raises(StorageUnavailable):  # not "there is nothing", or the row would be forgotten
        await stanzas(spool)

    # A take is refused until the spool knows that the row is free, which is a moment after it is.
    taken = None
    async with asyncio.timeout(30):
        while taken is None:
            try:
                taken = await stanzas(spool)
            except StorageUnavailable:
                await asyncio.sleep(0.02)
    assert next(refusals, None) is None
    assert taken == [b"<message id='1'/>"]


async def test_a_take_that_is_cancelled_leaves_the_rows_free(storage, spool):
    await keep(spool)
    task = asyncio.create_task(spool.take(HOST, "juliet", BALCONY))
    for _ in range(200):
        await asyncio.sleep(0)  # somewhere in the middle
    task.cancel()
    await asyncio.wait([task])
    await storage.batcher.drain()

    expected = 0 if not task.cancelled() else 1
    assert await spool.count(HOST, "juliet") == expected


async def test_a_row_and_rows_of_other_tables_commit_together_or_not_at_all(storage, spool):
    def unit(number: int, other):
        return storage.batcher.submit_unit(
            [spool.keep_item(HOST, "juliet", ROMEO, b"%d" % number, dedup=None, quota=3), other]
        )

    committed = []

    async def write(connection, items):
        committed[:] = items  # of the last try, which is the one that is committed
        return [ValueError("bad") if item == "bad" else item for item in items]

    storage.batcher.define("other", write)

    results = await asyncio.gather(
        unit(1, ("other", "good")),
        unit(2, ("other", "bad")),
        unit(3, ("other", "good")),
        unit(4, ("other", "good")),
        return_exceptions=True,
    )

    assert results[0] == [Kept.STORED, "good"]
    assert isinstance(results[1], ValueError)
    assert results[2] == [Kept.STORED, "good"]
    assert isinstance(results[3], QuotaReached)
    assert await stanzas(spool) == [b"1", b"3"]
    assert committed == ["good", "good"]


async def test_ids_of_released_rows_can_be_named_twice_without_harm(spool, storage):
    await keep(spool)
    (row,) = await spool.take(HOST, "juliet", BALCONY)

    await asyncio.gather(spool.release([row.id, row.id], BALCONY), spool.release([row.id], BALCONY))
    await asyncio.gather(spool.release([], BALCONY), spool.delete([]))

    assert await spool.count(HOST, "juliet") == 1
    async with storage.connect() as connection:
        assert (await connection.execute(update(spool_table).values(take_id=None))).rowcount == 1
    assert FREE in storage.batcher._kinds


async def test_nothing_is_kept_for_somebody_who_is_not_registered_any_more(storage):
    accounts, spool = Accounts(storage), Spool(storage)
    await accounts.create("example.net", "juliet", {})
    await accounts.remove("example.net", "juliet")
    await accounts.create("example.net", "nurse", {})

    for_juliet = spool.keep("example.net", "juliet", "r@x", b"<m/>", dedup=None, quota=10, for_account=True)
    for_nurse = spool.keep("example.net", "nurse", "r@x", b"<m/>", dedup=None, quota=10, for_account=True)

    with pytest.raises(NoAccount):
        await for_juliet
    assert await for_nurse is Kept.STORED
    await accounts.create("example.net", "juliet", {})
    assert await spool.count("example.net", "juliet") == 0


# -- telling of what a session had held


async def test_what_a_session_held_is_told_of_by_one_node_when_it_is_free(spool, other_spool):
    ids = [new_id() for _ in range(3)]
    for row_id, holder in zip(ids, (BALCONY, None, BALCONY), strict=True):
        await keep(spool, row_id=row_id, holder=holder)
    assert await other_spool.untold(0.0) == []  # one was never held, two still are

    await spool.release([ids[0], ids[2]], BALCONY)
    untold = await other_spool.untold(0.0)
    told = [each.tell(row.id) for row in untold for each in (spool, other_spool)]
    results = await asyncio.gather(*told, return_exceptions=True)

    assert [row.id for row in untold] == [ids[0], ids[2]]
    assert [(row.host, row.username, row.stanza) for row in untold] == [(HOST, "juliet", b"<message/>")] * 2
    assert [type(result) for result in results].count(NotToTell) == 2
    assert [type(result) for result in results].count(list) == 2
    assert await spool.untold(0.0) == []


async def test_what_is_taken_again_is_not_told_of_before_it_is_free_again(spool, clock):
    row_id = new_id()
    await keep(spool, row_id=row_id, holder=BALCONY)
    await spool.release([row_id], BALCONY)
    await spool.take(HOST, "juliet", CHAMBER)

    with pytest.raises(NotToTell):
        await spool.tell(row_id)
    assert await spool.untold(0.0) == []
    await spool.release([row_id], CHAMBER)

    assert [row.id for row in await spool.untold(0.0)] == [row_id]
    assert await spool.untold(0.0, after=row_id) == []
    assert await spool.untold(clock.now + 1) == []
