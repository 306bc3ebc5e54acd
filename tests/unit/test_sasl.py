"""SASL: the RFCs' vectors, independent clients, and clients that mean harm."""

import base64
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scramp import ScramClient
from slixmpp.util.sasl.client import choose

from xmppd.errors import JidError
from xmppd.protocol import sasl
from xmppd.protocol.sasl import Challenge, NeedsSecret, NeedsVerify, SaslError, Success, derive, exchange, verify

SCRAM = ["SCRAM-SHA-512", "SCRAM-SHA-256", "SCRAM-SHA-1"]
PLUS = [f"{name}-PLUS" for name in SCRAM]
OFFERED = [*SCRAM, "PLAIN"]
SECRETS = {kind: derive(kind, "pencil", salt=b"0123456789abcdef", iterations=4096) for kind in sasl.KINDS}
BINDING = ("tls-unique", b"what both ends of the connection see")

# mechanism, client nonce, server nonce, salt, proof, verifier: RFC 5802 section 5 and RFC 7677 section 3
VECTORS = [
    (
        "SCRAM-SHA-1",
        "fyko+d2lbbFgONRv9qkxdawL",
        "3rfcNHYJY1ZVvWVs7j",
        "QSXCR+Q6sek8bf92",
        "v0X8v3Bz2T0CJGbJQyF0X+HI4Ts=",
        "rmF9pqV8S7suAoZWja4dJRkFsKQ=",
    ),
    (
        "SCRAM-SHA-256",
        "rOprNGfwEbeRWgbNEkqO",
        "%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0",
        "W22ZaJ0SNY7soEsUEjb6gQ==",
        "dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=",
        "6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=",
    ),
]


def start(mechanism="SCRAM-SHA-1", offered=OFFERED, channel_binding=None):
    bindings = dict([channel_binding]) if channel_binding else None
    return exchange(mechanism, host="localhost", offered=offered, bindings=bindings)


def client(mechanism, *, username="juliet", password="pencil", authzid="", binding=None, proposed=True):
    """slixmpp's SASL client, which shares no code with scramp."""
    credentials = {
        "username": username.encode(),
        "password": password.encode(),
        "authzid": authzid.encode(),
        "channel_binding": binding or b"",
    }
    security = {
        "encrypted": True,
        "encrypted_plain": True,
        "binding_proposed": proposed,
        "tls_version": "TLSv1.2",
    }
    return choose(
        [mechanism],
        lambda required, optional: {key: credentials.get(key, b"") for key in required | optional},
        lambda values: {value: security.get(value, False) for value in values},
    )


def first_message(mechanism, username):
    return (f"\0{username}\0pencil" if mechanism == "PLAIN" else f"n,,n={username},r=nonce").encode()


def log_in(attempt, peer, secrets=SECRETS):
    """Drive both ends until one gives up or both are content."""
    step = attempt.receive(peer.process())
    while True:
        match step:
            case NeedsSecret(_, kind):
                step = attempt.supply(secrets[kind])
            case NeedsVerify(_, password):
                step = attempt.verified(verify(secrets["sha256"], password))
            case Challenge(data):
                step = attempt.receive(peer.process(data))
            case Success(username, data):
                if data:
                    peer.process(data)  # raises unless the server has proved itself, too
                return username


def condition(attempt, *messages):
    """Send until the attempt fails; the condition it failed with."""
    try:
        for message in messages:
            step = attempt.receive(message)
            if isinstance(step, NeedsSecret):
                attempt.supply(SECRETS[step.kind])
    except SaslError as error:
        return error.condition
    raise AssertionError("all of it was taken")


