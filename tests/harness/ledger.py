"""Who wrote what to whom, and what became of it: messages are numbered, and nothing else is believed."""

import asyncio
import itertools
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field

from tests.harness.cluster import ClusterNode, RealCluster
from tests.harness.raw import Raw

PASSWORD = "O, be some other name!"


@dataclass
class Account:
    """What one conversation came to: numbers in the order in which they happened."""

    sent: list[int] = field(default_factory=list)
    arrived: list[int] = field(default_factory=list)  # the first time each
    repeated: Counter[int] = field(default_factory=Counter)
    returned: set[int] = field(default_factory=set)  # the sender got an error


class Person:
    """A client that stays connected to one node, and everything it has ever got."""

    def __init__(self, ledger: "Ledger", name: str, node: ClusterNode, resource: str) -> None:
        self.ledger, self.name, self.node, self.resource = ledger, name, node, resource
        self.presences: list[tuple[str, str]] = []  # (full JID, type) in the order in which they came
        self.client: Raw | None = None

    @property
    def jid(self) -> str:
        return f"{self.name}@localhost/{self.resource}"

    async def come(self, node: ClusterNode | None = None) -> None:
        """Log in (on another node), and be available."""
        self.node = node or self.node
        self.client = Raw(self.node.certificate())
        await self.client.login(self.node.tls_port, self.name, PASSWORD, self.resource)
        await self.client.query("get", "<query xmlns='jabber:iq:roster'/>")
        self.client.send_presence()
        await self.client.sync()

    async def leave(self) -> None:
        if self.client is not None:
            self.look()
            await self.client.leave()
            self.client = None

    async def drop(self) -> None:
        """The node is gone, and the connection with it."""
        if self.client is not None:
            self.look()
            await self.client.close()
            self.client = None

    def look(self) -> None:
        """Enter what has come."""
        if self.client is None:
            return
        for got in self.client.forget():
            if got.name == "presence":
                self.presences.append((got.sender, got.type))
            elif got.name == "message":
                self.ledger.enter(self, got)

    def seen(self, other: "Person") -> list[str]:
        """The types of the presences that came from another one."""
        self.look()
        return [type for jid, type in self.presences if jid == other.jid]

    def sees(self, other: "Person") -> bool:
        seen = self.seen(other)
        return bool(seen) and seen[-1] == "available"


class Ledger:
    """All of them, and all they wrote to each other."""

    password = PASSWORD

    def __init__(self, cluster: RealCluster) -> None:
        self.cluster = cluster
        self.people: dict[str, Person] = {}
        self._accounts: dict[tuple[str, str], Account] = {}
        self._numbers = itertools.count(1)
        self._writing: list[asyncio.Task[None]] = []

    async def add(self, *places: tuple[str, ClusterNode]) -> list[Person]:
        """People who are all each other's contacts, available, and see each other."""
        first = self.cluster[0]
        for name, _ in places:
            first.register(name, PASSWORD)
        for (one, _), (other, _) in itertools.permutations(places, 2):
            first.quick("add_rosteritem", one, "localhost", other, "localhost", "", "", "both")
        added = [Person(self, name, node, "r") for name, node in places]
        for person in added:
            self.people[person.name] = person
            await person.come()
        await self.until(lambda: all(self.truth(added)), "everybody sees everybody")
        return added

    def truth(self, people: Iterable[Person] | None = None) -> list[bool]:
        """For each two who are there: whether the first sees the second."""
        there = [person for person in people or self.people.values() if person.client is not None]
        return [one.sees(other) for one, other in itertools.permutations(there, 2)]

    async def until(self, condition, what: str, patience: float = 15.0) -> float:  # type: ignore[no-untyped-def]
        """Wait until it is so; how many seconds that took."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        while not condition():
            assert loop.time() - began < patience, f"{what}: not within {patience} s\n{self.state()}"
            await asyncio.sleep(0.02)
        return loop.time() - began

    def state(self) -> str:
        lines = [f"{one.jid} on {one.node.name}: {one.presences}" for one in self.people.values()]
        for (one, other), account in self._accounts.items():
            missing = sorted(set(account.sent) - set(account.arrived) - account.returned)
            lines.append(f"{one} to {other}: {len(account.sent)} sent, missing {missing[:20]}")
        return "\n".join(lines)

    # -- writing

    def write(self, one: Person, other: Person) -> None:
        number = next(self._numbers)
        account = self._accounts.setdefault((one.name, other.name), Account())
        account.sent.append(number)
        assert one.client is not None
        one.client.send_message(f"{other.name}@localhost", str(number), id=f"{one.name}-{other.name}-{number}")

    def begin(self, people: Iterable[Person], every: float = 0.02, *, to: Iterable[Person] = ()) -> None:
        """Everybody writes to everybody, all the time; to those in `to` as well, who only read."""

        async def go_on(one: Person, other: Person) -> None:
            while True:
                if one.client is not None and not one.client.is_over:
                    self.write(one, other)
                    one.look()
                await asyncio.sleep(every)

        writers = list(people)
        for one, other in [*itertools.permutations(writers, 2), *itertools.product(writers, to)]:
            self._writing.append(asyncio.create_task(go_on(one, other)))

    async def pause(self) -> None:
        """Nobody writes any more."""
        writing, self._writing = self._writing, []
        for task in writing:
            task.cancel()
        await asyncio.gather(*writing, return_exceptions=True)

    def enter(self, reader: Person, got) -> None:  # type: ignore[no-untyped-def]
        one, other, text = got.id.split("-")
        number, account = int(text), self._accounts[one, other]
        if got.type == "error":
            assert reader.name == one
            account.returned.add(number)
        elif number in account.arrived:
            assert got.body == text
            account.repeated[number] += 1
        else:
            assert (reader.name, got.body) == (other, text)
            account.arrived.append(number)

    # -- what must hold

    def missing(self) -> int:
        """How many have neither arrived nor come back."""
        for person in self.people.values():
            person.look()
        return sum(len(set(each.sent) - set(each.arrived) - each.returned) for each in self._accounts.values())

    async def settle(self, patience: float = 15.0) -> None:
        """Wait until every message has arrived or come back."""
        await self.until(lambda: self.missing() == 0, "every message has arrived", patience)

    def arrived(self, one: Person, other: Person) -> list[int]:
        """What one has written and the other has read."""
        other.look()
        return self._accounts.setdefault((one.name, other.name), Account()).arrived

    def sent(self) -> int:
        return sum(len(each.sent) for each in self._accounts.values())

    def check(self, *, ordered: bool = True) -> int:
        """Nothing lost, in order; how many came more than once."""
        assert self.missing() == 0, self.state()
        for (one, other), account in self._accounts.items():
            in_order = not ordered or account.arrived == sorted(account.arrived)
            assert in_order, f"{one} to {other}: {disorder(account.arrived)}"
            assert len(account.sent) > 0
        return sum(each.repeated.total() for each in self._accounts.values())

    async def end(self) -> None:
        await self.pause()
        for person in self.people.values():
            with suppress(AssertionError, OSError):
                await person.leave()


def disorder(numbers: list[int]) -> str:
    wrong = next(index for index in range(1, len(numbers)) if numbers[index] < numbers[index - 1])
    return f"at {wrong} of {len(numbers)}: {numbers[max(0, wrong - 5) : wrong + 5]}"
