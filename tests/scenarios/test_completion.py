"""etc/xmppctl.bash-completion in a real bash and zsh; a node serves the registry (tests/golden/small_node.py)."""

import os
import pty
import re
import select
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILE = ROOT / "etc" / "xmppctl.bash-completion"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    """A data folder that a running node serves."""
    folder = tmp_path_factory.mktemp("node")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "golden" / "small_node.py"), str(folder)], env=environment
    )
    try:
        deadline = time.monotonic() + 20
        while not (folder / "xmppd.sock").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield folder
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def program(tmp_path):
    """`xmppctl` on the PATH; each run leaves a line in `calls`."""
    calls = tmp_path / "calls"
    script = tmp_path / "bin" / "xmppctl"
    script.parent.mkdir()
    argv = f"PYTHONPATH={shlex.quote(str(ROOT))} exec {shlex.quote(sys.executable)} -m xmppd.ctl"
    script.write_text(f'#!/bin/sh\necho "$*" >>{shlex.quote(str(calls))}\n{argv} "$@"\n')
    script.chmod(0o755)
    return script


def complete(program: Path, *lines: list[str], before: str = "") -> list[list[str]]:
    """What bash would offer for the last word of each line, one line after the other in one shell."""
    text = f"source {shlex.quote(str(FILE))}\n{before}\n"
    for words in lines:
        text += f"COMP_WORDS=({shlex.join(words)}) COMP_CWORD={len(words) - 1}\n_xmppctl\n"
        text += 'printf "%s " "${COMPREPLY[@]}"; echo\n'
    environment = os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "--norc", "-u", "-c", text],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=program.parent,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return [line.split() for line in done.stdout.splitlines()]


def test_commands_arguments_and_options_are_completed(node, program):
    at = ["xmppctl", "--data-dir", str(node)]

    offered = complete(
        program,
        [*at, "registered_"],
        [*at, "st"],
        [*at, "module", ""],
        [*at, "module", "unload", "p"],
        [*at, "register", "juliet", ""],
        [*at, "register", "juliet", "localhost", ""],
        [*at, "set_loglevel", "e"],
        [*at, "stats_host", "o"],
        [*at, "help", "acc"],
        [*at, "no_such_command", ""],
        ["xmppctl", "--js"],
    )

    assert sorted(offered[0]) == ["registered_users", "registered_vhosts"]
    assert sorted(offered[1]) == ["start", "started", "stats", "stats_host", "status", "stop", "stopped"]
    assert {"list", "load", "reload", "unload"} <= set(offered[2])
    assert offered[3] == ["ping"]
    assert "localhost" in offered[4]
    assert offered[5] == []
    assert sorted(offered[6]) == ["emergency", "error"]
    assert offered[7] == ["onlineusers"]
    assert offered[8] == ["accounts"]
    assert offered[9] == []
    assert offered[10] == ["--json"]


def test_the_node_is_asked_for_its_commands_once(node, program):
    at = ["xmppctl", "--data-dir", str(node)]

    complete(program, [*at, "reg"], [*at, "mod"], [*at, "module", "l"])

    assert (program.parents[1] / "calls").read_text().splitlines() == [f"--data-dir {node} help usage"]


def test_bash_takes_an_option_with_its_value_for_three_words(node, program):
    assert complete(program, ["xmppctl", "--data-dir", "=", str(node), "module", "un"]) == [["unload"]]


def test_an_alias_is_asked_as_it_stands(node, program):
    alias = f"alias xmppctl={shlex.quote(f'{shlex.quote(str(program))} --data-dir {shlex.quote(str(node))}')}"

    assert complete(program, ["xmppctl", "check_acc"], before=alias) == [["check_account"]]


def test_without_a_node_only_what_needs_none_is_offered(tmp_path, program):
    assert complete(program, ["xmppctl", "--data-dir", str(tmp_path), ""]) == [["start", "started", "stopped", "batch"]]


def test_files_are_offered_where_an_option_wants_one(program):
    (program.parent / "my.yml").touch()

    assert complete(program, ["xmppctl", "--config", "my"], ["xmppctl", "--node", "x"]) == [["my.yml"], []]


def test_bash_itself_knows_the_function(program):
    shown = subprocess.run(
        ["bash", "--norc", "-c", f"source {shlex.quote(str(FILE))}; complete -p xmppctl"],
        capture_output=True,
        text=True,
    )
    assert shown.stdout.strip() == "complete -F _xmppctl xmppctl"


@pytest.fixture
def zsh(program):
    """A zsh at a terminal that has sourced the file; ended with the test."""
    main, side = pty.openpty()
    environment = os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}", "TERM": "dumb", "COLUMNS": "500"}
    terminal = {"stdin": side, "stdout": side, "stderr": side, "start_new_session": True}
    process = subprocess.Popen(["zsh", "-f", "-i"], env=environment, cwd=program.parent, **terminal)
    os.close(side)

    def ask(keys: str) -> str:
        """What is printed between two marks for the line that these keys make."""
        # The marks are put together by the shell, so that their echo while they are typed is not taken for them.
        os.write(main, f"{keys}\x01print -r -- '<''<\x05>''>'\n".encode())
        seen = b""
        while (found := re.search(rb"\n<<(.*?)>>\r", seen, re.DOTALL)) is None:
            assert select.select([main], [], [], 20)[0], seen.decode()
            seen += os.read(main, 65536)
        assert b"_xmppctl:" not in seen, seen.decode()  # how zsh begins what it does not understand
        return found[1].decode()

    try:
        start = "stty columns 500; autoload -U compinit bashcompinit; compinit -u -D; bashcompinit"
        os.write(main, f"{start}; source {shlex.quote(str(FILE))}\n".encode())
        assert ask("ready") == "ready"
        yield ask
    finally:
        process.kill()
        process.wait()
        os.close(main)


@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
def test_zsh_completes_as_bash_does(node, program, zsh):
    (program.parent / "my.yml").touch()
    at = f"xmppctl --data-dir {node}"

    def typed(line: str) -> str:
        return zsh(f"{line}\t").rstrip()

    assert typed(f"{at} check_acc") == f"{at} check_account"
    assert typed(f"{at} module unload p") == f"{at} module unload ping"
    assert typed(f"{at} stats_host o") == f"{at} stats_host onlineusers"
    assert typed(f"{at} help acc") == f"{at} help accounts"
    assert typed(f"{at} registered_") == f"{at} registered_"  # there are two
    assert typed(f'xmppctl --data-dir="{node}" register juliet local') == (
        f'xmppctl --data-dir="{node}" register juliet localhost'
    )
    assert typed("xmppctl --js") == "xmppctl --json"
    assert typed("xmppctl --config my") == "xmppctl --config my.yml"
    assert typed("xmppctl --config=my") == "xmppctl --config=my.yml"
