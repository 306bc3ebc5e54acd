"""All http listeners of a node, and the handlers behind them."""

import asyncio
from collections.abc import Mapping
from typing import Any, Protocol

from xmppd.access import Access as Rules
from xmppd.admin.api_tokens import ApiTokens
from xmppd.admin.nodes import Nodes
from xmppd.admin.registry import Registry
from xmppd.c2s.session import Parts
from xmppd.c2s.tls import Certificates
from xmppd.cluster.cluster import Cluster
from xmppd.config import Config, HttpListen
from xmppd.forward import Forwarder
from xmppd.http.access import Access
from xmppd.http.answers import Handler
from xmppd.http.api import Api
from xmppd.http.cluster_metrics import ClusterSources
from xmppd.http.health import Live, Ready
from xmppd.http.listener import HttpListener
from xmppd.http.metrics_page import MetricsPage, Sources
from xmppd.metrics import Counters, LoopLag
from xmppd.outbox import Outbox
from xmppd.session_manager import SessionManager
from xmppd.spool import Spool
from xmppd.storage import Storage


class Node(Protocol):
    """The server, as far as HTTP shows it."""

    config: Config
    access: Rules
    version: str
    storage: Storage
    spool: Spool
    outbox: Outbox
    sessions: SessionManager
    registry: Registry
    certificates: Certificates
    counters: Counters
    lag: LoopLag
    parts: Parts
    cluster: Cluster
    forwarder: Forwarder

    @property
    def nodes(self) -> Nodes: ...
    @property
    def api_tokens(self) -> ApiTokens: ...
    @property
    def status(self) -> str: ...
    def uptime(self) -> float: ...
    def listening(self) -> bool: ...
    def connections(self) -> Mapping[str, int]: ...


class HttpServers:
    """Opens and closes the listeners of one node."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._requests: dict[tuple[str, int], int] = {}
        self._listeners: list[HttpListener] = []
        self._ready = Ready(lambda: node.status, node.storage.ping, self._listening)
        self._access = Access(lambda: node.config, node.access, node.api_tokens)
        self._metrics = MetricsPage(
            Sources(
                node=node.config.node,
                version=node.version,
                hosts=node.config.hosts,
                uptime=node.uptime,
                connections=node.connections,
                certificate_days=node.certificates.expiry,
                sessions=node.sessions,
                batcher=node.storage.batcher,
                spool=node.spool,
                outbox=node.outbox,
                counters=node.counters,
                lag=node.lag,
                requests=self._requests,
                resumption=node.parts.resumption,
                spooling=node.parts.spooling,
                databases=node.storage.endpoints,
            ),
            ClusterSources(node.cluster.engine, node.cluster.links, node.cluster.calls, node.forwarder),
        )

    async def open(self, listen: HttpListen) -> dict[str, Any]:
        """Open one listener; its entry for ready.json comes back. Raises XmppdError."""
        handlers = {path: self._handler(path, kind) for path, kind in listen.request_handlers.items()}
        tls = self._node.certificates.context if listen.tls else None
        listener = HttpListener(
            listen.ip,
            listen.port,
            handlers,
            tls=tls,
            requests=self._requests,
            proxies=listen.trusted_proxies if listen.use_proxy_protocol else None,
            refused=self._node.counters.proxies_refused,
        )
        entry = await listener.open()
        self._listeners.append(listener)
        return entry

    def _handler(self, path: str, kind: str) -> Handler:
        if kind == "api":
            node, prefix = self._node, path.rstrip("/")
            return Api(node.registry, self._access, version=node.version, prefix=prefix, nodes=node.nodes)
        handlers: dict[str, Handler] = {"live": Live(), "ready": self._ready, "metrics": self._metrics}
        return handlers[kind]

    def _listening(self) -> bool:
        return self._node.listening() and all(listener.listening for listener in self._listeners)

    async def close(self, grace: float) -> None:
        """Close all of them, waiting up to `grace` seconds for requests that run."""
        await asyncio.gather(*(listener.close(grace) for listener in self._listeners))
        self._ready.close()
