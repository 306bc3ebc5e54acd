"""Calls, casts and barriers between nodes."""

import asyncio

import pytest

from tests.cluster.link_net import LinkNet
from tests.cluster.memory_net import Net
from xmppd.cluster import calls as module
from xmppd.cluster.interfaces import Kind
from xmppd.errors import CallRefused, CommandError, NodeUnreachable


@pytest.fixture(params=[Net, LinkNet])
async def net(request):
    async with request.param() as net:
        yield net


async def test_a_call_brings_the_answer_of_that_node(net):
    _, one = net.add("one")
    _, two = net.add("two")
    two.on_call("greet", lambda peer, payload: [peer.name, payload])
    await net.all_up()

    answer = await one.call(net.node("two"), "greet", {"to": "juliet"})

    assert answer == ["one", {"to": "juliet"}]


async def test_a_coroutine_may_answer_and_calls_do_not_wait_for_each_other(net):
    _, one = net.add("one")
    _, two = net.add("two")
    first = asyncio.Event()

    async def slow(peer, payload):
        await first.wait()
        return payload

    two.on_call("slow", slow)
    two.on_call("quick", lambda peer, payload: payload)
    await net.all_up()

    waiting = asyncio.ensure_future(one.call(net.node("two"), "slow", 1))
    assert await one.call(net.node("two"), "quick", 2) == 2
    assert not waiting.done()
    first.set()
    assert await waiting == 1


@pytest.mark.parametrize("kind", [CallRefused, CommandError])
async def test_a_refusal_comes_back_with_its_text_and_code(net, kind):
    _, one = net.add("one")
    _, two = net.add("two")

    async def refuse(peer, payload):
        raise kind("no such account: tybalt@example.net", 17)

    two.on_call("kick", refuse)
    await net.all_up()

    with pytest.raises(CallRefused) as caught:
        await one.call(net.node("two"), "kick", None)

    assert (caught.value.text, caught.value.code) == ("no such account: tybalt@example.net", 17)


async def test_a_name_that_is_not_on_the_list_is_refused_and_counted(net):
    _, one = net.add("one")
    _, two = net.add("two")
    await net.all_up()

    with pytest.raises(CallRefused, match=r"unknown call os\.system"):
        await one.call(net.node("two"), "os.system", "rm")
    one.cast("os.system", "rm")
    await one.barrier()

    assert two.counters.unknown == 2


async def test_a_handler_that_crashes_is_refused_and_the_next_call_is_answered(net):
    _, one = net.add("one")
    _, two = net.add("two")
    two.on_call("divide", lambda peer, payload: 1 / payload)
    await net.all_up()

    with pytest.raises(CallRefused, match="ZeroDivisionError"):
        await one.call(net.node("two"), "divide", 0)

    assert await one.call(net.node("two"), "divide", 2) == 0.5
    assert two.counters.failed == 1


async def test_calls_fail_at_once_when_the_node_goes_down(net):
    _, one = net.add("one")
    _, two = net.add("two")
    two.on_call("never", lambda peer, payload: asyncio.Event().wait())
    await net.all_up()
    waiting = asyncio.ensure_future(one.call(net.node("two"), "never", None, timeout=60))
    await one.barrier()

    net.kill("two")

    with pytest.raises(NodeUnreachable, match="two went down"):
        await waiting
    with pytest.raises(NodeUnreachable):
        await one.call(net.node("two"), "never", None)
    await two.close()


async def test_a_node_that_does_not_answer_in_time_is_unreachable(net):
    _, one = net.add("one")
    _, two = net.add("two")
    two.on_call("never", lambda peer, payload: asyncio.Event().wait())
    await net.all_up()

    with pytest.raises(NodeUnreachable, match=r"within 0\.05 s"):
        await one.call(net.node("two"), "never", None, timeout=0.05)

    assert one.counters.timeouts == 1


async def test_an_answer_of_20_mb_comes_whole_and_small_ones_pass_it(net):
    _, one = net.add("one")
    _, two = net.add("two")
    order = []
    answer = ["x" * 1000] * 20_000
    two.on_call("long", lambda peer, payload: answer)
    two.on_call("short", lambda peer, payload: payload)
    await net.all_up()

    async def ask(name):
        found = await one.call(net.node("two"), name, name)
        order.append(name)
        return found

    found, _ = await asyncio.gather(ask("long"), ask("short"))

    assert found == answer
    assert order == ["short", "long"]
    assert not two._long


