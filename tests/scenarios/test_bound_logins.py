"""Logins that are bound to their TLS connection, by other people's SCRAM clients over real TLS."""

import asyncio
import base64
import ssl
import subprocess

import pytest
from scramp import ScramClient

from tests.harness.raw import SASL, Raw
from tests.harness.scene import PASSWORD

CB = "urn:xmpp:sasl-cb:0"
HOSTS = ["localhost", "montague.example"]
END_POINT, UNIQUE = "tls-server-end-point", "tls-unique"
V12, V13 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3


def announced(features):
    found = features.child(CB, "sasl-channel-binding")
    return [] if found is None else [each.get("type") for each in found]


async def encrypted(scene, host="localhost", *, version=V13, direct=True, trust=None):
    """A client behind TLS, and the features it was offered."""
    client = Raw(trust or scene.node.certificate(host), host)
    scene._clients.append(client)
    client.context.minimum_version = client.context.maximum_version = version
    if direct:
        await client.connect_tls(scene.node.tls_port)
    else:
        await client.connect(scene.node.port)
        await client.open()
        await client.starttls()
    return client, await client.open()


async def scram(client, mechanism, binding=None, *, user="romeo", first=None):
    """What the server answers in the end; scramp checks that it has proved itself, too."""
    peer = ScramClient([mechanism], user, PASSWORD, channel_binding=binding)
    message = peer.get_client_first()
    answer = await tell(client, "auth", first or message, f" mechanism='{mechanism}'")
    if answer.name != "challenge":
        return answer
    peer.set_server_first(base64.b64decode(answer.xml.text).decode())
    answer = await tell(client, "response", peer.get_client_final())
    if answer.name == "success":
        peer.set_server_final(base64.b64decode(answer.xml.text).decode())
    return answer


async def tell(client, name, message, more=""):
    client.send_raw(f"<{name} xmlns='{SASL}'{more}>{base64.b64encode(message.encode()).decode()}</{name}>")
    return await client.next()


def refusal(answer):
    assert answer.name == "failure", answer
    return answer.xml[0].tag.rpartition("}")[2]


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("version", [V12, V13])
@pytest.mark.parametrize("direct", [True, False], ids=["direct", "starttls"])
async def test_scramp_binds_to_the_certificate_of_the_host(served, host, version, direct):
    server = await served(hosts=HOSTS)
    server.account("romeo", host)
    client, features = await encrypted(server, host, version=version, direct=direct)
    assert announced(features) == ([END_POINT, UNIQUE] if version is V12 else [END_POINT])

    answer = await scram(client, "SCRAM-SHA-256-PLUS", (END_POINT, client.ssl_object))

    assert answer.name == "success", answer
    await client.restart()
    assert (await client.bind()).type == "result"
    assert client.jid.startswith(f"romeo@{host}/")
    assert "sasl=SCRAM-SHA-256-PLUS" in server.node.new_log()


async def test_the_certificate_is_the_one_of_sni_not_of_the_stream(served):
    """A client that names one host to TLS and another to the stream was served the first one's certificate."""
    server = await served(hosts=HOSTS)
    server.account("romeo", HOSTS[1])
    client = server.raw(HOSTS[0])
    await client.connect_tls(server.node.tls_port)
    client.host = HOSTS[1]
    await client.open()
    assert (await scram(client, "SCRAM-SHA-256-PLUS", (END_POINT, client.ssl_object))).name == "success"


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "starttls"])
async def test_scramp_binds_to_a_tls_1_2_connection(served, direct):
    server = await served(hosts=HOSTS)
    server.account("romeo")
    client, _ = await encrypted(server, version=V12, direct=direct)
    assert (await scram(client, "SCRAM-SHA-1-PLUS", (UNIQUE, client.ssl_object))).name == "success"


async def test_another_connection_or_certificate_does_not_fit(served):
    """As when somebody sits in the middle of two connections."""
    server = await served(hosts=HOSTS)
    server.account("romeo")
    victim, _ = await encrypted(server, HOSTS[1], version=V12)
    for name in (END_POINT, UNIQUE):
        client, _ = await encrypted(server, version=V12)
        assert refusal(await scram(client, "SCRAM-SHA-256-PLUS", (name, victim.ssl_object))) == "not-authorized"


async def test_a_client_that_was_shown_no_plus_notices_with_us_that_somebody_lied(served):
    server = await served(hosts=HOSTS)
    server.account("romeo")
    client, _ = await encrypted(server)
    answer = await scram(client, "SCRAM-SHA-256", first="y,,n=romeo,r=fyko+d2lbbFgONRv9qkxdawL")
    assert refusal(answer) == "not-authorized"
    assert "middle" in answer.xml[1].text
    assert (await scram(client, "SCRAM-SHA-256")).name == "success"  # one that cannot bind says n


