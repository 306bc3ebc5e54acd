"""The parts of scripts/ that decide something by themselves."""

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / "scripts" / "tools"


def tool(name: str) -> ModuleType:
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look themselves up there, and tools import each other
    spec.loader.exec_module(module)
    return module


sampling, devnode, devcluster, *_, bench, announce = map(
    tool,
    (
        "sampling",
        "devnode",
        "devcluster",
        "bench_own",
        "bench_join",
        "bench_chat",
        "bench_sessions",
        "bench",
        "announce",
    ),
)


@pytest.mark.parametrize(
    "name", ["run", "test", "check", "lock", "devcluster", "bench", "tools/venv.sh", "tools/ejabberd.sh", "../.ci/run"]
)
def test_shell_scripts_parse(name):
    done = subprocess.run(["bash", "-n", str(ROOT / "scripts" / name)], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["scripts/run", "scripts/test", "scripts/check", "scripts/devcluster", ".ci/run"])
def test_scripts_can_be_executed(name):
    assert os.access(ROOT / name, os.X_OK)


def test_a_merged_configuration_keeps_what_was_not_given():
    base = {"hosts": ["localhost"], "database": {"pool": {"min": 1, "max": 8}}}
    over = {"hosts": ["a.test", "b.test"], "database": {"pool": {"max": 2}, "commit_interval": "5ms"}}

    assert devnode.merged(base, over) == {
        "hosts": ["a.test", "b.test"],
        "database": {"pool": {"min": 1, "max": 2}, "commit_interval": "5ms"},
    }
    assert base["database"]["pool"]["max"] == 8


def node_config(over, **options):
    ports = iter([20001, 20002, 20003, 20004])
    node = devnode.Node("xmppd@node01", "/d/xmppd@node01")
    return devnode.configuration(node, over, database="sqlite:////d/xmppd.db", next_port=lambda: next(ports), **options)


def test_a_node_listens_on_loopback_for_clients_and_http():
    assert node_config({}, plain=False)["listen"] == [
        {"module": "c2s", "starttls_required": True, "ip": "127.0.0.1", "port": 20001},
        {"module": "c2s", "tls": True, "ip": "127.0.0.1", "port": 20002},
        {"module": "http", "ip": "127.0.0.1", "port": 20003},
    ]


def test_plain_lets_clients_in_without_tls():
    assert node_config({}, plain=True)["listen"][0]["starttls_required"] is False


def test_given_listeners_replace_ours_and_get_ports_where_they_name_none():
    over = {"listen": [{"module": "c2s", "port": 15222}, {"module": "http", "port": 0}]}

    config = node_config(over, plain=False)

    assert [one["port"] for one in config["listen"]] == [15222, 20001]
    assert over["listen"][1] == {"module": "http", "port": 0}  # the next node gets ports of its own


@pytest.mark.parametrize("listen", [5222, ["c2s"], None])
def test_listeners_that_are_none_are_left_for_the_server_to_refuse(listen):
    assert node_config({"listen": listen}, plain=False)["listen"] == listen


def test_the_name_of_a_node_cannot_be_set(tmp_path):
    (tmp_path / "over.yml").write_text("node: other@host\n")

    with pytest.raises(devnode.Refused, match="node cannot be set"):
        devnode.read_overlay(str(tmp_path / "over.yml"))


def test_a_node_is_found_by_its_whole_and_by_its_short_name(tmp_path):
    node = devnode.Node("xmppd@node01", str(tmp_path), (0, 1))
    devcluster.Cluster(tmp_path, [node]).save()

    cluster = devcluster.Cluster.load(tmp_path)

    assert cluster.node("node01") == cluster.node("xmppd@node01") == node
    with pytest.raises(devcluster.Refused, match="no such node: node02"):
        cluster.node("node02")


def test_a_pid_that_belongs_to_another_process_by_now_is_not_our_node(tmp_path):
    node = devnode.Node("xmppd@node01", str(tmp_path))
    (tmp_path / "pid").write_text(str(os.getpid()))

    assert node.pid() is None


