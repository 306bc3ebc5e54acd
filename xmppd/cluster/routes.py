"""The addresses of the other members, as our nats-server is to dial them."""

from collections.abc import Iterable

from xmppd.cluster.addresses import Resolver, join
from xmppd.errors import NodeUnreachable
from xmppd.log import get_logger

log = get_logger("cluster")


class Routes:
    """Names on one side, one address for each on the other; another one when that cannot be reached."""

    def __init__(self, resolver: Resolver) -> None:
        self.unresolved: dict[str, str] = {}  # name -> why
        self._resolver = resolver
        self._chosen: dict[str, str] = {}  # name -> address:port
        self._failing: set[str] = set()  # addresses

    @property
    def addresses(self) -> tuple[str, ...]:
        """`address:port` of each, sorted."""
        return tuple(sorted(set(self._chosen.values())))

    async def set(self, names: Iterable[str]) -> None:
        """The routes wanted from now on."""
        wanted = list(dict.fromkeys(names))
        for gone in (self._chosen.keys() | self.unresolved.keys()) - set(wanted):
            self._chosen.pop(gone, None)
            self.unresolved.pop(gone, None)
        for name in wanted:
            if name not in self._chosen:
                await self._choose(name)

    def failed(self, address: str) -> bool:
        """This one could not be dialled; whether it is one of ours, so that `refresh` may know better."""
        if address not in self._chosen.values():
            return False
        self._failing.add(address)
        return True

    async def refresh(self) -> bool:
        """Resolve again what could not be resolved or dialled; whether that changed anything."""
        before = self.addresses
        failing, self._failing = self._failing, set()
        for name in [*self.unresolved, *(name for name, address in self._chosen.items() if address in failing)]:
            await self._choose(name)
        return self.addresses != before

    async def _choose(self, name: str) -> None:
        try:
            found = [join(host, port) for host, port in await self._resolver.resolve(name)]
        except NodeUnreachable as exc:
            if name not in self.unresolved:
                log.warning("node name not resolved", name=name, error=str(exc))
            if name not in self._chosen:  # an address that once was right may be so again
                self.unresolved[name] = str(exc)
            return
        self.unresolved.pop(name, None)
        former = self._chosen.get(name)
        # it was tried, or we would not be here: the next one, round and round
        self._chosen[name] = found[(found.index(former) + 1) % len(found)] if former in found else found[0]
