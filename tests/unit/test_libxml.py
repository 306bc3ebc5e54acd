"""What strangers invent, and what they leave unfinished, is gone when they are gone.

Each test is a process of its own: it looks at the memory of all of it, and the library below could die.
"""

import subprocess
import sys

import pytest

from tests.harness.xml import HEADER

_BEGIN = f"""
import gc, itertools
from xmppd.protocol.stanza import Stanza
from xmppd.protocol.stream import Limits, Stream
HEADER = {HEADER!r}
fresh = itertools.count()

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4

def grown(attack, rounds=4):
    "KiB that the later rounds have left behind."
    attack()
    before = resident()
    for _ in range(rounds):
        attack()
    return resident() - before
"""
_INVENTED = """
def attack():
    for _ in range(60):
        stream = Stream(Limits(size=65536))
        stream.receive(HEADER)
        for _ in range(4):
            names = [b"n%x" % next(fresh) for _ in range(100)]
            inner = b"".join(b"<" + name + b" xmlns='urn:" + name + b"'/>" for name in names)
            found = stream.receive(b"<message>" + inner + b"</message>")
            READ
        stream.release()
"""
_UNFINISHED = """
gc.collect()
gc.disable()
TAILS = [
    b"<message>" + b"<a/>" * 9000, b"<message>" + b"<a>" * 50, b"<message a='b", b"<message><a/></x>", b"</x>",
    b"<message><![CDATA[a", b"<!-- -->", b"<message>&x;", b"<message/>\\xff", b"<message/></stream:stream>", b"x",
    b"<message/>" * 30, b"<message><a></b>", b"<message from='\\x00", b"<message>" + b"<a/>" * 11000, b"<foo/>",
    b"<message xmlns:a='u' xmlns:b='u' a:x='1' b:x='2'/>", b"<message><a xmlns='a b'/></message>", b"<?a b?>",
]
STARTS = [
    b"<stream:stream to='loc", b"<a", b"<stream:flow xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams'>",
    b"<x>" * 50, b"<x>" * 50 + b"</y>", b"", b"<?xml version='1.0'?>", b"<!DOCTYPE a>", b"<stream:stream>",
]

def attack():
    for _ in range(4):
        for data in [HEADER + tail for tail in TAILS] + STARTS:
            for pieces in ([data], [data[:-1], data[-1:]], [HEADER, data]):
                stream = Stream(Limits(size=65536))
                found = [event for piece in pieces for event in stream.receive(piece)]
                stream.release()
"""


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", _BEGIN + code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize(
    "read", ["", "Stanza.from_bytes(found[0].xml)", "found[0].editable().append(found[0].element[0])"]
)
def test_invented_names_are_forgotten_with_their_stream(read: str) -> None:
    """Some 50,000 a round; kept, they would be 5 MiB in the end."""
    run(_INVENTED.replace("READ", read) + "\nassert (left := grown(attack)) < 2000, f'{left} KiB'")


@pytest.mark.slow
def test_what_is_left_unfinished_goes_without_the_collector() -> None:
    run(_UNFINISHED + "\nassert (left := grown(attack)) < 1500, f'{left} KiB'\nassert gc.collect() == 0")


def test_elements_outlive_their_stream() -> None:
    run("""
kept = []
for number in range(200):
    stream = Stream(Limits(size=65536))
    stream.receive(HEADER)
    [stanza] = stream.receive(b"<message to='a@b'><n%d x%d='1'><body>hi</body></n%d></message>" % ((number,) * 3))
    stream.receive(b"<message><unfinished>")
    stream.release()
    kept.append(stanza.element)
    other = stanza.editable()
    other.append(stanza.element[0])  # between documents with tables of their own
    kept.append(other)
del stream, stanza, other
for number in range(200):
    assert len(kept[2 * number]) == 0
    assert [each.tag for each in kept[2 * number + 1]] == [f"{{jabber:client}}n{number}"] * 2
    assert kept[2 * number + 1][1].get(f"x{number}") == "1"
""")
