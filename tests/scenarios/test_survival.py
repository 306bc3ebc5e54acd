"""What was accepted is there after the next start, whether the last end was in order or not."""

import signal

import pytest

from tests.harness.scene import PASSWORD, together


@pytest.fixture(params=["SIGTERM", "SIGKILL"])
def again(request):
    """End the node and start it again."""

    def end(scene):
        if request.param == "SIGTERM":
            assert scene.node.stop(signal.SIGTERM) == 0
        else:
            scene.node.kill()
        scene.node.start()

    return end


async def test_accounts_rosters_and_messages_survive(fresh, again):
    scene = fresh()
    romeo = await scene.raw_login("romeo")
    scene.account("juliet")
    await romeo.query(
        "set",
        "<query xmlns='jabber:iq:roster'><item jid='juliet@localhost' name='J'><group>Love</group></item></query>",
    )
    for number in range(20):
        romeo.send_message("juliet@localhost", f"night {number}")
    await romeo.sync()
    assert await scene.stored("juliet") == 20
    await romeo.close()

    again(scene)

    juliet = await scene.raw_login("juliet")
    for number in range(20):
        message = await juliet.next_message()
        assert (message.body, message.is_delayed) == (f"night {number}", True)
    romeo = await scene.raw_login("romeo")
    roster = await romeo.query("get", "<query xmlns='jabber:iq:roster'/>")
    item = roster.payload[0]
    assert (item.get("jid"), item.get("name"), item[0].text) == ("juliet@localhost", "J", "Love")
    assert scene.node.quick("check_password", "romeo", "localhost", PASSWORD) == ""


async def test_a_delivered_offline_message_does_not_come_again(fresh, again):
    scene = fresh()
    romeo = await scene.raw_login("romeo")
    scene.account("juliet")
    romeo.send_message("juliet@localhost", "once")
    await scene.stored("juliet")
    juliet = await scene.raw_login("juliet")
    assert (await juliet.next_message()).body == "once"
    await juliet.disconnect()
    await scene.stored("juliet")  # what was to be deleted has been

    again(scene)

    juliet = await scene.raw_login("juliet")
    await juliet.expect_nothing()


async def test_clients_are_told_of_a_shutdown(fresh):
    scene = fresh()
    romeo = await scene.raw_login("romeo")
    stranger = await scene.connected()
    await stranger.open()
    scene.node.process.send_signal(signal.SIGTERM)
    await romeo.assert_stream_error("system-shutdown")
    await stranger.assert_stream_error("system-shutdown")
    assert scene.node.wait() == 0
    assert not (scene.node.data_dir / "ready.json").exists()


async def test_a_client_that_does_not_listen_does_not_hold_up_the_shutdown(fresh):
    scene = fresh(shutdown_grace="500ms")
    romeo = await scene.raw_login("romeo")
    romeo.stop_reading()
    assert scene.node.stop() == 0


async def test_the_subscription_survives(fresh, again):
    scene = fresh()
    romeo = await scene.raw_login("romeo", "orchard")
    juliet = await scene.raw_login("juliet", "balcony")
    romeo.send_presence("juliet@localhost", type="subscribe")
    assert (await juliet.next_presence()).type == "subscribe"
    juliet.send_presence("romeo@localhost", type="subscribed")
    assert (await romeo.next_presence()).type == "subscribed"
    assert (await romeo.next_presence()).sender == juliet.jid
    await romeo.close()
    await juliet.close()

    again(scene)

    juliet = await scene.raw_login("juliet", "balcony")
    romeo = await scene.raw_login("romeo", "orchard", available=False)
    romeo.send_presence()
    await together(romeo, juliet)
    assert "juliet@localhost/balcony" in [got.sender for got in romeo.forget(lambda got: got.name == "presence")]
