"""What an operator reads of the ways to other nodes: those that have lasted. One that is tried for a moment, or that
leads nowhere either, as when a node is cut off from all, is no news."""

from collections.abc import Callable
from typing import Any, Final

from xmppd.cluster.interfaces import Peer
from xmppd.cluster.link import Link
from xmppd.log import get_logger

_log = get_logger("cluster")

_LASTS: Final = 1.0  # seconds until a way is news
_SILENCE: Final = 1.5  # seconds: a way on which nothing has come for so long may lead nowhere


class Ways:
    """`name_of` gives the name of a node that relays."""

    def __init__(self, loop: Any, name_of: Callable[[bytes], str]) -> None:
        self._loop = loop
        self._name_of = name_of
        self._told: dict[bytes, bytes] = {}  # node -> through whom, as the log says
        self._timers: dict[bytes, Any] = {}

    def changed(self, link: Link, peer: Peer) -> None:
        """There is another way to a peer, or the direct one again."""
        if link.node not in self._timers:
            self._timers[link.node] = self._loop.call_later(_LASTS, lambda: self._look(link, peer))

    def went_down(self, node: bytes) -> None:
        """It is told that the node is down, which is the end of all ways."""
        self._told.pop(node, None)
        if (timer := self._timers.pop(node, None)) is not None:
            timer.cancel()

    def _look(self, link: Link, peer: Peer) -> None:
        del self._timers[link.node]
        via = link.via
        if via == self._told.get(link.node):
            return
        if via is None:
            del self._told[link.node]
            _log.info("node reached directly again", node=peer.name)
        elif link.silence(self._loop.time()) > _SILENCE:
            self.changed(link, peer)
        else:
            self._told[link.node] = via
            _log.info("node reached through another", node=peer.name, via=self._name_of(via))
