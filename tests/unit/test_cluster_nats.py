"""What we tell our nats-server, what we understand of its words, and where nodes are."""

import subprocess
from pathlib import Path

import pytest

from xmppd.cluster import subjects
from xmppd.cluster.addresses import Resolver, join, split
from xmppd.cluster.child import find_nats_server
from xmppd.cluster.nats_config import NatsConfig, Observer, ObserverPort, quoted
from xmppd.cluster.nats_log import (
    CookieRefused,
    DialFailed,
    Fatal,
    Listening,
    LogFile,
    Reloaded,
    RouteLost,
    understand,
)
from xmppd.cluster.nats_url import parse_nats_url
from xmppd.cluster.pki import Bundle
from xmppd.cluster.routes import Routes
from xmppd.cluster.status import seconds
from xmppd.errors import ConfigError, NodeUnreachable

NODE = bytes(range(16))


def config(folder: Path, **changes) -> NatsConfig:
    defaults = {
        "node": NODE,
        "password": 'a "quoted" \\ $ecret',
        "ports_folder": folder,
        "route_host": "::",
        "route_port": 4369,
        "bundle": Bundle.write(folder, NODE, "a" * 32),
    }
    return NatsConfig(**(defaults | changes))


@pytest.mark.parametrize("starting", [True, False])
def test_nats_server_takes_the_whole_configuration(tmp_path, starting):
    everything = config(
        tmp_path,
        routes=("192.0.2.1:4369", "[2001:db8::1]:4370"),
        advertise="[2001:db8::2]:4369",
        observers=(Observer("watcher", "its secret", ("xmppd.1.api",), ("xmppd.1.>",), answers=3), Observer("x", "y")),
        observer_port=ObserverPort("0.0.0.0", 4222, tmp_path / "route.crt", tmp_path / "route.key"),
    )
    file = tmp_path / "nats.conf"
    file.write_text(everything.render(starting=starting))

    said = subprocess.run([find_nats_server(None), "-t", "-c", file], capture_output=True, text=True)

    assert "is valid" in said.stdout + said.stderr


def test_who_may_do_nothing_is_not_who_may_do_everything(tmp_path):
    text = config(tmp_path, observers=(Observer("x", "y"),)).render(starting=False)

    assert '{user: "x", password: "y", permissions: {publish: {deny: ">"}, subscribe: {deny: ">"}}}' in text


def test_our_clients_come_from_this_machine_unless_observers_are_let_in(tmp_path):
    assert 'host: "127.0.0.1"\nport: -1\n' in config(tmp_path).render(starting=False)


def test_a_route_to_nowhere_is_there_for_the_start_only(tmp_path):
    one = config(tmp_path, routes=("192.0.2.1:4369",))

    assert 'routes: ["nats-route://localhost:1", "nats-route://192.0.2.1:4369"]' in one.render(starting=True)
    assert 'routes: ["nats-route://192.0.2.1:4369"]' in one.render(starting=False)


def test_nothing_breaks_out_of_a_string():
    assert quoted('a"b\\') == '"a\\"b\\\\"'
    with pytest.raises(ValueError, match="control"):
        quoted("a\nb")


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        (
            "[INF] 127.0.0.1:50278 - rid:7 - Router connection closed: Client Closed - Remote: " + NODE.hex(),
            RouteLost(NODE, "Client Closed"),
        ),
        (
            "[INF] [2001:db8::1]:50278 - rid:7 - Router connection closed: Stale Connection - Remote: " + NODE.hex(),
            RouteLost(NODE, "Stale Connection"),
        ),
        ("[INF] 127.0.0.1:1 - rid:6 - Router connection closed: Duplicate Route - Remote: " + NODE.hex(), None),
        ("[INF] 127.0.0.1:1 - rid:6 - Router connection closed: TLS Handshake Failure", None),
        (
            "[ERR] 127.0.0.1:44892 - rid:8 - TLS route handshake error: remote error: tls: bad certificate",
            CookieRefused("127.0.0.1:44892"),
        ),
        (
            "[ERR] 127.0.0.1:2 - rid:6 - TLS route handshake error: tls: failed to verify certificate: x509: "
            "certificate signed by unknown authority (CN=node x,O=xmppd cluster SHA-256: 8c)",
            CookieRefused("127.0.0.1:2"),
        ),
        (
            "[ERR] 127.0.0.1:2 - rid:6 - TLS route handshake error: tls: client didn't provide a certificate",
            CookieRefused("127.0.0.1:2"),
        ),
        ("[ERR] 127.0.0.1:2 - rid:6 - TLS route handshake error: EOF", None),
        (
            "[ERR] Error trying to connect to route (attempt 1): dial tcp 127.0.0.1:24369: connect: connection refused",
            DialFailed("127.0.0.1:24369", "connect: connection refused"),
        ),
        ("[INF] Reloaded server configuration (sha256:843b)", Reloaded()),
        ("[ERR] Failed to reload server configuration: unknown field", Reloaded("unknown field")),
        ("[INF] Listening for route connections on 127.0.0.1:24369", Listening()),
        (
            "[FTL] Error listening on router port: 127.0.0.1:1 - in use",
            Fatal("Error listening on router port: 127.0.0.1:1 - in use"),
        ),
        ("[INF] Server is ready", None),
    ],
)
def test_a_line_of_the_log_is_understood(text, meaning):
    assert understand(f"[26759] 2026/11/21 14:38:03.637895 {text}") == meaning


