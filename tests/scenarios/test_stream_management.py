"""Stream management (XEP-0198): what is acknowledged, and streams that go on after a lost connection."""

import asyncio
import sqlite3

import pytest

from tests.harness.managed import SM, Managed
from tests.harness.promise import write_locked
from tests.harness.scene import PASSWORD, until

VERSION = "<query xmlns='jabber:iq:version'/>"


@pytest.fixture
async def enter(served):
    """`enter(user, **options)`: a client that has enabled stream management on a server with these options."""

    scenes = {}

    async def enter(user, resource=None, *, prompt=True, resume=True, available=True, max=None, **options):
        key = str(options)
        if key not in scenes:
            scenes[key] = await served(**({"stream_management": options} if options else {}))
        scene = scenes[key]
        scene.account(user)
        client = Managed(scene.node.certificate(), prompt=prompt)
        client.scene = scene
        scene.adopt(client)
        await client.login(scene.node.tls_port, user, PASSWORD, resource)
        if available:
            await client.become_available()
        client.answer = await client.enable(resume=resume, max=max)
        assert client.answer.name == "enabled"
        return client

    yield enter
    for scene in scenes.values():
        await scene.leave()
        for user, host in scene.accounts:
            scene.node.quick("kick_user", user, host)  # who still waits to be resumed


async def come_back(client, **more):
    user = client.jid.partition("@")[0]
    return await client.come_back(client.scene.node.tls_port, user, PASSWORD, **more)


def say(client, to, *bodies):
    client.send_raw("".join(f"<message to='{to}' type='chat' id='{b}'><body>{b}</body></message>" for b in bodies))


async def heard(client, count):
    return [(await client.next_message()).body for _ in range(count)]


async def expect_no_message(client):
    await client.sync()
    assert client.forget(lambda got: got.name == "message") == []


def condition(got):
    assert got.name == "failed", got
    return got.xml[0].tag.rpartition("}")[2]


async def failure(client):
    return condition(await client.wait_for(lambda got: got.name == "failed", "failed"))


# -- turning it on


async def test_it_is_offered_once_there_is_a_user(server):
    client = await server.encrypted()
    server.account("romeo")
    assert (await client.open()).child(SM) is None
    assert (await client.plain("romeo", PASSWORD)).name == "success"
    assert (await client.restart()).child(SM, "sm") is not None


async def test_what_was_granted_is_said(enter):
    romeo = await enter("romeo", max=20)
    assert (romeo.answer.xml.get("resume"), romeo.answer.xml.get("max")) == ("true", "20")
    assert len(romeo.id) > 40
    juliet = await enter("juliet", max=100_000)
    assert juliet.answer.xml.get("max") == "300"
    nurse = await enter("nurse", resume=False)
    assert nurse.answer.xml.attrib == {}


async def test_the_place_to_come_back_to_is_named(enter):
    romeo = await enter("romeo", location="node01.example.net:5222", resume_timeout="10s", max_resume_timeout="1m")
    assert romeo.answer.xml.get("location") == "node01.example.net:5222"
    assert romeo.answer.xml.get("max") == "10"


async def test_a_node_may_resume_nothing(enter):
    romeo = await enter("romeo", resume_timeout=0)
    assert romeo.answer.xml.attrib == {}


async def test_it_is_refused_at_the_wrong_time(server):
    server.account("romeo")
    romeo = Managed(server.node.certificate())
    server.adopt(romeo)
    await romeo.connect_tls(server.node.tls_port)
    await romeo.open()
    romeo.send_raw(f"<enable xmlns='{SM}'/>")
    assert await failure(romeo) == "unexpected-request"
    await romeo.plain("romeo", PASSWORD)
    await romeo.restart()
    for early in ("enable", "r", "a h='0'"):
        romeo.send_raw(f"<{early} xmlns='{SM}'/>")
        assert await failure(romeo) == "unexpected-request"
    romeo.send_raw(f"<resume xmlns='{SM}' previd='x' h='-1'/>")
    assert await failure(romeo) == "bad-request"
    assert condition(await romeo.resume(id="invented")) == "item-not-found"
    await romeo.bind()
    for early in ("r", "a h='0'", "resume previd='x' h='0'"):
        romeo.send_raw(f"<{early} xmlns='{SM}'/>")
        assert await failure(romeo) == "unexpected-request"
    romeo.send_raw(f"<enable xmlns='{SM}' max='soon'/>")
    assert await failure(romeo) == "bad-request"
    assert (await romeo.enable()).name == "enabled"
    await romeo.sync()


