"""What must hold for a stream whatever the client sends; expat, which shares nothing with lxml, is the judge."""

import random
import re
from dataclasses import dataclass, field
from typing import Any, Final
from xml.parsers import expat

from tests.fuzz.mutate import cut
from tests.harness.xml import HEADER, SEPARATOR, Node, inside_a_stream, parse_stream, with_attribute
from xmppd.errors import StanzaError, StreamError
from xmppd.protocol import stanza as stanzas
from xmppd.protocol.jid import parse
from xmppd.protocol.names import KNOWN_NAMES
from xmppd.protocol.stanza import Stanza, neutral
from xmppd.protocol.stream import Event, Limits, Nonza, Stream, StreamClosed, StreamOpened

ROMEO: Final = parse("romeo@localhost/orchard")
AMPLE: Final = Limits(size=1 << 20, names=100_000)
_LANG: Final = "http://www.w3.org/XML/1998/namespace lang"
_KINDS: Final = {f"jabber:client {kind}": kind for kind in ("message", "presence", "iq")}
_TAG: Final = re.compile(rb"""<(?:[^<>"']++|"[^"]*+"|'[^']*+')*+>""")
_BETWEEN: Final = b"<between/>"
# Of expat: a prefix undeclared, "xml" or "xmlns" declared, their namespaces given to others; and an attribute twice,
# for of two declarations libxml2 drops the one that undeclares.
_FORGIVEN: Final = (28, 38, 39, 40, 8)
_BLANKS: Final = (b" ", b"\t", b"\r", b"\n")
_BLANK_RUN: Final = re.compile(rb">[ \t\r\n]{16,59}<")


@dataclass(slots=True)
class _Unit:
    """A child of the root, finished or not, as expat sees it."""

    start: int
    node: Node | None = None
    end: int = 0
    elements: int = 0
    depth: int = 0
    empty: bool = False  # one tag
    names: int = 0  # novel ones of the stream, up to and with this unit


@dataclass(slots=True)
class _Judge:
    """All of the input in the eyes of expat, up to its first fault."""

    data: bytes
    header: dict[str, str] | None = None
    header_end: int = 0
    units: list[_Unit] = field(default_factory=list)
    faultless: bool = True
    forgiven: bool = False  # the fault is one that libxml2 overlooks, and what it overlooks does not travel
    parser: Any = None
    novel: set[str] = field(default_factory=set)
    stack: list[tuple[str, tuple[tuple[str, str], ...], list[Any]]] = field(default_factory=list)

    def read(self) -> "_Judge":
        self.parser = expat.ParserCreate(namespace_separator=SEPARATOR)
        self.parser.StartElementHandler = self._start
        self.parser.EndElementHandler = self._end
        self.parser.CharacterDataHandler = self._text
        try:
            self.parser.Parse(self.data, False)
        except expat.ExpatError as error:
            self.faultless = False
            self.forgiven = error.code in _FORGIVEN
        except LookupError:  # another encoding
            self.faultless = False
        return self

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        self.novel.update(_clark(each) for each in (name, *attributes) if _clark(each) not in KNOWN_NAMES)
        named = {key.replace(SEPARATOR, " "): value for key, value in attributes.items()}
        if not self.stack:
            self.header, self.header_end = named, self._behind(self.parser.CurrentByteIndex)
        self.stack.append((name.replace(SEPARATOR, " "), tuple(sorted(named.items())), []))
        depth = len(self.stack) - 1
        if depth == 1:
            start = self.parser.CurrentByteIndex
            self.units.append(_Unit(start, empty=self.data[self._behind(start) - 2] == 47))
        if depth:
            unit = self.units[-1]
            unit.elements += 1
            unit.depth = max(unit.depth, depth)
            unit.names = len(self.novel)

    def _end(self, name: str) -> None:
        tag, attributes, children = self.stack.pop()
        node = (tag, attributes, tuple(children))
        if len(self.stack) == 1:
            unit = self.units[-1]
            unit.node = node
            unit.end = self._behind(unit.start if unit.empty else self.parser.CurrentByteIndex)
        elif self.stack:
            self.stack[-1][2].append(node)

    def _text(self, data: str) -> None:
        if len(self.stack) > 1:
            children = self.stack[-1][2]
            if children and isinstance(children[-1], str):
                children[-1] += data
            else:
                children.append(data)

    def _behind(self, index: int) -> int:
        tag = _TAG.match(self.data, index)
        assert tag is not None
        return tag.end()

    @property
    def finished(self) -> list[_Unit]:
        return [unit for unit in self.units if unit.node is not None]


