"""Logins without an account (SASL ANONYMOUS): what such a user is, can do, and leaves behind."""

import re

import pytest

from tests.harness.raw import SASL
from tests.harness.scene import until

ROSTER = "<query xmlns='jabber:iq:roster'/>"


def mechanisms(features):
    found = features.xml.find(f"{{{SASL}}}mechanisms")
    return [each.text for each in found]


async def guest(scene, trace=""):
    client = scene.raw()
    await client.connect_tls(scene.node.tls_port)
    await client.open()
    client.send_raw(f"<auth xmlns='{SASL}' mechanism='ANONYMOUS'>{trace}</auth>")
    answer = await client.next()
    assert answer.name == "success", answer
    await client.restart()
    assert (await client.bind()).type == "result"
    return client


@pytest.mark.parametrize("trace", ["", "=", "c2lyaGM="])
async def test_each_login_is_somebody_new(served, trace):
    server = await served(auth_method=["anonymous"])
    jids = {(await guest(server, trace)).jid for _ in range(3)}
    assert len({jid.partition("/")[0] for jid in jids}) == 3
    assert all(re.fullmatch(r"[0-9a-f]{32}@localhost/.+", jid) for jid in jids)


async def test_a_host_of_guests_offers_nothing_else(served):
    server = await served(auth_method=["anonymous"])
    client = await server.encrypted()
    assert mechanisms(await client.open()) == ["ANONYMOUS"]
    failure = await client.plain("romeo", "x")
    assert failure.xml[0].tag == f"{{{SASL}}}invalid-mechanism"


async def test_guests_are_not_let_in_unless_asked(server):
    client = await server.encrypted()
    assert "ANONYMOUS" not in mechanisms(await client.open())
    client.send_raw(f"<auth xmlns='{SASL}' mechanism='ANONYMOUS'/>")
    assert (await client.next()).xml[0].tag == f"{{{SASL}}}invalid-mechanism"


async def test_slixmpp_logs_in_without_a_password(served):
    from tests.harness.client import Client

    server = await served(auth_method=["sql", "anonymous"])
    client = Client("localhost", "", server.node.certificate(), mechanism="ANONYMOUS")
    server._clients.append(client)
    await client.connect(server.node.port)
    assert re.fullmatch(r"[0-9a-f]{32}@localhost/.+", client.jid)


async def test_a_guest_and_a_user_talk_until_the_guest_is_gone(served):
    server = await served(auth_method=["sql", "anonymous"])
    romeo = await server.login("romeo")
    stranger = await guest(server)
    await stranger.become_available()
    bare = stranger.jid.partition("/")[0]

    stranger.send_raw("<message type='chat' to='romeo@localhost'><body>Help!</body></message>")
    assert (await romeo.next_message()).sender == stranger.jid
    romeo.send_raw(f"<message type='chat' id='a1' to='{bare}'><body>What is it?</body></message>")
    assert (await stranger.next_message()).body == "What is it?"

    await stranger.disconnect()
    await until(lambda: bare not in server.node.quick("connected_users"), "the guest to be gone")
    romeo.send_raw(f"<message type='chat' id='a2' to='{bare}'><body>Are you there?</body></message>")
    answer = await romeo.wait_for(lambda got: got.id == "a2", "the answer")
    assert answer.condition == "service-unavailable"


async def test_a_guest_has_no_roster_and_stores_nothing(fresh):
    server = fresh(auth_method=["sql", "anonymous"])
    stranger = await guest(server)
    await stranger.become_available()
    assert len((await stranger.ask("get", ROSTER)).payload) == 0
    for payload in (
        "<query xmlns='jabber:iq:roster'><item jid='romeo@localhost'/></query>",
        "<vCard xmlns='vcard-temp'><FN>Nobody</FN></vCard>",
        "<query xmlns='jabber:iq:private'><x xmlns='urn:x'>y</x></query>",
    ):
        answer = await stranger.ask("set", payload)
        assert answer.condition == "not-allowed"
    name = stranger.jid.partition("@")[0]
    await stranger.disconnect()
    server.node.stop()
    for file in server.node.data_dir.glob("xmppd.db*"):
        assert name.encode() not in file.read_bytes()
