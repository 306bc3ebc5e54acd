"""What was delivered does not come again after a restart, and clients hear of an end (more in test_restart.py)."""

import signal

import pytest


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
