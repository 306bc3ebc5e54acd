"""A phrase that comes too often is left out of the log, counted, and told of."""

import io
import logging
from collections.abc import Iterator

import pytest

from xmppd import log
from xmppd.log_limits import LeftOut, LogLimits


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def limits(clock: Clock) -> LogLimits:
    return LogLimits(10, 60.0, clock=clock)


def test_so_many_lines_pass_and_as_many_again_in_a_window(limits: LogLimits, clock: Clock) -> None:
    assert [limits.admit("a") for _ in range(12)] == [True] * 10 + [False] * 2
    clock.now += 6
    assert [limits.admit("a") for _ in range(2)] == [True, False]
    clock.now += 1_000_000
    assert [limits.admit("a") for _ in range(12)] == [True] * 10 + [False] * 2


def test_one_phrase_does_not_silence_another(limits: LogLimits) -> None:
    for _ in range(100):
        limits.admit("a")
    assert limits.admit("b")


def test_what_was_left_out_is_told_once_a_window(limits: LogLimits, clock: Clock) -> None:
    for _ in range(15):
        limits.admit("a")
    assert not limits.due
    assert limits.left_out() == []
    clock.now += 60
    assert limits.due
    assert limits.left_out() == [LeftOut("a", 5, 60)]
    assert not limits.due
    for _ in range(13):
        limits.admit("a")
    assert limits.left_out(all=True) == [LeftOut("a", 3, 0)]
    assert limits.left_out(all=True) == []


def test_each_phrase_has_its_own_time(limits: LogLimits, clock: Clock) -> None:
    for phrase in ("a", "b"):
        for _ in range(11):
            limits.admit(phrase)
        clock.now += 40
    assert limits.left_out() == [LeftOut("a", 1, 80)]
    assert not limits.due
    clock.now += 20
    assert limits.due
    assert limits.left_out() == [LeftOut("b", 1, 60)]


def test_phrases_that_are_made_up_are_no_way_around_it(limits: LogLimits) -> None:
    assert sum(limits.admit(str(number)) for number in range(10_000)) == 1000 + 10
    assert len(limits._phrases) <= 1001


# -- the log itself


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    names = ("", "xmppd", "modules")
    levels = {name: logging.getLogger(name).level for name in names}
    former, stream = log._limits, io.StringIO()
    log._limits = None
    log.setup("debug", stream=stream)
    log.limit(10, 60.0)
    yield stream
    log._limits = former
    assert log._handler is not None
    logging.getLogger().removeHandler(log._handler)
    log._handler.close()
    log._handler = None
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.mark.parametrize("level", ["info", "notice", "warning", "error"])
def test_a_flood_of_lines_is_bounded(lines: io.StringIO, level: str) -> None:
    for number in range(1000):
        getattr(log.get_logger("c2s").bind(f"{number:04x}"), level)("stream error", condition="bad-format")
    assert lines.getvalue().count("\n") == 10
    log.sum_up(all=True)
    last = lines.getvalue().splitlines()[-1]
    assert 'WARN  log         log lines left out said="stream error" count=990 seconds=0' in last


def test_a_bug_that_repeats_itself_is_bounded_with_its_tracebacks(lines: io.StringIO) -> None:
    for _ in range(1000):
        try:
            raise ValueError("x" * 1000)
        except ValueError as exc:
            log.get_logger("c2s").error("stanza failed", exc=exc)
    assert lines.getvalue().count("Traceback") == 10


def test_what_others_log_is_bounded_too(lines: io.StringIO) -> None:
    for number in range(1000):
        logging.getLogger("asyncio").error(f"exception {number}")
    assert lines.getvalue().count("\n") == 10


@pytest.mark.parametrize("level", ["debug", "critical"])
def test_what_somebody_asked_for_is_not_limited(lines: io.StringIO, level: str) -> None:
    for _ in range(100):
        getattr(log.get_logger("c2s"), level)("here")
    assert lines.getvalue().count("\n") == 100


def test_another_limit_counts_at_once_and_what_was_left_out_is_told(lines: io.StringIO) -> None:
    for _ in range(15):
        log.get_logger("c2s").info("here")
    log.limit(20, 60.0)
    for _ in range(25):
        log.get_logger("c2s").info("here")
    log.limit(20, 60.0)  # no change: nothing is forgiven
    log.get_logger("c2s").info("here")
    text = lines.getvalue()
    assert text.count(" here\n") == 30
    assert "said=here count=5" in text
