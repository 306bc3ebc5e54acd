"""Two people and their contacts: messages, presence, subscriptions, requests, over real TLS with slixmpp."""

import pytest

from tests.harness.scene import together

ROSTER = "<query xmlns='jabber:iq:roster'/>"


async def test_a_message_arrives_as_it_was_sent(server):
    romeo = await server.login("romeo", "orchard")
    juliet = await server.login("juliet", "balcony")

    id = romeo.send_message(
        "juliet@localhost", "<&> O 宙 \U0001f600", inner="<x xmlns='urn:x' a='&quot;'/>", xml_lang="it"
    )

    message = await juliet.next_message()
    assert (message.id, message.type, message.body) == (id, "chat", "<&> O 宙 \U0001f600")
    assert (message.sender, message.to) == ("romeo@localhost/orchard", "juliet@localhost")
    assert message.child("urn:x", "x").get("a") == '"'
    assert message.xml.get("{http://www.w3.org/XML/1998/namespace}lang") == "it"
    assert not message.is_delayed


async def test_a_message_to_oneself_arrives(server):
    romeo = await server.login("romeo")
    romeo.send_message(None, "note to self")
    message = await romeo.next_message()
    assert (message.body, message.to) == ("note to self", "romeo@localhost")


async def test_many_messages_keep_their_order(server):
    romeo = await server.login("romeo")
    juliet = await server.login("juliet")
    for number in range(500):
        romeo.send_message("juliet@localhost", str(number))
    assert [(await juliet.next_message()).body for _ in range(500)] == [str(number) for number in range(500)]


async def test_offline_messages_come_in_order_before_live_ones(server):
    romeo = await server.login("romeo")
    server.account("juliet")
    for number in range(30):
        romeo.send_message("juliet@localhost", str(number))
    await romeo.sync()
    assert await server.stored("juliet") == 30

    juliet = await server.login("juliet", available=False)
    juliet.send_presence()
    for number in range(30, 60):
        romeo.send_message("juliet@localhost", str(number))

    assert [(await juliet.next_message()).body for _ in range(60)] == [str(number) for number in range(60)]


async def test_a_negative_priority_leaves_messages_where_they_are(server):
    romeo = await server.login("romeo")
    server.account("juliet")
    romeo.send_message("juliet@localhost", "wait for it")
    await server.stored("juliet")
    juliet = await server.login("juliet", priority=-1)
    await juliet.expect_nothing()
    juliet.send_presence(priority=0)
    assert (await juliet.next_message()).body == "wait for it"


async def test_a_client_that_vanishes_loses_no_message(server):
    romeo = await server.login("romeo")
    juliet = await server.raw_login("juliet")
    juliet.stop_reading()
    sent = [romeo.send_message("juliet@localhost", "x" * 8_000) for _ in range(90)]
    await romeo.sync()
    had = {got.id for got in juliet.forget()}
    await juliet.close()

    again = await server.login("juliet")
    missing = set(sent) - had
    while missing:
        missing.discard((await again.next_message()).id)


# -- presence and subscriptions


async def befriend(server):
    romeo = await server.login("romeo", "orchard")
    juliet = await server.login("juliet", "balcony")
    for one, other in ((romeo, juliet), (juliet, romeo)):
        one.send_presence(f"{other.jid.partition('/')[0]}", type="subscribe")
        await other.wait_for(lambda got: got.type == "subscribe", "the request")
        other.send_presence(f"{one.jid.partition('/')[0]}", type="subscribed")
        await one.wait_for(lambda got: got.type == "subscribed", "the approval")
        sender = other.jid
        await one.wait_for(lambda got, sender=sender: got.sender == sender and got.name == "presence", "the presence")
    await together(romeo, juliet)
    romeo.forget()
    juliet.forget()
    return romeo, juliet


async def test_friends_see_each_other_come_and_go(server):
    romeo, juliet = await befriend(server)
    romeo.send_presence(inner="<show>away</show><status>gone fishing</status>")
    seen = await juliet.next_presence()
    assert (seen.sender, seen.type) == (romeo.jid, "available")
    assert seen.xml.findtext("{jabber:client}show") == "away"

    await romeo.disconnect()
    gone = await juliet.next_presence()
    assert (gone.sender, gone.type) == ("romeo@localhost/orchard", "unavailable")

    romeo = await server.login("romeo", "garden", available=False)
    romeo.send_presence()
    assert (await juliet.next_presence()).sender == "romeo@localhost/garden"
    assert (await romeo.wait_for(lambda got: got.sender == juliet.jid, "her presence")).type == "available"


async def test_a_lost_connection_is_seen_as_leaving_too(server):
    romeo, juliet = await befriend(server)
    await romeo.vanish()
    gone = await juliet.next_presence()
    assert (gone.sender, gone.type) == ("romeo@localhost/orchard", "unavailable")


async def test_strangers_see_nothing(server):
    romeo = await server.login("romeo")
    juliet = await server.login("juliet")
    romeo.send_presence(inner="<show>dnd</show>")
    await together(romeo, juliet)
    await juliet.expect_nothing()


async def test_directed_presence_is_taken_back_at_the_end(server):
    romeo = await server.login("romeo", "orchard")
    juliet = await server.login("juliet")
    romeo.send_presence(juliet.jid)
    assert (await juliet.next_presence()).type == "available"
    await romeo.vanish()
    gone = await juliet.next_presence()
    assert (gone.sender, gone.type) == ("romeo@localhost/orchard", "unavailable")


