"""Inputs for the fuzz targets: made by a grammar that likes trouble, taken from the corpus, and then damaged.

Everything follows from the `random.Random` that is handed in, so a number is enough to make an input again.
"""

import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tests.harness.xml import HEADER

CORPUS: Final = Path(__file__).parent / "corpus"
LARGEST: Final = 4096  # bytes of an input: what is slow to check finds less per second

_PROLOGS: Final = (
    [b""] * 12
    + [b"<?xml version='1.0'?>", b'<?xml version="1.0" encoding="UTF-8"?>\n', b"\xef\xbb\xbf", b" \r\n"]
    + [b"<?xml version='1.0' encoding='latin1'?>", b"<!DOCTYPE a [<!ENTITY b 'c'>]>", b"<!-- -->", b"\xff\xfe<\0"]
)
_HEADERS: Final = [HEADER] * 6 + [
    HEADER.replace(b" to=", b" xml:lang='de' to="),
    HEADER.replace(b" to=", b" from='romeo@localhost' id=\"'>\" to="),
    HEADER.replace(b" to=", b" xmlns:x='urn:x' x:a='1' to="),
    HEADER.replace(b" to=", b" xmlns:c='jabber:client' to="),
    HEADER.replace(b" to=", b" xmlns:s='http://etherx.jabber.org/streams' to="),
    HEADER.replace(b"'>", b"'/>"),
    HEADER.replace(b"jabber:client", b"jabber:server"),
    HEADER.replace(b"jabber:client", b"jabber:&#99;lient"),
]
_STANZAS: Final = [b"message", b"presence", b"iq"]
_NONZAS: Final = [
    b"<r xmlns='urn:xmpp:sm:3'/>",
    b"<auth xmlns='urn:ietf:params:xml:ns:xmpp-sasl' mechanism='PLAIN'>AGEAYg==</auth>",
    b"<starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>",
    b"<stream:error><a xmlns='urn:a'/></stream:error>",
    b"<foo/>",
    b"<a xmlns=''/>",
    b"<x:message xmlns:x='jabber:client'/>",
    b"<message xmlns='jabber:server'/>",
    b"<message xmlns='http://etherx.jabber.org/streams'/>",
]
_NAMES: Final = ["body", "thread", "a", "b", "c", "x:a", "x:b", "stream:stream", "stream:error", "message", "iq", "é"]
_FORWARDED: Final = (
    b"<forwarded xmlns='urn:xmpp:forward:0'>",
    b"<sent xmlns='urn:xmpp:carbons:2'><forwarded xmlns='urn:xmpp:forward:0'>",
)
_TEXTS: Final = [
    *(b"hi", b"", b" ", b"\n\t ", b"&amp;", b"&lt;/message&gt;", b"&#60;", b"&#x10FFFF;", b"\xc3\xa9\xf0\x9f\x98\x80"),
    *(b"<![CDATA[</message><message from='a@b'/>]]>", b"<![CDATA[]]>", b"]]", b">", b"'\"", b"\r\n", b"&#13;&#10;"),
    *(b" " * 17, b"\n" * 40, b"a" * 299, b"b" * 301, b"&quot;&apos;", b"</stream:stream", b"]]&gt;"),
]
_ATTRIBUTES: Final = [
    *(b" to='juliet@localhost'", b" to='juliet@localhost/b\xc3\xa9'", b" to='@@'", b" to=''", b" id='1'"),
    *(b' id="\'/>"', b" id='\">'", b" id='&#39;&quot;&#10;'", b" type='chat'", b" type='error'", b" type=''"),
    *(b" from='romeo@localhost'", b" from='romeo@localhost/orchard'", b" from='ROMEO@localhost/orchard'"),
    *(b" from='juliet@localhost'", b" from=''", b" x:from='juliet@localhost'", b" xml:lang='en'", b" xml:lang=''"),
    *(b" xml:id='i'", b" xml:space='preserve'", b" xmlns='jabber:client'", b" xmlns=''", b" xmlns='urn:a'"),
    *(b" xmlns:x='urn:x'", b" xmlns:x='jabber:client'", b" xmlns:y='urn:x'", b" y:a='2'", b" xmlns:stream='urn:s'"),
    *(b" xmlns:c='jabber:&#99;lient'", b" xmlns:x=''", b" xmlns:xml='urn:x'", b" xmlns:xmlns='urn:x'"),
    *(b" xmlns='a b'", b" xmlns:f='urn:x' f:from='juliet@localhost'", b" a\t=\n'\t\n'", b" a='</message>'"),
    *(b" xmlns='http://etherx.jabber.org/streams'", b" stream:from='juliet@localhost'", b" a='<![CDATA['"),
]
_TOKENS: Final = [
    *(b"<", b">", b"/>", b"</", b"'", b'"', b"=", b"&", b";", b"&x;", b"<!--", b"-->", b"<?x ", b"?>", b"<![CDATA["),
    *(b"]]>", b"<!DOCTYPE a>", b"\x00", b"\xff", b"\xc0\xbc", b"\xed\xa0\x80", b"\x0b", b"&#0;", b"&#xD800;"),
    *(b"<message", b"<message/>", b"</message>", b"<iq/>", b"</stream:stream>", b"<stream:stream>", b" ", b"\r\n"),
    *(b"<forwarded xmlns='urn:xmpp:forward:0'>", b"</forwarded>", b"xmlns:", b"xmlns=", b"jabber:client", b":"),
    *(b" from='juliet@localhost'", b"<messagex:message xmlns:messagex='jabber:&#99;lient'/>", HEADER, b"&#120;"),
]