def test_what_a_killed_node_said_of_itself_is_not_believed(tmp_path):
    node = devnode.Node("xmppd@node01", str(tmp_path))
    (tmp_path / "ready.json").write_text('{"hosts": ["localhost"], "listen": []}')
    (tmp_path / "pid").write_text("1")

    assert node.ready() is None


def test_nodes_of_one_cluster_share_database_and_cookie_but_no_port(tmp_path):
    nodes = [devnode.Node(f"xmppd@node0{number}", str(tmp_path / f"node0{number}")) for number in (1, 2)]
    cluster = devcluster.Cluster(tmp_path, nodes)

    devcluster.configure(cluster, nodes, {}, plain=False)

    one, two = (yaml.safe_load(node.config.read_text()) for node in nodes)
    assert one["database"] == two["database"] == {"url": f"sqlite:///{tmp_path}/xmppd.db"}
    assert nodes[0].cookie.read_text() == nodes[1].cookie.read_text()
    ports = [each["port"] for config in (one, two) for each in config["listen"]]
    ports += [int(config["cluster"]["listen"].rpartition(":")[2]) for config in (one, two)]
    assert len(set(ports)) == 8


def test_a_node_that_is_added_later_gets_the_cookie_that_is_there(tmp_path):
    nodes = [devnode.Node(f"xmppd@node0{number}", str(tmp_path / f"node0{number}")) for number in (1, 2)]
    devcluster.configure(devcluster.Cluster(tmp_path, nodes[:1]), nodes[:1], {}, plain=False)

    devcluster.configure(devcluster.Cluster(tmp_path, nodes), nodes[1:], {}, plain=False)

    assert nodes[0].cookie.read_text() == nodes[1].cookie.read_text()


def test_where_the_database_is_stays_between_us_and_the_node(tmp_path):
    node = devnode.Node("xmppd@node01", str(tmp_path / "node01"))
    cluster = devcluster.Cluster(tmp_path, [node], "mysql://xmppd:s3cret@127.0.0.1/xmppd")

    devcluster.configure(cluster, [node], {}, plain=False)

    assert devcluster.Cluster.load(tmp_path).database == "mysql://xmppd:s3cret@127.0.0.1/xmppd"
    assert "s3cret" in node.config.read_text()
    assert [file.stat().st_mode & 0o077 for file in (tmp_path / "devcluster.json", node.config)] == [0, 0]


def view(peers, agrees=True):
    return devcluster.View(agrees, peers, 0, "")


def test_nodes_are_one_cluster_when_each_has_a_link_to_each_other_one():
    assert devcluster.one_cluster([view(0)])
    assert devcluster.one_cluster([view(2), view(2), view(2)])
    assert not devcluster.one_cluster([view(2), view(1), view(1)])
    assert not devcluster.one_cluster([view(1), view(1, agrees=False)])


def configured(folder, *, count=1):
    """What `up` does until the nodes run."""
    arguments = argparse.Namespace(count=count, cpus=None, plain=False, timeout=1)
    folder.mkdir()
    devcluster.bring_up(devcluster.Cluster(folder), {}, arguments)


def refused_by_a_taken_port(node):
    node.log.write_text("xmppd: cannot listen on 127.0.0.1 port 1: Address already in use\n")
    devnode.fail(node, 0, f"{node.name} ended")


def test_a_port_that_was_taken_meanwhile_is_replaced(tmp_path, monkeypatch):
    tried = []

    def start(nodes, timeout):
        tried.append(nodes[0].config.read_text())
        if len(tried) == 1:
            refused_by_a_taken_port(nodes[0])

    monkeypatch.setattr(devcluster, "start", start)
    monkeypatch.setattr(devcluster, "wait_until_they_agree", lambda nodes, timeout: None)

    configured(tmp_path / "cluster")

    assert len(tried) == 2
    assert tried[0] != tried[1]


