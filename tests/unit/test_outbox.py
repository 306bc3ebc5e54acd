"""The parts of the outbox that do no I/O."""

import random
import time
from email.utils import formatdate

import pytest

from xmppd.outbox.backoff import Breaker, Retry
from xmppd.outbox.event import Event, conversation
from xmppd.outbox.line import Item, Line
from xmppd.protocol.jid import parse
from xmppd.sender.signature import sign, verify
from xmppd.sender.target import retry_after, ulid
from xmppd.storage import id_time, new_id


def item(number: int, partition: str = "p") -> Item:
    return Item(Event(number.to_bytes(16, "big"), "s", "h", "k", partition.encode(), b"", 0.0))


def numbers(items: list[Item]) -> list[int]:
    return [int.from_bytes(each.event.id, "big") for each in items]


def test_waits_grow_up_to_the_longest_and_jitter_shortens_them():
    plain, full = Retry(base=1, factor=2, max=10, jitter="none"), Retry(base=1, factor=2, max=10)

    assert [plain.wait(attempts) for attempts in (1, 2, 3, 4, 5, 500)] == [1, 2, 4, 8, 10, 10]
    assert full.wait(3, chance=lambda: 0.25) == 1.0


def test_a_breaker_lets_one_through_now_and_then_and_closes_with_a_success():
    breaker = Breaker(2, 10.0)
    assert not breaker.failed(0.0)
    assert breaker.failed(1.0)

    assert breaker.wait(1.0) == 10.0
    assert breaker.wait(11.0) == 0.0
    breaker.begin()
    assert breaker.wait(11.0) is None  # one is under way
    assert not breaker.failed(12.0, not_before=60.0)
    assert breaker.wait(12.0) == 60.0
    assert breaker.succeeded()
    assert breaker.wait(12.0) == 0.0


def test_the_first_of_a_partition_bars_the_others():
    line = Line()
    for number in (1, 2):
        line.add(item(number), 0.0)
    line.add(item(3, "q"), 0.0)

    first, other = line.take(0.0), line.take(0.0)
    assert (numbers(first), numbers(other), line.take(0.0)) == ([1], [3], [])

    line.put_back(first, 0.0, due=5.0)
    line.done(other, 0.0)
    assert line.take(4.9) == []
    assert line.next_due(4.9) == 5.0
    assert numbers(line.take(4.9, early=True)) == [1]
    line.done(first, 5.0)
    assert numbers(line.take(5.0)) == [2]


def test_of_several_that_are_on_their_way_some_come_back_and_wait():
    line = Line()
    for number in range(5):
        line.add(item(number), 0.0)
    line.add(item(9, "q"), 0.0)
    chain = line.take_chain(0.0, limit=4)
    assert numbers(chain) == [0, 1, 2, 3]

    line.done(chain[:1], 0.0)
    line.put_back([chain[1]], 0.0, due=5.0)
    assert numbers(line.take(0.0, limit=9)) == [9]  # the others are still on their way
    line.done([chain[2]], 0.0)  # whoever made them has gone on
    line.put_back([chain[3]], 0.0, due=0.0)

    assert line.take(4.9) == []
    assert numbers(line.take(5.0, limit=9)) == [1, 3, 4]
    assert [each.done for each in chain] == [True, False, True, False]


def test_what_is_older_goes_first_but_for_what_is_on_its_way():
    line = Line()
    line.add(item(5), 0.0)
    line.add(item(7), 0.0)
    on_its_way = line.take(0.0)

    line.add(item(1), 0.0)
    line.add(item(6), 0.0)

    line.done(on_its_way, 0.0)
    assert numbers(line.take(0.0, limit=9)) == [1, 6, 7]


