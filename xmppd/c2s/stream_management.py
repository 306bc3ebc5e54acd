"""Stream management (XEP-0198) without I/O: the counters of both directions, and what is behind them.

`Inbound` is what the client sent: `h` moves over a prefix of stanzas whose outcomes are settled, and over nothing else.
`Outbound` is what was sent to the client, until it says that it has it. On the wire counters are modulo 2^32; here they
are plain integers, so that a count that is too high can be told from one that is old.
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Final
from xml.sax.saxutils import quoteattr

from lxml import etree

from xmppd.delivery import ERROR, Outcome, Pending, Settled, Unsettled
from xmppd.protocol import ns
from xmppd.protocol.stanza import Stanza

MODULO: Final = 1 << 32
_DELAY: Final = f"{{{ns.DELAY}}}delay"
REQUEST: Final = f"<r xmlns='{ns.SM}'/>".encode()
_ACK: Final = f"<a xmlns='{ns.SM}' h='%d'/>".encode()


class Sent(Unsettled):
    """A stanza on its way to a client, whose sender waits for its outcome.

    `row`: its row in the spool, by then or soon; ROUTED: it cannot be kept, and its sender no longer waits; ELSEWHERE:
    the same message is another row; None: the client alone can tell."""

    __slots__ = ("row",)

    def __init__(self, stanza: Stanza) -> None:
        # One for each message: spelled out, it takes half the time.
        self.result = None
        self._decided = True
        self._failed = None
        self._settlers = None
        self._deciders = None
        self.stanza = stanza
        self.row: bytes | None = None


ROUTED: Final = b""
ELSEWHERE: Final = b"="


class HandledTooHigh(Exception):
    """The client acknowledges more than was sent to it (XEP-0198, Error Handling); counts as on the wire."""

    def __init__(self, h: int, sent: int) -> None:
        super().__init__(f"You acknowledged {h} stanzas, but only {sent} were sent.")
        self.h = h
        self.sent = sent

    @property
    def xml(self) -> bytes:
        """What goes into the stream error."""
        return f"<handled-count-too-high xmlns='{ns.SM}' h='{self.h}' send-count='{self.sent}'/>".encode()


class Inbound:
    """What the client has sent, and how much of it is settled, in order.

    `moved` is called when an answer to an <r/> would be a higher one now: `tail` gives it. `refused`: of some of it the
    client was sent an error which it has not acknowledged, so `h` means something only together with that.
    """

    __slots__ = ("_emptied", "_moved", "_resent", "_told", "_unsettled", "_wanted", "handled", "refused")

    def __init__(self, moved: Callable[[], None]) -> None:
        self.handled = 0
        self.refused = False
        self._moved: Callable[[], None] | None = moved
        self._told = 0  # the last `h` the client got
        self._wanted = 0  # what it was to be for the last <r/> to be satisfied
        # None: nothing. An empty deque takes 600 bytes, and there are sessions that only wait.
        self._unsettled: deque[tuple[Outcome, Stanza]] | None = None
        self._resent: deque[tuple[Outcome, Stanza]] | None = None
        self._emptied: Callable[[], None] | None = None

    @property
    def unsettled(self) -> int:
        """Stanzas that hold back `h`."""
        return len(self._unsettled) if self._unsettled else 0

    def add(self, outcome: Outcome, stanza: Stanza) -> None:
        """A stanza has come, and this is its outcome."""
        unsettled = self._unsettled
        if not unsettled and type(outcome) is Settled:
            self.handled += 1
            if outcome is ERROR:
                self.refused = True
            if self._told < self._wanted and self._moved is not None:
                self._moved()
            return
        if unsettled is None:
            unsettled = self._unsettled = deque()
        unsettled.append((outcome, stanza))
        if isinstance(outcome, Pending):
            outcome.then(self._settled)

    def _settled(self, result: Settled) -> None:
        unsettled = self._unsettled
        before = self.handled
        while unsettled:
            first = unsettled[0][0]
            found = first.result if isinstance(first, Pending) else first
            if found is None:
                break
            if found is ERROR:
                self.refused = True
            unsettled.popleft()
            self.handled += 1
        if self.handled > before and self._told < self._wanted and self._moved is not None:
            self._moved()
        if not unsettled and self._emptied is not None:
            emptied, self._emptied = self._emptied, None
            emptied()

    # -- acknowledgements

    def requested(self, behind: int) -> bytes:
        """The answer to an <r/>. `behind`: stanzas in front of it that have come and wait for their turn."""
        self._wanted = self.handled + self.unsettled + behind
        return self.ack()

    def ack(self) -> bytes:
        """<a/> as of now."""
        self._told = self.handled
        return _ACK % (self.handled % MODULO)

    def tail(self) -> bytes:
        """<a/> where an <r/> is not satisfied and there is something new to say."""
        return self.ack() if self._told < self._wanted and self._told < self.handled else b""

    def last_word(self) -> bytes:
        """<a/> for the end of a stream, where the client does not know it already."""
        return self.ack() if self._told < self.handled else b""

    # -- resumption

    def when_whole(self, callback: Callable[[], None]) -> None:
        """Call back once, when everything that came is settled; at once when it is so already."""
        if self._unsettled:
            self._emptied = callback
        else:
            callback()

    def undecided(self) -> Pending | None:
        """What the next stanza has to wait for."""
        if not self._unsettled:
            return None
        last = self._unsettled[-1][0]
        return last if isinstance(last, Pending) and not last.decided else None

    def rest(self) -> None:
        """There is no stream for now."""
        self._unsettled, self._resent = self._unsettled or None, self._resent or None

    def rewind(self) -> int:
        """The stream goes on from here: what is not settled will be sent again. `h` for <resumed/>."""
        again = [*(self._unsettled or ()), *(self._resent or ())]  # not all of it may have come again
        self._resent, self._unsettled = deque(again) if again else None, None
        self._told = self._wanted = self.handled
        return self.handled % MODULO

    def repeated(self, stanza: Stanza) -> Outcome | None:
        """The outcome of a stanza that came before the stream was resumed and comes again, at its place; None for a new
        one, and then whatever else was expected is not."""
        if not self._resent:
            return None
        outcome, before = self._resent[0]
        if _same(before, stanza):
            self._resent.popleft()
            return outcome
        self._resent = None
        return None

    def close(self) -> None:
        """The session is over; outcomes still count, and nobody is told."""
        self._moved = self._emptied = None
        self._resent = None


class Outbound:
    """What was sent to the client and what is to be sent to it, until it says that it has it.

    The first `written` entries are on the present stream (or were on the last one); the others follow when the client
    has acknowledged enough of them. While `open`, everything is written at once.
    """

    __slots__ = ("_queue", "_size", "_unwritten", "acknowledged", "open", "written")

    def __init__(self) -> None:
        self.acknowledged = 0
        self.written = 0
        self.open = True
        self._queue: list[Stanza | Unsettled] = []
        self._size = 0  # bytes
        self._unwritten = 0  # of which are not written

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def size(self) -> int:
        """Bytes of XML."""
        return self._size

    @property
    def end(self) -> int:
        """How many there have been in all."""
        return self.acknowledged + len(self._queue)

    def between(self, first: int, end: int) -> list[Stanza | Unsettled]:
        """Those that are still here, counted from the first one there ever was."""
        done = self.acknowledged
        return self._queue[max(0, first - done) : max(0, end - done)]

    def add(self, entry: Stanza | Unsettled, size: int) -> bool:
        """One more, of so many bytes. Whether it is to be written now."""
        self._queue.append(entry)
        self._size += size
        if self.open:
            self.written += 1
            return True
        self._unwritten += size
        return False

    def acknowledge(self, h: int) -> list[Unsettled]:
        """The client has handled `h`, modulo 2^32: what was waited for of that. HandledTooHigh."""
        count = (h - self.acknowledged) % MODULO
        if not count:
            return []
        if count > self.written:
            if MODULO - count <= min(self.acknowledged, MODULO // 2):
                return []  # less than it said before
            raise HandledTooHigh(h, (self.acknowledged + self.written) % MODULO)
        done: list[Unsettled] = []
        queue = self._queue
        for entry in queue[:count]:
            if isinstance(entry, Unsettled):
                done.append(entry)
                self._size -= len(entry.stanza.xml)
            else:
                self._size -= len(entry.xml)
        del queue[:count]
        self.written -= count
        self.acknowledged += count
        return done

    def shut(self) -> None:
        """The stream is over: what is not acknowledged will be written again."""
        self.open = False

    def rewind(self) -> None:
        """A new stream: nothing is written yet."""
        self.open = not self._queue
        self.written = 0
        self._unwritten = self._size

    def writable(self, window: int) -> Iterator[Stanza]:
        """What may be written now, up to `window` bytes that are not acknowledged; it counts as written."""
        for entry in self._queue[self.written :]:
            if self._size - self._unwritten >= window:
                return
            stanza = entry.stanza if isinstance(entry, Unsettled) else entry
            self.written += 1
            self._unwritten -= len(stanza.xml)
            yield stanza
        self.open = True

    def drop(self, gone: Callable[[Stanza | Unsettled], bool]) -> None:
        """Some of it is somebody else's business now, and will not be written again."""
        left: list[Stanza | Unsettled] = []
        for entry in self._queue:
            if gone(entry):
                self._size -= len((entry.stanza if isinstance(entry, Unsettled) else entry).xml)
            else:
                left.append(entry)
        self._queue = left

    def entries(self) -> list[Stanza | Unsettled]:
        """All that is not acknowledged, oldest first."""
        return list(self._queue)

    def take(self) -> list[Unsettled]:
        """The session is over: whatever somebody still waits for, or what became of it is known to nobody, oldest
        first."""
        left = [
            entry
            for entry in self._queue
            if isinstance(entry, Unsettled)
            and (entry.result is None or (isinstance(entry, Sent) and entry.row is not None))
        ]
        self._queue.clear()
        self.written = self._size = self._unwritten = 0
        self.open = False
        return left


