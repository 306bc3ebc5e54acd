"""Packets between nodes over real nats-server processes: what arrives, what is noticed, and who is kept out."""

import asyncio
import os
import signal
import stat
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from tests.cluster.nats_nodes import CLUSTER, COOKIE, Node, mesh, until
from xmppd.cluster import subjects
from xmppd.cluster.child import NatsServerError
from xmppd.cluster.nats_config import Observer, ObserverPort
from xmppd.errors import NodeUnreachable


async def test_three_nodes_send_each_other_packets(make_node):
    nodes = [make_node() for _ in range(3)]
    await mesh(*nodes)

    for node in nodes:
        for other in nodes:
            if other is not node:
                node.engine.send(other.id, node.id + other.id)

    await until(lambda: all(len(node.packets) == 2 for node in nodes))
    for node in nodes:
        assert sorted(node.packets) == sorted(other.id + node.id for other in nodes if other is not node)


async def test_packets_of_another_cluster_are_not_ours(make_node):
    one, two = make_node(), make_node()
    await mesh(one, two)
    other = uuid.uuid4().bytes
    await two.engine.set_cluster(other)

    one.engine.send(two.id, b"for the former cluster")
    await one.engine.set_cluster(other)
    await one.linked_to(two)  # what was sent before has come by now, if it ever does

    assert two.packets == []


async def test_a_large_packet_arrives_whole(make_node):
    one, two = make_node(), make_node()
    await mesh(one, two)
    packet = os.urandom(one.engine.max_packet)

    one.engine.send(two.id, packet)

    await until(lambda: two.packets == [packet])


async def test_a_newcomer_asks_before_it_is_a_member(make_node):
    one, two = make_node(), make_node()

    async def greet(payload: bytes) -> bytes | None:
        return b"welcome " + payload

    await one.engine.serve(subjects.hello(one.name), greet)
    await mesh(one, two)

    assert await two.engine.request(subjects.hello(one.name), b"node02", 2) == b"welcome node02"
    with pytest.raises(NodeUnreachable, match="nobody answers"):
        await two.engine.request(subjects.hello("xmppd@elsewhere"), b"", 2)


async def test_who_asks_a_slow_node_is_told_so(make_node):
    one, two = make_node(), make_node()

    async def think(_: bytes) -> bytes | None:
        return None

    await one.engine.serve(subjects.hello(one.name), think)
    await mesh(one, two)

    with pytest.raises(NodeUnreachable, match="no answer within"):
        await two.engine.request(subjects.hello(one.name), b"", 0.2)


async def test_a_child_that_dies_is_replaced_and_packets_flow_again(make_node):
    one, two = make_node(), make_node()
    await mesh(one, two)
    gaps = []
    one.engine.on_gap = lambda: gaps.append(1)
    former = one.engine.child_pid

    os.kill(former, signal.SIGKILL)

    await until(lambda: one.engine.child_pid not in (None, former) and one.engine.connected)
    await until(lambda: len(gaps) == 1)
    await one.linked_to(two)
    await two.linked_to(one)
    state = await one.engine.state()
    assert (state.restarts, state.gaps, state.child_pid) == (1, 1, one.engine.child_pid)


async def test_the_others_hear_at_once_of_a_server_that_dies(make_node):
    one, two, three = make_node(), make_node(), make_node()
    await mesh(one, two, three)

    os.kill(one.engine.child_pid, signal.SIGKILL)

    await until(lambda: one.id in two.suspected and one.id in three.suspected, timeout=1)
    assert set(two.suspected) == {one.id}


async def test_the_others_hear_at_once_of_a_node_that_stops(make_node):
    one, two = make_node(), make_node()
    await mesh(one, two)

    await one.engine.stop()

    await until(lambda: one.id in two.suspected, timeout=1)


async def test_nothing_is_sent_and_nothing_raised_while_the_child_is_away(make_node):
    one, two = make_node(), make_node()
    await mesh(one, two)

    await one.engine.stop()
    one.engine.send(two.id, b"lost")

    assert not one.engine.connected
    assert one.engine.dropped == 1


async def test_a_frozen_child_loses_nothing_or_says_so(make_node):
    one, two = make_node(), make_node()
    await mesh(one, two)
    gaps = []
    two.engine.on_gap = lambda: gaps.append(1)

    os.kill(two.engine.child_pid, signal.SIGSTOP)
    for number in range(500):
        one.engine.send(two.id, number.to_bytes(2, "big"))
        await asyncio.sleep(0.002)
    os.kill(two.engine.child_pid, signal.SIGCONT)

    await until(lambda: len(two.packets) == 500 or bool(gaps) or bool(one.suspected))
    await one.linked_to(two)