async def test_who_asks_for_it_twice_loses_the_stream(enter):
    romeo = await enter("romeo")

    romeo.send_raw(f"<enable xmlns='{SM}'/>")

    assert await failure(romeo) == "unexpected-request"
    await romeo.assert_stream_error("policy-violation")
    assert condition(await come_back(romeo)) == "item-not-found"


@pytest.mark.parametrize("h", ["7", "4294967295"])
async def test_acknowledging_too_much_ends_the_stream(enter, h):
    romeo = await enter("romeo", prompt=False)
    await romeo.sync()
    await romeo.sync()
    romeo.acknowledge(2)
    romeo.send_raw(f"<a xmlns='{SM}' h='{h}'/>")
    error = await romeo.assert_stream_error("undefined-condition")
    told = error.child(SM, "handled-count-too-high")
    assert (told.get("h"), told.get("send-count")) == (h, "2")
    assert condition(await come_back(romeo)) == "item-not-found"


async def test_an_acknowledgement_without_a_count_ends_the_stream(enter):
    romeo = await enter("romeo")
    romeo.send_raw(f"<a xmlns='{SM}'/>")
    await romeo.assert_stream_error("bad-format")


# -- what is acknowledged


async def test_a_message_counts_when_its_recipient_has_it(enter):
    romeo, juliet = await enter("romeo"), await enter("juliet", prompt=False)
    say(romeo, "juliet@localhost", "one")
    romeo.request()
    assert await heard(juliet, 1) == ["one"]
    await juliet.until_requested()
    await romeo.until(lambda: romeo.acks == [0], "an answer")
    await romeo.sync()
    romeo.request()
    await romeo.until(lambda: len(romeo.acks) == 2, "an answer")
    assert romeo.acked == 0  # in order: what came behind does not count either
    juliet.acknowledge()
    await romeo.until_acked(2)
    assert len(romeo.acks) == 3  # it was not asked for again


async def test_a_message_for_somebody_absent_counts_when_it_is_stored(enter):
    romeo = await enter("romeo")
    romeo.scene.account("juliet")
    say(romeo, "juliet@localhost", "one")
    romeo.request()
    await romeo.until_acked(1)
    assert romeo.scene.stored_now("juliet") == 1


async def test_an_error_comes_before_the_acknowledgement(enter):
    romeo = await enter("romeo")
    say(romeo, "nobody@localhost", "one")
    romeo.request()
    assert (await romeo.next_message()).condition == "service-unavailable"
    await romeo.until_acked(1)


async def test_many_are_asked_for_at_once(enter):
    romeo, juliet = await enter("romeo"), await enter("juliet")
    names = [str(number) for number in range(500)]
    say(romeo, "juliet@localhost", *names)
    romeo.request()
    assert await heard(juliet, 500) == names
    await romeo.until_acked(500)
    assert juliet.requests < 100


@pytest.mark.long  # its short form is in test_promise.py
async def test_nothing_moves_while_commit_and_acknowledgement_are_held(fresh):
    scene = fresh()
    for user in ("romeo", "juliet", "nurse"):
        scene.account(user)
    romeo, juliet = Managed(scene.node.certificate()), Managed(scene.node.certificate(), prompt=False)
    for user, client in (("romeo", romeo), ("juliet", juliet)):
        scene.adopt(client)
        await client.login(scene.node.tls_port, user, PASSWORD)
        await client.become_available()
        await client.enable()
    await romeo.sync()  # counts
    database = sqlite3.connect(scene.node.data_dir / "xmppd.db", isolation_level=None)
    database.execute("BEGIN IMMEDIATE")
    try:
        say(romeo, "juliet@localhost", "held by her")
        say(romeo, "nurse@localhost", "held by the database")
        assert await heard(juliet, 1) == ["held by her"]
        began = asyncio.get_running_loop().time()
        errors = []
        while asyncio.get_running_loop().time() < began + 10:
            romeo.request()
            await asyncio.sleep(0.25)
            assert romeo.acked == 1, romeo.acks
            errors += romeo.forget(lambda got: got.type == "error")
        assert len(romeo.acks) >= 20
        juliet.acknowledge()
        await romeo.until_acked(2)
        if not errors:
            assert romeo.acked == 2
    finally:
        database.execute("ROLLBACK")
        database.close()
    await romeo.until_acked(3)
    if not errors:
        await until(lambda: scene.stored_now("nurse") == 1, "the commit")
    scene.node.expects_trouble = True


