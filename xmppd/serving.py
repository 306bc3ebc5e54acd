"""The listeners of a node: http first to come and last to go, so that a balancer that asks gets its answer."""

import asyncio
import functools
from collections.abc import Coroutine
from typing import Any, Final, Protocol

from xmppd.access import Access
from xmppd.auth import Auth
from xmppd.c2s.capacity import room
from xmppd.c2s.connection import Settings
from xmppd.c2s.listener import ClientListener
from xmppd.c2s.negotiation import Rules
from xmppd.c2s.session import Parts
from xmppd.c2s.ticks import Ticks
from xmppd.config import HttpListen
from xmppd.config.schema import C2SListen
from xmppd.http.node import HttpServers
from xmppd.http.node import Node as HttpNode
from xmppd.protocol.stream import Limits

_HTTP_GRACE: Final = 2.0  # seconds for requests that run at stop


class Node(HttpNode, Protocol):
    """The server, as far as clients meet it."""

    access: Access
    auth: Auth
    parts: Parts
    ticks: Ticks

    def spawn(self, coroutine: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]: ...


class Listeners:
    """Opens and closes every listener of one node."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._clients: list[ClientListener] = []
        self._http = HttpServers(node)
        self._room = room()
        self.addresses: list[dict[str, Any]] = []  # for ready.json

    async def open_http(self) -> None:
        for listen in self._node.config.listen:
            if isinstance(listen, HttpListen):
                self.addresses.append(await self._http.open(listen))

    async def close_http(self) -> None:
        await self._http.close(_HTTP_GRACE)

    async def open_clients(self) -> None:
        for listen in self._node.config.listen:
            if isinstance(listen, C2SListen):
                await self._listen(listen)

    async def close_clients(self, grace: float) -> None:
        """No new ones; those that are there are told, and cut off after `grace` seconds."""
        for listener in self._clients:
            listener.stop_listening()
        await asyncio.gather(*(listener.close(grace) for listener in self._clients))

    def listening(self) -> bool:
        """Whether every listener of clients is open."""
        return all(listener.listening for listener in self._clients)

    def connections(self) -> dict[str, int]:
        """How many client connections each kind of listener has."""
        found: dict[str, int] = {}
        for listener in self._clients:
            found[listener.settings.name] = found.get(listener.settings.name, 0) + listener.connections
        return found

    def shape(self) -> None:
        """The rules of access have changed."""
        for listener in self._clients:
            listener.shape()

    async def _listen(self, listen: C2SListen) -> None:
        node = self._node
        listener = ClientListener(
            listen.ip,
            listen.port,
            direct_tls=listen.tls,
            settings=_settings(listen),
            rules=Rules(
                node.config.hosts,
                listen.starttls,
                listen.starttls_required,
                lambda host: node.config.for_host(host).resource_conflict,
                node.access.max_sessions,
                functools.partial(node.access.allowed, listen.access),
                functools.partial(node.access.shaper, listen.shaper),
            ),
            auth=node.auth,
            tls=node.certificates,
            parts=lambda: node.parts,
            ticks=node.ticks,
            spawn=node.spawn,
            room=self._room,
            proxies=listen.trusted_proxies if listen.use_proxy_protocol else None,
        )
        address = await listener.open()
        self._clients.append(listener)
        self.addresses.append({"module": "c2s", "ip": address.ip, "port": address.port, "tls": address.tls})


def _settings(listen: C2SListen) -> Settings:
    return Settings(
        name="c2s_tls" if listen.tls else "c2s",
        before=Limits(
            size=listen.pre_auth_max_stanza_size,
            depth=listen.max_depth,
            elements=listen.pre_auth_max_elements,
            names=min(listen.max_novel_names, listen.pre_auth_max_elements),
            total=listen.pre_auth_max_elements,
        ),
        after=Limits(
            size=listen.max_stanza_size,
            depth=listen.max_depth,
            elements=listen.max_elements,
            names=listen.max_novel_names,
        ),
        negotiation_timeout=listen.negotiation_timeout,
        idle_timeout=listen.idle_timeout,
        max_write_queue=listen.max_write_queue,
        send_timeout=listen.send_timeout,
    )
