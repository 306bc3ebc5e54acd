"""What outlives a server's process, orderly ended or killed; and starts that are refused."""

import asyncio
import json
import re
import signal
import socket
import time

import pytest

from tests.harness.raw import Raw
from tests.harness.scene import PASSWORD
from tests.harness.server import Server

ROSTER, PRIVATE, VCARD = "jabber:iq:roster", "jabber:iq:private", "vcard-temp"
NOTE = "<note xmlns='urn:example:notes'>buy a dagger</note>"


async def stuck_login(scene, user):
    """A client that takes nothing any more, behind a window so small that the server's kernel must keep the rest."""
    scene.account(user)
    client = scene.raw()
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", scene.node.tls_port))
    client._reader, client._writer = await asyncio.open_connection(
        sock=sock, ssl=client.context, server_hostname="localhost"
    )
    client._listen()
    await client.authenticate(user, PASSWORD)
    await client.bind("stuck")
    await client.become_available()
    client.stop_reading()
    return client


async def bodies(client: Raw, count: int) -> list[str]:
    return [(await client.next_message()).body for _ in range(count)]


@pytest.mark.parametrize("end", [pytest.param("stop", marks=pytest.mark.long), "kill"])
async def test_what_was_stored_is_there_after_a_restart(fresh, end):
    scene = fresh()
    juliet, romeo = await scene.login("juliet"), await scene.login("romeo")
    scene.account("nurse")
    await juliet.query(
        "set", f"<query xmlns='{ROSTER}'><item jid='romeo@localhost' name='R.'><group>Lovers</group></item></query>"
    )
    juliet.send_presence("romeo@localhost", type="subscribe")
    await romeo.wait_for(lambda got: got.type == "subscribe", "the request")
    romeo.send_presence("juliet@localhost", type="subscribed")
    await juliet.wait_for(lambda got: got.type == "subscribed", "the approval")
    await juliet.query("set", f"<query xmlns='{PRIVATE}'>{NOTE}</query>")
    await juliet.query("set", f"<vCard xmlns='{VCARD}'><FN>Juliet Capulet</FN></vCard>")
    for number in range(5):
        romeo.send_message("nurse@localhost", f"commend me {number}")
    await romeo.sync()
    assert await scene.stored("nurse") == 5
    scene.account("mercutio")
    romeo.send_message("mercutio@localhost", "once")
    await romeo.sync()
    assert await scene.stored("mercutio") == 1
    mercutio = await scene.raw_login("mercutio")
    assert await bodies(mercutio, 1) == ["once"]
    await mercutio.disconnect()
    assert await scene.stored("mercutio") == 0  # it has been delivered, and its row deleted

    getattr(scene.node, end)()
    scene.node.start()
    juliet, romeo = await scene.login("juliet"), await scene.login("romeo")
    nurse = await scene.raw_login("nurse")

    item = (await juliet.query("get", f"<query xmlns='{ROSTER}'/>")).payload[0]
    assert (item.get("jid"), item.get("name"), item.get("subscription")) == ("romeo@localhost", "R.", "to")
    assert item[0].text == "Lovers"
    note = await juliet.query("get", f"<query xmlns='{PRIVATE}'><note xmlns='urn:example:notes'/></query>")
    assert note.payload[0].text == "buy a dagger"
    card = await romeo.query("get", f"<vCard xmlns='{VCARD}'/>", to="juliet@localhost")
    assert card.payload.findtext(f"{{{VCARD}}}FN") == "Juliet Capulet"
    assert await bodies(nurse, 5) == [f"commend me {number}" for number in range(5)]
    await nurse.expect_nothing()
    await (await scene.raw_login("mercutio")).expect_nothing()


async def test_an_orderly_end_tells_the_clients_and_stores_what_they_have_not_taken(fresh):
    scene = fresh(shutdown_grace=1)
    await stuck_login(scene, "juliet")
    romeo = await scene.raw_login("romeo")
    stranger = await scene.connected()
    await stranger.open()
    said = [f"{number} {'x' * 2000}" for number in range(100)]
    for body in said:
        romeo.send_message("juliet@localhost", body)
    await romeo.sync()

    stopping = asyncio.create_task(asyncio.to_thread(scene.node.stop))
    await romeo.assert_stream_error("system-shutdown")
    await stranger.assert_stream_error("system-shutdown")
    assert await stopping == 0
    assert not (scene.node.data_dir / "ready.json").exists()
    scene.node.start()
    juliet = await scene.raw_login("juliet")

    assert await bodies(juliet, 100) == said


