"""Servers for scenarios, and databases. A real process serves many tests, whose accounts go with them; `fresh` makes
one to break."""

import contextlib
import gc
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import alone, mariadb
from tests.databases import Databases
from tests.harness import ports
from tests.harness.cluster import RealCluster
from tests.harness.scene import Scene
from tests.harness.server import Server, options

_SERVERS = pytest.StashKey[list[Server]]()
_LOCKS = pytest.StashKey[Path]()
_SHARED_AT_ONCE = 8  # each takes 100 MB

# Hundreds of processes are started from here: compiling everything anew for each would be half of their work.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def _sockets() -> int:
    """How many this process has open."""
    found = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found += os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
    return found


@pytest.fixture(autouse=True)
def _whoever_leaves_a_socket_is_named() -> Iterator[None]:
    """What is left unclosed is warned of when the collector finds it: have that be in the test that left it, and not
    in whichever one runs by then."""
    before = _sockets()
    yield
    if _sockets() > before:
        gc.collect()


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Servers that several tests use, by the options they were made with; a few, those used last."""
    servers: dict[str, Server] = {}

    def get(**changes: Any) -> Server:
        key = repr(sorted(changes.items()))
        server = servers.pop(key, None)
        if server is None:
            if len(servers) >= _SHARED_AT_ONCE:
                _end(servers.pop(next(iter(servers))))
            server = Server(tmp_path_factory.mktemp("server"), options(**changes))
            server.start()
        servers[key] = server
        return server

    yield get
    for server in servers.values():
        server.send_signal(signal.SIGTERM)  # all of them at once
    for server in servers.values():
        _end(server)


def _end(server: Server) -> None:
    server.send_signal(signal.SIGTERM)
    server.wait()


async def _scene(request: pytest.FixtureRequest, node: Server) -> AsyncIterator[Scene]:
    request.node.stash.setdefault(_SERVERS, []).append(node)
    node.new_log()
    scene = Scene(node)
    try:
        yield scene
    finally:
        await scene.end()
    node.judge()


@pytest.fixture
async def server(request: pytest.FixtureRequest, shared: Callable[..., Server]) -> AsyncIterator[Scene]:
    """The server as it comes, with small limits on nothing."""
    async for scene in _scene(request, shared()):
        yield scene


@pytest.fixture
async def strict_server(request: pytest.FixtureRequest, shared: Callable[..., Server]) -> AsyncIterator[Scene]:
    """The same by the letter of RFC 6121."""
    async for scene in _scene(request, shared(routing={"profile": "rfc6121"})):
        yield scene


@pytest.fixture
async def private_server(request: pytest.FixtureRequest, shared: Callable[..., Server]) -> AsyncIterator[Scene]:
    """IQs of strangers do not reach a user's clients."""
    async for scene in _scene(request, shared(routing={"iq_needs_presence": True})):
        yield scene


@pytest.fixture
async def served(request: pytest.FixtureRequest, shared: Callable[..., Server]) -> AsyncIterator[Callable[..., Scene]]:
    """`served(**options)`: a scene on a server that is shared by all who ask for the same options."""
    scenes: list[Any] = []

    async def enter(**changes: Any) -> Scene:
        generator = _scene(request, shared(**changes))
        scenes.append(generator)
        return await anext(generator)

    yield enter
    for generator in reversed(scenes):
        async for _ in generator:
            raise AssertionError("a scene ends once")


@pytest.fixture
async def fresh(request: pytest.FixtureRequest, tmp_path: Any) -> AsyncIterator[Callable[..., Scene]]:
    """`fresh(**options)`: a scene on a server of the test's own, started unless `start=False`; it may be broken."""
    scenes: list[Scene] = []

    def make(*, start: bool = True, **changes: Any) -> Scene:
        node = Server(tmp_path / f"node{len(scenes)}", options(**changes))
        request.node.stash.setdefault(_SERVERS, []).append(node)
        scenes.append(Scene(node))
        if start:
            node.start()
        return scenes[-1]

    yield make
    for scene in scenes:
        scene.forget_accounts()
        try:
            await scene.end()
        finally:
            if scene.node.process is not None and scene.node.process.poll() is None:
                scene.node.stop()
            else:
                scene.node.kill()
        scene.node.judge()


@pytest.fixture
def real_cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., RealCluster]]:
    """`real_cluster(n, **options)`: n nodes as processes that share a database (tests/harness/cluster.py). Unless told
    otherwise they are started, joined and in step."""
    made: list[RealCluster] = []

    def make(count: int, *, start: bool = True, join: bool = True, **changes: Any) -> RealCluster:
        folder = tmp_path / f"cluster{len(made)}"
        folder.mkdir()
        cluster = RealCluster(folder, count, **changes)
        made.append(cluster)
        request.node.stash.setdefault(_SERVERS, []).extend(cluster.nodes)
        if start:
            cluster.start()
            if join:
                cluster.join()
                cluster.converged()
        return cluster

    yield make
    for cluster in made:
        cluster.end()
    for cluster in made:
        for node in cluster:
            node.judge()


@pytest.fixture
def free_port() -> int:
    """For a server that must come back where it was."""
    return ports.free_port()


@pytest.fixture(scope="session")
def mariadb_server() -> Iterator[mariadb.MariaDB]:
    """One for all tests of this process. Who stops it starts it again."""
    why = mariadb.missing()
    if why is not None:
        if mariadb.required():
            pytest.fail(f"{why}, and XMPPD_REQUIRE_MARIADB=1 asks for it")
        pytest.skip(why)
    server = mariadb.MariaDB()
    try:
        yield server
    finally:
        server.destroy()


@pytest.fixture(scope="session")
def databases(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Databases:
    return Databases(tmp_path_factory.mktemp("template"), lambda: request.getfixturevalue("mariadb_server"))


def pytest_configure(config: pytest.Config) -> None:
    """The first of the processes that run tests makes the folder of their locks; the others inherit its name."""
    if alone.FOLDER not in os.environ:
        os.environ[alone.FOLDER] = tempfile.mkdtemp(prefix="xmppd-test-locks-")
        config.stash[_LOCKS] = Path(os.environ[alone.FOLDER])


def pytest_unconfigure(config: pytest.Config) -> None:
    folder = config.stash.get(_LOCKS, None)
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
        del os.environ[alone.FOLDER]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Who waits to be alone keeps all others from going on: that is the shorter the fewer are left."""
    items.sort(key=lambda item: item.get_closest_marker("alone") is not None)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Any:
    with alone.turn(Path(os.environ[alone.FOLDER]), alone=item.get_closest_marker("alone") is not None):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """A failure shows what the servers said."""
    report = yield
    if report.failed:
        for server in item.stash.get(_SERVERS, []):
            report.sections.append((f"log of {server.folder.name}", server.new_log()[-6000:]))
    return report
