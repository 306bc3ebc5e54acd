"""Bad input gets a clear error and harms nobody else."""

import os
import resource
import signal
import sqlite3

import pytest

from tests.harness.raw import header
from tests.harness.scene import PASSWORD, together, until
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
        ("<message to='juliet@localhost'/>text/>", "bad-format"),
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


async def test_a_missing_database_folder_is_named(fresh):
    scene = fresh(start=False, database={"url": "sqlite:////nonexistent/folder/xmppd.db"})
    with pytest.raises(NotServing, match="/nonexistent/folder"):
        scene.node.start()
    scene.node.expects_trouble = True


async def test_a_file_that_is_no_database_is_named(fresh):
    scene = fresh(start=False)
    scene.node.data_dir.mkdir(mode=0o700)
    (scene.node.data_dir / "xmppd.db").write_bytes(b"not a database at all" * 100)
    with pytest.raises(NotServing, match=r"xmppd\.db"):
        scene.node.start()
    scene.node.expects_trouble = True


async def test_a_locked_database_is_no_wrong_password_and_stops_no_chat(fresh):
    scene = fresh(database={"pool": {"timeout": "500ms"}})
    romeo = await scene.raw_login("romeo")
    juliet = await scene.raw_login("juliet")
    scene.account("nurse")
    with sqlite3.connect(scene.node.data_dir / "xmppd.db", isolation_level=None) as lock:
        lock.execute("PRAGMA locking_mode = EXCLUSIVE")
        lock.execute("BEGIN EXCLUSIVE")

        romeo.send_message("juliet@localhost", "still here")
        assert (await juliet.next_message()).body == "still here"
        id = romeo.send_message("nurse@localhost", "are you there?")
        answer = await romeo.next_message()
        assert (answer.id, answer.type, answer.error_type) == (id, "error", "wait")
        lock.execute("ROLLBACK")
    lock.close()

    id = romeo.send_message("nurse@localhost", "and now?")
    await until(lambda: scene.stored_now("nurse") == 1, "the message to be stored")
    nurse = await scene.raw_login("nurse")
    assert (await nurse.next_message()).body == "and now?"
    scene.node.expects_trouble = True


async def test_a_full_disk_is_told_to_the_sender(fresh):
    """The process may not write more than so much to a file: the database feels that like a full disk."""
    scene = fresh(start=False)
    scene.node.start()
    romeo = await scene.raw_login("romeo")
    juliet = await scene.raw_login("juliet")
    scene.account("nurse")
    await scene.stored("nurse")
    pid = scene.node.process.pid
    largest = max(path.stat().st_size for path in scene.node.data_dir.glob("xmppd.db*"))
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))

    refused = 0
    for _ in range(40):
        romeo.send_message("nurse@localhost", "x" * 100_000)
    await until(lambda: bool(refused_by(romeo)), "an error")
    refused = refused_by(romeo)[0]
    assert refused.error_type == "wait"

    romeo.send_message("juliet@localhost", "still here")
    assert (await juliet.next_message()).body == "still here"

    resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    await together(romeo)
    before = scene.stored_now("nurse")
    romeo.send_message("nurse@localhost", "and now?")
    await until(lambda: scene.stored_now("nurse") > before, "the message to be stored")
    scene.node.expects_trouble = True


def refused_by(client):
    return [got for got in client._inbox if got.type == "error"]


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
    scene = fresh()
    os.kill(scene.node.process.pid, signal.SIGTERM)
    assert scene.node.stop() == 0


async def test_passwords_stay_out_of_the_log(server):
    await server.raw_login("romeo")
    client = await server.encrypted()
    await client.open()
    await client.plain("romeo", "Wherefore art thou")
    log = server.node.log
    assert PASSWORD not in log
    assert "Wherefore" not in log
    assert header() not in log