async def test_with_no_plus_offered_a_client_that_could_bind_logs_in(served):
    plus = [f"SCRAM-SHA-{kind}-PLUS" for kind in (1, 256)]
    server = await served(disable_sasl_mechanisms=plus)
    server.account("romeo")
    client, features = await encrypted(server)
    assert announced(features) == []
    peer = ScramClient(["SCRAM-SHA-256"], "romeo", PASSWORD, channel_binding=(END_POINT, client.ssl_object))
    assert peer.get_client_first().startswith("y,")
    assert (await scram(client, "SCRAM-SHA-256", (END_POINT, client.ssl_object))).name == "success"


@pytest.mark.parametrize("name", [UNIQUE, "tls-exporter", "moon"])
async def test_a_type_that_was_not_announced_is_refused(served, name):
    server = await served(hosts=HOSTS)
    server.account("romeo")
    client, features = await encrypted(server, version=V13)
    assert name not in announced(features)
    first = f"p={name},,n=romeo,r=fyko+d2lbbFgONRv9qkxdawL"
    answer = await scram(client, "SCRAM-SHA-256-PLUS", (END_POINT, client.ssl_object), first=first)
    assert refusal(answer) == "malformed-request"


async def test_nothing_can_be_bound_in_clear(served):
    server = await served(c2s={"starttls_required": False})
    server.account("romeo")
    client = await server.connected()
    features = await client.open()
    assert announced(features) == []
    answer = await scram(client, "SCRAM-SHA-256-PLUS", (END_POINT, b"x"))
    assert refusal(answer) == "invalid-mechanism"


async def test_bound_logins_alone(served):
    server = await served(disable_sasl_mechanisms=["PLAIN", "SCRAM-SHA-1", "SCRAM-SHA-256"])
    server.account("romeo")
    client, _ = await encrypted(server)
    assert refusal(await scram(client, "SCRAM-SHA-256")) == "invalid-mechanism"
    assert (await scram(client, "SCRAM-SHA-256-PLUS", (END_POINT, client.ssl_object))).name == "success"


@pytest.mark.parametrize(("version", "sasl"), [(V12, "SCRAM-SHA-256-PLUS"), (V13, "SCRAM-SHA-256")])
@pytest.mark.parametrize("direct", [True, False], ids=["direct", "starttls"])
async def test_slixmpp_binds_where_it_can_and_logs_in_where_it_cannot(served, monkeypatch, version, sasl, direct):
    """It knows tls-unique alone, so nothing to bind to with TLS 1.3."""
    from slixmpp.xmlstream.xmlstream import XMLStream

    make = XMLStream.get_ssl_context

    def limited(self):
        context = make(self)
        context.minimum_version = context.maximum_version = version
        return context

    monkeypatch.setattr(XMLStream, "get_ssl_context", limited)
    server = await served(hosts=HOSTS)
    await server.login("romeo", direct_tls=direct)
    tls = {V12: "TLSv1.2", V13: "TLSv1.3"}[version]
    line = next(line for line in server.node.new_log().splitlines() if "session bound jid=romeo@" in line)
    assert f"tls={tls} sasl={sasl} " in line


def issue(path, digest):
    """A new certificate for localhost of the openssl program, in place of what was there."""
    key = path.with_suffix(".key")
    command = ["openssl", "req", "-x509", "-nodes", "-newkey", "rsa:2048", "-subj", "/CN=localhost", f"-{digest}"]
    names = ["-addext", "subjectAltName=DNS:localhost", "-addext", "basicConstraints=critical,CA:FALSE"]
    subprocess.run([*command, *names, "-keyout", key, "-out", path], check=True, capture_output=True)
    key.chmod(0o600)


def endpoint(path, digest):
    command = ["openssl", "x509", "-in", path, "-noout", "-fingerprint", f"-{digest}"]
    words = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return bytes.fromhex(words.partition("=")[2].strip().replace(":", ""))


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "starttls"])
async def test_after_a_reload_each_connection_keeps_the_certificate_it_was_served(fresh, tmp_path, direct):
    file = tmp_path / "localhost.pem"
    await asyncio.to_thread(issue, file, "sha512")
    server = fresh(certfiles=[str(file), str(file.with_suffix(".key"))])
    server.account("romeo")
    old, _ = await encrypted(server, direct=direct, trust=file)
    before = endpoint(file, "sha512")

    await asyncio.to_thread(issue, file, "sha384")
    server.asked("reload_config")
    new, _ = await encrypted(server, direct=direct, trust=file)
    after = endpoint(file, "sha384")

    assert refusal(await scram(old, "SCRAM-SHA-256-PLUS", (END_POINT, after))) == "not-authorized"
    assert refusal(await scram(new, "SCRAM-SHA-256-PLUS", (END_POINT, before))) == "not-authorized"
    assert (await scram(old, "SCRAM-SHA-256-PLUS", (END_POINT, before))).name == "success"
    assert (await scram(new, "SCRAM-SHA-256-PLUS", (END_POINT, after))).name == "success"
