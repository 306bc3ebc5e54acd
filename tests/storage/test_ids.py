"""Row ids."""

import asyncio
import os

from xmppd.storage.clock import Clock
from xmppd.storage.ids import IdMaker, Places, id_of, id_time, place_of


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


def test_places_rise_strictly_even_when_the_clock_stands_or_goes_back():
    now = 5.0
    clock = Clock(lambda: 1000.0, lambda: now)
    next_place = Places(clock)
    places = []
    for step in (0, 0, 0.0004, 0.002, 0.5):
        now += step
        places += [next_place(), next_place()]
    clock._base -= 0.3
    now += 0.1
    places += [next_place(), next_place()]

    assert places == sorted(set(places))


def test_ids_of_places_sort_by_these_and_among_all_ids_of_their_time():
    now = 5.0
    clock = Clock(lambda: 1000.0, lambda: now)
    next_place, new_id = Places(clock), IdMaker(clock)
    places, others = [], []
    for _ in range(5):
        places += [next_place(), next_place()]
        now += 0.01
        others.append(new_id())
        now += 0.01
    ids = [id_of(place) for place in places]

    late = list(reversed([id_of(place) for place in reversed(places)]))  # made in another order
    assert ids == sorted(ids)
    assert late == sorted(late)
    assert set(ids).isdisjoint(late)
    assert {len(one) for one in ids} == {16}
    assert sorted(ids + others) == [one for n in range(5) for one in (ids[2 * n], ids[2 * n + 1], others[n])]
    assert abs(id_time(ids[-1]) - 1000.08) < 0.001


def test_ids_of_one_place_differ_also_beyond_what_is_drawn_at_once():
    assert len({id_of(5) for _ in range(1000)}) == 1000


def test_a_forked_process_does_not_draw_the_same():
    id_of(5)  # there is something left of what was drawn for it
    reads, writes = os.pipe()
    child = os.fork()
    if not child:
        os.write(writes, b"".join(id_of(5) for _ in range(200)))
        os._exit(0)
    os.close(writes)
    with os.fdopen(reads, "rb") as pipe:
        other = pipe.read()
    os.waitpid(child, 0)
    theirs = {other[at : at + 16] for at in range(0, len(other), 16)}
    assert len(theirs) == 200
    assert not theirs & {id_of(5) for _ in range(200)}


def test_an_id_tells_its_place():
    places = Places()

    for place in (places(), places(), places()):
        assert place_of(id_of(place)) == place
