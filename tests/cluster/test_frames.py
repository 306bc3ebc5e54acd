"""What is on the wire is read as it was written; anything else is one error."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from xmppd.cluster.frames import (
    DATA,
    HEADER,
    MAGIC,
    OLDEST,
    VERSION,
    Beat,
    FrameError,
    Header,
    beat_body,
    frame_head,
    read_beat,
    read_frames,
    read_header,
    read_text,
    read_varint,
    relayed,
    strange_version,
    text,
    varint,
)

UUIDS = st.binary(min_size=16, max_size=16)
U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
HEADERS = st.builds(
    Header,
    magic=st.just(MAGIC),
    version=st.integers(OLDEST, VERSION),
    type=st.integers(1, 4),
    flags=st.integers(0, 255),
    hops=st.integers(0, 255),
    cluster=UUIDS,
    sender=UUIDS,
    sender_incarnation=U64,
    sender_session=U32,
    target=UUIDS,
    target_incarnation=U64,
    target_session=U32,
    sent=U32,
    echo=U32,
    direct=U32,
    ack=U64,
    sack=U64,
    number=U64,
)
FRAMES = st.lists(st.tuples(st.integers(1, 255).filter(lambda kind: kind & 127), st.binary(max_size=300)), max_size=20)
BEATS = st.builds(
    Beat,
    protocol=st.integers(0, 255),
    oldest=st.integers(0, 255),
    worker=st.integers(0, 1000),
    name=st.text(max_size=50),
    version=st.text(max_size=20),
    reaches=st.lists(UUIDS, max_size=20).map(tuple),
)
NUMBERS = st.integers(0, 2**63 - 1)


@given(NUMBERS, st.binary(max_size=3))
@example(127, b"")
@example(128, b"")
def test_a_number_comes_back(number, rest):
    data = rest + varint(number)

    assert read_varint(data, len(rest)) == (number, len(data))


@given(NUMBERS)
def test_a_number_that_is_cut_off_is_refused(number):
    with pytest.raises(FrameError):
        read_varint(varint(number)[:-1], 0)


def test_a_number_has_at_most_63_bits():
    with pytest.raises(FrameError):
        read_varint(b"\xff" * 9 + b"\x01", 0)


@given(HEADERS)
def test_a_header_comes_back(header):
    assert read_header(HEADER.pack(*header) + b"rest") == header


@given(HEADERS, st.binary(max_size=40))
def test_a_relay_changes_nothing_but_the_hops(header, rest):
    packet = HEADER.pack(*header) + rest

    passed = relayed(packet)

    assert read_header(passed) == header._replace(hops=1)
    assert passed[HEADER.size :] == rest


@given(FRAMES)
@example([(1, b"x" * 16384), (2, b"y" * 127), (3, b"z" * 128), (4, b"a" * 16383)])
def test_frames_come_back(frames):
    data = b"".join(frame_head(kind, len(body)) + body for kind, body in frames)

    assert read_frames(b"head" + data, 4) == frames


@given(FRAMES.filter(bool), st.data())
def test_frames_that_are_cut_off_are_refused_whole(frames, data):
    ends, wire = [0], b""
    for kind, body in frames:
        wire += frame_head(kind, len(body)) + body
        ends.append(len(wire))
    cut = data.draw(st.integers(1, len(wire) - 1).filter(lambda at: at not in ends)) if len(wire) > len(ends) else 1

    if cut in ends:
        return
    with pytest.raises(FrameError):
        read_frames(wire[:cut])


@given(BEATS, st.binary(max_size=10))
def test_a_beat_comes_back_and_what_a_newer_version_adds_is_passed_over(beat, added):
    assert read_beat(beat_body(beat) + added, 0) == beat


@given(BEATS, st.data())
def test_a_beat_that_is_cut_off_is_refused(beat, data):
    body = beat_body(beat)

    with pytest.raises(FrameError):
        read_beat(body[: data.draw(st.integers(0, len(body) - 1))], 0)


@given(st.text())
def test_a_text_comes_back(value):
    assert read_text(text(value), 0) == (value, len(text(value)))


@given(
    st.binary(max_size=400)
    | HEADERS.map(lambda header: HEADER.pack(*header)).flatmap(lambda head: st.binary().map(head.__add__))
)
def test_any_bytes_are_read_or_refused_with_the_one_error(data):
    for read in (read_header, lambda data: read_frames(data, 0), read_beat, lambda data: read_text(data, 0)):
        try:
            read(data)
        except FrameError:
            pass
    strange_version(data)


@pytest.mark.parametrize(
    ("field", "value"), [("magic", b"xD"), ("version", VERSION + 1), ("version", OLDEST - 1), ("type", 0), ("type", 9)]
)
def test_a_header_with_a_strange_field_is_refused(field, value):
    node = bytes(16)
    header = Header(MAGIC, VERSION, DATA, 0, 0, node, node, 1, 1, node, 1, 1, 1, 1, 1, 1, 1, 1)

    with pytest.raises(FrameError):
        read_header(HEADER.pack(*header._replace(**{field: value})))


@given(HEADERS)
def test_the_sender_of_a_newer_version_can_be_told(header):
    newer = HEADER.pack(*header._replace(version=VERSION + 1))[:60]

    assert strange_version(newer) == (header.cluster, header.sender, VERSION + 1)
    assert strange_version(HEADER.pack(*header)) is None
