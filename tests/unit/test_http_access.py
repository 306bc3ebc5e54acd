"""Who may call what over HTTP: api_permissions, patterns, the limit on failures."""

import json
from ipaddress import ip_address
from types import SimpleNamespace

import pytest
from multidict import CIMultiDict

from xmppd import config as configuration
from xmppd.access import Access as Rules
from xmppd.access import AccessRules
from xmppd.admin.api_tokens import Token, digest_of
from xmppd.admin.registry import Arg, Command, Registry
from xmppd.admin.results import List, Rescode, Restuple, Result, Tuple, integer, string
from xmppd.config.api import covers
from xmppd.errors import ConfigError, StorageUnavailable
from xmppd.http.access import ADDRESSES, Access, Client, FailureLimit
from xmppd.http.answers import Refused
from xmppd.http.openapi import describe, shape_schema


@pytest.mark.parametrize(
    ("what", "covered", "not_covered"),
    [
        (("*",), ["stats", "module list", "stop"], ["api_token create"]),
        (("stats",), ["stats"], ["stats_host", "stop"]),
        (("stats*",), ["stats", "stats_host"], ["status"]),
        (("module_list",), ["module list"], ["module load"]),
        (("module list",), ["module list"], ["module load"]),
        (("module *", "!module_load"), ["module list"], ["module load", "stats"]),
        (("[tag:server]",), ["stop"], ["stats", "api_token create"]),
        (("!stop", "*"), ["stats"], ["stop"]),
        (("*", "![tag:server]"), ["stats"], ["stop"]),
        (("!stop",), [], ["stop", "stats"]),
        (("[tag:api]", "api_token*"), [], ["api_token create"]),
        (("api_token_create",), ["api_token create"], ["stats"]),
        (("api_token create", "![tag:api]"), [], ["api_token create"]),
    ],
)
def test_what_covers_commands(what, covered, not_covered):
    tags = {"stop": ("server",), "api_token create": ("api",)}

    assert all(covers(what, name, tags.get(name, ())) for name in covered)
    assert not any(covers(what, name, tags.get(name, ())) for name in not_covered)


STATS = Command("stats", (), Rescode(), "")


def access(**options):
    config = configuration.parse(options, source="x.yml")
    return Access(lambda: config, Rules(AccessRules(config)), Tokens(), clock=lambda: 0.0)


class Tokens:
    """One token, `grafana`, whose secret is `good`."""

    away = False

    async def find(self, secret):
        if self.away:
            raise StorageUnavailable("away")
        return Token("grafana", digest_of("good")) if secret == "good" else None


def permissions(who):
    return {"api_permissions": {"one": {"who": who, "what": "stats"}}, "acl": {"inner": {"ip": "10.0.0.0/8"}}}


HERE, INSIDE, OUTSIDE = ip_address("127.0.0.1"), ip_address("10.1.2.3"), ip_address("192.0.2.1")


@pytest.mark.parametrize(
    ("who", "allowed", "refused"),
    [
        ("all", [Client(OUTSIDE), Client(None)], []),
        ("none", [], [Client(HERE), Client(HERE, "grafana")]),
        ("loopback", [Client(HERE), Client(ip_address("::1"))], [Client(INSIDE), Client(None)]),
        ("inner", [Client(INSIDE)], [Client(HERE), Client(OUTSIDE), Client(None)]),
        ({"ip": "192.0.2.0/24"}, [Client(OUTSIDE)], [Client(HERE), Client(None)]),
        ({"token": "grafana"}, [Client(None, "grafana")], [Client(HERE), Client(HERE, "other")]),
        ({"token": "grafana", "acl": "inner"}, [Client(INSIDE, "grafana")], [Client(INSIDE), Client(HERE, "grafana")]),
        ({"observer": "grafana"}, [], [Client(HERE), Client(HERE, "grafana"), Client(None)]),
        ({"observer": "x", "acl": "all"}, [], [Client(HERE), Client(HERE, "x")]),
        (["loopback", {"token": ["a", "b"]}], [Client(HERE), Client(OUTSIDE, "b")], [Client(OUTSIDE, "c")]),
    ],
)
def test_who_is_matched_by_everything_it_gives(who, allowed, refused):
    rules = access(**permissions(who))

    assert all(rules.may(client, STATS) for client in allowed)
    assert not any(rules.may(client, STATS) for client in refused)


