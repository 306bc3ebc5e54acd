"""acl, access_rules and shaper_rules: who is meant, which rule counts, what comes of it."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xmppd.access import Access, AccessRules
from xmppd.config import parse as parse_config
from xmppd.protocol.jid import parse
from xmppd.shaper import ShaperLimits


def rules(**options: Any) -> AccessRules:
    return AccessRules(parse_config({"hosts": ["a.example", "b.example"], **options}, source="x.yml"))


def is_in(conditions: dict[str, Any], user: str | None, ip: str = "") -> bool:
    return rules(acl={"x": conditions}).in_acl("x", parse(user) if user else None, ip)


@pytest.mark.parametrize(
    ("conditions", "inside", "outside"),
    [
        ({"user": "juliet@a.example"}, ["juliet@a.example", "juliet@a.example/x"], ["juliet@b.example", "a.example"]),
        ({"user": "Juliet@A.Example"}, ["juliet@a.example"], []),
        ({"user": "juliet"}, ["juliet@a.example", "juliet@b.example"], ["juliet@c.example", "juliet2@a.example"]),
        ({"user": ["romeo", "juliet@c.example"]}, ["romeo@a.example", "juliet@c.example"], ["romeo@c.example"]),
        ({"user_regexp": "^bot[0-9]"}, ["bot7x@b.example"], ["robot7@a.example", "bot7@c.example"]),
        ({"user_regexp": "bot"}, ["robots@b.example"], ["a.example"]),
        ({"user_regexp": ""}, ["anybody@a.example"], ["anybody@c.example", "a.example"]),
        ({"user_glob": "bot?"}, ["bot7@a.example"], ["bot@a.example", "xbot7@a.example", "bot77@a.example"]),
        ({"user_glob": "b[!o]*"}, ["bit@a.example"], ["bot@a.example", "abit@a.example"]),
        ({"server": "C.example"}, ["x@c.example", "c.example", "y@c.example/z"], ["x@d.c.example", "x@a.example"]),
        ({"server_regexp": r"\.example$"}, ["x@c.example"], ["x@example.net"]),
        ({"server_glob": "*.c.example"}, ["x@d.c.example"], ["x@c.example", "x@d.c.example.net"]),
        ({"resource": "Bot"}, ["x@c.example/Bot"], ["x@c.example/bot", "x@c.example"]),
        ({"resource_regexp": "^b"}, ["x@c.example/bot"], ["x@c.example/abot", "x@c.example"]),
        ({"resource_glob": "*"}, ["x@c.example/bot"], ["x@c.example"]),
        ({"user": "x", "server": "c.example"}, ["x@a.example", "y@c.example"], ["y@a.example"]),
        ({}, [], ["x@a.example"]),
    ],
)
def test_whoever_meets_any_condition_is_in_the_acl(conditions, inside, outside):
    assert [user for user in inside if not is_in(conditions, user)] == []
    assert [user for user in outside if is_in(conditions, user)] == []
    assert not is_in(conditions, None)


@pytest.mark.parametrize(
    ("networks", "ip", "expected"),
    [
        ("10.0.0.0/8", "10.1.2.3", True),
        ("10.0.0.0/8", "::ffff:10.1.2.3", True),
        ("10.0.0.0/8", "11.1.2.3", False),
        (["10.0.0.0/8", "2001:db8::/32"], "2001:db8::7%eth0", True),
        ("::/0", "10.1.2.3", False),
        ("0.0.0.0/0", "", False),
        ("0.0.0.0/0", "not an address", False),
        ("127.0.0.1", "127.0.0.1", True),
    ],
)
def test_an_address_is_looked_for_in_the_networks(networks, ip, expected):
    assert is_in({"ip": networks}, None, ip) is expected
    assert is_in({"ip": networks}, "x@a.example", ip) is expected


def test_all_and_none_are_always_there():
    found = rules()
    assert found.in_acl("all")
    assert not found.in_acl("none", parse("x@a.example"), "127.0.0.1")
    assert not found.in_acl("never heard of", parse("x@a.example"))
    assert found.allowed("all")
    assert not found.allowed("none", parse("x@a.example"))


def test_loopback_is_an_acl_that_may_be_defined_anew():
    found = rules(access_rules={"x": {"allow": "loopback"}})
    assert [found.allowed("x", None, ip) for ip in ("127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1")] == [True] * 4
    assert not any(found.allowed("x", parse("x@a.example"), ip) for ip in ("", "10.0.0.1", "::2"))

    found = rules(acl={"loopback": {"ip": "10.0.0.1"}})
    assert found.in_acl("loopback", None, "10.0.0.1")
    assert not found.in_acl("loopback", None, "127.0.0.1")


def test_the_first_rule_that_counts_decides_and_without_one_nobody_is_let_in():
    found = rules(
        acl={"staff": {"user": ["nurse", "peter"]}, "away": {"ip": "192.0.2.0/24"}},
        access_rules={
            "x": [{"deny": ["staff", "away"]}, {"allow": "staff"}],
            "y": {"deny": "staff", "allow": "all"},
        },
    )
    nurse, romeo = parse("nurse@a.example"), parse("romeo@a.example")

    assert found.allowed("x", nurse)
    assert found.allowed("x", nurse, "198.51.100.1")
    assert not found.allowed("x", nurse, "192.0.2.1")
    assert not found.allowed("x", romeo)
    assert not found.allowed("y", nurse)
    assert found.allowed("y", romeo)
    assert found.allowed("y")
    assert not found.allowed("never heard of", romeo)


def test_numbers_come_from_either_kind_of_rule_and_shaper_rules_win():
    found = rules(
        acl={"admin": {"user": "nurse"}, "free": {"user": "peter"}},
        access_rules={"max_user_sessions": [{"3": "admin"}], "other": 7},
        shaper_rules={"max_user_offline_messages": [{"infinity": "free"}, {"9": "admin"}]},
    )
    nurse, romeo, peter = (parse(f"{name}@a.example") for name in ("nurse", "romeo", "peter"))

    assert Access(found).max_sessions(nurse) == 3
    assert Access(found).max_sessions(romeo) == 10  # ejabberd's default
    assert found.limit("max_user_offline_messages", 100, nurse) == 9
    assert found.limit("max_user_offline_messages", 100, romeo) == 100
    assert found.limit("max_user_offline_messages", 100, peter) is None
    assert found.limit("other", 100, romeo) == 7
    both = rules(access_rules={"max_user_sessions": 3}, shaper_rules={"max_user_sessions": {"4": "all"}})
    assert Access(both).max_sessions(romeo) == 4


def test_the_shaper_is_that_of_the_first_rule():
    found = rules(acl={"admin": {"user": "nurse"}, "office": {"ip": "192.0.2.0/24"}}, shaper={"slow": 100},
                  shaper_rules={"x": [{"none": "admin"}, {"slow": "office"}]})  # fmt: skip

    assert found.shaper("c2s_shaper") == ShaperLimits(64 << 10, 256 << 10)
    assert found.shaper("c2s_shaper", parse("nurse@a.example")) is None
    assert found.shaper("x", None, "192.0.2.9") == ShaperLimits(100, 100)
    assert found.shaper("x", parse("nurse@a.example"), "192.0.2.9") is None
    assert found.shaper("x") is None
    assert found.shaper("none") is None


def test_each_host_has_its_own_rules():
    found = rules(
        acl={"staff": {"user": "nurse"}},
        access_rules={"x": {"allow": "staff"}},
        host_config={"b.example": {"acl": {"staff": {"user": "peter"}}, "access_rules": {"only_b": "allow"}}},
        append_host_config={
            "a.example": {"acl": {"staff": {"ip": "192.0.2.1"}}, "access_rules": {"x": {"allow": "all"}}},
        },
    )

    def allowed(rule: str, user: str | None, ip: str = "", host: str = "") -> bool:
        return found.allowed(rule, parse(user) if user else None, ip, host)

    assert not allowed("x", "nurse@b.example")
    assert allowed("x", "peter@b.example")
    assert allowed("x", "romeo@a.example")
    assert not allowed("x", "romeo@c.example")
    assert found.in_acl("staff", parse("romeo@a.example"), "192.0.2.1")
    assert found.in_acl("staff", parse("nurse@a.example"))
    assert not found.in_acl("staff", parse("romeo@b.example"), "192.0.2.1")
    assert found.in_acl("staff", None, "192.0.2.1", "a.example")
    assert allowed("only_b", "x@b.example")
    assert not allowed("only_b", "x@a.example")
    assert found.has_rule("only_b")
    assert not found.has_rule("only_c")


def test_those_who_hold_the_rules_see_new_ones():
    access = Access(rules(access_rules={"x": "allow"}))
    allowed = access.allowed
    assert allowed("x")

    access.rules = rules(access_rules={"x": "deny"})

    assert not allowed("x")


NAMES = ["ann", "bob", "cat"]
ACLS = st.dictionaries(st.sampled_from("pqr"), st.lists(st.sampled_from(NAMES), max_size=3), max_size=3)
LISTS = st.lists(
    st.tuples(st.sampled_from(["allow", "deny"]), st.lists(st.sampled_from([*"pqr", "all", "none"]), min_size=1)),
    min_size=1,
    max_size=5,
)


@given(ACLS, LISTS, st.sampled_from(NAMES))
def test_evaluation_is_what_the_words_say(acls, entries, name):
    everything = {each: acls.get(each, []) for each in "pqr"} | {"all": NAMES, "none": []}
    counting = [value for value, wanted in entries if all(name in everything[each] for each in wanted)]
    found = rules(
        acl={each: {"user": users} for each, users in everything.items() if each in "pqr"},
        access_rules={"x": [{value: wanted} for value, wanted in entries]},
    )

    assert found.allowed("x", parse(f"{name}@a.example")) is (counting[:1] == ["allow"])


@given(st.text("ab*?", max_size=6), st.text("ab", max_size=6).filter(bool))
def test_a_glob_fits_the_whole_name(glob, name):
    if not glob:
        return
    pattern = "".join({"*": ".*", "?": "."}.get(char, char) for char in glob)
    assert is_in({"user_glob": glob}, f"{name}@a.example") is (re.fullmatch(pattern, name) is not None)


EVERYWHERE = rules(acl={"x": {"ip": "0.0.0.0/0"}})


@given(st.text(max_size=12))
def test_no_address_whatever_it_is_upsets_the_rules(ip):
    assert EVERYWHERE.in_acl("x", None, ip) in (True, False)