@pytest.mark.parametrize(("mechanism", "client_nonce", "server_nonce", "salt", "proof", "verifier"), VECTORS)
def test_vectors_of_the_rfcs(mechanism, client_nonce, server_nonce, salt, proof, verifier):
    nonce = client_nonce + server_nonce
    attempt = exchange(mechanism, host="localhost", offered=OFFERED, server_nonce=server_nonce)

    step = attempt.receive(f"n,,n=user,r={client_nonce}".encode())
    assert isinstance(step, NeedsSecret)
    assert step.username == "user"

    step = attempt.supply(derive(step.kind, "pencil", salt=base64.b64decode(salt), iterations=4096))
    assert step == Challenge(f"r={nonce},s={salt},i=4096".encode())

    assert attempt.receive(f"c=biws,r={nonce},p={proof}".encode()) == Success("user", f"v={verifier}".encode())


@pytest.mark.parametrize("mechanism", OFFERED)
@pytest.mark.parametrize("authzid", ["", "juliet@localhost", "Juliet@LOCALHOST"])
def test_an_independent_client_logs_in(mechanism, authzid):
    assert log_in(start(mechanism), client(mechanism, authzid=authzid)) == "juliet"


@pytest.mark.parametrize("mechanism", SCRAM)
def test_scramps_own_client_logs_in(mechanism):
    peer = ScramClient([mechanism], "juliet", "pencil")
    attempt = start(mechanism)
    step = attempt.receive(peer.get_client_first().encode())
    step = attempt.supply(SECRETS[step.kind])
    peer.set_server_first(step.data.decode())
    step = attempt.receive(peer.get_client_final().encode())
    peer.set_server_final(step.data.decode())
    assert step.username == "juliet"


@pytest.mark.parametrize("mechanism", OFFERED)
def test_a_wrong_password_is_not_authorized(mechanism):
    with pytest.raises(SaslError) as caught:
        log_in(start(mechanism), client(mechanism, password="pencils"))
    assert caught.value.condition == "not-authorized"


@pytest.mark.parametrize("mechanism", OFFERED)
def test_a_wrong_password_and_an_unknown_user_hear_the_same(mechanism):
    nobody = {kind: sasl.fake_secret(b"key", kind, "juliet", "localhost", 4096) for kind in sasl.KINDS}
    with pytest.raises(SaslError) as unknown:
        log_in(start(mechanism), client(mechanism), nobody)
    with pytest.raises(SaslError) as wrong:
        log_in(start(mechanism), client(mechanism, password="pencils"))
    assert str(unknown.value) == str(wrong.value)


@pytest.mark.parametrize("mechanism", OFFERED)
@pytest.mark.parametrize(
    "authzid", ["romeo@localhost", "juliet@example.org", "juliet@localhost/phone", "localhost", "juliet", "@", "a@b@c"]
)
def test_nobody_acts_for_somebody_else(mechanism, authzid):
    with pytest.raises(SaslError) as caught:
        log_in(start(mechanism), client(mechanism, authzid=authzid))
    assert caught.value.condition == "invalid-authzid"


@pytest.mark.parametrize("mechanism", OFFERED)
@pytest.mark.parametrize("username", ["JULIET", "jul\u00adiet", "ｊｕｌｉｅｔ"])
def test_the_user_name_is_prepared(mechanism, username):
    """Also for a client that does not do it itself."""
    assert start(mechanism).receive(first_message(mechanism, username)).username == "juliet"


@pytest.mark.parametrize("username", ["romeo=juliet", "a,b", "=2C", ",=,="])
@pytest.mark.parametrize("mechanism", SCRAM)
def test_escapes_in_the_user_name(mechanism, username):
    assert log_in(start(mechanism), client(mechanism, username=username)) == username.lower()


@pytest.mark.parametrize("mechanism", OFFERED)
@pytest.mark.parametrize("username", ["juliet@localhost", "a/b", "a b", "a:b", "\u00ad", "a\u0007b", "\U0001f600"])
def test_a_name_nobody_can_have_is_not_authorized(mechanism, username):
    assert condition(start(mechanism), first_message(mechanism, username)) == "not-authorized"


