# ruff: noqa: E501 -- the table of faults reads best with one on a line
"""The schema of xmppd.yml: defaults, faults and their words, what hangs together, and what a reload would change."""

import gc
import re
import weakref
from dataclasses import dataclass, field, make_dataclass
from ipaddress import ip_network
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xmppd.config import (
    C2SListen,
    Config,
    ConfigError,
    Duration,
    HttpListen,
    OptionalRate,
    Rate,
    Size,
    diff,
    load,
    parse,
    validate_dataclass,
)

ROOT = Path(__file__).parents[2]


def problems(data: Any) -> list[str]:
    """What is wrong with these options, without the file's name in front."""
    with pytest.raises(ConfigError) as caught:
        parse(data, source="x.yml")
    assert all(line.startswith("x.yml: ") for line in caught.value.problems)
    return [line.removeprefix("x.yml: ") for line in caught.value.problems]


def c2s(**options: Any) -> dict[str, Any]:
    return {"listen": [{"module": "c2s", **options}]}


# ------------------------------------------------------------------------------------------------ defaults


def test_nothing_at_all_is_a_whole_configuration() -> None:
    config = parse({}, source="x.yml")

    assert config.node == "xmppd@localhost"
    assert config.hosts == ("localhost",)
    assert config.data_dir == Path.cwd() / "var"
    assert config.database.url == f"sqlite:///{Path.cwd()}/var/xmppd.db"
    assert config.database.commit_interval == 0.01
    assert [(type(one), one.port, one.ip) for one in config.listen] == [
        (C2SListen, 5222, "::"),
        (C2SListen, 5223, "::"),
        (HttpListen, 5280, "127.0.0.1"),
    ]
    assert config.auth_scram.hashes == ("sha1", "sha256")
    assert config.login_limits.per_address == Rate(20, 60)
    assert list(config.modules) == [
        *("roster", "presence", "offline", "disco", "caps", "ping", "version", "time", "last", "private", "vcard")
    ]


def test_the_shipped_file_states_the_defaults() -> None:
    assert load(ROOT / "etc/xmppd.yml") == parse({}, source="x.yml")


def schema_paths(kind: Any = Config, prefix: str = "") -> list[str]:
    """Every option; those of listeners as `listen[].port`, named groups (acl and the like) as one."""
    paths = []
    for name, info in kind.model_fields.items():
        nested = info.default_factory if isinstance(info.default_factory, type) else None
        if name == "listen" and not prefix:
            paths += schema_paths(C2SListen, "listen[].") + schema_paths(HttpListen, "listen[].")
        elif nested is not None:
            paths += schema_paths(nested, f"{prefix}{name}.")
        else:
            paths.append(prefix + name)
    return list(dict.fromkeys(paths))


def test_the_schema_is_walked_to_its_ends() -> None:
    paths = schema_paths()
    assert {"database.pool.max", "login_limits.exempt", "listen[].max_depth", "cluster.hosts", "acl"} <= set(paths)
    assert len(paths) >= 56


@pytest.mark.parametrize("path", schema_paths())
def test_every_option_stands_in_the_shipped_file(path: str) -> None:
    config = load(ROOT / "etc/xmppd.yml")
    candidates = [path.replace("[]", f"[{index}]") for index in range(3)] if "[]" in path else [path]
    assert any(config.source_of(candidate).startswith(str(ROOT / "etc/xmppd.yml:")) for candidate in candidates)


DOCS = (ROOT / "docs/configuration.md").read_text()


@pytest.mark.parametrize("path", schema_paths())
def test_every_option_is_documented(path: str) -> None:
    assert f"| `{path}` |" in DOCS


def test_the_docs_name_no_option_that_does_not_exist() -> None:
    assert set(re.findall(r"^\| `([^`]+)` \|", DOCS, re.MULTILINE)) == set(schema_paths())


def test_the_options_without_effect_are_exactly_those_the_docs_say() -> None:
    rows = re.findall(r"^\| `([^`]+)` \|.*\| ([a-z ]+) \|$", DOCS, re.MULTILINE)
    assert {effect for _, effect in rows} == {"now", "restart"}

    everything = parse(
        {
            "listen": [
                {"module": "c2s", "use_proxy_protocol": True, "trusted_proxies": "10.0.0.0/8"},
                {"module": "http", "port": 8080},
            ],
        },
        source="x.yml",
    ).without_effect()

    assert set(everything) == {path for path, effect in rows if effect == "not yet"}


