"""Outcomes: what the router owes the stream that sent a stanza."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xmppd.delivery import ERROR, SAFE, Gate, Pending, Records, as_stanza_error, first_of
from xmppd.errors import StanzaError, StorageUnavailable
from xmppd.events import HANDLED, StanzaRouting
from xmppd.hooks import Hooks
from xmppd.protocol.stanza import build

STANZA = build("message", {"to": "juliet@localhost", "from": "romeo@localhost/a"}, b"<body/>")


def watched(pending):
    seen = []
    pending.then(seen.append)
    return seen


# -- Pending


def test_the_first_outcome_counts():
    pending = Pending()
    seen = watched(pending)
    pending.settle(SAFE)
    pending.settle(ERROR)
    pending.fail(StanzaError("gone"))
    assert (seen, pending.result) == ([SAFE], SAFE)
    assert watched(pending) == [SAFE]  # who asks late is told at once


def test_settling_decides_first():
    pending = Pending(decided=False)
    order = []
    pending.then(lambda result: order.append("settled"))
    pending.when_decided(lambda: order.append("decided"))
    pending.settle(SAFE)
    assert order == ["decided", "settled"]


def test_deciding_calls_back_once():
    pending = Pending(decided=False)
    order = []
    pending.when_decided(lambda: order.append(1))
    pending.when_decided(lambda: order.append(2))
    assert not pending.decided
    pending.decide()
    pending.decide()
    pending.settle(SAFE)
    assert order == [1, 2]
    pending.when_decided(lambda: order.append(3))
    assert order == [1, 2, 3]


def test_failing_tells_the_sender_once():
    told = []
    pending = Pending(failed=told.append)
    seen = watched(pending)
    pending.fail(StanzaError("gone"))
    pending.fail(StanzaError("conflict"))
    assert [error.condition for error in told] == ["gone"]
    assert seen == [ERROR]


def test_failing_after_it_was_safe_tells_nobody():
    told = []
    pending = Pending(failed=told.append)
    pending.settle(SAFE)
    pending.fail(StanzaError("gone"))
    assert told == []


def test_following_another_outcome():
    for result in (SAFE, ERROR):
        direct, first, second = Pending(decided=False), Pending(decided=False), Pending(decided=False)
        direct.follow(result)
        first.follow(second)
        assert not first.decided
        second.decide()
        assert first.decided
        assert first.result is None
        second.settle(result)
        assert (direct.result, first.result) == (result, result)


async def test_following_a_future():
    loop = asyncio.get_running_loop()
    cases = [("set_result", None, SAFE, None), ("set_exception", StanzaError("gone"), ERROR, "gone"),
             ("set_exception", StorageUnavailable("away"), ERROR, "internal-server-error"),
             ("set_exception", RuntimeError("bug"), ERROR, "internal-server-error")]  # fmt: skip
    for method, value, result, condition in cases:
        told = []
        pending = Pending(decided=False, failed=told.append)
        future = loop.create_future()
        pending.follow(future)
        assert pending.decided  # the commit is waited for by the acknowledgement alone
        getattr(future, method)(value)
        await asyncio.sleep(0)
        assert pending.result is result
        assert [error.condition for error in told] == ([condition] if condition else [])


async def test_a_future_that_is_cancelled_says_try_later():
    told = []
    pending = Pending(failed=told.append)
    future = asyncio.get_running_loop().create_future()
    pending.follow(future)
    future.cancel()
    await asyncio.sleep(0)
    assert [(error.condition, error.type) for error in told] == [("internal-server-error", "wait")]


def test_what_a_sender_is_told(caplog):
    own = StanzaError("gone", "elsewhere")
    assert as_stanza_error(own) is own
    assert as_stanza_error(StorageUnavailable("secret path")).type == "wait"
    assert caplog.records == []
    hidden = as_stanza_error(RuntimeError("secret"))
    assert (hidden.condition, hidden.text) == ("internal-server-error", "")
    assert len(caplog.records) == 1


# -- first_of


def test_first_of_what_is_known():
    assert first_of([SAFE, ERROR, Pending()]) is SAFE
    assert first_of([ERROR, ERROR]) is ERROR
    assert first_of([]) is ERROR
    pending = Pending()
    assert first_of([ERROR, pending]) is pending


@given(results=st.lists(st.sampled_from([SAFE, ERROR]), min_size=2, max_size=6), data=st.data())
def test_first_of_is_safe_as_soon_as_one_is_and_an_error_when_all_are(results, data):
    outcomes = [Pending() for _ in results]
    combined = first_of(list(outcomes))
    order = data.draw(st.permutations(range(len(results))))
    for count, index in enumerate(order, 1):
        outcomes[index].settle(results[index])
        done = [results[each] for each in order[:count]]
        expected = SAFE if SAFE in done else ERROR if count == len(results) else None
        assert combined.result is expected


# -- Records


def test_a_record_lives_for_one_to_two_periods():
    records = Records()
    early = records.add(STANZA)
    records.ripen()
    late = records.add(STANZA)
    assert (early.result, len(records)) == (None, 2)
    records.ripen()
    assert (early.result, late.result, len(records)) == (SAFE, None, 1)
    records.ripen()
    assert (late.result, len(records)) == (SAFE, 0)


def test_taking_gives_all_in_order_and_forgets_them():
    records = Records()
    stanzas = [build("message", {"id": str(number)}) for number in range(4)]
    for stanza in stanzas[:2]:
        records.add(stanza)
    records.ripen()
    for stanza in stanzas[2:]:
        records.add(stanza)
    assert [record.stanza for record in records.take()] == stanzas
    assert len(records) == 0
    assert records.take() == []


def test_confirming_all():
    records = Records()
    outcomes = [records.add(STANZA)]
    records.ripen()
    outcomes.append(records.add(STANZA))
    records.confirm_all()
    assert [outcome.result for outcome in outcomes] == [SAFE, SAFE]
    assert not records


# -- Gate


class Asking:
    def __init__(self):
        self.hooks = Hooks()
        self.tasks = []
        self.bounced = []
        self.gate = Gate(self.hooks, self.spawn, self.bounce)

    def spawn(self, coroutine, *, name):
        self.tasks.append(asyncio.get_running_loop().create_task(coroutine))

    def bounce(self, stanza, error):
        self.bounced.append(error.condition)
        return ERROR

    def ask(self):
        return self.gate.ask(StanzaRouting(STANZA), STANZA, lambda event: SAFE, handled=ERROR)


async def test_nobody_asked_means_go():
    assert Asking().ask() is SAFE


async def test_handled_means_what_the_caller_says():
    asking = Asking()
    asking.hooks.add("a", StanzaRouting, lambda event: HANDLED)
    assert asking.ask() is ERROR


@pytest.mark.parametrize(
    ("failure", "condition"), [(StanzaError("gone"), "gone"), (RuntimeError("bug"), "internal-server-error")]
)
async def test_a_coroutine_that_fails_bounces_and_lets_the_stream_go_on(failure, condition):
    async def decide(event):
        raise failure

    asking = Asking()
    asking.hooks.add("a", StanzaRouting, decide)
    outcome = asking.ask()
    assert not outcome.decided
    await asyncio.gather(*asking.tasks)
    assert (outcome.decided, outcome.result, asking.bounced) == (True, ERROR, [condition])


async def test_a_server_that_stops_tells_those_who_wait():
    async def decide(event):
        await asyncio.Event().wait()

    asking = Asking()
    asking.hooks.add("a", StanzaRouting, decide)
    outcome = asking.ask()
    await asyncio.sleep(0)
    asking.tasks[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking.tasks[0]
    assert (outcome.result, asking.bounced) == (ERROR, ["internal-server-error"])