@pytest.mark.parametrize("line", ["", "panic: x", "[1] [INF]", "\N{REPLACEMENT CHARACTER}"])
def test_other_lines_mean_nothing(line):
    assert understand(line) is None


def test_a_usage_error_is_fatal():
    assert understand("nats-server: flag provided but not defined") == Fatal("flag provided but not defined")


def test_the_log_never_takes_more_than_twice_its_limit(tmp_path):
    log = LogFile(tmp_path / "nats.log", limit=1000)

    for number in range(500):
        log.write(f"line {number}")
    log.close()

    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["nats.log", "nats.log.1"]
    assert all(file.stat().st_size <= 1000 and file.stat().st_mode & 0o777 == 0o600 for file in files)
    assert "line 499" in files[0].read_text()


def test_a_log_that_cannot_be_written_stops_nobody(tmp_path):
    LogFile(tmp_path / "not there" / "nats.log").write("lost")


@pytest.mark.parametrize(
    ("name", "host", "port"),
    [
        ("xmppd@node01", "node01", 4369),
        ("xmppd@node01.example.net", "node01.example.net", 4369),
        ("node01:4370", "node01", 4370),
        ("192.0.2.1", "192.0.2.1", 4369),
        ("xmppd@192.0.2.1:1", "192.0.2.1", 1),
        ("2001:db8::1", "2001:db8::1", 4369),
        ("xmppd@[2001:db8::1]", "2001:db8::1", 4369),
        ("[2001:db8::1]:4370", "2001:db8::1", 4370),
        ("fe80::1%eth0", "fe80::1%eth0", 4369),
    ],
)
def test_a_node_is_named_in_many_ways(name, host, port):
    assert split(name) == (host, port)
    assert split(join(host, port)) == (host, port)


@pytest.mark.parametrize(
    "name", ["", "xmppd@", "node:x", "node:0", "node:65536", "[::1", "[::1]x", "[node]:1", "a b", "1:2:x"]
)
def test_what_is_no_node_is_refused(name):
    with pytest.raises(ValueError, match=r"."):
        split(name)


@pytest.mark.parametrize("name", ["node02", "NODE02", "xmppd@node02", "node02:4369"])
async def test_names_of_the_configuration_come_first(name):
    assert await Resolver({"Node02": "192.0.2.12"}).resolve(name) == [("192.0.2.12", 4369)]


async def test_the_configuration_may_name_a_port():
    resolver = Resolver({"node02": "192.0.2.12:5000", "xmppd2@node02": "[2001:db8::1]:5001"})

    assert await resolver.resolve("xmppd@node02") == [("192.0.2.12", 5000)]


async def test_an_unknown_name_says_where_to_put_it():
    with pytest.raises(NodeUnreachable, match=r"no-such-host\.invalid: no such host .*cluster\.hosts"):
        await Resolver({}).resolve("xmppd@no-such-host.invalid")


class Names:
    """A resolver whose answers change."""

    def __init__(self, **names: list[str]) -> None:
        self.names = names

    async def resolve(self, name: str) -> list[tuple[str, int]]:
        if not self.names.get(name):
            raise NodeUnreachable("no such host")
        return [(address, 4369) for address in self.names[name]]


