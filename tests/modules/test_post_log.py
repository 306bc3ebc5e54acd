"""post_log: which messages are posted, and in what form."""

import asyncio
import hashlib
import json
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from tests.harness.sink import WebSink
from tests.modules.world import HOST, World, message
from xmppd.admin.outbox_commands import OutboxCommands
from xmppd.admin.registry import commands_of
from xmppd.errors import ConfigError
from xmppd.outbox import verify

JULIET, ROMEO = f"juliet@{HOST}", f"romeo@{HOST}"


@pytest.fixture
async def sink() -> AsyncIterator[WebSink]:
    async with WebSink() as sink:
        yield sink


async def post_log(world: World, sink: WebSink, **options: Any) -> None:
    """Loaded beside offline, with romeo and juliet registered."""
    await world.outbox.start()
    await world.load(offline={}, post_log={"url": sink.url, **options})
    await world.account("romeo", "juliet")
    # until the first look into the database events go through it, which is slower and no other
    await world.until(lambda: not any(runner.more for runner in world.outbox.runners.values()))


def texts(sink: WebSink) -> list[str]:
    return [match[1].decode() for post in sink.taken if (match := re.search(rb"<body[^>]*>(.*?)</body>", post.body))]


async def test_json_says_all_there_is(world, sink):
    await post_log(world, sink, format="json", headers=[["X-Site", "verona"]])
    romeo = await world.online("romeo", "orchard")
    inner = (
        "<thread>t</thread><origin-id xmlns='urn:xmpp:sid:0' id='o1'/><body xml:lang='de'>hallo</body>"
        "<x xmlns='jabber:x:oob'><url>https://a.example/b</url></x>"
    )

    await romeo.send(message(JULIET, 'say "hi" & go', "m1", inner).replace("& go", "&amp; go"))

    (post,) = await sink.wait(1)
    said = json.loads(post.body)
    assert said.pop("xml").startswith("<message")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", said.pop("ts"))
    assert said.pop("id") == post.key
    assert said == {
        "v": 1,
        "kind": "message",
        "direction": "sent",
        "host": HOST,
        "node": "xmppd@test",
        "type": "chat",
        "stanza_id": "m1",
        "origin_id": "o1",
        "archive_id": None,
        "from": {"jid": f"{ROMEO}/orchard", "user": "romeo", "host": HOST, "resource": "orchard"},
        "to": {"jid": JULIET, "user": "juliet", "host": HOST, "resource": None},
        "body": {"": 'say "hi" & go', "de": "hallo"},
        "thread": "t",
        "oob": ["https://a.example/b"],
        "state": "accepted",
    }
    assert (post["Content-Type"], post["X-Site"]) == ("application/json", "verona")


async def test_a_signature_is_verified_by_who_knows_one_of_the_secrets(world, sink):
    """PL-07"""
    await post_log(world, sink, secret=["new secret", "old secret"])
    romeo = await world.online("romeo")

    await romeo.send(message(JULIET))

    (post,) = await sink.wait(1)
    signature = post["X-Xmppd-Signature"]
    now = int(signature[2:].partition(",")[0])
    for secret, good in (("new secret", True), ("old secret", True), ("no secret", False)):
        assert verify(secret, post.body, signature, now) is good
    assert not verify("new secret", post.body + b" ", signature, now)
    assert not verify("new secret", post.body, signature, now + 3600)


@pytest.mark.parametrize("url", [None, "loaclhost", "ftp://a.example/", "http://no such host/", "http://[::1/"])
async def test_a_wrong_url_stops_the_module_and_not_the_chat(world, sink, caplog, url):
    """PL-06"""
    await world.load(post_log={} if url is None else {"url": url})
    romeo, juliet = await world.online("romeo"), await world.online("juliet")

    await romeo.send(message(JULIET, "hello"))

    assert juliet.bodies == ["hello"]
    (record,) = [each for each in caplog.records if "messages are not posted" in each.getMessage()]
    assert "option=modules.post_log.url" in record.getMessage()


async def test_a_name_without_an_address_is_told_at_once_and_tried_again(world, sink, caplog):
    await world.load(post_log={"url": "http://loaclhost.invalid/"})

    await world.until(lambda: "sink has no address" in caplog.text)

    assert "post_log" in world.outbox.runners


async def test_only_what_was_asked_for_is_posted(world, sink):
    await post_log(world, sink, types=["chat", "normal"], skip_blank_id=True)
    romeo = await world.online("romeo")

    await romeo.send(message(JULIET, "typing", " "))
    await romeo.send(message(JULIET, None, "m1", "<subject>no body</subject>"))
    await romeo.send(message(f"room@conference.{HOST}", "a room", "m2", type="groupchat"))
    await romeo.send(message(JULIET, "no id", None))
    await romeo.send(message(JULIET, "normal", "m3", type="normal"))

    await sink.wait(2)
    assert texts(sink) == ["no id", "normal"]