# -- resumption


async def test_messages_wait_for_the_stream_to_go_on(enter):
    romeo, juliet = await enter("romeo"), await enter("juliet", "balcony")
    for turn in range(3):  # also again and again
        await juliet.cut()
        say(romeo, "juliet@localhost", f"{turn}a")
        say(romeo, juliet.jid, f"{turn}b")
        await romeo.sync()
        answer = await come_back(juliet)
        assert (answer.name, answer.xml.get("previd"), answer.xml.get("h")) == ("resumed", juliet.id, str(turn))
        assert await heard(juliet, 2) == [f"{turn}a", f"{turn}b"]
        juliet.send_message("romeo@localhost", "here")
        assert (await romeo.next_message()).body == "here"
    romeo.request()
    await romeo.until_acked(9)
    assert juliet.scene.stored_now("juliet") == 0


async def test_what_was_not_acknowledged_comes_again_and_nothing_else(enter):
    romeo, juliet = await enter("romeo"), await enter("juliet", prompt=False)
    say(romeo, "juliet@localhost", "one", "two", "three")
    assert await heard(juliet, 3) == ["one", "two", "three"]
    juliet.acknowledge(1)
    await juliet.cut()
    juliet.handled = 2
    assert (await come_back(juliet)).name == "resumed"
    assert await heard(juliet, 1) == ["three"]
    juliet.prompt = True
    await expect_no_message(juliet)


async def test_the_count_of_what_came_goes_on(enter):
    romeo, juliet = await enter("romeo"), await enter("juliet", prompt=False)
    with write_locked(romeo.scene.node):
        say(romeo, "juliet@localhost", "one", "two")
        await romeo.sync()
        await juliet.until_requested()
        await romeo.cut()
        # Neither counts, as nobody has acknowledged or stored it: they are sent again, and are known.
        answer = await come_back(romeo)
        assert answer.xml.get("h") == "0"
    say(romeo, "juliet@localhost", "one", "two")
    romeo.send_raw("<iq type='get' id='again' to='localhost'><ping xmlns='urn:xmpp:ping'/></iq>")
    say(romeo, "juliet@localhost", "three")
    assert await heard(juliet, 3) == ["one", "two", "three"]
    juliet.acknowledge()
    romeo.request()
    await romeo.until_acked(4)


async def test_a_contact_sees_nothing_of_it(enter):
    juliet, nurse = await enter("juliet", "balcony"), await enter("juliet", "room")
    await nurse.sync()
    nurse.forget()
    await juliet.cut()
    nurse.send_raw(f"<iq type='get' id='v' to='{juliet.jid}'>{VERSION}</iq>")
    await come_back(juliet)
    asked = await juliet.next_stanza("iq")
    juliet.send_raw(f"<iq type='result' id='{asked.id}' to='{nurse.jid}'>{VERSION}</iq>")
    answer = await nurse.next_stanza()
    assert (answer.id, answer.type) == ("v", "result")


async def test_an_old_stream_makes_room(enter):
    juliet = await enter("juliet")
    other = Managed(juliet.scene.node.certificate())
    juliet.scene.adopt(other)
    other.jid, other.scene = juliet.jid, juliet.scene
    assert (await come_back(other, id=juliet.id, h=0)).name == "resumed"
    await juliet.assert_stream_error("conflict")
    await other.sync()


async def test_nobody_resumes_the_stream_of_somebody_else(enter):
    juliet, romeo = await enter("juliet"), await enter("romeo")
    await juliet.cut()
    await romeo.cut()
    assert condition(await come_back(romeo, id=juliet.id)) == "item-not-found"
    assert (await romeo.bind()).type == "result"
    assert (await come_back(juliet)).name == "resumed"


