"""Discovery, version, time and pings."""

import base64
import hashlib
import re
import time

import pytest
from lxml import etree

from modules.caps import verification
from tests.modules.world import HOST, Client, World
from xmppd.config.loader import validate_dataclass
from xmppd.errors import ConfigError
from xmppd.events import FeaturesOffering
from xmppd.module_api import DiscoInfo

INFO = "http://jabber.org/protocol/disco#info"
ITEMS = "http://jabber.org/protocol/disco#items"
DATA = "{jabber:x:data}"
PING = "<ping xmlns='urn:xmpp:ping'/>"
JULIET = f"juliet@{HOST}"


async def romeo_in(world: World, **modules: dict) -> Client:
    await world.load(**modules)
    await world.account("romeo", "juliet")
    return await world.online("romeo")


# -- discovery


async def test_a_host_says_what_it_is_and_what_the_loaded_modules_can_do(world):
    romeo = await romeo_in(world, disco={"name": "Verona <3"}, ping={}, version={})

    query = await romeo.query("get", f"<query xmlns='{INFO}'/>", HOST)

    identities = [dict(one.attrib) for one in query.iterfind(f"{{{INFO}}}identity")]
    features = [one.get("var") for one in query.iterfind(f"{{{INFO}}}feature")]
    assert identities == [{"category": "server", "type": "im", "name": "Verona <3"}]
    assert features == sorted([INFO, ITEMS, "jabber:iq:version", "urn:xmpp:ping"])

    await world.loader.unload("ping")
    query = await romeo.query("get", f"<query xmlns='{INFO}'/>", HOST)
    assert "urn:xmpp:ping" not in [one.get("var") for one in query]


async def test_a_host_lists_what_its_operator_says(world):
    romeo = await romeo_in(world, disco={"extra_items": [{"jid": "irc.Capulet.example", "name": "IRC & more"}]})

    query = await romeo.query("get", f"<query xmlns='{ITEMS}'/>", HOST)

    assert [dict(one.attrib) for one in query] == [{"jid": "irc.capulet.example", "name": "IRC & more"}]


async def test_an_item_that_is_no_address_is_a_configuration_error():
    from modules.disco import Config

    with pytest.raises(ConfigError, match="expected an address"):
        validate_dataclass(Config, {"extra_items": [{"jid": "a@b@c"}]}, "modules.disco")


@pytest.mark.parametrize("to", [HOST, None])
@pytest.mark.parametrize("space", [INFO, ITEMS])
async def test_an_unknown_node_is_not_found(world, to, space):
    romeo = await romeo_in(world, disco={})

    assert await romeo.refusal("get", f"<query xmlns='{space}' node='urn:nothing'/>", to) == "item-not-found"


@pytest.mark.parametrize("space", [INFO, ITEMS])
async def test_an_account_is_shown_to_those_alone_who_see_its_presence(world, space):
    romeo = await romeo_in(world, disco={})
    ask = f"<query xmlns='{space}'/>"

    as_stranger = await romeo.refusal("get", ask, JULIET)
    as_anybody = await romeo.refusal("get", ask, f"nobody@{HOST}")
    world.rosters.let_see(JULIET, f"romeo@{HOST}")
    as_contact = await romeo.query("get", ask, JULIET)

    assert (as_stranger, as_anybody) == ("service-unavailable", "service-unavailable")
    assert as_contact.tag == f"{{{space}}}query"


async def test_ones_own_account_is_registered_and_lists_the_available_resources(world):
    romeo = await romeo_in(world, disco={})
    await world.online("romeo", "garden", priority=-1)
    world.login("romeo", "silent")

    info = await romeo.query("get", f"<query xmlns='{INFO}'/>")
    items = await romeo.query("get", f"<query xmlns='{ITEMS}'/>")

    assert dict(info[0].attrib) == {"category": "account", "type": "registered"}
    assert [one.get("jid") for one in items] == [f"romeo@{HOST}/balcony", f"romeo@{HOST}/garden"]