_MECHANISMS: Final = ["SCRAM-SHA-1", "SCRAM-SHA-256", "SCRAM-SHA-512"]
_USERS: Final = ["juliet"] * 8 + [
    "romeo",
    "nobody",
    "JULIET",
    "jul\u00adiet",
    "a=2Cb",
    "=3D",
    "=",
    "a\u0007",
    "a b",
    "é",
]
_AUTHZIDS: Final = [""] * 8 + ["juliet@localhost", "romeo@localhost", "Juliet@LOCALHOST", "juliet", "a=2Cb", "@", "="]
_FLAGS: Final = ["n", "n", "y", "p=tls-exporter", "p=tls-unique", "p=tls-server-end-point", "p=x", "p=", "P", ""]
_FINALS: Final = [
    *["c={bind},r={nonce},p={proof}"] * 10,
    *("c={bind},r={nonce},p={wrong}", "c={bind},r={nonce}", "c={bind},r={nonce},p=", "c={bind},r={nonce},p=AAAA"),
    *("c={other},r={nonce},p={proof}", "c=biws,r={nonce},p={proof}", "c=eSws,r={nonce},p={proof}"),
    *("c={bind},r={nonce}x,p={proof}", "c={bind},r=fyko,p={proof}", "c={bind},r=,p={proof}", "c=,r=,p="),
    *("r={nonce},c={bind},p={proof}", "c={bind},r={nonce},x=y,p={proof}", "c={bind},r={nonce},p={proof},p={wrong}"),
    *("c={bind},r={nonce},p={proof},x=y", "m=1,c={bind},r={nonce},p={proof}", "p={proof}", "", "=", ",,,"),
    *("c={bind},c={other},r={nonce},p={proof}", "c={bind},r={nonce},p={wrong},p={proof}", "e=other-error"),
]
_SASL_TOKENS: Final = [
    *(
        b"=",
        b",",
        b"\0",
        b"\n",
        b"\n!",
        b"n,,",
        b"y,,",
        b"p=tls-exporter,,",
        b"a=",
        b"n=",
        b"r=",
        b"c=",
        b"p=",
        b"m=1,",
    ),
    *(b"{nonce}", b"{proof}", b"{wrong}", b"{bind}", b"{other}", b"{password}", b"=2C", b"=3D", b"=3d", b"juliet"),
    *(b"romeo", b"@localhost", b"\xff", b"\xc2\xad", b"\xe2\x85\xa8", b"\xd8\xa71", b"-PLUS", b"x" * 520, b"x" * 8200),
]


def corpus(target: str) -> list[bytes]:
    """The inputs kept for a target, in the order of their files' names."""
    return [read(path)[2] for path in sorted((CORPUS / target).glob("*.json"))]


def read(path: Path) -> tuple[str, int, bytes]:
    """A kept case: target, seed, input. The file has the input as Latin-1, a character a byte."""
    case = json.loads(path.read_text())
    return case["target"], case["seed"], case["input"].encode("latin-1")


def write(path: Path, target: str, seed: int, data: bytes, **more: str | int) -> None:
    """Keep a case, with what else there is to say about it."""
    case = {"target": target, "seed": seed, "input": data.decode("latin-1"), **more}
    path.write_text(json.dumps(case, indent=1) + "\n")


def make(target: str, seed: int, kept: Sequence[bytes]) -> bytes:
    """The input of a seed. `kept` is the corpus."""
    rng = random.Random(seed)
    produce, tokens = (_stream, _TOKENS) if target == "stream" else (_sasl, _SASL_TOKENS)
    data = rng.choice(kept) if kept and rng.random() < 0.2 else produce(rng)
    if rng.random() < 0.6:
        for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
            data = _damage(rng, data, tokens, kept)
    return data if target == "sasl" else data[:LARGEST]


