"""The counters and queues of stream management, against a model; and how <a/> and <r/> are read."""

from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xmppd.c2s.stream_management import MODULO, HandledTooHigh, Inbound, Outbound, enabled, failed
from xmppd.delivery import ERROR, SAFE, Pending, Unsettled
from xmppd.protocol.jid import parse
from xmppd.protocol.stanza import build
from xmppd.protocol.stream import (
    Acknowledgement,
    AcknowledgementRequest,
    Limits,
    Nonza,
    Stream,
    StreamError,
    StreamOpened,
)

HEADER = (
    b"<stream:stream to='localhost' version='1.0' xmlns='jabber:client'"
    b" xmlns:stream='http://etherx.jabber.org/streams'>"
)
SM = b"urn:xmpp:sm:3"
NEAR_THE_END = st.integers(MODULO - 6, MODULO + 6) | st.just(0) | st.integers(0, 5 * MODULO)


def message(number, size=0):
    attrs = {"to": "juliet@localhost", "from": "romeo@localhost/a", "id": str(number), "type": "chat"}
    return build("message", attrs, b"<body>%b</body>" % (b"x" * size))


# -- what comes in


def test_what_was_refused_is_known():
    for outcome in (ERROR, Pending()):
        inbound = Inbound(lambda: None)
        inbound.add(SAFE, message(1))
        inbound.add(outcome, message(2))
        if isinstance(outcome, Pending):
            assert not inbound.refused
            outcome.settle(ERROR)
        assert (inbound.handled, inbound.refused) == (2, True)


@given(start=NEAR_THE_END, fates=st.lists(st.sampled_from(["safe", "error", "later"]), max_size=30), data=st.data())
def test_h_is_the_settled_prefix(start, fates, data):
    inbound = Inbound(lambda: None)
    inbound.handled = start
    outcomes = []
    for number, fate in enumerate(fates):
        outcome = {"safe": SAFE, "error": ERROR}.get(fate) or Pending()
        outcomes.append(outcome)
        inbound.add(outcome, message(number))
    done = [outcome in (SAFE, ERROR) for outcome in outcomes]
    for number in data.draw(st.permutations([n for n, ready in enumerate(done) if not ready])):
        assert inbound.handled == start + (done.index(False))
        outcomes[number].settle(data.draw(st.sampled_from([SAFE, ERROR])))
        done[number] = True
    assert inbound.handled == start + len(fates)
    assert inbound.unsettled == 0
    assert inbound.ack() == b"<a xmlns='urn:xmpp:sm:3' h='%d'/>" % ((start + len(fates)) % MODULO)


def test_a_request_is_answered_at_once_and_then_once_a_tick_until_it_is_satisfied():
    moved = []
    inbound = Inbound(lambda: moved.append(inbound.handled))
    first, second, third = Pending(), Pending(), Pending()
    inbound.add(first, message(1))
    assert b"h='0'" in inbound.requested(behind=1)  # one more has come and waits
    assert inbound.tail() == b""
    inbound.add(second, message(2))
    second.settle(SAFE)
    assert moved == []
    first.settle(SAFE)
    assert moved == [2]
    assert b"h='2'" in inbound.tail()
    assert inbound.tail() == b""
    inbound.add(third, message(3))
    third.settle(SAFE)
    assert moved == [2]  # nobody has asked for this one
    assert inbound.tail() == b""
    assert b"h='3'" in inbound.last_word()
    assert inbound.last_word() == b""


def test_what_comes_again_after_a_resumption_is_known():
    inbound = Inbound(lambda: None)
    pending = [Pending() for _ in range(3)]
    for number, outcome in enumerate(pending):
        inbound.add(outcome, message(number))
    pending[1].settle(SAFE)
    assert inbound.rewind() == 0
    assert inbound.repeated(message(0)) is pending[0]
    inbound.add(pending[0], message(0))
    assert inbound.repeated(message(7)) is None  # the client goes on with something else
    assert inbound.repeated(message(1)) is None
    pending[0].settle(SAFE)
    pending[2].settle(SAFE)
    assert inbound.handled == 1


def test_a_stanza_that_comes_again_may_be_written_in_another_way():
    inbound = Inbound(lambda: None)
    before, outcome = message(1), Pending()
    inbound.add(outcome, before)
    inbound.rewind()
    delay = b"<delay xmlns='urn:xmpp:delay' stamp='2026-11-21T16:00:00Z'/></message>"
    assert inbound.repeated(message(1, 1)) is None
    inbound.add(outcome, before)
    inbound.rewind()
    xml = (
        before.xml.replace(b"</message>", delay)
        .replace(b'"', b"'")
        .replace(b" type='chat'", b"")
        .replace(b" to=", b" type='chat'  to=")
    )
    again = type(before).from_bytes(xml)
    assert again.xml != before.xml
    assert inbound.repeated(again) is outcome


# -- what goes out


