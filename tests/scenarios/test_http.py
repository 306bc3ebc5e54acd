"""The HTTP listener of a real node: health, metrics, the admin API, and what a hostile peer can do to it."""

import asyncio
import base64
import hashlib
import io
import json
import os
import re
import signal
import socket
import sqlite3
import ssl
from pathlib import Path

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.harness.server import Server, options
from xmppd.errors import XmppdError
from xmppd.http import listener as listening
from xmppd.http.answers import Answer, only_reads
from xmppd.http.listener import HttpListener

PATIENCE = 30.0
FIXED = "a token from the configuration"


class Node(Server):
    """One c2s listener (direct TLS) and two http listeners, one of them with TLS."""

    def __init__(self, folder: Path, **changes: object) -> None:
        defaults = {
            "listen": [
                {"module": "c2s", "ip": "127.0.0.1", "port": 0, "tls": True},
                {"module": "http", "ip": "127.0.0.1", "port": 0},
                {"module": "http", "ip": "127.0.0.1", "port": 0, "tls": True, "request_handlers": {"/": "api"}},
            ],
            "api_tokens": {"fixed": hashlib.sha256(FIXED.encode()).hexdigest()},
            "api_permissions": {
                "file": {"who": {"token": "fixed"}, "what": ["stats", "module *", "!module_unload"]},
                "near": {"who": "loopback", "what": "status"},
            },
        }
        super().__init__(folder, options(**defaults | changes))

    def http_port(self, *, tls: bool = False) -> int:
        return next(one["port"] for one in self.ready["listen"] if (one["module"], one["tls"]) == ("http", tls))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port()}"

    def reload(self, **changes: object) -> None:
        self.configure(self.options | changes)
        self.asked("reload_config")


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    """Serves all tests that do it no harm."""
    node = Node(tmp_path_factory.mktemp("node"))
    try:
        node.start()
        yield node
        node.judge()
    finally:
        node.kill()


@pytest.fixture
def fresh(tmp_path):
    """A node of the test's own, started."""
    node = Node(tmp_path)
    try:
        node.start()
        yield node
        node.judge()
    finally:
        node.kill()


@pytest.fixture
async def http():
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture
async def elsewhere():
    """A client with another address, so that what it gets wrong does not count against the others."""
    connector = aiohttp.TCPConnector(local_addr=("127.0.0.2", 0))
    async with aiohttp.ClientSession(connector=connector) as session:
        yield session


@pytest.fixture(scope="module")
def token(node):
    """May call everything that a pattern covers."""
    return node.asked("api_token", "create", "all", "*")


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


async def call(http, node, command, secret, arguments=None, **options):
    """(status, JSON) of a command."""
    async with http.post(f"{node.url}/api/{command}", json=arguments, headers=bearer(secret), **options) as answer:
        return answer.status, await answer.json()


async def text(http, url, **options):
    async with http.get(url, **options) as answer:
        return answer.status, (await answer.text()).strip()


async def eventually(read, wanted):
    """What `read` gives as soon as it is as wanted."""
    async with asyncio.timeout(PATIENCE):
        while True:
            found = await read()
            if wanted(found):
                return found
            await asyncio.sleep(0.05)


