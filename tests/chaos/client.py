"""A client of scripts/chaos: it writes to its peer, loses its connections, and comes back, again and again.

With stream management it resumes, on whichever node it gets, and sends again what was not acknowledged when it cannot:
with the same ids. It has handled a message when its <a/> covers it; what it had not handled when it lost the stream is
forgotten, as by an application that crashed.
"""

import asyncio
import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tests.chaos.book import Account, Book
from tests.chaos.stream import SM, Got, Refused, Stream

PATIENCE: Final = 8.0  # seconds to log in or resume
SILENCE: Final = 6.0  # seconds without an answer until a client gives up a connection
WINDOW: Final = 400  # messages a client leaves unacknowledged before it waits
REQUEST: Final = f"<r xmlns='{SM}'/>"
_RESUMES: Final = 8  # attempts


@dataclass(frozen=True, slots=True)
class Habits:
    """What a client is like."""

    managed: bool = True  # has stream management
    delay: float = 0.0  # seconds it takes to handle what has come
    slow: bool = False  # stops reading now and then
    floods: bool = False
    same_id: bool = False  # for everything it sends
    resume: int = 30  # seconds it asks for

    @property
    def name(self) -> str:
        kind = "managed" if self.managed else "plain"
        more = [
            word for word, is_so in (("slow", self.slow), ("floods", self.floods), ("same-id", self.same_id)) if is_so
        ]
        return " ".join([kind, *([f"{self.delay * 1000:.0f}ms"] if self.managed else []), *more])


LATE: Final = Habits(delay=0.3)
KINDS: Final = (
    Habits(),
    Habits(delay=0.05),
    LATE,
    Habits(floods=True),
    Habits(delay=0.05, slow=True),
    Habits(managed=False),
    Habits(delay=0.3, floods=True, resume=3),
    Habits(same_id=True),
    Habits(resume=2),
    Habits(managed=False, same_id=True),
)


