"""Streams: bytes in, events out, wherever the network cuts them, and what is refused."""

import gc
import subprocess
import sys
import time
from collections.abc import Iterable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.harness.xml import HEADER, Node, inside_a_stream, parse_stream, with_attribute
from xmppd.errors import StreamError
from xmppd.protocol.jid import parse
from xmppd.protocol.stanza import Stanza, neutral
from xmppd.protocol.stream import Event, Limits, Nonza, Stream, StreamClosed, StreamOpened

ROMEO = parse("romeo@localhost/orchard")
PIECE = 64 * 1024
SIZE = 3000
LANG = "http://www.w3.org/XML/1998/namespace lang"


def events(data: bytes | Iterable[bytes], limits: Limits | None = None, bound: bool = False) -> list[Event]:
    """What a fresh stream makes of the pieces."""
    stream = Stream(limits or Limits(size=256 * 1024))
    if bound:
        stream.bind(ROMEO)
    out: list[Event] = []
    for piece in [data] if isinstance(data, bytes) else data:
        out += stream.receive(piece)
    return out


def byte_by_byte(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


def in_pieces(data: bytes) -> list[bytes]:
    return [data[i : i + PIECE] for i in range(0, len(data), PIECE)]


def shape(event: Event) -> object:
    """An event in a form that can be compared: stanzas by what they mean, errors by their condition."""
    if isinstance(event, Stanza):
        again = Stanza(event.kind, event.type, event.id, None, None, event.xml)
        assert again.element.get("id", "") == event.id  # what was let in can be read again, from storage for instance
        return ("stanza", event.kind, event.type, event.id, event.to, event.from_, inside_a_stream(event.xml))
    if isinstance(event, Nonza):
        return ("nonza", event.element.tag)
    if isinstance(event, StreamError):
        return ("error", event.condition)
    return event


def shapes(found: list[Event]) -> list[object]:
    return [shape(event) for event in found]


def both_ways(data: bytes, limits: Limits | None = None, bound: bool = False) -> list[Event]:
    """The events, which must be the same byte by byte and in 64 KiB pieces."""
    slow, fast = events(byte_by_byte(data), limits, bound), events(in_pieces(data), limits, bound)
    assert shapes(slow) == shapes(fast)
    return fast


def error_of(found: list[Event]) -> str:
    assert isinstance(found[-1], StreamError), found
    return found[-1].condition


def stanzas_of(found: list[Event]) -> list[Stanza]:
    return [event for event in found if isinstance(event, Stanza)]


# -- set-up, restart, closing


def test_header_is_reported_as_written():
    data = HEADER.replace(b" to=", b" from='romeo@localhost' xml:lang='it' id='x' to=")
    assert both_ways(data) == [StreamOpened("localhost", "romeo@localhost", "1.0", "it", "x")]


@pytest.mark.parametrize(
    "prolog",
    [
        b"<?xml version='1.0'?>",
        b'<?xml version="1.0" encoding="UTF-8"?>\n',
        b"<?xml version='1.0' encoding='utf-8' standalone='yes'?>",
        b"\xef\xbb\xbf",
        b"\xef\xbb\xbf<?xml version='1.0'?> \r\n\t",
        b"  \n",
    ],
)
def test_an_ordinary_prolog_is_accepted(prolog):
    assert isinstance(both_ways(prolog + HEADER + b"<message/>")[-1], Stanza)


@pytest.mark.parametrize(
    ("prolog", "condition"),
    [
        (b"<?xml version='1.0' encoding='ISO-8859-1'?>", "unsupported-encoding"),
        (b"<?xml version='1.0' encoding='utf-16'?>", "unsupported-encoding"),
        (b"\xff\xfe<\x00", "unsupported-encoding"),
        (b"\xfe\xff\x00<", "unsupported-encoding"),
        (b"<\x00s\x00", "unsupported-encoding"),
        (b"\x00<\x00s", "unsupported-encoding"),
        (b"<!DOCTYPE stream [<!ENTITY a 'b'>]>", "restricted-xml"),
        (b"<?xml version='1.0'?><!DOCTYPE stream SYSTEM 'http://localhost/x'>", "restricted-xml"),
        (b"<!-- hello -->", "restricted-xml"),
        (b"<?php echo ?>", "restricted-xml"),
        (b"<?xml-stylesheet href='x'?>", "restricted-xml"),
        (b"<?xml?>", "restricted-xml"),
        (b"<?xml version='1.0'?><?x y?>", "restricted-xml"),
        (b"GET / HTTP/1.1\r\n", "not-well-formed"),
        (b"\x16\x03\x01\x02\x00\x01", "not-well-formed"),
        (b"<?xml version=1.0?>", "not-well-formed"),
        (b"<?xml version='1.0'?>x", "not-well-formed"),
    ],
)
def test_another_prolog_is_refused(prolog, condition):
    found = both_ways(prolog + HEADER)
    assert error_of(found) == condition
    assert len(found) == 1


@pytest.mark.parametrize(
    ("header", "condition"),
    [
        (HEADER.replace(b"jabber:client", b"jabber:server"), "invalid-namespace"),
        (HEADER.replace(b" xmlns='jabber:client'", b""), "invalid-namespace"),
        (HEADER.replace(b"etherx", b"other"), "invalid-namespace"),
        (HEADER.replace(b"stream:stream", b"stream:flood"), "bad-format"),
        (b"<stream xmlns='http://etherx.jabber.org/streams'>", "invalid-namespace"),
        (
            b"<s:stream xmlns='jabber:client' xmlns:s='http://etherx.jabber.org/streams' to='localhost' version='1.0'>",
            "bad-namespace-prefix",
        ),
        (b"<message xmlns='jabber:client'>", "invalid-namespace"),
        (b"<stream:stream xmlns='jabber:client'>", "not-well-formed"),
    ],
)
def test_another_root_is_refused(header, condition):
    found = both_ways(header)
    assert error_of(found) == condition
    assert len(found) == 1


def test_closing_ends_the_stream_and_what_follows_is_ignored():
    found = both_ways(HEADER + b"<message/></stream:stream><message/>garbage<<<")
    assert [type(event) for event in found] == [StreamOpened, Stanza, StreamClosed]


def test_restart_expects_a_new_header():
    stream = Stream(Limits(size=10_000))
    stream.receive(HEADER + b"<auth xmlns='urn:ietf:params:xml:ns:xmpp-sasl'/><unfinish")
    stream.restart()
    assert [type(event) for event in stream.receive(b"<?xml version='1.0'?>" + HEADER)] == [StreamOpened]


def test_restart_forgets_an_error():
    stream = Stream(Limits(size=10_000))
    assert error_of(stream.receive(b"<!-- -->")) == "restricted-xml"
    stream.restart()
    assert isinstance(stream.receive(HEADER)[0], StreamOpened)


# -- what a stream may not contain


@pytest.mark.parametrize(
    ("inside", "condition"),
    [
        (b"<!-- x -->", "restricted-xml"),
        (b"<?x y?>", "restricted-xml"),
        (b"<message><!-- x --></message>", "restricted-xml"),
        (b"<message><body><?x y?></body></message>", "restricted-xml"),
        (b"<message><body>&foo;</body></message>", "restricted-xml"),
        (b"<message id='&foo;'/>", "restricted-xml"),
        (b"<message><body>&lt;&foo;</body></message>", "restricted-xml"),
        (b"<!DOCTYPE x>", "not-well-formed"),
        (b"<message><!DOCTYPE x></message>", "not-well-formed"),
        (b"<message><!ENTITY x 'y'></message>", "not-well-formed"),
        (b"text<message/>", "bad-format"),
        (b"<message/>text<message/>", "bad-format"),
        (b"<message/>&#120;<message/>", "bad-format"),
        (b"<message/><![CDATA[x]]><message/>", "bad-format"),
        (b"<message/>/><message/>", "bad-format"),
        (b"<message></iq>", "not-well-formed"),
        (b"<message to='a' to='b'/>", "not-well-formed"),
        (b"<message to=a/>", "not-well-formed"),
        (b"<message to='<'/>", "not-well-formed"),
        (b"<x:message/>", "not-well-formed"),
        (b"<message><x:body/></message>", "not-well-formed"),
        (b"<message><body>\xff</body></message>", "not-well-formed"),
        (b"<message><body>\xc0\xbc</body></message>", "not-well-formed"),
        (b"<message><body>\xed\xa0\x80</body></message>", "not-well-formed"),
        (b"<message><body>\x0b</body></message>", "not-well-formed"),
        (b"<message><body>&#0;</body></message>", "not-well-formed"),
        (b"<message><body>\x00</body></message>", "not-well-formed"),
        (b"<message><![CDATA[\x00]]></message>", "not-well-formed"),
        (b"<message x:a=''/>", "not-well-formed"),
        (b"<message><a:b:c/></message>", "not-well-formed"),
        (b"<message><stream:/></message>", "not-well-formed"),
        (b"<message :a=''/>", "not-well-formed"),
        (b"<message xmlns:x=' xmlns=\"jabber:client\"'><x:a/></message>", "not-well-formed"),
        (b"<message><a xmlns='a b'/></message>", "not-well-formed"),
        (b"<message xmlns:='u'/>", "not-well-formed"),
        (b"<message><xmlns:a/></message>", "not-well-formed"),
        (b"<message xmlns:x=''><x:a/></message>", "not-well-formed"),
        (b"<message xmlns:a='u' xmlns:b='u' a:x='1' b:x='2'/>", "not-well-formed"),
        (b"<message xmlns:a='http://etherx.jabber.org/streams' a:to='' stream:to=''/>", "not-well-formed"),
        (b"<messages/>", "unsupported-stanza-type"),
        (b"<foo/>", "unsupported-stanza-type"),
        (b"<message xmlns='jabber:server'/>", "invalid-namespace"),
        (b"<message xmlns=''/>", "invalid-namespace"),
        (b"<x:message xmlns:x='jabber:client'/>", "bad-namespace-prefix"),
        (b"<x:message xmlns:x='jabber:client'><body/></x:message>", "bad-namespace-prefix"),
        (b"<messagex:message xmlns:messagex='jabber:&#99;lient'/>", "bad-namespace-prefix"),
    ],
)
def test_what_a_stream_may_not_contain(inside, condition):
    for bound in (False, True):
        found = both_ways(HEADER + inside, bound=bound)
        assert error_of(found) == condition
        before = parse_stream(HEADER + inside)[0]
        assert len(found) - 2 <= len(before)


@pytest.mark.parametrize(
    "inside",
    [
        b"<message><body><![CDATA[<a>&b;]]></body></message>",
        b"<message><body>&lt;&gt;&amp;&quot;&apos;&#65;&#x1F600;</body></message>",
        b"<message to='juliet@localhost' id=\"o'neil>\"><body x=\"'>\" y='\">'/></message>",
        b"<message\n\tto = 'juliet@localhost'\r\n id\t=\t\"x\" ><body >a</body ></message >",
        "<message><body>Ζεύς 宙斯 \U0001f600</body></message>".encode(),
        b"<message><stream:error/></message>",
        b"<message xmlns:stream='urn:example:other'><stream:error/></message>",
        b"<iq><vCard xmlns='vcard-temp'/><x xmlns='eu.siacs.conversations.axolotl'/><y xmlns='urn:%C3%A9?a=b#c'/></iq>",
        b"<message xmlns='jabber:client'><x xmlns='urn:example:x'><y xmlns=''/></x></message>",
        b"<message xmlns='jabber:&#99;lient'><body/></message>",
        b"<message><x:body xmlns:x='jabber:client'>a</x:body></message>",
        b"<iq type='get' id=''><query xmlns='jabber:iq:roster'/></iq>",
        b"<presence/>",
        b"<message xml:id='m1' xml:space='preserve'><body xml:lang='de'> a </body></message>",
        b"<message><body>]] > ]]</body></message>",
        b"<message id=']]>'/>",
    ],
)
@pytest.mark.parametrize("behind", [b"", b" ", b"<presence/>", b"<presence", b"\r\n\r\n"])
def test_the_bytes_of_a_stanza_mean_what_was_sent(inside, behind):
    for bound in (False, True):
        stanza = stanzas_of(both_ways(HEADER + inside + behind, bound=bound))[0]
        meant = parse_stream(HEADER + inside)[0][0]
        if bound:
            meant = with_attribute(meant, "from", ROMEO.full)
        assert inside_a_stream(stanza.xml) == meant
        assert inside_a_stream(neutral(Stanza.from_bytes(stanza.xml).element)) == meant


def test_neutral_bytes_do_not_declare_the_content_namespace():
    for declared in (b"", b" xmlns='jabber:client'", b" xmlns='jabber:&#99;lient'"):
        [stanza] = stanzas_of(both_ways(HEADER + b"<message" + declared + b"><body>a</body></message>"))
        assert b"jabber:" not in stanza.xml


@pytest.mark.parametrize(
    "declaration",
    [
        b"xmlns:x=''",
        b"xmlns:xml='urn:x'",
        b"xmlns:xmlns='urn:x'",
        b"xmlns:x='http://www.w3.org/2000/xmlns/'",
        b"xmlns:x='http://www.w3.org/XML/1998/namespace'",
        b"xmlns='http://www.w3.org/2000/xmlns/'",
        b"xmlns='http://www.w3.org/XML/1998/namespace'",
    ],
)
def test_a_forbidden_declaration_does_not_travel(declaration):
    for behind in (b"", b" "):
        [stanza] = stanzas_of(events([HEADER, b"<message><a " + declaration + b"/></message>" + behind], bound=True))
        inside_a_stream(stanza.xml)


@pytest.mark.parametrize("tail", [b"foo/>", b"&amp;/>", b"/>", b"\xc3\xa9/>", b"]/>", b"foo</message>"])
def test_text_behind_a_stanza_does_not_travel_with_it(tail):
    found = events([HEADER, b"<message to='juliet@localhost'/>" + tail, b"<message/>"], bound=True)
    for stanza in stanzas_of(found):
        inside_a_stream(stanza.xml)
    assert error_of(found) in ("bad-format", "not-well-formed")


# -- white space


@pytest.mark.parametrize("piece", [b" ", b"\r\n" * 50, b"\t" * SIZE])
def test_white_space_before_the_header_is_limited(piece):
    alive = SIZE // len(piece)
    assert events([piece] * alive + [HEADER], Limits(size=SIZE)) == events(HEADER)
    assert error_of(events([piece] * (alive + 1) + [HEADER], Limits(size=SIZE))) == "policy-violation"


def test_white_space_between_stanzas_is_limited_before_authentication_only():
    for limits, more in [(Limits(size=SIZE, total=100), [StreamError]), (Limits(size=SIZE), [])]:
        found = events([HEADER, *[b"<presence/>", b" " * 100] * 20, *[b" " * 100] * 11], limits)
        assert [type(event) for event in found] == [StreamOpened] + [Stanza] * 20 + more


def test_keepalives_leave_nothing_in_the_parser():
    stream = Stream(Limits(size=1000))
    stream.receive(HEADER + b" \n ")
    for _ in range(50):
        assert stream.receive(b" \r\n\t" * 100_000) == []
        assert stream.receive(b" ") == []
        [stanza] = stream.receive(b" <message id='a'/> ")
        assert isinstance(stanza, Stanza)
        assert stream._root is not None
        assert not stream._root.text
        assert len(stream._root) == 0
    assert not stream._held


def test_white_space_inside_stanzas_is_kept():
    [stanza] = stanzas_of(both_ways(HEADER + b"<message> <body>  a\n</body>\t</message>  "))
    assert inside_a_stream(stanza.xml)[2] == (" ", ("jabber:client body", (), ("  a\n",)), "\t")


_ROOT_TEXT_ATTACK = """
from xmppd.protocol.stream import Limits, Stream
header = {header!r}
for number in range(1000, 60000, 3001):
    stream = Stream(Limits(size=10_000_000))
    stream.receive(header + b" <message/>" + b"&#32;" * number)
    for _ in range(3):
        stream.receive(b"a" * 400)
    stream.receive(b"a<b/>")
    assert stream.ended
"""


def test_text_at_the_root_cannot_corrupt_memory():
    """In its own process: the parser used to die of a segmentation fault some time after this."""
    done = subprocess.run(
        [sys.executable, "-c", _ROOT_TEXT_ATTACK.format(header=HEADER)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


# -- limits: one under lives, one over gets the error


def padded(total: int, stanza: bytes = b"<message><body>%b</body></message>") -> bytes:
    return stanza % (b"x" * (total - len(stanza) + 2))


@pytest.mark.parametrize("before", [b"", b"<presence/>" * 3, b"<presence/> \n "])
@pytest.mark.parametrize("behind", [b"", b"<presence/>", b" "])
def test_size_limit_of_a_stanza(before, behind):
    limits = Limits(size=SIZE)
    alive = both_ways(HEADER + before + padded(SIZE) + behind, limits)
    assert all(isinstance(event, Stanza) for event in alive[1:])

    dead = both_ways(HEADER + before + padded(SIZE + 1) + behind, limits)
    assert error_of(dead) == "policy-violation"
    assert len(dead) == 2 + before.count(b"<")


@pytest.mark.parametrize("cut", [1, 100, SIZE - 1, SIZE])
def test_size_limit_counts_an_unfinished_stanza(cut):
    whole = padded(2 * SIZE)
    stream = Stream(Limits(size=SIZE))
    stream.receive(HEADER)
    assert stream.receive(whole[:cut]) == []
    assert stream.receive(whole[cut:SIZE]) == []
    assert error_of(stream.receive(whole[SIZE : SIZE + 1])) == "policy-violation"


def test_size_limit_of_what_comes_before_the_root():
    limits = Limits(size=SIZE)
    declaration = b"<?xml version='1.0'" + b" " * (SIZE - 21 - len(HEADER)) + b"?>"
    assert isinstance(both_ways(declaration + HEADER, limits)[0], StreamOpened)
    assert error_of(both_ways(declaration.replace(b"?>", b"  ?>") + HEADER, limits)) == "policy-violation"
    assert error_of(both_ways(b"<?xml version='1.0'" + b" " * SIZE, limits)) == "policy-violation"


def test_size_limit_of_the_header():
    limits = Limits(size=SIZE)
    under = HEADER.replace(b" to=", b" id='" + b"x" * (SIZE - len(HEADER) - 6) + b"' to=")
    assert len(under) == SIZE
    assert isinstance(both_ways(under, limits)[0], StreamOpened)
    assert error_of(both_ways(under.replace(b"id='", b"id='x"), limits)) == "policy-violation"


def test_many_small_stanzas_in_one_read_are_not_too_large():
    data = HEADER + b"<message/>" * 5000
    assert len(data) < PIECE
    assert len(events(data, Limits(size=SIZE))) == 5001


def test_an_oversize_stanza_is_not_let_through_by_an_error_behind_it():
    for bad in (b"<!-- -->", b"</wrong>", b"\x00"):
        found = events(HEADER + b"<presence/>" + padded(SIZE + 1) + bad, Limits(size=SIZE))
        assert len(stanzas_of(found)) == 1


def test_depth_limit():
    def nested(depth: int) -> bytes:
        return HEADER + b"<message>" + b"<a>" * (depth - 1) + b"</a>" * (depth - 1) + b"</message>"

    limits = Limits(size=100_000, depth=20)
    assert isinstance(both_ways(nested(20), limits)[-1], Stanza)
    assert error_of(both_ways(nested(21), limits)) == "policy-violation"
    assert error_of(both_ways(HEADER + b"<a>" * 21, limits)) == "policy-violation"


def test_default_depth_is_within_what_the_parser_bears():
    depth = Limits(size=1).depth
    data = HEADER + b"<message>" + b"<a>" * (depth - 1) + b"</a>" * (depth - 1) + b"</message>"
    assert isinstance(both_ways(data)[-1], Stanza)


def test_element_limit():
    limits = Limits(size=100_000, elements=50)

    def stanza(elements: int) -> bytes:
        return b"<message>" + b"<a/>" * (elements - 1) + b"</message>"

    assert len(both_ways(HEADER + stanza(50) * 3, limits)) == 4
    found = both_ways(HEADER + stanza(50) + stanza(51), limits)
    assert error_of(found) == "policy-violation"
    assert len(stanzas_of(found)) == 1


def test_limit_of_all_elements_before_authentication():
    limits = Limits(size=100_000, total=10)
    assert len(both_ways(HEADER + b"<iq><a/></iq>" * 5, limits)) == 6
    found = both_ways(HEADER + b"<iq><a/></iq>" * 5 + b"<iq/>", limits)
    assert error_of(found) == "policy-violation"
    assert len(stanzas_of(found)) == 5


def test_limit_of_all_elements_goes_over_restarts():
    stream = Stream(Limits(size=100_000, total=3))
    stream.receive(HEADER + b"<iq/><iq/>")
    stream.restart()
    assert error_of(stream.receive(HEADER + b"<iq/><iq/>")) == "policy-violation"


NOVEL = {
    "elements": b"<message><n%d/></message>",
    "attributes": b"<message n%d=''/>",
    "inner attributes": b"<message><body n%d=''/></message>",
    "prefixes": b"<message xmlns:n%d='jabber:x:data'/>",
    "namespaces": b"<message><body xmlns='urn:n%d'/></message>",
    "unused namespaces": b"<message><body xmlns:stream='urn:n%d'/></message>",
    "namespaces of attributes": b"<message><body xmlns:stream='urn:n%d' stream:id=''/></message>",
}


@pytest.mark.parametrize("kind", NOVEL)
def test_limit_of_novel_names(kind):
    per_stanza = 1 if kind not in ("namespaces", "namespaces of attributes") else 2  # the name in it is novel, too
    limits = Limits(size=100_000, names=40)
    stanzas = [NOVEL[kind] % number for number in range(100)]
    allowed = 40 // per_stanza

    alive = both_ways(HEADER + b"".join(stanzas[:allowed]) * 3, limits)
    assert len(alive) == 1 + 3 * allowed

    dead = both_ways(HEADER + b"".join(stanzas[: allowed + 1]), limits)
    assert error_of(dead) == "policy-violation"
    assert len(stanzas_of(dead)) == allowed


def test_novel_names_stay_counted_over_a_restart():
    stream = Stream(Limits(size=100_000, names=10))
    stream.receive(HEADER + b"".join(b"<message a%d=''/>" % number for number in range(6)))
    stream.restart()
    found = stream.receive(HEADER + b"".join(b"<message b%d=''/>" % number for number in range(6)))
    assert error_of(found) == "policy-violation"
    assert len(stanzas_of(found)) == 4


def test_a_long_name_counts_for_several():
    limits = Limits(size=100_000, names=10)
    assert len(both_ways(HEADER + b"<message " + b"a" * 1150 + b"=''/>", limits)) == 2
    assert error_of(both_ways(HEADER + b"<message " + b"a" * 1300 + b"=''/>", limits)) == "policy-violation"


@pytest.mark.slow
def test_many_attributes_cost_as_much_as_many_elements():
    """Of one element as of many; it was twenty times as much, 2 s for one read."""
    spent = []
    for stanza in (
        b"<message><a" + b"".join(b" a%d=''" % number for number in range(800)) + b"/></message>",
        b"<message>" + b"".join(b"<a a%d=''/>" % number for number in range(800)) + b"</message>",
    ):
        stream = Stream(Limits(size=100_000))
        stream.receive(HEADER)
        stream.receive(stanza)
        before = time.process_time()
        for _ in range(20):
            stream.receive(stanza)
        spent.append(time.process_time() - before)
        assert not stream.ended
    assert spent[0] < 3 * spent[1]


def test_ordinary_names_are_not_novel():
    stanza = (
        b"<message to='a@b' from='c@d' type='chat' id='1' xml:lang='en'><subject/><body>a</body><thread/>"
        b"<active xmlns='http://jabber.org/protocol/chatstates'/><request xmlns='urn:xmpp:receipts'/>"
        b"<origin-id xmlns='urn:xmpp:sid:0' id='1'/></message><presence><show/><status/><priority/></presence>"
        b"<iq type='set'><query xmlns='jabber:iq:roster'><item jid='' name='' subscription=''>"
        b"<group/></item></query></iq>"
    )
    assert len(both_ways(HEADER + stanza, Limits(size=100_000, names=0))) == 4


def test_limit_of_long_blank_runs():
    """The XML library remembers each different one for ever."""

    def run(number: int) -> bytes:
        blanks = bytes(b" \t\n\r"[number >> 2 * place & 3] for place in range(8))
        return b"<message><body>" + b" " * 20 + blanks + b"</body></message>"

    limits = Limits(size=100_000, names=50)
    assert len(both_ways(HEADER + b"".join(run(number) for number in range(50)) * 2, limits)) == 101
    assert error_of(both_ways(HEADER + b"".join(run(number) for number in range(51)), limits)) == "policy-violation"
    one_by_one = [HEADER, *(run(number) for number in range(51))]
    assert error_of(events(one_by_one, limits)) == "policy-violation"


_MEMORY = """
import sys
from xmppd.protocol.stream import Limits, Stream
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4
stream = Stream(Limits(size=65536))
stream.receive({header!r})
for number in range(120_000):
    if number == 20_000:
        before = resident()
    stanza = {stanza!r} % number
    assert stream.receive(stanza), "ended"
grown = resident() - before
assert grown < 1500, f"{{grown}} KiB"
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "stanza",
    [b"<message id='a%08d'/>", b"<message xml:id='a%08d'/> ", b"<message><body>a%08d</body><a b='%%s'/></message>"],
)
def test_values_leave_no_memory_behind(stanza):
    stanza = stanza.replace(b"%%s", b"x")
    code = _MEMORY.format(header=HEADER, stanza=stanza)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# -- the sender's address


@pytest.mark.parametrize("claimed", [None, "romeo@localhost/orchard", "romeo@localhost", "ROMEO@LocalHost/orchard"])
@pytest.mark.parametrize("behind", [b"", b" ", b"<pres"])
def test_from_becomes_the_bound_address(claimed, behind):
    attribute = b"" if claimed is None else b" from='" + claimed.encode() + b"'"
    for data in (HEADER + b"<message to='a@b'" + attribute + b"/>" + behind,):
        [stanza] = stanzas_of(both_ways(data, bound=True))
        assert stanza.from_ == ROMEO
        assert dict(inside_a_stream(stanza.xml)[1]) == {"from": ROMEO.full, "to": "a@b"}
        assert stanza.element.get("from") in (None, ROMEO.full)


@pytest.mark.parametrize(
    "claimed",
    ["juliet@localhost", "romeo@localhost/balcony", "localhost", "", "@", "romeo@localhost.", "r\u043emeo@localhost"],
)
def test_a_foreign_from_ends_the_stream(claimed):
    found = both_ways(HEADER + f"<message from='{claimed}'/>".encode(), bound=True)
    assert error_of(found) == "invalid-from"
    assert len(found) == 2


def test_stamping_escapes_the_resource():
    stream = Stream(Limits(size=1000))
    stream.bind(parse("romeo@localhost/\"<&'>"))
    stream.receive(HEADER)
    for piece in (b"<message/>", b"<message/> ", b"<message></message>"):
        [stanza] = stream.receive(piece)
        assert isinstance(stanza, Stanza)
        assert dict(inside_a_stream(stanza.xml)[1])["from"] == "romeo@localhost/\"<&'>"


def test_forwarded_stanzas_are_not_taken_for_stanzas():
    inner = b"<message xmlns='jabber:client' from='juliet@localhost' to='romeo@localhost'><body>forged</body></message>"
    data = HEADER + b"<message to='a@b'><forwarded xmlns='urn:xmpp:forward:0'>" + inner + b"</forwarded></message>"
    for raw in (inner, inner.replace(b" xmlns='jabber:client'", b"")):
        found = both_ways(data.replace(inner, raw), bound=True)
        [stanza] = stanzas_of(found)
        assert len(found) == 2
        assert dict(inside_a_stream(stanza.xml)[1]) == {"from": ROMEO.full, "to": "a@b"}
        assert b"juliet@localhost" in stanza.inner


def test_a_bad_recipient_is_marked_and_ends_nothing():
    for to in ("a@", "@b", "a@b@c", "x" * 1100 + "@b", "a b@c", ""):
        [stanza] = stanzas_of(both_ways(HEADER + f"<message to='{to}'/>".encode(), bound=True))
        assert stanza.malformed
        assert stanza.to is None


# -- xml:lang


@pytest.mark.parametrize(
    ("own", "expected"), [("", "it"), (" xml:lang='de'", "de"), (" lang='de'", "it"), (" xml:lang=''", "")]
)
def test_language_is_inherited_from_the_stream(own, expected):
    header = HEADER.replace(b" to=", b" xml:lang='it' to=")
    [stanza] = stanzas_of(both_ways(header + f"<message{own}><body>a</body></message>".encode()))
    assert dict(inside_a_stream(stanza.xml)[1])[LANG] == expected


def test_without_a_stream_language_none_is_added():
    [stanza] = stanzas_of(both_ways(HEADER + b"<message/>"))
    assert inside_a_stream(stanza.xml)[1] == ()


# -- a header that declares more


def test_prefixes_of_the_header_travel_with_each_stanza():
    header = HEADER.replace(b" to=", b" xmlns:x='urn:example:x' xmlns:y='urn:example:y' to=")
    found = both_ways(header + b"<message x:a='1'><x:b/></message><presence/>", bound=True)
    first = inside_a_stream(stanzas_of(found)[0].xml)
    assert first[2] == (("urn:example:x b", (), ()),)
    assert ("urn:example:x a", "1") in first[1]


# -- pipelining


@pytest.mark.parametrize("size", [1, 7, 100, 4096, PIECE])
def test_stanzas_of_all_sizes_in_one_pipe(size):
    sizes = [0, 1, 10, 299, 300, 301, 999, 4095, 4096, 4097, 20_000, 65_535, 65_536, 65_537]
    bodies = [b"x" * length for length in sizes]
    data = HEADER + b"".join(b"<message><body>%b</body></message>" % body for body in bodies)
    if size == 1:
        data = HEADER + b"".join(b"<message><body>%b</body></message>" % body for body in bodies if len(body) < 5000)
    found = stanzas_of(events([data[i : i + size] for i in range(0, len(data), size)]))
    assert [len(stanza.body or "") for stanza in found] == [length for length in sizes if size > 1 or length < 5000]


HELLO = (
    b"<?xml version='1.0'?>"
    + HEADER
    + "<message id='é'><body>a&amp;b</body></message> <presence/></stream:stream>".encode()
)
HELLO_SHAPES = shapes(events(HELLO))


@pytest.mark.parametrize("cut", range(len(HELLO)))
def test_stream_does_not_care_where_tcp_cuts(cut):
    assert shapes(events([HELLO[:cut], HELLO[cut:]])) == HELLO_SHAPES
    assert len(HELLO_SHAPES) == 4


# -- properties


def cut_at(data: bytes, places: list[int]) -> list[bytes]:
    ends = sorted({place % (len(data) + 1) for place in places})
    return [data[start:end] for start, end in zip([0, *ends], [*ends, len(data)], strict=True) if start != end]


TOKENS = st.sampled_from(
    [
        token.encode()
        for token in """
    <message|<message>|</message>|<message/>|<presence/>|<iq|</iq>|<body>|</body>|<body>hi</body>|<a/>|<a>|</a>|>|/>|<|</
    |</stream:stream|</stream:stream>| to='juliet@localhost'| id="'/>"| id='|'|"| a='</message>| x:a='b'|=|/|text| |é
    | from='romeo@localhost'| xmlns='jabber:client'| xmlns='jabber:&#99;lient'| xmlns=''| xmlns:x='urn:x'
    | xmlns:x='jabber:client'|<messagex:message xmlns:messagex='jabber:&#99;lient'|<x:message|<x:a|<stream:x/>
    | xmlns:stream='urn:s'| xml:lang='de'|&amp;|&#60;|&x;|<![CDATA[|]]>|<![CDATA[</message>]]>|<!--|-->|<?x|?>
    |<message to='a@b'><body>a</body></message>|<message/>foo/>|<!DOCTYPE a>""".replace("\n    ", "").split("|")
    ]
    + [b"\n  \t", b"\r\n", b" " * 20, b" " * 301, b"a" * 301, b"\xc3", b"\xff", b"\x00"]
)
SOUP = st.lists(TOKENS, max_size=14).map(b"".join)
CUTS = st.lists(st.integers(0, 3000), max_size=6)


def emitted(found: list[Event]) -> list[Node]:
    return [inside_a_stream(event.xml) for event in found if isinstance(event, Stanza)]


def meant_by(children: list[Node], bound: bool) -> list[Node]:
    stanzas = [
        node for node in children if node[0] in [f"jabber:client {kind}" for kind in ("message", "presence", "iq")]
    ]
    return [with_attribute(node, "from", ROMEO.full) if bound else node for node in stanzas]


@settings(max_examples=300, deadline=None)
@given(soup=SOUP, cuts=CUTS, bound=st.booleans(), start_apart=st.booleans())
@example(soup=b"<message to='x'/>foo/>", cuts=[], bound=True, start_apart=True)
@example(soup=b"<messagex:message xmlns:messagex='jabber:&#99;lient'/>", cuts=[], bound=True, start_apart=True)
@example(soup=b"<message/></stream:stream />", cuts=[], bound=True, start_apart=True)
@example(soup=b"<message/><a b='/>", cuts=[], bound=True, start_apart=True)
@example(soup=b"<message a='>' b='<![CDATA['/>", cuts=[], bound=True, start_apart=True)
def test_a_second_parser_sees_the_same_stanzas(soup, cuts, bound, start_apart):
    pieces = [HEADER, *cut_at(soup, cuts)] if start_apart else cut_at(HEADER + soup, cuts)
    found = events(pieces, bound=bound)

    children, _texts, whole = parse_stream(HEADER + soup)
    expected = meant_by(children, bound)
    seen = emitted(found)
    assert seen == expected[: len(seen)]
    if whole and not any(isinstance(event, StreamError) for event in found):
        assert seen == expected


@settings(max_examples=300, deadline=None)
@given(soup=SOUP, cuts=CUTS, bound=st.booleans())
def test_cutting_changes_no_event(soup, cuts, bound):
    whole = shapes(events(HEADER + soup, bound=bound))
    for pieces in (byte_by_byte(HEADER + soup), cut_at(HEADER + soup, cuts), [HEADER, soup]):
        assert_agree(shapes(events(pieces, bound=bound)), whole)


def assert_agree(one: list[object], other: list[object]) -> None:
    """Equal, but that a fault inside an unfinished stanza may be noticed later: the parser reads ahead as it likes."""
    if len(one) != len(other):
        longer, shorter = (one, other) if len(one) > len(other) else (other, one)
        assert longer[-1] in (("error", "not-well-formed"), ("error", "restricted-xml"))
        assert longer[:-1] == shorter
    else:
        assert one == other


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(pieces=st.lists(st.binary(max_size=60) | SOUP, max_size=6), header=st.booleans())
def test_receive_never_raises_and_is_silent_after_the_end(pieces, header):
    stream = Stream(Limits(size=400, depth=4, elements=6, names=10))
    if header:
        stream.receive(HEADER)
    for piece in pieces:
        was_over = stream.ended
        found = stream.receive(piece)
        if was_over:
            assert found == []
        over = [index for index, event in enumerate(found) if isinstance(event, StreamError | StreamClosed)]
        assert over in ([], [len(found) - 1])
        assert bool(over) == (stream.ended and not was_over)


NAMES = st.sampled_from(["a", "b", "body", "x", "message", "iq", "é", "A-1", "_"])
URIS = st.sampled_from(["jabber:client", "urn:example:a", "urn:example:b", "jabber:x:data", ""])
TEXTS = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cs", "Cc", "Cn"), include_characters="\n\t <>&\"'"), max_size=12
)


def quoted(value: str, style: int) -> str:
    value = value.replace("&", "&amp;").replace("<", "&lt;").replace("\n", "&#10;").replace("\t", "&#9;")
    return '"' + value.replace('"', "&quot;") + '"' if style else "'" + value.replace("'", "&#39;") + "'"


@st.composite
def trees(draw: st.DrawFn, name: str | None = None, level: int = 0) -> str:
    """An element as some client might spell it."""
    prefix = ""
    declared = []
    if name is None:
        name = draw(NAMES)
        kind = draw(st.integers(0, 3))
        uri = draw(URIS)
        if kind == 1:
            declared.append("xmlns=" + quoted(uri, draw(st.integers(0, 1))))
        elif kind == 2 and uri:
            prefix = draw(st.sampled_from(["p", "stream", "q"])) + ":"
            declared.append(f"xmlns:{prefix[:-1]}=" + quoted(uri, draw(st.integers(0, 1))))
    keys = draw(st.lists(st.sampled_from(["id", "type", "k", "xml:lang"]), unique=True, max_size=3))
    declared += [f"{key}=" + quoted(draw(TEXTS), draw(st.integers(0, 1))) for key in keys]
    gap = draw(st.sampled_from([" ", "\n", "  "]))
    head = gap.join([f"<{prefix}{name}", *declared])
    parts = []
    for _ in range(draw(st.integers(0, 3)) if level < 3 else 0):
        text = draw(TEXTS)
        if draw(st.booleans()):
            parts.append("<![CDATA[" + text.replace("]]>", "") + "]]>")
        else:
            parts.append(text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))
        if draw(st.booleans()):
            parts.append(draw(trees(level=level + 1)))
    if not parts and draw(st.booleans()):
        return head + draw(st.sampled_from(["/>", " />"]))
    return head + ">" + "".join(parts) + f"</{prefix}{name}>"


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(
    stanzas=st.lists(st.sampled_from(["message", "presence", "iq"]).flatmap(trees), min_size=1, max_size=4),
    cuts=CUTS,
    apart=st.booleans(),
    bound=st.booleans(),
)
def test_neutral_bytes_are_canonically_equal_to_what_came_in(stanzas, cuts, apart, bound):
    data = [stanza.encode() for stanza in stanzas]
    pieces = [HEADER, *data] if apart else cut_at(HEADER + b"".join(data), cuts)
    expected = meant_by(parse_stream(HEADER + b"".join(data))[0], bound)
    assert len(expected) == len(data)
    found = stanzas_of(events(pieces, bound=bound))
    assert [inside_a_stream(stanza.xml) for stanza in found] == expected


@pytest.mark.parametrize(
    "rest", [b"", b"<message/>", b"<presence/><iq/>", b"</stream:stream>", b"<message><a>", b"</a>"]
)
def test_a_stream_that_ends_leaves_nothing_for_the_collector(rest: bytes) -> None:
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            stream = Stream(Limits(size=10_000))
            stream.receive(HEADER + rest)
            stream.release()
            del stream
        assert gc.collect() == 0
    finally:
        gc.enable()
