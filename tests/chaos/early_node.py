"""A node that acknowledges what it has merely received, for `scripts/chaos --self-check`, which must see what is lost.

It goes in front of the command of a node: `python -m tests.chaos.early_node python -m xmppd --config FILE`.
"""

import runpy
import sys

from xmppd.c2s.stream_management import Inbound
from xmppd.delivery import SAFE, Outcome
from xmppd.protocol.stanza import Stanza

_add = Inbound.add


def add(self: Inbound, outcome: Outcome, stanza: Stanza) -> None:
    """Whatever became of it."""
    _add(self, SAFE, stanza)


if __name__ == "__main__":
    Inbound.add = add  # type: ignore[method-assign]
    sys.argv = ["xmppd", *sys.argv[4:]]
    runpy.run_module("xmppd", run_name="__main__", alter_sys=True)
