"""What a NATS server says, as events; and what it may not say."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xmppd.cluster import nats_protocol as protocol
from xmppd.cluster.nats_protocol import Info, Message, NatsError, Parser, Ping, Pong, Refused

SAID = (
    b'INFO {"max_payload":4096,"tls_required":true,"connect_urls":["192.0.2.1:4222"]}\r\n'
    b"PING\r\nMSG xmppd.1.a 1 5\r\nhello\r\nMSG xmppd.1.a 22 _INBOX.x.7 9\r\nMSG a 1\r\n\r\n"
    b"MSG empty 3 0\r\n\r\n+OK\r\nHMSG _INBOX.x.8 0 16 16\r\nNATS/1.0 503\r\n\r\n\r\n"
    b"HMSG a 4 r 18 20\r\nNATS/1.0\r\nA: b\r\n\r\nhi\r\nPONG\r\n-ERR 'Authorization Violation'\r\n"
)
MEANT = [
    Info(4096, tls_required=True),
    Ping(),
    Message(1, "xmppd.1.a", "", b"hello"),
    Message(22, "xmppd.1.a", "_INBOX.x.7", b"MSG a 1\r\n"),
    Message(3, "empty", "", b""),
    Message(0, "_INBOX.x.8", "", b"", "503"),
    Message(4, "a", "r", b"hi"),
    Pong(),
    Refused("Authorization Violation"),
]


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


def test_it_does_not_matter_where_tcp_cuts():
    for cut in range(len(SAID)):
        parser = Parser()
        assert parser.receive(SAID[:cut]) + parser.receive(SAID[cut:]) == MEANT, cut
        assert parser.idle


def test_single_bytes_are_enough():
    parser = Parser()
    assert [event for byte in SAID for event in parser.receive(bytes([byte]))] == MEANT


names = st.text(st.characters(codec="utf-8", exclude_characters=" \n"), min_size=1, max_size=20)
messages = st.tuples(st.integers(0, 10**6), names, st.just("") | names, st.binary(max_size=300))


@given(st.lists(messages, max_size=8), st.lists(st.integers(0, 4000), max_size=8))
def test_any_pieces_give_the_same_messages(meant, cuts):
    said = b"".join(
        b"MSG %b %d %b%d\r\n%b\r\n"
        % (subject.encode(), sid, b"%b " % reply.encode() if reply else b"", len(data), data)
        for sid, subject, reply, data in meant
    )
    parser = Parser()

    got = [event for piece in pieces(said, cuts) for event in parser.receive(piece)]

    assert got == [Message(*one) for one in meant]


@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=5), st.integers(0, len(SAID)))
def test_rubbish_is_refused_alike_in_any_pieces(rubbish, cuts, kept):
    def outcome(parts: list[bytes]) -> tuple[list[object], str]:
        parser, events = Parser(), []
        for part in parts:
            try:
                events += parser.receive(part)
            except NatsError as exc:
                return [], str(exc)
        return events, ""

    said = SAID[:kept] + rubbish
    assert outcome(pieces(said, cuts)) == outcome([said])


@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 400 Bad Request\r\n",
        b"INFO []\r\n",
        b"INFO {\r\n",
        b"INFO " + b"[" * 60_000 + b"\r\n",
        b"x" * protocol.MAX_LINE,
        b"MSG a 1\r\nx\r\n",
        b"MSG a 1 -1\r\n",
        b"MSG a 1 +1\r\n",
        b"MSG a x 1\r\nx\r\n",
        b"MSG a 1 b c 1\r\nx\r\n",
        b"MSG a 1 1\r\nxyz\r\n",
        b"MSG a 1 99999999999999999999\r\n",
        b"HMSG a 1 5 4\r\nabcd\r\n",
        b"HMSG a 1 1\r\nx\r\n",
        b"HMSG 1\r\nx\r\n",
        b"MSG 1\r\nx\r\n",
        b"MSG \r\n",
        b"\r\n",
    ],
    ids=lambda said: repr(said[:20]),
)
def test_what_is_not_nats_is_the_end(said):
    with pytest.raises(NatsError):
        Parser().receive(said)


def test_a_payload_may_not_be_much_longer_than_the_server_takes_itself():
    parser = Parser()
    assert parser.receive(b'INFO {"max_payload":1000}\r\n') == [Info(1000)]

    assert parser.receive(b"MSG a 1 8388608\r\n") == []  # waits for it
    parser = Parser()
    parser.receive(b'INFO {"max_payload":1000}\r\n')
    with pytest.raises(NatsError, match="is the most"):
        parser.receive(b"MSG a 1 8400001\r\n")


@pytest.mark.parametrize("said", [10**18, -1, 0, True, "1", None, 1.5])
def test_no_server_makes_us_take_more_than_nats_can_send(said):
    (info,) = Parser().receive(b"INFO %b\r\n" % json.dumps({"max_payload": said}).encode())
    assert 0 < info.max_payload <= protocol.MAX_PAYLOAD


def test_a_subject_of_an_observer_does_no_harm():
    (message,) = Parser().receive(b"MSG a\r.\xff\x0b.b 1 c\td 1\r\nx\r\n")
    assert (message.sid, message.data) == (1, b"x")


def test_commands_have_the_servers_form():
    assert protocol.publish("a.b", b"hello") == b"PUB a.b 5\r\nhello\r\n"
    assert protocol.publish("a.b", b"", "c") == b"PUB a.b c 0\r\n\r\n"
    assert protocol.subscribe(7, "a.*", "") == b"SUB a.* 7\r\n"
    assert protocol.subscribe(7, "a.*", "q") == b"SUB a.* q 7\r\n"
    assert protocol.unsubscribe(7) == b"UNSUB 7\r\n"
    line = protocol.connect("n", "us er", 'pa"ss\r\n', None, tls=False)
    assert line.count(b"\n") == 1
    assert json.loads(line.removeprefix(b"CONNECT "))["pass"] == 'pa"ss\r\n'