@pytest.mark.long
@pytest.mark.slow
async def test_a_server_that_is_silent_for_long_is_dropped_by_the_others_and_replaced_at_home(make_node):
    one, two = make_node(), make_node()
    await mesh(one, two)
    frozen = two.engine.child_pid

    os.kill(frozen, signal.SIGSTOP)

    await until(lambda: two.id in one.suspected, timeout=8)
    await until(lambda: two.engine.child_pid not in (None, frozen) and two.engine.connected, timeout=20)
    await one.linked_to(two)


async def test_another_cookie_is_refused_on_both_sides(make_node, caplog):
    one, two, stranger = make_node(), make_node(), make_node(cookie="e" * 64)
    await mesh(one, two)
    await stranger.start()

    await stranger.engine.set_routes([one.address])
    await one.engine.set_routes([two.address, stranger.address])

    await until(lambda: one.engine.refused >= 2 and stranger.engine.refused >= 2)
    stranger.engine.send(one.id, b"let me in")
    one.engine.send(stranger.id, b"secret")
    await one.linked_to(two)
    assert one.packets == []
    assert stranger.packets == []
    assert [route.node for route in (await one.engine.state()).routes] == [two.id]
    assert (await stranger.engine.state()).routes == ()
    complaints = [record for record in caplog.records if record.msg == "peer refused, wrong cookie"]
    assert len(complaints) == 2, "one line for each node, however often it tries"


async def test_the_child_says_whom_it_is_connected_to(make_node):
    one, two, three = make_node(), make_node(), make_node()
    await mesh(one, two, three)

    state = await one.engine.state()

    assert {route.node for route in state.routes} == {two.id, three.id}
    assert len(state.routes) == 2, "one connection for each other node"
    assert state.connected
    assert state.nats_version.startswith("2.")
    assert state.observers == ()
    assert state.memory > 1_000_000


async def test_a_packet_shows_in_the_counters_of_its_route_alone(make_node):
    one, two, three = make_node(), make_node(), make_node()
    await mesh(one, two, three)
    before = {route.node: route.sent_bytes for route in (await one.engine.state()).routes}

    one.engine.send(two.id, b"x" * 50_000)
    await until(lambda: len(two.packets) == 1)

    after = {route.node: route.sent_bytes for route in (await one.engine.state()).routes}
    assert after[two.id] - before[two.id] >= 50_000
    assert after[three.id] - before[three.id] < 5_000


async def test_no_route_is_dropped_when_a_member_comes_or_goes(make_node):
    one, two, three = make_node(), make_node(), make_node()
    await mesh(one, two)
    before = {route.node: (route.route_id, route.started) for route in (await one.engine.state()).routes}

    await three.start()
    await one.engine.set_routes([two.address, three.address])
    await one.linked_to(three)
    await one.engine.set_routes([two.address])

    after = {route.node: (route.route_id, route.started) for route in (await one.engine.state()).routes}
    assert after[two.id] == before[two.id]


