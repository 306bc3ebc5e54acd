"""`selftest`: does the cluster do what it is for?

Two temporary accounts per node, a session for each; every node chats with every other and with itself, with receipts;
each node says whether it sees the sessions of the others; each event that modules watch is raised once per stanza,
wherever its ends are. Accounts and sessions are gone afterwards, also when something fails; what a test could not
remove because its node died, the next one does.
"""

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from secrets import token_hex
from typing import Any, Final, NamedTuple, Protocol

from xmppd.admin.nodes import Nodes
from xmppd.admin.puppets import MAX_SEEN, PREFIX, Puppets, listening
from xmppd.admin.registry import Call, command
from xmppd.admin.results import Answer, List, Tuple, string
from xmppd.errors import CallRefused, CommandError, NodeUnreachable, StorageError
from xmppd.hooks import Hooks
from xmppd.log import get_logger

log = get_logger("admin")

FAILED: Final = 1
SETTLE: Final = 10.0  # seconds until every node has to see what another one sees
AGAIN: Final = 0.2
FORGOTTEN: Final = 600.0  # seconds after which accounts of an earlier test are nobody's
CALL: Final = 10.0  # seconds for one question
AT_ONCE: Final = 16  # chats


class Check(NamedTuple):
    """One result: what was checked, between which nodes, `ok` or `fail`, and more."""

    check: str  # chat, seen, hook
    from_: str
    to: str
    result: str
    detail: str


class Accounts(Protocol):
    async def names(self, host: str, *, limit: int, after: str | None) -> Sequence[str]: ...


class Auth(Protocol):
    async def register(self, host: str, username: str, password: str) -> bool: ...
    async def remove(self, host: str, username: str) -> bool: ...


class Server(Protocol):
    @property
    def hosts(self) -> Iterable[str]: ...


class Failure(Exception):
    """A node did not do what it was asked."""


class _Run:
    """One test: its accounts and sessions, by node."""

    def __init__(self, host: str, nodes: Sequence[str]) -> None:
        self.name = f"{PREFIX}{int(time.time()):x}-{token_hex(4)}"
        self.host = host
        self.nodes = tuple(nodes)

    def user(self, node: str, side: str) -> str:
        return f"{self.name}-{self.nodes.index(node)}{side}"

    def jid(self, node: str, side: str) -> str:
        return f"{self.user(node, side)}@{self.host}/selftest"

    @property
    def users(self) -> list[str]:
        return [self.user(node, side) for node in self.nodes for side in "ab"]