def check(data: bytes, seed: int) -> str:
    """Feed the input in two ways; the seed decides on limits, binding and cuts. Returns how the stream stood then."""
    rng = random.Random(seed)
    limits = AMPLE if rng.random() < 0.4 else _limits(rng)
    bound = rng.random() < 0.6
    judge = _Judge(data).read()
    ends = [judge.header_end, *(unit.end for unit in judge.finished)]
    whole, pieces = (
        ([data], cut(rng, data, ends)) if rng.random() < 0.5 else (cut(rng, data, ends), cut(rng, data, ends))
    )
    # Fed in turns, for names and documents of the two to be mixed up if that can be.
    one, other = Stream(limits), Stream(limits)
    found: tuple[list[Event], list[Event]] = ([], [])
    for number in range(max(len(whole), len(pieces))):
        for stream, parts, out in ((one, whole, found[0]), (other, pieces, found[1])):
            if bound and number == 0:
                stream.bind(ROMEO)
            if number < len(parts):
                _receive(stream, parts[number], out)
    _agree(found[0], found[1], data, limits)
    for events in found:
        _examine(events, judge, limits, bound)
    _within(found[0], one, judge, limits)
    if limits is not AMPLE:
        _narrower(found[0], data, bound)
    _begin_again(one, limits, rng)
    other.release()
    last = found[0][-1] if found[0] else None
    return last.condition if isinstance(last, StreamError) else type(last).__name__


def _limits(rng: random.Random) -> Limits:
    return Limits(
        size=rng.choice([150, 300, 1000, 10_000]),
        depth=rng.choice([1, 2, 4, 64]),
        elements=rng.choice([1, 3, 6, 10_000]),
        names=rng.choice([0, 2, 6, 1000]),
        total=rng.choice([None, None, 2, 8]),
    )


def _clark(name: str) -> str:
    uri, separator, local = name.partition(SEPARATOR)
    return f"{{{uri}}}{local}" if separator else name


def _receive(stream: Stream, piece: bytes, out: list[Event]) -> None:
    was_over = stream.ended
    came = stream.receive(piece)
    assert not (was_over and came), f"events after the end: {came}"
    for event in came[:-1]:
        assert not isinstance(event, StreamError | StreamClosed), "events behind the last"
    assert stream.ended == (was_over or (bool(came) and isinstance(came[-1], StreamError | StreamClosed)))
    out += came


def _shape(event: Event) -> object:
    if isinstance(event, Stanza):
        node = inside_a_stream(event.xml)
        return ("stanza", event.kind, event.type, event.id, event.to, event.from_, event.malformed, node)
    if isinstance(event, Nonza):
        return ("nonza", event.element.tag)
    return ("error", event.condition) if isinstance(event, StreamError) else event


def _is_error(shape: object) -> bool:
    return isinstance(shape, tuple) and shape[0] == "error"


def _agree(one: list[Event], other: list[Event], data: bytes, limits: Limits) -> None:
    """Equal, but that a fault inside an unfinished stanza may be noticed later: the parser reads ahead as it likes."""
    shorter, longer = sorted(([_shape(event) for event in events] for events in (one, other)), key=len)
    ends = [shorter[-1:], longer[-1:]]
    if limits is not AMPLE and (_BLANK_RUN.search(data) or sum(map(data.count, _BLANKS)) > limits.size):
        # Blanks are counted by reads, so the cuts decide when they are too many.
        kept = [[shape for shape in shapes if not _is_error(shape)] for shapes in (shorter, longer)]
        shorter, longer = (shapes[: min(map(len, kept))] for shapes in kept)
    elif len(shorter) < len(longer) and longer[-1] in (("error", "not-well-formed"), ("error", "restricted-xml")):
        del longer[-1]
    elif (
        limits is not AMPLE and [("error", "policy-violation")] in ends
    ):  # of two faults, the one that is noticed first
        del shorter[-1:], longer[-1:]
    elif len(shorter) == len(longer) == 1 and all(isinstance(found[0], StreamError) for found in (one, other)):
        return  # the prolog has several
    assert shorter == longer, f"cut otherwise it is another stream: {shorter} {longer}"


