"""Names that are too long, that look like another's, or that are another's in other letters.

What the server does: a name is prepared (SASLprep, nodeprep: RFC 6122) wherever it comes in, so all spellings that
prepare to the same are one account, by whichever it is registered, logged in to, or written to. What looks alike and
does not prepare to the same (Latin and Cyrillic a) are two accounts with nothing in common. Strangers who register
themselves cannot mix such alphabets in a name; an operator can.
"""

import base64
import contextlib

import pytest

from tests.harness.raw import SASL
from tests.harness.scene import PASSWORD

ONE_ACCOUNT = [  # all of them juliet
    "Juliet",
    "ＪＵＬＩＥＴ",
    "juli\u00adet",
    "jul\u200diet",
    "\ufeffjuliet",
    "juliet\ufe0f",
]
LOOK_ALIKE = [  # and none of these
    "jul\u0456et",  # a Cyrillic i
    "julıet",  # without its dot
    "jul1et",
    "júliet",
    "ϳuliet",
    "juliet\u0335",
]
NOBODYS = [
    "jul iet",
    "juliet\u2028",
    "jul\u202eiet",  # right to left from here
    "juliet\u05d0",  # letters of both directions
    "juliet\U0001f600",  # not in Unicode 3.2
    "juliet@localhost",
    "juliet/x",
    "jul&iet",
    "jul'iet",
]


def plain(name, password=PASSWORD, authzid=""):
    secret = base64.b64encode(f"{authzid}\0{name}\0{password}".encode()).decode()
    return f"<auth xmlns='{SASL}' mechanism='PLAIN'>{secret}</auth>"


async def login_as(server, name, password=PASSWORD, authzid=""):
    """The address that was bound, or the condition."""
    client = await server.encrypted()
    await client.open()
    client.send_raw(plain(name, password, authzid))
    answer = await client.next()
    if answer.name == "success":
        await client.restart()
        await client.bind("x")
        await client.become_available()
        return client, client.jid
    with contextlib.suppress(IndexError):
        return client, answer.payload.tag.rpartition("}")[2]
    return client, ""


async def test_spellings_that_prepare_to_the_same_are_one_account(server):
    server.account("juliet")
    romeo = await server.raw_login("romeo")
    for name in ONE_ACCOUNT:
        done = server.ctl("register", name, "localhost", "mine now")
        assert "already registered" in done.stdout + done.stderr
        client, jid = await login_as(server, name)
        assert jid == "juliet@localhost/x"
        romeo.send_message(f"{name}@localhost", "which one?")
        assert (await client.next_message()).body == "which one?"
        await client.disconnect()


async def test_names_that_look_alike_are_different_accounts(server):
    server.account("juliet")
    juliet, romeo = await server.raw_login("juliet"), await server.raw_login("romeo")
    for name in LOOK_ALIKE:
        assert (await login_as(server, name))[1] == "not-authorized"  # nobody has it, and juliet's password is no help
        server.account(name, password="look alike")
        assert (await login_as(server, name))[1] == "not-authorized"
        client, jid = await login_as(server, name, "look alike")
        assert jid == f"{name.lower()}@localhost/x" != "juliet@localhost/x"
        romeo.send_message(f"{name}@localhost", "which one?")
        message = await client.next_message()
        client.send_message(romeo.jid, "not juliet")
        assert (await romeo.next_message()).sender == jid
        assert message.body == "which one?"
        # Nor may it speak as her, in whatever letters.
        assert (await login_as(server, name, "look alike", "juliet@localhost"))[1] == "invalid-authzid"
        client.send_raw("<message from='juliet@localhost' to='romeo@localhost'><body>it is me</body></message>")
        await client.assert_stream_error("invalid-from")
    await juliet.expect_nothing()
    await romeo.expect_nothing()


async def test_names_that_nobody_can_have(server):
    romeo = await server.raw_login("romeo")
    for name in NOBODYS:
        done = server.ctl("register", name, "localhost", PASSWORD)
        assert done.returncode != 0, name
        assert (await login_as(server, name))[1] in ("not-authorized", "malformed-request"), name
        if "@" not in name and "/" not in name and "&" not in name and "'" not in name:
            romeo.send_message(f"{name}@localhost", "hello?")
            assert (await romeo.next_message()).condition == "jid-malformed", name


async def test_strangers_register_no_look_alikes(served):
    server = await served(modules={"register": {"per_address": "none"}, "ping": {}})
    server.account("juliet")
    stranger = await server.encrypted()
    await stranger.open()
    for name, expected in [
        *((name, "conflict") for name in ONE_ACCOUNT),
        ("jul\u0456et", "not-acceptable"),
        ("ϳuliet", "not-acceptable"),
        ("Juliеt", "not-acceptable"),
        *((name, "not-acceptable") for name in NOBODYS if "&" not in name and "'" not in name),
    ]:
        form = f"<username>{name}</username><password>mine now</password>"
        assert await stranger.refusal("set", f"<query xmlns='jabber:iq:register'>{form}</query>") == expected, name
    assert (await login_as(server, "juliet"))[1] == "juliet@localhost/x"  # and its password is what it was


