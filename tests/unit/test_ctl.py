"""xmppctl without a node: options, where it looks for the node, the lines of a batch, what starting it loads."""

import subprocess
import sys
from pathlib import Path

import pytest

import xmppd
from xmppd.ctl.batch import words
from xmppd.ctl.main import Options, main
from xmppd.ctl.settings import Settings, assignments, top_level
from xmppd.errors import CommandError

ROOT = Path(xmppd.__file__).absolute().parents[1]


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    """No settings of whoever runs the tests."""
    for name in ("NODE", "CONFIG", "DATA_DIR", "CTL_CONFIG", "LOG", "START_TIMEOUT"):
        monkeypatch.delenv(f"XMPPD_{name}", raising=False)
    monkeypatch.chdir(tmp_path)


def test_options_stand_before_the_command_and_the_rest_is_its_own():
    options = Options(["--json", "-n", "a@b", "--config=x.yml", "send_message", "chat", "--json", "-n"])
    assert options.flags == {"json"}
    assert options.values == {"node": "a@b", "config": "x.yml"}
    assert options.argv == ["send_message", "chat", "--json", "-n"]
    assert Options(["--", "--odd"]).argv == ["--odd"]
    assert Options(["-f", "a", "-f", "b", "x"]).values == {"config": "b"}


@pytest.mark.parametrize("argv", [["--jason", "x"], ["--json=1", "x"], ["--node"], ["--node=", "x"], ["-x"]])
def test_a_wrong_option_is_wrong_usage(argv, capfd):
    assert main(argv) == 2
    assert capfd.readouterr().out.startswith("Error: ")


def test_help_is_there_without_a_node_and_no_command_is_wrong_usage(capfd):
    assert main(["--help"]) == 0
    assert main(["help"]) == 0
    assert main([]) == 2
    assert capfd.readouterr().out.count("Usage: xmppctl") == 3


def test_the_flag_wins_over_the_environment_over_the_file_over_the_default(tmp_path, monkeypatch):
    assert (Settings().node, Settings().data_dir) == ("xmppd@localhost", str(tmp_path / "var"))
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "xmppd.yml").write_text("node: yaml@h\ndata_dir: yaml\n")
    assert (Settings().node, Settings().data_dir) == ("yaml@h", str(tmp_path / "yaml"))
    assert Settings().given_node is None
    (tmp_path / "etc" / "xmppctl.cfg").write_text("XMPPD_NODE=file@h\nXMPPD_DATA_DIR=file\n")
    assert (Settings().node, Settings().data_dir) == ("file@h", str(tmp_path / "file"))
    monkeypatch.setenv("XMPPD_NODE", "env@h")
    monkeypatch.setenv("XMPPD_DATA_DIR", "env")
    assert (Settings().node, Settings().data_dir) == ("env@h", str(tmp_path / "env"))
    flags = Settings(node="flag@h", data_dir="flag")
    assert (flags.node, flags.data_dir, flags.socket) == (
        "flag@h",
        str(tmp_path / "flag"),
        f"{tmp_path}/flag/xmppd.sock",
    )


def test_the_configuration_is_found_in_the_same_order(tmp_path, monkeypatch):
    (tmp_path / "ctl.cfg").write_text("XMPPD_CONFIG=file.yml\n")
    (tmp_path / "file.yml").write_text("data_dir: from-file\n")
    (tmp_path / "env.yml").write_text("data_dir: from-env\n")
    (tmp_path / "flag.yml").write_text("data_dir: /from/flag\n")
    assert Settings(ctl_config="ctl.cfg").data_dir == str(tmp_path / "from-file")
    monkeypatch.setenv("XMPPD_CONFIG", "env.yml")
    assert Settings(ctl_config="ctl.cfg").data_dir == str(tmp_path / "from-env")
    assert Settings(ctl_config="ctl.cfg", config="flag.yml").data_dir == "/from/flag"