async def test_a_long_answer_nobody_takes_is_forgotten_when_the_asker_dies(net):
    _, one = net.add("one")
    _, two = net.add("two")
    two.on_call("long", lambda peer, payload: "x" * 5_000_000)
    await net.all_up()
    waiting = asyncio.ensure_future(one.call(net.node("two"), "long", None))
    await net.until(lambda: two._long)

    net.kill("one")

    await net.until(lambda: not two._long)
    waiting.cancel()


@pytest.mark.parametrize("payload", [float("nan"), object(), "x" * (module.MAX_PAYLOAD + 1)])
async def test_what_cannot_be_sent_is_refused_here(net, payload):
    _, one = net.add("one")
    net.add("two")
    await net.all_up()

    with pytest.raises((ValueError, TypeError)):
        await one.call(net.node("two"), "x", payload)
    with pytest.raises((ValueError, TypeError)):
        one.cast("x", payload)


async def test_a_text_with_a_lone_surrogate_survives(net):
    _, one = net.add("one")
    _, two = net.add("two")
    two.on_call("echo", lambda peer, payload: payload)
    await net.all_up()

    assert await one.call(net.node("two"), "echo", "\ud83d 朱丽叶") == "\ud83d 朱丽叶"


async def test_casts_come_in_order_to_all_or_to_some(net):
    _, one = net.add("one")
    heard = {name: [] for name in ("two", "three")}
    for name in heard:
        _, calls = net.add(name)
        calls.on_cast("news", lambda peer, payload, name=name: heard[name].append(payload))
    await net.all_up()

    for number in range(10):
        one.cast("news", number)
    one.cast("news", "for two", [net.node("two")])
    await one.barrier()

    assert heard == {"two": [*range(10), "for two"], "three": [*range(10)]}


async def test_after_a_barrier_each_side_has_seen_what_the_other_had_sent(net):
    _, one = net.add("one")
    _, two = net.add("two")
    seen = []
    one.on_cast("from two", lambda peer, payload: seen.append(payload))
    two.on_cast("from one", lambda peer, payload: two.cast("from two", "I heard it") or seen.append(payload))
    await net.all_up()

    two.cast("from two", "before")
    one.cast("from one", "hello")
    await one.barrier()

    assert sorted(seen) == ["I heard it", "before", "hello"]


async def test_a_barrier_does_not_wait_for_a_node_that_dies(net):
    _, one = net.add("one")
    links, _ = net.add("two")
    await net.all_up()
    links._handlers[Kind.BARRIER] = lambda peer, body: None  # it never answers
    waiting = asyncio.ensure_future(one.barrier(timeout=60))
    await asyncio.sleep(0)

    net.kill("two")

    async with asyncio.timeout(5):
        await waiting


@pytest.mark.parametrize("kind", [Kind.CALL, Kind.REPLY, Kind.CAST, Kind.BARRIER_REPLY])
@pytest.mark.parametrize("body", [b"", b"\xff", b"\x01\x7f", b"\x01\x00\x01\xff{", b"\x01\x09", b"\x01\x02[]"])
async def test_a_malformed_frame_harms_nobody(net, kind, body):
    links, one = net.add("one")
    _, two = net.add("two")
    two.on_call("echo", lambda peer, payload: payload)
    await net.all_up()
    one._last_id = 1000  # the refusal of a malformed call is not for the call below

    links.send(net.node("two"), kind, body)

    assert await one.call(net.node("two"), "echo", 1) == 1


async def test_only_so_many_calls_of_one_node_run_at_once(net, monkeypatch):
    monkeypatch.setattr(module, "MAX_RUNNING", 2)
    _, one = net.add("one")
    _, two = net.add("two")
    two.on_call("never", lambda peer, payload: asyncio.Event().wait())
    await net.all_up()
    waiting = [asyncio.ensure_future(one.call(net.node("two"), "never", None)) for _ in range(2)]
    await one.barrier()

    with pytest.raises(CallRefused, match="too many calls"):
        await one.call(net.node("two"), "never", None)

    for task in waiting:
        task.cancel()
