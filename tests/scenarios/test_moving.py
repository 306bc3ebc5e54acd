"""What an operator does with data: back them up, put them back, move them, have old ones deleted."""

import json
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from tests.harness.scene import PASSWORD, until

RETENTION = {"every": "1s", "offline_messages": "1h", "dead_events": "2h"}


@pytest.fixture
def scene(fresh):
    """A node that looks for old rows every second."""
    return fresh(retention=RETENTION)


def accounts_in(file: str | Path) -> set[str]:
    with closing(sqlite3.connect(file)) as connection:
        return {name for (name,) in connection.execute("SELECT username FROM account")}


async def test_a_node_goes_back_to_its_backup_and_its_accounts_move(scene):
    node, folder = scene.node, scene.node.data_dir
    romeo = await scene.login("romeo")
    scene.account("juliet")
    romeo.send_message("juliet@localhost", "before the backup")
    await until(lambda: scene.stored_now("juliet") == 1, "the message to be stored")

    assert node.quick("backup", "first.db").startswith(f"{folder / 'first.db'}: ")

    assert "is there already" in node.quick("backup", "first.db")
    assert (folder / "first.db").stat().st_mode & 0o777 == 0o600
    node.quick("unregister", "juliet", "localhost")
    refused = scene.ctl("restore", "first.db")
    assert (refused.returncode, "1 sessions are there" in refused.stdout) == (32, True)
    (folder / "wrong.db").write_text("nothing")
    assert scene.ctl("restore", "wrong.db", "force").returncode == 31
    assert accounts_in(folder / "xmppd.db") == {"romeo"}

    identity = (folder / "node_id").read_text()
    node._end_batch()  # its node goes away
    said = scene.asked("--json", "restore", "first.db", "force")
    former = json.loads(said).partition("there before is in ")[2].partition(";")[0]
    await romeo.assert_stream_error("system-shutdown")
    node.wait_until_ready()

    assert accounts_in(former) == {"romeo"}
    assert (folder / "node_id").read_text() == identity
    juliet = await scene.login("juliet")
    assert (await juliet.next_message()).body == "before the backup"

    (folder / "out").mkdir()
    file, accounts = node.quick("export_piefxis", "out").split(": ")
    assert accounts == "2 accounts"
    node.quick("unregister", "romeo", "localhost")
    assert node.quick("import_piefxis", file) == "accounts: 2, 1 new"
    assert node.quick("check_password", "romeo", "localhost", PASSWORD) == ""
    assert node.quick("check_password", "romeo", "localhost", "wrong") == "Error: false"
    assert node.quick("export_piefxis_host", "out", "elsewhere.example") == "Error: unknown host: elsewhere.example"
    assert node.quick("import_piefxis", "gone.xml").startswith("Error: ")
    assert node.quick("delete_expired_messages") == node.quick("delete_old_messages", "30") == ""


async def test_what_is_older_than_the_configuration_says_goes(scene):
    now = int(time.time() * 1000)
    message = (
        "INSERT INTO spool (id, server_host, username, created_at, sender, stanza, free_since)"
        " VALUES (?, 'localhost', 'juliet', ?, 'romeo@localhost', '<message/>', ?)"
    )
    event = (
        "INSERT INTO outbox (id, sink, server_host, kind, partition_key, headers, payload, state, attempts, lease_node,"
        " lease_incarnation, created_at) VALUES (?, 's', 'localhost', 'k', 'p', '[]', '', 'dead', 1, 'n', 1, ?)"
    )
    with closing(sqlite3.connect(scene.node.data_dir / "xmppd.db", isolation_level=None, timeout=30)) as database:
        for number, minutes in enumerate((59, 61, 119, 121)):
            at = now - minutes * 60_000
            row_id = at.to_bytes(6, "big") + bytes((number, *range(9)))
            database.execute(message, (row_id, at, at))
            database.execute(event, (row_id, at))

        def left(table: str) -> list[int]:
            rows = database.execute(f"SELECT created_at FROM {table} ORDER BY created_at DESC")
            return [round((now - at) / 60_000) for (at,) in rows]

        await until(lambda: (left("spool"), left("outbox")) == ([59], [59, 61, 119]), "what is old to go")