class SelfTest:
    """Tests from one node the cluster that this node sees."""

    def __init__(
        self,
        *,
        node: str,
        server: Server,
        accounts: Accounts,
        auth: Auth,
        hooks: Hooks,
        puppets: Puppets,
        nodes: Nodes,
    ) -> None:
        self._node = node
        self._server = server
        self._accounts = accounts
        self._auth = auth
        self._hooks = hooks
        self._puppets = puppets
        self._nodes = nodes
        self._running = asyncio.Lock()

    async def run(self, call: Call) -> list[Check]:
        """Raises CommandError, StorageUnavailable."""
        if self._running.locked():
            raise CommandError("a self-test runs on this node already")
        async with self._running:
            host = next(iter(self._server.hosts), None)
            if host is None:
                raise CommandError("no host is served")
            run = _Run(host, self._nodes.names())
            await self._forget_earlier(host)
            try:
                await call.progress(f"{len(run.users)} accounts and sessions on {len(run.nodes)} nodes")
                return await self._checks(run, call)
            finally:
                # to its end, even when whoever asked has been cut off
                await asyncio.shield(asyncio.ensure_future(self._clean(run)))

    async def _checks(self, run: _Run, call: Call) -> list[Check]:
        for user in run.users:
            if not await self._auth.register(run.host, user, token_hex(16)):
                raise CommandError(f"the account {user}@{run.host} could not be made")
        opened = await asyncio.gather(*(self._open(run, node) for node in run.nodes))
        failed = [check for check in opened if check is not None]
        if failed:
            return failed
        checks = [await self._sees(run, one, other) for one in run.nodes for other in run.nodes]
        await call.progress("every node chats with every node")
        turns = asyncio.Semaphore(AT_ONCE)
        pairs = [(one, other) for one in run.nodes for other in run.nodes]
        chats = await asyncio.gather(*(self._chat(run, one, other, turns) for one, other in pairs))
        return [*chats, *checks, *await self._fired(run, chats)]

    async def _open(self, run: _Run, node: str) -> Check | None:
        jids = [run.jid(node, side) for side in "ab"]
        try:
            await self._ask(node, "selftest.open", {"run": run.name, "jids": jids})
        except Failure as exc:
            return Check("session", self._node, node, "fail", str(exc))
        return None

    async def _chat(self, run: _Run, one: str, other: str, turns: asyncio.Semaphore) -> Check:
        asked = {"run": run.name, "from": run.jid(one, "a"), "to": run.jid(other, "b"), "id": _id(run, one, other)}
        async with turns:
            try:
                ms = await self._ask(one, "selftest.chat", asked)
            except Failure as exc:
                return Check("chat", one, other, "fail", str(exc))
        return Check("chat", one, other, "ok", f"{float(ms):.1f} ms")

    async def _sees(self, run: _Run, one: str, other: str) -> Check:
        """Whether `one` sees the sessions of `other`. Those that end meanwhile do not count, so it is asked again."""
        end = asyncio.get_running_loop().time() + SETTLE
        while True:
            try:
                online = await self._ask(other, "selftest.online", {"limit": MAX_SEEN - 2})
                jids = [*online["jids"], *(run.jid(other, side) for side in "ab")]
                missing = await self._ask(one, "selftest.seen", {"jids": jids})
                if missing:
                    gone = set(await self._ask(other, "selftest.seen", {"jids": missing}))
                    missing = [jid for jid in missing if jid not in gone]
            except Failure as exc:
                return Check("seen", one, other, "fail", str(exc))
            if not missing:
                return Check("seen", one, other, "ok", f"{int(online['count']) + 2} sessions")
            if asyncio.get_running_loop().time() > end:
                return Check("seen", one, other, "fail", f"{len(missing)} of {len(jids)} not seen")
            await asyncio.sleep(AGAIN)

    async def _fired(self, run: _Run, chats: Iterable[Check]) -> list[Check]:
        """Each event once, in the whole cluster, for each message and each receipt."""
        delivered = [_id(run, chat.from_, chat.to) for chat in chats if chat.result == "ok"]
        expected = [*delivered, *(f"{id}-receipt" for id in delivered)]
        total: dict[str, dict[str, int]] = {}
        for node in run.nodes:
            try:
                counts: Mapping[str, Mapping[str, int]] = await self._ask(node, "selftest.counts", {"run": run.name})
            except Failure as exc:
                return [Check("hook", node, "", "fail", str(exc))]
            for event, times in counts.items():
                sums = total.setdefault(event, {})
                for id, count in times.items():
                    sums[id] = sums.get(id, 0) + count
        watching = dict(listening(self._hooks))
        return [_once(event, total.get(event, {}), expected, watching.get(event, [])) for event in watching]

    async def _ask(self, node: str, name: str, asked: dict[str, Any]) -> Any:
        """Raises Failure."""
        try:
            if node == self._node:
                found = self._puppets.handlers[name](asked)
                return await found if asyncio.iscoroutine(found) else found
            return await self._nodes.call(node, name, asked, timeout=CALL)
        except NodeUnreachable as exc:
            raise Failure(f"no answer: {exc}") from exc
        except (CallRefused, CommandError) as exc:
            raise Failure(exc.text) from exc

    # -- afterwards

    async def _clean(self, run: _Run) -> None:
        for node in run.nodes:
            try:
                await self._ask(node, "selftest.close", {"run": run.name})
            except Failure as exc:
                log.warning("self-test left sessions", node=node, error=exc)  # they end by themselves
        await self._remove(run.host, run.users)

    async def _remove(self, host: str, users: Iterable[str]) -> None:
        for user in users:
            try:
                await self._auth.remove(host, user)
            except StorageError as exc:
                log.warning("self-test left accounts", error=exc)  # the next test removes them
                return

    async def _forget_earlier(self, host: str) -> None:
        """Accounts of a test whose node died; not those of one that another node runs now."""
        after = PREFIX
        while names := await self._accounts.names(host, limit=100, after=after):
            ours = [name for name in names if name.startswith(PREFIX)]
            await self._remove(host, [name for name in ours if _age(name) > FORGOTTEN])
            if len(ours) < len(names):
                return
            after = names[-1]


def _age(name: str) -> float:
    try:
        return time.time() - int(name.removeprefix(PREFIX).partition("-")[0], 16)
    except ValueError:
        return 0.0  # somebody's who likes that name


def _id(run: _Run, one: str, other: str) -> str:
    return f"{run.name}-{run.nodes.index(one)}-{run.nodes.index(other)}"


def _once(event: str, times: Mapping[str, int], expected: Sequence[str], watching: Sequence[str]) -> Check:
    wrong = [id for id in expected if times.get(id, 0) != 1]
    watched = ", ".join(watching) or "no module"
    if wrong:
        counts = ", ".join(sorted({str(times.get(id, 0)) for id in wrong}))
        return Check(
            "hook", event, watched, "fail", f"{len(wrong)} of {len(expected)} stanzas raised it {counts} times"
        )
    return Check("hook", event, watched, "ok", f"once for each of {len(expected)} stanzas")


def matrix(checks: Sequence[Check]) -> str:
    """The chats as a table, below it everything else, a line each."""
    chats = {(check.from_, check.to): check for check in checks if check.check == "chat"}
    nodes = list(dict.fromkeys(one for one, _ in chats))
    lines: list[str] = []
    if nodes:
        cells = [["", *nodes]]
        for one in nodes:
            found = [chats[one, other] for other in nodes]
            cells.append([one, *(chat.detail if chat.result == "ok" else "FAIL" for chat in found)])
        widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
        ]
        lines = ["message and receipt, from the left to the top:", *lines, ""]
    for check in checks:
        if check.check != "chat" or check.result != "ok":
            lines.append("\t".join((check.result, check.check, check.from_, check.to, check.detail)))
    return "\n".join(lines) + "\n"


class SelfTestCommands:
    def __init__(self, test: SelfTest) -> None:
        self._test = test

    @command(
        "selftest",
        result=List("checks", Tuple("check", tuple(map(string, ("check", "from", "to", "result", "detail"))))),
        tags=("cluster",),
        scope="node",
        layout=matrix,
        doc="Test the cluster with temporary accounts: every node chats with every node, sees the sessions of all, and"
        " what modules watch happens once for each stanza. Everything is removed again",
    )
    async def selftest(self, call: Call) -> Answer:
        checks = await self._test.run(call)
        failed = any(check.result != "ok" for check in checks)
        return Answer(checks, FAILED if failed else 0)