async def test_a_body_is_not_required_where_that_is_said(world, sink):
    await post_log(world, sink, require_body=False)
    romeo = await world.online("romeo")

    await romeo.send(message(JULIET, None, "m1", "<received xmlns='urn:xmpp:receipts' id='x'/>"))

    (post,) = await sink.wait(1)
    assert b"<received xmlns='urn:xmpp:receipts' id='x'/>" in post.body


@pytest.mark.parametrize("form", ["ejabberd", "json"])
async def test_of_confidential_messages_length_and_hash_are_told(world, sink, form):
    await post_log(world, sink, format=form, confidential=True)
    romeo = await world.online("romeo")

    await romeo.send(message(JULIET, "secret", "m1", "<subject>secret</subject><x xmlns='urn:x'>secret</x>"))

    (post,) = await sink.wait(1)
    assert re.search(rb"""[>"]secret[<"]""", post.body) is None
    assert hashlib.sha256(b"secret").hexdigest().encode() in post.body
    told = re.search(rb"""length['"]?[=:]['"]?6\b""", post.body)
    assert told is not None


async def test_who_receives_and_who_is_absent_is_told_too(world, sink):
    await post_log(world, sink, format="json", directions=["sent", "received", "offline"])
    romeo, juliet = await world.online("romeo"), await world.online("juliet", "balcony")

    await romeo.send(message(JULIET, "here"))
    await sink.wait(2)
    world.sweep()  # she has it
    juliet.lose()
    for _ in range(3):
        await world.stored(await romeo.send(message(JULIET, "absent")))
    await romeo.send(message(f"nobody@{HOST}", "nobody"))

    posts = [json.loads(post.body) for post in await sink.wait(7)]
    told = sorted((post["direction"], post["body"][""], post["to"]["resource"] or "", post["state"]) for post in posts)
    assert told == [
        ("offline", "absent", "", "stored-offline"),  # once: a client that sends a message again has it stored once
        ("received", "here", "balcony", "sent"),
        *[("sent", "absent", "", "accepted")] * 3,
        ("sent", "here", "", "accepted"),
        ("sent", "nobody", "", "accepted"),
    ]
    assert len(await world.rows()) == 1


async def test_with_commit_a_message_goes_on_only_once_its_event_is_written(world, sink):
    world.outbox.durability = "commit"
    await post_log(world, sink)
    sink.hold = asyncio.Event()
    romeo, juliet = await world.online("romeo"), await world.online("juliet")

    await romeo.send(message(JULIET, "hello"))

    assert juliet.bodies == ["hello"]
    (listed,) = await world.outbox.listed("post_log", "pending", 10)
    assert listed.kind == "message.sent"
    sink.hold.set()
    await sink.wait(1)


async def test_a_sender_can_be_made_to_wait_for_room(world, sink):
    world.outbox.when_full, world.outbox.settings = "slow_sender", replace(world.outbox.settings, max_events=2)
    await post_log(world, sink)
    sink.hold = asyncio.Event()
    romeo, juliet = await world.online("romeo"), await world.online("juliet")

    sent = [asyncio.create_task(romeo.send(message(JULIET, f"{n}"))) for n in range(5)]
    await world.until(lambda: len(juliet.bodies) >= 2)
    await asyncio.sleep(0.05)
    assert len(juliet.bodies) < 5
    sink.hold.set()

    await asyncio.gather(*sent)
    await sink.wait(5)
    assert sorted(body for body in juliet.bodies if body) == list("01234")


async def test_options_of_erlangs_http_client_count_where_they_can(world, sink, caplog):
    options = [{"timeout": 500}, {"autoredirect": False}, {"ssl": [{"verify": "verify_none"}]}]
    await post_log(world, sink, http_options=options, req_options=[{"body_format": "binary"}])
    target = world.outbox.runners["post_log"].sink.target

    assert (target.timeout, target.verify) == (0.5, False)
    assert "req_options.body_format, http_options.autoredirect" in caplog.text


async def test_operators_see_pause_and_retry(world, sink):
    world.registry.register("core", commands_of(OutboxCommands(world.outbox, "xmppd@test")))
    sink.answer = 404
    await post_log(world, sink)
    romeo = await world.online("romeo")
    await romeo.send(message(JULIET))

    async def dead() -> bool:
        return (await world.command("outbox status"))[0][5] == 1

    await world.until_true(dead)
    (row,) = await world.command("outbox list", "post_log", "dead")
    assert row[1:5] == ("post_log", HOST, "message.sent", "dead")
    assert row[8] == "HTTP 404"
    sink.answer = 200
    await world.command("outbox pause", "post_log")
    assert await world.command("outbox retry") == 1
    ((_, _, state, queued, *_),) = await world.command("outbox status", "post_log")
    assert (state, queued, sink.taken) == ("paused", 1, [])
    await world.command("outbox resume", "post_log")

    await sink.wait(1)
    assert await world.command("outbox purge", "all") == 0


async def test_an_unloaded_module_leaves_its_events_for_the_next_one(world, sink):
    sink.answer = 503
    await post_log(world, sink)
    romeo = await world.online("romeo")
    await romeo.send(message(JULIET, "left"))
    await sink.until(lambda: sink.posts)

    await world.loader.reload("post_log")
    sink.answer = 200

    await sink.wait(1)
    assert texts(sink) == ["left"]


