"""From the first byte to the bound session: TLS, SASL, bind, and every way not to get there."""

import asyncio
import base64
import ssl
import time

import pytest

from tests.harness.client import LoginFailed
from tests.harness.inbox import PATIENCE
from tests.harness.raw import BIND, SASL, TLS, header, trusting
from tests.harness.scene import PASSWORD

MECHANISMS = f"{{{SASL}}}mechanisms"


def offered(features) -> list[str]:
    found = features.xml.find(MECHANISMS)
    return [] if found is None else [each.text for each in found]


# -- TLS


async def test_before_tls_there_is_nothing_but_starttls(server):
    client = await server.connected()
    features = await client.open()
    assert [child.tag for child in features.xml] == [f"{{{TLS}}}starttls"]
    assert features.xml[0].find(f"{{{TLS}}}required") is not None


async def test_plain_is_offered_behind_tls_alone(server):
    client = await server.connected()
    await client.open()
    await client.starttls()
    features = await client.open()
    assert features.child(TLS) is None
    assert offered(features) == ["SCRAM-SHA-256-PLUS", "SCRAM-SHA-1-PLUS", "SCRAM-SHA-256", "SCRAM-SHA-1", "PLAIN"]


async def test_no_password_is_taken_before_tls(server):
    server.account("romeo")
    client = await server.connected()
    await client.open()
    failure = await client.plain("romeo", PASSWORD)
    assert failure.name == "failure"
    assert failure.xml[0].tag == f"{{{SASL}}}encryption-required"


async def test_where_tls_is_optional_plain_is_still_not_for_everybody_to_read(served):
    server = await served(c2s={"starttls_required": False})
    server.account("romeo")
    client = await server.connected()
    features = await client.open()
    assert "PLAIN" not in offered(features)
    assert "SCRAM-SHA-256" in offered(features)
    failure = await client.plain("romeo", PASSWORD)
    assert failure.name == "failure"


async def test_what_came_behind_starttls_in_clear_is_void(server):
    """Somebody in the middle could have put it there (RFC 6120 5.4.2.3)."""
    server.account("romeo")
    client = await server.connected()
    await client.open()
    injected = header() + f"<auth xmlns='{SASL}' mechanism='PLAIN'>AHJvbWVvAHg=</auth>"
    await client.starttls(behind=injected.encode())
    await client.authenticate("romeo", PASSWORD)
    assert (await client.bind("orchard")).type == "result"
    assert client.jid == "romeo@localhost/orchard"


async def test_starttls_twice_is_a_violation(server):
    client = await server.connected()
    await client.open()
    await client.starttls()
    await client.open()
    client.send_raw(f"<starttls xmlns='{TLS}'/>")
    assert (await client.next()).name == "failure"
    await client.assert_stream_error("policy-violation")


async def test_direct_tls_speaks_xmpp_client(server):
    client = server.raw()
    await client.connect_tls(server.node.tls_port, trusting(server.node.certificate(), alpn="xmpp-client"))
    assert client.ssl_object.selected_alpn_protocol() == "xmpp-client"
    assert client.ssl_object.version() in ("TLSv1.2", "TLSv1.3")
    assert "PLAIN" in offered(await client.open())


async def test_each_host_shows_its_own_certificate(served):
    hosts = ["localhost", "montague.example"]
    server = await served(hosts=hosts)
    for host in hosts:
        client = server.raw(host)  # believes the certificate of this host and no other
        await client.connect_tls(server.node.tls_port)
        await client.open()
        assert client.root.get("from") == host

        client = server.raw(host)
        await client.connect(server.node.port)
        await client.open()
        await client.starttls()
        await client.open()


async def test_old_tls_is_refused(server):
    context = trusting(server.node.certificate())
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    client = server.raw()
    await client.connect_tls(server.node.tls_port, context)
    assert client.ssl_object.version() == "TLSv1.2"


# -- SASL


@pytest.mark.parametrize("mechanism", ["SCRAM-SHA-1", "SCRAM-SHA-256", "PLAIN"])
@pytest.mark.parametrize("direct_tls", [False, True])
async def test_slixmpp_logs_in(server, mechanism, direct_tls):
    romeo = await server.login("romeo", "orchard", mechanism=mechanism, direct_tls=direct_tls)
    assert romeo.jid == "romeo@localhost/orchard"


