"""Stanzas: neutral bytes, building them, and errors."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lxml import etree

from tests.harness.xml import inside_a_stream
from xmppd.errors import STANZA_ERROR_TYPES, JidError, StanzaError
from xmppd.protocol.jid import parse
from xmppd.protocol.stanza import (
    Stanza,
    attributes,
    build,
    delay_element,
    error_reply,
    iq_result,
    with_child,
)

MESSAGE = (
    b"<message to='juliet@localhost' from='romeo@localhost/orchard' id='m1' type='chat'>"
    b"<body>O&amp;O</body><x xmlns='urn:x'><message xmlns='jabber:client'/></x></message>"
)
XML_TEXT = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cs", "Cc", "Cn"), include_characters="\n\t\r<>&\"'")
)


def message() -> Stanza:
    return Stanza.from_bytes(MESSAGE)


@pytest.mark.parametrize(
    ("inner", "has"),
    [
        ("<body>a</body>", True),
        ("<body/>", True),
        ("<body xml:lang='en'>a</body>", True),
        ("<x xmlns='urn:x'><body>a</body></x>", False),
        ("<body xmlns='urn:x'>a</body>", False),
        ("<thread>a</thread><body>a</body>", True),
        ("<subject>&lt;body></subject>", False),
        ("", False),
    ],
)
def test_whether_there_is_a_body_however_it_is_written(inner, has):
    assert Stanza.from_bytes(f"<message to='a@b' id='1>&lt;body>'>{inner}</message>".encode()).has_body is has


def test_what_a_stanza_says_of_itself():
    stanza = message()
    assert (stanza.kind, stanza.type, stanza.id) == ("message", "chat", "m1")
    assert (stanza.to, stanza.from_) == (parse("juliet@localhost"), parse("romeo@localhost/orchard"))
    assert stanza.body == "O&O"
    assert stanza.has_body
    assert stanza.child("urn:x") is not None
    assert stanza.child("urn:x", "y") is None
    assert [child.tag for child in stanza.children] == ["{jabber:client}body", "{urn:x}x"]
    assert stanza.payload is None  # two children
    assert stanza.xml == MESSAGE


@pytest.mark.parametrize(("kind", "type"), [("message", "normal"), ("presence", "available"), ("iq", "")])
def test_the_type_that_is_not_written(kind, type):
    assert Stanza.from_bytes(f"<{kind}/>".encode()).type == type
    assert build(kind, {}).type == type


@pytest.mark.parametrize(
    "xml", [b"", b"text", b"<message", b"<message/><message/>", b"<body/>", b"<message xmlns='urn:x'/>", b"<a:b/>"]
)
def test_other_bytes_are_no_stanza(xml):
    with pytest.raises(ValueError, match=r"."):
        Stanza.from_bytes(xml)


def test_bad_addresses_are_named():
    with pytest.raises(JidError):
        Stanza.from_bytes(b"<message to='a@b@c'/>")


def test_entities_are_not_expanded():
    xml = b"<!DOCTYPE a [<!ENTITY b 'c'>]><message>&b;</message>"
    with pytest.raises(ValueError, match="well-formed"):
        Stanza.from_bytes(xml)


def test_a_forgotten_element_comes_back():
    stanza = message()
    stanza.forget_element()
    assert stanza.body == "O&O"


@pytest.mark.parametrize(
    ("xml", "inner"),
    [
        (b"<iq/>", b""),
        (b"<iq />", b""),
        (b"<iq></iq>", b""),
        (b"<iq a='/>'></iq>", b""),
        (b"<iq a='/>' />", b""),
        (b"<iq a='>'><b/></iq>", b"<b/>"),
        (b"<iq><a></a> </iq >", b"<a></a> "),
        (b'<iq a="\'>"><b c="</iq>"/></iq>'.replace(b"</iq>", b"&lt;/iq>", 1), b'<b c="&lt;/iq>"/>'),
    ],
)
def test_what_stands_between_the_tags(xml, inner):
    assert Stanza.from_bytes(xml).inner == inner


def test_replacing_attributes_gives_a_copy():
    stanza = message()
    other = stanza.replace(to="nurse@localhost", from_=None, id="<&'\">", type=None)
    assert (other.to.full, other.from_, other.id, other.type) == ("nurse@localhost", None, "<&'\">", "normal")
    assert stanza.xml == MESSAGE
    before, after = inside_a_stream(MESSAGE), inside_a_stream(other.xml)
    assert after[2] == before[2]
    assert dict(after[1]) == {"to": "nurse@localhost", "id": "<&'\">"}


def test_addressing_is_cheap_and_right():
    presence = Stanza.from_bytes(b"<presence from='romeo@localhost/a'><show>away</show></presence>")
    to = parse("juliet@localhost/\"<&'>")
    addressed = presence.addressed(to)
    assert addressed.to == to
    assert dict(inside_a_stream(addressed.xml)[1]) == {"from": "romeo@localhost/a", "to": to.full}
    assert dict(inside_a_stream(Stanza.from_bytes(b"<presence/>").addressed(to).xml)[1]) == {"to": to.full}


@pytest.mark.parametrize(
    "xml", [b"<message/>", b"<message />", b"<message></message>", b"<message> </message >", MESSAGE]
)
def test_one_more_child_at_the_end(xml):
    before = inside_a_stream(xml)
    stanza = with_child(Stanza.from_bytes(xml), b"<a xmlns='urn:a'/>")
    after = inside_a_stream(stanza.xml)
    assert after == (*before[:2], (*before[2], ("urn:a a", (), ())))
    assert stanza.child("urn:a", "a") is not None


# -- building


@given(st.dictionaries(st.sampled_from(["id", "type", "xml:lang", "x"]), XML_TEXT), XML_TEXT)
def test_builders_escape_everything(values, text):
    plain = {name: value.replace("\r", "") for name, value in values.items()}
    stanza = build("message", plain, delay_element("2026-01-01T00:00:00Z", text.replace("\r", ""), text))
    node = inside_a_stream(stanza.xml)
    keys = {
        name.replace("xml:lang", "http://www.w3.org/XML/1998/namespace lang"): value for name, value in plain.items()
    }
    assert dict(node[1]) == keys
    [delay] = node[2]
    assert dict(delay[1])["from"] == text.replace("\r", "")


@given(st.dictionaries(st.sampled_from(["a", "b"]), XML_TEXT | st.none()))
def test_attributes_can_be_read_back(values):
    element = etree.fromstring(f"<a{attributes(values)}/>".encode())
    expected = {name: value for name, value in values.items() if value is not None}
    assert {name: value.replace("\r", "") for name, value in element.attrib.items()} == {
        name: value.replace("\r", "") for name, value in expected.items()
    }


def test_a_built_stanza_knows_its_addresses():
    stanza = build("iq", {"to": "Juliet@localhost", "from": None, "type": "get", "id": None})
    assert (stanza.to.full, stanza.from_, stanza.id) == ("juliet@localhost", None, "")
    assert stanza.xml == b'<iq to="Juliet@localhost" type="get"/>'


def request(type="get", kind="iq", **extra):
    values = {"type": type, "id": "q<1", "from": "romeo@localhost/a&b", "to": "localhost", **extra}
    return build(kind, values, b"<q xmlns='urn:x'>a<b/></q>")


@pytest.mark.parametrize("payload", [None, b"<r xmlns='urn:x'/>", etree.fromstring("<r xmlns='urn:x'/>")])
def test_a_result_goes_back(payload):
    reply = iq_result(request(), payload)
    assert (reply.type, reply.id, reply.to.full, reply.from_.full) == (
        "result",
        "q<1",
        "romeo@localhost/a&b",
        "localhost",
    )
    assert inside_a_stream(reply.xml)[2] == (() if payload is None else (("urn:x r", (), ()),))


# -- errors


@pytest.mark.parametrize("condition", STANZA_ERROR_TYPES)
def test_each_condition_has_its_type(condition):
    error = error_reply(request(), StanzaError(condition, "a <text> & more")).child("jabber:client", "error")
    assert error.get("type") == STANZA_ERROR_TYPES[condition]
    assert [child.tag for child in error] == [
        f"{{urn:ietf:params:xml:ns:xmpp-stanzas}}{name}" for name in (condition, "text")
    ]
    assert error[1].text == "a <text> & more"


def test_an_error_can_have_another_type_and_no_text():
    error = error_reply(request(), StanzaError("internal-server-error", type="wait")).child("jabber:client", "error")
    assert error.get("type") == "wait"
    assert len(error) == 1


def test_an_unknown_condition_is_a_bug():
    with pytest.raises(KeyError):
        StanzaError("out-of-tea")


@pytest.mark.parametrize("kind", ["message", "presence", "iq"])
def test_an_error_keeps_what_was_sent(kind):
    asked = request(kind=kind)
    reply = error_reply(asked, StanzaError("gone"))
    assert (reply.kind, reply.type, reply.id) == (kind, "error", "q<1")
    assert (reply.to, reply.from_) == (asked.from_, asked.to)
    assert inside_a_stream(reply.xml)[2][0] == inside_a_stream(asked.xml)[2][0]


@pytest.mark.parametrize(
    ("kind", "type"), [("message", "error"), ("presence", "error"), ("iq", "error"), ("iq", "result")]
)
def test_no_error_for_an_error(kind, type):
    assert error_reply(request(type, kind), StanzaError("gone")) is None


def test_a_representation_shows_no_body():
    assert repr(message()).startswith("<message to=")
    assert "O&amp;O" not in repr(message())


@pytest.mark.parametrize("prefix", ["x", "stream"])
def test_an_error_reply_declares_the_prefixes_of_its_payload(prefix):
    """They were declared in the start tag of the stanza, which is not copied."""
    xml = f"<iq type='get' id='1' xmlns:y='urn:y' xmlns:{prefix}='urn:a'><{prefix}:query/></iq>".encode()
    reply = error_reply(Stanza.from_bytes(xml), StanzaError("service-unavailable"))
    assert inside_a_stream(reply.xml)[2][0] == ("urn:a query", (), ())


@pytest.mark.parametrize(
    "start", [b" xmlns:x='urn:x'", b" id='1' xmlns:x = \"urn:x\" type='chat'", b" id=' xmlns:x=\"no\"' xmlns:x='urn:x'"]
)
def test_an_error_declares_the_prefixes_of_what_it_carries(start):
    stanza = Stanza.from_bytes(b"<message" + start + b"><x:a/></message>")
    reply = error_reply(stanza, StanzaError("service-unavailable"))
    assert inside_a_stream(reply.xml)[2][0] == ("urn:x a", (), ())


@pytest.mark.parametrize(
    "inner",
    [
        b"<no-store xmlns='urn:xmpp:hints'/>",
        b"<h:no-store xmlns:h='urn:xmpp:hints'/>",
        b"<no-store xmlns='urn&#58;xmpp:hints'/>",
        b"<no-store xmlns='urn:xmpp:hint&#x73;'/>",
    ],
)
def test_a_child_is_found_however_its_namespace_is_written(inner):
    stanza = Stanza.from_bytes(b"<message>" + inner + b"</message>")
    assert stanza.child("urn:xmpp:hints", "no-store") is not None
    assert stanza.child("urn:xmpp:hints", "store") is None
    assert stanza.child("urn:xmpp:receipts") is None


def test_a_child_in_the_namespace_of_the_stream_is_found():
    stanza = Stanza.from_bytes(b"<message><body>x</body></message>")
    assert stanza.child("jabber:client", "body") is not None