def test_only_what_somebody_changed_is_warned_about() -> None:
    assert parse({}, source="x.yml").without_effect() == []
    assert load(ROOT / "etc/xmppd.yml").without_effect() == []
    assert parse({"listen": []}, source="x.yml").without_effect() == []


@pytest.mark.parametrize("path", schema_paths())
def test_the_docs_say_what_a_reload_applies(path: str) -> None:
    from xmppd.config.changes import RESTART

    effect = re.search(rf"^\| `{re.escape(path)}` \|.*\| ([a-z ]+) \|$", DOCS, re.MULTILINE)
    assert effect is not None
    top = re.split(r"[.\[]", path)[0]
    assert effect[1] in (("restart", "not yet") if top in RESTART else ("now", "not yet"))


# -------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"hots": []}, "hots: unknown option. Did you mean hosts?"),
        ({"quux": 1}, "quux: unknown option"),
        (c2s(prot=5), "listen[0].prot: unknown option. Did you mean port?"),
        ({"database": {"pool": {"mix": 1}}}, "database.pool.mix: unknown option. Did you mean min?"),
        ({"acl": {"a": {"usr": "x"}}}, "acl.a.usr: unknown option. Did you mean user?"),
        (c2s(port="5222x"), "listen[0].port: expected a number from 0 to 65535, got '5222x'"),
        (c2s(port=65536), "listen[0].port: expected a number from 0 to 65535, got 65536"),
        (c2s(port=True), "listen[0].port: expected a number from 0 to 65535, got true"),
        (c2s(tls="yes"), "listen[0].tls: expected true or false, got 'yes'"),
        (c2s(tls=1), "listen[0].tls: expected true or false, got 1"),
        (c2s(ip="localhost"), "listen[0].ip: expected an address such as 0.0.0.0, 127.0.0.1 or \"::\", got 'localhost'"),
        (c2s(access=5), "listen[0].access: expected text, got 5; put it in quotes"),
        (c2s(max_stanza_size="9KiB"), "listen[0].max_stanza_size: expected a size from 10000 to 8MiB, got '9KiB'"),
        (c2s(negotiation_timeout=0), "listen[0].negotiation_timeout: expected a duration from 100ms to 1h, got 0"),
        ({"listen": [{"port": 1}]}, "listen[0].module: this option is required"),
        ({"listen": [{"module": "ejabberd_c2s"}]}, "listen[0].module: expected one of c2s, http, got 'ejabberd_c2s'"),
        ({"listen": [{"module": "c2z"}]}, "listen[0].module: expected one of c2s, http, got 'c2z'. Did you mean c2s?"),
        ({"listen": {"module": "c2s"}}, "listen: expected a list, got options"),
        ({"listen": [5]}, "listen[0]: expected options (name: value), got 5"),
        ({"listen": None}, "listen: expected a list, got nothing"),
        (
            {"listen": [{"module": "http", "request_handlers": {"/x": "metric"}}]},
            "listen[0].request_handlers./x: expected one of live, ready, metrics, api, got 'metric'. Did you mean metrics?",
        ),
        ({"loglevel": "inof"}, None),
        ({"loglevel": 4}, None),
        ({"resource_conflict": "closed"}, None),
        ({"hosts": []}, "hosts: expected at least one domain to serve"),
        ({"hosts": "localhost"}, "hosts: expected a list, got 'localhost'"),
        ({"hosts": ["Example.net", "example.NET"]}, "hosts[1]: example.net is listed twice"),
        ({"hosts": ["a b"]}, "hosts[0]: expected a domain such as example.net: labels of letters, digits and hyphens, got 'a b'"),
        ({"node": "xmppd"}, "node: expected a node name such as xmppd@node01, got 'xmppd'"),
        ({"data_dir": 5}, "data_dir: expected a path, got 5"),
        ({"auth_method": []}, "auth_method: expected at least 1 entry, got a list"),
        ({"auth_scram": {"hashes": []}}, "auth_scram.hashes: expected at least 1 entry, got a list"),
        ({"auth_scram": {"iterations": 4095}}, "auth_scram.iterations: expected a number from 4096 to 1000000, got 4095"),
        ({"disable_sasl_mechanisms": "scram-sha1"}, "disable_sasl_mechanisms: 'scram-sha1' is no SASL mechanism. Did you mean SCRAM-SHA-1?"),
        ({"login_limits": {"per_account": "often"}}, "login_limits.per_account: expected a rate such as 20/m, 5/s or 100/h, or none, got 'often'"),
        ({"login_limits": {"exempt": ["10.0.0.1/8"]}}, "login_limits.exempt[0]: 10.0.0.1/8 is an address inside a network. Did you mean 10.0.0.0/8?"),
        ({"database": {"url": "postgres://h/x"}}, "database.url: expected a URL that starts with sqlite:// or mysql://, got 'postgres://h/x'"),
        ({"database": {"url": "sqlite:///:memory:"}}, "database.url: expected a file: sqlite:///{data_dir}/xmppd.db, got 'sqlite:///:memory:'"),
        ({"database": {"url": "mysql://h:99999/x"}}, "database.url: the host or the port of this URL is not valid (in a password / is written %2F, @ is %40)"),
        ({"cluster": {"listen": 4369}}, None),
        ({"cluster": {"hosts": {"node02": 5}}}, "cluster.hosts.node02: expected text, got 5; put it in quotes"),
        ({"routing": {"profile": "strict"}}, "routing.profile: expected one of compat, rfc6121, got 'strict'"),
        ({"routing": "compat"}, "routing: expected options (name: value), got 'compat'"),
        ({"acl": {"a": {"user": "a@b@c"}}}, "acl.a.user: expected a user such as admin@example.net, got 'a@b@c'"),
        ({"acl": {"a": {"user_regexp": "("}}}, "acl.a.user_regexp: '(' is no regular expression: missing ), unterminated subpattern at position 0"),
        ({"access_rules": {"a": "maybe"}}, "access_rules.a: expected rules such as [{deny: blocked}, {allow: all}] or [{10: all}], got 'maybe'"),
        ({"shaper": {"fast": {"burst": 5}}}, "shaper.fast.rate: this option is required"),
        ({"modules": ["roster"]}, "modules: expected options (name: value), got a list"),
        ({"modules": {"offline": 5}}, "modules.offline: expected options (name: value), got 5"),
        ({"modules": {"roster": {}, "mod_roster": {}}}, "modules.mod_roster: this is roster, which is listed too; keep one of them"),
        ({"modules": {"../evil": {}}}, "modules.'../evil': expected the name of a module such as roster"),
        # what hangs together
        ({"listen": [{"module": "c2s"}, {"module": "c2s"}]}, "listen[1].port: 5222 is already used by listen[0] on ::"),
        (
            {"listen": [{"module": "c2s", "ip": "127.0.0.1"}, {"module": "http", "ip": "0.0.0.0", "port": 5222}]},
            "listen[1].port: 5222 is already used by listen[0] on 127.0.0.1",
        ),
        (c2s(tls=True, starttls=True), "listen[0].tls: a listener is either tls: true (direct TLS) or starttls: true, not both"),
        (c2s(tls=True, starttls_required=True), "listen[0].tls: a listener is either tls: true (direct TLS) or starttls: true, not both"),
        (c2s(starttls=False, starttls_required=True), "listen[0].starttls_required: needs starttls: true"),
        (c2s(pre_auth_max_stanza_size="1MiB"), "listen[0].pre_auth_max_stanza_size: expected at most max_stanza_size, 256KiB"),
        (c2s(pre_auth_max_elements=20_000), "listen[0].pre_auth_max_elements: expected at most max_elements, 10000"),
        (c2s(max_write_queue="64KiB"), "listen[0].max_write_queue: expected at least max_stanza_size, 256KiB"),
        (c2s(use_proxy_protocol=True), "listen[0].use_proxy_protocol: needs trusted_proxies, the addresses of the proxies that may speak it"),
        (c2s(access="c2z"), "listen[0].access: there is no access rule 'c2z'. Did you mean c2s?"),
        (c2s(shaper="c2s_shapr"), "listen[0].shaper: there is no shaper rule 'c2s_shapr'. Did you mean c2s_shaper?"),
        ({"access_rules": {"c2s": {"deny": "bloked", "allow": "all"}}}, "access_rules.c2s[0]: there is no acl 'bloked'. Did you mean blocked?"),
        (c2s(access="max_user_sessions"), "listen[0].access: the access rule 'max_user_sessions' has other values than allow and deny"),
        (c2s(shaper="max_user_offline_messages"), "listen[0].shaper: the shaper rule 'max_user_offline_messages' has numbers where shapers are expected"),
        ({"access_rules": {"max_user_sessions": "allow"}}, "access_rules.max_user_sessions[0]: expected a number or infinity, got 'allow'"),
        ({"access_rules": {"x": [{"allow": ["admin", "bloked"]}]}}, "access_rules.x[0]: there is no acl 'bloked'. Did you mean blocked?"),
        ({"acl": {"a": {"server": "a b"}}}, "acl.a.server: expected a domain such as example.net, got 'a b'"),
        # one host
        ({"host_config": {"localhost": {"resource_conflct": "closenew"}}}, "host_config.localhost.resource_conflct: unknown option. Did you mean resource_conflict?"),
        ({"host_config": {"localhost": {"listen": []}}}, "host_config.localhost.listen: cannot differ from host to host"),
        ({"host_config": {"localhots": {}}}, "host_config.localhots: localhots is not one of the hosts. Did you mean localhost?"),
        ({"host_config": {"LocalHost": {}, "localhost": {}}}, "host_config.localhost: localhost is listed twice"),
        ({"host_config": {"a b": {}}}, "host_config.a b: expected a domain such as example.net: labels of letters, digits and hyphens"),
        ({"host_config": {"localhost": 5}}, "host_config.localhost: expected options (name: value), got 5"),
        ({"host_config": {"localhost": {"auth_scram": {"iterations": 1}}}}, "host_config.localhost.auth_scram.iterations: expected a number from 4096 to 1000000, got 1"),
        ({"host_config": {"localhost": {"auth_scram": {"hashes": "sha1"}, "disable_sasl_mechanisms": ["PLAIN", "SCRAM-SHA-1", "SCRAM-SHA-1-PLUS"]}}}, "disable_sasl_mechanisms: no mechanism is left with which anybody could log in at localhost"),
        ({"host_config": {"localhost": {"access_rules": {"x": {"allow": "freinds"}}}}}, None),
        ({"listen": [{"module": "c2s"}], "host_config": {"localhost": {"access_rules": {"c2s": 5}}}}, "listen[0].access: the access rule 'c2s' has other values than allow and deny"),
        ({"append_host_config": {"localhost": {"resource_conflict": "closenew"}}}, "append_host_config.localhost.resource_conflict: has one value; set it in host_config"),
        ({"append_host_config": {"localhost": {"shaper_rules": {"x": "fast"}}}}, "append_host_config.localhost.shaper_rules.x[0]: there is no shaper 'fast'."),
        # other files
        ({"include_config_file": 5}, "include_config_file: expected files such as acl.yml, [acl.yml, hosts.yml] or {acl.yml: {allow_only: [acl]}}, got 5"),
        ({"include_config_file": {"a.yml": {"alow_only": []}}}, "include_config_file: alow_only is neither allow_only nor disallow. Did you mean allow_only?"),
        ({"include_config_file": {"a.yml": {"disallow": "lisen"}}}, "include_config_file: there is no option 'lisen'. Did you mean listen?"),
        ({"shaper_rules": {"x": {"nromal": "all"}}}, "shaper_rules.x[0]: there is no shaper 'nromal'. Did you mean normal?"),
        ({"database": {"pool": {"min": 9}}}, "database.pool.min: expected at most pool.max, 8, got 9"),
        ({"auth_scram": {"hashes": "sha1"}, "disable_sasl_mechanisms": ["plain", "scram-sha-1", "scram-sha-1-plus"]}, "disable_sasl_mechanisms: no mechanism is left with which anybody could log in"),
        ({"auth_method": ["sql", "anonymous"], "disable_sasl_mechanisms": ["anonymous"]}, "disable_sasl_mechanisms: no mechanism is left with which anybody could log in"),
    ],
)  # fmt: skip
def test_a_fault_is_named_with_path_value_and_remedy(data: dict[str, Any], words: str | None) -> None:
    found = problems(data)

    assert len(found) == 1
    if words is not None:
        assert found == [words]
    for jargon in ("pydantic", "Input", "input", "validat", "Undefined", "type=", "https", "dict", "tuple", "None"):
        assert jargon not in found[0]