def test_nobody_may_anything_by_default():
    assert not access().may(Client(HERE, "grafana"), STATS)
    assert not access().may_anything(Client(HERE))


def test_a_token_may_what_it_was_made_with():
    assert access().may(Client(OUTSIDE, "deploy", ("stats",)), STATS)
    assert not access().may(Client(OUTSIDE, "deploy", ("stop",)), STATS)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"api_permissions": {"a": {"who": "lopback", "what": "*"}}}, "Did you mean loopback?"),
        ({"api_permissions": {"a": {"what": "*"}}}, "api_permissions.a.who: this option is required"),
        ({"api_permissions": {"a": {"who": "all"}}}, "api_permissions.a.what: this option is required"),
        ({"api_permissions": {"a": {"who": "all", "what": []}}}, "expected at least 1 entry"),
        ({"api_permissions": {"a": {"who": {"token": []}, "what": "*"}}}, "an empty list of tokens"),
        ({"api_permissions": {"a": {"who": "all", "what": "Stats!"}}}, "expected a command, a pattern"),
        (
            {"api_permissions": {"a": {"who": "all", "what": "*", "from": "ctl"}}},
            "expected one of http, observer, got 'ctl'",
        ),
        ({"api_tokens": {"grafana": "abc"}}, "expected the SHA-256 of the token, 64 hexadecimal digits"),
    ],
)
def test_a_wrong_permission_is_named(options, words):
    with pytest.raises(ConfigError) as caught:
        configuration.parse(options, source="x.yml")

    assert words in str(caught.value)


def test_ejabberds_name_of_the_api_is_understood_and_the_dump_reads_back():
    options = {"api_permissions": {"a": {"from": "mod_http_api", "who": {"ip": "10.0.0.0/8"}, "what": "*"}}}

    config = configuration.parse(options | {"api_tokens": {"t": "sha256:" + "Ab" * 32}}, source="x.yml")

    assert configuration.parse(config.model_dump(mode="json"), source="x.yml") == config
    assert config.api_tokens["t"] == bytes.fromhex("ab" * 32)


def request(*authorization, remote="192.0.2.1", **headers):
    found = CIMultiDict(headers)
    for value in authorization:
        found.add("Authorization", value)
    return SimpleNamespace(remote=remote, headers=found)


async def test_a_client_is_its_address_or_its_token():
    rules = access()

    assert await rules.identify(request()) == Client(OUTSIDE)
    assert await rules.identify(request("bearer good")) == Client(OUTSIDE, "grafana")
    assert await rules.identify(request(remote="::ffff:10.1.2.3")) == Client(INSIDE)
    assert await rules.identify(request(remote="fe80::1%eth0")) == Client(ip_address("fe80::1"))


@pytest.mark.parametrize("name", ["Forwarded", "X-Forwarded-For", "x-real-ip", "Via"])
async def test_what_came_through_a_proxy_has_no_address(name):
    client = await access().identify(request(remote="127.0.0.1", **{name: "127.0.0.1"}))

    assert client == Client(None)


@pytest.mark.parametrize(
    "authorization", [["Bearer bad"], ["Basic good"], ["Bearer"], ["good"], ["Bearer good", "Bearer good"], [""]]
)
async def test_what_is_no_good_token_is_refused(authorization):
    with pytest.raises(Refused) as caught:
        await access(**permissions("all")).identify(request(*authorization))

    assert caught.value.status == 401
    assert caught.value.headers["WWW-Authenticate"].startswith("Bearer")