async def test_a_long_queue_arrives_in_pieces(enter):
    romeo, juliet = await enter("romeo"), await enter("juliet")
    await juliet.cut()
    text = "x" * 10_000
    for number in range(120):
        romeo.send_message("juliet@localhost", f"{number} {text}")
    await romeo.sync()
    await come_back(juliet)
    assert [body.partition(" ")[0] for body in await heard(juliet, 120)] == [str(number) for number in range(120)]
    romeo.request()
    await romeo.until_acked(121)


# -- when it is not resumed


async def test_in_the_end_what_it_had_not_acknowledged_is_kept_once(enter):
    juliet = await enter("juliet", "balcony", prompt=False, resume_timeout="1s")
    romeo, watcher = await enter("romeo", resume_timeout="1s"), await enter("juliet", "room", resume_timeout="1s")
    watcher.send_raw("<presence><priority>-1</priority></presence>")
    await watcher.sync()
    say(romeo, juliet.jid, "seen, not acknowledged")
    romeo.send_raw(f"<iq type='get' id='v' to='{juliet.jid}'>{VERSION}</iq>")
    await juliet.next_message()
    watcher.forget()
    await juliet.cut()
    say(romeo, "juliet@localhost", "never seen")
    gone = await watcher.next_presence()
    assert (gone.sender, gone.type) == (juliet.jid, "unavailable")
    error = await romeo.next_stanza("iq")
    assert (error.id, error.condition) == ("v", "service-unavailable")
    romeo.request()
    await romeo.until_acked(3)
    assert await romeo.scene.stored("juliet") == 2
    watcher.send_raw("<presence><priority>1</priority></presence>")
    for body in ("seen, not acknowledged", "never seen"):
        message = await watcher.next_message()
        assert (message.body, message.delay.sender) == (body, "localhost")
    await expect_no_message(watcher)
    answer = await come_back(juliet)
    assert (condition(answer), answer.xml.get("h")) == ("item-not-found", "0")


async def test_a_session_that_ended_with_an_error_on_its_way_does_not_say_how_much_it_had(enter):
    """The count would say that the message is safe, and nobody would ever have heard of the error."""
    romeo = await enter("romeo", prompt=False, resume_timeout="1s")
    watcher = await enter("romeo", "hall", resume_timeout="1s")
    say(romeo, "nobody@localhost", "refused")
    error = await romeo.next_stanza("message")
    assert error.type == "error"
    watcher.forget()
    await romeo.cut()
    gone = await watcher.next_presence()
    assert (gone.sender, gone.type) == (romeo.jid, "unavailable")

    answer = await come_back(romeo)

    assert (condition(answer), answer.xml.get("h")) == ("item-not-found", None)


async def test_errors_that_it_has_acknowledged_do_not_matter(enter):
    romeo, watcher = await enter("romeo", resume_timeout="1s"), await enter("romeo", "hall", resume_timeout="1s")
    say(romeo, "nobody@localhost", "refused")
    assert (await romeo.next_stanza("message")).type == "error"
    await romeo.sync()
    romeo.acknowledge()
    await watcher.sync()
    watcher.forget()
    await romeo.cut()
    gone = await watcher.next_presence()
    assert (gone.sender, gone.type) == (romeo.jid, "unavailable")

    answer = await come_back(romeo)

    assert condition(answer) == "item-not-found"
    assert answer.xml.get("h") is not None


async def test_a_second_session_takes_over_what_the_first_leaves(enter):
    juliet, other = await enter("juliet", "a", prompt=False, resume_timeout="1s"), None
    romeo = await enter("romeo", resume_timeout="1s")
    other = await enter("juliet", "b", resume_timeout="1s")
    say(romeo, juliet.jid, "one", "two")
    await heard(juliet, 2)
    await juliet.cut()
    assert await heard(other, 2) == ["one", "two"]
    await expect_no_message(other)