def failed(condition: str, h: int | None = None) -> bytes:
    """<failed/> with a stanza error condition; `h` where a session is known that has ended."""
    count = "" if h is None else f" h='{h}'"
    return f"<failed xmlns='{ns.SM}'{count}><{condition} xmlns='{ns.STANZA_ERRORS}'/></failed>".encode()


def enabled(id: str = "", max: int = 0, location: str = "") -> bytes:
    """<enabled/>; with an id the stream can be resumed within `max` seconds."""
    if not id:
        return f"<enabled xmlns='{ns.SM}'/>".encode()
    where = f" location={quoteattr(location)}" if location else ""
    return f"<enabled xmlns='{ns.SM}' id={quoteattr(id)} resume='true' max='{max}'{where}/>".encode()


def resumed(previd: str, h: int) -> bytes:
    return f"<resumed xmlns='{ns.SM}' previd={quoteattr(previd)} h='{h}'/>".encode()


def _same(one: Stanza, other: Stanza) -> bool:
    """Whether it is the same stanza again: clients may write it in another way, and say since when it has waited."""
    if (one.kind, one.type, one.id, one.to) != (other.kind, other.type, other.id, other.to):
        return False
    return one.xml == other.xml or _canonical(one) == _canonical(other)


def _canonical(stanza: Stanza) -> bytes:
    element = stanza.editable()
    for delay in element.findall(_DELAY):
        element.remove(delay)
    found: bytes = etree.tostring(element, method="c14n")
    return found
