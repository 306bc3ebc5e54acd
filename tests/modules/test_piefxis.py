"""Accounts that move between servers in files (XEP-0227), over both databases."""

import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from lxml import etree

from tests.databases import Databases, opened
from tests.modules.world import HOST, Client, World, message
from xmppd.accountant import Accountant
from xmppd.auth import Auth
from xmppd.config import parse as parse_config
from xmppd.piefxis import Exporter, Importer, Report
from xmppd.storage import Storage

# What `ejabberdctl export_piefxis` of Debian's ejabberd 23.01 wrote (auth_password_format: scram), and prosody-migrator
# of Debian's Prosody 0.12: never edited.
RECORDED = Path(__file__).parents[1] / "vectors" / "piefxis-ejabberd-23.01"
MODULES = ("roster", "offline", "private", "vcard", "blocking")
PIE = "urn:xmpp:pie:0"


class House:
    """A world with all that moves, and what moves it."""

    def __init__(self, world: World, folder: Path) -> None:
        self.world = world
        self.folder = folder
        config = parse_config({"hosts": [HOST], "auth_scram": {"iterations": 4096}}, source="xmppd.yml")
        self.auth = Auth(world.accounts, config)
        self.accountant = Accountant(self.auth, world.accounts, world.manager, world.hooks)
        self.exporter = Exporter(world.accounts, world.hooks)
        self.importer = Importer(self.accountant, world.hooks, lambda: (HOST,))

    async def take(self, file: Path) -> Report:
        return await self.importer.take(file, _nobody)

    async def take_text(self, text: str, name: str = "file.xml") -> Report:
        (self.folder / name).write_text(text)
        return await self.take(self.folder / name)

    async def exported(self) -> str:
        """What the file of the host says."""
        folder = self.folder / f"out{len(list(self.folder.iterdir()))}"
        folder.mkdir()
        done = await self.exporter.export(folder, (HOST,), _nobody)
        assert done.problems.lines() == []
        (host,) = folder.glob(f"*_{HOST}.xml")
        assert all(file.stat().st_mode & 0o777 == 0o600 for file in folder.iterdir())
        return host.read_text()


async def _nobody(text: str) -> None:
    pass


async def _enter(stack: AsyncExitStack, storage: Storage, folder: Path) -> House:
    world = await stack.enter_async_context(World(storage))
    world.service = world.loader.service  # the real roster
    await world.load(**{name: {} for name in MODULES})
    house = House(world, folder)
    stack.callback(house.auth.close)
    return house


@pytest.fixture
async def house(sqlite_url: str, tmp_path: Path) -> AsyncIterator[House]:
    """Over SQLite."""
    async with opened(sqlite_url, tmp_path) as storage, AsyncExitStack() as stack:
        yield await _enter(stack, storage, tmp_path)


@pytest.fixture
async def any_house(any_url: str, tmp_path: Path) -> AsyncIterator[House]:
    """Over each database."""
    async with opened(any_url, tmp_path) as storage, AsyncExitStack() as stack:
        yield await _enter(stack, storage, tmp_path)


@pytest.fixture
async def other_house(databases: Databases, tmp_path: Path) -> AsyncIterator[House]:
    """An empty server, over SQLite."""
    folder = tmp_path / "other"
    folder.mkdir()
    url = await databases.migrated("sqlite", folder)
    async with opened(url, folder) as storage, AsyncExitStack() as stack:
        yield await _enter(stack, storage, folder)


async def done(client: Client, inner: str) -> None:
    answer = await client.ask("set", inner)
    assert answer.type == "result", answer.xml


def canonical(xml: str) -> str:
    """The same for what means the same."""
    return etree.canonicalize(xml.partition("?>")[2])


def user_file(inner: str, name: str = "juliet") -> str:
    return f"<server-data xmlns='{PIE}'><host jid='{HOST}'><user name='{name}'>{inner}</user></host></server-data>"


# -- from ejabberd


