"""The core's commands beyond what ejabberd shows: hostile input, refusals of the server, the node's own commands."""

import asyncio

import pytest

from tests.golden.memory import NODE, Node, session
from xmppd.admin.registry import Call, Caller
from xmppd.delivery import Pending
from xmppd.errors import CommandError, ConfigError

CTL = Caller("ctl", "uid=0")


@pytest.fixture
def node():
    return Node()


async def run(node, *argv, **options):
    spec, args = node.registry.split(argv)
    return (await node.registry.call(spec.name, args, caller=CTL, call=Call(CTL, **options))).text()


async def refused(node, *argv):
    with pytest.raises(CommandError) as caught:
        await run(node, *argv)
    return caught.value.text, caught.value.code


async def test_names_and_hosts_are_prepared_before_they_are_looked_up(node):
    await run(node, "register", "juliet", "localhost", "rose")
    node.sessions.rows = [session("juliet", "balcony"), session("juliet", "phone")]
    await run(node, "check_account", "JULIET", "LocalHost")
    assert await run(node, "check_password", "Juliet", "LOCALHOST", "rose") == ""
    assert await run(node, "user_resources", "Juliet", "LOCALHOST") == "balcony\nphone\n"
    await run(node, "kick_session", "Juliet", "Localhost", "phone", "Go")
    assert node.sessions.kicked == [("juliet@localhost/phone", "Go")]
    await run(node, "unregister", "Juliet", "localhost")
    assert node.sessions.kicked[1:] == [("juliet@localhost/balcony", "User removed")]
    assert await run(node, "registered_users", "localhost") == ""


async def test_a_password_that_saslprep_forbids_is_refused(node):
    text, code = await refused(node, "register", "juliet", "localhost", "ro\x07se")
    assert text.endswith("The password contains unacceptable characters")
    assert code == 1
    await run(node, "register", "juliet", "localhost", "rose")
    assert (await refused(node, "change_password", "juliet", "localhost", "ro\x07se"))[0].startswith("invalid_password")


async def test_local_answers_leave_other_nodes_out(node):
    node.sessions.rows = [session("juliet", "a"), session("romeo", "b", node="xmppd@node02")]
    assert await run(node, "connected_users") == "juliet@localhost/a\nromeo@localhost/b\n"
    assert await run(node, "connected_users_number") == "2\n"
    assert await run(node, "connected_users", local=True) == "juliet@localhost/a\n"
    assert await run(node, "connected_users_number", local=True) == "1\n"
    assert await run(node, "stats", "onlineusers") == "2\n"
    assert await run(node, "stats", "onlineusersnode") == "1\n"
    info = await run(node, "user_sessions_info", "romeo", "localhost")
    assert info.split("\t")[4] == "xmppd@node02"


async def test_a_message_is_escaped_and_bears_the_addresses_asked_for(node):
    await run(node, "send_message", "chat", "Localhost", "Juliet@localhost/Phone", "a<b", "</body><evil/>&")
    (stanza,) = node.router.sent
    assert (stanza.kind, stanza.type, stanza.from_.full, stanza.to.full) == (
        "message",
        "chat",
        "localhost",
        "juliet@localhost/Phone",
    )
    assert stanza.body == "</body><evil/>&"
    assert stanza.child("jabber:client", "subject").text == "a<b"
    assert len(stanza.id) == 16


async def test_a_stanza_gets_the_addresses_of_the_command_and_the_namespace_of_clients(node):
    xml = "<message from='x@y' to='z@w' id='m2' xml:lang='en'><body>Hi</body><a xmlns='urn:x'/></message>"
    await run(node, "send_stanza", "romeo@localhost", "juliet@localhost", xml)
    (stanza,) = node.router.sent
    assert (stanza.from_.full, stanza.to.full, stanza.id, stanza.body) == (
        "romeo@localhost",
        "juliet@localhost",
        "m2",
        "Hi",
    )
    assert stanza.child("urn:x", "a") is not None
    assert b"jabber:client" not in stanza.xml