async def test_a_host_says_whom_to_write_to(world):
    contact = {
        "security": "mailto:security@capulet.example",
        "abuse": ["xmpp:nurse@capulet.example", "https://a.b/?c&d"],
    }
    romeo = await romeo_in(world, disco={"contact": contact})

    query = await romeo.query("get", f"<query xmlns='{INFO}'/>", HOST)

    form = query.find(f"{DATA}x")
    assert form.get("type") == "result"
    assert [(field.get("var"), [value.text for value in field]) for field in form] == [
        ("FORM_TYPE", ["http://jabber.org/network/serverinfo"]),
        ("abuse-addresses", ["xmpp:nurse@capulet.example", "https://a.b/?c&d"]),
        ("security-addresses", ["mailto:security@capulet.example"]),
    ]


async def test_a_host_without_contact_addresses_shows_no_form(world):
    romeo = await romeo_in(world, disco={})

    assert (await romeo.query("get", f"<query xmlns='{INFO}'/>", HOST)).find(f"{DATA}x") is None


@pytest.mark.parametrize("contact", [{"abuse": "nurse"}, {"abuse": ["mailto:a b"]}, {"cook": "mailto:a@b"}])
async def test_a_contact_that_is_no_uri_is_a_configuration_error(contact):
    from modules.disco import Config

    with pytest.raises(ConfigError, match=r"expected a URI|unknown option"):
        validate_dataclass(Config, {"contact": contact}, "modules.disco")


# -- entity capabilities


@pytest.mark.parametrize(("info", "ver"), [
    (DiscoInfo((("client", "pc", "Exodus 0.9.1"),),
               ("http://jabber.org/protocol/muc", "http://jabber.org/protocol/caps", INFO, ITEMS)),
     "QgayPKawpkPSDYmwT/WM94uAlu0="),
])  # fmt: skip
def test_the_hash_is_the_one_of_the_specification(info, ver):
    assert verification(info) == ver


def test_forms_are_part_of_the_hash():
    info = DiscoInfo((("server", "im", "x"),), (INFO,), (("urn:form", (("b", ("2", "1")), ("a", ("3",)))),))

    expected = base64.b64encode(hashlib.sha1(f"server/im//x<{INFO}<urn:form<a<3<b<1<2<".encode()).digest()).decode()
    assert verification(info) == expected


def offered(world: World, authenticated: bool = True) -> bytes:
    event = FeaturesOffering(HOST, authenticated, True)
    world.hooks.decide(event)
    return b"".join(event.features)


async def caps_of(world: World, romeo: Client) -> tuple[str, list[str]]:
    """What the stream features say, and what is found behind it."""
    element = etree.fromstring(offered(world))
    assert (element.tag, element.get("hash")) == ("{http://jabber.org/protocol/caps}c", "sha-1")
    node = f"{element.get('node')}#{element.get('ver')}"
    query = await romeo.query("get", f"<query xmlns='{INFO}' node='{node}'/>", HOST)
    assert query.get("node") == node
    return node, [one.get("var") for one in query.iterfind(f"{{{INFO}}}feature")]


async def test_the_stream_features_name_what_discovery_would_say_and_follow_the_modules(world):
    romeo = await romeo_in(world, disco={"contact": {"abuse": "mailto:a@b"}}, caps={}, ping={})

    node, features = await caps_of(world, romeo)
    assert {"http://jabber.org/protocol/caps", "urn:xmpp:ping"} <= set(features)
    await world.loader.unload("ping")
    new_node, fewer = await caps_of(world, romeo)

    assert set(features) - set(fewer) == {"urn:xmpp:ping"}
    assert node != new_node
    assert await romeo.refusal("get", f"<query xmlns='{INFO}' node='{node}'/>", HOST) == "item-not-found"
    assert await romeo.refusal("get", f"<query xmlns='{ITEMS}' node='{new_node}'/>", HOST) == "item-not-found"
    assert await romeo.refusal("get", f"<query xmlns='{INFO}' node='{new_node}'/>") == "item-not-found"  # an account


async def test_strangers_are_not_offered_capabilities(world):
    await romeo_in(world, disco={}, caps={})

    assert offered(world, authenticated=False) == b""


# -- version and time


async def test_the_version_names_the_software_and_hides_the_system(world):
    romeo = await romeo_in(world, version={})

    query = await romeo.query("get", "<query xmlns='jabber:iq:version'/>", HOST)

    assert [(one.tag.partition("}")[2], one.text) for one in query] == [("name", "xmppd"), ("version", "1.2.3")]