async def test_what_ejabberd_has_written_is_taken_up_whole(any_house):
    house = any_house
    report = await house.take(next(RECORDED.glob("*[0-9].xml")))

    assert report.lines() == [
        "accounts: 2, 2 new, 2 contacts, 2 offline messages, 1 private elements, 1 subscription requests, 1 vCards"
    ]
    assert await house.auth.check_password(HOST, "juliet", "rose")
    assert await house.auth.check_password(HOST, "romeo", "pass word")
    assert not await house.auth.check_password(HOST, "juliet", "thorn")
    juliet = await house.world.online("juliet")
    await house.world.until(lambda: len(juliet.bodies) == 2)
    assert juliet.bodies == ["Shall I hear more?", "It is <my> lady"]
    roster = await juliet.query("get", "<query xmlns='jabber:iq:roster'/>")
    assert {(item.get("jid"), item.get("name"), item.get("subscription")) for item in roster} == {
        (f"romeo@{HOST}", "Romeo", "both"),
        ("nurse@verona.example", "Nurse", "to"),
    }
    asked = [stanza for stanza in juliet.received if stanza.type == "subscribe"]
    assert [(stanza.from_.full, b"Ask for me" in stanza.xml) for stanza in asked] == [("mercutio@verona.example", True)]
    vcard = await juliet.query("get", "<vCard xmlns='vcard-temp'/>")
    assert vcard.findtext("{vcard-temp}FN") == "Juliet Capulet"
    private = await juliet.query("get", "<query xmlns='jabber:iq:private'><storage xmlns='storage:bookmarks'/></query>")
    assert private[0][0].get("name") == "Balcony"


async def test_taking_it_up_twice_changes_nothing(any_house):
    house = any_house
    await house.take(next(RECORDED.glob("*[0-9].xml")))
    before = await house.exported()

    report = await house.take(next(RECORDED.glob("*[0-9].xml")))

    assert report.created == 0
    assert report.problems.lines() == []
    assert {name: count for name, count in report.taken.items() if count} == {"private elements": 1, "vCards": 1}
    assert await house.exported() == before


# -- from Prosody


async def test_what_prosody_has_written_is_taken_up_whole(house):
    folder = RECORDED.parent / "piefxis-prosody-0.12"
    for file in folder.glob("*.xml"):
        (house.folder / file.name).write_bytes(file.read_bytes())
    includes = "".join(f"<xi:include href='{file.name}'/>" for file in sorted(folder.glob("*.xml")))

    report = await house.take_text(
        f"<server-data xmlns='{PIE}' xmlns:xi='http://www.w3.org/2001/XInclude'>{includes}</server-data>"
    )

    assert report.lines() == ["accounts: 2, 2 new, 1 contacts, 1 private elements"]
    assert await house.auth.check_password(HOST, "juliet", "rose")
    assert await house.auth.check_password(HOST, "romeo", "pass word")
    juliet = await house.world.online("juliet")
    (nurse,) = await juliet.query("get", "<query xmlns='jabber:iq:roster'/>")
    assert (nurse.get("name"), nurse[0].text) == ("Nurse", "House")


# -- there and back


async def test_an_export_taken_up_by_an_empty_server_is_exported_alike(any_house, other_house):
    house = any_house
    world = house.world
    await house.accountant.register(HOST, "romeo", "montague & co")
    await house.accountant.register(HOST, "juliet", "rose")
    romeo, juliet = await world.online("romeo"), await world.online("juliet")
    await done(juliet, "<query xmlns='jabber:iq:roster'><item jid='nurse@x.example' name='&lt;N'/></query>")
    await romeo.send(f"<presence to='juliet@{HOST}' type='subscribe'><status>Please</status></presence>")
    await done(juliet, "<vCard xmlns='vcard-temp'><FN>J &amp; J</FN><X xmlns='urn:x'><y/></X></vCard>")
    await done(
        juliet, "<query xmlns='jabber:iq:private'><a xmlns='urn:a' b='1'>c</a><p:q xmlns:p='urn:p'>r</p:q></query>"
    )
    await done(juliet, "<block xmlns='urn:xmpp:blocking'><item jid='tybalt@x.example'/></block>")
    juliet.lose()
    for number in range(5):
        await world.stored(await romeo.send(message(f"juliet@{HOST}", f"wait {number}", id=f"m{number}")))
    written = await house.exported()
    (other_house.folder / "in.xml").write_text(written)

    report = await other_house.take(other_house.folder / "in.xml")

    assert report.problems.lines() == []
    assert not report.unknown
    assert not report.bad
    assert canonical(await other_house.exported()) == canonical(written)
    for fact in ("Please", "J &amp; J", "tybalt@x.example", "wait 4", "urn:p", "SCRAM-SHA-256", "&lt;N"):
        assert fact in written
    assert await other_house.auth.check_password(HOST, "romeo", "montague & co")
    again = await other_house.world.online("juliet")
    await other_house.world.until(lambda: len(again.bodies) == 5)
    assert again.bodies == [f"wait {number}" for number in range(5)]


