"""Run as a program: take the sessions of another node, and print how many bytes each of them costs (PSS)."""

import gc
import sys
import time
import uuid
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xmppd.cluster.frames import varint
from xmppd.cluster.interfaces import Kind, Peer
from xmppd.cluster.packed import row_bytes
from xmppd.cluster.replica import Replica
from xmppd.cluster.shared import Owner
from xmppd.cluster.tables import RouteTable, SessionRow, SessionTable, pack_session
from xmppd.protocol.jid import parse

PIECE = 200


class OneEnd:
    """Links that only take handlers; what is sent is lost."""

    def __init__(self) -> None:
        self.peers: dict[bytes, Peer] = {}
        self.handlers: dict[Kind, Callable[[Peer, bytes], None]] = {}
        self.ups: list[Callable[[Peer], None]] = []
        self.on = self.handlers.__setitem__
        self.on_up = self.ups.append

    def on_down(self, handler: Any) -> None:
        """Nobody goes."""

    def send(self, node: bytes, kind: Kind, body: bytes) -> bool:
        return True

    def send_all(self, kind: Kind, body: bytes) -> None:
        """To nobody."""


def pss() -> int:
    """Bytes of this process."""
    gc.collect()
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no Pss")


def main(rows: int) -> None:
    soon: deque[Callable[[], None]] = deque()
    links, table = OneEnd(), SessionTable()
    Replica(
        links,
        Owner(uuid.uuid4().bytes, 0, 1),
        [table, RouteTable()],
        call_soon=soon.append,
        call_later=lambda delay, function: None,  # type: ignore[arg-type,return-value]
    )
    peer = Peer(Owner(uuid.uuid4().bytes, 0, 1), "xmppd@node02", "0.1.0", 1)
    for up in links.ups:
        up(peer)
    example = SessionRow(parse("a@b/c"), peer.owner, time.time_ns())
    example.priority = 5
    value = pack_session(example)
    table.rows("nobody@support.example.com")
    before = pss()
    links.handlers[Kind.SNAPSHOT_BEGIN](peer, varint(1) + varint(0))
    for first in range(0, rows, PIECE):
        body = bytearray(varint(1))
        for number in range(first, first + PIECE):
            bare, resource = f"agent.lastname{number}@support.example.com", f"Conversations.x{number:07x}"
            body += b"\x01" + row_bytes(bare, resource.encode(), value)
        links.handlers[Kind.SNAPSHOT_ROWS](peer, bytes(body))
        while soon:
            soon.popleft()()
    for number in range(0, rows, 3):
        assert table.rows(f"agent.lastname{number}@support.example.com")
    assert table.count() == rows
    print((pss() - before) / rows)


if __name__ == "__main__":
    main(int(sys.argv[1]))
