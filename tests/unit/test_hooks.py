"""The bus: order, circles, who may stop what, and what a crash means."""

import logging
from dataclasses import dataclass, replace

import pytest

from xmppd.errors import ConfigError, StanzaError, StorageUnavailable
from xmppd.events import HANDLED
from xmppd.hooks import Hooks, event_name


@dataclass(frozen=True, slots=True)
class Thing:
    value: int = 0


class Other:
    pass


@pytest.fixture
def hooks():
    return Hooks()


def errors(caplog):
    return [record for record in caplog.records if record.levelno >= logging.ERROR]


def names(hooks):
    """The order in which the handlers run."""
    return [handler.owner for handler in hooks._handlers[Thing]]


def add(hooks, owner, *after):
    hooks.add(owner, Thing, lambda event: None, after=after)


def test_handlers_run_in_the_order_they_came(hooks):
    for owner in "cab":
        add(hooks, owner)
    assert names(hooks) == ["c", "a", "b"]


@pytest.mark.parametrize("order", ["abc", "acb", "bac", "bca", "cab", "cba"])
def test_after_counts_whoever_comes_first(hooks, order):
    after = {"a": (), "b": ("a",), "c": ("b", "nobody")}
    for owner in order:
        add(hooks, owner, *after[owner])
    assert names(hooks) == ["a", "b", "c"]


@pytest.mark.parametrize("circle", [{"a": "a"}, {"a": "b", "b": "a"}, {"a": "b", "b": "c", "c": "a"}])
def test_a_circle_is_a_configuration_error_that_names_it(hooks, circle):
    *first, (last, its_after) = circle.items()
    for owner, after in first:
        add(hooks, owner, after)
    with pytest.raises(ConfigError) as caught:
        add(hooks, last, its_after)
    assert "thing" in str(caught.value)
    assert all(owner in str(caught.value) for owner in circle)
    if first:
        assert sorted(names(hooks)) == sorted(owner for owner, _ in first)  # the others stay as they were


def test_nobody_listens(hooks):
    assert not hooks.wants(Thing)
    assert hooks.notify(Thing()) is None
    event = Thing()
    assert hooks.decide(event) is event


def test_a_module_that_goes_leaves_nothing(hooks):
    add(hooks, "a")
    add(hooks, "b")
    hooks.add("a", Other, print)
    assert hooks.count() == 3
    hooks.remove("a")
    assert (names(hooks), hooks.wants(Other), hooks.count()) == (["b"], False, 1)
    hooks.remove("b")
    assert not hooks.wants(Thing)


def test_a_module_can_leave_one_event(hooks):
    add(hooks, "a")
    hooks.add("a", Other, print)
    hooks.remove("a", Thing)
    assert not hooks.wants(Thing)
    assert hooks.wants(Other)


# -- watchers


def test_watchers_all_run_when_one_crashes(hooks, caplog):
    seen = []

    def crash(event):
        raise RuntimeError("bug")

    hooks.add("a", Thing, seen.append)
    hooks.add("b", Thing, crash)
    hooks.add("c", Thing, seen.append)
    assert hooks.notify(Thing(1)) is None
    assert seen == [Thing(1), Thing(1)]
    assert len(errors(caplog)) == 1
    assert "event=thing" in caplog.text or "thing" in caplog.text


async def test_watchers_that_wait_keep_the_order(hooks, caplog):
    seen = []

    async def later(event):
        seen.append("later")

    async def crash(event):
        raise RuntimeError("bug")

    hooks.add("a", Thing, lambda event: seen.append("a"))
    hooks.add("b", Thing, later)
    hooks.add("c", Thing, crash)
    hooks.add("d", Thing, lambda event: seen.append("d"))
    rest = hooks.notify(Thing())
    assert seen == ["a"]
    assert rest is not None
    await rest
    assert seen == ["a", "later", "d"]
    assert len(errors(caplog)) == 1


def test_trouble_with_the_database_is_no_bug_of_the_watcher(hooks, caplog):
    def crash(event):
        raise StorageUnavailable("away")

    hooks.add("a", Thing, crash)
    hooks.notify(Thing())
    assert errors(caplog) == []


# -- deciders


def both(handler):
    """The same handler as a plain function and as a coroutine."""

    async def later(event):
        return handler(event)

    return [handler, later]


async def decided(hooks, event):
    result = hooks.decide(event)
    return result if isinstance(result, Thing) or result is HANDLED else await result


def double(event):
    return replace(event, value=event.value * 2)


@pytest.mark.parametrize("handler", both(double))
async def test_a_changed_copy_goes_on_to_the_next(hooks, handler):
    seen = []
    hooks.add("a", Thing, handler)
    hooks.add("b", Thing, seen.append)
    hooks.add("c", Thing, handler)
    assert await decided(hooks, Thing(1)) == Thing(4)
    assert seen == [Thing(2)]


@pytest.mark.parametrize("handler", both(lambda event: HANDLED))
async def test_handled_stops(hooks, handler):
    seen = []
    hooks.add("a", Thing, handler)
    hooks.add("b", Thing, seen.append)
    assert await decided(hooks, Thing()) is HANDLED
    assert seen == []


def refuse(event):
    raise StanzaError("forbidden")


def away(event):
    raise StorageUnavailable("away")


def bug(event):
    raise RuntimeError("bug")


@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("handler", both(refuse))
async def test_a_refusal_counts_even_of_an_optional_handler(hooks, handler, optional, caplog):
    hooks.add("a", Thing, handler, optional=optional)
    with pytest.raises(StanzaError) as caught:
        await decided(hooks, Thing())
    assert caught.value.condition == "forbidden"
    assert errors(caplog) == []


@pytest.mark.parametrize("handler", both(away))
async def test_a_decider_without_database_fails_closed(hooks, handler):
    hooks.add("a", Thing, handler)
    with pytest.raises(StorageUnavailable):
        await decided(hooks, Thing())


@pytest.mark.parametrize("handler", both(bug))
async def test_a_crash_fails_closed(hooks, handler, caplog):
    seen = []
    hooks.add("a", Thing, handler)
    hooks.add("b", Thing, seen.append)
    with pytest.raises(StanzaError) as caught:
        await decided(hooks, Thing())
    assert caught.value.condition == "internal-server-error"
    assert seen == []
    assert len(errors(caplog)) == 1


@pytest.mark.parametrize("handler", both(bug))
async def test_a_crash_of_an_optional_handler_is_passed_over(hooks, handler, caplog):
    seen = []
    hooks.add("a", Thing, handler, optional=True)
    hooks.add("b", Thing, seen.append)
    assert await decided(hooks, Thing(3)) == Thing(3)
    assert seen == [Thing(3)]
    assert len(errors(caplog)) == 1


def test_event_names():
    assert event_name(type("MessageUndeliverable", (), {})) == "message_undeliverable"