async def test_who_is_online_gets_imported_messages_and_no_other_account_is_touched(house):
    await house.accountant.register(HOST, "juliet", "her own")
    juliet = await house.world.online("juliet")

    await house.take_text(
        user_file(
            "<offline-messages>"
            "<message xmlns='jabber:client' from='romeo@x.example/a' type='chat'><body>later</body>"
            "<delay xmlns='urn:xmpp:delay' stamp='2020-01-02T03:04:06Z'/></message>"
            "<message xmlns='jabber:client' from='romeo@x.example/a' type='chat'><body>last</body>"
            "<delay xmlns='urn:xmpp:delay' stamp='2020-01-02T03:04:06Z'/></message>"
            "</offline-messages><scram-credentials xmlns='urn:xmpp:pie:0#scram' mechanism='SCRAM-SHA-1'/>"
        )
    )

    await house.world.until(lambda: len(juliet.bodies) == 2)
    assert juliet.bodies == ["later", "last"]
    assert await house.auth.check_password(HOST, "juliet", "her own")


# -- what may be wrong


async def test_what_is_wrong_with_one_account_is_reported_and_the_others_come_in(house):
    text = (
        f"<server-data xmlns='{PIE}'><host jid='{HOST}'><user name='a@b'/>"
        "<user name='romeo' password='rose'><query xmlns='jabber:iq:roster'>"
        "<item jid='@'/><item jid='ok@x.example'/></query>"
        "<pubsub xmlns='http://jabber.org/protocol/pubsub'/>"
        "<offline-messages><message xmlns='jabber:client' from='@'/><iq xmlns='jabber:client'/>"
        "</offline-messages></user>"
        "<user name='juliet'><scram-credentials xmlns='urn:xmpp:pie:0#scram' mechanism='SCRAM-SHA-1'>"
        "<iter-count>1</iter-count><salt>AAAA</salt><server-key>!</server-key><stored-key>AAAA</stored-key>"
        "</scram-credentials></user><muc xmlns='urn:else'/></host>"
        "<host jid='verona.example'><user name='x'/></host></server-data>"
    )

    report = await house.take_text(text)

    assert (report.accounts, report.created) == (4, 2)
    lines = "\n".join(report.lines())
    for said in (
        "a@b@", "contact left out", "message left out", "credentials left out: server-key is not base64",
        "juliet@capulet.example: no password", "x@verona.example: the host is not one of ours", "urn:else",
        "left out, no module takes it: 1 <pubsub/> in http://jabber.org/protocol/pubsub",
    ):  # fmt: skip
        assert said in lines
    assert await house.auth.check_password(HOST, "romeo", "rose")
    assert report.taken["contacts"] == 1


async def test_hosts_and_users_come_out_of_included_files_of_the_folder_alone(house, tmp_path):
    xi = "xmlns:xi='http://www.w3.org/2001/XInclude'"
    (tmp_path / "secret.xml").write_text(f"<user xmlns='{PIE}' name='outside'/>")
    folder = tmp_path / "in"
    (folder / HOST).mkdir(parents=True)
    (folder / f"{HOST}.xml").write_text(
        f"<host xmlns='{PIE}' {xi} jid='{HOST}'><xi:include href='{HOST}/jul%C3%AF%20et.xml'/>"
        "<xi:include href='../secret.xml'/><xi:include href='link.xml'/><xi:include href='main.xml'/>"
        "<xi:include href='/etc/passwd'/><xi:include href='http://127.0.0.1/x.xml'/><xi:include href='gone.xml'/>"
        "<xi:include href='main.xml' parse='text'/><user name='romeo'/></host>"
    )
    (folder / "link.xml").symlink_to(tmp_path / "secret.xml")
    (folder / HOST / "julï et.xml").write_text(
        f"<user xmlns='{PIE}' {xi} name='juliet'><xi:include href='card.xml'/>"
        f"<query xmlns='jabber:iq:private'><a xmlns='urn:a'><xi:include href='card.xml'/></a></query></user>"
    )
    (folder / HOST / "card.xml").write_text("<vCard xmlns='vcard-temp'><FN>J</FN></vCard>")
    (folder / "main.xml").write_text(f"<server-data xmlns='{PIE}' {xi}><xi:include href='{HOST}.xml'/></server-data>")

    report = await house.take(folder / "main.xml")

    assert sorted(await house.world.accounts.names(HOST)) == ["juliet", "romeo"]
    assert report.taken["vCards"] == 1
    written = await house.exported()
    assert "include" in written.partition("urn:a")[2].partition("</a>")[0]  # the user's own, as it was
    problems = "\n".join(report.lines())
    for said in ("secret.xml", "link.xml", "include each other", "/etc/passwd", "http://127", "gone.xml", "whole XML"):
        assert said in problems


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("<!DOCTYPE a [<!ENTITY x 'y'>]>" + user_file("&x;"), "document type", id="doctype"),
        pytest.param(
            "<!DOCTYPE a [<!ENTITY a 'aaaaaaaaaa'><!ENTITY b '&a;&a;&a;&a;&a;&a;&a;&a;'>"
            "<!ENTITY c '&b;&b;&b;&b;&b;&b;'>]>" + user_file("&c;" * 1000),
            "document type",
            id="bomb",
        ),
        pytest.param("<!DOCTYPE a SYSTEM 'file:///etc/passwd'>" + user_file(""), "document type", id="external"),
        pytest.param(
            "<!-- x --> <?y z?>\n<!DOCTYPE a SYSTEM 'gone.dtd'>" + user_file(""), "document type", id="behind"
        ),
        pytest.param("<?xml version='1.0' encoding='UTF-16'?><a/>", "its root is", id="encoding"),
        pytest.param("<!--" + "x" * 20_000 + "-->" + user_file(""), "no element", id="comment"),
        pytest.param("<other/>", "its root is", id="root"),
        pytest.param("", "not well-formed", id="empty"),
        pytest.param("<a>" * 10_000, "its root is", id="deep"),
    ],
)
async def test_a_hostile_file_is_refused(house, text, said):
    report = await house.take_text(text)

    assert said in report.bad
    assert await house.world.accounts.names(HOST) == []


