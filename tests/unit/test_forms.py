"""Messages as ejabberd's XML: what is made out of bytes alone is what would be made of the parsed message."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xmppd.sender import forms
from xmppd.sender.forms import Form, ejabberd_xml

TO, FROM = "juliet@localhost", "romeo@localhost/orchard"
SIMPLE = [
    '<message to="juliet@localhost" type="chat" id="m1" from="romeo@localhost/orchard"><body>Hi</body></message>',
    "<message to='juliet@localhost' type='chat' id='m1'><body>Hi</body></message>",
    "<message><body>Hi</body></message>",
    '<message id=""><body>Hi</body></message>',
    '<message xml:lang="de" id="a>b"><body>O &amp; O &lt;3 > "quoted" \'too\' &quot;&apos;</body></message>',
    '<message to="juliet@localhost"><body> \n\t ünï 𝄞</body></message>',
]
OTHERS = [
    '<message to="juliet@localhost" id=\'m"1\'><body>both kinds of quotes</body></message>',
    '<message id="a&amp;b"><body>a reference in an attribute</body></message>',
    '<message id="a\nb"><body>white space in an attribute</body></message>',
    '<message  id="m1"><body>two blanks</body></message>',
    '<message id = "m1"><body>blanks around</body></message>',
    '<message id="m1" ><body>a blank at the end</body></message>',
    '<message other="x" id="m1"><body>an attribute of somebody else</body></message>',
    '<message id="m1"><body>&#65;&#x42;</body></message>',
    '<message id="m1"><body>a\r\nb</body></message>',
    '<message id="m1"><body></body></message>',
    '<message id="m1"><body/></message>',
    '<message id="m1"><body xml:lang="de">Hallo</body></message>',
    '<message id="m1"><body>Hi</body><thread>t</thread></message>',
    '<message id="m1"><subject>s</subject><body>Hi</body></message>',
    '<message id="m1"><x xmlns="urn:x"><body>Hi</body></x></message>',
    '<message id="m1"><body>Hi<![CDATA[<b/>]]></body></message>',
    "<message to='a@b/ id=\"5\"'><body>looks like an attribute</body></message>",
    '<message from="\'" to=\'x id="5"\'><body>the same</body></message>',
    '<message id="m1"/>',
]


def parsed(monkeypatch, xml, **more):
    with monkeypatch.context() as patched:
        patched.setattr(forms, "_simple", lambda *args: None)
        return ejabberd_xml(xml.encode(), TO, FROM, **more)


@pytest.mark.parametrize("xml", SIMPLE)
def test_what_needs_no_parser_comes_out_as_with_one(monkeypatch, xml):
    assert forms._simple(xml.encode(), TO, FROM) == parsed(monkeypatch, xml)


@pytest.mark.parametrize("xml", OTHERS)
def test_what_does_is_parsed(monkeypatch, xml):
    assert forms._simple(xml.encode(), TO, FROM) is None
    body, _, _ = parsed(monkeypatch, xml)
    assert body.startswith(b"<message xml:lang='en' to='")


TEXT = st.text(st.sampled_from("ab<>&\"'=/ \n\t\r;#ü"), max_size=12)
ODD = ["&amp;", "&lt;", "&quot;", "<body>", "</body>", "</message>", " id=", "><body>"]
PIECE = st.one_of(TEXT, st.sampled_from(ODD))


@given(st.sampled_from("'\""), st.lists(st.tuples(st.sampled_from(["to", "id", "type", "x"]), PIECE)), st.lists(PIECE))
def test_whatever_is_read_without_a_parser_means_the_same_with_one(quote, attributes, body):
    start = "".join(f" {name}={quote}{value}{quote}" for name, value in attributes)
    xml = f"<message{start}><body>{''.join(body)}</body></message>".encode()
    simple = forms._simple(xml, TO, FROM)
    if simple is None:
        return
    try:
        element = forms.read_neutral(xml)
    except ValueError:
        return  # no client gets this far
    own = ejabberd_xml(xml, TO, FROM)
    assert own == simple
    again = forms.read_neutral(own[0].replace(b" xmlns='jabber:client'", b"", 1))
    assert again.findtext("{jabber:client}body") == element.findtext("{jabber:client}body")
    assert {name: again.get(name) for name in ("type", "id")} == {name: element.get(name) for name in ("type", "id")}
    assert again.get("to") == (element.get("to") or TO)


def test_a_text_that_is_hidden_is_nowhere_in_it(monkeypatch):
    xml = '<message id="m1"><body>the secret</body></message>'
    form = Form((("Content-Type", "text/xml"),), "at", "from", "to", hides=True)
    headers, body = form.make((xml.encode(), TO, FROM, 0.5))
    assert b"secret" not in body
    assert b"length='10'" in body
    assert headers == (
        ("Content-Type", "text/xml"), ("at", "1970-01-01 00:00:00.500000Z"), ("from", FROM), ("to", TO)
    )  # fmt: skip