class Client:
    """`live` until `calm` and `leave`. `places` gives the ports of the nodes that are to be tried, by node number."""

    def __init__(
        self,
        name: str,
        peer: str,
        habits: Habits,
        book: Book,
        places: Callable[[], dict[int, int]],
        dice: random.Random,
        counts: Counter[str],
    ) -> None:
        self.name, self.habits = name, habits
        self.book, self.places, self.dice, self.counts = book, places, dice, counts
        self.account = book.open(Account(name, peer, managed=habits.managed, id="again" if habits.same_id else ""))
        self.stream: Stream | None = None
        self.up = False
        self.node = -1
        self.absence = 0.0  # seconds to stay away after the next loss of the stream
        self.calm = False  # behaves as well as it can
        self.silent = 0.0  # since when it has been asking
        self.received_at = 0.0  # the last message
        self.failure = ""  # of the last attempt
        self._to = f"{peer}@localhost"
        self._salted: dict[str, bytes] = {}
        self._gone = asyncio.Event()
        self._id = ""  # of the session that can be resumed
        self._id_node = -1
        self._forgotten = False  # nobody knows what had arrived: it closed the stream, or the node that had it is dead
        self._pending: deque[int] = deque()  # numbers (0: another stanza) that no <a/> covers
        self._base = 0  # how many it covers
        self._received: deque[tuple[str, int, str, bool] | None] = deque()  # and not handled
        self._handled = 0
        self._counting = False

    # -- its life

    async def live(self) -> None:
        while True:
            self._gone.clear()
            try:
                async with asyncio.timeout(PATIENCE):
                    await self._come()
            except (OSError, Refused, TimeoutError) as exc:
                self.counts["attempts that failed"] += 1
                self.failure = repr(exc)
                self._drop()
                await asyncio.sleep(self.dice.uniform(0.05, 0.4))
                continue
            await self._gone.wait()
            absence, self.absence = self.absence, 0.0
            await asyncio.sleep(absence or self.dice.uniform(0, 0.3))

    async def _come(self) -> None:
        places = self.places()
        if not places:
            raise Refused("no node is there")
        self.node = self.dice.choice(list(places))
        self.stream = stream = await Stream.open(places[self.node], self)
        await stream.authenticate(self.name, "secret", self._salted)
        if not (self._id and await self._resume(stream)):
            await self._begin(stream)
        self.up = True
        stream.start()

    async def _resume(self, stream: Stream) -> bool:
        answer = await stream.resume(self._id, self._handled)
        if answer.name == "failed":
            self.counts["resumptions that failed"] += 1
            self._id = ""
            self._forgotten = "h" not in answer.attributes
            if "h" in answer.attributes:
                self._acknowledged(int(answer.attributes["h"]))
            return False
        self.counts["resumed on the same node" if self.node == self._id_node else "resumed on another node"] += 1
        self._id_node = self.node
        self._acknowledged(int(answer.attributes["h"]))
        self._write_again(list(self._pending))
        return True

    async def _begin(self, stream: Stream) -> None:
        """A new session."""
        self.counts["logins"] += 1
        await stream.bind("chaos")
        enabled = await stream.enable(self.habits.resume) if self.habits.managed else None
        # Nothing of the old one is forgotten before: until here an attempt may fail.
        again = [number for number in self._pending if number]
        self._pending.clear()
        self._base = self._handled = 0
        self.account.new_stream()
        self.account.write_again(again, forgotten=self._forgotten)
        self._forgotten = False
        if enabled is not None:
            self._id, self._id_node = enabled.attributes.get("id", ""), self.node
            self._counting = True
            self._pending.append(0)
            self._pending.extend(again)
        stream.write("<presence/>")
        self._write_again(again)

    def _write_again(self, numbers: list[int]) -> None:
        assert self.stream is not None
        self.counts["sent again"] += sum(number > 0 for number in numbers)
        self.stream.write("".join(self._xml(number) for number in numbers))
        if self._counting and self._pending:
            self.ask()

    def leave(self) -> None:
        """Close the stream in order, and with it the session."""
        if self.stream is not None and self.up:
            self._id = ""
            self._forgotten = True
            self.stream.close()

    def vanish(self) -> None:
        if self.stream is not None and self.up:
            self.counts["resets"] += 1
            if not self.habits.managed:
                self.stream.take_rest()
            self.stream.reset()

    def pause(self, seconds: float) -> None:
        """Read nothing for so long."""
        if self.stream is not None and self.up:
            self.stream.pause()
            asyncio.get_running_loop().call_later(seconds, self.stream.go_on)

    def end(self) -> None:
        self._drop()

    def _drop(self) -> None:
        stream, self.stream, self.up = self.stream, None, False
        if stream is not None:
            stream.reset()

    def over(self) -> None:
        """The stream is lost."""
        self.up = False
        self.silent = 0.0
        self._received.clear()
        self._gone.set()

    # -- writing

    @property
    def unacknowledged(self) -> int:
        return len(self._pending)

    def write(self, count: int) -> int:
        """Up to so many messages; how many."""
        if not self.up or self.stream is None:
            return 0
        if self.habits.managed:
            count = min(count, WINDOW - len(self._pending))
        if count <= 0:
            return 0
        numbers = [self.account.write() for _ in range(count)]
        self.book.sent += count
        if self._counting:
            self._pending.extend(numbers)
        self.stream.write("".join(map(self._xml, numbers)) + (REQUEST if self._counting else ""))
        return count

    def _xml(self, number: int) -> str:
        if not number:
            return "<presence/>"
        return (
            f"<message to='{self._to}' type='chat' id='{self.account.id(number)}'><body>{number} by the light of the "
            "moon</body></message>"
        )

    def ask(self) -> None:
        """For an acknowledgement."""
        if self._counting and self.up and self.stream is not None:
            self.stream.write(REQUEST)

    def look(self, now: float) -> None:
        """Every second or so: is the server still there?"""
        if not self.up or self.stream is None or not self._counting:
            return
        if self.stream.last_heard < now - SILENCE and self.silent and self.silent < now - SILENCE:
            self.counts["given up as silent"] += 1
            self.stream.reset()
        elif self._pending or self.stream.last_heard < now - 2:
            self.silent = self.silent or now
            self.ask()

    # -- reading

    def arrived(self, got: Got) -> None:
        self.silent = 0.0
        name = got.name
        if name == "message":
            self.received_at = asyncio.get_running_loop().time()
            entry = self._read(got)
        elif name == "r":
            self._answer()
            return
        elif name == "a":
            self._acknowledged(int(got.attributes["h"]))
            return
        elif name in ("presence", "iq"):
            entry = None
        else:
            self.counts[f"stream errors: {', '.join(sorted(child.rpartition(' ')[2] for child in got.children))}"] += 1
            return
        if self._counting:
            self._received.append(entry)
        elif entry is not None:
            self.book.arrive(self.name, *entry, self.node)

    def _read(self, got: Got) -> tuple[str, int, str, bool] | None:
        sender = got.attributes.get("from", "").partition("@")[0]
        number = int((got.body or "0").split()[0])
        if got.attributes.get("type") == "error":
            self.counts[f"errors: {', '.join(child.rpartition(' ')[2] for child in got.children[-1:])}"] += 1
            self.account.give_back(number)
            return None
        return sender, number, got.attributes.get("id", ""), "urn:xmpp:delay delay" in got.children

    def _answer(self) -> None:
        if self.habits.delay and not self.calm:
            asyncio.get_running_loop().call_later(self.habits.delay, self._handle, self.stream)
        else:
            self._handle(self.stream)

    def _handle(self, stream: Stream | None) -> None:
        """All that has come, and say so."""
        if stream is None or stream is not self.stream or stream.lost:
            return
        received = self._received
        self._handled += len(received)
        for entry in received:
            if entry is not None:
                self.book.arrive(self.name, *entry, self.node)
        received.clear()
        stream.write(f"<a xmlns='{SM}' h='{self._handled}'/>")

    def _acknowledged(self, h: int) -> None:
        pending = self._pending
        count = h - self._base
        if not 0 <= count <= len(pending):
            self.account.wrong.append(
                {"from": self.name, "what": f"h={h} with {self._base} and {len(pending)} pending"}
            )
            return
        for _ in range(count):
            if number := pending.popleft():
                self.account.acknowledge(number, self.node)
        self._base = h