# -- lengths: a part has at most 1023 bytes (RFC 7622 3.3, 3.4), a domain what DNS allows: 253

AT = ["a" * 1023, "é" * 511 + "a", "宙" * 341]
OVER = ["a" * 1024, "é" * 512, "宙" * 341 + "a", "a" * 100_000]


@pytest.mark.parametrize("kind", ["message", "iq", "presence"])
async def test_addresses_at_and_over_every_limit(server, kind):
    romeo = await server.raw_login("romeo")
    type = {"message": "chat", "iq": "get", "presence": "subscribe"}[kind]
    inner = "<query xmlns='urn:example:x'/>" if kind == "iq" else ""

    async def answer(to):
        romeo.send_raw(f"<{kind} to='{to}' id='far' type='{type}'>{inner}</{kind}>")
        if kind == "presence":  # a request to nobody is met with silence, one to no address is not
            await romeo.sync()
            found = romeo.forget(lambda got: got.id == "far")
            return found[0].condition if found else "service-unavailable"
        return (await romeo.next_stanza(kind)).condition

    label = "a" * 62 + "."
    for part in AT:
        assert await answer(f"{part}@localhost") == "service-unavailable"
        assert await answer(f"nobody@localhost/{part}") == "service-unavailable"
    assert await answer(f"a@{label * 4}a") == "remote-server-not-found"  # 253
    for part in OVER:
        assert await answer(f"{part}@localhost") == "jid-malformed"
        assert await answer(f"nobody@localhost/{part}") == "jid-malformed"
        assert await answer(part) == "jid-malformed"
    assert await answer(f"a@{label * 4}abc") == "jid-malformed"
    assert await answer(f"a@{'a' * 64}.example") == "jid-malformed"
    await romeo.sync()


async def test_a_resource_at_and_over_its_limit(server):
    server.account("romeo")
    for resource in AT:
        client = await server.encrypted()
        await client.authenticate("romeo", PASSWORD)
        assert (await client.bind(resource)).type == "result"
        assert client.jid == f"romeo@localhost/{resource}"
        client.send_message(client.jid, "to myself")
        assert (await client.next_message()).sender == client.jid
        await client.disconnect()
    for resource in OVER[:3]:
        client = await server.encrypted()
        await client.authenticate("romeo", PASSWORD)
        assert (await client.bind(resource)).condition == "bad-request"
        assert (await client.bind("short")).type == "result"
        await client.disconnect()


async def test_user_names_at_and_over_their_limit(server):
    for name in AT:
        server.account(name)
        client, jid = await login_as(server, name)
        assert jid == f"{name}@localhost/x"
        await client.disconnect()
    for name in OVER[:3]:
        assert server.ctl("register", name, "localhost", PASSWORD).returncode != 0
        assert (await login_as(server, name))[1] in ("not-authorized", "malformed-request")


# -- forged


async def test_nested_forgeries_stay_what_their_sender_said(server):
    """However deep, and however the bytes are cut: the outer sender is true, and nothing inside becomes a stanza."""
    juliet, romeo = await server.raw_login("juliet"), await server.raw_login("romeo")
    forged = (
        "<message xmlns='jabber:client' from='nurse@localhost/x' to='juliet@localhost'><body>come</body>%s</message>"
    )
    wrappers = [
        "<forwarded xmlns='urn:xmpp:forward:0'>%s</forwarded>",
        "<received xmlns='urn:xmpp:carbons:2'><forwarded xmlns='urn:xmpp:forward:0'>%s</forwarded></received>",
        "<sent xmlns='urn:xmpp:carbons:2'><forwarded xmlns='urn:xmpp:forward:0'>%s</forwarded></sent>",
        "<result xmlns='urn:xmpp:mam:2'><forwarded xmlns='urn:xmpp:forward:0'>%s</forwarded></result>",
        "<error>%s</error>",
        "<stream:error>%s</stream:error>",
    ]
    for wrapper in wrappers:
        for levels in (1, 3, 9):
            inner = ""
            for _ in range(levels):
                inner = wrapper % (forged % inner)
            data = f"<message to='juliet@localhost' type='chat' id='w'>{inner}</message>".encode()
            for cut in (len(data), len(data) // 2, 40):
                romeo.send_raw(data[:cut])
                await romeo.drain()
                romeo.send_raw(data[cut:])
                message = await juliet.next_message()
                assert (message.sender, message.to, message.body) == (romeo.jid, "juliet@localhost", None)
    await juliet.expect_nothing()
    await romeo.expect_nothing()
