"""Row ids."""

import asyncio

from xmppd.storage.ids import IdMaker, id_time


def test_ids_rise_strictly_even_when_the_clock_stands_or_goes_back():
    times = iter([5.0] * 1000 + [4.0] * 1000 + [5.001, 6.0])
    maker = IdMaker(lambda: next(times))

    ids = [maker() for _ in range(2002)]

    assert ids == sorted(ids)
    assert len(set(ids)) == len(ids)
    assert {len(one) for one in ids} == {16}
    assert id_time(ids[0]) == 5.0
    assert id_time(ids[-1]) == 6.0


def test_a_counter_that_is_full_borrows_the_next_millisecond():
    maker = IdMaker(lambda: 5.0)
    first = maker()
    maker._counter = (1 << 24) - 2
    ids = [first, *(maker() for _ in range(4))]

    assert ids == sorted(ids)
    assert len(set(ids)) == 5


async def test_threads_get_different_ids():
    maker = IdMaker()

    made = await asyncio.gather(*(asyncio.to_thread(lambda: [maker() for _ in range(2000)]) for _ in range(4)))

    assert len({one for some in made for one in some}) == 8000