def test_passwords_are_prepared_on_both_ends():
    secret = derive("sha256", "\u2168 caf\u00e9", iterations=4096)
    assert verify(secret, "IX cafe\u0301")
    assert not verify(secret, "IX cafe")


@pytest.mark.parametrize("password", ["", "\u00ad", "a\0b", "x" * 1025, "\udcff", "\u0627\u0031", "\U0001f600"])
def test_a_password_nobody_can_have(password):
    with pytest.raises(sasl.PasswordError):
        derive("sha1", password, iterations=4096)
    assert not verify(SECRETS["sha1"], password)


def test_the_longest_password_works():
    assert verify(derive("sha1", "x" * 1024, iterations=4096), "x" * 1024)


@pytest.mark.parametrize(
    ("kind", "iterations", "salt"),
    [("md5", 4096, None), ("sha1", 4095, None), ("sha1", 10_000_001, None), ("sha1", 4096, b"short")],
)
def test_a_secret_no_client_would_accept_is_not_made(kind, iterations, salt):
    with pytest.raises(ValueError, match="no SCRAM secret"):
        derive(kind, "pencil", iterations=iterations, salt=salt)


def test_two_accounts_with_one_password_share_nothing():
    first, second = (derive("sha256", "pencil", iterations=4096) for _ in range(2))
    assert len({first.salt, second.salt}) == len({first.stored_key, second.stored_key}) == 2


def test_secrets_do_not_show_their_keys():
    secret = SECRETS["sha1"]
    assert repr(secret.stored_key) not in repr(secret)
    assert repr(secret.server_key) not in repr(secret)
    assert "pencil" not in repr(start("PLAIN").receive(b"\0juliet\0pencil"))


@pytest.mark.parametrize("kind", sasl.KINDS)
def test_a_fake_secret_looks_like_a_real_one_and_stays_the_same(kind):
    fake = sasl.fake_secret(b"key", kind, "romeo", "localhost", 4096)
    real = SECRETS[kind]
    assert (fake.kind, fake.iterations, len(fake.salt)) == (kind, 4096, len(real.salt))
    assert len(fake.stored_key) == len(fake.server_key) == len(real.stored_key)
    assert fake == sasl.fake_secret(b"key", kind, "romeo", "localhost", 4096)
    others = [
        sasl.fake_secret(b"other", kind, "romeo", "localhost", 4096),
        sasl.fake_secret(b"key", kind, "juliet", "localhost", 4096),
        sasl.fake_secret(b"key", kind, "romeo", "example.org", 4096),
        sasl.fake_secret(b"key", "sha1" if kind != "sha1" else "sha256", "romeo", "localhost", 4096),
    ]
    assert fake.salt not in [other.salt for other in others]
    assert len({fake.salt, fake.stored_key, fake.server_key}) == 3


@pytest.mark.parametrize("mechanism", OFFERED)
def test_a_client_without_initial_response_is_asked_once(mechanism):
    attempt = start(mechanism)
    assert attempt.receive(b"") == Challenge(b"")
    assert log_in(attempt, client(mechanism)) == "juliet"

    attempt = start(mechanism)
    attempt.receive(b"")
    assert condition(attempt, b"") == "malformed-request"


@pytest.mark.parametrize("mechanism", ["SCRAM-SHA-1-PLUS", "SCRAM-SHA3-512", "DIGEST-MD5", "", "plain", "PLAIN-PLUS"])
def test_a_mechanism_that_is_not_offered(mechanism):
    with pytest.raises(SaslError) as caught:
        start(mechanism)
    assert caught.value.condition == "invalid-mechanism"


@pytest.mark.parametrize("mechanism", ["DIGEST-MD5", "SCRAM-SHA3-512", "SCRAM-SHA-1-PLUS"])
def test_a_mechanism_we_do_not_know_is_refused_even_if_offered(mechanism):
    with pytest.raises(SaslError) as caught:
        start(mechanism, offered=[mechanism])
    assert caught.value.condition == "invalid-mechanism"


