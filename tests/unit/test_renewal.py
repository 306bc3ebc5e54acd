"""Who is shown to a node that is back, when it is back twice."""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from modules.presence.renewal import Renewal
from xmppd.log import get_logger
from xmppd.protocol.jid import JID, parse

NODE = b"n" * 16


@dataclass
class Resource:
    jid: JID
    priority: int | None = 0


class People:
    """The sessions of this node, and those of the other one."""

    def __init__(self, here: list[str], there: list[str]) -> None:
        self.here, self.there = here, there

    def on_node(self, node: bytes) -> Iterable[Resource]:
        return [Resource(parse(one)) for one in self.there]

    def local(self) -> Iterable[Any]:
        return list(self.here)


class Play:
    """`known`: whose contacts are in memory; for the others the way to the database is taken, `gate` lets it end."""

    def __init__(self, *, here: list[str], there: list[str]) -> None:
        self.people = People(here, there)
        self.known: set[str] = set()
        self.shown: list[str] = []
        self.gate = asyncio.Event()
        self.renewal = Renewal(
            None,  # type: ignore[arg-type]  # called for hundreds of presences only
            self.people,  # type: ignore[arg-type]
            show=self.show,
            know=self.know,
            log=get_logger("test"),
        )

    def show(self, session: Any, users: set[str], node: bytes, /) -> int:
        if session not in self.known:
            raise LookupError(session)
        self.shown.append(session)
        return 1

    async def know(self, session: Any) -> None:
        await self.gate.wait()
        self.known.add(session)


async def test_who_is_back_twice_is_shown_everybody_the_second_time() -> None:
    play = Play(here=["romeo"], there=["juliet@capulet.example/balcony"])
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(play.renewal.run(NODE, "node02"))
        await asyncio.sleep(0)
        tasks.create_task(play.renewal.run(NODE, "node02"))
        await asyncio.sleep(0)
        play.gate.set()
    assert play.shown.count("romeo") >= 1


async def test_a_first_run_that_ends_late_does_not_end_the_second() -> None:
    play = Play(here=["romeo"], there=["juliet@capulet.example/balcony"])
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(play.renewal.run(NODE, "node02"))
        await asyncio.sleep(0)  # it waits for the contacts of its last session
        play.people.here.append("mercutio")
        play.known.add("mercutio")
        second = tasks.create_task(play.renewal.run(NODE, "node02"))
        await asyncio.sleep(0)
        play.gate.set()
        await second
    assert "mercutio" in play.shown, "the first run took away the place of the second one"


async def test_a_third_time_comes_after_the_two() -> None:
    play = Play(here=["romeo"], there=["juliet@capulet.example/balcony"])
    play.gate.set()
    for _ in range(3):
        await play.renewal.run(NODE, "node02")
    assert play.shown == ["romeo"] * 3
