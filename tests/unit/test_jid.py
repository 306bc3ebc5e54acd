"""Addresses (RFC 7622): what is one, how it is prepared, and that preparing twice changes nothing."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xmppd.errors import JidError
from xmppd.protocol import jid
from xmppd.protocol.jid import JID, bare, make, parse, prepare_local


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("romeo@montague.example/orchard", ("romeo", "montague.example", "orchard")),
        ("montague.example", ("", "montague.example", "")),
        ("montague.example/a/b@c", ("", "montague.example", "a/b@c")),
        ("ROMEO@Montague.EXAMPLE/Orchard", ("romeo", "montague.example", "Orchard")),
        ("romeo@montague.example/ a b", ("romeo", "montague.example", " a b")),
        ("fußball@example.com", ("fussball", "example.com", "")),
        ("π@example.com", ("π", "example.com", "")),
        ("Σ@example.com/foo", ("σ", "example.com", "foo")),
        ("romeo@127.0.0.1", ("romeo", "127.0.0.1", "")),
        ("romeo@[::1]/x", ("romeo", "[::1]", "x")),
    ],
)
def test_an_address_has_these_parts(text, parts):
    address = parse(text)
    assert (address.local, address.domain, address.resource) == parts
    assert address.bare == (f"{parts[0]}@{parts[1]}" if parts[0] else parts[1])
    assert str(address) == address.full == address.bare + (f"/{parts[2]}" if parts[2] else "")


@pytest.mark.parametrize(
    "text",
    ["", "@", "/", "@/", "a@", "@b", "a@/b", "/a", "a@b/", "a@b@c", "a b@c", 'a"b@c', "a&b@c", "a'b@c", "a:b@c",
     "a<b@c", "a>b@c", "a@b c", "a@b/\x00", "\x00@b", "a@\x00", "a@b/\u0007", "a@b..c", "a@-", "a@b/\ud800"],
)  # fmt: skip
def test_this_is_no_address(text):
    with pytest.raises(JidError):
        parse(text)


@pytest.mark.parametrize("character", ["a", "é", "宙"])
def test_each_part_may_have_1023_bytes(character):
    size = len(character.encode())
    under, over = character * (1023 // size), character * (1023 // size + 1)
    assert parse(f"{under}@example.com").local == under
    with pytest.raises(JidError):
        parse(f"{over}@example.com")
    assert parse(f"a@example.com/{under}").resource == under
    with pytest.raises(JidError):
        parse(f"a@example.com/{over}")


def test_a_domain_has_at_most_255_bytes():
    label = "a" * 60 + "."
    assert parse("a@" + label * 4 + "example").domain.startswith("aaa")
    with pytest.raises(JidError):
        parse("a@" + label * 5)
    with pytest.raises(JidError):
        parse("a@" + "a" * 64 + ".example")


def test_long_addresses_are_not_remembered():
    before = jid._parse_cached.cache_info().currsize
    for number in range(50):
        parse(f"a@example.com/{number}" + "x" * 900)
    assert jid._parse_cached.cache_info().currsize == before


def test_homographs_stay_apart():
    assert parse("pаypal@example.com") != parse("paypal@example.com")  # a Cyrillic letter
    assert parse("romeo@еxample.com") != parse("romeo@example.com")


def test_spellings_of_one_address_are_equal():
    one = parse("Romeo@MONTAGUE.example/x")
    assert one == parse("romeo@montague.example/x")
    assert hash(one) == hash(parse("romeo@montague.example/x"))
    assert parse("a@Ⅷ.example") == parse("a@viii.example")
    assert parse("ｒｏｍｅｏ@example.com") == parse("romeo@example.com")
    assert one != "romeo@montague.example/x"


def test_resources_are_not_folded():
    assert parse("a@b/Balcony") != parse("a@b/balcony")


def test_characters_that_stringprep_does_not_know_are_refused():
    """RFC 6122 preparation knows Unicode 3.2: clients must not count on newer characters."""
    with pytest.raises(JidError):
        parse("a@b/\U0001f600")


def test_bare():
    full = parse("romeo@montague.example/orchard")
    assert bare(full) == parse("romeo@montague.example")
    assert bare(full).resource == ""
    assert bare(bare(full)) is not full
    assert bare(parse("montague.example/x")) == parse("montague.example")


def test_make_puts_parts_together_and_prepares_them():
    assert make("ROMEO", "montague.example", "Orchard").full == "romeo@montague.example/Orchard"
    assert make("", "montague.example").full == "montague.example"
    assert make("a", "b", "c/d@e").resource == "c/d@e"


@pytest.mark.parametrize(
    ("local", "domain"), [("a@b", "c"), ("a/b", "c"), ("a", "b/c"), ("a", "b@c"), ("a", ""), ("", "")]
)
def test_make_lets_no_part_become_two(local, domain):
    with pytest.raises(JidError):
        make(local, domain)


def test_prepare_local():
    assert prepare_local("ROMEO") == "romeo"
    for bad in ("", "a@b", "a/b", "a b", "a\x00"):
        with pytest.raises(JidError):
            prepare_local(bad)


PARTS = st.text(max_size=20)


@settings(max_examples=500)
@given(PARTS, PARTS, PARTS, st.booleans(), st.booleans())
def test_preparing_twice_changes_nothing(local, domain, resource, with_local, with_resource):
    text = (f"{local}@" if with_local else "") + domain + (f"/{resource}" if with_resource else "")
    try:
        address = parse(text)
    except JidError:
        return
    assert parse(address.full) == address
    assert parse(address.bare) == bare(address)
    assert make(address.local, address.domain, address.resource) == address
    for part in (address.local, address.domain, address.resource):
        assert len(part.encode()) <= 1023
    assert address.domain


@given(st.text(max_size=60))
def test_parsing_raises_nothing_else(text):
    try:
        address = parse(text)
    except JidError:
        return
    assert isinstance(address, JID)
