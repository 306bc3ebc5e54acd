"""The states of a roster item and how subscription stanzas move them (RFC 6121 3 and appendix A; requirements 3.6).

A state is (subscription, ask). `subscription` is none, to, from or both; `ask` tells the requests that wait for an
answer: none; out (the user asked the contact), in (the contact asked the user) or both. Nine of the pairs can occur. A
cell that is not in a table changes nothing. There is no I/O here: the tables are the rules.
"""

from typing import Final

State = tuple[str, str]

NOTHING: Final[State] = ("none", "none")  # also the state of a contact that is not in the roster
KINDS: Final = ("subscribe", "subscribed", "unsubscribe", "unsubscribed")

# What a contact sent to the user.
IN: Final[dict[State, dict[str, State]]] = {
    ("none", "none"): {"subscribe": ("none", "in")},
    ("none", "out"): {
        "subscribe": ("none", "both"),
        "subscribed": ("to", "none"),
        "unsubscribed": ("none", "none"),
    },
    ("none", "in"): {"unsubscribe": ("none", "none")},
    ("none", "both"): {
        "subscribed": ("to", "in"),
        "unsubscribe": ("none", "out"),
        "unsubscribed": ("none", "in"),
    },
    ("to", "none"): {"subscribe": ("to", "in"), "unsubscribed": ("none", "none")},
    ("to", "in"): {"unsubscribe": ("to", "none"), "unsubscribed": ("none", "in")},
    ("from", "none"): {"unsubscribe": ("none", "none")},
    ("from", "out"): {
        "subscribed": ("both", "none"),
        "unsubscribe": ("none", "out"),
        "unsubscribed": ("from", "none"),
    },
    ("both", "none"): {"unsubscribe": ("to", "none"), "unsubscribed": ("from", "none")},
}

# What the user sent to a contact. ("none", "out") keeps its state at a repeated request, which is a cell of its own.
OUT: Final[dict[State, dict[str, State]]] = {
    ("none", "none"): {"subscribe": ("none", "out")},
    ("none", "out"): {"subscribe": ("none", "out"), "unsubscribe": ("none", "none")},
    ("none", "in"): {
        "subscribe": ("none", "both"),
        "subscribed": ("from", "none"),
        "unsubscribed": ("none", "none"),
    },
    ("none", "both"): {
        "subscribed": ("from", "out"),
        "unsubscribe": ("none", "in"),
        "unsubscribed": ("none", "out"),
    },
    ("to", "none"): {"unsubscribe": ("none", "none")},
    ("to", "in"): {
        "subscribed": ("both", "none"),
        "unsubscribe": ("none", "in"),
        "unsubscribed": ("to", "none"),
    },
    ("from", "none"): {"subscribe": ("from", "out"), "unsubscribed": ("none", "none")},
    ("from", "out"): {"unsubscribe": ("from", "none"), "unsubscribed": ("none", "out")},
    ("both", "none"): {"unsubscribe": ("from", "none"), "unsubscribed": ("to", "none")},
}

_AUTO_REPLY: Final[dict[str, tuple[str, frozenset[State]]]] = {
    "subscribe": ("subscribed", frozenset({("from", "none"), ("from", "out"), ("both", "none")})),
    "unsubscribe": (
        "unsubscribed",
        frozenset(
            {("none", "in"), ("none", "both"), ("to", "in"), ("from", "none"), ("from", "out"), ("both", "none")}
        ),
    ),
}


def received(state: State, kind: str) -> State:
    """The state after a contact's stanza arrived for the user."""
    return IN[state].get(kind, state)


def sent(state: State, kind: str) -> State:
    """The state after the user sent a stanza to the contact."""
    return OUT[state].get(kind, state)


def auto_reply(state: State, kind: str) -> str | None:
    """What the server answers in the user's name to a stanza that arrives in a state; None: nothing."""
    reply, states = _AUTO_REPLY.get(kind, ("", frozenset()))
    return reply if state in states else None


def goes_out(state: State, kind: str) -> bool:
    """Whether a stanza of the user is passed on to the contact (RFC 6121 A.2).

    Asking and taking back always are, which heals rosters that have come apart; an answer is only where it changes
    something, for nobody asked for it otherwise."""
    return kind in ("subscribe", "unsubscribe") or sent(state, kind) != state


def farewells(state: State) -> tuple[str, ...]:
    """What the contact is sent when the user's item is removed (RFC 6121 2.5.2)."""
    subscription, ask = state
    kinds = []
    if subscription in ("to", "both") or ask in ("out", "both"):
        kinds.append("unsubscribe")
    if subscription in ("from", "both") or ask in ("in", "both"):
        kinds.append("unsubscribed")
    return tuple(kinds)
