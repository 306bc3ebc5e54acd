"""What a login costs the database, on a node that remembers nothing yet."""

import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.databases import Databases
from tests.harness.inbox import Got
from tests.harness.scene import Scene

MOST = 4  # statements
BACKGROUND = ("cluster beat", "members", "group commit")  # tasks that go on whoever logs in


@pytest.fixture(params=["sqlite", pytest.param("mariadb", marks=(pytest.mark.mariadb, pytest.mark.long))])
async def database(request: pytest.FixtureRequest, databases: Databases, tmp_path: Path) -> AsyncIterator[str]:
    url = await databases.migrated(request.param, tmp_path)
    yield url
    databases.drop(url)


class Told:
    """The statements of a node (told_statements.py)."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.prefix = (sys.executable, "-m", "tests.scenarios.told_statements", str(file))
        self._seen = 0

    def new(self) -> list[str]:
        """Those since the last call that nobody's clock has made."""
        lines = self._file.read_text().splitlines()
        told = [json.loads(line) for line in lines[self._seen :]]
        self._seen = len(lines)
        return [statement for task, statement in told if not task.startswith(BACKGROUND)]


async def log_in(scene: Scene, messages: int = 0) -> list[Got]:
    """As clients do: roster, bookmarks, presence; what was stored comes."""
    romeo = await scene.raw_login("romeo", available=False)
    roster = await romeo.query("get", "<query xmlns='jabber:iq:roster'/>")
    assert [item.get("jid") for item in roster.payload] == ["juliet@localhost"]
    bookmarks = await romeo.query(
        "get", "<query xmlns='jabber:iq:private'><storage xmlns='storage:bookmarks'/></query>"
    )
    assert len(bookmarks.payload[0]) == 1
    await romeo.become_available()
    await romeo.query("get", "<ping xmlns='urn:xmpp:ping'/>", to="localhost")
    return [await romeo.next_message() for _ in range(messages)]


async def test_a_login_on_a_cold_node_is_four_statements(fresh, database, tmp_path):
    told = Told(tmp_path / "statements")
    scene: Scene = fresh(start=False, database={"url": database})
    scene.node.start(*told.prefix)
    romeo, juliet = await scene.raw_login("romeo"), await scene.raw_login("juliet")
    await romeo.query("set", "<query xmlns='jabber:iq:roster'><item jid='juliet@localhost'/></query>")
    bookmarks = "<storage xmlns='storage:bookmarks'><conference jid='verona@conference.localhost'/></storage>"
    await romeo.query("set", f"<query xmlns='jabber:iq:private'>{bookmarks}</query>")
    await scene.leave()
    scene.node.stop()
    scene.node.start(*told.prefix)

    told.new()
    await log_in(scene)
    cold = told.new()

    await scene.leave()
    juliet = await scene.raw_login("juliet")
    for number in range(3):
        juliet.send_raw(f"<message to='romeo@localhost' type='chat' id='m{number}'><body>{number}</body></message>")
    await scene.stored("romeo")
    told.new()
    messages = await log_in(scene, 3)
    with_messages = told.new()

    assert len(cold) <= MOST, "\n".join(cold)
    assert [message.body for message in messages] == ["0", "1", "2"]
    taking = [statement for statement in with_messages if statement not in cold]
    assert len([one for one in taking if one not in ("BEGIN IMMEDIATE", "START TRANSACTION", "COMMIT")]) <= 3, taking
    assert len(with_messages) <= MOST + 6, "\n".join(with_messages)
