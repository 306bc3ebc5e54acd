"""The router and the local router: by domain, then by content; nothing that happens to one stanza may reach another."""

import asyncio
import logging

import pytest

from tests.harness import vectors
from tests.harness.routing import OWNER, Node, address, condition
from xmppd.chores import KeptMessage
from xmppd.cluster.tables import Route
from xmppd.delivery import ERROR, SAFE, Pending
from xmppd.errors import StanzaError, StorageUnavailable
from xmppd.events import HANDLED, StanzaRouting
from xmppd.protocol.stanza import build

PAYLOAD = b"<q xmlns='urn:x'/>"


@vectors.each("domains")
async def test_domain_vector(vector, profile):
    node = Node(strict=profile == "rfc6121")

    outcome = node.send(vector["stanza"], address(vector["to"]), b"<status/>", type=vector["type"])

    error = node.error()
    assert (f"E:{error}" if error else "S") == vectors.expected(vector, profile)
    assert outcome is (ERROR if error else SAFE)


@pytest.mark.parametrize(
    ("kind", "type"), [("message", "error"), ("presence", "error"), ("iq", "error"), ("iq", "result")]
)
@pytest.mark.parametrize("to", ["unknown.invalid", "localhost/x", "juliet@localhost/x", "nobody@localhost"])
async def test_no_error_is_answered_with_an_error(kind, type, to):
    node = Node()
    outcome = node.send(kind, to, PAYLOAD, type=type)
    assert await node.settle(outcome) is SAFE
    assert node.romeo.received == []


@pytest.mark.parametrize("to", ["unknown.invalid", "localhost/x", "localhost", "juliet@localhost/x"])
async def test_an_error_comes_from_where_the_stanza_was_meant_for(to):
    node = Node()
    node.send("iq", to, PAYLOAD, type="get", id="q&1")
    [reply] = node.romeo.received
    assert (reply.type, reply.id, reply.from_.full, reply.to.full) == ("error", "q&1", to, node.romeo.jid.full)
    assert reply.child("urn:x", "q") is not None  # what was asked is there to be seen


async def test_a_stanza_without_sender_is_dropped_in_silence():
    node = Node()
    stanza = build("message", {"to": "localhost/x"}, b"<body/>")
    assert node.router.route(stanza) is SAFE


async def test_a_row_of_the_spool_is_given_back_and_nobody_is_told():
    """Its sender was told long ago that it is safe."""
    node = Node()
    given = []
    node.router.on_kept(given.append)
    stanza = build("message", {"from": node.romeo.jid.full, "to": "juliet@unknown.invalid", "type": "chat"}, PAYLOAD)
    kept = KeptMessage.from_bytes(stanza.xml)
    assert node.router.route(kept) is SAFE
    assert given == [kept]
    assert node.romeo.received == []


async def test_of_several_routes_the_local_one_counts():
    node = Node()
    taken = []
    node.routes.insert(Route("rooms.localhost", OWNER, None))  # another node has it, too
    node.routes.insert(Route("rooms.localhost", OWNER, lambda stanza: taken.append(stanza) or SAFE))
    assert node.send("message", "verona@rooms.localhost") is SAFE
    assert len(taken) == 1


async def test_a_removed_route_leads_nowhere():
    node = Node()
    route = Route("rooms.localhost", OWNER, lambda stanza: SAFE)
    node.routes.insert(route)
    node.routes.remove(route)
    assert node.send("message", "verona@rooms.localhost") is ERROR
    assert node.error() == "remote-server-not-found"
    assert node.routes.domains() == ["localhost"]


@pytest.mark.parametrize(
    ("failure", "told", "logged"),
    [
        (StanzaError("forbidden"), "forbidden", 0),
        (StorageUnavailable("away"), "internal-server-error", 0),
        (RuntimeError("bug"), "internal-server-error", 1),
    ],
)
async def test_a_route_that_fails_is_told_to_the_sender_alone(failure, told, logged, caplog):
    node = Node()

    def deliver(stanza):
        raise failure

    node.routes.insert(Route("rooms.localhost", OWNER, deliver))
    assert node.send("message", "verona@rooms.localhost") is ERROR
    assert node.error() == told
    assert len([record for record in caplog.records if record.levelno >= logging.ERROR]) == logged


async def test_a_handler_can_change_refuse_or_take_a_stanza():
    def decide(event):
        if event.stanza.id == "change":
            return StanzaRouting(event.stanza.replace(to="juliet@localhost/b"))
        if event.stanza.id == "refuse" and event.stanza.type != "error":
            raise StanzaError("not-acceptable")
        return HANDLED if event.stanza.id == "take" else None

    node = Node()
    juliet, _ = node.bind("juliet@localhost/b", 0)
    node.hooks.add("test", StanzaRouting, decide)

    assert node.send("message", "juliet@localhost/a", id="change") is SAFE
    assert node.send("message", "juliet@localhost/b", id="take") is SAFE
    assert node.send("message", "juliet@localhost/b", id="refuse") is ERROR

    assert [stanza.id for stanza in juliet.received] == ["change"]
    assert condition(node.romeo.received[0]) == "not-acceptable"


async def test_a_handler_that_waits_holds_back_the_stream():
    go = asyncio.Event()

    async def decide(event):
        await go.wait()

    node = Node()
    juliet, _ = node.bind("juliet@localhost/b", 0)
    node.hooks.add("test", StanzaRouting, decide)
    outcome = node.send("message", "juliet@localhost/b")
    assert isinstance(outcome, Pending)
    assert not outcome.decided
    go.set()
    assert await node.settle(outcome) is SAFE
    assert len(juliet.received) == 1


# -- IQs to the host


async def test_a_handler_of_the_host_answers():
    node = Node()
    node.iqs.add("test", "host", "get", "urn:x", "q", lambda request: b"<q xmlns='urn:x'>yes</q>")
    node.send("iq", "localhost", PAYLOAD, type="get")
    [reply] = node.romeo.received
    assert reply.child("urn:x", "q").text == "yes"


async def test_an_answer_that_is_not_sent_is_nobodys_error():
    node = Node()
    assert node.send("iq", "localhost", PAYLOAD, type="result") is SAFE
    assert node.romeo.received == []


async def test_two_modules_cannot_answer_the_same():
    node = Node()
    node.iqs.add("one", "host", "get", "urn:x", "q", lambda request: None)
    with pytest.raises(ValueError, match="one already answers"):
        node.iqs.add("two", "host", "get", "urn:x", "q", lambda request: None)
    node.iqs.remove("one")
    assert node.iqs.count() == 0


@pytest.mark.parametrize("failure", [StanzaError("item-not-found"), RuntimeError("bug")])
async def test_a_handler_that_fails_is_an_error_for_who_asked(failure):
    async def later(request):
        raise failure

    def now(request):
        raise failure

    for handler in (now, later):
        node = Node()
        node.iqs.add("test", "host", "get", "urn:x", "q", handler)
        outcome = node.send("iq", "localhost", PAYLOAD, type="get")
        assert await node.settle(outcome) is ERROR
        assert node.error() == getattr(failure, "condition", "internal-server-error")
