"""Commands over real nodes: processes, nats-server and all."""

import asyncio
import json
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.harness.cluster import ClusterNode, RealCluster, free_ports, until
from tests.harness.scene import Scene

ONE, TWO = "xmppd@node01", "xmppd@node02"
ROOT = Path(__file__).parents[2]
SECRET = "wherefore-art-thou-romeo"


def post(port: int, path: str, arguments: Any) -> tuple[int, Any]:
    headers = {"Content-Type": "application/json"}
    asked = urllib.request.Request(f"http://127.0.0.1:{port}/api/{path}", json.dumps(arguments).encode(), headers)
    try:
        with urllib.request.urlopen(asked, timeout=20) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as refusal:
        with refusal:
            return refusal.code, json.load(refusal)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Two nodes for those tests that leave them as they were."""
    cluster = RealCluster(tmp_path_factory.mktemp("cluster"), 2)
    for node, port in zip(cluster, free_ports(2), strict=True):
        api = {
            "port": port,
            "ip": "127.0.0.1",
            "module": "http",
            "request_handlers": {"/api": "api", "/metrics": "metrics"},
        }
        permissions = {"all": {"who": "loopback", "what": ["connected*", "where", "kick_session", "status"]}}
        listen = [*node.options["listen"], api]
        node.configure({**node.options, "listen": listen, "api_permissions": permissions})
    try:
        cluster.start()
        cluster.join()
        cluster.converged()
        yield cluster
    finally:
        cluster.end()
    for node in cluster:
        node.judge()


def counted(node: ClusterNode, name: str, /, **labels: str) -> float:
    """One number of a node's /metrics."""
    with urllib.request.urlopen(f"http://127.0.0.1:{node.options['listen'][-1]['port']}/metrics", timeout=20) as page:
        pairs = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
        wanted = f"{name}{{{pairs}}} "
        [found] = [line for line in page.read().decode().splitlines() if line.startswith(wanted)]
    return float(found.removeprefix(wanted))


async def test_what_two_users_of_one_node_say_stays_there(cluster):
    scene, there = Scene(cluster[0]), Scene(cluster[1])
    romeo, juliet = await scene.raw_login("romeo"), await scene.raw_login("juliet")
    nurse = await there.raw_login("nurse")
    for client in (romeo, juliet, nurse):
        client.forget()

    async def speech(to) -> float:
        """Bytes that the nats-server of the first node sent to the other one's meanwhile."""
        route = {"node": TWO, "direction": "sent"}
        await asyncio.to_thread(until, lambda: counted(cluster[0], "xmppd_link_queue_bytes", node=TWO) == 0, "quiet")
        before = counted(cluster[0], "xmppd_nats_route_bytes_total", **route)
        for number in range(200):
            romeo.send_message(to.jid, f"{number} " + "x" * 1000)
        for number in range(200):
            assert (await to.next()).body.startswith(f"{number} ")
        return counted(cluster[0], "xmppd_nats_route_bytes_total", **route) - before

    across = await speech(nurse)
    here = await speech(juliet)

    assert across > 200_000
    assert here < 20_000, "heartbeats, and nothing that was said"
    await asyncio.gather(scene.end(), there.end())


async def test_commands_reach_the_whole_cluster_from_any_node(cluster):
    http = [node.options["listen"][-1]["port"] for node in cluster]
    first, second = Scene(cluster[0]), Scene(cluster[1])
    await first.login("romeo")
    juliet = await second.login("juliet")
    until(lambda: len(cluster[0].quick("connected_users").splitlines()) == 2, "two sessions")

    assert cluster[0].asked("connected_users") == cluster[1].asked("connected_users")
    assert len(cluster[0].asked("--local", "connected_users").splitlines()) == 1
    info = [row.split("\t") for row in cluster[0].asked("connected_users_info").splitlines()]
    assert {row[0].partition("@")[0]: row[5] for row in info} == {"juliet": TWO, "romeo": ONE}
    jid, node, connection, *_ = cluster[0].asked("where", "juliet@localhost").split("\t")
    assert (node, connection) == (TWO, "c2s_tls")

    # another node does it
    assert f"The node {TWO} is started" in cluster[0].asked("--node", TWO, "status")
    assert cluster[0].asked("--node", TWO, "--local", "connected_users") == jid
    refused = cluster[0].ctl("--node", "xmppd@node09", "status")
    assert (refused.returncode, "nodedown" in refused.stdout) == (3, True)
    cluster[0].asked("--node", TWO, "register", "nurse", "localhost", "peter")

    # over http
    assert post(http[0], "where", {"jid": "juliet@localhost"})[1][0]["node"] == TWO
    assert post(http[0], f"connected_users?local=true&node={TWO}", {}) == (200, [jid])
    assert post(http[0], "connected_users?node=xmppd@node09", {})[0] == 404
    assert post(http[0], f"where?node={TWO}", {})[0] == 400

    # a session elsewhere
    cluster[0].asked("kick_session", "juliet", "localhost", jid.partition("/")[2], "Good night")
    await juliet.assert_stream_error("conflict")
    until(lambda: cluster[0].quick("connected_users_number") == "1", "one session")
    cluster[0].asked("unregister", "nurse", "localhost")
    await first.end()
    await second.end()


