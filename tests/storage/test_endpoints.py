"""Several database servers, pools with limits, proxies between: what a MySQL in production does to us.

The servers are one MariaDB behind proxies of its own for each name that it has.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator

import aiomysql
import pytest
from sqlalchemy import text

from modules.last import last_activity
from tests import mariadb
from tests.harness.tcp_proxy import TcpProxy
from tests.mariadb import MariaDB
from tests.mariadb_clusters import Pair
from xmppd.errors import StorageError, StorageUnavailable
from xmppd.protocol.sasl import Secret
from xmppd.spool import Kept, Spool
from xmppd.storage import Accounts, Storage, endpoints, new_id
from xmppd.storage.engine import MysqlConnection
from xmppd.storage.sql import read_per_user, write_per_user
from xmppd.storage.tables import spool as spool_table

pytestmark = pytest.mark.mariadb
PATIENCE = 20.0


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "PROBE_EVERY", 0.05)
    monkeypatch.setattr(endpoints, "_MISSES", {"read": 2, "write": 2})


@pytest.fixture
async def proxies(mariadb_server: MariaDB) -> AsyncIterator[list[TcpProxy]]:
    """Two ways to the server."""
    async with TcpProxy(mariadb_server.port) as one, TcpProxy(mariadb_server.port) as other:
        yield [one, other]


def through(url: str, server: MariaDB, *proxies: TcpProxy) -> str:
    """The URL, with the proxies instead of the server."""
    return url.replace(f"127.0.0.1:{server.port}", ",".join(f"127.0.0.1:{proxy.port}" for proxy in proxies))


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def beat(storage: Storage) -> None:
    """What nodes do all the time: without it nobody knows how late a replica is."""
    await storage.run(lambda connection: connection.execute(text("DELETE FROM node")))
    columns = "node_id, name, address, state, incarnation, version, hosts_hash, last_seen_at"
    await storage.run(
        lambda connection: connection.execute(
            text(f"INSERT INTO node ({columns}) VALUES (x'00', 'a', '', 'single', 1, '1', x'00', 1000)")
        )
    )


def connections(server: MariaDB) -> int:
    (row,) = server.query("SELECT COUNT(*) FROM information_schema.processlist WHERE user = 'xmppd'")
    return int(str(row[0]))


# -- one pool ----------------------------------------------------------------------------------------------------------


async def test_twenty_hosts_share_one_pool_that_keeps_its_limit(mariadb_server, mariadb_database, make_storage):
    storage = make_storage(mariadb_database, pool_max=8)
    await storage.open()
    accounts = Accounts(storage)
    seen = []

    async def look() -> None:
        while True:
            seen.append(await asyncio.to_thread(connections, mariadb_server))

    looking = asyncio.create_task(look())
    await asyncio.gather(
        *(accounts.create(f"host{n % 20}.example", f"u{n}", {}) for n in range(100)),
        *(accounts.count(f"host{n % 20}.example") for n in range(100)),
        *(storage.run(lambda connection: connection.execute(text("SELECT SLEEP(0.1)"))) for _ in range(20)),
    )
    looking.cancel()

    assert max(seen) <= 8
    assert max(seen) > 1, "the limit was never near"
    await until(lambda: storage.endpoints.writer.used == 0)


async def test_connections_that_rest_are_closed_down_to_the_minimum(mariadb_server, mariadb_database, make_storage):
    storage = make_storage(mariadb_database, pool_min=2, pool_max=8, pool_idle=0.3)
    await storage.open()
    nap = [storage.read(lambda connection: connection.execute(text("SELECT SLEEP(0.1)"))) for _ in range(6)]
    await asyncio.gather(*nap)
    assert storage.endpoints.writer.size >= 6

    await until(lambda: connections(mariadb_server) == 2)

    assert storage.endpoints.writer.size == 2
    await asyncio.gather(*(Accounts(storage).count("example.net") for _ in range(20)))


async def test_more_than_may_wait_are_refused_at_once(mariadb_database, make_storage):
    storage = make_storage(mariadb_database, pool_max=1, pool_queue=2, pool_timeout=5.0)
    await storage.open()
    async with storage.connect():
        waiting = [asyncio.create_task(storage.ping()) for _ in range(2)]
        await until(lambda: storage.endpoints.writer.waiting >= 2)
        with pytest.raises(StorageUnavailable, match="wait for a connection already"):
            async with storage.connect():
                pass
    await asyncio.gather(*waiting)


# -- replicas ----------------------------------------------------------------------------------------------------------


@pytest.fixture
async def replicated(mariadb_server, mariadb_database, make_storage, proxies) -> Storage:
    """The server itself, and a replica that is never late: the same one by another name."""
    replica = through(mariadb_database, mariadb_server, proxies[0])
    storage = make_storage(mariadb_database, read={replica: 1})
    await storage.open()
    await beat(storage)
    storage.loader.define("word", fetch_words, late=True)
    storage.batcher.define("word", write_words, user=lambda user: user)
    await until(lambda: storage.endpoints.reader() is not None)
    return storage


async def fetch_words(connection, keys):
    """Which of our connections was asked."""
    number = (await connection.execute(text("SELECT CONNECTION_ID()"))).scalar_one()
    return dict.fromkeys(keys, number)


async def write_words(connection, users):
    return [None] * len(users)


def counts(storage: Storage) -> tuple[int, int]:
    return storage.endpoints.writer.statements, storage.endpoints.readers[0].statements


async def test_what_may_be_late_is_read_from_the_replica_and_nothing_else(replicated):
    writer, reader = counts(replicated)
    await replicated.loader.get("word", ("example.net", "juliet"))
    assert counts(replicated) == (writer, reader + 1)

    await Accounts(replicated).get("example.net", "juliet")
    await Accounts(replicated).create("example.net", "juliet", {})
    await Spool(replicated).count("example.net", "juliet")

    assert counts(replicated)[1] == reader + 1


async def test_who_has_written_reads_from_the_writer_and_the_others_do_not(replicated):
    await replicated.batcher.submit("word", ("example.net", "juliet"))
    before = counts(replicated)

    await replicated.loader.get("word", ("example.net", "juliet"))
    await replicated.loader.get("word", ("example.net", "romeo"))

    assert counts(replicated) == (before[0] + 1, before[1] + 1)


@pytest.mark.parametrize("trouble", ["stopped", "silent"])
async def test_reads_move_to_the_writer_when_the_replica_is_gone_and_back(replicated, proxies, trouble, caplog):
    loop = asyncio.get_running_loop()
    slowest = 0.0
    over = asyncio.Event()

    async def read(name: str) -> None:
        nonlocal slowest
        while not over.is_set():
            began = loop.time()
            assert await replicated.loader.get("word", ("example.net", name))
            slowest = max(slowest, loop.time() - began)
            await asyncio.sleep(0.01)

    readers = [asyncio.create_task(read(f"user{n}")) for n in range(5)]
    replica = replicated.endpoints.readers[0]
    await until(lambda: replica.statements > 20)
    if trouble == "stopped":
        await proxies[0].refuse()
    else:
        proxies[0].stall()
    await until(lambda: not replica.up)
    before = replicated.endpoints.writer.statements
    await until(lambda: replicated.endpoints.writer.statements > before + 20)
    if trouble == "stopped":
        await proxies[0].admit()
    else:
        proxies[0].go_on()
    await until(lambda: replica.up)
    before = replica.statements
    await until(lambda: replica.statements > before + 20)
    over.set()

    await asyncio.gather(*readers)  # nobody has seen an error
    assert slowest < 2.0
    assert f"database server lost endpoint={replica.name} role=read" in caplog.text


async def test_a_replica_is_taken_down_and_brought_up_by_hand(replicated):
    name = replicated.endpoints.readers[0].name
    replicated.endpoints.take_down(replicated.endpoints.find(name))
    assert replicated.endpoints.reader() is None
    replicated.endpoints.bring_up(replicated.endpoints.find(name))
    assert replicated.endpoints.reader() is not None

    with pytest.raises(StorageError, match="the only server that takes writes"):
        replicated.endpoints.take_down(replicated.endpoints.writer)
    with pytest.raises(StorageError, match="no database server elsewhere"):
        replicated.endpoints.find("elsewhere")


async def test_a_replica_that_is_too_late_is_not_asked(replicated):
    replica = replicated.endpoints.readers[0]
    replicated.endpoints._compare(replicated.endpoints.writer, "60000")
    replicated.endpoints._compare(replica, "1000")

    assert replica.lag == 59.0
    assert replicated.endpoints.reader() is None


# -- several servers that take writes ----------------------------------------------------------------------------------


async def keep_many(spool: Spool, reported: set[bytes], over: asyncio.Event) -> None:
    while not over.is_set():
        row_id = new_id()
        kept = await spool.keep("example.net", "juliet", "r@x", b"x", dedup=None, quota=None, row_id=row_id)
        assert kept is Kept.STORED
        reported.add(row_id)


async def rows(storage: Storage) -> list[bytes]:
    found = await storage.read(lambda connection: connection.execute(spool_table.select()))
    return list(found.scalars())


async def test_writes_go_to_the_next_server_when_theirs_is_lost(
    mariadb_server, mariadb_database, make_storage, proxies, caplog
):
    storage = make_storage(through(mariadb_database, mariadb_server, *proxies))
    await storage.open()
    first, second = storage.endpoints.writers
    assert storage.endpoints.writer is first
    reported: set[bytes] = set()
    over = asyncio.Event()
    writers = [asyncio.create_task(keep_many(Spool(storage), reported, over)) for _ in range(10)]
    await until(lambda: len(reported) > 50)

    await proxies[0].refuse()
    await until(lambda: storage.endpoints.writer is second)
    more = len(reported) + 50
    await until(lambda: len(reported) > more)
    await proxies[0].admit()
    await until(lambda: first.up)
    assert storage.endpoints.writer is second, "it goes back only when it has to"
    proxies[1].stall()
    await until(lambda: storage.endpoints.writer is first)
    proxies[1].go_on()  # or the server would know nothing of its end, and keep a transaction's locks
    more = len(reported) + 50
    await until(lambda: len(reported) > more)
    over.set()
    await asyncio.gather(*writers)

    there = await rows(storage)
    assert reported <= set(there)
    assert len(there) == len(set(there))
    assert f"writes go to another database server to={second.name} before={first.name}" in caplog.text


async def test_a_start_takes_the_first_server_that_answers(mariadb_server, mariadb_database, make_storage, proxies):
    await proxies[0].refuse()
    storage = make_storage(through(mariadb_database, mariadb_server, *proxies))

    await storage.open()

    assert storage.endpoints.writer is storage.endpoints.writers[1]
    await storage.ping()


async def test_a_server_that_is_read_only_is_passed_over(mariadb_server, mariadb_database, make_storage, proxies):
    mariadb_server.query("SET GLOBAL read_only = 1")
    try:
        storage = make_storage(through(mariadb_database, mariadb_server, *proxies))
        await storage.endpoints.choose()
        assert [each.reason for each in storage.endpoints.writers] == ["it is read-only"] * 2
    finally:
        mariadb_server.query("SET GLOBAL read_only = 0")
        await storage.endpoints.stop()


# -- a proxy of which we know nothing ----------------------------------------------------------------------------------


async def test_behind_a_proxy_that_cuts_stalls_and_half_closes_nothing_reported_is_missing(
    mariadb_server, mariadb_database, make_storage, proxies
):
    storage = make_storage(through(mariadb_database, mariadb_server, proxies[0]))
    await storage.open()
    reported: set[bytes] = set()
    over = asyncio.Event()
    writers = [asyncio.create_task(keep_many(Spool(storage), reported, over)) for _ in range(10)]

    for trouble in ("cut", "half_close", "stall", "cut") * 3:
        more = len(reported) + 50
        await until(lambda more=more: len(reported) > more)
        getattr(proxies[0], trouble)()
        if trouble == "stall":
            await asyncio.sleep(0.3)  # how long it lasts, and nothing that we wait for
            proxies[0].go_on()
    over.set()
    await asyncio.gather(*writers)

    there = await rows(storage)
    assert reported <= set(there)
    assert len(there) == len(set(there))


@pytest.mark.long
async def test_locks_of_a_transaction_behind_a_line_that_hangs_are_let_go_in_time(
    mariadb_server, mariadb_database, make_storage, proxies
):
    url = through(mariadb_database, mariadb_server, proxies[0])
    storage = make_storage(url)
    await storage.open()
    assert await Accounts(storage).create("example.net", "juliet", {})

    async def begin_and_hang(connection):
        await connection.execute(text("UPDATE account SET created_at = 1 WHERE server_host = 'example.net'"))
        proxies[0].stall()
        await connection.execute(text("SELECT 1"))

    hanging = asyncio.create_task(storage.run(begin_and_hang))
    other = make_storage(mariadb_database)
    await other.open()
    await until(lambda: not proxies[0].flows)

    assert await asyncio.wait_for(Accounts(other).set_secrets("example.net", "juliet", {}), 14)
    with pytest.raises(StorageUnavailable):
        await hanging
    proxies[0].go_on()


# -- what is said about it ---------------------------------------------------------------------------------------------


async def test_a_slow_statement_is_logged_without_its_values(mariadb_database, make_storage, caplog):
    caplog.set_level(logging.WARNING)
    storage = make_storage(mariadb_database, slow=0.2)
    await storage.open()

    async with storage.connect() as connection:
        await connection.execute(text("SELECT :secret, SLEEP(:time)"), {"secret": "hunter2", "time": 0.3})
        await connection.execute(text("SELECT :secret"), {"secret": "hunter2"})

    (line,) = [record.getMessage() for record in caplog.records if "slow statement" in record.getMessage()]
    assert f"endpoint={storage.endpoints.writer.name}" in line
    assert 'sql="SELECT %s, SLEEP(%s)"' in line
    assert "hunter2" not in caplog.text
    assert storage.endpoints.writer.slow == 1


async def test_reads_that_must_not_be_late_carry_the_hint_for_proxies(mariadb_server, mariadb_database, make_storage):
    storage = make_storage(mariadb_database, hint="/*master*/")
    await storage.open()
    mariadb_server.query("SET GLOBAL general_log = 1")
    mariadb_server.query("SET GLOBAL log_output = 'TABLE'")
    try:
        await Accounts(storage).get("example.net", "nobody")
        said = [
            str(row[0]) for row in mariadb_server.query("SELECT CONVERT(argument USING utf8) FROM mysql.general_log")
        ]
    finally:
        mariadb_server.query("SET GLOBAL general_log = 0")
        mariadb_server.query("TRUNCATE mysql.general_log")
    assert any(sql.startswith("/*master*/ SELECT account.username") for sql in said)


async def test_tls_that_ends_before_the_server_is_refused(mariadb_database, make_storage, monkeypatch):
    """A proxy may take our TLS and go on without it: the server itself is asked."""

    async def show(self, what):
        return {"Ssl_cipher": ""} if "Ssl_cipher" in what else {}

    monkeypatch.setattr(MysqlConnection, "show", show)
    monkeypatch.setattr(MysqlConnection, "_connect", lambda self: asyncio.sleep(0))
    storage = make_storage(f"{mariadb_database}?ssl=required")

    with pytest.raises(StorageUnavailable, match="the server says that the connection is not encrypted"):
        await storage.open()


# -- a replica that is late --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def late_pair() -> Iterator[Pair]:
    if why := mariadb.missing():
        pytest.skip(why)
    pair = Pair(delay=5)
    yield pair
    pair.destroy()


@pytest.mark.long
async def test_a_new_password_is_valid_at_once_however_late_the_replica_is(late_pair, make_storage):
    primary, replica = late_pair.urls()
    storage = make_storage(primary, read={replica: 1}, max_lag=30.0)
    await storage.open()
    beating = asyncio.create_task(go_on_beating(storage))
    accounts = Accounts(storage)
    await accounts.create("example.net", "juliet", {"SCRAM-SHA-1": secret(b"old")})
    storage.loader.define("stamp", fetch_stamps, late=True)
    storage.batcher.define("stamp", write_stamps, user=lambda item: item[0])
    await storage.batcher.submit("stamp", (("example.net", "romeo"), 1))
    endpoint = storage.endpoints.readers[0]
    await until(lambda: endpoint.lag is not None and endpoint.lag > 2)
    assert storage.endpoints.reader() is endpoint

    await accounts.set_secrets("example.net", "juliet", {"SCRAM-SHA-1": secret(b"new")})
    assert (await accounts.get("example.net", "juliet")).secrets["SCRAM-SHA-1"].salt == b"new"
    await storage.batcher.submit("stamp", (("example.net", "romeo"), 2))
    assert await storage.loader.get("stamp", ("example.net", "romeo")) == 2  # he has written it himself
    storage.recent._until.clear()  # as on a node where he has not
    assert await storage.loader.get("stamp", ("example.net", "romeo")) != 2, "no replica was asked"
    async with asyncio.timeout(PATIENCE):
        while await storage.loader.get("stamp", ("example.net", "romeo")) != 2:  # noqa: ASYNC110
            await asyncio.sleep(0.2)

    beating.cancel()


def secret(salt: bytes) -> Secret:
    return Secret("SCRAM-SHA-1", salt, 4096, b"stored", b"server")


async def go_on_beating(storage: Storage) -> None:
    await beat(storage)
    stamp = "UPDATE node SET last_seen_at = TIMESTAMPDIFF(MICROSECOND, '1970-01-01', UTC_TIMESTAMP(3)) DIV 1000"
    while True:
        await storage.run(lambda connection: connection.execute(text(stamp)))
        await asyncio.sleep(0.2)


async def write_stamps(connection, items):
    await write_per_user(connection, last_activity, [(user, {"seconds": n, "status": ""}) for user, n in items])
    return [None] * len(items)


async def fetch_stamps(connection, users):
    return {user: row.seconds for user, row in (await read_per_user(connection, last_activity, users)).items()}


async def test_a_server_that_hangs_up_at_once_is_one_that_is_away(monkeypatch):
    """The driver asks the connection for its socket, which it has no more."""

    def gone(self, value):
        raise RuntimeError("Transport does not expose socket instance")

    monkeypatch.setattr(MysqlConnection, "_set_nodelay", gone)
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        with pytest.raises(aiomysql.OperationalError, match="cannot connect"):
            await MysqlConnection.open(statement_timeout=5, host="127.0.0.1", port=port, user="x", password="")
    finally:
        server.close()