@pytest.mark.parametrize("mechanism", PLUS)
@pytest.mark.parametrize("authzid", ["", "juliet@localhost"])
def test_channel_binding_binds(mechanism, authzid):
    offered = [*PLUS, *OFFERED]
    peer = client(mechanism, binding=BINDING[1], authzid=authzid)
    assert log_in(start(mechanism, offered, BINDING), peer) == "juliet"

    peer = client(mechanism, binding=b"another connection, to the one in the middle", authzid=authzid)
    with pytest.raises(SaslError) as caught:
        log_in(start(mechanism, offered, BINDING), peer)
    assert caught.value.condition == "not-authorized"


@pytest.mark.parametrize("mechanism", SCRAM)
def test_a_client_that_believes_we_cannot_bind(mechanism):
    peer = client(mechanism, proposed=False)  # it sends the flag y
    assert log_in(start(mechanism, OFFERED, None), peer) == "juliet"
    assert log_in(start(mechanism, OFFERED, BINDING), client(mechanism, proposed=False)) == "juliet"

    with pytest.raises(SaslError) as caught:  # somebody cut -PLUS out of our list on its way
        log_in(start(mechanism, [*PLUS, *OFFERED], BINDING), client(mechanism, proposed=False))
    assert caught.value.condition == "not-authorized"


@pytest.mark.parametrize(
    ("mechanism", "flag"),
    [("SCRAM-SHA-1", "p=tls-unique"), ("SCRAM-SHA-1-PLUS", "p=tls-exporter"), ("SCRAM-SHA-1-PLUS", "p=moon")],
)
def test_channel_binding_that_was_not_agreed_on_is_malformed(mechanism, flag):
    attempt = start(mechanism, [*PLUS, *OFFERED], BINDING)
    assert condition(attempt, f"{flag},,n=juliet,r=nonce".encode()) == "malformed-request"


@pytest.mark.parametrize("name", ["tls-unique", "tls-server-end-point"])
def test_the_client_chooses_what_to_bind_to(name):
    bindings = {"tls-server-end-point": b"certificate", "tls-unique": b"finished"}
    for data, fits in bindings.items():
        attempt = exchange("SCRAM-SHA-256-PLUS", host="localhost", offered=[*PLUS, *OFFERED], bindings=bindings)
        peer = ScramClient(["SCRAM-SHA-256-PLUS"], "juliet", "pencil", channel_binding=(name, fits))
        step = attempt.receive(peer.get_client_first().encode())
        step = attempt.supply(SECRETS[step.kind])
        peer.set_server_first(step.data.decode())
        if data == name:
            step = attempt.receive(peer.get_client_final().encode())
            peer.set_server_final(step.data.decode())
            assert step == Success("juliet", step.data)
        else:
            assert condition(attempt, peer.get_client_final().encode()) == "not-authorized"


@pytest.mark.parametrize("name", ["tls-unique", "tls-exporter"])
def test_a_binding_that_was_not_announced_is_refused_before_the_secret_is_loaded(name):
    bindings = {"tls-server-end-point": b"certificate"}
    attempt = exchange("SCRAM-SHA-256-PLUS", host="localhost", offered=[*PLUS, *OFFERED], bindings=bindings)
    with pytest.raises(SaslError) as caught:
        attempt.receive(f"p={name},,n=juliet,r=nonce".encode())
    assert caught.value.condition == "malformed-request"


def test_a_client_that_cannot_bind_logs_in_without():
    attempt = start("SCRAM-SHA-256", [*PLUS, *OFFERED], BINDING)
    assert log_in(attempt, client("SCRAM-SHA-256")) == "juliet"


@pytest.mark.parametrize("trace", [b"", b"sirhc@example.net", "é".encode() * 255])
def test_anonymous_gets_a_name_of_its_own(trace):
    steps = [start("ANONYMOUS", ["ANONYMOUS"]).receive(trace) for _ in range(100)]
    assert all(step.anonymous and step.data == b"" for step in steps)
    assert all(sasl.prep_username(step.username) == step.username and len(step.username) == 32 for step in steps)
    assert len({step.username for step in steps}) == 100