def cut(rng: random.Random, data: bytes, ends: Sequence[int]) -> list[bytes]:
    """The input in pieces, as a network may deliver it; `ends` are places where stanzas end."""
    match rng.randrange(5):
        case 0:
            places = set(range(len(data)))
        case 1:
            places = {rng.randrange(len(data) + 1) for _ in range(rng.randrange(8))}
        case 2:  # a stanza a piece, as most clients write
            places = set(ends)
        case 3:
            places = {end + rng.choice([-1, 0, 0, 1]) for end in ends}
        case _:
            places = {place + 1 for place, byte in enumerate(data) if byte == 62 and rng.random() < 0.5}
    bounds = [0, *sorted(place for place in places if 0 < place < len(data)), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(bounds) if start < end]


def _damage(rng: random.Random, data: bytes, tokens: Sequence[bytes], kept: Sequence[bytes]) -> bytes:
    start = rng.randrange(len(data) + 1)
    end = min(len(data), start + rng.choice([0, 1, 1, 2, 4, 16, 64]))
    match rng.randrange(7):
        case 0:
            return data[:start] + data[end:]
        case 1:
            return data[:start] + rng.randbytes(1) + data[start + 1 :]
        case 2 | 3:
            return data[:start] + rng.choice(tokens) + data[start:]
        case 4:
            return data[:end] + data[start:end] * rng.choice([1, 2, 20]) + data[end:]
        case 5 if kept:
            other = rng.choice(kept)
            return data[:start] + other[rng.randrange(len(other) + 1) :]
        case _:
            there = rng.randrange(len(data) + 1)
            return data[:there] + data[start:end] + data[there:]


def _stream(rng: random.Random) -> bytes:
    parts = [rng.choice(_PROLOGS), rng.choice(_HEADERS)]
    for _ in range(rng.choice([0, 1, 1, 2, 3, 5, 9])):
        kind = rng.random()
        if kind < 0.1:
            parts.append(rng.choice(_NONZAS))
        elif kind < 0.2:
            parts.append(rng.choice([b" ", b"\n", b" " * 18, b"\t" * 250, b"x", b"&#32;", b"&#32;" * 300]))
        elif kind < 0.23:
            parts.append(b"</stream:stream>")
        else:
            parts.append(_element(rng, rng.choice(_STANZAS), 1))
    return b"".join(parts)


def _element(rng: random.Random, name: bytes, depth: int) -> bytes:
    start = b"<" + name + b"".join(rng.sample(_ATTRIBUTES, rng.choice([0, 0, 1, 1, 2, 4])))
    if rng.random() < 0.2:
        return start + b"/>"
    if rng.random() < 0.03:
        return (
            start + b">" + b"<a>" * rng.choice([3, 63, 64, 70]) + b"</a>" * rng.choice([3, 63, 64, 70]) + b"</" + name
        )
    inner = b"".join(_content(rng, depth) for _ in range(rng.choice([0, 1, 1, 2, 3])))
    return start + rng.choice([b">", b">", b" >", b"\n>"]) + inner + b"</" + name + rng.choice([b">", b">", b" >"])


def _content(rng: random.Random, depth: int) -> bytes:
    kind = rng.random()
    if kind < 0.4 or depth > 6:
        return rng.choice(_TEXTS)
    if kind < 0.5:
        opening = rng.choice(_FORWARDED)
        inner = _element(rng, rng.choice(_STANZAS), depth + 2)
        return opening + inner + b"</forwarded>" + (b"</sent>" if opening.startswith(b"<sent") else b"")
    if kind < 0.55:
        return b"".join(b"<n%d/>" % rng.randrange(40) for _ in range(rng.choice([1, 5, 12])))
    return _element(rng, rng.choice(_NAMES).encode(), depth + 1)


def _sasl(rng: random.Random) -> bytes:
    """A client's messages, a line each; the first line is the mechanism. "!" before one: it does not wait its turn."""
    user, authzid = rng.choice(_USERS), rng.choice(_AUTHZIDS)
    kind = rng.random()
    if kind < 0.12:
        lines = ["ANONYMOUS", rng.choice(["", "trace", "x" * 255, "x" * 256])]
    elif kind < 0.3:
        lines = ["PLAIN", "\0".join([authzid, user, rng.choice(["{password}", "{password}", "guess", "", "{wrong}"])])]
    else:
        plus = rng.random() < 0.5
        flag = rng.choice(_FLAGS) if rng.random() < 0.4 else "p=tls-exporter" if plus else rng.choice("nny")
        name = rng.choice([""] * 9 + ["m=1,"]) + f"n={user}"
        first = f"{flag},{'a=' + authzid if authzid else ''},{name},r={rng.choice(['rOprNGfw', 'x' * 512, 'a', ''])}"
        lines = [rng.choice(_MECHANISMS) + "-PLUS" * plus, first, rng.choice(_FINALS)]
    if rng.random() < 0.1:
        lines.insert(1, "")
    if rng.random() < 0.1:
        lines.insert(rng.randrange(1, len(lines) + 1), "!" + rng.choice(lines))
    if rng.random() < 0.2:
        lines.append(rng.choice(lines))
    return "\n".join(lines).encode()
