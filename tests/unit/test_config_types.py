"""Values as people write them: durations, sizes, rates, networks, domains."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xmppd.config.hosts import normalise_host
from xmppd.config.types import (
    LONGEST,
    Rate,
    format_duration,
    format_size,
    host_port,
    parse_duration,
    parse_network,
    parse_optional_rate,
    parse_rate,
    parse_size,
)
from xmppd.protocol import jid


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30s", 30.0),
        ("5m", 300.0),
        ("2h", 7200.0),
        ("1d", 86400.0),
        ("100ms", 0.1),
        ("0.1s", 0.1),
        ("1.5h", 5400.0),
        ("90", 90.0),
        (90, 90.0),
        (0.25, 0.25),
        (0, 0.0),
        (" 5 m ", 300.0),
    ],
)
def test_durations_are_seconds(text: object, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "5 minutes", "-5s", -1, "5S", "1e3", True, None, [], float("inf"), float("nan"), "٥s", "11y", 1e300]
)
def test_what_is_no_duration_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="expected a duration"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "size"), [("64KiB", 65536), ("1MiB", 1 << 20), ("2GiB", 2 << 30), ("4096", 4096), (4096, 4096), ("7B", 7)]
)
def test_sizes_are_bytes(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "64KB", "64k", "-1", -1, True, None, 1.5, "1.5MiB", "9" * 30, 1 << 60])
def test_what_is_no_size_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="expected a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("20/m", Rate(20, 60)),
        ("5/s", Rate(5, 1)),
        ("100/h", Rate(100, 3600)),
        ("3/10s", Rate(3, 10)),
        ("1/d", Rate(1, 86400)),
    ],
)
def test_rates_are_a_count_and_a_period(text: str, rate: Rate) -> None:
    assert parse_rate(text) == rate
    assert str(rate) == text


@pytest.mark.parametrize("text", ["", 20, "20", "0/m", "-1/m", "20/0s", "20/w", True, None])
def test_what_is_no_rate_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="expected a rate"):
        parse_rate(text)


def test_a_rate_that_may_be_missing_is_said_with_none() -> None:
    assert parse_optional_rate("none") is None
    with pytest.raises(ValueError, match="or none"):
        parse_optional_rate("off")


@given(st.integers(0, int(LONGEST) * 1000))
def test_a_duration_survives_being_written_and_read(milliseconds: int) -> None:
    assert parse_duration(format_duration(milliseconds / 1000)) == milliseconds / 1000


@given(st.integers(0, (1 << 60) - 1))
def test_a_size_survives_being_written_and_read(size: int) -> None:
    assert parse_size(format_size(size)) == size


@given(st.integers(1, 999_999_999), st.integers(1, 999_999), st.sampled_from([1, 1000, 60_000, 3_600_000]))
def test_a_rate_survives_being_written_and_read(count: int, number: int, unit: int) -> None:
    rate = Rate(count, min(number * unit, int(LONGEST) * 1000) / 1000)
    assert parse_rate(str(rate)) == rate


@given(st.text() | st.integers() | st.floats() | st.booleans() | st.none() | st.lists(st.integers()))
def test_no_value_raises_anything_but_value_error(value: object) -> None:
    parsers = (parse_duration, parse_size, parse_rate, parse_optional_rate, parse_network, host_port, normalise_host)
    for parser in parsers:
        try:
            parser(value)
        except ValueError:
            pass


@pytest.mark.parametrize("text", ["127.0.0.0/8", "192.0.2.7/32", "::1/128", "2001:db8::/32"])
def test_networks_are_read_in_both_families(text: str) -> None:
    assert str(parse_network(text)) == text


def test_an_address_inside_a_network_is_taken_for_a_slip() -> None:
    with pytest.raises(ValueError, match=r"Did you mean 10\.0\.0\.0/8"):
        parse_network("10.0.0.1/8")


def test_addresses_with_a_port_are_split() -> None:
    assert host_port("node01.example.net:4369") == ("node01.example.net", 4369)
    assert host_port("[2001:db8::7]:4369") == ("2001:db8::7", 4369)
    for wrong in ("4369", "a:70000", "a:", ":1", "2001:db8::7:4369", 5, None):
        with pytest.raises(ValueError, match="expected address:port"):
            host_port(wrong)


DOMAINS = [
    *(
        "Example.NET",
        "example.net.",
        "MÜLLER.example",
        "xn--mller-kva.example",
        "straße.de",
        "ｅxample.com",
        "İ.x",
        "a_b.c",
    ),
    *("127.0.0.1", "[::1]", "localhost", "9", "ſ.x", "K.x", "a" * 63 + ".b"),
]


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_domain_is_normalised_as_the_addresses_of_stanzas_are(domain: str) -> None:
    assert normalise_host(domain) == jid.parse(domain.removesuffix(".")).domain


@pytest.mark.parametrize(
    "domain",
    [
        *(
            "",
            ".",
            "..",
            "a..b",
            ".a",
            "-a.b",
            "a-.b",
            "::1",
            "a b",
            "a" * 64,
            "a@b",
            "a/b",
            "../a",
            "a\tb",
            "\u00ad.x",
        ),
        *('a"b', "a'b", "a&b", "a%b", "a\\b", "a.b" * 100, "a\nb", "*.example.net"),
    ],
)
def test_what_is_no_domain_is_refused(domain: str) -> None:
    with pytest.raises(ValueError, match="expected a domain"):
        normalise_host(domain)


@given(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=3).map(".".join))
def test_every_accepted_domain_is_one_a_stanza_can_be_sent_to(domain: str) -> None:
    try:
        host = normalise_host(domain)
    except ValueError:
        return
    assert jid.parse(f"juliet@{host}/balcony").domain == host
    assert normalise_host(host) == host
    assert host.isprintable()
