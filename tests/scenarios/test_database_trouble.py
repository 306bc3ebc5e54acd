"""The database is away, slow, locked or full: what the people notice, and what an acknowledgement was worth.

In each scenario romeo and juliet chat while it lasts; mercutio writes to the absent nurse; juliet changes her roster;
paris tries to log in with the right password. Afterwards the books are checked: nothing that was acknowledged, and no
message whose sender was not told otherwise, is missing; order is kept; the node has recovered by itself.
"""

import asyncio
import contextlib
import os
import shutil
import sqlite3
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests import mariadb
from tests.scenarios.plain_node import PATIENCE, Client, Node, Refused, error_of

SHORT, NOTICED, LONG = 5.0, 8.0, 30.0  # seconds of trouble; after more than SHORT the log tells of writes that wait
PROMPT = 2.0  # seconds a message between two people online may take, on a busy machine, whatever the database does
BOUND = 28.0  # seconds within which every request has its answer: below a stream's negotiation_timeout
BACK = 20.0  # seconds after its end until a trouble is over for everybody
SQLITE_DISK = "4m"

Trouble = Callable[[float], AbstractAsyncContextManager[None]]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path / "node", database={"pool": {"timeout": 3}})
    node.options["listen"].append({"port": 0, "module": "http"})
    node.write(modules={"roster": {}, "presence": {}, "offline": {"max_messages": 10_000}, "ping": {}})
    yield node
    node.end(9)