async def test_sha512_is_there_by_option(served):
    server = await served(auth_scram={"hashes": ["sha256", "sha512"], "iterations": 4096})
    client = await server.encrypted()
    names = offered(await client.open())
    assert names == ["SCRAM-SHA-512-PLUS", "SCRAM-SHA-256-PLUS", "SCRAM-SHA-512", "SCRAM-SHA-256", "PLAIN"]
    romeo = await server.login("romeo", mechanism="SCRAM-SHA-512")
    assert romeo.jid.startswith("romeo@localhost/")


async def test_mechanisms_can_be_left_out(served):
    server = await served(disable_sasl_mechanisms=["PLAIN", "SCRAM-SHA-1", "SCRAM-SHA-1-PLUS", "SCRAM-SHA-256-PLUS"])
    client = await server.encrypted()
    assert offered(await client.open()) == ["SCRAM-SHA-256"]
    failure = await client.plain("romeo", PASSWORD)
    assert failure.xml[0].tag == f"{{{SASL}}}invalid-mechanism"


@pytest.mark.parametrize("mechanism", ["SCRAM-SHA-1", "SCRAM-SHA-256", "PLAIN"])
async def test_a_wrong_password_is_refused(server, mechanism):
    server.account("romeo", password="something else")
    with pytest.raises(LoginFailed, match="not-authorized"):
        await server.login("romeo", mechanism=mechanism)


async def test_an_unknown_user_looks_like_a_wrong_password(server):
    """Word for word; and with SCRAM even the salt stays the same from one try to the next."""
    server.account("romeo")
    answers = {}
    for user in ("romeo", "nobody"):
        client = await server.encrypted()
        await client.open()
        failure = await client.plain(user, "wrong")
        answers[user] = str(failure)
        challenges = []
        for _ in range(2):
            client.send_raw(f"<auth xmlns='{SASL}' mechanism='SCRAM-SHA-256'>{scram_first(user)}</auth>")
            challenge = await client.next()
            assert challenge.name == "challenge", challenge
            challenges.append(salt_of(challenge))
            client.send_raw(f"<abort xmlns='{SASL}'/>")
            assert (await client.next()).xml[0].tag == f"{{{SASL}}}aborted"
        assert challenges[0] == challenges[1]
    assert answers["romeo"] == answers["nobody"]


def scram_first(user: str) -> str:
    return base64.b64encode(f"n,,n={user},r=fyko+d2lbbFgONRv9qkxdawL".encode()).decode()


def salt_of(challenge) -> tuple[str, str]:
    parts = dict(each.split("=", 1) for each in base64.b64decode(challenge.xml.text).decode().split(","))
    assert len(base64.b64decode(parts["s"])) == 16
    return parts["s"], parts["i"]


async def test_too_many_failures_end_the_stream(server):
    client = await server.encrypted()
    await client.open()
    for _ in range(3):
        assert (await client.plain("romeo", "wrong")).name == "failure"
    await client.assert_stream_error("policy-violation")


async def test_a_second_try_can_succeed(server):
    server.account("romeo")
    client = await server.encrypted()
    await client.open()
    assert (await client.plain("romeo", "wrong")).name == "failure"
    assert (await client.plain("romeo", PASSWORD)).name == "success"


@pytest.mark.parametrize("data", ["!!!!", "AA", "Ä"])
async def test_what_is_not_base64_is_named_so(server, data):
    client = await server.encrypted()
    await client.open()
    client.send_raw(f"<auth xmlns='{SASL}' mechanism='PLAIN'>{data}</auth>")
    assert (await client.next()).xml[0].tag == f"{{{SASL}}}incorrect-encoding"


async def test_nothing_but_sasl_before_authentication(server):
    for stanza in (
        "<message to='juliet@localhost'/>",
        "<presence/>",
        "<iq type='get' id='1'><query xmlns='jabber:iq:roster'/></iq>",
    ):
        client = await server.encrypted()
        await client.open()
        client.send_raw(stanza)
        await client.assert_stream_error("not-authorized")


# -- bind


async def authenticated(server, user="romeo"):
    server.account(user)
    client = await server.encrypted()
    await client.authenticate(user, PASSWORD)
    return client


