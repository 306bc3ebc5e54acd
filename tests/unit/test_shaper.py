"""The token bucket: how much may be read, and when."""

from hypothesis import given
from hypothesis import strategies as st

from xmppd.shaper import ShaperLimits, TokenBucket

LIMITS = st.builds(ShaperLimits, st.integers(1, 10**9), st.integers(1, 10**9))
READS = st.lists(st.tuples(st.floats(0, 1000), st.integers(1, 1 << 18)), max_size=30)


def test_a_burst_is_free_and_what_is_beyond_it_costs_time():
    bucket = TokenBucket(ShaperLimits(rate=100, burst=1000), now=50.0)

    assert bucket.take(1000, 50.0) == 0
    assert bucket.take(50, 50.0) == 0.5
    assert bucket.take(50, 50.5) == 0.5
    assert bucket.take(1, 51.0) == 0.01


def test_a_pause_fills_the_bucket_and_not_more():
    bucket = TokenBucket(ShaperLimits(rate=100, burst=1000), now=0.0)
    bucket.take(1000, 0.0)

    assert bucket.take(1001, 1_000_000.0) == 0.01


@given(LIMITS, READS)
def test_whoever_waits_as_told_stays_within_burst_and_rate(limits, reads):
    bucket, now, total = TokenBucket(limits, 0.0), 0.0, 0
    for pause, amount in reads:
        now += pause
        before, total = total, total + amount
        assert before <= limits.burst + limits.rate * now + 1e-6 * (total + limits.rate)
        wait = bucket.take(amount, now)
        assert wait >= 0
        now += wait


@given(LIMITS, READS)
def test_whoever_stays_below_is_never_told_to_wait(limits, reads):
    bucket, now = TokenBucket(limits, 0.0), 0.0
    for _, amount in reads:
        if amount <= limits.burst:
            now += amount / limits.rate * 1.001 + 1e-9
            assert bucket.take(amount, now) <= 1e-6