def test_a_port_that_is_always_taken_is_said_in_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(devcluster, "start", lambda nodes, timeout: refused_by_a_taken_port(nodes[0]))

    with pytest.raises(devnode.Refused, match="Address already in use"):
        configured(tmp_path / "cluster")


@pytest.mark.parametrize("text", ["", "x", "1-", "999999", "0,,1"])
def test_cpus_that_are_not_there_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError):
        devcluster.cpu_list(text)


def test_the_announcement_names_the_ports_the_server_took():
    ready = {
        "hosts": ["example.net"],
        "listen": [
            {"module": "c2s", "ip": "::", "port": 5555, "tls": False},
            {"module": "c2s", "ip": "::", "port": 5556, "tls": True},
        ],
    }

    text = announce.text(ready, Path("/srv/var"))

    assert "port 5555 (STARTTLS) or port 5556 (direct TLS)" in text
    assert "--data-dir /srv/var register romeo example.net" in text


def test_nothing_is_announced_for_a_server_that_ended(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    (tmp_path / "ready.json").write_text('{"hosts": ["localhost"]}')
    (tmp_path / "pid").write_text(str(ended.pid))

    assert announce.wait_until_ready(tmp_path, ended.pid) is None


def test_a_server_is_announced_when_it_holds_the_folder_and_serves(tmp_path):
    (tmp_path / "ready.json").write_text('{"hosts": ["localhost"]}')
    (tmp_path / "pid").write_text(str(os.getpid()))

    assert announce.wait_until_ready(tmp_path, os.getpid()) == {"hosts": ["localhost"]}


def test_a_sample_counts_a_process_with_its_descendants():
    shell = subprocess.Popen(["sh", "-c", "read _ & wait"], stdin=subprocess.PIPE)
    try:
        found = sampling.with_descendants([os.getpid()])

        assert {os.getpid(), shell.pid} <= set(found)
        assert sampling.memory(found)[0] > 1
    finally:
        shell.stdin.close()
        shell.wait()


@pytest.mark.parametrize(
    "argv",
    [
        ["chat", "--users", "3"],
        ["register"],
        ["login", "--auth", "plain"],
        ["cluster", "--users", "3"],
        ["cluster", "--target", "127.0.0.1:5222"],
        ["cluster", "--rows", "0"],
        ["cluster", "--rows", "5", "--target", "127.0.0.1:5222,127.0.0.1:5223"],
        ["chat", "--rows", "5"],
        ["resume", "--target", "127.0.0.1:5222"],
        ["post_log", "--rounds", "0"],
        ["chat", "--sink-down"],
        ["chat", "--target", "127.0.0.1:5222", "--mysql"],
        ["juggle"],
    ],
)
def test_bench_refuses_what_it_cannot_measure(argv, capsys):
    with pytest.raises(SystemExit) as refused:
        bench.parse(argv)

    assert refused.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_bench_says_what_to_install_when_there_is_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    with pytest.raises(bench.Failed, match="apt-get install gcc"):
        bench.build()


def test_of_several_rounds_the_middle_one_counts_and_trouble_adds_up(monkeypatch):
    costs = iter([90.0, 40.0, 70.0, 60.0, 80.0, 50.0])  # cross and same by turns

    def run(generator, server, cache, arguments, *, layout):
        return {"layout": layout, "server_cpu_us_per_message": next(costs), "lost": 1} | dict.fromkeys(
            ("bounced", "failed", "closed_early"), 0
        )

    monkeypatch.setattr(bench, "run", run)
    arguments = bench.parse(["cluster", "--rounds", "3"])

    found = bench.run_cluster(Path("loadgen"), bench.Server("a:1,b:2", "", "localhost", [1, 2]), "", arguments)

    assert found["nodes"] == 2
    assert (found["cross"]["server_cpu_us_per_message"], found["same"]["server_cpu_us_per_message"]) == (80.0, 50.0)
    assert (found["cross_over_same"], found["cross"]["lost"]) == (1.6, 3)
    assert found["same"]["server_cpu_us_per_message_of_rounds"] == [40.0, 50.0, 60.0]
