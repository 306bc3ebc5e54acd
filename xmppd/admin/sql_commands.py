"""Commands about the database servers of every node (xmppd/storage/endpoints.py)."""

from typing import Final

from xmppd.admin.merge import ordered
from xmppd.admin.registry import Arg, command
from xmppd.admin.results import List, Restuple, Tuple, integer, string
from xmppd.errors import CommandError, StorageError
from xmppd.storage import Endpoint, Storage

_ROW: Final = (
    *map(string, ("node", "endpoint", "role", "state")),
    *map(integer, ("size", "used", "waiting", "round_trip_us", "statements", "slow", "errors", "retries", "lag_ms")),
    integer("wsrep_size"),
    *map(string, ("wsrep_state", "version", "cipher", "reason")),
)
_UNKNOWN: Final = -1


class SqlCommands:
    """A node answers for the servers it uses; commands ask all nodes."""

    def __init__(self, storage: Storage, node: str) -> None:
        self._storage = storage
        self._node = node

    @command(
        "sql_status",
        result=List("endpoints", Tuple("endpoint", _ROW)),
        tags=("sql",),
        reads=True,
        scope="gather",
        merge=ordered(lambda row: (row[0], row[2] != "write", row[1])),
        doc="Show the database servers of every node: role (`write*`: where writes go now), up, down or taken down, "
        "connections that are open and in use, who waits for one, round trip, statements, slow ones, errors, "
        "repetitions since the start, how late a replica is (-1: not known), size and state of a Galera cluster, "
        "version, cipher of TLS, and why it is down",
    )
    def status(self) -> list[tuple[str | int, ...]]:
        writer = self._storage.endpoints.writer
        return [self._row(each, each is writer) for each in self._storage.endpoints]

    def _row(self, endpoint: Endpoint, current: bool) -> tuple[str | int, ...]:
        role = "write*" if current else endpoint.role
        numbers = (
            endpoint.size,
            endpoint.used,
            endpoint.waiting,
            _scaled(endpoint.round_trip, 1_000_000),
            endpoint.statements,
            endpoint.slow,
            endpoint.errors,
            endpoint.retries,
            _scaled(endpoint.lag, 1000),
            endpoint.wsrep_size if endpoint.wsrep_size is not None else _UNKNOWN,
        )
        words = (endpoint.wsrep_state, endpoint.version, endpoint.cipher, endpoint.reason)
        return (self._node, endpoint.name, role, endpoint.state, *numbers, *words)

    @command(
        "sql_endpoint",
        args=(Arg("endpoint"), Arg("state")),
        result=Restuple(),
        tags=("sql",),
        scope="everywhere",
        doc="Take a database server out of use on every node (STATE down), or use it again (up); not the only one that "
        "takes writes",
    )
    def endpoint(self, endpoint: str, state: str) -> str:
        if state not in ("up", "down"):
            raise CommandError(f"no state of a database server: {state} (there are up and down)")
        servers = self._storage.endpoints
        try:
            found = servers.find(endpoint)
            if state == "down":
                servers.take_down(found)
            else:
                servers.bring_up(found)
        except StorageError as exc:
            raise CommandError(str(exc)) from exc
        return f"{found.name} is {found.state}"


def _scaled(value: float | None, factor: int) -> int:
    return _UNKNOWN if value is None else round(value * factor)