@pytest.mark.parametrize("trace", [b"x" * 256, b"\xff"])
def test_anonymous_with_a_trace_that_is_none_is_malformed(trace):
    assert condition(start("ANONYMOUS", ["ANONYMOUS"]), trace) == "malformed-request"


def test_anonymous_is_over_after_its_one_step():
    attempt = start("ANONYMOUS", ["ANONYMOUS"])
    attempt.receive(b"")
    assert condition(attempt, b"") == "malformed-request"


def test_nobody_is_anonymous_where_it_is_not_offered():
    with pytest.raises(SaslError) as caught:
        start("ANONYMOUS")
    assert caught.value.condition == "invalid-mechanism"


def test_only_anonymous_is_anonymous():
    step = start("PLAIN").receive(b"\0juliet\0pencil")
    attempt = start("PLAIN")
    attempt.receive(b"\0juliet\0pencil")
    assert isinstance(step, NeedsVerify)
    assert not attempt.verified(True).anonymous


@pytest.mark.parametrize("flag", ["n", "y"])
def test_plus_needs_the_binding(flag):
    attempt = start("SCRAM-SHA-1-PLUS", [*PLUS, *OFFERED], BINDING)
    assert condition(attempt, f"{flag},,n=juliet,r=nonce".encode()) == "not-authorized"


FIRST = b"n,,n=juliet,r=nonce"
MALFORMED_FIRST = [
    b"n,,",
    b"n,,r=nonce,n=juliet",
    b"n,,n=juliet",
    b"n,,n=,r=nonce",
    b"n,,n=juliet,r=",
    b"n,,n=juliet,r=no nce",
    b"n,,n=juliet,r=n\xc3\xb6nce",
    b"n,,n=juliet,r=" + b"x" * 513,
    b"n,,m=ext,n=juliet,r=nonce",
    b"n,,n=juliet,r=nonce,m=ext",
    b"n,,n=juliet,r=nonce,r=nonce",
    b"n,,n=juliet,n=romeo,r=nonce",
    b"n,,n=juliet,r=nonce,x=1,x=2",
    b"n,,n=juliet,r=nonce,",
    b"n,,n=juliet,r=nonce,x=",
    b"n,,n=jul=iet,r=nonce",
    b"n,,n=jul=2ciet,r=nonce",
    b"n,,n=juliet=,r=nonce",
    b"n,,n=jul\0iet,r=nonce",
    b"n,,n=jul\xffiet,r=nonce",
    b"n,,n=" + b"x" * 1024 + b",r=nonce",
    b"n,,n=juliet,r=nonce" + b",x=" + b"y" * 8192,
    b"n,a=,n=juliet,r=nonce",
    b"n,b=juliet@localhost,n=juliet,r=nonce",
    b"x,,n=juliet,r=nonce",
    b"p=tls-unique,,n=juliet,r=nonce",
    b"p=,,n=juliet,r=nonce",
    b",,n=juliet,r=nonce",
    b"\xed\xa0\x80",
    b"=",
]


@pytest.mark.parametrize("message", MALFORMED_FIRST)
def test_malformed_first_messages(message):
    assert condition(start(), message) == "malformed-request"


def test_a_nonce_of_512_characters_and_unknown_attributes_live():
    step = start().receive(b"n,,n=juliet,r=" + b"x" * 512 + b",x=1,y=2")
    assert step == NeedsSecret("juliet", "sha1")