async def test_who_waits_gets_a_copy_of_what_others_get(enter):
    short = {"resume_timeout": "2s"}
    romeo, juliet, other = (
        await enter("romeo", **short),
        await enter("juliet", "a", **short),
        await enter("juliet", "b", **short),
    )
    other.forget()
    await juliet.cut()
    say(romeo, "juliet@localhost", "one")
    assert await heard(other, 1) == ["one"]
    romeo.request()
    await romeo.until_acked(1)  # nobody waits for the copy
    await come_back(juliet)
    assert await heard(juliet, 1) == ["one"]
    await juliet.sync()
    await juliet.cut()
    say(romeo, "juliet@localhost", "two")
    assert await heard(other, 1) == ["two"]
    assert (await other.next_presence()).type == "unavailable"
    await expect_no_message(other)  # the copy is not sent again
    assert romeo.scene.stored_now("juliet") == 0


async def test_closing_properly_ends_the_session_and_keeps_what_was_not_acknowledged(enter):
    romeo, juliet = await enter("romeo"), await enter("juliet", prompt=False)
    say(romeo, "juliet@localhost", "one", "two")
    await heard(juliet, 2)
    juliet.acknowledge(1)
    await juliet.disconnect()
    assert await romeo.scene.stored("juliet") == 1
    romeo.request()
    await romeo.until_acked(2)


async def test_a_stream_that_cannot_be_resumed_loses_nothing_either(enter):
    romeo, juliet = await enter("romeo"), await enter("juliet", prompt=False, resume=False)
    say(romeo, "juliet@localhost", "one")
    await heard(juliet, 1)
    await juliet.cut()
    romeo.request()
    await romeo.until_acked(1)
    assert await romeo.scene.stored("juliet") == 1


async def test_a_stop_of_the_node_keeps_what_waits(fresh):
    scene = fresh()
    for user in ("romeo", "juliet"):
        scene.account(user)
    juliet = Managed(scene.node.certificate(), prompt=False)
    scene.adopt(juliet)
    await juliet.login(scene.node.tls_port, "juliet", PASSWORD)
    await juliet.become_available()
    await juliet.enable()
    await juliet.cut()
    romeo = await scene.login("romeo")
    romeo.send_message("juliet@localhost", "while she was away")
    await romeo.sync()
    assert scene.node.stop() == 0
    scene.node.start()
    assert scene.stored_now("juliet") == 1


# -- limits


@pytest.mark.parametrize(("limits", "size"), [({"max_ack_queue": 50}, 10), ({"max_ack_queue_size": "64KiB"}, 2000)])
@pytest.mark.parametrize("waits", [False, True])
async def test_a_client_that_acknowledges_nothing_is_let_go(enter, limits, size, waits):
    romeo, juliet = await enter("romeo", **limits), await enter("juliet", prompt=False, **limits)
    if waits:
        await juliet.cut()
    say(romeo, "juliet@localhost", *[f"{number:02d}{'x' * size}" for number in range(60)])
    if not waits:
        await juliet.assert_stream_error("policy-violation")
    romeo.request()
    await romeo.until_acked(60)  # nothing is lost, and nothing bounces
    assert await romeo.scene.stored("juliet") == 60
    assert condition(await come_back(juliet)) == "item-not-found"


async def test_a_client_that_does_not_answer_may_come_back(enter):
    romeo, juliet = await enter("romeo", ack_timeout="1s"), await enter("juliet", prompt=False, ack_timeout="1s")
    say(romeo, "juliet@localhost", "one")
    await juliet.assert_stream_error("connection-timeout")
    await juliet.cut()
    juliet.prompt = True
    assert (await come_back(juliet, h=0)).name == "resumed"
    assert await heard(juliet, 2) == ["one", "one"]
    romeo.request()
    await romeo.until_acked(1)


@pytest.mark.parametrize("behind", [1, 300])
async def test_offline_messages_do_not_wait_for_acknowledgements_behind_other_stanzas(enter, behind):
    """More than one window of them, and the client's own messages between its presence and its first <a/>."""
    romeo = await enter("romeo")
    romeo.scene.account("juliet")
    text = "x" * 20_000
    for number in range(60):
        romeo.send_message("juliet@localhost", f"{number} {text}")
    romeo.request()
    await romeo.until_acked(60)
    juliet = await enter("juliet", available=False)
    juliet.send_raw("<presence/>")
    say(juliet, "romeo@localhost", *[f"{number}{'y' * 2000}" for number in range(behind)])
    assert [body.partition(" ")[0] for body in await heard(juliet, 60)] == [str(number) for number in range(60)]
    await heard(romeo, behind)
