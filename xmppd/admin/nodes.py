"""Commands over several nodes: who is asked, in which time, and what is said of those who did not answer.

A node that is asked and does not answer is never left out silently: what the others said is there, the exit code is
UNANSWERED, and a line on standard error names the node and why. Nodes that are down are not asked: they hold no
session, and read their configuration when they start.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final

from xmppd.admin import talk, wire
from xmppd.admin.registry import Call, Caller, Command, UsageError
from xmppd.admin.request import Ask, Frame, Send, refusal
from xmppd.admin.results import Answer
from xmppd.cluster.interfaces import Calls, Links
from xmppd.cluster.tables import SessionTable
from xmppd.errors import CallRefused, CommandError, NodeUnreachable
from xmppd.log import get_logger

log = get_logger("admin")

# docs/exit-codes.md
UNANSWERED: Final = 29
NOT_REACHABLE: Final = 3

MAX_FETCHED: Final = 64 << 20  # characters of another node's answer, which is collected here
_REFUSAL: Final = '{"status": "error", '
_PASSED_ON: Final = ("argv", "command", "args", "json", "secret", "local", "finite")


@dataclass(frozen=True, slots=True)
class _Failed:
    """What stands in the place of a node's answer."""

    text: str
    code: int


class Nodes:
    """The other nodes that are up, for the command registry and for whoever passes a request on. `name` and `member`
    are this node's own."""

    def __init__(self, *, name: str, member: bytes, links: Links, calls: Calls, table: SessionTable) -> None:
        self.name = name
        self._member = member
        self._links = links
        self._calls = calls
        self._table = table

    def names(self) -> list[str]:
        """All nodes that are up, this one first."""
        return [self.name, *sorted(peer.name for peer in self._links.peers.values())]

    async def run(
        self, spec: Command, values: Mapping[str, Any], call: Call, here: Callable[[], Awaitable[Any]]
    ) -> Any:
        """Ask whom the command's scope says, all at once, and merge. Fulfils registry.Elsewhere."""
        chosen = self._chosen(spec, values)
        if chosen == {self._member}:
            return await here()
        args = {arg.name: values[arg.parameter] for arg in spec.args if arg.parameter in values}
        asked = {"command": spec.name, "args": args}
        order = sorted(chosen, key=lambda node: (node != self._member, self.name_of(node)))
        names = [self.name_of(node) for node in order]
        parts = [_here(here) if node == self._member else self._there(node, spec, asked, call.caller) for node in order]
        return _merged(spec, dict(zip(names, await asyncio.gather(*parts), strict=True)))

    def _chosen(self, spec: Command, values: Mapping[str, Any]) -> set[bytes]:
        peers = self._links.peers
        if spec.scope != "owner":
            return {self._member, *peers}
        assert spec.of is not None
        bare = spec.of(values)
        rows = self._table.rows(bare).values() if bare is not None else ()
        # where nobody holds anything, this node says what is said then
        return {row.owner.member for row in rows if row.owner.member == self._member or row.owner.member in peers} or {
            self._member
        }

    def name_of(self, node: bytes) -> str:
        """The name of a node that is up, by its UUID; of any other its UUID."""
        peer = self._links.peers.get(node)
        if peer is None:
            return self.name if node == self._member else node.hex()
        return peer.name

    async def _there(self, node: bytes, spec: Command, asked: dict[str, Any], caller: Caller) -> Any:
        try:
            lines = [
                line
                async for line in talk.listen(self._calls, node, asked, caller, rows=True, timeout=spec.timeout)
                if line
            ]
            return wire.value_of(spec.result, lines)
        except NodeUnreachable as exc:
            return _Failed(f"did not answer: {exc}", UNANSWERED)
        except CallRefused as exc:
            return _Failed(exc.text, exc.code)
        except CommandError as exc:
            return _Failed(exc.text, exc.code)
        except (ValueError, KeyError, IndexError, StopIteration, TypeError) as exc:
            log.error("answer of another node not understood", exc=exc, command=spec.name, node=self.name_of(node))
            return _Failed("its answer was not understood", UNANSWERED)

    async def relay(self, node: str, frame: Frame, caller: Caller, send: Send, ask: Ask) -> None:
        """Have another node, one of `names`, carry a request out, and pass on what it says. A node that stops to
        answer is told as the last frame."""
        asked: Frame = {
            key: frame[key] for key in ("argv", "command", "args", "json", "secret", "local") if key in frame
        }
        try:
            needed = await self._pass_on(node, asked, caller, send)
            if needed is not None:
                secret = await ask(needed)
                if secret is None:
                    return await send(refusal(UsageError(f"no {needed} was given"), asked.get("json") is True))
                await self._pass_on(node, {**asked, "secret": secret}, caller, send)
        except NodeUnreachable as exc:
            text = f"Failed RPC connection to the node {node}: {exc}; it may have carried out the command"
            await send(refusal(CommandError(text, NOT_REACHABLE), asked.get("json") is True))
        except CallRefused as exc:
            await send(refusal(CommandError(exc.text, exc.code), asked.get("json") is True))

    async def fetch(self, node: str, command: str, args: Mapping[str, Any], caller: Caller, *, local: bool) -> str:
        """What another node answers to a command, as `Result.json` would give it. Raises CommandError."""
        if node not in self.names():
            raise CommandError(f"not_found: no node called '{node:.80}' is up", NOT_REACHABLE)
        parts: list[str] = []
        notes: list[str] = []
        size = 0

        async def send(frame: Frame) -> None:
            nonlocal size
            size += len(frame.get("out", ""))
            if size > MAX_FETCHED:
                raise CommandError(f"the answer is longer than {MAX_FETCHED} characters; ask {node} itself")
            parts.append(frame.get("out", ""))
            notes.extend(frame.get("err", "").splitlines())

        async def ask(name: str) -> str | None:
            return None

        asked: Frame = {"command": command, "args": args, "json": True, "local": local, "finite": True}
        await self.relay(node, asked, caller, send, ask)
        answer = "".join(parts)
        if answer.startswith(_REFUSAL):
            told = json.loads(answer)
            raise CommandError(told["message"], told["code"])
        if notes:
            raise CommandError("; ".join(notes), UNANSWERED)
        return answer

    async def _pass_on(self, node: str, asked: Frame, caller: Caller, send: Send) -> str | None:
        """The name of a secret that is needed first, else None."""
        async with aclosing(talk.listen(self._calls, self._node(node), asked, caller, rows=False)) as lines:
            async for line in lines:
                said = talk.frame_of(line)
                if said is not None and "need" in said:
                    return str(said["need"])
                await send({"out": ""} if said is None else said)
                if said is not None and "code" in said:
                    return None
        raise NodeUnreachable("its answer was cut off")

    async def call(self, node: str, name: str, payload: Any, *, timeout: float) -> Any:
        """Ask another node, one of `names`. Raises NodeUnreachable, CallRefused."""
        return await self._calls.call(self._node(node), name, payload, timeout=timeout)

    def _node(self, name: str) -> bytes:
        node = next((key for key, peer in self._links.peers.items() if peer.name == name), None)
        if node is None:
            raise NodeUnreachable("nodedown")
        return node


async def _here(here: Callable[[], Awaitable[Any]]) -> Any:
    try:
        return await here()
    except CommandError as exc:
        return _Failed(exc.text, exc.code)


def _merged(spec: Command, said: Mapping[str, Any]) -> Any:
    assert spec.merge is not None
    failed = {node: part for node, part in said.items() if isinstance(part, _Failed)}
    answers = {node: part for node, part in said.items() if not isinstance(part, _Failed)}
    notes = tuple(f"{node}: {part.text}" for node, part in failed.items())
    if not answers:
        same = {(part.text, part.code) for part in failed.values()}
        part = next(iter(failed.values()))
        raise CommandError(part.text if len(same) == 1 else "\n".join(notes), part.code)
    value = spec.merge(answers)
    code = max((part.code for part in failed.values()), default=0)
    return Answer(value, code, notes) if failed else value
