"""Limits on failed logins: how many get through, who is left alone, how much is remembered."""

import tracemalloc
from dataclasses import dataclass
from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xmppd.config.types import Rate
from xmppd.login_limits import TRUSTED_FOR, Allowances, LoginLimits, Refusal

HOST = "localhost"
HOME, CAFE, CRACKER = "192.0.2.1", "198.51.100.7", "203.0.113.66"
MINUTE = 60.0


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@dataclass
class Settings:
    per_address: Rate | None = None
    per_account: Rate | None = None
    exempt: tuple = ()


class World:
    """Limits, a clock, and what happens when somebody tries."""

    def __init__(self, **settings):
        self.clock = Clock()
        self.size = settings.pop("size", 100)
        self.settings = Settings(**settings)
        self.limits = LoginLimits(lambda: self.settings, clock=self.clock, size=self.size)

    def attempt(self, address=CRACKER, user="juliet", *, right=False):
        """The refusal, or None when the password was looked at."""
        refusal = self.limits.refusal(address, HOST, user)
        if refusal is None:
            (self.limits.succeeded if right else self.limits.failed)(address, HOST, user)
        return refusal

    def guesses(self, count, address=CRACKER, user="juliet"):
        """How many of so many wrong passwords were looked at."""
        return sum(self.attempt(address, user) is None for _ in range(count))


def test_failures_from_one_address_are_limited_whatever_the_account():
    world = World(per_address=Rate(20, MINUTE))
    assert sum(world.attempt(CRACKER, f"user{n}") is None for n in range(50)) == 20
    assert world.attempt(CRACKER, "another") == Refusal("address", 3)
    assert world.attempt(HOME) is None
    world.clock.now += 3
    assert world.guesses(5) == 1
    world.clock.now += MINUTE
    assert world.guesses(50) == 20


def test_failures_to_one_account_are_limited_wherever_they_come_from():
    world = World(per_account=Rate(10, MINUTE))
    assert sum(world.attempt(f"203.0.113.{n}") is None for n in range(50)) == 10
    assert world.attempt(HOME) == Refusal("account", 6)
    assert world.attempt(CRACKER, "romeo") is None
    assert world.attempt(HOME).text == "too many failed logins to this account; try again in 6 seconds"


def test_logins_do_not_count():
    world = World(per_address=Rate(2, MINUTE), per_account=Rate(2, MINUTE))
    assert all(world.attempt(HOME, right=True) is None for _ in range(100))
    assert world.guesses(5, HOME) == 2


def test_a_login_does_not_forgive_failures():
    """Else whoever has an account could guess at others for ever."""
    world = World(per_address=Rate(3, MINUTE))
    for _ in range(10):
        world.attempt(CRACKER, "mallory", right=True)
        world.guesses(1)
    assert world.limits.counts["failed"] == 3


def test_the_owner_is_not_locked_out_by_somebody_who_guesses():
    world = World(per_address=Rate(20, MINUTE), per_account=Rate(10, MINUTE))
    assert world.attempt(HOME, right=True) is None
    for n in range(1000):
        world.guesses(1, f"203.0.113.{n % 250}")
        assert world.attempt(HOME, right=True) is None
    assert world.attempt(CAFE, right=True) == Refusal("account", 6)  # from where nobody has seen her yet


def test_an_address_the_owner_came_from_has_an_allowance_and_no_more():
    world = World(per_account=Rate(10, MINUTE))
    world.attempt(HOME, right=True)
    assert world.guesses(100, HOME) == 10
    assert world.guesses(100, CAFE) == 10
    assert world.attempt(HOME) == Refusal("account", 6)


def test_trust_is_for_one_account_and_ends():
    world = World(per_account=Rate(10, MINUTE))
    world.attempt(CRACKER, "mallory", right=True)
    assert world.guesses(20, CAFE) == 10
    assert world.attempt(CRACKER) is not None

    world.attempt(HOME, "romeo", right=True)
    world.clock.now += TRUSTED_FOR + 1
    assert world.guesses(20, CAFE, "romeo") == 10
    assert world.attempt(HOME, "romeo") is not None


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2001:db8::1", "2001:db8::ffff:ffff:ffff:ffff", True),
        ("2001:db8:0:1::1", "2001:db8:0:2::1", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("fe80::1%eth0", "fe80::2%eth1", True),
        ("", "", True),
    ],
)
def test_what_counts_as_one_address(one, other, same):
    world = World(per_address=Rate(1, MINUTE))
    assert world.guesses(1, one) == 1
    assert (world.attempt(other) is not None) is same