def _examine(events: list[Event], judge: _Judge, limits: Limits, bound: bool) -> None:
    """Each event is a child of the root for expat, too, and a stanza says there what it says here."""
    units = judge.finished
    out: list[tuple[bytes, Node]] = []
    total = 0
    before = judge.header_end
    number = 0
    for index, event in enumerate(events):
        assert isinstance(event, StreamOpened) == (index == 0 and not isinstance(event, StreamError))
        if isinstance(event, StreamOpened):
            header = judge.header
            if header is None:  # a tag may be reported before its last character turns out to be wrong
                assert [type(each) for each in events[1:]] == [StreamError], "a header that is none"
                break
            assert event == StreamOpened(*(header.get(name) for name in ("to", "from", "version", _LANG, "id")))
            assert judge.header_end - _leading(judge.data, 0) <= limits.size, "a header over the size limit"
        if not isinstance(event, Stanza | Nonza):
            continue
        if number >= len(units) and judge.forgiven:
            if isinstance(event, Stanza):
                out.append((event.xml, _meant(event, inside_a_stream(event.xml), {}, bound)))
                out += _derived(event, bound)
            continue
        assert number < len(units), f"more stanzas than expat sees: {event}"
        unit = units[number]
        number += 1
        assert unit.end - unit.start <= limits.size, f"{unit.end - unit.start} bytes, {limits.size} allowed"
        assert not judge.data[before : unit.start].strip(b" \t\r\n"), "text between stanzas"
        before = unit.end
        assert unit.depth <= limits.depth, f"{unit.depth} levels, {limits.depth} allowed"
        assert unit.elements <= limits.elements, f"{unit.elements} elements, {limits.elements} allowed"
        assert unit.names <= limits.names, f"{unit.names} names, {limits.names} allowed"
        total += unit.elements
        assert limits.total is None or total <= limits.total, f"{total} elements in all, {limits.total} allowed"
        assert unit.node is not None
        if isinstance(event, Nonza):
            uri, _, local = unit.node[0].rpartition(" ")
            assert event.element.tag == f"{{{uri}}}{local}"
            assert uri not in ("", "jabber:client", "jabber:server")
        else:
            out.append((event.xml, _meant(event, unit.node, judge.header or {}, bound)))
            out += _derived(event, bound)
    _deliver(out)


def _leading(data: bytes, start: int) -> int:
    """How much white space comes first."""
    return len(data) - start - len(data[start:].lstrip(b" \t\r\n"))


def _meant(event: Stanza, node: Node, header: dict[str, str], bound: bool) -> Node:
    """What a recipient has to see of a stanza."""
    attributes = dict(node[1])
    assert _KINDS.get(node[0]) == event.kind
    assert event.id == attributes.get("id", "")
    assert event.type == (attributes.get("type") or stanzas.DEFAULT_TYPES[event.kind])
    assert event.from_ == (ROMEO if bound else None)
    if _LANG in header and _LANG not in attributes:
        node = with_attribute(node, _LANG, header[_LANG])
    if bound:
        claimed = attributes.get("from")
        assert claimed is None or parse(claimed).full in (ROMEO.full, ROMEO.bare), f"sent as {claimed!r}"
        node = with_attribute(node, "from", ROMEO.full)
    return node