async def test_several_sinks_each_get_the_message_in_their_own_form(world, sink, tmp_path):
    file = tmp_path / "messages.ndjson"
    sinks = [
        {"name": "archive", "file": str(file)},
        {"name": "statistics", "url": sink.url, "format": "ndjson_batch", "confidential": True},
        {"name": "broken", "url": "loaclhost"},
    ]
    await post_log(world, sink, sinks=sinks)
    romeo = await world.online("romeo")

    for number in range(20):
        await romeo.send(message(JULIET, f"n{number:02}"))
        if number == 9:
            await world.until(lambda: file.exists() and file.read_text().count("\n") == 10)
            file.rename(tmp_path / "older")

    await world.until(lambda: file.exists() and file.read_text().count("\n") == 10)
    lines = ((tmp_path / "older").read_text() + file.read_text()).splitlines()
    assert [json.loads(line)["body"][""] for line in lines] == [f"n{number:02}" for number in range(20)]
    await sink.until(lambda: sum(post.body.count(b"\n") for post in sink.taken) == 20)
    await sink.until(lambda: sum(b"<message" in post.body for post in sink.taken) == 20)
    batches = [post for post in sink.taken if post["Content-Type"] == "application/x-ndjson"]
    assert all(json.loads(line)["body"][""]["length"] == 3 for post in batches for line in post.body.splitlines())
    assert sorted(world.outbox.runners) == ["post_log", "post_log.archive", "post_log.statistics"]


async def test_a_file_that_cannot_be_written_is_tried_again(world, sink, tmp_path):
    folder = tmp_path / "later"
    await world.outbox.start()
    await world.load(post_log={"sinks": [{"name": "file", "file": str(folder / "messages")}]})
    romeo = await world.online("romeo")
    await romeo.send(message(JULIET, "hello"))
    await world.until(lambda: world.outbox.runners["post_log.file"].failed)

    folder.mkdir()

    await world.until(lambda: (folder / "messages").exists() and (folder / "messages").read_text().endswith("\n"))


@pytest.mark.parametrize(
    ("sinks", "words"),
    [
        ([{"name": "a"}], "sinks[0]: expected one of url, file, database and jid"),
        ([{"name": "a", "file": "/a", "jid": "a@b"}], "sinks[0]: expected one of url, file, database and jid"),
        ([{"name": "a", "url": "http://a/"}, {"name": "a", "url": "http://a/"}], "sinks[1].name: a is there twice"),
        ([{"name": "A b", "url": "http://a/"}], "sinks[0].name: expected"),
        ([{"name": "a", "file": "/a", "format": "ejabberd"}], "sinks[0].format: a file has lines of JSON"),
        ([{"name": "a", "database": "postgres://a/b"}], "sinks[0].database: expected sqlite:///FILE or mysql://"),
        ([{"name": "a", "database": "sqlite:///{data_dir}/b"}], "sinks[0].database: expected the whole path"),
        ([{"name": "a", "database": "sqlite:////b", "table": "a b"}], "sinks[0].table: expected up to 64"),
        ([{"name": "a", "jid": "a@b@c"}], "sinks[0].jid: "),
        ([{"name": "a", "jid": "a@b", "confidential": True}], "sinks[0].confidential: messages are forwarded whole"),
        ([{"name": "a", "jid": "a@b", "format": "ejabberd"}], "sinks[0].format: messages are forwarded as they are"),
        ([{"name": "a", "ulr": "http://a/"}], "sinks[0].ulr"),
    ],
)
async def test_sinks_that_make_no_sense_are_refused(world, sinks, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        await world.load(post_log={"sinks": sinks})


async def test_a_form_is_that_of_the_profile_it_names(world, sink):
    profiles = ("codepond", "codepond_json", "zeropush", "kadekm", "rbt", "mongoose")
    sinks = [
        {"name": name, "url": f"{sink.url}/{name}", "format": f"form:{name}", "token": "t0ken"} for name in profiles
    ]
    await world.outbox.start()
    await world.load(offline={}, post_log={"sinks": sinks})
    await world.account("romeo", "juliet")
    romeo = await world.online("romeo", "orchard")

    await romeo.send(message(JULIET, "a=1 &amp; b", "m1"))

    posts = {post.path.rpartition("/")[2]: post for post in await sink.wait(len(profiles))}
    assert set(posts) == set(profiles)
    assert posts["rbt"].body == b"from=romeo&to=juliet&message_id=m1&body=a%3D1+%26+b"
    assert posts["rbt"]["Authorization"] == "t0ken"
    assert posts["rbt"]["Content-Type"] == "application/x-www-form-urlencoded"
    assert b"auth_token=t0ken" in posts["zeropush"].body
    assert posts["mongoose"].body == b"author=romeo&server=capulet.example&receiver=juliet&message=a%3D1+%26+b"
    assert json.loads(posts["kadekm"].body)["from"] == {"username": "romeo", "server": HOST, "resource": "orchard"}
    assert posts["codepond_json"]["Logged-Out"] == "true"
