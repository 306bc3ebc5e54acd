"""Bad input gets a clear error and harms nobody else."""

import contextlib
import resource
import signal
import sqlite3

import pytest

from tests.harness.inbox import PATIENCE
from tests.harness.raw import header
from tests.harness.scene import PASSWORD, until
from tests.harness.server import NotServing


@pytest.fixture
async def witness(server):
    """Juliet, who must not notice any of it."""
    juliet = await server.raw_login("juliet", "balcony")
    yield juliet
    await juliet.expect_nothing()


@pytest.mark.parametrize(
    ("data", "condition"),
    [
        ("<message", None),
        ("<message></iq>", "not-well-formed"),
        ("<message to='juliet@localhost'><x:body/></message>", "not-well-formed"),
        ("<message to='nobody@localhost' type='headline'/>text/>", "bad-format"),
        ("<message xmlns='jabber:server' to='juliet@localhost'/>", "invalid-namespace"),
        ("<x:message xmlns:x='jabber:client' to='juliet@localhost'/>", "bad-namespace-prefix"),
        ("<messagex:message xmlns:messagex='jabber:&#99;lient' to='juliet@localhost'/>", "bad-namespace-prefix"),
        ("<foo/>", "unsupported-stanza-type"),
        ("<foo xmlns='urn:x'/>", "unsupported-stanza-type"),
        ("<!DOCTYPE a>", "not-well-formed"),
        ("<!-- a -->", "restricted-xml"),
        ("<?a b?>", "restricted-xml"),
        ("<message><body>&foo;</body></message>", "restricted-xml"),
        ("<message><body>\x00</body></message>", "not-well-formed"),
        (b"<message><body>\xff</body></message>", "not-well-formed"),
        ("<message from='juliet@localhost/balcony' to='juliet@localhost'/>", "invalid-from"),
        ("<message from='localhost' to='juliet@localhost'/>", "invalid-from"),
        ("<iq type='get' id='1'>" + "<a>" * 70, "policy-violation"),
        ("<iq type='get' id='1'>" + "<a/>" * 10_001 + "</iq>", "policy-violation"),
        ("".join(f"<message a{number}=''/>" for number in range(1_100)), "policy-violation"),
    ],
)
async def test_a_client_that_breaks_the_rules_loses_its_stream(server, witness, data, condition):
    romeo = await server.raw_login("romeo")
    romeo.send_raw(data)
    if condition is None:
        await romeo.close()
    else:
        romeo.forget()
        error = await romeo.wait_for(lambda got: got.name == "error", "a stream error")
        assert error.condition == condition
        await romeo.assert_closed()


@pytest.mark.parametrize(
    "to", ["@localhost", "a@", "a b@localhost", "juliet@localhost/", "x" * 1100 + "@localhost", ""]
)
@pytest.mark.parametrize("kind", ["message", "presence", "iq"])
async def test_an_address_that_is_none_is_named_so(server, witness, to, kind):
    romeo = await server.raw_login("romeo")
    inner = "<query xmlns='urn:x'/>" if kind == "iq" else ""
    type = {"iq": "get", "presence": "subscribe", "message": "chat"}[kind]
    romeo.send_raw(f"<{kind} to='{to}' id='bad' type='{type}'>{inner}</{kind}>")
    answer = await romeo.next_stanza(kind)
    assert (answer.id, answer.type, answer.condition, answer.error_type) == ("bad", "error", "jid-malformed", "modify")
    await romeo.sync()


@pytest.mark.parametrize(
    "stanza",
    [
        "<iq type='get'><query xmlns='jabber:iq:roster'/></iq>",
        "<iq type='ask' id='x'><query xmlns='jabber:iq:roster'/></iq>",
        "<iq id='x'><query xmlns='jabber:iq:roster'/></iq>",
        "<iq type='get' id='x' to='localhost'/>",
        "<iq type='set' id='x'><query xmlns='jabber:iq:roster'/><query xmlns='jabber:iq:roster'/></iq>",
        "<presence type='subscribe' id='x'/>",
        "<presence type='nonsense' id='x' to='juliet@localhost'/>",
        "<presence id='x'><priority>128</priority></presence>",
        "<presence id='x'><priority>high</priority></presence>",
    ],
)
async def test_a_stanza_that_makes_no_sense_is_a_bad_request(server, witness, stanza):
    romeo = await server.raw_login("romeo")
    romeo.send_raw(stanza)
    answer = await romeo.next_stanza()
    assert (answer.type, answer.condition) == ("error", "bad-request")
    await romeo.sync()


async def test_forged_messages_inside_are_just_text(server):
    juliet = await server.raw_login("juliet")
    romeo = await server.raw_login("romeo")
    forged = "<message xmlns='jabber:client' from='nurse@localhost' to='juliet@localhost'><body>forged</body></message>"
    romeo.send_message("juliet@localhost", inner=f"<forwarded xmlns='urn:xmpp:forward:0'>{forged}</forwarded>")
    message = await juliet.next_message()
    assert message.sender == romeo.jid
    await juliet.expect_nothing()