def test_a_file_that_was_named_must_be_there(capfd):
    assert main(["--config", "missing.yml", "status"]) == 2
    assert main(["--ctl-config", "missing.cfg", "status"]) == 2
    assert capfd.readouterr().out.count("cannot read missing.") == 2


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("A=b", "b"),
        ("A=", ""),
        ("export A=b", "b"),
        ("  A=b  # why", "b"),
        ("A='b c'", "b c"),
        ('A="b # c"', "b # c"),
        ("A=b\\ c", "b c"),
        ("A='$b'", "$b"),
    ],
)
def test_xmppctl_cfg_is_read_as_the_shell_reads_it(tmp_path, line, value):
    (tmp_path / "c").write_text(f"# a comment\n\n{line}\n")
    assert assignments(str(tmp_path / "c")) == {"A": value}


@pytest.mark.parametrize("line", ["A", "A B=c", "A = b", "A=b c", "A='b", "A=$B", "A=`b`", 'A="$B"', "if true; then"])
def test_a_line_that_assigns_nothing_is_named(tmp_path, line):
    (tmp_path / "c").write_text(f"B=c\n{line}\n")
    with pytest.raises(CommandError, match=": line 2: ") as caught:
        assignments(str(tmp_path / "c"))
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("data_dir: /var/lib/xmppd", "/var/lib/xmppd"),
        ("data_dir:   var   # the data", "var"),
        ("data_dir: 'my data'  # quoted", "my data"),
        ('"data_dir": "a#b"', "a#b"),
        ("data_dir: a#b", "a#b"),
        ("modules:\n  data_dir: inner\ndata_dir: outer", "outer"),
        ("# data_dir: x\ndata_dirs: y\n", None),
        ("modules: {data_dir: inner}", None),
        ("data_dir:x", None),
    ],
)
def test_the_data_folder_is_found_in_yaml_without_a_yaml_parser(tmp_path, text, value):
    yaml = pytest.importorskip("yaml")
    (tmp_path / "c").write_text(text)
    assert top_level(str(tmp_path / "c"), ("data_dir",)).get("data_dir") == value
    parsed = yaml.safe_load(text)
    assert (parsed.get("data_dir") if isinstance(parsed, dict) else None) == value


@pytest.mark.parametrize(
    "text",
    [
        "data_dir: &x var",
        "data_dir: |\n  var",
        "data_dir:\n  var",
        'data_dir: "a\\tb"',
        "{data_dir: var}",
        "data_dir: 'a",
    ],
)
def test_a_spelling_that_takes_a_yaml_parser_is_refused_with_the_remedy(tmp_path, text):
    (tmp_path / "c").write_text(text)
    with pytest.raises(CommandError, match=r"line 1: write `data_dir: VALUE` on one line"):
        top_level(str(tmp_path / "c"), ("data_dir",))


def test_a_batch_line_is_split_as_the_shell_splits_it():
    assert words(b"register juliet localhost 'a b'\n", 1) == ["register", "juliet", "localhost", "a b"]
    assert words(b'send_message chat a b "" "it\'s # here"\n', 1)[-2:] == ["", "it's # here"]
    assert words(b"  \n", 1) == words(b"# register\n", 1) == []
    for line in (b"register 'a\n", b"\xff\n", b"start\n", b"batch\n"):
        with pytest.raises(CommandError, match="line 7: ") as caught:
            words(line, 7)
        assert caught.value.code == 2


def test_the_common_path_loads_little():
    code = "import sys, xmppd.ctl.main; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = loaded.stdout.split()
    dear = {
        "argparse",
        "asyncio",
        "dataclasses",
        "inspect",
        "logging",
        "pathlib",
        "shlex",
        "subprocess",
        "yaml",
        "lxml",
    }
    assert not dear & set(loaded)
    ours = {name for name in loaded if name.startswith("xmppd")}
    assert ours == {"xmppd", "xmppd.ctl", "xmppd.ctl.client", "xmppd.ctl.main", "xmppd.ctl.settings", "xmppd.errors"}