class Play:
    """Who says what to whom during a trouble, and who got what."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.sent: list[float] = []
        self.posted: list[str] = []
        self.contacts: dict[str, str] = {}  # what juliet was answered: "result", or the error
        self.logins: list[str] = []
        self.slowest = 0.0
        self.unready = 0

    async def prepare(self, *, register: bool = True) -> None:
        if register:
            self.node.register("romeo", "juliet", "mercutio", "nurse", "paris")
        names = ("romeo", "juliet", "mercutio")
        self.romeo, self.juliet, self.mercutio = [await Client.login(self.node, name) for name in names]
        for one in (self.romeo, self.juliet, self.mercutio):
            await one.ask("get", "<query xmlns='jabber:iq:roster'/>")
            await one.sync()
        self._post_one()
        await self.mercutio.sync()  # that the nurse is registered is known from here on, so there will be writes

    async def go_on(self, trouble: AbstractAsyncContextManager[None]) -> None:
        """Everybody acts from a moment before the trouble until a moment after it."""
        over = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for act in (self._chat, self._post, self._change_roster, self._log_in, self._look_whether_ready):
                group.create_task(act(over))
            await asyncio.sleep(0.3)
            async with trouble:
                pass
            await asyncio.sleep(0.3)
            over.set()

    async def _chat(self, over: asyncio.Event) -> None:
        while not over.is_set():
            number = len(self.sent)
            self.sent.append(time.monotonic())
            self.romeo.send(
                f"<message to='juliet@localhost' type='chat' id='r{number}'><body>{number}</body></message>"
            )
            await asyncio.sleep(0.02)

    async def _post(self, over: asyncio.Event) -> None:
        while not over.is_set():
            self._post_one()
            await asyncio.sleep(0.3)

    def _post_one(self) -> None:
        name = f"post{len(self.posted)}"
        self.posted.append(name)
        self.mercutio.send(f"<message to='nurse@localhost' type='chat' id='{name}'><body>{name}</body></message>")

    async def _change_roster(self, over: asyncio.Event) -> None:
        while not over.is_set():
            jid = f"friend{len(self.contacts)}@localhost"
            answer = await self._timed(
                self.juliet.ask("set", f"<query xmlns='jabber:iq:roster'><item jid='{jid}'/></query>")
            )
            self.contacts[jid] = "result" if answer.get("type") == "result" else error_of(answer)
            await asyncio.sleep(0.1)

    async def _log_in(self, over: asyncio.Event) -> None:
        """Several at a time, as people do who are thrown out and come back."""
        async with asyncio.TaskGroup() as group:
            while not over.is_set():
                group.create_task(self._log_in_once())
                await asyncio.sleep(1)

    async def _log_in_once(self) -> None:
        try:
            client = await self._timed(Client.login(self.node, "paris", available=False))
        except Refused as refused:
            self.logins.append(str(refused))
        else:
            self.logins.append("success")
            await client.close()

    async def _look_whether_ready(self, over: asyncio.Event) -> None:
        while not over.is_set():
            self.unready += await self.readiness() == 503
            await asyncio.sleep(0.3)

    async def readiness(self) -> int:
        """The answer of /readyz."""
        port = self.node.http_port

        def ask() -> int:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=PATIENCE) as answer:
                    return int(answer.status)
            except urllib.error.HTTPError as error:
                with error:
                    return int(error.code)

        return await asyncio.to_thread(ask)

    async def _timed(self, work: Any) -> Any:
        began = time.monotonic()
        try:
            return await work
        finally:
            self.slowest = max(self.slowest, time.monotonic() - began)

    # -- afterwards

    async def settle(self) -> None:
        """Wait until the node says itself that all is well."""
        async with asyncio.timeout(BACK):
            while True:
                with contextlib.suppress(Refused):
                    await (await Client.login(self.node, "paris")).close()
                    break
                await asyncio.sleep(0.2)
            while await self.readiness() == 503 or self.writes_wait():  # noqa: ASYNC110 - a process is what we wait for
                await asyncio.sleep(0.2)

    def writes_wait(self) -> bool:
        log = self.node.err
        return log.count("writes wait for the database") > log.count("database takes writes again")

    async def check(self, *, logins: set[str]) -> None:
        """The books. `logins`: what somebody with the right password may have been told."""
        await self._check_chat()
        assert set(self.logins) <= logins | {"success"}
        assert self.slowest < BOUND
        await self._check_post()
        await self._check_roster()
        assert self.node.trouble() == []

    async def _check_chat(self) -> None:
        numbers = [str(number) for number in range(len(self.sent))]
        await self.juliet.until(lambda: len(self.juliet.bodies()) >= len(numbers), "the last message")
        assert self.juliet.bodies() == numbers
        arrived = [when for when, _ in self.juliet.messages()]
        assert max(there - here for here, there in zip(self.sent, arrived, strict=True)) < PROMPT

    async def _check_post(self) -> None:
        """Each message to the absent one arrives once, in order, or its sender was told to try later."""
        await self.mercutio.sync()
        async with asyncio.timeout(BACK):  # what is stored, or refused, becomes so when its commit ends
            while await self._stored() + len(self.mercutio.errors()) < len(self.posted):  # noqa: ASYNC110
                await asyncio.sleep(0.2)
        refused = self.mercutio.errors()
        assert set(refused.values()) <= {"wait internal-server-error", "wait resource-constraint"}, refused
        expected = [name for name in self.posted if name not in refused]
        nurse = await Client.login(self.node, "nurse")
        await nurse.until(lambda: len(nurse.bodies()) >= len(expected), f"{len(expected)} offline messages")
        await nurse.sync()
        got = nurse.bodies()
        # A sender who was told to try later may have been stored all the same: COMMIT was done, its answer lost.
        assert [name for name in got if name not in refused] == expected
        assert len(got) == len(set(got))
        await nurse.close()

    async def _stored(self) -> int:
        return int((await asyncio.to_thread(self.node.ctl, "get_offline_count", "nurse", "localhost")).stdout)

    async def _check_roster(self) -> None:
        assert self.contacts
        assert all(answer == "result" or answer.startswith("wait ") for answer in self.contacts.values()), self.contacts
        answer = await self.juliet.ask("get", "<query xmlns='jabber:iq:roster'/>")
        cached = {item.get("jid") for item in answer[0]}
        assert {jid for jid, answer in self.contacts.items() if answer == "result"} <= cached
        await asyncio.to_thread(self.node.end)
        await asyncio.to_thread(self.node.start)
        again = await Client.login(self.node, "juliet")
        stored = {item.get("jid") for item in (await again.ask("get", "<query xmlns='jabber:iq:roster'/>"))[0]}
        await again.close()
        assert stored == cached  # what people were shown is what is there

    async def end(self) -> None:
        for client in (self.romeo, self.juliet, self.mercutio):
            await client.close()


@asynccontextmanager
async def playing(node: Node) -> AsyncIterator[Play]:
    node.start()
    play = Play(node)
    await play.prepare()
    try:
        yield play
    finally:
        await play.end()


HOW_LONG = [pytest.param(SHORT, id="5s"), pytest.param(LONG, id="30s", marks=pytest.mark.long)]


# -- MariaDB -----------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def paused(server: mariadb.MariaDB, seconds: float) -> AsyncIterator[None]:
    """Its connections stay open and nobody answers, as behind a cable that was pulled."""
    server.pause()
    try:
        await asyncio.sleep(seconds)
    finally:
        server.go_on()
    yield


@asynccontextmanager
async def gone(server: mariadb.MariaDB, seconds: float) -> AsyncIterator[None]:
    """Killed, its port closed."""
    await asyncio.to_thread(server.kill)
    try:
        await asyncio.sleep(seconds)
    finally:
        await asyncio.to_thread(server.start)
    yield


@asynccontextmanager
async def stuttering(server: mariadb.MariaDB, seconds: float) -> AsyncIterator[None]:
    """It answers now and then, some 30 % of the time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        server.pause()
        try:
            await asyncio.sleep(0.7)
        finally:
            server.go_on()
        await asyncio.sleep(0.3)
    yield