async def test_the_server_makes_up_a_resource(server):
    names = set()
    for _ in range(3):
        client = await authenticated(server)
        await client.bind()
        names.add(client.jid)
    assert len(names) == 3
    assert all(jid.startswith("romeo@localhost/") for jid in names)


async def test_a_resource_that_cannot_be_is_refused(server):
    client = await authenticated(server)
    answer = await client.bind("a\u0085b")
    assert answer.condition == "bad-request"
    assert (await client.bind("orchard")).type == "result"


async def test_no_stanza_before_bind(server):
    client = await authenticated(server)
    client.send_raw("<message to='juliet@localhost'/>")
    await client.assert_stream_error("not-authorized")


async def test_stanzas_may_be_pipelined_behind_the_bind_request(server):
    client = await authenticated(server)
    client.send_raw(
        f"<iq type='set' id='b'><bind xmlns='{BIND}'><resource>orchard</resource></bind></iq>"
        "<message to='romeo@localhost/orchard' id='m1'><body>to myself</body></message>"
    )
    assert (await client.next()).id == "b"
    message = await client.next_message()
    assert (message.id, message.sender) == ("m1", "romeo@localhost/orchard")


async def test_the_old_session_request_is_answered(server):
    client = await authenticated(server)
    await client.bind()
    await client.query("set", "<session xmlns='urn:ietf:params:xml:ns:xmpp-session'/>")


async def test_the_same_resource_again_ends_the_older_stream(server):
    old = await server.login("romeo", "orchard")
    new = await server.login("romeo", "orchard")
    await old.assert_stream_error("conflict")
    assert new.jid == "romeo@localhost/orchard"
    await new.expect_nothing()
    assert server.asked("connected_users") == "romeo@localhost/orchard"


async def test_closenew_refuses_the_newcomer(served):
    server = await served(resource_conflict="closenew")
    old = await server.raw_login("romeo", "orchard")
    new = await authenticated(server)
    answer = await new.bind("orchard")
    assert (answer.condition, answer.error_type) == ("conflict", "cancel")
    await old.expect_nothing()
    assert (await new.bind("garden")).type == "result"


async def test_setresource_gives_the_newcomer_another_one(served):
    server = await served(resource_conflict="setresource")
    old = await server.raw_login("romeo", "orchard")
    new = await server.raw_login("romeo", "orchard")
    assert new.jid.startswith("romeo@localhost/")
    assert new.jid != old.jid
    await old.sync()


async def test_the_oldest_session_makes_room(served):
    server = await served(access_rules={"c2s": [{"allow": "all"}], "max_user_sessions": [{2: "all"}]})
    first = await server.raw_login("romeo", "a")
    second = await server.raw_login("romeo", "b")
    third = await server.raw_login("romeo", "c")
    await first.assert_stream_error("conflict")
    await second.sync()
    await third.sync()
    other = await server.raw_login("juliet", "a")
    await other.sync()
    assert sorted(server.asked("connected_users").split()) == [
        "juliet@localhost/a", "romeo@localhost/b", "romeo@localhost/c",
    ]  # fmt: skip


# -- streams


@pytest.mark.parametrize("to", ["elsewhere.example", "", "a@b@c", "sub.localhost"])
async def test_a_host_that_is_not_served(server, to):
    client = await server.connected()
    client.send_raw(header(to))
    await client.assert_stream_error("host-unknown")
    assert client.root.get("id")


async def test_a_header_that_names_no_host(server):
    client = await server.connected()
    client.send_raw(header(None))
    error = await client.wait_for(lambda got: got.name == "error", "a stream error")
    assert error.condition in ("host-unknown", "improper-addressing")


async def test_the_header_answers_in_kind(server):
    client = await server.connected()
    await client.open("LOCALHOST")
    first = client.root
    assert (first.get("from"), first.get("version")) == ("localhost", "1.0")
    other = await server.connected()
    await other.open()
    assert first.get("id") != other.root.get("id")