async def test_a_flood_of_errors_is_survived(server, witness):
    romeo = await server.raw_login("romeo")
    for number in range(2_000):
        romeo.send_raw(f"<message to='nowhere{number}.invalid' id='{number}'/>")
    await romeo.sync()
    assert len(romeo.forget()) == 2_000


# -- the database


async def test_a_database_that_cannot_be_made_is_named(fresh, tmp_path):
    (tmp_path / "file").touch()
    scene = fresh(start=False, database={"url": f"sqlite:///{tmp_path}/file/xmppd.db"})
    with pytest.raises(NotServing, match=r"file/xmppd\.db|file is|/file"):
        scene.node.start()
    scene.node.expects_trouble = True


async def test_a_file_that_is_no_database_is_named(fresh):
    scene = fresh(start=False)
    scene.node.data_dir.mkdir(mode=0o700)
    (scene.node.data_dir / "xmppd.db").write_bytes(b"not a database at all" * 100)
    with pytest.raises(NotServing, match=r"xmppd\.db"):
        scene.node.start()
    scene.node.expects_trouble = True


@contextlib.contextmanager
def locked(path):
    """Another process's writer that does not end."""
    connection = sqlite3.connect(path, isolation_level=None, timeout=PATIENCE)
    try:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")
    finally:
        connection.close()


async def test_a_locked_database_stops_no_chat_and_loses_no_message(fresh):
    scene = fresh()
    romeo = await scene.raw_login("romeo")
    juliet = await scene.raw_login("juliet")
    scene.account("nurse")
    with locked(scene.node.data_dir / "xmppd.db"):
        kept = romeo.send_message("nurse@localhost", "are you there?")
        romeo.send_message("juliet@localhost", "still here")
        assert (await juliet.next_message()).body == "still here"
        assert scene.stored_now("nurse") == 0
        peter = await scene.raw_login("romeo", "garden")  # who can be asked can log in
        await peter.sync()

    await until(lambda: scene.stored_now("nurse") == 1, "the message to be stored")
    nurse = await scene.raw_login("nurse")
    assert (await nurse.next_message()).id == kept
    await romeo.sync()
    assert [got for got in romeo.forget() if got.type == "error"] == []
    scene.node.expects_trouble = True


async def test_a_full_disk_stops_no_chat_and_loses_no_message(fresh):
    """The process may not write more than so much to a file, which the database feels like a full disk."""
    scene = fresh()
    romeo = await scene.raw_login("romeo")
    juliet = await scene.raw_login("juliet")
    scene.account("nurse")
    await scene.stored("nurse")
    pid = scene.node.process.pid
    largest = max(path.stat().st_size for path in scene.node.data_dir.glob("xmppd.db*"))
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))

    sent = [romeo.send_message("nurse@localhost", "x" * 100_000) for _ in range(20)]
    await until(lambda: "writes wait for the database" in scene.node.log, "the disk to be full")
    romeo.send_message("juliet@localhost", "still here")
    assert (await juliet.next_message()).body == "still here"
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    await until(lambda: scene.stored_now("nurse") == 20, "the messages to be stored")
    nurse = await scene.raw_login("nurse")
    assert [(await nurse.next_message()).id for _ in range(20)] == sent
    await romeo.sync()
    assert romeo.forget() == []
    scene.node.expects_trouble = True


# -- a second start


async def test_a_second_start_on_the_same_data_says_who_holds_it(fresh):
    scene = fresh()
    second = scene.node.second_start()
    assert second.returncode == 16
    assert str(scene.node.process.pid) in second.stderr
    assert str(scene.node.data_dir) in second.stderr
    romeo = await scene.raw_login("romeo")
    await romeo.sync()


async def test_a_port_in_use_is_named(fresh):
    first = fresh()
    port = first.node.port
    second = fresh(start=False)
    second.node.options["listen"][0]["port"] = port
    second.node.configure({key: value for key, value in second.node.options.items() if key != "data_dir"})
    with pytest.raises(NotServing, match=f"port {port}"):
        second.node.start()
    second.node.expects_trouble = True


async def test_a_wrong_option_is_named(fresh):
    scene = fresh(start=False, resource_conflikt="acceptnew")
    with pytest.raises(NotServing, match=r"resource_conflikt.*resource_conflict"):
        scene.node.start()


async def test_signals_in_a_row_stop_it_once(fresh):
    scene = fresh(shutdown_grace=1)
    romeo = await scene.raw_login("romeo")
    romeo.stop_reading()
    scene.node.process.send_signal(signal.SIGTERM)
    await until(lambda: "stopping" in scene.node.log, "it to begin to stop")
    assert scene.node.stop() == 0  # with another one, while romeo is waited for
    assert "stopped" in scene.node.log


async def test_passwords_stay_out_of_the_log(server):
    await server.raw_login("romeo")
    client = await server.encrypted()
    await client.open()
    await client.plain("romeo", "Wherefore art thou")
    log = server.node.log
    assert PASSWORD not in log
    assert "Wherefore" not in log
    assert header() not in log
