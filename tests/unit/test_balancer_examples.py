"""What lies in etc/balancer is accepted by the programs it is for, where these are installed."""

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import yaml

from xmppd.config import parse

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "etc" / "balancer"
NODES = ("10.0.0.11", "10.0.0.12")


def program(name: str, *, root: bool = False) -> str:
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if found is None:
        pytest.skip(f"{name} is not installed")
    if root and os.geteuid() != 0:
        pytest.skip(f"{name} checks a file for root alone")
    return found


def run(*argv: str | Path, stdin: str | None = None) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*map(str, argv)], input=stdin, capture_output=True, text=True, timeout=60, check=False)


def test_haproxy_accepts_its_file():
    done = run(program("haproxy"), "-c", "-f", FOLDER / "haproxy.cfg")

    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr.lower()


def keepalived(text: str, folder: Path) -> tuple[int, str]:
    """The exit code of a test of this file, and what was complained of."""
    file, log = folder / "keepalived.conf", folder / "log"
    file.write_text(text.replace("/etc/keepalived/check_xmppd", str(FOLDER / "check_xmppd")))
    log.unlink(missing_ok=True)
    done = run(program("keepalived", root=True), f"--config-test={log}", "-f", file)
    return done.returncode, log.read_text() if log.exists() else done.stderr


@pytest.mark.parametrize("kind", ["nat", "dr"])
def test_keepalived_accepts_its_files(kind, tmp_path):
    text = (FOLDER / f"keepalived-{kind}.conf").read_text()

    code, complaints = keepalived(text, tmp_path)
    _, wrong = keepalived(text.replace("misc_path", "misc_pat", 1), tmp_path)

    # Once it has read the file it looks for LVS in the kernel, and ends itself where there is none.
    assert code in ((0,) if Path("/proc/net/ip_vs").exists() else (0, -signal.SIGTERM)), complaints
    assert complaints == ""
    assert "misc_pat" in wrong


@pytest.mark.parametrize("kind", ["nat", "dr"])
def test_keepalived_asks_each_node_about_itself(kind):
    text = (FOLDER / f"keepalived-{kind}.conf").read_text()

    asked = re.findall(r"real_server (\S+) (\d+) \{[^}]*inhibit_on_failure[^}]*check_xmppd (\S+)\"", text)

    assert sorted(asked) == sorted((node, port, node) for node in NODES for port in ("5222", "5223"))
    assert text.count(f"lb_kind {kind.upper()}") == 2


def test_nftables_accepts_its_files():
    nft = program("nft", root=True)
    printed = run(FOLDER / "nft-balancer", "--print", "192.0.2.10", "5222,5223", *NODES)
    one = run(FOLDER / "nft-balancer", "--print", "192.0.2.10", "5222", NODES[0])

    for text in ((FOLDER / "nftables.conf").read_text(), printed.stdout, one.stdout):
        done = run(nft, "-c", "-f", "-", stdin=text)
        assert done.returncode == 0, done.stderr


def test_the_static_table_is_the_one_that_is_kept_up_to_date():
    printed = run(FOLDER / "nft-balancer", "--print", "192.0.2.10", "5222,5223", *NODES)
    static = (FOLDER / "nftables.conf").read_text()

    assert printed.returncode == 0, printed.stderr
    assert "".join(re.sub(r"^#.*\n", "", static, flags=re.MULTILINE).split()) == "".join(printed.stdout.split())


@pytest.mark.parametrize("name", ["check_xmppd", "nft-balancer"])
def test_programs_can_be_executed_and_say_how_they_are_used(name):
    done = run(FOLDER / name)

    assert done.returncode in (1, 2)
    assert f"{name} " in done.stderr


def test_what_the_examples_say_of_the_nodes_is_good_configuration():
    text = (FOLDER / "haproxy.cfg").read_text()
    found = re.search(r"^#   listen:\n#     - (\{.*\})$", text, re.MULTILINE)
    assert found

    config = parse({"listen": [yaml.safe_load(found[1])]}, source="haproxy.cfg")

    assert config.listen[0].use_proxy_protocol
    assert text.count("server node0") == 4