@pytest.mark.parametrize("authzid", ["", "juliet@localhost"])
@pytest.mark.parametrize(
    ("final", "expected"),
    [
        ("c=biws,r=R,p=AAAA", "not-authorized"),
        ("c=biws,r=R,p=" + base64.b64encode(bytes(20)).decode(), "not-authorized"),
        ("c=eSws,r=R,p=AAAA", "not-authorized"),
        ("c=biws,r=other,p=AAAA", "malformed-request"),
        ("c=biws,r=R", "malformed-request"),
        ("r=R,c=biws,p=AAAA", "malformed-request"),
        ("c=biws,r=R,p=AAAA,x=1", "malformed-request"),
        ("c=biws,r=R,p=!", "malformed-request"),
        ("c=!,r=R,p=AAAA", "malformed-request"),
        ("c=ä,r=R,p=ä", "malformed-request"),
        ("c=biws,r=R,m=ext,p=AAAA", "malformed-request"),
        ("c=biws,r=R,i=" + "9" * 5000 + ",p=AAAA", "malformed-request"),
        ("", "malformed-request"),
        ("\0", "malformed-request"),
        ("x" * 9000, "malformed-request"),
    ],
)
def test_malformed_and_wrong_final_messages(authzid, final, expected):
    attempt = start()
    header = f"n,a={authzid}," if authzid else "n,,"
    step = attempt.receive(f"{header}n=juliet,r=nonce".encode())
    step = attempt.supply(SECRETS["sha1"])
    nonce = step.data.decode().split(",")[0].removeprefix("r=")
    sent = final.replace("biws", base64.b64encode(header.encode()).decode()).replace("r=R", f"r={nonce}")

    with pytest.raises(SaslError) as caught:
        attempt.receive(sent.encode())

    assert caught.value.condition == expected


def test_the_proof_covers_the_authzid():
    """Somebody in the middle who takes the authzid out, or puts it in, is found out."""
    peer = client("SCRAM-SHA-1")
    attempt = start()
    first = peer.process().replace(b"n,,", b"n,a=juliet@localhost,", 1)
    attempt.receive(first)
    step = attempt.supply(SECRETS["sha1"])
    with pytest.raises(SaslError) as caught:
        attempt.receive(peer.process(step.data))
    assert caught.value.condition == "not-authorized"


@pytest.mark.parametrize(
    "message",
    [
        b"\0juliet",
        b"juliet\0pencil",
        b"\0\0pencil",
        b"\0juliet\0",
        b"\0juliet\0pencil\0",
        b"\0jul\xffiet\0pencil",
        b"\0" + b"x" * 1024 + b"\0pencil",
        b"\0juliet\0" + b"x" * 1025,
        b"x" * 9000,
    ],
)
def test_malformed_plain(message):
    assert condition(start("PLAIN"), message) == "malformed-request"


def test_a_failed_attempt_is_over():
    attempt = start()
    condition(attempt, b"n,,")
    assert condition(attempt, FIRST) == "malformed-request"


def test_a_client_that_talks_out_of_turn_ends_its_attempt():
    attempt = start()
    attempt.receive(FIRST)
    with pytest.raises(SaslError, match="turn"):
        attempt.receive(FIRST)
    with pytest.raises(SaslError, match="over"):  # the look-up that was under way ends
        attempt.supply(SECRETS["sha1"])

    attempt = start("PLAIN")
    attempt.receive(b"\0juliet\0pencil")
    with pytest.raises(SaslError, match="turn"):
        attempt.receive(b"\0juliet\0pencil")
    with pytest.raises(SaslError, match="over"):
        attempt.verified(True)


def test_success_happens_once():
    attempt = start("PLAIN")
    attempt.receive(b"\0juliet\0pencil")
    assert attempt.verified(True) == Success("juliet", b"")
    with pytest.raises(SaslError):
        attempt.verified(True)


def test_answers_nobody_asked_for_are_our_own_fault():
    with pytest.raises(RuntimeError):
        start("PLAIN").supply(SECRETS["sha1"])
    with pytest.raises(RuntimeError):
        start().verified(True)
    with pytest.raises(RuntimeError):
        start().supply(SECRETS["sha1"])