@pytest.mark.parametrize(
    ("data", "condition"),
    [
        (header().replace("version='1.0'", "version='0.9'"), "unsupported-version"),
        (header().replace("version='1.0'", ""), "unsupported-version"),
        (header().replace("jabber:client", "jabber:server"), "invalid-namespace"),
        (header().replace("etherx.jabber.org", "example.org"), "invalid-namespace"),
        ("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", "not-well-formed"),
        ("<!DOCTYPE a>", "restricted-xml"),
        ("<?xml version='1.0' encoding='latin1'?>", "unsupported-encoding"),
        (header() + "<a", None),
        (header() + "<message/>", "not-authorized"),
        (header() + "<foo xmlns='urn:x'/>", "not-authorized"),
        (header() + "<!-- -->", "restricted-xml"),
        (header() + "<a></b>", "not-well-formed"),
        (header() + "<x:a/>", "not-well-formed"),
        (header() + f"<auth xmlns='{SASL}'>" + "A" * 17_000, "policy-violation"),
        (header() + "<iq>" + "<a/>" * 120 + "</iq>", "policy-violation"),
        (header() + "<iq>" + "<a>" * 70, "policy-violation"),
    ],
)  # fmt: skip
async def test_what_a_stranger_may_not_send(server, data, condition):
    client = await server.connected()
    client.send_raw(data)
    if condition is None:
        client.half_close()
        await client.assert_closed()
    else:
        await client.assert_stream_error(condition)
    assert client.received.startswith(b"<?xml version='1.0'?><stream:stream ")


async def test_strangers_get_less_than_users(server):
    romeo = await server.raw_login("romeo")
    romeo.send_message(romeo.jid, "a" * 200_000)
    assert len((await romeo.next_message()).body) == 200_000
    romeo.send_message(romeo.jid, "a" * 300_000)
    await romeo.assert_stream_error("policy-violation")


async def test_closing_is_answered(server):
    romeo = await server.raw_login("romeo")
    romeo.send_raw("</stream:stream>")
    await romeo.assert_closed()
    assert romeo.at_end
    assert server.node.quick("connected_users_number") == "0"


async def test_what_was_sent_before_the_end_still_counts(server):
    juliet = await server.raw_login("juliet")
    romeo = await server.raw_login("romeo")
    romeo.send_raw(
        "<message to='juliet@localhost' id='last'><body>Thus with a kiss I die</body></message></stream:stream>"
    )
    assert (await juliet.next_message()).id == "last"
    await romeo.assert_closed()


async def test_a_stranger_who_closes_is_answered(server):
    client = await server.connected()
    await client.open()
    client.send_raw("</stream:stream>")
    await client.assert_closed()
    assert client.at_end


# -- patience


async def test_who_says_nothing_is_cut_off(served):
    server = await served(c2s={"negotiation_timeout": "300ms"})
    began = time.monotonic()
    silent, talker, shaker = server.raw(), server.raw(), server.raw()
    await silent.connect(server.node.port)
    await shaker.connect(server.node.tls_port)  # and never begins its handshake
    await talker.connect(server.node.port)
    await talker.open()
    await talker.assert_stream_error("connection-timeout")
    await silent.assert_closed()
    await shaker.assert_closed()
    assert time.monotonic() - began < PATIENCE
    assert silent.received == b""


async def test_a_tls_handshake_that_hangs_is_cut_off(served):
    server = await served(c2s={"negotiation_timeout": "300ms"})
    client = await server.connected()
    await client.open()
    client.send_raw(f"<starttls xmlns='{TLS}'/>")
    assert (await client.next()).name == "proceed"
    await client.assert_closed()


async def test_a_bound_session_is_not_cut_off_by_the_negotiation_time(served):
    server = await served(c2s={"negotiation_timeout": "300ms"})
    romeo = await server.raw_login("romeo")
    silent = server.raw()
    await silent.connect(server.node.port)
    await silent.assert_closed()  # that long has passed
    await romeo.expect_nothing()


async def test_an_idle_session_is_cut_off_when_the_operator_says_so(served):
    server = await served(c2s={"idle_timeout": "500ms"})
    romeo = await server.raw_login("romeo")
    await romeo.assert_stream_error("connection-timeout")


async def test_many_strangers_do_not_keep_romeo_out(server):
    strangers = [server.raw() for _ in range(100)]
    await asyncio.gather(*(stranger.connect(server.node.port) for stranger in strangers))
    romeo = await server.raw_login("romeo")
    await romeo.sync()