async def test_a_node_that_hangs_is_named_and_then_taken_for_down(cluster):
    process = cluster[1].process

    process.send_signal(signal.SIGSTOP)
    try:
        with ThreadPoolExecutor() as pool:
            asked = pool.submit(post, cluster[0].options["listen"][-1]["port"], "connected_users", {})
            done = cluster[0].ctl("connected_users")
        until(lambda: cluster[0].ctl("connected_users").returncode == 0, "the node is down", 20)
    finally:
        process.send_signal(signal.SIGCONT)

    assert done.returncode == 29
    assert done.stdout == ""
    assert done.stderr.startswith(f"{TWO}: did not answer")
    status, refusal = asked.result()
    assert (status, refusal["code"]) == (503, 29)
    assert TWO in refusal["message"]
    cluster.converged()


def watching(node: ClusterNode, *argv: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "xmppd.ctl", "--config", str(node.path), *argv]
    return subprocess.Popen(
        command, env=node.environment, cwd=node.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


async def test_watch_shows_the_cluster_until_ctrl_c(cluster):
    scene = Scene(cluster[1])
    watch = watching(cluster[0], "--json", "watch")
    until(lambda: "\nwatch\t4\t" in cluster[1].quick("module", "stats"), "both nodes tell their events")
    elsewhere = watching(cluster[0], "--node", TWO, "watch", "juliet@localhost")
    try:
        await scene.login("juliet")
        opened = json.loads(watch.stdout.readline())
        assert (opened["event"], opened["node"]) == ("session_opened", TWO)
        assert opened["jid"] == cluster[0].asked("connected_users")
        await scene.end()
        assert json.loads(watch.stdout.readline())["event"] == "session_closed"
        for each in (watch, elsewhere):
            each.send_signal(signal.SIGINT)
        assert watch.wait(10) == 130
        assert watch.stderr.read() == ""
        elsewhere.wait(10)
    finally:
        for each in (watch, elsewhere):
            each.kill()
            each.communicate()


async def test_the_self_test_passes_and_leaves_nothing(cluster):
    before = cluster[0].asked("registered_users", "localhost")

    done = cluster[1].ctl("selftest")

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" ms") == 4
    assert done.stdout.splitlines()[1].split() == [TWO, ONE]
    assert cluster[0].asked("registered_users", "localhost") == before
    assert cluster[0].asked("connected_users_number") == "0"


@pytest.mark.node
@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js")
async def test_the_example_observes_a_node_that_is_alone(real_cluster, tmp_path):
    (port,) = free_ports(1)
    secret = tmp_path / "secret"
    secret.write_text(SECRET + "\n")
    secret.chmod(0o600)
    users = {"dashboard": {"secret_file": str(secret), "may": ["events", "tables", "api"]}}
    cluster = real_cluster(1, cluster={"observers": {"listen": f"127.0.0.1:{port}", "users": users}}, start=False)
    permissions = {"dashboard": {"from": "observer", "who": {"observer": "dashboard"}, "what": "send_message"}}
    cluster[0].configure({**cluster[0].options, "api_permissions": permissions})
    cluster.start()
    scene = Scene(cluster[0])
    juliet = await scene.login("juliet")
    jid = cluster[0].asked("connected_users")
    script = ROOT / "docs" / "examples" / "observer.js"
    said = ["localhost", "juliet@localhost", "Look to the east"]
    process = await asyncio.create_subprocess_exec(
        "node", str(script), "127.0.0.1", str(port), "dashboard", str(secret), *said, stdout=asyncio.subprocess.PIPE
    )

    async def line() -> str:
        assert process.stdout is not None
        return (await asyncio.wait_for(process.stdout.readline(), 20)).decode().strip()

    try:
        lines = [await line() for _ in range(3)]
        message = await juliet.next_message()
        await scene.login("romeo")
        event = json.loads((await line()).removeprefix("event "))
    finally:
        process.kill()
        await process.wait()

    assert lines == [f"nodes {ONE}", f"session {jid} {ONE}", "sent 0"]
    assert message.body == "Look to the east"
    assert (event["event"], event["node"]) == ("session_opened", ONE)
    assert SECRET not in cluster[0].log
    await scene.end()


async def test_a_node_that_stops_does_not_wait_for_those_who_watch(real_cluster):
    cluster = real_cluster(1)
    watch = watching(cluster[0], "watch")
    try:
        until(lambda: "\nwatch\t2\t" in cluster[0].quick("module", "stats"), "it watches")
        began = time.monotonic()
        cluster[0].asked("stop")
        assert watch.wait(10) == 0
        assert time.monotonic() - began < 2
        assert cluster[0].wait() == 0
    finally:
        watch.kill()
        watch.communicate()