@given(start=NEAR_THE_END, steps=st.lists(st.tuples(st.booleans(), st.integers(-3, 12)), max_size=40))
def test_acknowledgements_take_a_prefix_and_no_more_than_was_sent(start, steps):
    outbound, queue, acknowledged = Outbound(), deque(), start
    outbound.acknowledged = start
    for number, (send, by) in enumerate(steps):
        if send:
            entry = Unsettled(message(number))
            assert outbound.add(entry, len(entry.stanza.xml))
            queue.append(entry)
            continue
        h = (acknowledged + by) % MODULO
        if by > len(queue) or (by < 0 and -by > acknowledged):
            with pytest.raises(HandledTooHigh):
                outbound.acknowledge(h)
        elif by <= 0:
            assert outbound.acknowledge(h) == []
        else:
            assert outbound.acknowledge(h) == [queue.popleft() for _ in range(by)]
            acknowledged += by
        assert outbound.acknowledged == acknowledged
    assert len(outbound) == outbound.written == len(queue)
    assert outbound.size == sum(len(entry.stanza.xml) for entry in queue)
    assert outbound.take() == list(queue)


def test_a_queue_goes_out_in_pieces_as_it_is_acknowledged():
    outbound = Outbound()
    outbound.shut()
    stanzas = [message(number, 100) for number in range(10)]
    size = len(stanzas[0].xml)
    assert not any(outbound.add(stanza, size) for stanza in stanzas)
    with pytest.raises(HandledTooHigh):
        outbound.acknowledge(1)  # nothing was written
    outbound.rewind()
    assert list(outbound.writable(3 * size)) == stanzas[:3]
    assert not outbound.add(message(10, 99), size)  # behind the others
    outbound.acknowledge(2)
    assert list(outbound.writable(3 * size)) == stanzas[3:5]
    outbound.acknowledge(5)
    assert len(list(outbound.writable(100 * size))) == 6
    assert outbound.open
    assert outbound.add(message(11), size)


def test_one_stanza_may_be_larger_than_a_piece():
    outbound = Outbound()
    outbound.shut()
    big = message(1, 1000)
    outbound.add(big, len(big.xml))
    outbound.rewind()
    assert list(outbound.writable(10)) == [big]


def test_what_nobody_waits_for_is_not_left_over():
    outbound = Outbound()
    settled, open_ = Unsettled(message(1)), Unsettled(message(2))
    for entry in (message(0), settled, open_):
        outbound.add(entry, 10)
    settled.settle(SAFE)
    assert outbound.take() == [open_]


# -- elements


def test_elements():
    assert failed("item-not-found", 3) == (
        b"<failed xmlns='urn:xmpp:sm:3' h='3'><item-not-found xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/></failed>"
    )
    assert enabled("a", 5, "[::1]:5222") == (
        b"<enabled xmlns='urn:xmpp:sm:3' id=\"a\" resume='true' max='5' location=\"[::1]:5222\"/>"
    )


ELEMENTS = {
    b"<r xmlns='%b'/>" % SM: [AcknowledgementRequest()],
    b'<r xmlns="%b" />' % SM: [AcknowledgementRequest()],
    b"<a xmlns='%b' h='0'/>" % SM: [Acknowledgement(0)],
    b'<a h="4294967295" xmlns="%b"/>' % SM: [Acknowledgement(MODULO - 1)],
    b"<a xmlns='%b' h='7'></a>" % SM: [Acknowledgement(7)],
    b"<sm:a xmlns:sm='%b' h='7'/>" % SM: [Acknowledgement(7)],
    b"<a xmlns='%b' h='12'/><r xmlns='%b'/>" % (SM, SM): [Acknowledgement(12), AcknowledgementRequest()],
    b"<message/><r xmlns='%b'/>" % SM: ["message", AcknowledgementRequest()],
    b"<message><r xmlns='%b'/></message>" % SM: ["message"],
    b"<message><body><![CDATA[<r xmlns='%b'/>]]></body></message>" % SM: ["message"],
    b"<a xmlns='%b'/>" % SM: [Nonza],
    b"<a xmlns='%b' h='-1'/>" % SM: [Nonza],
    b"<a xmlns='%b' h='4294967296'/>" % SM: [Nonza],
    b"<message/> x <r xmlns='%b'/>" % SM: ["message", StreamError],
    b"<a xmlns='%b' h='1\"/>" % SM: [],
    b"<a xmlns=\"%b' h='1'/>" % SM: [],
}


def read(chunks):
    stream = Stream(Limits(10_000))
    [opened] = stream.receive(HEADER)
    assert isinstance(opened, StreamOpened)
    stream.bind(parse("romeo@localhost/a"))
    events = [event for chunk in chunks for event in stream.receive(chunk)]
    named = [getattr(event, "kind", None) or event for event in events]
    stream.release()
    return [type(event) if isinstance(event, Nonza | StreamError) else event for event in named]


@pytest.mark.parametrize("element", ELEMENTS)
def test_acknowledgements_are_read_however_they_are_written_and_cut(element):
    expected = ELEMENTS[element]
    assert read([element]) == expected
    assert read([element + b"<iq/>"]) == (expected if not expected or StreamError in expected else [*expected, "iq"])
    for cut in range(1, len(element)):
        found = read([element[:cut], element[cut:]])
        assert found == expected, (element[:cut], element[cut:])