async def test_the_version_names_the_system_when_the_operator_wants_it(world):
    romeo = await romeo_in(world, version={"show_os": True})

    query = await romeo.query("get", "<query xmlns='jabber:iq:version'/>", HOST)

    assert query.findtext("{jabber:iq:version}os")


async def test_accounts_do_not_answer_for_a_version(world):
    romeo = await romeo_in(world, version={})

    assert await romeo.refusal("get", "<query xmlns='jabber:iq:version'/>", JULIET) == "service-unavailable"


@pytest.mark.parametrize(("zone", "offset"), [("UTC0", "+00:00"), ("IST-5:30", "+05:30"), ("NST3:30", "-03:30")])
async def test_the_time_comes_with_the_offset_of_the_zone(world, monkeypatch, zone, offset):
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    world.clock = lambda: 1_800_000_000.0
    romeo = await romeo_in(world, time={})

    query = await romeo.query("get", "<time xmlns='urn:xmpp:time'/>", HOST)
    monkeypatch.undo()
    time.tzset()

    assert query.findtext("{urn:xmpp:time}utc") == "2027-01-15T08:00:00Z"
    assert query.findtext("{urn:xmpp:time}tzo") == offset


# -- pings


async def test_host_and_own_account_answer_pings_and_other_accounts_do_not(world):
    romeo = await romeo_in(world, ping={})

    answers = [await romeo.ask("get", PING, HOST), await romeo.ask("get", PING)]

    assert [(answer.type, answer.payload) for answer in answers] == [("result", None)] * 2
    assert await romeo.refusal("get", PING, JULIET) == "service-unavailable"


async def test_a_silent_client_is_asked_and_its_answer_keeps_it(world):
    romeo = await romeo_in(world, ping={"ping_interval": "1s", "ping_ack_timeout": "1s"})
    romeo.last_heard -= 5

    ping = await world.found(lambda: next((s for s in romeo.received if s.kind == "iq"), None))
    assert (ping.type, ping.from_.full, ping.to.full) == ("get", HOST, f"romeo@{HOST}/balcony")
    assert ping.child("urn:xmpp:ping", "ping") is not None
    romeo.last_heard = time.monotonic()
    await romeo.send(f"<iq type='result' id='{ping.id}' to='{HOST}'/>")
    await world.until(lambda: "ping" not in romeo.session.state)

    assert romeo.ended is None


async def test_a_client_that_does_not_answer_is_cut_off(world):
    romeo = await romeo_in(world, ping={"ping_interval": "1s", "ping_ack_timeout": "1s"})
    juliet = await world.online("juliet")
    romeo.last_heard -= 5

    await world.until(lambda: romeo.ended)

    assert romeo.ended.condition == "connection-timeout"
    assert not world.manager.is_available(romeo.session.user)
    assert juliet.ended is None


async def test_a_silent_client_is_left_alone_when_nothing_is_to_be_done(world):
    romeo = await romeo_in(world, ping={"ping_interval": "1s", "ping_ack_timeout": "1s", "timeout_action": "none"})
    romeo.last_heard -= 5

    await world.until(lambda: len([s for s in romeo.received if s.kind == "iq"]) >= 2)  # the second after the time-out

    assert romeo.ended is None


async def test_no_pings_are_sent_when_they_are_switched_off(world):
    await romeo_in(world, ping={"send_pings": False})

    assert not [task for task in world.tasks if "silent" in task.get_name()]


async def test_the_bundled_modules_can_be_reloaded_without_a_trace(world):
    names = ["announce", "blocking", "disco", "last", "offline", "ping"]
    names += ["private", "register", "time", "vcard", "version"]
    await world.load(**{name: {} for name in names})
    before = (world.hooks.count(), world.iqs.count(), len(world.tasks), len(world.registry.names()))

    for _ in range(3):
        for name in names:
            await world.loader.reload(name)
    assert (world.hooks.count(), world.iqs.count(), len(world.tasks), len(world.registry.names())) == before

    for name in names:
        await world.loader.unload(name)
    assert (world.hooks.count(), world.iqs.count(), len(world.tasks)) == (0, 0, 0)
    kinds = [*world.storage.loader._kinds, *world.storage.batcher._kinds]
    assert not [kind for kind in kinds if re.match("last|private|vcard|block|message of the day", kind)]