async def test_nothing_is_read_but_the_files_themselves(house, tmp_path, monkeypatch):
    """A pipe in the place of what a document type refers to would hold its reader."""
    os.mkfifo(tmp_path / "trap.dtd")
    xi = "xmlns:xi='http://www.w3.org/2001/XInclude'"
    (tmp_path / "part.xml").write_text("<!DOCTYPE a SYSTEM 'trap.dtd'><vCard xmlns='vcard-temp'/>")
    monkeypatch.chdir(tmp_path)

    report = await house.take_text(user_file(f"<xi:include {xi} href='part.xml'/>"))

    assert report.taken["vCards"] == 0
    assert "document type" in "\n".join(report.lines())


async def test_what_stands_before_the_fault_is_taken_up(house):
    whole = user_file("<vCard xmlns='vcard-temp'/>")

    report = await house.take_text(whole.replace("</host>", "<user name='romeo'><oops></user></host>"))

    assert "not well-formed" in report.bad
    assert await house.world.accounts.names(HOST) == ["juliet"]


async def test_a_pipe_is_no_file(house, tmp_path):
    os.mkfifo(tmp_path / "pipe.xml")

    assert "no file" in (await house.take(tmp_path / "pipe.xml")).bad


async def test_an_export_overwrites_nothing(house, tmp_path):
    house.exporter._clock = lambda: 1e9
    await house.exporter.export(tmp_path, (HOST,), _nobody)
    files = {file.name: file.read_bytes() for file in tmp_path.glob("2001*")}

    with pytest.raises(FileExistsError):
        await house.exporter.export(tmp_path, (HOST,), _nobody)

    assert {file.name: file.read_bytes() for file in tmp_path.glob("*2001*")} == files


async def test_blocks_out_of_a_privacy_list_are_blocks(house):
    report = await house.take_text(
        user_file(
            "<query xmlns='jabber:iq:privacy'><default name='no'/><list name='no'>"
            "<item type='jid' value='tybalt@x.example' action='deny' order='1'/>"
            "<item type='jid' value='paris@x.example' action='deny' order='2'><iq/></item>"
            "<item action='allow' order='3'/></list><list name='more'/></query>"
        )
    )

    assert report.taken["blocked addresses"] == 1
    assert report.problems.count == 3
    assert '<item jid="tybalt@x.example"/>' in await house.exported()


@pytest.mark.long
async def test_a_large_file_is_not_held_in_memory(other_house):
    import resource

    def rss() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    card = f"<vCard xmlns='vcard-temp'><FN>{'x' * 15_000}</FN></vCard>"
    file = other_house.folder / "large.xml"
    with file.open("w") as out:
        out.write(f"<server-data xmlns='{PIE}'><host jid='{HOST}'>\n")
        out.writelines(f"<user name='u{number}'>{card}</user>\n" for number in range(6000))
        out.write("</host></server-data>")
    before = rss()

    report = await other_house.take(file)

    assert report.created == 6000
    assert report.taken["vCards"] == 6000
    assert rss() - before < 60 << 20 < file.stat().st_size