@pytest.mark.parametrize(
    "xml",
    [
        "",
        "Hi",
        "<message/><message/>",
        "<message/>tail",
        "text<message/>",
        "<message>",
        "</stream><stream><message/>",
        "<!DOCTYPE m [<!ENTITY a 'b'>]><message/>",
        "<?xml version='1.0'?><message/>",
        "<message><!-- c --></message>",
        "<message><?pi x?></message>",
        "<!-- c --><message/>",
        "<message><body>&a;</body></message>",
        "<message><body>\x08</body></message>",
        "<message xmlns='jabber:server'/>",
        "<message xmlns=''/>",
        "<stream:message xmlns:stream='jabber:client'/>",
        "<note/>",
        "<message>" + "<a>" * 500 + "</a>" * 500 + "</message>",
    ],
)
async def test_what_is_not_one_clean_stanza_is_refused(node, xml):
    text, code = await refused(node, "send_stanza", "romeo@localhost", "juliet@localhost", xml)
    assert text.startswith(("invalid xml: ", "incorrect stanza: "))
    assert code == 1
    assert node.router.sent == []


@pytest.mark.parametrize("address", ["", "@localhost", "juliet@", "a b@localhost", "x" * 1100 + "@localhost"])
async def test_addresses_that_are_none_are_named(node, address):
    for argv in ((address, "juliet@localhost"), ("romeo@localhost", address)):
        assert (await refused(node, "send_stanza", *argv, "<message/>"))[0].startswith("malformed JID: ")
        assert (await refused(node, "send_message", "chat", *argv, "", "b"))[0].startswith("malformed JID: ")
    assert node.router.sent == []


async def test_a_command_waits_until_its_stanza_is_on_its_way(node):
    node.router.outcome = pending = Pending(decided=False)
    sending = asyncio.ensure_future(run(node, "send_message", "chat", "localhost", "juliet@localhost", "", "b"))
    for _ in range(10):  # rounds of the loop, more than it needs to come to its end
        await asyncio.sleep(0)
    assert node.router.sent
    assert not sending.done()
    pending.decide()
    assert await sending == ""


async def test_a_node_that_does_not_serve_says_so_by_text_and_code(node):
    node.server.status = "starting"
    assert await refused(node, "status") == (f"The node {NODE} is starting", 15)
    await run(node, "stop")
    assert node.server.asked_to_stop.is_set()
    assert (await refused(node, "status"))[0] == f"The node {NODE} is stopping"


async def test_a_reload_tells_what_it_did_or_why_it_did_nothing(node):
    assert await run(node, "reload_config") == ""
    node.server.report = ["applied: loglevel", "needs a restart: listen[0].port"]
    assert await run(node, "reload_config") == "applied: loglevel\nneeds a restart: listen[0].port\n"
    node.server.report = ConfigError(["etc/xmppd.yml: hots: unknown option. Did you mean hosts?"])
    text, code = await refused(node, "reload_config")
    assert text.splitlines()[1:] == ["etc/xmppd.yml: hots: unknown option. Did you mean hosts?"]
    assert code == 10


async def test_modules_are_listed_loaded_and_refused_by_name(node):
    assert await run(node, "module", "list") == "ping\tloaded\txmppd\n"
    assert await run(node, "module", "load", "offline") == "Module offline loaded\n"
    assert await run(node, "module", "reload", "offline") == "Module offline reloaded\n"
    assert await run(node, "module", "list") == "offline\tloaded\txmppd\nping\tloaded\txmppd\n"
    assert await refused(node, "module", "load", "offline") == ("the module offline is loaded already", 14)
    assert await run(node, "module", "unload", "offline") == "Module offline unloaded\n"
    assert await refused(node, "module", "unload", "offline") == ("there is no module called 'offline'", 13)
    text, code = await refused(node, "module", "load", "elopement")
    assert "Did you mean" in text
    assert code == 13
    assert (await refused(node, "module", "load", "broken"))[1] == 10
