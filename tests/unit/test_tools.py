"""The parts of scripts/ that decide something by themselves."""

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / "scripts" / "tools"


def tool(name: str) -> ModuleType:
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look themselves up there, and bench imports sampling
    spec.loader.exec_module(module)
    return module


sampling, devcluster, bench, announce = map(tool, ("sampling", "devcluster", "bench", "announce"))


@pytest.mark.parametrize("name", ["run", "test", "check", "lock", "devcluster", "bench", "tools/venv.sh", "../.ci/run"])
def test_shell_scripts_parse(name):
    done = subprocess.run(["bash", "-n", str(ROOT / "scripts" / name)], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["scripts/run", "scripts/test", "scripts/check", "scripts/devcluster", ".ci/run"])
def test_scripts_can_be_executed(name):
    assert os.access(ROOT / name, os.X_OK)


def test_a_merged_configuration_keeps_what_was_not_given():
    base = {"hosts": ["localhost"], "database": {"pool": {"min": 1, "max": 8}}}
    over = {"hosts": ["a.test", "b.test"], "database": {"pool": {"max": 2}, "commit_interval": "5ms"}}

    assert devcluster.merged(base, over) == {
        "hosts": ["a.test", "b.test"],
        "database": {"pool": {"min": 1, "max": 2}, "commit_interval": "5ms"},
    }
    assert base["database"]["pool"]["max"] == 8


def node_config(over, **options):
    ports = iter([20001, 20002, 20003])
    node = devcluster.Node("xmppd@node01", "/d/xmppd@node01")
    return devcluster.configuration(node, over, next_port=lambda: next(ports), **options)


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

    with pytest.raises(devcluster.Refused, match="node cannot be set"):
        devcluster.read_overlay(str(tmp_path / "over.yml"))


def test_a_node_is_found_by_its_whole_and_by_its_short_name(tmp_path):
    node = devcluster.Node("xmppd@node01", str(tmp_path), (0, 1))
    devcluster.Cluster(tmp_path, [node]).save()

    cluster = devcluster.Cluster.load(tmp_path)

    assert cluster.node("node01") == cluster.node("xmppd@node01") == node
    with pytest.raises(devcluster.Refused, match="no such node: node02"):
        cluster.node("node02")


def test_a_pid_that_belongs_to_another_process_by_now_is_not_our_node(tmp_path):
    node = devcluster.Node("xmppd@node01", str(tmp_path))
    (tmp_path / "pid").write_text(str(os.getpid()))

    assert node.pid() is None


def test_what_a_killed_node_said_of_itself_is_not_believed(tmp_path):
    node = devcluster.Node("xmppd@node01", str(tmp_path))
    (tmp_path / "ready.json").write_text('{"hosts": ["localhost"], "listen": []}')
    (tmp_path / "pid").write_text("1")

    assert node.ready() is None


def up(folder):
    arguments = argparse.Namespace(count=1, config=None, cpus=None, plain=False, timeout=1, json=True)
    devcluster.up(folder, arguments)


def refused_by_a_taken_port(node):
    node.log.write_text("xmppd: cannot listen on 127.0.0.1 port 1: Address already in use\n")
    devcluster.fail(node, 0, f"{node.name} ended")


def test_a_port_that_was_taken_meanwhile_is_replaced(tmp_path, monkeypatch, capsys):
    tried = []

    def start(node, timeout):
        tried.append(node.config.read_text())
        if len(tried) == 1:
            refused_by_a_taken_port(node)

    monkeypatch.setattr(devcluster, "start", start)

    up(tmp_path / "cluster")

    assert len(tried) == 2
    assert tried[0] != tried[1]
    assert '"name": "xmppd@node01"' in capsys.readouterr().out


def test_a_port_that_is_always_taken_is_said_in_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(devcluster, "start", lambda node, timeout: refused_by_a_taken_port(node))

    with pytest.raises(devcluster.Refused, match="Address already in use"):
        up(tmp_path / "cluster")


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