async def test_nothing_secret_is_in_arguments_or_environment(make_node):
    node = make_node()
    await node.start()
    folder = Path(f"/proc/{node.engine.child_pid}")
    secrets = [COOKIE, node.engine._password]

    shown = (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()

    assert b"nats.conf" in shown
    assert not [secret for secret in secrets if secret.encode() in shown]


async def test_only_we_can_read_what_the_engine_writes(make_node):
    former = os.umask(0)
    try:
        node = make_node()
        await node.start()
    finally:
        os.umask(former)
    await node.engine.set_cookies(COOKIE, ["a" * 30])

    files = list((node.folder / "nats").iterdir())

    assert {file.name for file in files} >= {"nats.conf", "nats.log", "route.crt", "route.key", "route-ca.crt"}
    exposed = [file.name for file in files if stat.S_IMODE(file.stat().st_mode) & 0o077 and file.suffix != ".ports"]
    assert exposed == []
    assert stat.S_IMODE((node.folder / "nats").stat().st_mode) == 0o700
    assert not [file for file in files if COOKIE.encode() in file.read_bytes()]


@pytest.mark.parametrize("host", ["127.0.0.2", "[::1]"])
async def test_a_node_listens_where_it_is_told(make_node, host):
    one, two = make_node(listen=f"{host}:0", advertise=f"{host}:4444"), make_node()
    try:
        await one.start()
    except NatsServerError as exc:
        if host == "[::1]" and "assign requested address" in str(exc):
            pytest.skip("no IPv6 here")
        raise
    await two.start()

    await two.engine.set_routes([f"{host}:{one.engine.route_port}"])

    await two.linked_to(one)
    assert not await is_open(one.engine.route_port)


async def test_a_name_of_the_configuration_comes_before_the_resolver(make_node):
    one = make_node()
    two = make_node(hosts={"node01.example.net": "127.0.0.1"})
    await one.start()
    await two.start()

    await two.engine.set_routes([f"xmppd@node01.example.net:{one.engine.route_port}"])

    await two.linked_to(one)


async def test_a_route_that_cannot_be_dialled_is_found_at_its_new_address(make_node):
    one, two = make_node(listen="127.0.0.2:0"), make_node(hosts={"node01": "127.0.0.3"})
    await one.start()
    await two.start()
    await two.engine.set_routes([f"node01:{one.engine.route_port}"])
    await until(lambda: bool(two.engine._routes._failing))

    two.engine.resolver._hosts["node01"] = "127.0.0.2"

    await two.linked_to(one)


async def test_a_member_starts_while_its_port_is_taken_and_goes_on_by_itself(make_node):
    one = make_node()
    await one.start()
    two = make_node(listen=one.address)

    await two.engine.start(patient=True)
    assert not two.engine.connected
    await one.engine.stop()

    await until(lambda: two.engine.connected)


async def test_a_route_port_in_use_is_named(make_node):
    one = make_node()
    await one.start()
    two = make_node(listen=one.address)

    with pytest.raises(NatsServerError, match="address already in use"):
        await two.start()

    assert two.engine.child_pid is None


async def test_a_program_that_is_not_there_is_named(make_node):
    node = make_node(nats_server="/no/such/nats-server")

    with pytest.raises(NatsServerError, match=r"cluster\.nats_server: /no/such/nats-server"):
        await node.start()


async def test_a_program_that_is_something_else_is_told_by_its_words(make_node, tmp_path):
    program = tmp_path / "nats-server"
    program.write_text("#!/bin/sh\necho nats-server: flag provided but not defined\nexit 1\n")
    program.chmod(0o755)
    node = make_node(nats_server=str(program))

    with pytest.raises(NatsServerError, match="flag provided but not defined"):
        await node.start()


RUN_A_NODE = """
import asyncio, sys, uvloop
from pathlib import Path
from tests.cluster.nats_nodes import Node, CLUSTER

async def main():
    node = Node(Path(sys.argv[1]))
    await node.start()
    await node.engine.set_routes(sys.argv[2:])
    print(node.id.hex(), node.engine.child_pid, node.engine.route_port, flush=True)
    await asyncio.sleep(60)

uvloop.run(main())
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def has_route(node: Node, to: bytes) -> bool:
    return to in {route.node for route in (await node.engine.state()).routes}


async def run_a_node(folder: Path, *routes: str) -> tuple[asyncio.subprocess.Process, bytes, int, int]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", RUN_A_NODE, str(folder), *routes, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    node, child, port = (await asyncio.wait_for(process.stdout.readline(), 15)).split()
    return process, bytes.fromhex(node.decode()), int(child), int(port)


async def test_the_child_dies_with_us_and_the_others_hear_of_it_within_a_second(make_node, tmp_path):
    one, two = make_node(), make_node()
    await mesh(one, two)
    process, node, child, port = await run_a_node(tmp_path / "victim", one.address, two.address)
    try:
        for other in (one, two):
            await other.engine.set_routes([one.address, two.address, f"127.0.0.1:{port}"])
        for other in (one, two):
            await until(lambda other=other: has_route(other, node))
        assert alive(child)
    finally:
        process.kill()
        await process.wait()

    await until(lambda: not alive(child), timeout=1)
    await until(lambda: node in one.suspected and node in two.suspected, timeout=1)


async def test_what_an_earlier_run_left_behind_is_ended(make_node):
    node = make_node()
    await node.start()
    binary = os.readlink(f"/proc/{node.engine.child_pid}/exe")
    port = node.engine.route_port
    await node.engine.stop()
    node.options.listen = f"127.0.0.1:{port}"
    orphan = await asyncio.create_subprocess_exec(
        binary, "-c", str(node.folder / "nats" / "nats.conf"), stderr=asyncio.subprocess.DEVNULL
    )
    await until(lambda: is_open(port))

    await node.start()

    assert await asyncio.wait_for(orphan.wait(), 1) == -signal.SIGKILL
    assert node.engine.route_port == port


async def is_open(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


async def test_a_cookie_changes_on_a_living_mesh_without_a_route_dropped(make_node):
    nodes = [make_node() for _ in range(3)]
    await mesh(*nodes)
    new = "c0" * 32
    before = [await routes_of(node) for node in nodes]
    enough = asyncio.Event()
    sending = asyncio.create_task(send_around(nodes, enough))

    for node in nodes:
        await node.engine.set_cookies(COOKIE, [new])
    for node in nodes:
        await node.engine.set_cookies(new, [COOKIE])
    for node in nodes:
        await node.engine.set_cookies(new)
    await asyncio.sleep(0.2)
    enough.set()
    rounds = await sending

    assert rounds > 20
    await until(lambda: all(len(node.packets) == 2 * rounds for node in nodes))
    assert [await routes_of(node) for node in nodes] == before
    assert all(node.suspected == [] and node.engine.gaps == 0 for node in nodes)
    await a_node_with_the_former_cookie_is_refused(make_node, nodes[0])


async def routes_of(node: Node) -> dict[bytes, tuple[int, str]]:
    return {route.node: (route.route_id, route.started) for route in (await node.engine.state()).routes}


async def send_around(nodes: list[Node], enough: asyncio.Event) -> int:
    """Everybody to everybody, again and again; how often."""
    rounds = 0
    while not enough.is_set():
        rounds += 1
        for node in nodes:
            for other in nodes:
                if other is not node:
                    node.engine.send(other.id, node.id + rounds.to_bytes(4, "big"))
        await asyncio.sleep(0.005)
    return rounds


async def a_node_with_the_former_cookie_is_refused(make_node, node: Node) -> None:
    late = make_node(cookie=COOKIE)
    await late.start()
    refused = node.engine.refused
    await late.engine.set_routes([node.address])
    await until(lambda: node.engine.refused > refused and late.engine.refused > 0)
    assert (await late.engine.state()).routes == ()


async def test_an_observer_connects_with_its_own_secret_and_rights(make_node):
    import nats

    node = make_node()
    watcher = Observer("watcher", "its own secret", subscribe=("xmppd.1.events.>",))
    await node.engine.set_observers([watcher], ObserverPort("127.0.0.1", 0))
    await node.start()
    errors: list[str] = []

    async def failed(error: Exception) -> None:
        errors.append(str(error))

    client = await nats.connect(
        f"127.0.0.1:{node.engine._child.client_port}",
        user="watcher",
        password="its own secret",
        name="grafana",
        error_cb=failed,
    )
    try:
        got = []

        async def take(message):
            got.append(message.data)

        await client.subscribe("xmppd.1.events.>", cb=take)
        await client.subscribe(f"xmppd.1.{CLUSTER.hex()}.to.>", cb=take)
        await client.publish(subjects.packets(CLUSTER, node.id), b"forged")
        for _ in range(2):  # the library may send the first ping ahead of what we asked for
            await client.flush()
        node.engine._connection.publish("xmppd.1.events.x", b"event")
        node.engine.send(node.id, b"to myself")

        await until(lambda: got == [b"event"] and node.packets == [b"to myself"])
        await until(lambda: len(errors) == 2)
        assert [one.name for one in (await node.engine.state()).observers] == ["grafana"]
    finally:
        await client.close()


async def test_an_existing_nats_serves_as_well(make_node, tmp_path):
    host = make_node()
    await host.engine.set_observers([Observer("outside", "s@cret/", (">",), (">",))], ObserverPort("127.0.0.1", 0))
    await host.start()
    port = host.engine._child.client_port
    url = f"nats://outside:s%40cret%2F@127.0.0.1:1,127.0.0.1:{port}"
    one, two = make_node(nats_url=url), make_node(nats_url=url)

    await one.start()
    await two.start()
    await one.linked_to(two)
    await two.linked_to(one)

    assert one.engine.child_pid is None
    assert (await one.engine.state()).external


async def test_an_existing_nats_that_comes_back_is_a_gap(make_node):
    host = make_node()
    await host.engine.set_observers([Observer("outside", "secret", (">",), (">",))], ObserverPort("127.0.0.1", 0))
    await host.start()
    node = make_node(nats_url=f"nats://outside:secret@127.0.0.1:{host.engine._child.client_port}")
    await node.start()

    os.kill(host.engine.child_pid, signal.SIGKILL)

    await until(lambda: node.engine.gaps == 1 and node.engine.connected)


async def test_a_wrong_password_for_an_existing_nats_is_told(make_node, monkeypatch):
    monkeypatch.setattr("xmppd.cluster.engine._START_TIMEOUT", 1.0)
    host = make_node()
    await host.start()
    node = make_node(nats_url=f"nats://who:cares@127.0.0.1:{host.engine._child.client_port}")

    with pytest.raises(NodeUnreachable, match=r"(?i)authorization"):
        await node.start()

    assert not node.engine.running
