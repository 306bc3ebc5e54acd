"""scripts/devcluster and scripts/bench, from outside."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


def script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SCRIPTS / name), *arguments],
        env=os.environ | {"XMPPD_PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def folder(tmp_path):
    yield str(tmp_path / "cluster")
    script("devcluster", "down", "--dir", str(tmp_path / "cluster"))


def up(folder: str, *arguments: str) -> dict:
    started = script("devcluster", "up", "1", "--dir", folder, "--json", *arguments)
    assert started.returncode == 0, started.stderr
    return json.loads(started.stdout)


def answers(address: str) -> bool:
    host, port = address.split(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError:
        return False
    return True


def test_a_node_serves_when_up_returns(folder):
    node = up(folder)

    assert node["name"] == "xmppd@node01"
    assert node["hosts"] == ["localhost"]
    assert answers(node["c2s"])
    assert answers(node["c2s_tls"])
    assert answers(node["http"])
    assert (Path(folder) / node["name"] / "pid").read_text().strip() == str(node["pid"])
    assert subprocess.run([*node["xmppctl"], "status"], capture_output=True).returncode == 0


@pytest.mark.alone
def test_a_killed_node_comes_back_on_its_ports(folder):
    before = up(folder)

    assert script("devcluster", "kill", "node01", "--dir", folder).returncode == 0
    assert not answers(before["c2s"])
    assert script("devcluster", "status", "--dir", folder).returncode == 1
    started = script("devcluster", "start", "node01", "--dir", folder, "--json")

    after = json.loads(started.stdout)
    assert after["pid"] != before["pid"]
    assert (after["c2s"], after["c2s_tls"]) == (before["c2s"], before["c2s_tls"])
    assert answers(after["c2s"])


def test_a_folder_with_a_live_cluster_is_left_alone(folder):
    node = up(folder)

    again = script("devcluster", "up", "1", "--dir", folder)

    assert again.returncode == 1
    assert "belongs to a live cluster" in again.stderr
    os.kill(node["pid"], 0)


def test_down_may_be_said_twice(folder):
    node = up(folder)

    assert script("devcluster", "down", "--dir", folder).returncode == 0
    assert script("devcluster", "down", "--dir", folder).returncode == 0

    assert not answers(node["c2s"])
    assert script("devcluster", "status", "--dir", folder).returncode == 1
    assert not (Path(folder) / node["name"] / "pid").exists()  # an orderly end, no SIGKILL


def test_a_node_that_cannot_start_says_why_and_is_gone(folder, tmp_path):
    (tmp_path / "over.yml").write_text("hostz: [localhost]\n")

    refused = script("devcluster", "up", "1", "--dir", folder, "--config", str(tmp_path / "over.yml"))

    assert refused.returncode == 1
    assert "hostz: unknown option" in refused.stderr
    assert script("devcluster", "status", "--dir", folder).returncode == 1


def lines(done: subprocess.CompletedProcess[str]) -> list[dict]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def ask(node: dict, *command: str) -> list[str]:
    done = subprocess.run([*node["xmppctl"], *command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return sorted(done.stdout.split())


def test_two_nodes_are_one_cluster_when_up_returns(folder):
    one, two = lines(script("devcluster", "up", "2", "--dir", folder, "--json"))
    names = [one["name"], two["name"]]

    assert names == ["xmppd@node01", "xmppd@node02"]
    assert ask(one, "list_cluster") == ask(two, "list_cluster") == names
    assert {answers(node[door]) for node in (one, two) for door in ("c2s", "c2s_tls", "http")} == {True}
    ask(one, "register", "romeo", "localhost", "s3cret")
    assert ask(two, "registered_users", "localhost") == ["romeo"]

    assert script("devcluster", "kill", "2", "--dir", folder).returncode == 0
    alone = script("devcluster", "status", "--dir", folder)
    assert (alone.returncode, "not one cluster" in alone.stdout) == (1, True)
    (again,) = lines(script("devcluster", "start", "node02", "--dir", folder, "--json"))

    assert (again["c2s"], again["pid"] != two["pid"]) == (two["c2s"], True)
    assert script("devcluster", "status", "--dir", folder).returncode == 0


@pytest.mark.long
def test_a_cluster_grows_and_shrinks_and_its_data_stay(folder):
    one = up(folder)
    ask(one, "register", "romeo", "localhost", "s3cret")

    grown = lines(script("devcluster", "up", "2", "--dir", folder, "--json"))
    assert grown[0]["pid"] == one["pid"]  # nobody was disturbed
    assert ask(grown[1], "registered_users", "localhost") == ["romeo"]
    assert script("devcluster", "down", "--dir", folder).returncode == 0
    shrunk = up(folder)

    assert ask(shrunk, "nodes", "--known") == []
    assert ask(shrunk, "registered_users", "localhost") == ["romeo"]
    assert not (Path(folder) / "xmppd@node02").exists()


@pytest.mark.long
@pytest.mark.mariadb
def test_a_cluster_may_have_its_database_in_mariadb(folder, mariadb_server):
    url = mariadb_server.new_database()
    try:
        node = up(folder, "--mysql", url)
        ask(node, "register", "romeo", "localhost", "s3cret")

        assert not (Path(folder) / "xmppd.db").exists()
        assert mariadb_server.query("SELECT COUNT(*) FROM account", url.rpartition("/")[2]) == [(1,)]
        assert script("devcluster", "down", "--dir", folder).returncode == 0
    finally:
        mariadb_server.drop_database(url)


@pytest.mark.skipif(shutil.which("cc") is None, reason="the load generator needs a C compiler")
@pytest.mark.long
@pytest.mark.parametrize("tls", ["starttls", "none", "direct"])
def test_no_message_is_lost_under_a_short_load(tls):
    measured = script("bench", "chat", "--pairs", "5", "--warm", "0.5", "--time", "2", "--tls", tls)

    assert measured.returncode == 0, measured.stderr
    result = json.loads(measured.stdout)
    assert result["messages"] > 0
    assert (result["lost"], result["bounced"], result["failed"], result["closed_early"]) == (0, 0, 0, 0)
    assert result["server_cpu_us_per_message"] > 0


@pytest.mark.long
@pytest.mark.skipif(shutil.which("cc") is None, reason="the load generator needs a C compiler")
def test_no_message_between_two_nodes_is_lost_under_a_short_load():
    measured = script("bench", "cluster", "--pairs", "5", "--warm", "0.2", "--time", "0.5")

    assert measured.returncode == 0, measured.stderr
    result = json.loads(measured.stdout)
    assert result["nodes"] == 2
    for layout in (result["cross"], result["same"]):
        assert layout["messages"] > 0
        assert (layout["lost"], layout["bounced"], layout["failed"], layout["closed_early"]) == (0, 0, 0, 0)
        assert layout["server_processes"] == 4  # each node has a nats-server
        assert layout["server_cpu_us_per_message"] >= layout["of_it_descendants_us_per_message"] >= 0


@pytest.mark.long
def test_what_the_sessions_of_a_cluster_cost_a_newcomer_is_measured():
    measured = script("bench", "cluster", "--rows", "1000")

    assert measured.returncode == 0, measured.stderr
    result = json.loads(measured.stdout)
    assert result["rows"] == 1000
    assert 0 <= result["rows_arrive_s"] < result["join_s"]
    assert set(result["longest_pause_ms"]) == {"owner", "newcomer"}