def test_a_batch_holds_one_that_goes_alone_apart():
    line = Line()
    for number in range(4):
        line.add(item(number), 0.0)
    taken = line.take(0.0, limit=9)
    taken[1].alone = True
    line.put_back(taken, 0.0, due=0.0)

    batches = []
    while batch := line.take(0.0, limit=9):
        batches.append(numbers(batch))
        line.done(batch, 0.0)

    assert batches == [[0], [1], [2, 3]]


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_each_arrives_once_and_in_order(seed):
    chance = random.Random(seed)
    line, now, arrived, under_way, made = Line(), 0.0, [], [], 0
    while len(arrived) < 200:
        now += chance.random()
        step = chance.random()
        if step < 0.4 and made < 200:
            line.add(item(made, chance.choice("abc")), now)
            made += 1
        elif step < 0.7 and (batch := line.take(now, limit=chance.randint(1, 5), early=chance.random() < 0.2)):
            under_way.append(batch)
        elif under_way:
            batch = under_way.pop(chance.randrange(len(under_way)))
            good = chance.randint(0, len(batch))  # so many of them arrive, one by one or together
            for part in [batch[:good]] if chance.random() < 0.5 else [[each] for each in batch[:good]]:
                line.done(part, now)
                arrived += part
            line.put_back(batch[good:], now, due=now + 5 * chance.random())
        if chance.random() < 0.05:
            line.hurry(now)

    assert sorted(numbers(arrived)) == list(range(200))
    for partition in (b"a", b"b", b"c"):
        own = numbers([each for each in arrived if each.event.partition == partition])
        assert own == sorted(own)
    assert (line.events, line.bytes, line.next_due(now)) == (0, 0, None)


def test_the_oldest_makes_room_and_what_is_cleared_is_gone():
    line = Line()
    for number in range(4):
        line.add(item(number, "pq"[number % 2]), 0.0)
    on_its_way = line.take(0.0)

    dropped = line.drop_oldest()
    assert dropped is not None
    assert numbers([dropped]) == [1]
    line.clear()

    assert line.events == 1
    line.done(on_its_way, 0.0)
    assert (line.events, line.take(0.0)) == (0, [])


def test_keys_are_ulids_that_sort_by_time():
    first, second = new_id(), new_id()

    assert len(ulid(first)) == 26
    assert ulid(first) < ulid(second)
    millis = 0
    for char in ulid(first)[:10]:
        millis = millis * 32 + "0123456789ABCDEFGHJKMNPQRSTVWXYZ".index(char)
    assert millis == round(id_time(first) * 1000)


def test_a_conversation_is_the_same_from_both_sides():
    romeo, juliet = parse("romeo@a.example/x"), parse("juliet@a.example/y")

    assert conversation(romeo, juliet) == conversation(juliet, romeo)
    assert conversation(romeo, juliet) != conversation(romeo, romeo)
    room = parse("room@b.example")
    assert conversation(romeo, room, room=True) == conversation(juliet, room, room=True)


def test_a_signature_holds_for_one_body_one_time_and_known_secrets():
    header = sign(["new", "old"], b"body", 1000.9)

    assert header.startswith("t=1000,v1=")
    assert verify("new", b"body", header, 1010)
    assert verify("old", b"body", header, 1010)
    assert not verify("other", b"body", header, 1010)
    assert not verify("new", b"bodY", header, 1010)
    assert not verify("new", b"body", header, 2000)
    for nonsense in ("", "t=", "t=x,v1=1", "v1=1", "t=1000", "t=1000,v1=é"):
        assert not verify("new", b"body", nonsense, 1000)


@pytest.mark.parametrize(
    ("value", "seconds"), [("5", 5), (" 7 ", 7), ("", 0), ("soon", 0), ("-1", 0), ("999999999999", 86400), ("٣", 0)]
)
def test_retry_after_in_seconds(value, seconds):
    assert retry_after(value, 0.0) == seconds


def test_retry_after_as_a_date():
    now = time.time()

    assert 58 <= retry_after(formatdate(now + 60, usegmt=True), now) <= 60
    assert retry_after(formatdate(now - 60, usegmt=True), now) == 0
