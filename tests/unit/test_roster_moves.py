"""The states of roster items: every cell of the tables, and what two servers that follow them end up with."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from modules.roster import moves
from modules.roster.items import Limits, known_state, read_edit
from xmppd.errors import StanzaError
from xmppd.protocol.stanza import Stanza

VECTORS = yaml.safe_load((Path(__file__).parents[1] / "vectors" / "roster_moves.yaml").read_text())["roster_moves"]
STATES = list(moves.IN)
CELLS = [
    (way, tuple(state.split()), kind, cell if cell == "-" else tuple(cell))
    for way in ("in", "out")
    for state, row in VECTORS[way].items()
    for kind, cell in row.items()
]


def test_the_vectors_have_every_cell():
    assert len(CELLS) == 2 * len(STATES) * len(moves.KINDS) == 72
    assert set(moves.OUT) == set(STATES)


@pytest.mark.parametrize(("way", "state", "kind", "cell"), CELLS)
def test_a_stanza_moves_the_state_as_the_table_says(way, state, kind, cell):
    table, move = (moves.IN, moves.received) if way == "in" else (moves.OUT, moves.sent)

    assert table[state].get(kind, "-") == cell
    assert move(state, kind) == (state if cell == "-" else cell)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("kind", moves.KINDS)
def test_the_server_answers_for_the_user_where_the_table_says(state, kind):
    rule = VECTORS["auto_reply"].get(kind, {"reply": None, "states": []})

    assert moves.auto_reply(state, kind) == (rule["reply"] if " ".join(state) in rule["states"] else None)


# What RFC 6121 A.2 has under ROUTE? for the two answers.
ANSWERED = {
    "subscribed": {("none", "in"), ("none", "both"), ("to", "in")},
    "unsubscribed": {
        *(("none", "in"), ("none", "both"), ("to", "in")),
        *(("from", "none"), ("from", "out"), ("both", "none")),
    },
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("kind", moves.KINDS)
def test_an_answer_nobody_asked_for_stays_at_home(state, kind):
    assert moves.goes_out(state, kind) == (state in ANSWERED[kind] if kind in ANSWERED else True)


class Pair:
    """Two users whose servers follow the tables, with nothing on the way between two steps."""

    def __init__(self) -> None:
        self.state = {"juliet": moves.NOTHING, "romeo": moves.NOTHING}
        self.stanzas = 0

    def other(self, user: str) -> str:
        return "romeo" if user == "juliet" else "juliet"

    def send(self, user: str, kind: str) -> None:
        before = self.state[user]
        self.state[user] = moves.sent(before, kind)
        if moves.goes_out(before, kind):
            self.arrive(self.other(user), kind)

    def arrive(self, user: str, kind: str) -> None:
        self.stanzas += 1
        assert self.stanzas < 10_000, "the servers answer each other for ever"
        before = self.state[user]
        self.state[user] = moves.received(before, kind)
        reply = moves.auto_reply(before, kind)
        if reply is not None:
            self.arrive(self.other(user), reply)

    def remove(self, user: str) -> None:
        before = self.state[user]
        self.state[user] = moves.NOTHING
        for kind in moves.farewells(before):
            self.arrive(self.other(user), kind)

    def is_consistent(self) -> bool:
        (mine, my_ask), (theirs, their_ask) = self.state["juliet"], self.state["romeo"]
        return (
            (mine in ("to", "both")) == (theirs in ("from", "both"))
            and (mine in ("from", "both")) == (theirs in ("to", "both"))
            and (my_ask in ("out", "both")) == (their_ask in ("in", "both"))
            and (my_ask in ("in", "both")) == (their_ask in ("out", "both"))
        )


STEPS = st.lists(
    st.tuples(st.sampled_from(["juliet", "romeo"]), st.sampled_from([*moves.KINDS, "remove"])), max_size=40
)


@given(STEPS)
def test_two_rosters_stay_consistent_whatever_the_users_send(steps):
    pair = Pair()

    for user, kind in steps:
        pair.remove(user) if kind == "remove" else pair.send(user, kind)

        assert set(pair.state.values()) <= set(STATES)
        assert pair.is_consistent(), pair.state


@given(st.sampled_from(STATES), st.sampled_from(STATES))
def test_asking_or_taking_back_heals_rosters_that_have_come_apart(mine, theirs):
    pair = Pair()
    pair.state = {"juliet": mine, "romeo": theirs}

    pair.send("juliet", "unsubscribe")
    pair.send("romeo", "unsubscribe")
    pair.remove("juliet")
    pair.remove("romeo")

    assert pair.is_consistent()


@pytest.mark.parametrize(
    ("subscription", "ask", "state"),
    [
        ("both", "out", ("both", "none")),
        ("to", "both", ("to", "in")),
        ("from", "both", ("from", "out")),
        ("love", "in", ("none", "none")),
        ("none", "undefined", ("none", "none")),
        ("from", "out", ("from", "out")),
    ],
)
def test_a_pair_that_cannot_occur_is_read_as_the_one_it_means(subscription, ask, state):
    assert known_state(subscription, ask) == state


LIMITS = Limits(items=10, requests=10, groups=3, text=20)
ITEM = "<item jid='romeo@montague.example' {}>{}</item>"


@pytest.mark.parametrize(
    ("inner", "condition"),
    [
        ("", "bad-request"),
        (ITEM.format("", "") * 2, "bad-request"),
        ("<item name='Romeo'/>", "bad-request"),
        ("<item jid='@montague.example'/>", "jid-malformed"),
        (ITEM.format("", "<group>Friends</group>" * 2), "bad-request"),
        (ITEM.format("", "<group/>"), "not-acceptable"),
        (ITEM.format("", f"<group>{'x' * 21}</group>"), "not-acceptable"),
        (ITEM.format(f"name='{'é' * 11}'", ""), "not-acceptable"),
        (ITEM.format("", "".join(f"<group>{n}</group>" for n in range(4))), "not-acceptable"),
    ],
)
def test_a_roster_set_that_breaks_a_rule_is_refused(inner, condition):
    stanza = Stanza.from_bytes(f"<iq type='set' id='1'><query xmlns='jabber:iq:roster'>{inner}</query></iq>".encode())

    with pytest.raises(StanzaError) as refused:
        read_edit(stanza.payload, LIMITS)

    assert refused.value.condition == condition


def test_a_roster_set_at_its_limits_is_taken():
    groups = "".join(f"<group>{'x' * 19}{n}</group>" for n in range(3))
    item = ITEM.format(f"name='{'é' * 10}' subscription='both'", groups)
    stanza = Stanza.from_bytes(f"<iq type='set' id='1'><query xmlns='jabber:iq:roster'>{item}</query></iq>".encode())

    edit = read_edit(stanza.payload, LIMITS)

    assert (edit.jid.full, edit.name, len(edit.groups), edit.remove) == ("romeo@montague.example", "é" * 10, 3, False)