@pytest.mark.parametrize(
    "secret",
    [
        SECRETS["sha256"],
        sasl.Secret("sha1", b"short", 4096, bytes(20), bytes(20)),
        sasl.Secret("sha1", bytes(16), 1, bytes(20), bytes(20)),
        sasl.Secret("sha1", bytes(16), 4096, bytes(19), bytes(20)),
    ],
)
def test_a_stored_secret_that_cannot_be_used_is_no_wrong_password(secret):
    attempt = start()
    attempt.receive(FIRST)
    with pytest.raises(SaslError) as caught:
        attempt.supply(secret)
    assert caught.value.condition == "temporary-auth-failure"


def test_only_conditions_of_the_rfc():
    with pytest.raises(ValueError, match="no SASL error condition"):
        SaslError("forbidden")


def test_user_names_that_are_no_local_parts():
    assert sasl.prep_username("Juliet") == "juliet"
    for name in ("", "a@b", "a b", "\U0001f600", "\udcff", "x" * 1024):
        with pytest.raises(JidError):
            sasl.prep_username(name)


def feed(mechanism, messages):
    """Anything at all may come in; nothing but a `SaslError` may come out, and never a success."""
    attempt = start(mechanism)
    try:
        for message in messages:
            match attempt.receive(message):
                case NeedsSecret(_, kind):
                    attempt.supply(SECRETS[kind])
                case NeedsVerify():
                    attempt.verified(False)
                case Success():
                    raise AssertionError("nobody knows this password")
    except SaslError as error:
        return error.condition
    return None


scram_like = st.text(alphabet="nyp=,araecmsvi\0juliet@localhost2CD3tls-unique\u00e4", max_size=60)


@given(st.sampled_from(OFFERED), st.lists(st.one_of(st.binary(max_size=80), scram_like.map(str.encode)), max_size=4))
def test_whatever_comes_in_only_a_sasl_error_comes_out(mechanism, messages):
    feed(mechanism, messages)


@given(st.text(max_size=40), st.text(max_size=40))
def test_any_text_as_name_and_authzid(username, authzid):
    for mechanism, message in (
        ("PLAIN", f"{authzid}\0{username}\0pencil"),
        ("SCRAM-SHA-1", f"n,a={authzid},n={username},r=nonce"),
    ):
        feed(mechanism, [message.encode("utf-8", "surrogatepass")])


@pytest.mark.slow
def test_a_second_of_damaged_messages():
    rng = random.Random(20)
    ends = time.monotonic() + 1.0
    seen = set()
    while time.monotonic() < ends:
        attempt = start()
        peer = client("SCRAM-SHA-1", username="juliet", authzid=rng.choice(["", "juliet@localhost"]))
        first = peer.process()
        final = None
        if rng.random() < 0.5:  # a good beginning, so that the damage hits the final message
            attempt.receive(first)
            nonce = attempt.supply(SECRETS["sha1"]).data.split(b",")[0]
            final = b"c=biws," + nonce + b",p=" + base64.b64encode(rng.randbytes(20))
        damaged = bytearray(final or first)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(damaged))
            damaged[at : at + rng.randint(0, 2)] = rng.randbytes(rng.randint(0, 2))
        try:
            step = attempt.receive(bytes(damaged))
            assert not isinstance(step, Success)
            if isinstance(step, NeedsSecret):
                attempt.supply(SECRETS["sha1"])
        except SaslError as error:
            seen.add(error.condition)
    assert {"malformed-request", "not-authorized", "invalid-authzid"} <= seen


@pytest.mark.parametrize("name", ["\U0002f868", "a\U0002f874b", "\U0002f91f", "\U0002f95f", "\U0002f9bf"])
def test_a_name_that_is_another_in_an_address_is_nobodys(name):
    """Five characters, whose normal form was corrected after Unicode 3.2."""
    with pytest.raises(JidError):
        sasl.prep_username(name)
