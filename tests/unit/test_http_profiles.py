"""What web servers get that were written for other servers' modules: field by field, and byte by byte."""

import json
from pathlib import Path
from urllib.parse import parse_qsl

import pytest

from xmppd.outbox import PROFILES, About, Message, posted
from xmppd.protocol.stanza import Stanza

GOLDEN = json.loads((Path(__file__).parents[1] / "vectors" / "http_profiles.json").read_text())
XML = (
    "<message type='chat' id='a&amp;b=1' from='romeo@capulet.example/orchard' to='juliet@capulet.example'>"
    "<body xml:lang='de'>anders</body><body>&quot;Hi&quot; &amp; a=b+c&#10;50% ✓ \\ &lt;/message&gt;</body>"
    "<x xmlns='jabber:x:oob'><url>https://a.example/?a=1&amp;b=2</url></x>"
    "<request xmlns='urn:xmpp:receipts'/></message>"
)
TEXT = '"Hi" & a=b+c\n50% ✓ \\ </message>'


def made(profile, *, confidential=False, token="s3cr=t"):
    stanza = Stanza.from_bytes(XML.encode())
    assert stanza.from_ is not None
    assert stanza.to is not None
    message = Message(
        stanza,
        stanza.element,
        stanza.from_,
        stanza.to,
        stanza.to.full,
        "offline",
        "stored-offline",
        1795251600.25,
        confidential,
    )
    about = About("01KAJ5GZ3VG0004PHQ8X7T2Y5W", "capulet.example", "xmppd@test", token)
    return posted(profile, message, about)


def fields(request):
    text = request.payload.decode()
    return json.loads(text) if request.content_type == "application/json" else dict(parse_qsl(text))


@pytest.mark.parametrize("profile", PROFILES)
def test_or_10_a_request_is_the_recorded_one(profile):
    """OR-10"""
    request, golden = made(profile), GOLDEN[profile]

    assert [request.content_type, [list(each) for each in request.headers]] == [
        golden["content_type"],
        golden["headers"],
    ]
    assert request.payload.decode() == golden["payload"]
    assert fields(request) == golden["fields"]


@pytest.mark.parametrize("profile", PROFILES)
def test_or_10_nothing_in_a_text_breaks_a_request(profile):
    """OR-10"""
    said = fields(made(profile))

    text = said["body"][""] if profile == "json" else said.get("body", said.get("message"))
    assert text == TEXT


@pytest.mark.parametrize("profile", PROFILES)
def test_a_confidential_text_is_left_out(profile):
    request = made(profile, confidential=True)

    assert b"Hi" not in request.payload
    assert b"a.example/" not in request.payload
    assert b"juliet" in request.payload


@pytest.mark.parametrize("profile", PROFILES)
def test_there_is_no_empty_header_for_a_token_that_is_not_set(profile):
    assert "Authorization" not in dict(made(profile, token="").headers)