@pytest.mark.mariadb
@pytest.mark.parametrize("seconds", HOW_LONG)
@pytest.mark.parametrize(
    "trouble", [pytest.param(paused, id="paused", marks=pytest.mark.long), pytest.param(gone, id="gone")]
)
async def test_a_database_that_is_away_harms_nobody_who_is_online(node, mariadb_server, trouble, seconds):
    node.write(database={"url": mariadb_server.new_database(), "pool": {"timeout": 3}})

    async with playing(node) as play:
        await play.go_on(trouble(mariadb_server, seconds))
        await play.settle()

        if trouble is gone or seconds > 16:  # longer than a statement may take
            assert "temporary-auth-failure" in play.logins
            assert "writes wait for the database" in node.err
            assert "database takes writes again" in node.err
        assert play.unready > 0
        await play.check(logins={"temporary-auth-failure"})


@pytest.mark.long
@pytest.mark.alone
@pytest.mark.mariadb
async def test_a_database_that_stutters_is_borne(node, mariadb_server):
    node.write(database={"url": mariadb_server.new_database(), "pool": {"timeout": 3}})

    async with playing(node) as play:
        await play.go_on(stuttering(mariadb_server, SHORT))
        await play.settle()

        assert "success" in play.logins
        await play.check(logins={"temporary-auth-failure"})


class SlowLine:
    """A TCP proxy that keeps every answer back for `delay` seconds."""

    def __init__(self, port: int, delay: float) -> None:
        self._target, self._delay = port, delay
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> "SlowLine":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        back, forth = await asyncio.open_connection("127.0.0.1", self._target)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, forth, 0))
                group.create_task(self._pump(back, writer, self._delay))
        finally:
            writer.transport.abort()
            forth.transport.abort()
            self._tasks.discard(task)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: float) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                await asyncio.sleep(delay)
                writer.write(data)
        writer.transport.abort()


@asynccontextmanager
async def as_it_is(seconds: float) -> AsyncIterator[None]:
    await asyncio.sleep(seconds)
    yield