def _derived(event: Stanza, bound: bool) -> list[tuple[bytes, Node]]:
    """Other stanzas that the server makes of this one's bytes, and what they have to be."""
    node = inside_a_stream(event.xml)
    again = Stanza(event.kind, event.type, event.id, None, None, event.xml)
    assert neutral(again.element), "cannot be read from storage"
    out = [(neutral(again.editable()), node)]
    child = b"<delay xmlns='urn:xmpp:delay'/>"
    out.append((stanzas.with_child(event, child).xml, (node[0], node[1], (*node[2], ("urn:xmpp:delay delay", (), ())))))
    if "to" not in dict(node[1]):
        out.append((event.addressed(ROMEO).xml, with_attribute(node, "to", ROMEO.full)))
    if bound and not event.malformed and dict(node[1]).get("to") != "":
        read = Stanza.from_bytes(event.xml)
        assert (read.kind, read.type, read.id, read.to, read.from_) == (
            *(event.kind, event.type, event.id, event.to, event.from_),
        )
    reply = stanzas.error_reply(event, StanzaError("service-unavailable"))
    if reply is not None:
        answer = inside_a_stream(reply.xml)
        assert answer[2][: len(node[2])] == node[2]
        assert len(answer[2]) == len(node[2]) + 1
        assert dict(answer[1]).get("to") == (ROMEO.full if bound else None)
        out.append((reply.xml, answer))
    return out


def _deliver(out: list[tuple[bytes, Node]]) -> None:
    """Written one after the other to somebody's stream they are what they were, and change nothing around them."""
    written = _BETWEEN + b"".join(xml + _BETWEEN for xml, _ in out)
    children, texts, faultless = parse_stream(HEADER + written)
    assert faultless, "breaks the stream of its recipient"
    assert texts == [], f"text in the stream of its recipient: {texts}"
    between = ("jabber:client between", (), ())
    assert children == [between, *(node for _, meant in out for node in (meant, between))]
    # On a server's stream the default namespace is another one (RFC 6120 4.8.3); the number of children stays.
    others, texts, faultless = parse_stream(HEADER.replace(b"jabber:client", b"jabber:server") + written)
    assert (len(others), texts, faultless) == (len(children), [], True)


def _within(events: list[Event], stream: Stream, judge: _Judge, limits: Limits) -> None:
    """A stream that goes on holds nothing over a limit; one that keeps to all of them is not told it did not."""
    data, units = judge.data, judge.units
    if not stream.ended and not judge.forgiven:
        start = units[-1].end if units and units[-1].end else units[-1].start if units else judge.header_end
        held = len(data) - start - _leading(data, start)
        assert held <= limits.size, f"{held} bytes held, {limits.size} allowed"
    if not stream.ended and judge.faultless and units:
        unit = units[-1]
        assert unit.depth <= limits.depth, f"{unit.depth} levels held, {limits.depth} allowed"
        assert unit.elements <= limits.elements, f"{unit.elements} elements held, {limits.elements} allowed"
    last = events[-1] if events else None
    if limits.names <= len(data) or len(data) > limits.size or not isinstance(last, StreamError):
        return
    modest = all(unit.depth <= limits.depth and unit.elements <= limits.elements for unit in units)
    total = sum(unit.elements for unit in units)
    if judge.faultless and modest and (limits.total is None or total <= limits.total):
        assert last.condition != "policy-violation", f"all limits were kept: {last.text}"


def _narrower(events: list[Event], data: bytes, bound: bool) -> None:
    """Limits end a stream; they do not change what comes before."""
    stream = Stream(AMPLE)
    if bound:
        stream.bind(ROMEO)
    ample: list[Event] = []
    _receive(stream, data, ample)
    shapes = [_shape(event) for event in events if not isinstance(event, StreamError)]
    assert shapes == [_shape(event) for event in ample][: len(shapes)]


def _begin_again(stream: Stream, limits: Limits, rng: random.Random) -> None:
    """After whatever there was, a restart makes room for an ordinary stream."""
    stream.restart()
    stream.set_limits(AMPLE)
    found: list[Event] = []
    for piece in cut(rng, HEADER + b"<message id='1'/><presence/></stream:stream>", [len(HEADER)]):
        _receive(stream, piece, found)
    assert [type(event) for event in found] == [StreamOpened, Stanza, Stanza, StreamClosed], found
