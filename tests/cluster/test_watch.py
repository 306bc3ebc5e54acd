"""`watch` shows what happens on any node, as it happens, and costs nothing while nobody does."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from tests.cluster.command_net import Cluster, Node
from tests.modules.world import HOST
from xmppd.admin import watch as module
from xmppd.admin.watch import Event
from xmppd.errors import CommandError
from xmppd.events import SessionBound, SessionClosed

ONE, TWO = "xmppd@node01", "xmppd@node02"


class Eye:
    """Somebody who watches."""

    def __init__(self, events: AsyncGenerator[Event | None, None]) -> None:
        self._events = events
        self._next: asyncio.Future[Event | None] = asyncio.ensure_future(anext(events))

    async def sees(self) -> Event | None:
        event = await asyncio.wait_for(self._next, 5)
        self._next = asyncio.ensure_future(anext(self._events))
        return event

    async def close(self) -> None:
        self._next.cancel()
        await asyncio.gather(self._next, return_exceptions=True)
        await self._events.aclose()


async def watching(node: Node, *argv: str) -> Eye:
    eye = Eye((await node.run("watch", *argv, patient=True)).value)
    await asyncio.sleep(0)
    await node.calls.barrier()
    return eye


async def come(node: Node, user: str, resource: str) -> Any:
    client = node.login(user, resource)
    client.session.bound()
    return client


async def test_sessions_of_every_node_are_seen_as_they_come_and_go(cluster: Cluster) -> None:
    one, two = await cluster.add(ONE, TWO)
    eye = await watching(one)

    phone = await come(two, "juliet", "phone")
    opened = await eye.sees()
    await come(one, "romeo", "orchard")
    here = await eye.sees()
    phone.session.close(clean=True)
    closed = await eye.sees()

    assert opened is not None
    assert opened[1:] == ("session_opened", TWO, f"juliet@{HOST}/phone", "c2s 192.0.2.7 5222")
    assert opened.time.endswith("Z")
    assert here is not None
    assert here[1:4] == ("session_opened", ONE, f"romeo@{HOST}/orchard")
    assert closed is not None
    assert closed[1:4] == ("session_closed", TWO, f"juliet@{HOST}/phone")
    await eye.close()


@pytest.mark.parametrize("wanted", [f"juliet@{HOST}/phone", f"JULIET@{HOST}", HOST])
async def test_a_filter_shows_one_session_one_user_or_one_host(cluster: Cluster, wanted: str) -> None:
    one, two = await cluster.add(ONE, TWO)
    eye = await watching(one, wanted)
    seen = {"juliet/phone"} if "/" in wanted else {"juliet/phone", "juliet/balcony"}
    seen |= {"romeo/orchard"} if wanted == HOST else set()

    for user, resource in (("romeo", "orchard"), ("juliet", "balcony"), ("juliet", "phone")):
        await come(two, user, resource)
    found = [await eye.sees() for _ in seen]

    assert {event.jid.replace(f"@{HOST}", "") for event in found if event} == seen
    await eye.close()


async def test_nodes_that_come_and_go_are_seen(cluster: Cluster) -> None:
    (one,) = await cluster.add(ONE)
    eye = await watching(one, "nobody@localhost")

    await cluster.add(TWO)
    up = await eye.sees()
    cluster.net.kill(TWO)
    down = await eye.sees()

    assert up is not None
    assert up[1:4] == ("node_up", TWO, "")
    assert down is not None
    assert down[1:] == ("node_down", TWO, "", "killed")
    await eye.close()


async def test_the_sessions_of_a_node_that_is_lost_are_told_closed(cluster: Cluster) -> None:
    one, two = await cluster.add(ONE, TWO)
    await come(two, "juliet", "phone")
    await cluster.settle()
    eye = await watching(one)

    cluster.net.kill(TWO)
    found = {event.event: event for event in (await eye.sees(), await eye.sees()) if event}

    assert found["session_closed"][2:4] == (TWO, f"juliet@{HOST}/phone")
    assert found["node_down"].node == TWO
    await eye.close()


async def test_a_node_that_comes_later_is_watched_too(cluster: Cluster) -> None:
    (one,) = await cluster.add(ONE)
    eye = await watching(one)

    (two,) = await cluster.add(TWO)
    await eye.sees()
    await cluster.settle()
    await come(two, "juliet", "phone")

    event = await eye.sees()
    assert event is not None
    assert event[1:3] == ("session_opened", TWO)
    await eye.close()


async def test_nothing_listens_while_nobody_watches(cluster: Cluster) -> None:
    one, two = await cluster.add(ONE, TWO)
    eye, other = await watching(one), await watching(one)
    assert two.hooks.wants(SessionBound)

    await eye.close()
    await one.calls.barrier()
    assert two.hooks.wants(SessionBound)

    await other.close()
    await one.calls.barrier()
    for node in (one, two):
        assert not node.hooks.wants(SessionBound)
        assert not node.hooks.wants(SessionClosed)


async def test_a_watcher_who_is_gone_with_its_node_is_forgotten(cluster: Cluster) -> None:
    one, two = await cluster.add(ONE, TWO)
    eye = await watching(one)
    assert two.hooks.wants(SessionBound)

    cluster.net.kill(ONE)

    assert not two.hooks.wants(SessionBound)
    await eye.close()


async def test_a_slow_watcher_is_told_what_it_has_missed(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAITING", 3)
    (one,) = await cluster.add(ONE)
    eye = await watching(one)
    await come(one, "juliet", "0")
    await eye.sees()
    await asyncio.sleep(0)

    for number in range(1, 9):
        await come(one, "juliet", str(number))
    found = [await eye.sees() for _ in range(4)]

    assert [event.event for event in found if event] == ["lost", *["session_opened"] * 3]
    assert found[0] is not None
    assert found[0].detail.startswith("5 events")
    assert [event.jid[-1] for event in found[1:] if event] == ["6", "7", "8"]
    await eye.close()


async def test_silence_is_broken_by_signs_of_life(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ALIVE", 0.01)
    (one,) = await cluster.add(ONE)
    eye = await watching(one)

    assert await eye.sees() is None
    assert await eye.sees() is None
    await eye.close()


async def test_it_ends_after_the_seconds_that_were_asked_for(cluster: Cluster) -> None:
    (one,) = await cluster.add(ONE)

    asking = asyncio.ensure_future(one.frames({"argv": ["watch", "", "1"], "json": True}))
    await one.until(lambda: one.hooks.wants(SessionBound))
    await come(one, "juliet", "phone")
    frames = await asking

    lines = "".join(frame.get("out", "") for frame in frames).splitlines()
    assert [json.loads(line)["jid"] for line in lines] == [f"juliet@{HOST}/phone"]
    assert frames[-1]["code"] == 0
    assert not one.hooks.wants(SessionBound)


async def test_who_needs_an_end_has_to_say_when(cluster: Cluster) -> None:
    (one,) = await cluster.add(ONE)

    for seconds in ((), ("", "0"), ("", "31"), ("", "-1")):
        with pytest.raises(CommandError, match="seconds") as caught:
            await one.run("watch", *seconds)
        assert caught.value.code == 2
    with pytest.raises(CommandError, match="malformed JID"):
        await one.run("watch", "a b@c", "1")
    assert (await one.run("watch", "", "1")).json() == "[]\n"


async def test_another_node_can_be_asked_to_watch(cluster: Cluster) -> None:
    one, two = await cluster.add(ONE, TWO)
    asking = asyncio.ensure_future(one.frames({"argv": ["watch", "", "1"], "node": TWO}))
    await one.until(lambda: one.hooks.wants(SessionBound))
    await come(one, "juliet", "phone")
    await come(two, "romeo", "orchard")

    said = "".join(frame.get("out", "") for frame in await asking)

    assert sorted(line.split("\t")[3] for line in said.splitlines()) == [
        f"juliet@{HOST}/phone",
        f"romeo@{HOST}/orchard",
    ]