async def test_an_address_that_works_is_kept():
    routes = Routes(Names(one=["192.0.2.1"], two=["192.0.2.2"]))
    await routes.set(["one", "two", "one"])

    assert routes.addresses == ("192.0.2.1:4369", "192.0.2.2:4369")
    assert not routes.failed("192.0.2.9:4369")
    assert not await routes.refresh()


async def test_of_several_addresses_each_is_tried():
    routes = Routes(Names(one=["192.0.2.1", "192.0.2.2"]))
    await routes.set(["one"])
    tried = []

    for _ in range(3):
        tried += routes.addresses
        assert routes.failed(routes.addresses[0])
        assert await routes.refresh()

    assert tried == ["192.0.2.1:4369", "192.0.2.2:4369", "192.0.2.1:4369"]


async def test_a_name_that_cannot_be_resolved_is_tried_again():
    names = Names()
    routes = Routes(names)
    await routes.set(["one"])
    assert routes.addresses == ()
    assert routes.unresolved == {"one": "no such host"}

    names.names["one"] = ["192.0.2.1"]

    assert await routes.refresh()
    assert routes.addresses == ("192.0.2.1:4369",)
    assert routes.unresolved == {}


async def test_without_a_resolver_the_last_address_stays():
    names = Names(one=["192.0.2.1"])
    routes = Routes(names)
    await routes.set(["one"])
    names.names.clear()

    routes.failed("192.0.2.1:4369")

    assert not await routes.refresh()
    assert routes.addresses == ("192.0.2.1:4369",)


async def test_a_member_that_left_is_no_route_any_more():
    routes = Routes(Names(one=["192.0.2.1"]))
    await routes.set(["one", "gone"])

    await routes.set([])

    assert (routes.addresses, routes.unresolved) == ((), {})


def test_an_existing_nats_is_described_by_one_url():
    servers = parse_nats_url("nats://xmppd:s%40cret@nats1,nats2.example.net:4223,[2001:db8::1]:4224")

    assert [server.url for server in servers] == [
        "nats://nats1:4222",
        "nats://nats2.example.net:4223",
        "nats://[2001:db8::1]:4224",
    ]
    assert {(server.user, server.password) for server in servers} == {("xmppd", "s@cret")}


def test_a_token_is_no_user():
    assert [(one.token, one.user) for one in parse_nats_url("nats://t0ken@nats1")] == [("t0ken", None)]


def test_tls_takes_its_files_from_the_url(tmp_path):
    bundle = Bundle.write(tmp_path, NODE, "a" * 32)

    (server,) = parse_nats_url(f"tls://nats1?ca={bundle.trusted}&cert={bundle.certificate}&key={bundle.key}")

    assert server.tls is not None
    assert len(server.tls.get_ca_certs()) == 1


@pytest.mark.parametrize(
    "url",
    [
        "http://user:secret@x",
        "nats://",
        "nats://user:secret@",
        "nats://user:secret@host:x",
        "nats://user:secret@host/path",
        "nats://user:secret@host?ca=/x",
        "tls://user:secret@host?password=secret",
        "tls://user:secret@host?ca=/no/such/file",
    ],
)
def test_a_wrong_url_is_refused_without_its_secrets(url):
    with pytest.raises(ConfigError, match=r"cluster\.nats_url") as caught:
        parse_nats_url(url)

    assert "secret" not in str(caught.value)


def test_subjects_hold_nothing_that_nats_would_read_as_a_pattern():
    assert subjects.hello("XMPPD@node*.>") == subjects.hello("xmppd@node*.>")
    assert subjects.hello("xmppd@node*.>").removeprefix("xmppd.1.hello.").isalnum()
    assert subjects.packets(NODE, NODE) == f"xmppd.1.{NODE.hex()}.to.{NODE.hex()}"
    assert subjects.node_of(NODE.hex()) == NODE
    assert subjects.node_of("grafana") is None


@pytest.mark.parametrize(("text", "expected"), [("1.5ms", 0.0015), ("250µs", 0.00025), ("2s", 2), ("0s", 0), ("?", 0)])
def test_durations_of_go_are_seconds(text, expected):
    assert seconds(text) == pytest.approx(expected)