async def test_the_roster_shows_the_subscription_and_is_pushed(server):
    romeo, _ = await befriend(server)
    roster = await romeo.query("get", ROSTER)
    [item] = roster.payload
    assert (item.get("jid"), item.get("subscription")) == ("juliet@localhost", "both")

    other = await server.login("romeo", "garden")
    await other.query("get", ROSTER)
    await romeo.query("set", "<query xmlns='jabber:iq:roster'><item jid='juliet@localhost' name='Jules'/></query>")
    for client in (romeo, other):
        push = await client.next_stanza("iq")
        assert (push.type, push.payload[0].get("name"), push.payload[0].get("subscription")) == ("set", "Jules", "both")


async def test_removing_a_contact_ends_both_subscriptions(server):
    romeo, juliet = await befriend(server)
    await romeo.query(
        "set", "<query xmlns='jabber:iq:roster'><item jid='juliet@localhost' subscription='remove'/></query>"
    )
    kinds = {(await juliet.next_presence()).type for _ in range(3)}
    assert kinds == {"unsubscribe", "unsubscribed", "unavailable"}
    assert len((await romeo.query("get", ROSTER)).payload) == 0


async def test_a_request_waits_for_who_is_away(server):
    romeo = await server.login("romeo")
    server.account("juliet")
    romeo.send_presence("juliet@localhost", type="subscribe")
    await romeo.sync()
    juliet = await server.login("juliet", available=False)
    juliet.send_presence()
    assert (await juliet.wait_for(lambda got: got.type == "subscribe", "the request")).sender == "romeo@localhost"


async def test_nobody_subscribes_to_a_stranger_by_guessing(server):
    romeo = await server.login("romeo")
    romeo.send_presence("nobody@localhost", type="subscribe")
    romeo.send_presence("nobody@localhost", type="probe")
    romeo.send_presence("nobody@localhost")
    await romeo.sync()
    assert [got for got in romeo.forget() if got.name == "presence"] == []


# -- requests


async def test_requests_pass_between_clients(server):
    romeo = await server.raw_login("romeo")
    juliet = await server.raw_login("juliet")
    romeo.send_raw(f"<iq type='get' id='a1' to='{juliet.jid}'><query xmlns='urn:x'/></iq>")
    request = await juliet.next_stanza("iq")
    assert (request.sender, request.id) == (romeo.jid, "a1")
    juliet.send_raw(f"<iq type='result' id='a1' to='{romeo.jid}'><query xmlns='urn:x'>yes</query></iq>")
    answer = await romeo.next_stanza("iq")
    assert (answer.sender, answer.payload.text) == (juliet.jid, "yes")


async def test_a_request_to_a_client_that_dies_is_answered(server):
    romeo = await server.raw_login("romeo")
    juliet = await server.raw_login("juliet")
    juliet.stop_reading()
    romeo.send_raw(f"<iq type='get' id='a1' to='{juliet.jid}'><query xmlns='urn:x'/></iq>")
    await romeo.sync()
    await juliet.close()
    answer = await romeo.next_stanza("iq")
    assert (answer.id, answer.condition) == ("a1", "service-unavailable")


@pytest.mark.parametrize("namespace", ["jabber:iq:version", "urn:xmpp:time", "jabber:iq:last", "urn:xmpp:ping"])
async def test_the_server_answers_for_itself(server, namespace):
    romeo = await server.login("romeo")
    name = {"urn:xmpp:time": "time", "urn:xmpp:ping": "ping"}.get(namespace, "query")
    await romeo.query("get", f"<{name} xmlns='{namespace}'/>", to="localhost")


async def test_private_storage_is_the_own_alone(server):
    romeo = await server.login("romeo")
    juliet = await server.login("juliet")
    asked = "<query xmlns='jabber:iq:private'><storage xmlns='storage:bookmarks'/></query>"
    await romeo.query("set", asked.replace("/></", "><url url='urn:x' name='x'/></storage></"))
    answer = await romeo.query("get", asked)
    assert len(answer.payload[0]) == 1
    assert await juliet.refusal("get", asked, to="romeo@localhost") in ("forbidden", "service-unavailable")


# -- the operator


async def test_the_operator_sees_and_ends_sessions(server):
    romeo = await server.login("romeo", "orchard", priority=3)
    assert server.asked("connected_users") == "romeo@localhost/orchard"
    assert server.asked("user_resources", "romeo", "localhost") == "orchard"
    server.asked("kick_session", "romeo", "localhost", "orchard", "bedtime")
    error = await romeo.wait_for(lambda got: got.name == "error", "a stream error")
    assert error.condition
    await romeo.assert_closed()
    assert server.asked("connected_users_number") == "0"


async def test_the_operator_sends_a_message(server):
    juliet = await server.login("juliet")
    server.asked("send_message", "chat", "nurse@localhost", "juliet@localhost", "", "Madam!")
    message = await juliet.next_message()
    assert (message.sender, message.body) == ("nurse@localhost", "Madam!")


async def test_an_account_that_is_removed_loses_its_sessions_and_its_password(server):
    romeo = await server.raw_login("romeo")
    server.node.unregister("romeo")
    await romeo.assert_stream_error("conflict")
    client = await server.encrypted()
    await client.open()
    assert (await client.plain("romeo", "O, be some other name!")).name == "failure"
