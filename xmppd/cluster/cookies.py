"""The cluster's cookie: shown, set on a node that is alone, and changed on all members while they serve.

A change has three steps, and each is done on every member before the next begins: accept the new cookie too, show the
new one, accept no other. At no moment is there a pair of nodes that refuse each other, so no link goes down. What a
node has come to is on its disk; a change that was broken off is finished by doing it once more.
"""

import secrets
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final, Protocol

from xmppd.cluster.cluster import Cluster
from xmppd.cluster.interfaces import Peer
from xmppd.errors import CallRefused, CommandError, NodeUnreachable, XmppdError
from xmppd.log import get_logger

log = get_logger("cluster")

STEPS: Final = ("accept", "show", "finish")
_CALL: Final = "cluster.cookie"
_TIMEOUT: Final = 10.0  # seconds for one step on one node
_ONE_AT_A_TIME: Final = 60.0  # seconds for which another change is refused


class Keeper(Protocol):
    """The data folder (identity.DataFolder)."""

    @property
    def cookie(self) -> str: ...
    @property
    def also_trusted(self) -> tuple[str, ...]: ...
    def write_cookies(self, cookie: str, also_trusted: Iterable[str] = ()) -> None: ...


class Cookies:
    """`external`: the nodes meet in an existing NATS cluster, which has its own ways of letting somebody in."""

    def __init__(self, cluster: Cluster, keeper: Keeper, *, external: bool) -> None:
        self._cluster = cluster
        self._keeper = keeper
        self._external = external
        self._changing: tuple[str, float] | None = None  # the new cookie, and until when no other one is accepted
        cluster.calls.on_call(_CALL, self._asked)

    @property
    def cookie(self) -> str:
        return self._keeper.cookie

    async def set(self, cookie: str) -> None:
        """Another cookie for a node that is no member. Raises CommandError, XmppdError."""
        if self._cluster.joined:
            raise CommandError("this node is a member: its cluster's cookie is changed with `cookie rotate`")
        self._keeper.write_cookies(cookie)
        await self._cluster.engine.set_cookies(cookie)

    async def rotate(self, cookie: str | None, progress: Callable[[str], Awaitable[None]]) -> None:
        """Change the cookie of all members, to a random one unless it is given. Raises CommandError, XmppdError."""
        if self._external:
            raise CommandError("cluster.nats_url is set: who may connect is that NATS cluster's business")
        links = self._cluster.links.peers
        others = self._cluster.membership.others if self._cluster.joined else ()
        if away := [member.name for member in others if member.node not in links]:
            raise CommandError(
                f"not up: {', '.join(away)}. A node that misses the change could not come back: start it, or remove it "
                "with leave_cluster"
            )
        new = cookie or secrets.token_hex(32)
        for step in STEPS:
            await self._step(step, new)
            for member in others:
                await self._ask(member.node, member.name, step, new)
            await progress(f"{step}: done on {len(others) + 1} of {len(others) + 1} members")
        log.info("cookie changed", members=len(others) + 1)

    async def _ask(self, node: bytes, name: str, step: str, cookie: str) -> None:
        try:
            await self._cluster.calls.call(node, _CALL, {"step": step, "cookie": cookie}, timeout=_TIMEOUT)
        except (NodeUnreachable, CallRefused) as exc:
            raise CommandError(
                f"{name} did not do the step `{step}`: {exc}. All members still accept each other; run `cookie rotate` "
                "again when it is up"
            ) from exc

    async def _asked(self, peer: Peer, payload: Any) -> None:
        step, cookie = payload["step"], payload["cookie"]
        if not isinstance(cookie, str) or step not in STEPS:
            raise CallRefused("no step of a change of the cookie")
        await self._step(step, cookie)

    async def _step(self, step: str, new: str) -> None:
        now = time.monotonic()
        if self._changing is not None and self._changing[0] != new and now < self._changing[1]:
            raise CommandError("another change of the cookie is under way: wait a minute")
        self._changing = (new, now + _ONE_AT_A_TIME)
        keeper = self._keeper
        known = [keeper.cookie, *keeper.also_trusted]
        if step == "accept":
            current, also = keeper.cookie, [*known, new]
        elif new not in known:
            raise CommandError(f"the step `{step}` comes before `{STEPS[0]}`")
        elif step == "show":
            current, also = new, known
        elif keeper.cookie != new:
            raise CommandError(f"the step `{step}` comes before `{STEPS[1]}`")
        else:
            current, also = new, []
            self._changing = None
        try:
            keeper.write_cookies(current, also)
            await self._cluster.engine.set_cookies(current, also)
        except OSError as exc:
            raise XmppdError(f"the certificates could not be written: {exc}") from exc