@pytest.mark.mariadb
@pytest.mark.long
@pytest.mark.parametrize("seconds", [pytest.param(LONG, id="30s")])
async def test_a_slow_database_makes_logins_slow_and_nothing_else(node, mariadb_server, seconds):
    url = mariadb_server.new_database()
    node.write(database={"url": url})
    node.start()  # makes the tables, which is a matter of its own
    node.register("romeo", "juliet", "mercutio", "nurse", "paris")
    node.end()
    async with SlowLine(mariadb_server.port, 0.12) as line:
        node.write(database={"url": url.replace(f":{mariadb_server.port}/", f":{line.port}/"), "pool": {"timeout": 3}})
        await asyncio.to_thread(node.start)
        play = Play(node)
        await play.prepare(register=False)
        await play.go_on(as_it_is(seconds))

        assert set(play.logins) == {"success"}
        assert play.slowest > 0.12
        assert play.unready == 0
        node.write(database={"url": url})  # its last start goes straight there: the proxy lives in our loop
        await play.check(logins=set())
        await play.end()


# -- SQLite ------------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def locked(path: Path, seconds: float) -> AsyncIterator[None]:
    """Another process writes, and takes its time."""
    program = (
        "import sqlite3, sys, time\n"
        "c = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "c.execute('PRAGMA busy_timeout=5000'); c.execute('BEGIN IMMEDIATE'); print('locked', flush=True)\n"
        "time.sleep(float(sys.argv[2])); c.execute('ROLLBACK')\n"
    )
    process = await asyncio.create_subprocess_exec(
        shutil.which("python3") or "python3", "-c", program, str(path), str(seconds), stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"locked\n"
    assert await process.wait() == 0
    yield


@pytest.mark.parametrize(
    "seconds", [pytest.param(NOTICED, id="8s"), pytest.param(LONG, id="30s", marks=pytest.mark.long)]
)
async def test_a_locked_database_delays_writes_only(node, seconds):
    async with playing(node) as play:
        await play.go_on(locked(node.data_dir / "xmppd.db", seconds))
        await play.settle()

        assert set(play.logins) == {"success"}
        assert play.unready == 0  # it is read, and online users are served
        assert "writes wait for the database" in node.err
        assert "database takes writes again" in node.err
        await play.check(logins=set())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own that is full with 4 MiB."""
    if os.geteuid() != 0:
        pytest.skip("a small file system takes root to mount")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SQLITE_DISK},mode=700", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"tmpfs cannot be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@asynccontextmanager
async def full(folder: Path, seconds: float) -> AsyncIterator[None]:
    """Not a byte is left."""
    filler = folder / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    try:
        await asyncio.sleep(seconds)
    finally:
        filler.unlink()
    yield


@pytest.mark.long
@pytest.mark.parametrize("seconds", HOW_LONG)
async def test_a_full_disk_refuses_writes_politely(node, small_disk, seconds):
    """The log is on it, too, as it often is."""
    node.data_dir = small_disk / "var"
    node.write(data_dir=str(node.data_dir), log_file=str(small_disk / "xmppd.log"))

    async with playing(node) as play:
        await play.go_on(full(small_disk, seconds))
        await play.settle()

        log = (small_disk / "xmppd.log").read_text()
        assert "log lines lost count=" in log or "database or disk is full" in log
        await play.check(logins=set())


def test_sqlite_itself_is_as_we_found_it(tmp_path):
    """What the scenario of the lock stands on: with a write-ahead log readers do not wait for the writer."""
    first = sqlite3.connect(tmp_path / "x.db", isolation_level=None)
    second = sqlite3.connect(tmp_path / "x.db", isolation_level=None)
    with contextlib.closing(first), contextlib.closing(second):
        first.execute("PRAGMA journal_mode=WAL")
        first.execute("CREATE TABLE t (x)")
        first.execute("BEGIN IMMEDIATE")

        assert second.execute("SELECT count(*) FROM t").fetchone() == (0,)
