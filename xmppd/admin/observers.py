"""Observers: programs that are no nodes, but look at the cluster over NATS and call commands.

They hold no replica, get no routes, and count for nothing. NATS lets each one only on the subjects of its own rights;
which commands it may call, `api_permissions` say. Of the nodes that serve observers one answers each question.
docs/cluster-protocol.md has the subjects and what is said on them.
"""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

from xmppd.access import Access
from xmppd.admin.nodes import Nodes
from xmppd.admin.registry import Call, Caller, Registry, UsageError
from xmppd.admin.results import error_json
from xmppd.admin.watch import Event, Watch
from xmppd.cluster import subjects
from xmppd.cluster.engine import Hear, Observer, ObserverPort
from xmppd.cluster.tables import Owner, RouteTable, SessionTable
from xmppd.config import Config
from xmppd.config.api import Who, covers
from xmppd.config.schema import Observers as Settings
from xmppd.config.types import host_port
from xmppd.errors import CommandError, ConfigError
from xmppd.log import get_logger

log = get_logger("admin")

AT_ONCE: Final = 8  # questions of one observer; more are refused
PIECE: Final = 32 * 1024  # characters of one message: none is cut in two
PATIENCE: Final = 10.0  # seconds for the network to take more
FORBIDDEN: Final = 1
SHORTEST_SECRET: Final = 16
_QUEUE: Final = "xmppd"


class Transport(Protocol):
    """The engine (cluster/engine.py), as observers need it."""

    async def set_observers(self, observers: Iterable[Observer], port: ObserverPort | None) -> None: ...
    async def hear(self, subject: str, handler: Hear | None, *, queue: str = "") -> None: ...
    def publish(self, subject: str, data: bytes) -> bool: ...


class Spawn(Protocol):
    def __call__(self, coroutine: Coroutine[Any, Any, None], *, name: str) -> object: ...


def users_of(settings: Settings, cluster: bytes) -> list[Observer]:
    """What NATS lets each one do. Raises ConfigError for a secret that cannot be read."""
    found = []
    for name, user in settings.users.items():
        publish = [subjects.about(name)]
        listen = [subjects.inbox(name)]
        if "tables" in user.may:
            publish.append(subjects.tables(cluster, name))
        if "api" in user.may:
            publish.append(subjects.api(cluster, name))
        if "events" in user.may:
            listen.append(subjects.event(cluster, ">"))
        found.append(Observer(name, _secret(name, user.secret_file), tuple(publish), tuple(listen)))
    return found


def _secret(name: str, file: str) -> str:
    at = f"cluster.observers.users.{name}.secret_file"
    try:
        path = Path(file)
        if path.stat().st_mode & 0o077:
            raise ConfigError([f"{at}: {file} can be read by others: chmod 600"])
        secret = path.read_text().partition("\n")[0].strip()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError([f"{at}: {file}: {getattr(exc, 'strerror', None) or 'not a text'}"]) from exc
    if len(secret) < SHORTEST_SECRET or not secret.isprintable():
        raise ConfigError([f"{at}: {file}: expected at least {SHORTEST_SECRET} characters on the first line"])
    return secret


