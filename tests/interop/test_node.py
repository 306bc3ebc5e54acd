"""@xmpp/client from npm: other people's idea of XMPP, in another language."""

import pytest

from tests.harness import node_client
from tests.harness.node_client import NodeClient
from tests.harness.scene import PASSWORD, together

pytestmark = [
    pytest.mark.node,
    pytest.mark.skipif(node_client.missing() is not None, reason=str(node_client.missing())),
]
ROSTER = "<query xmlns='jabber:iq:roster'/>"


@pytest.fixture
async def enter(server):
    """`enter(user)`: a client of the library, logged in and available."""

    async def enter(user, resource=None, *, direct_tls=False, available=True):
        server.account(user)
        client = NodeClient(server.node.certificate())
        server.adopt(client)
        scheme, port = ("xmpps", server.node.tls_port) if direct_tls else ("xmpp", server.node.port)
        await client.connect(f"{scheme}://localhost:{port}", user, PASSWORD, resource)
        if available:
            await client.become_available()
        return client

    return enter


@pytest.mark.parametrize("direct_tls", [False, True], ids=["starttls", "direct TLS"])
async def test_it_logs_in(enter, direct_tls):
    romeo = await enter("romeo", "orchard", direct_tls=direct_tls)
    assert romeo.jid == "romeo@localhost/orchard"
    await romeo.sync()


async def test_it_chats_with_its_own_kind_and_with_others(server, enter):
    romeo = await enter("romeo")
    juliet = await enter("juliet")
    nurse = await server.login("nurse")

    romeo.send_message("juliet@localhost", "By a name <&> I know not")
    assert (await juliet.next_message()).body == "By a name <&> I know not"
    juliet.send_message("nurse@localhost", "Nurse! 宙")
    message = await nurse.next_message()
    assert (message.body, message.sender) == ("Nurse! 宙", juliet.jid)
    nurse.send_message(juliet.jid, "Anon, good \U0001f339")
    assert (await juliet.next_message()).body == "Anon, good \U0001f339"


async def test_its_roster_and_subscriptions(enter):
    romeo = await enter("romeo", "orchard")
    juliet = await enter("juliet", "balcony")
    assert len((await romeo.query("get", ROSTER)).payload) == 0
    await romeo.query(
        "set", ROSTER.replace("/>", "><item jid='juliet@localhost' name='J'><group>Love</group></item></query>")
    )
    push = await romeo.next_stanza("iq")
    assert (push.payload[0].get("name"), push.payload[0].get("subscription")) == ("J", "none")

    romeo.send_presence("juliet@localhost", type="subscribe")
    assert (await juliet.next_presence()).type == "subscribe"
    juliet.send_presence("romeo@localhost", type="subscribed")
    await romeo.wait_for(lambda got: got.type == "subscribed", "the approval")
    seen = await romeo.wait_for(lambda got: got.name == "presence" and got.type == "available", "her presence")
    assert seen.sender == juliet.jid
    await together(romeo, juliet)
    [item] = (await romeo.query("get", ROSTER)).payload
    assert (item.get("name"), item.get("subscription"), item[0].text) == ("J", "to", "Love")

    romeo.forget()
    await juliet.leave()
    gone = await romeo.next_presence()
    assert (gone.sender, gone.type) == ("juliet@localhost/balcony", "unavailable")


async def test_it_gets_what_was_kept_for_it(server, enter):
    romeo = await enter("romeo")
    server.account("juliet")
    for number in range(10):
        romeo.send_message("juliet@localhost", str(number))
    await romeo.sync()
    assert await server.stored("juliet") == 10

    juliet = await enter("juliet", available=False)
    juliet.send_presence()
    for number in range(10):
        message = await juliet.next_message()
        assert (message.body, message.delay.sender) == (str(number), "localhost")


async def test_it_comes_back_after_a_lost_connection(server, enter):
    romeo = await server.raw_login("romeo")
    juliet = await enter("juliet", "balcony")
    await juliet.drop()
    romeo.send_message("juliet@localhost", "art thou gone so?")
    await juliet.event("resumed")
    assert juliet.jid == "juliet@localhost/balcony"
    assert (await juliet.next_message()).body == "art thou gone so?"


async def test_it_comes_back_after_a_restart_of_the_server(fresh, free_port):
    scene = fresh(start=False)
    scene.node.options["listen"][0]["port"] = free_port
    scene.node.configure({key: value for key, value in scene.node.options.items() if key != "data_dir"})
    scene.node.start()
    scene.account("juliet")
    juliet = NodeClient(scene.node.certificate())
    scene.adopt(juliet)
    await juliet.connect(f"xmpp://localhost:{free_port}", "juliet", PASSWORD, "balcony")
    assert scene.node.stop() == 0
    await juliet.event("disconnect")
    scene.node.start()
    await juliet.event("online")
    await juliet.become_available()
    romeo = await scene.login("romeo")
    romeo.send_message("juliet@localhost", "and again")
    assert (await juliet.next_message()).body == "and again"