@pytest.mark.parametrize("address", ["127.8.9.1", "::1", "::ffff:127.0.0.1", "2001:db8::77"])
def test_exempt_addresses_are_not_limited_and_do_not_count(address):
    networks = tuple(map(ip_network, ("127.0.0.0/8", "::1/128", "2001:db8::/32")))
    world = World(per_address=Rate(2, MINUTE), per_account=Rate(2, MINUTE), exempt=networks)
    assert world.guesses(100, address) == 100
    assert world.guesses(5, HOME) == 2
    assert world.attempt(address) is None


def test_without_limits_nothing_is_limited_or_remembered():
    world = World()
    assert world.guesses(1000) == 1000
    assert world.limits.remembered == 0


def test_a_reload_takes_effect_at_once():
    world = World(per_address=Rate(1000, 86400.0))
    assert world.guesses(1000) == 1000
    world.settings.per_address = Rate(2, MINUTE)
    assert world.attempt() == Refusal("address", 30)  # not a day
    world.settings.per_address = None
    assert world.attempt() is None


def test_a_name_that_is_not_known_yet_is_limited_by_address_alone():
    world = World(per_address=Rate(2, MINUTE), per_account=Rate(1, MINUTE))
    assert world.guesses(5, user="") == 2


def test_everything_is_counted():
    world = World(per_address=Rate(3, MINUTE), per_account=Rate(2, MINUTE))
    world.attempt(HOME, right=True)
    world.guesses(3)
    world.guesses(2, user="romeo")
    assert world.limits.counts == {"succeeded": 1, "failed": 3, "limited_account": 1, "limited_address": 1}


def test_whoever_is_being_attacked_is_not_pushed_out():
    world = World(per_account=Rate(2, MINUTE), size=10)
    world.guesses(2)
    for n in range(500):
        world.attempt(f"203.0.113.{n % 250}", f"user{n}")
        assert world.attempt() is not None


names = st.text(min_size=1, max_size=1023)
addresses = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)).map(str)


@given(st.lists(st.tuples(addresses, names, st.booleans(), st.floats(0, 30)), max_size=200), st.integers(1, 20))
def test_memory_is_bounded(attempts, size):
    world = World(per_address=Rate(3, MINUTE), per_account=Rate(3, MINUTE), size=size)
    for address, user, right, pause in attempts:
        world.attempt(address, user, right=right)
        world.clock.now += pause
        assert world.limits.remembered <= 3 * size


def test_a_full_table_stays_small():
    """What is kept of a name does not grow with it."""
    world = World(per_address=Rate(3, MINUTE), per_account=Rate(3, MINUTE), size=300)

    def flood(first):
        for n in range(first, first + 300):
            address = f"2001:db8:{n >> 8:x}:{n & 255:x}::1"
            world.attempt(address, f"{n}" * 100)
            world.attempt(address, f"{n}" * 100, right=True)

    tracemalloc.start()
    try:
        for first in range(0, 900, 300):
            flood(first)
            assert tracemalloc.get_traced_memory()[0] < 900 * 400
    finally:
        tracemalloc.stop()
    assert world.limits.remembered == 900


@given(
    st.integers(1, 50),
    st.sampled_from([1.0, 60.0, 3600.0]),
    st.lists(st.floats(0, 2), min_size=1, max_size=300),
)
def test_no_more_failures_than_the_rate_says(count, period, pauses):
    """In any stretch of time: the burst, and the rate for as long as it lasts; and never fewer than one could have."""
    allowances, rate, now, times = Allowances(10), Rate(count, period), 0.0, []
    for pause in pauses:
        now += pause * period / count
        if allowances.wait(b"key", rate, now) == 0:
            allowances.take(b"key", rate, now)
            times.append(now)
    for first in range(len(times)):
        for last in range(first, len(times)):
            assert last - first + 1 <= count + (times[last] - times[first]) * count / period + 1e-3
    assert len(times) >= min(count, len(pauses))


@given(st.integers(1, 50), st.floats(0, 100))
def test_who_waits_as_told_is_heard(count, begin):
    allowances, rate = Allowances(10), Rate(count, 60.0)
    for _ in range(count):
        allowances.take(b"key", rate, begin)
    wait = allowances.wait(b"key", rate, begin)
    assert 0 < wait <= 60.0 / count + 1e-6
    assert allowances.wait(b"key", rate, begin + wait) == 0