async def raw(port: int, data: bytes) -> bytes:
    """Everything that is answered to these bytes until the connection ends."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    try:
        async with asyncio.timeout(PATIENCE):
            return await reader.read()
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


# ---------------------------------------------------------------------------------------------- health


async def test_a_node_that_serves_is_alive_and_ready(node, http):
    assert await text(http, f"{node.url}/livez") == (200, "alive")
    assert await text(http, f"{node.url}/readyz") == (200, "ready")


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/metrics", "/api/openapi.json"])
async def test_health_is_read_with_get_and_head_alone(node, http, token, path):
    async with http.head(node.url + path, headers=bearer(token)) as answer:
        assert (answer.status, await answer.read()) == (200, b"")
        assert int(answer.headers["Content-Length"]) > 0
    for method in ("POST", "PUT", "DELETE", "PATCH", "TRACE", "OPTIONS"):
        async with http.request(method, node.url + path, headers=bearer(token)) as answer:
            assert (answer.status, answer.headers["Allow"]) == (405, "GET, HEAD")


async def test_no_answer_names_the_software(node, http, token):
    port = node.http_port()
    seen = [
        await raw(port, b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"),
        await raw(port, b"GET /nowhere HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"),
        await raw(port, b"POST /api/stop HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"),
        await raw(port, b"NONSENSE\r\n\r\n"),
    ]

    assert [answer.split()[1] for answer in seen] == [b"200", b"404", b"401", b"400"]
    for answer in seen:
        assert not re.search(rb"(?i)server:|aiohttp|python|xmppd/|nonsense", answer)


async def test_readiness_goes_and_comes_back_with_the_database(fresh, http):
    with sqlite3.connect(fresh.data_dir / "xmppd.db") as database:
        database.execute("ALTER TABLE alembic_version RENAME TO gone")

    async def readiness():
        return await text(http, f"{fresh.url}/readyz")

    await eventually(readiness, lambda found: found == (503, "unavailable"))
    assert await text(http, f"{fresh.url}/livez") == (200, "alive")
    with sqlite3.connect(fresh.data_dir / "xmppd.db") as database:
        database.execute("ALTER TABLE gone RENAME TO alembic_version")
    await eventually(readiness, lambda found: found == (200, "ready"))
    assert "not ready: the database does not answer" in fresh.log
    assert "ready again: the database answers" in fresh.log


async def test_a_node_that_stops_says_so_before_it_goes(fresh, http):
    # a client that does not leave, so that the stop takes a moment
    reader, writer = await xmpp_stream(fresh)
    url = f"{fresh.url}/readyz"
    assert await text(http, url) == (200, "ready")

    os.kill(fresh.process.pid, signal.SIGTERM)

    async with asyncio.timeout(PATIENCE):
        while (found := await text(http, url)) == (200, "ready"):
            pass
    assert found == (503, "stopping")
    assert b"system-shutdown" in await reader.read()
    writer.close()
    assert await asyncio.to_thread(fresh.wait) == 0


# ---------------------------------------------------------------------------------------------- metrics


async def xmpp_stream(node, host="localhost"):
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    port = node.tls_port
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    writer.write(header(host))
    return reader, writer


def header(host="localhost"):
    stream = "xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams'"
    return f"<stream:stream {stream} to='{host}' version='1.0'>".encode()


async def expect(reader, *, until):
    async with asyncio.timeout(PATIENCE):
        return await reader.readuntil(until.encode())


async def login(node, user, password):
    """A stream with a bound resource; None when the password is wrong."""
    reader, writer = await xmpp_stream(node)
    secret = base64.b64encode(f"\0{user}\0{password}".encode()).decode()
    writer.write(f"<auth xmlns='urn:ietf:params:xml:ns:xmpp-sasl' mechanism='PLAIN'>{secret}</auth>".encode())
    await expect(reader, until="</stream:features>")
    answer = await expect(reader, until=">")
    if b"success" not in answer:
        writer.close()
        return None
    writer.write(header())
    writer.write(b"<iq type='set' id='b'><bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'/></iq>")
    await expect(reader, until="</bind></iq>")
    return reader, writer


async def metrics(http, node) -> dict[tuple[str, ...], float]:
    """(name, sorted label values) -> value."""
    status, page = await text(http, f"{node.url}/metrics")
    assert status == 200
    samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
    return {(sample.name, *sorted(sample.labels.values())): sample.value for sample in samples}


async def test_what_clients_do_is_counted(fresh, http):
    for user in ("romeo", "juliet"):
        fresh.asked("register", user, "localhost", "rose")

    reader, writer = await login(fresh, "romeo", "rose")
    assert await login(fresh, "juliet", "thorn") is None
    stranger, closing = await xmpp_stream(fresh, host="elsewhere.example")
    await expect(stranger, until="</stream:stream>")
    closing.close()
    for recipient in ("juliet@localhost", "nobody@localhost", "x@far.example"):
        writer.write(f"<message to='{recipient}' type='chat' id='m'><body>O</body></message>".encode())
    writer.write(b"<iq type='get' id='ping77' to='localhost'><ping xmlns='urn:xmpp:ping'/></iq>")
    await expect(reader, until="ping77")
    found = await eventually(lambda: metrics(http, fresh), lambda found: not found["xmppd_stanzas_pending", "message"])

    assert found["xmppd_sessions", "localhost"] == 1
    assert found["xmppd_logins_total", "PLAIN"] == 1
    assert found["xmppd_login_failures_total", "not-authorized"] == 1
    assert found["xmppd_streams_refused_total", "host-unknown"] == 1
    assert found["xmppd_stanzas_received_total", "message"] == 3
    assert found["xmppd_stanzas_total", "message", "safe"] == 1
    assert found["xmppd_stanzas_total", "error", "message"] == 2
    assert found["xmppd_stanzas_total", "iq", "safe"] == 1
    assert found["xmppd_stanza_errors_total", "service-unavailable"] == 1
    assert found["xmppd_stanza_errors_total", "remote-server-not-found"] == 1
    assert found["xmppd_stanzas_sent_total", "message"] == 2  # the two errors
    assert found["xmppd_spool_rows_total", "stored"] == 1
    assert found["xmppd_storage_batch_rows_count",] >= 1
    assert found["xmppd_storage_batch_rows_sum",] >= 1
    assert found["xmppd_connections_accepted_total",] == 3
    assert found["xmppd_certificate_days_left", "localhost"] > 30
    assert found["process_resident_memory_bytes",] > 1e6
    assert found["xmppd_event_loop_lag_seconds_count",] >= 1
    writer.close()

    there, leaving = await login(fresh, "juliet", "rose")
    leaving.write(b"<presence/>")
    await expect(there, until="</message>")
    leaving.write(b"</stream:stream>")
    found = await eventually(lambda: metrics(http, fresh), lambda found: found["xmppd_spool_rows_flushed_total",])
    assert found["xmppd_spool_rows_taken_total",] == 1
    leaving.close()


async def test_a_client_that_reads_nothing_shows_in_the_write_queues(fresh, http):
    for user in ("romeo", "juliet"):
        fresh.asked("register", user, "localhost", "rose")
    _, writer = await login(fresh, "romeo", "rose")
    _, deaf = await login(fresh, "juliet", "rose")
    deaf.write(b"<presence/>")
    deaf.transport.pause_reading()
    message = f"<message to='juliet@localhost' type='chat'><body>{'O' * 100_000}</body></message>".encode()

    async with asyncio.timeout(PATIENCE):
        while not (found := await metrics(http, fresh))["xmppd_write_queues",]:
            writer.write(message)
            await writer.drain()

    assert found["xmppd_write_queue_bytes",] > 64 * 1024
    deaf.transport.abort()
    writer.close()
    await eventually(lambda: metrics(http, fresh), lambda found: not found["xmppd_write_queues",])


@pytest.mark.parametrize(
    "accept", ["application/openmetrics-text;version=1.0.0", "text/html", ";q=x;;version=", "x" * 4000]
)
async def test_metrics_come_whatever_is_accepted(node, http, accept):
    async with http.get(f"{node.url}/metrics", headers={"Accept": accept}) as answer:
        assert answer.status == 200
        assert "xmppd_uptime_seconds" in await answer.text()
        assert ("openmetrics" in answer.content_type) == accept.startswith("application/openmetrics")


# ---------------------------------------------------------------------------------------------- the API


async def test_commands_answer_as_xmppctl_does_with_json(node, http, token):
    assert await call(http, node, "register", token, {"user": "nurse", "host": "localhost", "password": "x"}) == (
        200,
        "User nurse@localhost successfully registered",
    )
    assert await call(http, node, "check_account", token, {"user": "nurse", "host": "localhost"}) == (200, 0)
    assert await call(http, node, "check_account", token, {"user": "peter", "host": "localhost"}) == (200, 1)
    assert await call(http, node, "registered_vhosts", token) == (200, ["localhost"])
    status, modules = await call(http, node, "module_list", token, {})
    assert status == 200
    assert {"name": "roster", "state": "loaded", "source": "bundled"} in modules
    assert json.loads(node.asked("--json", "module", "list")) == modules
    assert await call(http, node, "connected_users_number", token, params={"local": "true"}) == (200, 0)
    assert "command done command=register via=http caller=all code=0" in node.log


@pytest.mark.parametrize(
    ("command", "arguments", "status", "code", "words"),
    [
        ("stats", {"name": "x"}, 400, 1, "no statistic is called 'x'"),
        ("stats", {}, 400, 2, "lacks the argument 'name'"),
        ("stats", {"name": "x", "more": 1}, 400, 2, "has no argument 'more'"),
        ("stats", {"name": 5}, 400, 2, "expected a text, got 5"),
        ("stats", {"name": "\0"}, 400, 2, "contains a NUL character"),
        ("stats", {"name": "\ud800"}, 400, 2, "not UTF-8"),
        ("stats", {"\ud800": "x"}, 400, 2, "has no argument"),
        ("stats", [], 400, 2, "the arguments are a JSON object"),
        ("no_such", {}, 404, 404, "there is no such command"),
        ("registered_users", {"host": "far.example"}, 404, 1, "Unknown virtual host"),
        ("module_unload", {"name": "no_such"}, 404, 13, "no_such"),
        ("module_load", {"name": "roster"}, 409, 14, "roster"),
        ("register", {"user": "a b", "host": "localhost", "password": "x"}, 400, 1, "Malformed username"),
    ],
)
async def test_a_refusal_has_ejabberds_form(node, http, token, command, arguments, status, code, words):
    found, body = await call(http, node, command, token, arguments)

    assert (found, body["status"], body["code"]) == (status, "error", code)
    assert words in body["message"]


async def test_a_name_that_is_taken_is_a_conflict(node, http, token):
    romeo = {"user": "romeo", "host": "localhost", "password": "x"}

    assert (await call(http, node, "register", token, romeo))[0] == 200
    status, body = await call(http, node, "register", token, romeo)

    assert (status, body["code"]) == (409, 1)


@pytest.mark.parametrize(
    ("body", "content_type", "status"),
    [
        (b'{"name": "x"', "application/json", 400),
        (b"\xff\xfe{}", "application/json", 400),
        ('{"name": "uptimeseconds"}'.encode("utf-16"), "application/json", 400),
        (b'{"name": NaN}', "application/json", 400),
        (b'{"name": "a", "name": "b"}', "application/json", 400),
        (b'{"name": ' + b"9" * 10_000 + b"}", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b'{"name": "uptimeseconds"}', "application/x-www-form-urlencoded", 415),
        (b'{"name": "uptimeseconds"}', "text/plain", 415),
        (b'{"name": "uptimeseconds"}', "application/json; charset=utf-8", 200),
        (b'{"name": "' + b"x" * (1 << 20) + b'"}', "application/json", 413),
    ],
)
async def test_what_is_no_json_object_is_refused(node, http, token, body, content_type, status):
    headers = bearer(token) | {"Content-Type": content_type}
    async with http.post(f"{node.url}/api/stats", data=io.BytesIO(body), headers=headers) as answer:
        assert answer.status == status, await answer.text()


async def test_a_body_without_length_is_bounded_too(node, http, token):
    async def endless():
        for _ in range(40):
            yield b" " * 65536

    headers = bearer(token) | {"Content-Type": "application/json"}
    async with http.post(f"{node.url}/api/stats", data=endless(), headers=headers) as answer:
        assert answer.status == 413


async def test_a_compressed_body_is_not_unpacked(node, http, token):
    headers = bearer(token) | {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    async with http.post(f"{node.url}/api/stats", data=b"\x1f\x8b", headers=headers) as answer:
        assert answer.status == 415


async def test_commands_are_called_with_post(node, http, token):
    for method in ("GET", "PUT", "DELETE"):
        async with http.request(method, f"{node.url}/api/registered_vhosts", headers=bearer(token)) as answer:
            assert (answer.status, answer.headers["Allow"]) == (405, "POST")


@pytest.mark.parametrize("query", ["host=localhost", "local=1", "local=true&local=true"])
async def test_arguments_do_not_go_into_the_address(node, http, token, query):
    assert (await call(http, node, f"registered_vhosts?{query}", token))[0] == 400


async def test_a_long_list_arrives_whole(fresh, http):
    names = [f"user{number:05}" for number in range(3500)]
    with sqlite3.connect(fresh.data_dir / "xmppd.db") as database:
        rows = [("localhost", name, 0) for name in names]
        database.executemany("INSERT INTO account (server_host, username, created_at) VALUES (?, ?, ?)", rows)
    secret = fresh.asked("api_token", "create", "all", "*")

    assert await call(http, fresh, "registered_users", secret, {"host": "localhost"}) == (200, names)


async def test_stop_is_answered_before_the_node_goes(fresh, http):
    secret = fresh.asked("api_token", "create", "stopper", "stop")

    assert await call(http, fresh, "stop", secret) == (200, 0)
    assert await asyncio.to_thread(fresh.wait) == 0


# ---------------------------------------------------------------------------------------------- who may


async def test_without_a_token_nothing_may_be_done_but_what_the_configuration_grants(node, http):
    async with http.post(f"{node.url}/api/status") as answer:
        assert answer.status == 200
    for command in ("stats", "stop", "api_token_list"):
        async with http.post(f"{node.url}/api/{command}", json={}) as answer:
            assert answer.status == 401
            assert answer.headers["WWW-Authenticate"].startswith("Bearer")


async def test_a_stranger_learns_nothing_about_commands(fresh, http):
    fresh.reload(api_permissions={})

    for command in ("stats", "no_such_command", "openapi.json", ""):
        async with http.request("GET" if "." in command else "POST", f"{fresh.url}/api/{command}") as answer:
            assert (answer.status, (await answer.json())["message"]) == (401, "this needs a token")


@pytest.mark.parametrize("header", ["X-Forwarded-For", "Forwarded", "Via"])
async def test_what_comes_through_a_proxy_is_not_loopback(node, http, header):
    async with http.post(f"{node.url}/api/status", headers={header: "127.0.0.1"}) as answer:
        assert answer.status == 401


async def test_a_page_in_a_browser_nearby_commands_nothing(node, http):
    async with http.post(f"{node.url}/api/status", headers={"Origin": node.url}) as answer:
        assert answer.status == 401
    async with http.options(f"{node.url}/api/status", headers={"Origin": "http://evil.example"}) as answer:
        assert "Access-Control-Allow-Origin" not in answer.headers


async def test_a_token_may_what_its_name_is_granted_and_no_more(node, http):
    assert (await call(http, node, "stats", FIXED, {"name": "uptimeseconds"}))[0] == 200
    assert (await call(http, node, "module_list", FIXED))[0] == 200
    status, body = await call(http, node, "module_unload", FIXED, {"name": "roster"})
    assert (status, body["message"]) == (403, "the token 'fixed' may not call 'module unload'")


async def test_no_pattern_covers_the_commands_that_make_tokens(node, http, token):
    assert (await call(http, node, "api_token_create", token, {"name": "more", "what": ["*"]}))[0] == 403

    named = node.asked("api_token", "create", "maker", "api_token create")

    wanted = {"name": "made", "what": ["stats", "[tag:session]"]}
    status, made = await call(http, node, "api_token_create", named, wanted)
    assert status == 200
    assert (await call(http, node, "connected_users", made))[0] == 200
    assert (await call(http, node, "stop", made))[0] == 403


async def test_a_revoked_token_opens_nothing(node, http):
    secret = node.asked("api_token", "create", "brief", "stats")
    assert (await call(http, node, "stats", secret, {"name": "uptimeseconds"}))[0] == 200

    node.asked("api_token", "revoke", "brief")

    assert (await call(http, node, "stats", secret, {"name": "uptimeseconds"}))[0] == 401


async def test_a_wrong_token_is_refused_even_where_none_is_needed(node, http):
    assert (await call(http, node, "status", "wrong"))[0] == 401


async def test_permissions_are_taken_up_by_a_reload(fresh, http):
    assert (await call(http, fresh, "registered_vhosts", FIXED))[0] == 403

    fresh.reload(api_permissions={"file": {"who": {"token": "fixed"}, "what": "registered_vhosts"}})

    assert await call(http, fresh, "registered_vhosts", FIXED) == (200, ["localhost"])
    assert (await call(http, fresh, "stats", FIXED, {"name": "uptimeseconds"}))[0] == 403


async def test_who_guesses_has_to_wait(node, elsewhere, http):
    seen = [(await call(elsewhere, node, "stats", f"guess{number}"))[0] for number in range(30)]

    assert seen[:20] == [401] * 20
    assert seen[-1] == 429
    assert (await call(elsewhere, node, "stats", FIXED, {"name": "uptimeseconds"}))[0] == 429
    assert (await call(http, node, "stats", FIXED, {"name": "uptimeseconds"}))[0] == 200


async def test_the_description_shows_what_the_caller_may_call(node, http, token):
    async def described(secret):
        async with http.get(f"{node.url}/api/openapi.json", headers=bearer(secret)) as answer:
            return await answer.json()

    everything = await described(token)
    little = await described(FIXED)

    assert everything["openapi"] == "3.1.0"
    assert everything["servers"] == [{"url": "/api"}]
    assert {"/register", "/module_list", "/get_roster", "/stop"} < set(everything["paths"])
    assert {"/status", "/stats", "/module_list", "/module_load"} <= set(little["paths"])
    assert not [path for path in little["paths"] if not path.startswith(("/stat", "/module_"))]
    assert "/module_unload" not in little["paths"]
    references = set(re.findall(r'"\$ref": "#/components/(\w+)/(\w+)"', json.dumps(everything)))
    assert all(name in everything["components"][group] for group, name in references)


# ---------------------------------------------------------------------------------------------- the socket


async def test_tls_shows_the_certificate_of_the_host(node, http):
    context = ssl.create_default_context(cafile=str(node.data_dir / "certs" / "localhost.pem"))
    url = f"https://localhost:{node.http_port(tls=True)}/registered_vhosts"

    async with http.post(url, ssl=context) as answer:
        assert answer.status == 401


@pytest.mark.parametrize(
    "path",
    [
        b"/api/../livez",
        b"/livez/",
        b"/livez/x",
        b"//livez",
        b"/%6civez",
        b"/api/%2e%2e/livez",
        b"/api/..%2f..%2fetc/passwd",
        b"/../../../../etc/passwd",
        b"/",
        b"/metricsx",
        b"*",
    ],
)
async def test_paths_are_taken_as_they_come(node, path):
    answer = await raw(node.http_port(), b"GET " + path + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")

    assert answer.split()[1] in (b"401", b"404", b"400")
    assert b"root:" not in answer


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
        b"GET /livez HTTP/1.1\r\n" + b"X: y\r\n" * 5000 + b"\r\n",
        b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"POST /api/status HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /api/status HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /api/status HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
        b"\0" * 1000 + b"\r\n\r\n",
    ],
)
async def test_what_is_no_request_is_refused_and_the_connection_ends(node, data):
    answer = await raw(node.http_port(), data)

    assert answer == b"" or answer.split()[1] in (b"400", b"431")


async def test_a_port_that_somebody_else_has_is_named(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        node = Node(tmp_path, listen=[{"module": "http", "ip": "127.0.0.1", "port": port}])
        done = await asyncio.to_thread(node.second_start)

    assert done.returncode == 1
    assert f"xmppd: cannot listen on 127.0.0.1 port {port}: Address already in use" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (node.data_dir / "ready.json").exists()


class Big:
    """A page that no socket's buffers take at once."""

    name = "big"
    exact = False

    async def __call__(self, request, rest):
        only_reads(request)
        if rest == "crash":
            raise RuntimeError("a secret")
        if rest == "list":
            return Answer(200, iter([b"[", b"1", b"]"]))
        if rest == "half":
            return Answer(200, half())
        return Answer(200, b"x" * (64 << 20))