async def test_a_database_that_is_away_is_not_a_wrong_token(monkeypatch):
    monkeypatch.setattr(Tokens, "away", True)

    with pytest.raises(Refused) as caught:
        await access().identify(request("Bearer good"))

    assert caught.value.status == 503


async def test_who_guesses_too_often_has_to_wait_even_with_the_right_token():
    rules = access()
    for _ in range(20):
        with pytest.raises(Refused):
            await rules.identify(request("Bearer bad"))

    with pytest.raises(Refused) as caught:
        await rules.identify(request("Bearer good"))

    assert caught.value.status == 429
    assert int(caught.value.headers["Retry-After"]) == 4
    assert (await rules.identify(request("Bearer good", remote="192.0.2.2"))).token == "grafana"


def test_failures_are_forgiven_one_by_one_and_counted_by_network():
    now = 0.0
    limit = FailureLimit(count=3, period=30, clock=lambda: now)
    one, other, elsewhere = map(ip_address, ("2001:db8::1", "2001:db8::2", "2001:db8:0:1::1"))

    for _ in range(3):
        limit.failed(one)

    assert limit.wait(other) == pytest.approx(10)
    assert limit.wait(elsewhere) == 0
    now = 10.0
    assert limit.wait(one) == 0
    limit.failed(one)
    assert limit.wait(one) == pytest.approx(10)


def test_the_memory_of_failures_is_bounded():
    limit = FailureLimit(clock=lambda: 0.0)

    for number in range(ADDRESSES + 10):
        limit.failed(ip_address(number))

    assert len(limit._debts) == ADDRESSES


# ---------------------------------------------------------------------------------------------- shapes


def test_a_long_list_is_the_same_in_pieces():
    rows = [(f"user{number}", number) for number in range(2500)]
    shape = List("rows", Tuple("row", (string("name"), integer("number"))))
    result = Result(shape, iter(rows))

    pieces = list(result.json_chunks())

    assert len(pieces) == 3
    assert json.loads("".join(pieces)) == [{"name": name, "number": number} for name, number in rows]
    assert Result(List("x", string("y")), ()).json() == "[]\n"
    assert Result(List("x", string("y")), ["a", "b"]).json() == '["a", "b"]\n'


def test_the_description_has_all_shapes():
    row = Tuple("row", (string("name"), List("groups", string("group"))))

    assert shape_schema(Rescode())["enum"] == [0, 1]
    assert shape_schema(Restuple()) == {"type": "string"}
    assert shape_schema(integer("n")) == {"type": "integer"}
    described = shape_schema(List("rows", row))
    assert described["items"]["required"] == ["name", "groups"]
    assert described["items"]["properties"]["groups"] == {"type": "array", "items": {"type": "string"}}


def test_the_description_names_arguments_and_their_types():
    args = (Arg("user"), Arg("password", secret=True), Arg("days", "integer"), Arg("tags", "list", optional=True))

    document = describe([Command("module load", args, Rescode(), "Load")], version="1", prefix="/api")

    body = document["paths"]["/module_load"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["required"] == ["user", "password", "days"]
    assert body["properties"]["password"]["format"] == "password"
    assert body["properties"]["days"] == {"type": "integer"}
    assert body["properties"]["tags"]["type"] == "array"
    assert body["additionalProperties"] is False


def test_every_command_has_a_path_and_the_path_finds_it():
    registry = Registry()
    names = ["stats", "module list", "api_token create"]
    registry.register("core", [Command(name, (), Rescode(), "") for name in names])

    paths = describe(registry.commands(), version="1", prefix="/api")["paths"]

    assert sorted(paths) == ["/api_token_create", "/module_list", "/stats"]
    assert {registry.by_path(path[1:]).name for path in paths} == set(names)
    assert registry.get("api_token_create").name == "api_token create"
    assert registry.by_path("module list") is None