class Observers:
    """Serves the observers of one node's configuration, between `apply` and `stop`."""

    def __init__(
        self,
        *,
        node: str,
        version: str,
        transport: Transport,
        registry: Registry,
        nodes: Nodes,
        watch: Watch,
        table: SessionTable,
        routes: RouteTable,
        config: Callable[[], Config],
        rules: Access,
        spawn: Spawn,
    ) -> None:
        self._node = node
        self._version = version
        self._transport = transport
        self._registry = registry
        self._nodes = nodes
        self._watch = watch
        self._table = table
        self._routes = routes
        self._config = config
        self._rules = rules
        self._spawn = spawn
        self._cluster = b""
        self._heard: list[str] = []
        self._publishing = False
        self._running: Counter[str] = Counter()

    @property
    def wanted(self) -> bool:
        """Whether the configuration has observers, so that NATS has to run also on a node that is alone."""
        settings = self._settings()
        return settings.listen is not None and bool(settings.users)

    async def apply(self, cluster: bytes) -> None:
        """Serve what the configuration says now, in this cluster (its UUID). Raises ConfigError, before anything
        changed."""
        settings = self._settings()
        users = users_of(settings, cluster) if self.wanted else []
        await self._silence()
        self._cluster = cluster
        await self._transport.set_observers(users, self._port(settings) if users else None)
        if not users:
            return
        for subject, handler in (
            (subjects.about("*"), self._about),
            (subjects.tables(cluster, "*"), self._rows),
            (subjects.api(cluster, "*"), self._called),
        ):
            self._heard.append(subject)
            await self._transport.hear(subject, handler, queue=_QUEUE)
        if any("events" in user.may for user in settings.users.values()):
            self._publishing = True
            self._watch.publish(self._happened, True)

    async def stop(self) -> None:
        """Answer no more."""
        await self._silence()

    async def _silence(self) -> None:
        for subject in self._heard:
            await self._transport.hear(subject, None)
        self._heard.clear()
        if self._publishing:
            self._publishing = False
            self._watch.publish(self._happened, False)

    def _settings(self) -> Settings:
        return self._config().cluster.observers

    def _port(self, settings: Settings) -> ObserverPort:
        assert settings.listen is not None
        host, port = host_port(settings.listen)
        return ObserverPort(host, port, Path(settings.certfile) if settings.certfile else None)

    # -- what they hear

    def _happened(self, event: Event) -> None:
        told = {**event._asdict(), "by": self._node}
        data = json.dumps(told, ensure_ascii=False).encode("utf-8", "replace")
        self._transport.publish(subjects.event(self._cluster, event.event), data)

    # -- what they ask

    def _about(self, subject: str, reply: str, data: bytes) -> None:
        self._ask(subject, reply, data, "", self._tell_about)

    def _rows(self, subject: str, reply: str, data: bytes) -> None:
        self._ask(subject, reply, data, "tables", self._tell_rows)

    def _called(self, subject: str, reply: str, data: bytes) -> None:
        self._ask(subject, reply, data, "api", self._call)

    def _ask(
        self, subject: str, reply: str, data: bytes, right: str, work: "Callable[[str, Asked], AsyncIterator[str]]"
    ) -> None:
        name = subject.rpartition(".")[2]
        user = self._settings().users.get(name)
        # the answer is sent with our rights: nowhere but to where this observer, and no other, listens
        if user is None or not reply.startswith(subjects.inbox(name).removesuffix(">")):
            log.warning("observer refused", observer=name, subject=subject)
            return
        self._spawn(self._answer(name, reply, data, right in ("", *user.may), work), name="observer's question")

    async def _answer(
        self, name: str, reply: str, data: bytes, may: bool, work: "Callable[[str, Asked], AsyncIterator[str]]"
    ) -> None:
        self._running[name] += 1
        try:
            if not may:
                raise CommandError("this observer has no right to that", FORBIDDEN)
            if self._running[name] > AT_ONCE:
                raise CommandError(f"more than {AT_ONCE} questions at once")
            async for text in work(name, _asked(data)):
                await self._say(reply, text)
        except CommandError as exc:
            await self._say(reply, error_json(exc.text, exc.code))
        except TimeoutError:
            log.warning("observer's answer given up", observer=name)
            return  # without an end, so that nobody takes a part for the whole
        finally:
            self._running[name] -= 1
        await self._send(reply, b"")

    async def _say(self, reply: str, text: str) -> None:
        for start in range(0, len(text), PIECE):
            await self._send(reply, text[start : start + PIECE].encode("utf-8", "replace"))
        await asyncio.sleep(0)

    async def _send(self, reply: str, data: bytes) -> None:
        """Raises TimeoutError."""
        async with asyncio.timeout(PATIENCE):
            while not self._transport.publish(reply, data):  # noqa: ASYNC110 - nothing tells when there is room
                await asyncio.sleep(0.05)

    async def _tell_about(self, name: str, asked: "Asked") -> AsyncIterator[str]:
        found = {"cluster": self._cluster.hex(), "node": self._node, "version": self._version}
        yield json.dumps({**found, "nodes": sorted(self._nodes.names())}) + "\n"

    async def _tell_rows(self, name: str, asked: "Asked") -> AsyncIterator[str]:
        table = asked.get("table")
        if table == "sessions":
            async for text in _array(self._sessions(asked.get("host"))):
                yield text
        elif table == "routes":
            routes = [route for domain in self._routes.domains() for route in self._routes.routes(domain)]
            rows = [{"domain": route.domain, "node": self._name_of(route.owner)} for route in routes]
            yield json.dumps(rows) + "\n"
        else:
            raise UsageError(f"table: expected sessions or routes, got {table!r:.40}")

    def _sessions(self, host: object) -> Iterable[list[dict[str, Any]]]:
        for rows in self._table.pieces():
            yield [
                {
                    "jid": row.jid.full,
                    "node": self._name_of(row.owner),
                    "priority": row.priority,
                    "bound_at": row.bound_at // 1_000_000,
                }
                for row in rows
                if host is None or row.jid.domain == host
            ]

    def _name_of(self, owner: Owner) -> str:
        return self._nodes.name_of(owner.member)

    async def _call(self, name: str, asked: "Asked") -> AsyncIterator[str]:
        command, args, node = asked.get("command"), asked.get("args", {}), asked.get("node")
        spec = self._registry.by_path(command.replace(" ", "_")) if isinstance(command, str) else None
        if spec is None or not isinstance(args, Mapping):
            raise UsageError("expected an object with command, the name of one, and args, an object")
        if not any(covers(what, spec.name, spec.tags) for what in self._rights(name)):
            raise CommandError(f"the observer '{name}' may not call '{spec.name}'", FORBIDDEN)
        caller, local = Caller("observer", name), asked.get("local") is True
        if isinstance(node, str) and node != self._node:
            yield await self._nodes.fetch(node, spec.name, args, caller, local=local)
            return
        result = await self._registry.call(spec.name, args, caller=caller, call=Call(caller, local=local))
        if result.notes:
            raise CommandError("; ".join(result.notes), result.code)
        for text in result.json_chunks():
            yield text

    def _rights(self, name: str) -> list[tuple[str, ...]]:
        return [
            permission.what
            for permission in self._config().api_permissions.values()
            if "observer" in permission.from_ and any(self._is(name, who) for who in permission.who)
        ]

    def _is(self, name: str, who: Who) -> bool:
        """An observer has a name, and neither token nor address."""
        return (
            not who.token
            and not who.ip
            and (not who.observer or name in who.observer)
            and (not who.acl or any(self._rules.in_acl(acl, None, "") for acl in who.acl))
        )


Asked = Mapping[str, Any]


def _asked(data: bytes) -> Asked:
    try:
        found = json.loads(data or b"{}")
    except (ValueError, RecursionError):
        raise UsageError("the question is no JSON") from None
    if not isinstance(found, dict):
        raise UsageError("the question is no JSON object")
    return found


async def _array(pieces: Iterable[list[dict[str, Any]]]) -> AsyncIterator[str]:
    """One JSON array, a piece at a time."""
    before = "["
    for rows in pieces:
        if rows:
            yield before + json.dumps(rows, ensure_ascii=False)[1:-1]
            before = ", "
        await asyncio.sleep(0)
    yield "]\n" if before != "[" else "[]\n"