def half():
    yield b"[1, "
    yield b"2, "
    raise RuntimeError("the rest is gone")


@pytest.fixture
async def small(monkeypatch):
    """A listener of this process with short time-outs; (port, what was counted)."""
    monkeypatch.setattr(listening, "IDLE", 0.3)
    monkeypatch.setattr(listening, "SEND", 0.3)
    monkeypatch.setattr(listening, "MAX_CONNECTIONS", 5)
    counted: dict[tuple[str, int], int] = {}
    server = HttpListener("127.0.0.1", 0, {"/big": Big()}, tls=None, requests=counted)
    entry = await server.open()
    yield entry["port"], counted
    await server.close(1.0)


@pytest.mark.parametrize("data", [b"", b"GET /big HTTP/1.1\r\nHost:", b"GET /big/list HTTP/1.1\r\nHost: x\r\n\r\n"])
async def test_who_sends_no_whole_request_is_cut_off(small, data):
    port, _ = small
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)

    async with asyncio.timeout(5):
        while not reader.at_eof():
            await reader.read(65536)
            if data.endswith(b"Host:") and not writer.is_closing():
                writer.write(b"x")  # a little more each time does not help
    writer.close()


async def test_a_head_that_trickles_in_is_cut_off(small):
    port, _ = small
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /big HTTP/1.1\r\nX: ")

    async def trickle():
        while True:
            writer.write(b"x")
            await asyncio.sleep(0.02)

    trickling = asyncio.create_task(trickle())
    async with asyncio.timeout(5):
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await reader.readexactly(1)
    trickling.cancel()
    writer.close()