def test_bound_logins_alone_can_be_asked_for() -> None:
    disabled = parse({"disable_sasl_mechanisms": ["plain", "scram-sha-1", "scram-sha-256"]}, source="x.yml")
    assert disabled.disable_sasl_mechanisms == ("PLAIN", "SCRAM-SHA-1", "SCRAM-SHA-256")


def test_all_faults_are_named_at_once() -> None:
    data = {
        "hosts": ["a", "a"],
        "loglevel": "warn",
        "port": 5,
        "database": {"pool": {"timeout": "x"}},
        **c2s(access="x"),
    }
    assert len(problems(data)) == 5


def test_a_password_is_shown_nowhere() -> None:
    secret = "geheim"
    for tail in ("", "/x", "@x", "?x", "#x", ":x", " x"):  # not escaped, so the URL is wrong too
        url = f"://u:{secret}{tail}@h/x"
        for data in (
            {"url": f"mysqll{url}"},
            {"url": f"mysql{url}0\0"},
            {"url": f"sqlite{url}"},
            {"read": [f"x{url}"]},
        ):
            try:
                parse({"database": data}, source="x.yml")
            except ConfigError as exc:
                shown = str(exc)
            assert secret not in shown
    old = parse({"database": {"url": f"mysql://u:{secret}@h/x"}}, source="x.yml")
    new = parse(
        {"database": {"url": f"mysql://u:{secret}2@h/x"}, "modules": {"log": {"password": secret}}}, source="x.yml"
    )
    changes = diff(old, new)

    assert secret in new.database.url
    assert {"database.url", "modules.log.password"} <= {change.path for change in changes}
    assert secret not in repr(old) + repr(new) + repr(changes) + "".join(map(str, changes))


