"""What a node and the process that makes its requests say to each other."""

import pytest

from xmppd.sender.forms import Form
from xmppd.sender.frames import (
    ANSWER,
    CLOSE,
    OPEN,
    SEND,
    BadFrame,
    Frames,
    answered,
    answering,
    closing,
    opened,
    opening,
    sending,
    sent,
)
from xmppd.sender.target import DONE, UNTRIED, Answer, HttpTarget, judge

FORM = Form((("Content-Type", "text/xml"), ("X-Who", "jülich")), "at", "from", "to", hides=True)
TARGET = HttpTarget("https://a.example/ü", timeout=1.5, secrets=("new", "öld"), cafile="/a", batched=True, form=FORM)
CHAINS = [
    (1, [(1, b"k" * 16, (("Content-Type", "text/xml"), ("X-Who", "jülich")), b"\x00\xff"), (2, b"l" * 16, (), b"")]),
    (2, [(3, b"m" * 16, (), b"x" * 70_000), (4, b"n" * 16, None, (b"<message/>", "ü@a", "b@b/ü", 1.5))]),
]
ANSWERS = [(1, DONE), (3, Answer("retry", "HTTP 503, “soon”", 2.5)), (4, UNTRIED), (2, DONE), (5, Answer("dead", "4"))]
ALL = opening(1, 8, TARGET) + sending(CHAINS) + answering(ANSWERS) + closing(1)


@pytest.mark.parametrize("step", [1, 7, 1000, len(ALL)])
def test_frames_do_not_care_where_they_are_cut(step):
    frames = Frames()

    found = [one for place in range(0, len(ALL), step) for one in frames.feed(ALL[place : place + step])]

    assert [kind for kind, _ in found] == [OPEN, SEND, ANSWER, CLOSE]
    assert opened(found[0][1]) == (1, 8, TARGET)
    assert sent(found[1][1]) == CHAINS
    assert list(answered(found[2][1])) == ANSWERS
    assert int(found[3][1]) == 1


def test_what_is_done_is_told_by_its_number_alone():
    assert answering([(7, DONE), (8, DONE)]).endswith(b"A[7, 8]")
    ((_, answer),) = answered(b"[7]")
    assert answer is DONE


def test_what_is_no_frame_is_not_waited_for():
    with pytest.raises(BadFrame):
        list(Frames().feed(b"HTTP/1.1 200 OK\r\n"))


@pytest.mark.parametrize(
    ("status", "retry_4xx", "verdict"),
    [
        (200, False, "done"),
        (204, False, "done"),
        (302, True, "dead"),
        (400, False, "dead"),
        (404, True, "retry"),
        (408, False, "retry"),
        (429, False, "retry"),
        (503, False, "retry"),
    ],
)
def test_the_status_says_whether_to_go_on(status, retry_4xx, verdict):
    answer = judge(HttpTarget("http://a.example/", retry_4xx=retry_4xx), status, "7", 0.0)

    assert answer.verdict == verdict
    assert answer.not_before == (7 if verdict == "retry" else 0)