async def test_who_takes_no_answer_is_cut_off(small, monkeypatch):
    port, _ = small
    gone = asyncio.Event()
    monkeypatch.setattr(listening._Server, "connection_lost", lambda *arguments: gone.set())
    sock = socket.create_connection(("127.0.0.1", port))
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(sock, b"GET /big/all HTTP/1.1\r\nHost: x\r\n\r\n")

    got = 0
    async with asyncio.timeout(PATIENCE):
        try:
            await gone.wait()
            while data := await loop.sock_recv(sock, 1 << 20):
                got += len(data)
        except ConnectionResetError:
            pass

    sock.close()
    assert got < 64 << 20


async def test_connections_are_bounded(small):
    port, _ = small
    open_ones = [await asyncio.open_connection("127.0.0.1", port) for _ in range(5)]

    assert await raw(port, b"GET /big/list HTTP/1.1\r\nHost: x\r\n\r\n") == b""

    for _, writer in open_ones:
        writer.close()


async def test_a_handler_that_fails_tells_nothing(small):
    port, counted = small

    answer = await raw(port, b"GET /big/crash HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")

    assert answer.split()[1] == b"500"
    assert b"secret" not in answer
    assert counted == {("big", 500): 1}


async def test_an_answer_that_breaks_off_cannot_be_taken_for_a_whole_one(small, http):
    port, _ = small

    with pytest.raises(aiohttp.ClientError):
        await text(http, f"http://127.0.0.1:{port}/big/half")


async def test_an_address_that_is_not_ours_is_named():
    with pytest.raises(XmppdError, match=r"cannot listen on 192\.0\.2\.1 port 1: "):
        await HttpListener("192.0.2.1", 1, {}, tls=None, requests={}).open()