JSONISH = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["all", "c2s", "5s"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.sampled_from(["module", "user"]), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(st.dictionaries(st.sampled_from(sorted(Config.model_fields)) | st.text(max_size=5), JSONISH, max_size=4))
def test_no_data_raises_anything_but_config_error(data: dict[str, Any]) -> None:
    found = []
    try:
        parse(data, source="x.yml")
    except ConfigError as exc:
        found = exc.problems or ["none is named"]
    for line in found:
        assert line.isprintable()
        assert line.startswith("x.yml: ")
        assert not re.search("pydantic|another value|not acceptable", line.partition(", got ")[0])


# -------------------------------------------------------------------------------------- what values become


def test_hosts_are_compared_without_regard_to_case() -> None:
    assert parse({"hosts": ["Example.NET", "MÜLLER.example."]}, source="x").hosts == ("example.net", "müller.example")


def test_port_zero_may_be_listened_on_more_than_once() -> None:
    config = parse({"listen": [{"module": "c2s", "port": 0}, {"module": "http", "port": 0}]}, source="x.yml")
    assert [one.port for one in config.listen] == [0, 0]


def test_direct_tls_turns_starttls_off_and_without_starttls_none_is_required() -> None:
    config = parse(
        {"listen": [{"module": "c2s", "tls": True}, {"module": "c2s", "port": 1, "starttls": False}]}, source="x.yml"
    )
    assert [(one.starttls, one.starttls_required) for one in config.listen if isinstance(one, C2SListen)] == [
        (False, False),
        (False, False),
    ]


def test_names_of_ejabberds_modules_are_understood() -> None:
    config = parse({"modules": {"mod_roster": None, "mod_offline": {"max_messages": 5}}}, source="x.yml")
    assert dict(config.modules) == {"roster": {}, "offline": {"max_messages": 5}}


def test_modules_replace_the_default_list() -> None:
    assert dict(parse({"modules": None}, source="x.yml").modules) == {}


def test_rules_are_read_in_each_of_ejabberds_spellings() -> None:
    lists = parse({"access_rules": {"x": [{"deny": "blocked"}, {"allow": "all"}]}}, source="x.yml")
    mapping = parse({"access_rules": {"x": {"deny": "blocked", "allow": "all"}}}, source="x.yml")
    bare = parse({"access_rules": {"x": [{"deny": "blocked"}, "allow"]}}, source="x.yml")

    assert lists.access_rules["x"] == mapping.access_rules["x"] == bare.access_rules["x"]
    assert [(rule.value, rule.acls) for rule in lists.access_rules["x"]] == [
        ("deny", ("blocked",)),
        ("allow", ("all",)),
    ]
    assert parse({"shaper_rules": {"x": 10}}, source="x").shaper_rules["x"][0].value == 10


def test_a_name_replaces_the_built_in_one_and_leaves_the_others() -> None:
    config = parse({"acl": {"admin": {"user": "juliet@example.net"}}, "shaper": {"fast": "1MiB"}}, source="x.yml")
    assert config.acl["admin"].user == ("juliet@example.net",)
    assert config.acl["blocked"].user == ()
    assert (config.shaper["fast"].rate, config.shaper["fast"].burst) == (1 << 20, 1 << 20)
    assert config.shaper["normal"].burst == 256 << 10


def test_one_value_may_stand_for_a_list() -> None:
    config = parse(
        {"auth_method": "sql", "certfiles": "/x/*.pem", "login_limits": {"exempt": "10.0.0.0/8"}}, source="x"
    )
    assert config.auth_method == ("sql",)
    assert config.certfiles == (Path("/x/*.pem"),)
    assert config.login_limits.exempt == (ip_network("10.0.0.0/8"),)


def test_a_host_has_the_options_that_may_differ_by_host() -> None:
    config = parse({"hosts": ["a.example"], "disable_sasl_mechanisms": "plain"}, source="x.yml")
    host = config.for_host("a.example")
    assert host.disable_sasl_mechanisms == ("PLAIN",)
    assert (host.auth_method, host.resource_conflict) == (("sql",), "acceptnew")
    with pytest.raises(KeyError):
        config.for_host("b.example")


def test_a_configuration_cannot_be_changed() -> None:
    config = parse({}, source="x.yml")
    for group, name in ((config, "hosts"), (config.database, "url"), (config.listen[0], "port")):
        with pytest.raises(ValueError, match="frozen"):
            setattr(group, name, None)
    with pytest.raises(TypeError):
        config.modules["roster"] = {}  # type: ignore[index]


def test_what_is_written_out_reads_as_the_same_configuration() -> None:
    config = load(ROOT / "etc/xmppd.yml", overrides={"shaper": {"x": 77}, "cluster": {"hosts": {"a": "192.0.2.1"}}})
    assert parse(config.model_dump(mode="json"), source="x.yml") == config


# ---------------------------------------------------------------------------------------- files and search


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XMPPD_CONFIG", raising=False)
    monkeypatch.setattr("xmppd.config.loader.SEARCH", (Path("etc/xmppd.yml"), tmp_path / "system.yml"))
    return tmp_path


def test_the_first_file_of_the_search_order_is_read(empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load().source == "built-in defaults"
    assert load().path is None

    (empty_folder / "system.yml").write_text("node: system@x")
    assert load().node == "system@x"

    (empty_folder / "etc").mkdir()
    (empty_folder / "etc/xmppd.yml").write_text("node: here@x")
    assert load().node == "here@x"
    assert load().source == "etc/xmppd.yml"

    (empty_folder / "env.yml").write_text("node: env@x")
    monkeypatch.setenv("XMPPD_CONFIG", "env.yml")
    assert load().node == "env@x"

    (empty_folder / "given.yml").write_text("node: given@x")
    assert load(Path("given.yml")).node == "given@x"


def test_a_file_that_was_asked_for_must_be_there(empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"no\.yml: cannot be read: No such file or directory"):
        load(Path("no.yml"))
    monkeypatch.setenv("XMPPD_CONFIG", str(empty_folder))
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load()


def test_a_dangling_link_is_not_passed_over(empty_folder: Path) -> None:
    (empty_folder / "system.yml").symlink_to("nowhere")
    with pytest.raises(ConfigError, match="cannot be read"):
        load()


def test_overrides_lie_over_the_file_and_the_node_name_over_both(empty_folder: Path) -> None:
    (empty_folder / "x.yml").write_text("node: a@x\ndatabase:\n  pool: {min: 2, max: 4}\nhosts: [a, b]\n")
    overrides = {"database": {"pool": {"max": 6}}, "hosts": ["c"], "data_dir": empty_folder / "d", "node": "b@x"}

    config = load(Path("x.yml"), overrides=overrides, node="c@x")

    assert (config.node, config.hosts, config.data_dir) == ("c@x", ("c",), empty_folder / "d")
    assert (config.database.pool.min, config.database.pool.max) == (2, 6)


def test_every_value_can_say_where_it_came_from(empty_folder: Path) -> None:
    (empty_folder / "x.yml").write_text("hosts: [a]\ndatabase:\n  pool: {max: 4}\nmodules:\n  mod_ping: {x: 1}\n")

    config = load(Path("x.yml"), overrides={"loglevel": "debug"})

    assert config.source_of("hosts") == "x.yml:1"
    assert config.source_of("database.pool.max") == "x.yml:3"
    assert config.source_of("modules.ping.x") == "x.yml:5"
    assert config.source_of("loglevel") == "override"
    assert config.source_of("database.pool.min") == "default"


# --------------------------------------------------------------------------------------- options of modules


@dataclass(frozen=True, slots=True)
class Inner:
    url: str
    headers: tuple[str, ...] = ()


ONE_A_MINUTE = Rate(1, 60)


@dataclass(frozen=True, slots=True)
class Options:
    max_messages: int = 100
    kind: Literal["plain", "fancy"] = "plain"
    timeout: Duration = 30.0
    size: Size = 1024
    limit: Rate = ONE_A_MINUTE
    ceiling: OptionalRate = None
    ratio: float = 0.5
    inner: Inner | None = None
    either: int | bool = 1
    words: tuple[str, ...] = ()
    ports: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_messages == 13:
            raise ValueError("13 brings bad luck")


def test_options_of_a_module_become_its_dataclass() -> None:
    given = {
        "timeout": "5m",
        "size": "1KiB",
        "limit": "3/s",
        "ceiling": "9/h",
        "ratio": 1,
        "inner": {"url": "u", "headers": ["a"]},
    }

    options = validate_dataclass(Options, given, "modules.x")

    assert options == Options(
        timeout=300.0, size=1024, limit=Rate(3, 1), ceiling=Rate(9, 3600), ratio=1.0, inner=Inner("u", ("a",))
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_mesages": 5}, "max_mesages: unknown option. Did you mean max_messages?"),
        ({"max_messages": "5"}, "max_messages: expected a whole number, got '5'"),
        ({"max_messages": True}, "max_messages: expected a whole number, got true"),
        ({"max_messages": 1.5}, "max_messages: expected a whole number, got 1.5"),
        ({"kind": "fanci"}, "kind: expected one of plain, fancy, got 'fanci'. Did you mean fancy?"),
        ({"timeout": "soon"}, "timeout: expected a duration such as 30s, 5m, 2h, 1d or 100ms, got 'soon'"),
        ({"limit": 5}, "limit: expected a rate such as 20/m, 5/s or 100/h, got 5"),
        ({"ratio": "x"}, "ratio: expected a number, got 'x'"),
        ({"inner": {}}, "inner.url: this option is required"),
        ({"inner": {"url": "u", "header": []}}, "inner.header: unknown option. Did you mean headers?"),
        ({"inner": 5}, "inner: expected options (name: value), got 5"),
        ({"either": "x"}, "either: expected a whole number or true or false, got 'x'"),
        ({"words": "one"}, "words: expected a list, got 'one'"),
        ({"words": [1]}, "words[0]: expected text, got 1; put it in quotes"),
        ({"ports": {"a": "b"}}, "ports.a: expected a whole number, got 'b'"),
        ({"inner": {"url": 5, "headers": 5}}, None),
    ],
)
def test_faults_in_a_modules_options_speak_the_same_way(options: dict[str, Any], words: str | None) -> None:
    with pytest.raises(ConfigError) as caught:
        validate_dataclass(Options, options, "modules.x", source="x.yml")
    if words is None:
        assert len(caught.value.problems) == 2
    else:
        assert caught.value.problems == [f"x.yml: modules.x.{words}"]


def test_a_module_may_refuse_its_options_in_its_own_words() -> None:
    with pytest.raises(ConfigError, match=r"^x\.yml: modules\.x: 13 brings bad luck$"):
        validate_dataclass(Options, {"max_messages": 13}, "modules.x", source="x.yml")


def test_a_configuration_knows_the_file_its_modules_options_came_from() -> None:
    config = parse({"modules": {"mod_x": {"max_mesages": 1}}}, source="etc/xmppd.yml")
    with pytest.raises(ConfigError, match=r"^etc/xmppd\.yml: modules\.x\.max_mesages: unknown option\. Did you mean"):
        config.module_options("x", Options)


def test_a_module_that_was_reloaded_leaves_no_class_behind() -> None:
    def validate_once() -> weakref.ref[type]:
        kind = make_dataclass("Config", [("depth", int, 5)], frozen=True)
        assert validate_dataclass(kind, {"depth": 6}, "modules.x").depth == 6
        return weakref.ref(kind)

    left = [validate_once() for _ in range(10)]
    gc.collect()
    assert [reference() for reference in left] == [None] * 10


def test_an_option_may_have_a_name_that_python_has_taken():
    @dataclass(frozen=True)
    class Options:
        from_: str = "bare"

    assert validate_dataclass(Options, {"from": "full"}, "modules.x").from_ == "full"
    for wrong in ("from_", "form"):
        with pytest.raises(ConfigError, match=rf"modules\.x\.{wrong}: unknown option. Did you mean from\?"):
            validate_dataclass(Options, {wrong: "full"}, "modules.x")


# -------------------------------------------------------------------------------------------------- reload


def test_a_reload_says_what_changes_and_what_needs_a_restart() -> None:
    old = parse({"loglevel": "info", "modules": {"ping": {"interval": 5}, "time": {}}}, source="x.yml")
    new = parse(
        {
            "loglevel": "debug",
            "hosts": ["a", "b"],
            "listen": [{"module": "c2s", "max_depth": 32}],
            "database": {"pool": {"timeout": "9s"}},
            "modules": {"ping": {"interval": 6}, "vcard": {}},
        },
        source="x.yml",
    )

    found = {change.path: (change.old, change.new, change.applies) for change in diff(old, new)}

    assert found["loglevel"] == ("info", "debug", "now")
    assert found["hosts"] == (["localhost"], ["a", "b"], "restart")
    assert found["listen[0].max_depth"] == (64, 32, "restart")
    assert found["listen[1].port"] == (5223, None, "restart")
    assert found["database.pool.timeout"] == ("5s", "9s", "restart")
    assert found["modules.ping.interval"] == (5, 6, "now")
    assert found["modules.time"] == ({}, None, "now")
    assert found["modules.vcard"] == (None, {}, "now")
    assert "listen[0].port" not in found


def test_the_same_configuration_has_no_changes() -> None:
    assert diff(load(ROOT / "etc/xmppd.yml"), parse({}, source="x.yml")) == []


def test_replicas_are_urls_or_have_a_weight() -> None:
    read = ["mysql://u:p@db2/x", {"url": "mysql://u:p@db3:3307/x", "weight": 3}]

    database = parse({"database": {"url": "mysql://u:p@db1,db4:3307/x", "read": read}}, source="x").database

    assert [(server.url, server.weight) for server in database.read] == [
        ("mysql://u:p@db2/x", 1),
        ("mysql://u:p@db3:3307/x", 3),
    ]
    assert "u:p" not in repr(database)


@pytest.mark.parametrize(
    ("database", "problem"),
    [
        ({"read": "mysql://h/x"}, "database.read: replicas are of MySQL or MariaDB"),
        ({"url": "mysql://h/x", "read": "sqlite:///x"}, "database.read[0].url: expected a URL that starts with mysql"),
        ({"url": "mysql://h/x", "read": "mysql://a,b/x"}, "database.read[0].url: expected one host"),
        ({"url": "mysql://h/x", "read": {"url": "mysql://a/x", "weight": 0}}, "database.read.weight: expected"),
        ({"url": "mysql://a,b:0/x"}, "database.url: expected mysql://"),
        ({"url": "mysql://h/x", "hint": "master"}, "database.hint: expected a comment"),
        ({"url": "mysql://h/x", "hint": "/*! DROP */"}, "database.hint: expected a comment"),
    ],
)
def test_what_database_servers_cannot_be_is_named(database: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(problem)):
        parse({"database": database}, source="x")
