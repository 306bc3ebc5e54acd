"""Included files, options per host, the effective configuration as text, and reading it all again."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from xmppd.config import Config, ConfigError, dump, load, parse, running
from xmppd.config.yaml_file import read_yaml


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XMPPD_CONFIG", raising=False)
    return tmp_path


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.yml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def faults() -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(Path("main.yml"))
    return caught.value.problems


# -- included files


def test_an_included_file_lies_under_the_one_that_includes_it(folder: Path) -> None:
    write(
        folder,
        main="loglevel: debug\ninclude_config_file: [a.yml, b.yml]\nacl: {x: {user: main}}\n",
        a="loglevel: error\nacl:\n  x: {user: a, server: a.example}\n  y: {user: a}\nhosts: [a.example]\n",
        b="hosts: [b.example]\nacl: {y: {user: b}}\n",
    )

    config = load(Path("main.yml"))

    assert config.loglevel == "debug"
    assert config.hosts == ("b.example",)
    assert (config.acl["x"].user, config.acl["x"].server) == (("main",), ("a.example",))
    assert config.acl["y"].user == ("b",)
    assert config.source_of("loglevel") == "main.yml:1"
    assert config.source_of("hosts") == "b.yml:1"
    assert config.source_of("hosts[0]") == "b.yml:1"
    assert config.source_of("acl.x.server") == "a.yml:3"
    assert config.source_of("acl.x.user") == "main.yml:3"
    assert config.source_of("acl.admin") == "default"


def test_names_are_relative_to_the_file_that_includes(folder: Path) -> None:
    write(folder, main="include_config_file: d/a.yml", d__a="include_config_file: b.yml", d__b="loglevel: error")
    assert load(Path("main.yml")).loglevel == "error"
    assert load(folder / "main.yml").source_of("loglevel") == f"{folder}/d/b.yml:1"


@pytest.mark.parametrize(
    ("limits", "allowed", "refused"),
    [
        ("{allow_only: [acl, loglevel]}", "loglevel", "hosts"),
        ("{disallow: hosts}", "loglevel", "hosts"),
        ("{allow_only: [acl, hosts], disallow: [hosts]}", "acl", "hosts"),
    ],
)
def test_an_included_file_has_only_what_it_may_have(folder: Path, limits: str, allowed: str, refused: str) -> None:
    values = {"loglevel": "error", "hosts": "[a]", "acl": "{}"}
    write(folder, main=f"include_config_file:\n  - a.yml: {limits}\n", a=f"{allowed}: {values[allowed]}\n")
    load(Path("main.yml"))

    write(folder, a=f"{refused}: {values[refused]}\n")

    assert faults() == [f"a.yml: {refused}: main.yml does not let this file have this option"]


def test_limits_hold_for_what_an_included_file_includes(folder: Path) -> None:
    write(
        folder,
        main="include_config_file: {a.yml: {disallow: [hosts]}}",
        a="include_config_file: {b.yml: {allow_only: [hosts, loglevel]}}",
        b="hosts: [x]\nloglevel: error\nacl: {}\n",
    )
    assert faults() == [
        "b.yml: hosts: main.yml does not let this file have this option",
        "b.yml: acl: a.yml does not let this file have this option",
    ]


def test_what_xmppctl_looks_for_stands_in_the_main_file(folder: Path) -> None:
    write(folder, main="include_config_file: a.yml", a="node: a@b\ndata_dir: x\n")
    assert faults() == [
        f"a.yml: {option}: belongs into the main file, where xmppctl looks for it" for option in ("node", "data_dir")
    ]


def test_circles_depth_and_number_have_an_end(folder: Path) -> None:
    write(folder, main="include_config_file: a.yml", a="include_config_file: ./main.yml")
    assert faults() == ["a.yml: include_config_file: ./main.yml includes itself, directly or over others"]

    write(folder, main="include_config_file: n0.yml")
    write(folder, **{f"n{number}": f"include_config_file: n{number + 1}.yml" for number in range(12)}, n12="")
    assert faults() == ["n7.yml: include_config_file: n8.yml: nested deeper than 8 files"]

    write(folder, main=f"include_config_file: [{', '.join(['a.yml'] * 100)}]", a="loglevel: error")
    assert faults() == ["a.yml: include_config_file: more than 64 files"]

    doubling = "include_config_file: [n{0}.yml, n{0}.yml, n{0}.yml, n{0}.yml]"
    write(folder, main=doubling.format(0), **{f"n{number}": doubling.format(number + 1) for number in range(7)}, n7="")
    assert any("more than 64 files" in line for line in faults())


def test_all_that_is_wrong_with_the_files_is_named_with_its_file(folder: Path) -> None:
    write(folder, main="include_config_file: [a.yml, no.yml, b.yml]", a="loglevel: [", b="hosts: [x]\nhosts: [y]\n")
    found = faults()
    assert [line.partition(":")[0] for line in found] == ["a.yml", "no.yml", "b.yml"]
    assert found[1:] == [
        "no.yml: cannot be read: No such file or directory",
        "b.yml: line 2: hosts: given twice, first on line 1",
    ]


def test_faults_in_values_name_the_file_they_stand_in(folder: Path) -> None:
    write(
        folder,
        main="include_config_file: a.yml\nlisten: [{module: c2s, prot: 5}]\nmodules: {}\n",
        a="acl: {x: {user: a@b@c}}\nmodules: {mod_register: {per_address: x}}\naccess_rules: {y: {allow: zz}}\n",
    )
    assert faults() == [
        "main.yml: listen[0].prot: unknown option. Did you mean port?",
        "a.yml: acl.x.user: expected a user such as admin@example.net, got 'a@b@c'",
    ]
    write(folder, main="include_config_file: a.yml", a="access_rules: {y: {allow: zz}}\nmodules: {mod_x: {}}")
    assert faults() == ["a.yml: access_rules.y[0]: there is no acl 'zz'."]
    write(folder, a="modules: {mod_x: {}}")
    assert load(Path("main.yml")).file_of("modules.x.y") == "a.yml"


def test_the_command_line_lies_over_all_files(folder: Path) -> None:
    write(folder, main="include_config_file: a.yml", a="loglevel: error\nhosts: [a]\n")
    config = load(Path("main.yml"), overrides={"loglevel": "debug", "data_dir": "d"}, node="me@x")
    assert (config.loglevel, config.hosts, config.node) == ("debug", ("a",), "me@x")
    assert config.source_of("loglevel") == "override"

    write(folder, a="loglevel: info\nhosts: [b]\n")
    again = config.again()

    assert (again.loglevel, again.hosts, again.node, again.data_dir) == ("debug", ("b",), "me@x", folder / "d")


# -- hosts


def two_hosts(**options: Any) -> Config:
    return parse({"hosts": ["a.example", "b.example"], **options}, source="x.yml")


def test_a_host_may_differ_in_each_of_its_options() -> None:
    config = two_hosts(
        certfiles="/c/all.pem",
        host_config={
            "B.example": {
                "certfiles": ["/c/b.pem"],
                "auth_method": "anonymous",
                "auth_scram": {"hashes": "sha512"},
                "disable_sasl_mechanisms": "plain",
                "resource_conflict": "closenew",
                "acl": {"admin": {"user": "nurse"}},
                "access_rules": {"x": "allow"},
                "shaper_rules": {"y": 5},
            }
        },
    )

    a, b = config.for_host("a.example"), config.for_host("b.example")

    assert (a.certfiles, a.auth_method, a.auth_scram.hashes) == ((Path("/c/all.pem"),), ("sql",), ("sha1", "sha256"))
    assert (a.disable_sasl_mechanisms, a.resource_conflict) == ((), "acceptnew")
    assert (b.certfiles, b.auth_method, b.auth_scram.hashes) == ((Path("/c/b.pem"),), ("anonymous",), ("sha512",))
    assert (b.disable_sasl_mechanisms, b.resource_conflict) == (("PLAIN",), "closenew")
    assert (a.acl["admin"].user, b.acl["admin"].user, b.acl["blocked"].user) == ((), ("nurse",), ())
    assert "x" not in a.access_rules
    assert {"x", "c2s"} <= set(b.access_rules)
    assert "y" not in a.shaper_rules
    assert {"y", "c2s_shaper"} <= set(b.shaper_rules)


def test_what_is_appended_stands_behind_what_holds_for_all() -> None:
    config = two_hosts(
        certfiles="/c/all.pem",
        disable_sasl_mechanisms="plain",
        acl={"staff": {"user": "nurse"}},
        append_host_config={
            "b.example": {
                "certfiles": "/c/b.pem",
                "disable_sasl_mechanisms": ["scram-sha-1", "plain"],
                "acl": {"staff": {"user": "peter", "ip": "192.0.2.1"}},
                "access_rules": {"c2s": {"deny": "staff"}},
            }
        },
    )

    a, b = config.for_host("a.example"), config.for_host("b.example")

    assert b.certfiles == (Path("/c/all.pem"), Path("/c/b.pem"))
    assert b.disable_sasl_mechanisms == ("PLAIN", "SCRAM-SHA-1")
    assert b.acl["staff"].user == ("nurse", "peter")
    assert len(b.acl["staff"].ip) == 1
    assert [rule.value for rule in b.access_rules["c2s"]] == ["deny", "allow", "deny"]
    assert a.acl["staff"].user == ("nurse",)
    assert a.certfiles == (Path("/c/all.pem"),)


def test_after_a_reload_open_listeners_keep_what_they_need(folder: Path) -> None:
    write(folder, main="listen: [{module: c2s, access: mine}]\naccess_rules: {mine: allow}\n")
    old = load(Path("main.yml"))

    write(folder, main="listen: [{module: c2s}]\nhosts: [x]\nhost_config: {x: {resource_conflict: closenew}}")
    mixed, problems = running(old, old.again())

    assert (mixed.hosts, mixed.for_host("localhost").resource_conflict) == (("localhost",), "acceptnew")
    assert problems == [
        "main.yml: listen[0].access: there is no access rule 'mine'."
        " (the listeners that are open need it until the restart)"
    ]


# -- the effective configuration


def test_the_effective_configuration_says_where_each_value_came_from(folder: Path) -> None:
    write(
        folder,
        main="include_config_file: a.yml\nshaper:\n  fast: 5000\n  old: {rate: 1, burst_size: 9}\n"
        "database: {url: 'mysql://u:geheim@h/x'}\nmodules:\n  mod_register: {x: 1}\n",
        a="loglevel: error\nlisten:\n  - module: c2s\n    port: 5555\n",
    )

    text = dump(load(Path("main.yml"), overrides={"shutdown_grace": "1s"}), {"log": {"password": "geheim", "n": 5}})

    def line(start: str) -> str:
        lines = [re.sub(r"\s+#", " #", each.strip(" -")) for each in text.splitlines()]
        return next(each for each in lines if each.startswith(start))

    assert text.startswith("# includes a.yml\n")
    assert line("loglevel") == "loglevel: error # a.yml:1"
    assert line("port: 5555") == "port: 5555 # a.yml:4"
    assert line("max_depth") == "max_depth: 64 # default"
    assert line("shutdown_grace") == "shutdown_grace: 1s # override"
    assert line("url") == 'url: "mysql://u:***@h/x" # main.yml:5'
    assert line('rate: "5000"') == 'rate: "5000" # main.yml:3'
    assert line('burst: "9"') == 'burst: "9" # main.yml:4'
    assert line("password") == 'password: "***" # default'
    assert "geheim" not in text


def test_names_of_tokens_are_shown_and_tokens_are_not() -> None:
    hash = "ab" * 32
    permission = {"who": {"token": "grafana"}, "what": "status"}
    options = {"api_tokens": {"grafana": hash}, "api_permissions": {"a": permission}, "acl": {"token": {"user": "x"}}}

    text = dump(parse(options, source="x.yml"), {"x": {"secret_key": "geheim", "tokens": ["geheim"], "n": "shown"}})

    assert "{token: [grafana]}" in text
    assert "user: [x]" in text
    assert "n: shown" in text
    assert hash not in text
    assert "geheim" not in text


def test_a_token_that_stands_where_its_hash_belongs_is_not_shown() -> None:
    with pytest.raises(ConfigError) as caught:
        parse({"api_tokens": {"grafana": "geheim"}}, source="x.yml")

    assert "api_tokens.grafana: expected the SHA-256 of the token" in str(caught.value)
    assert "geheim" not in str(caught.value)


NAMES = st.text(max_size=6).filter(lambda text: text.isprintable()) | st.sampled_from(["true", "null", "5", "1:2", "~"])


TEXTS = NAMES.filter(bool)
OPTIONS = st.dictionaries(NAMES, NAMES | st.integers(-(10**17), 10**17) | st.none() | st.booleans())


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "loglevel": st.sampled_from(["debug", "none"]),
            "acl": st.dictionaries(NAMES, st.fixed_dictionaries({"resource": st.lists(TEXTS)}), max_size=3),
            "modules": st.dictionaries(st.sampled_from(["x", "y"]), OPTIONS),
            "host_config": st.just({"localhost": {"acl": {"a": {"user": "x"}}, "access_rules": {"c": {"allow": "a"}}}}),
            "append_host_config": st.just({"localhost": {"certfiles": ["/a b", "/ä"]}}),
            "cluster": st.fixed_dictionaries({"hosts": st.dictionaries(NAMES, st.just("h"), max_size=2)}),
        },
    )
)  # fmt: skip
def test_the_effective_configuration_reads_as_the_same_configuration(data: dict[str, Any]) -> None:
    try:
        config = parse(data, source="x.yml")
    except ConfigError:
        return
    text = dump(config)
    try:
        values, _ = read_yaml(text.encode(), source="x.yml")
    except ConfigError as exc:
        # Keys and texts that no file could have had.
        assert re.search("control character|merge keys|may not stand", str(exc))  # noqa: PT017
        return
    assert parse(values, source="x.yml") == config
    assert yaml.safe_load(text).keys() == values.keys()