async def test_messages_on_a_connection_that_is_reset_arrive_at_the_next_login(fresh):
    scene = fresh()
    juliet = await stuck_login(scene, "juliet")
    romeo = await scene.raw_login("romeo")
    said = [f"{number} {'x' * 2000}" for number in range(100)]
    for body in said:
        romeo.send_message("juliet@localhost", body)
    await romeo.sync()

    await juliet.close()  # with unread input: TCP resets
    juliet = await scene.raw_login("juliet")

    assert await bodies(juliet, 100) == said
    await romeo.expect_nothing()  # no error came back


async def test_messages_on_a_connection_that_is_reset_go_to_another_resource(server):
    phone = await stuck_login(server, "juliet")
    romeo = await server.raw_login("romeo")
    balcony = await server.raw_login("juliet", "balcony", priority=-1)
    said = [f"{number} {'x' * 2000}" for number in range(100)]
    for body in said:
        romeo.send_message("juliet@localhost", body)
    await romeo.sync()
    await balcony.become_available(1)

    await phone.close()

    assert await bodies(balcony, 100) == said


async def test_the_command_restart_keeps_the_process_and_ends_the_streams(fresh):
    scene = fresh()
    romeo = await scene.login("romeo")
    pid = scene.node.process.pid

    scene.node._end_batch()  # its node goes away
    scene.asked("restart")
    await romeo.assert_stream_error("system-shutdown")
    scene.node.wait_until_ready()

    assert scene.node.process.pid == pid
    again = await scene.login("romeo")
    await again.sync()


# -- starts that are refused


def refused(node: Server) -> tuple[int, str]:
    """Start a process on the same configuration, which must end by itself: its exit code and what it says."""
    done = node.second_start()
    return done.returncode, done.stdout + done.stderr


async def test_a_second_start_on_the_same_data_says_who_holds_it(fresh):
    scene = fresh()
    romeo = await scene.login("romeo")
    ready = (scene.node.data_dir / "ready.json").read_text()

    code, said = refused(scene.node)

    assert code == 16
    assert f"{scene.node.data_dir} is in use by process {scene.node.process.pid}" in said
    assert "Traceback" not in said
    await romeo.sync()
    assert (scene.node.data_dir / "ready.json").read_text() == ready
    assert scene.asked("status").startswith("The node xmppd@localhost is started")


async def test_a_taken_port_is_named_and_nothing_serves(fresh, free_port):
    scene = fresh(start=False)
    node, port = scene.node, free_port
    with socket.create_server(("127.0.0.1", port)):
        free, taken = node.options["listen"]
        node.configure({**node.options, "listen": [free, {**taken, "port": port}]})

        code, said = refused(node)

    assert code == 1
    assert re.search(rf"^xmppd: .*127\.0\.0\.1.*{port}.*in use", said, re.MULTILINE), said
    assert "Traceback" not in said
    assert not (node.data_dir / "ready.json").exists()
    node.start()  # the port is free again, and the data folder was left in order
    assert node.tls_port == port


def test_every_fault_of_a_configuration_is_named_before_anything_is_made(tmp_path):
    node = Server(tmp_path / "node")
    node.configure(
        {**node.options, "hostz": ["localhost"], "shutdown_grace": "soon", "modules": {"offline": {"max_mesages": 1}}}
    )

    code, said = refused(node)

    assert code == 10
    assert "hostz: unknown option. Did you mean hosts?" in said
    assert "shutdown_grace: " in said
    assert "Traceback" not in said
    assert not node.data_dir.exists()


def test_every_fault_of_the_modules_section_is_named(tmp_path):
    node = Server(tmp_path / "node")
    node.configure({**node.options, "modules": {"offline": {"max_mesages": 1}, "presense": {}, "presence": {}}})

    code, said = refused(node)

    assert code == 10
    assert "modules.offline.max_mesages: unknown option. Did you mean max_messages?" in said
    assert "modules.presense: unknown module. Did you mean presence?" in said
    assert "modules.presence: needs the module roster, which is not listed" in said
    assert "Traceback" not in said


def test_a_start_that_is_interrupted_leaves_the_data_in_order(tmp_path):
    node = Server(tmp_path / "node")
    node.from_nothing = True
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        node.launch()
        while not (node.data_dir / "lock").exists() and node.process.poll() is None:
            time.sleep(0.001)
        node.stop(number)

    node.start()

    assert json.loads((node.data_dir / "ready.json").read_text())["pid"] == node.process.pid
    assert node.stop() == 0
