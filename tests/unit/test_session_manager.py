"""What arrives for a user: the rules of delivery as tables, and what the tables do not say."""

import asyncio

import pytest

from tests.harness import vectors
from tests.harness.routing import Node, address, condition
from xmppd.cluster.tables import SessionRow
from xmppd.delivery import ERROR, SAFE, Pending, Record
from xmppd.errors import StanzaError, StorageUnavailable
from xmppd.events import HANDLED, MessageUndeliverable, ProbeReceiving, SubscriptionReceiving
from xmppd.protocol.jid import parse
from xmppd.protocol.stanza import build

BODY = b"<body>a</body>"
PAYLOADS = {"any": "urn:example:any", "jabber:iq:version": "jabber:iq:version", "vcard-temp": "vcard-temp"}


def populated(vector, profile):
    node = Node(strict=profile == "rfc6121")
    node.keep_for_absent()
    if vector.get("acct"):
        node.accounts.names.add("juliet")
    sessions = {name: node.bind(f"juliet@localhost/{name}", priority)[0] for name, priority in vector.get("res", [])}
    return node, sessions


async def happened(node, sessions, outcome):
    """What became of a stanza, in the words of the vectors; its outcome agrees with it."""
    settled = await node.settle(outcome)
    takers = [name for name, session in sessions.items() if session.received]
    assert all(len(session.received) <= 1 for session in sessions.values())
    error = node.error()
    assert (settled is ERROR) == (error is not None)
    found = [f"E:{error}"] * (error is not None) + ["off"] * len(node.stored) + ([takers] if takers else [])
    assert len(found) <= 1
    return found[0] if found else "S"


@vectors.each("messages")
@pytest.mark.parametrize("remembered", [True, False], ids=["remembered", "asked"])
async def test_message_vector(vector, profile, remembered):
    node, sessions = populated(vector, profile)
    node.accounts.remembered = remembered

    outcome = node.send("message", address(vector["to"]), BODY, type=vector["type"])

    assert await happened(node, sessions, outcome) == vectors.expected(vector, profile)


@vectors.each("iqs")
async def test_iq_vector(vector, profile):
    node, sessions = populated(vector, profile)
    for target, namespace in (("account", "vcard-temp"), ("host", "jabber:iq:version")):
        node.iqs.add("test", target, "get", namespace, "", lambda request: None)
    payload = f"<q xmlns='{PAYLOADS.get(vector.get('ns'), vector.get('ns', 'urn:x'))}'/>".encode()

    outcome = node.send("iq", address(vector["to"]), payload * vector.get("children", 1), type=vector["type"])

    found = await happened(node, sessions, outcome)
    if vectors.expected(vector, profile) == "handler":
        [reply] = node.romeo.received
        assert (reply.type, reply.id, reply.from_.full) == ("result", "s1", address(vector["to"]))
    else:
        assert found == vectors.expected(vector, profile)


@vectors.each("presences")
async def test_presence_vector(vector, profile):
    node, sessions = populated(vector, profile)
    told = []
    for event in (SubscriptionReceiving, ProbeReceiving):
        node.hooks.add("test", event, told.append)

    outcome = node.send("presence", address(vector["to"]), type=vector["type"])

    found = await happened(node, sessions, outcome)
    if vector["type"] == "available":
        assert found == vectors.expected(vector, profile)
        assert told == []
    else:
        # What the server answers is for the roster and presence modules, which are told even of unknown accounts.
        assert found == "S"
        assert [event.user.full for event in told] == ["juliet@localhost"]


def test_the_vectors_are_all_there():
    counts = {name: len(vectors.load(name)) for name in ("messages", "iqs", "domains", "presences")}
    assert counts == {"messages": 53, "iqs": 15, "domains": 6, "presences": 10}


# -- messages


async def test_the_address_stays_as_it_was():
    node = Node()
    juliet, _ = node.bind("juliet@localhost/balcony", 5)
    node.send("message", "juliet@localhost", BODY)
    node.send("message", "juliet@localhost/gone", BODY)
    assert [stanza.to.full for stanza in juliet.received] == ["juliet@localhost", "juliet@localhost/gone"]


async def test_an_account_nobody_remembers_holds_back_the_stream_until_it_is_known():
    node = Node()
    node.keep_for_absent()
    node.accounts.names.add("juliet")
    node.accounts.gate = asyncio.Event()

    outcome = node.send("message", "juliet@localhost", BODY)
    assert isinstance(outcome, Pending)
    assert not outcome.decided
    node.accounts.gate.set()

    assert await node.settle(outcome) is SAFE
    assert len(node.stored) == 1


async def test_who_logs_in_while_the_account_is_looked_up_gets_the_message():
    node = Node()
    node.keep_for_absent()
    node.accounts.names.add("juliet")
    node.accounts.gate = asyncio.Event()
    outcome = node.send("message", "juliet@localhost", BODY, type="chat")
    await asyncio.sleep(0)

    juliet, _ = node.bind("juliet@localhost/balcony", 0)
    node.accounts.gate.set()

    assert await node.settle(outcome) is SAFE
    assert len(juliet.received) == 1
    assert node.stored == []


async def test_a_database_that_is_away_is_no_unknown_account():
    for kind, attributes in (("message", {}), ("iq", {"type": "get"})):
        node = Node()
        node.accounts.failure = StorageUnavailable("away")
        outcome = node.send(kind, "juliet@localhost", b"<a xmlns='urn:x'/>", **attributes)
        assert await node.settle(outcome) is ERROR
        [reply] = node.romeo.received
        assert condition(reply) == "internal-server-error"
        assert reply.child("jabber:client", "error").get("type") == "wait"


async def test_nobody_keeps_messages_then_the_sender_is_told():
    node = Node()
    node.bind("juliet@localhost/balcony", -1)
    outcome = node.send("message", "juliet@localhost", BODY)
    assert await node.settle(outcome) is ERROR
    assert node.error() == "service-unavailable"


async def test_a_keeper_that_fails_later_tells_the_sender():
    node = Node()
    kept = asyncio.get_running_loop().create_future()

    def keep(event):
        event.outcome.follow(kept)
        return HANDLED

    node.hooks.add("offline", MessageUndeliverable, keep)
    node.bind("juliet@localhost/balcony", None)
    outcome = node.send("message", "juliet@localhost", BODY)
    assert isinstance(outcome, Pending)
    assert outcome.decided  # the stream goes on while the row is committed
    assert outcome.result is None

    kept.set_exception(StanzaError("resource-constraint"))
    await asyncio.sleep(0)

    assert outcome.result is ERROR
    assert node.error() == "resource-constraint"


async def test_a_message_to_many_is_safe_with_the_first_that_has_it():
    node = Node()
    slow, fast = Pending(), Pending()
    node.bind("juliet@localhost/a", 3, slow)
    node.bind("juliet@localhost/b", 3, fast)
    outcome = node.send("message", "juliet@localhost", BODY, type="chat")
    assert isinstance(outcome, Pending)
    fast.settle(SAFE)
    assert outcome.result is SAFE


# -- sessions


async def test_the_same_resource_again_ends_the_older_session():
    node = Node()
    old, old_row = node.bind("juliet@localhost/balcony", 0)
    new, _ = node.bind("juliet@localhost/balcony", 0)
    assert old.was_replaced
    assert not new.was_replaced

    assert not node.manager.close(old_row)  # the displaced row is gone already, and takes nothing with it
    node.send("message", "juliet@localhost", BODY)

    assert len(new.received) == 1
    assert old.received == []
    assert node.manager.count("localhost") == 2


async def test_the_last_session_is_known_when_it_closes():
    node = Node()
    _, first = node.bind("juliet@localhost/a", 0)
    _, second = node.bind("juliet@localhost/b", 0)
    assert not node.manager.close(first)
    assert node.manager.close(second)
    assert not node.manager.is_available(parse("juliet@localhost"))


async def test_the_oldest_sessions_beyond_a_number_are_ended():
    node = Node()
    sessions = [node.bind(f"juliet@localhost/{index}")[0] for index in range(4)]
    node.manager.end_oldest(parse("juliet@localhost"), 4)
    assert [session.was_replaced for session in sessions] == [False] * 4
    node.manager.end_oldest(parse("juliet@localhost"), 2)
    assert [session.was_replaced for session in sessions] == [True, True, False, False]


async def test_available_means_a_priority_that_is_not_negative():
    node = Node()
    juliet = parse("juliet@localhost")
    _, row = node.bind("juliet@localhost/a", None)
    for priority, available in ((None, False), (-128, False), (-1, False), (0, True), (127, True)):
        node.manager.set_priority(row, priority)
        assert node.manager.is_available(juliet) is available


async def test_kicking_names_the_condition():
    node = Node()
    first, _ = node.bind("juliet@localhost/a", 0)
    second, _ = node.bind("juliet@localhost/b", 0)
    assert node.manager.kick("juliet", "localhost", "b", "tired", condition="policy-violation") == 1
    assert (first.kicked, second.kicked) == (None, ("tired", "policy-violation"))
    assert node.manager.kick("juliet", "localhost", None, "go") == 2
    assert node.manager.kick("nobody", "localhost", None, "go") == 0


async def test_a_row_of_another_node_is_counted_and_not_called():
    node = Node()
    row = SessionRow(parse("juliet@localhost/far"), node.romeo and node.manager._owner, 1)
    node.table.insert(row)
    assert node.manager.count() == 2
    assert node.manager.sessions(parse("juliet@localhost")) == []
    assert node.manager.kick("juliet", "localhost", None, "go") == 1


# -- what was written to a session that died


async def rerouted(node, stanza):
    outcome = Pending()
    node.manager.reroute([Record(stanza, outcome)])
    while node.tasks:
        await asyncio.gather(*[node.tasks.pop() for _ in list(node.tasks)])
    return outcome.result


def from_romeo(kind, to, inner=BODY, **attributes):
    return build(kind, {"from": "romeo@localhost/orchard", "to": to, "id": "s1", **attributes}, inner)


async def test_an_unacknowledged_message_goes_to_another_resource():
    node = Node()
    other, _ = node.bind("juliet@localhost/other", 0)
    assert await rerouted(node, from_romeo("message", "juliet@localhost/dead")) is SAFE
    assert len(other.received) == 1


async def test_an_unacknowledged_message_is_kept_when_nobody_is_left():
    node = Node()
    node.keep_for_absent()
    node.accounts.names.add("juliet")
    assert await rerouted(node, from_romeo("message", "juliet@localhost/dead")) is SAFE
    assert len(node.stored) == 1


async def test_an_unacknowledged_request_goes_back():
    node = Node()
    request = from_romeo("iq", "juliet@localhost/dead", b"<q xmlns='urn:x'/>", type="get")
    assert await rerouted(node, request) is ERROR
    assert node.error() == "service-unavailable"


async def test_a_settled_record_is_not_routed_again():
    node = Node()
    node.keep_for_absent()
    outcome = Pending()
    outcome.settle(SAFE)
    node.manager.reroute([Record(from_romeo("message", "juliet@localhost"), outcome)])
    assert node.stored == []
    assert node.tasks == []


async def test_one_record_that_cannot_be_routed_does_not_stop_the_others():
    node = Node()
    node.keep_for_absent()
    node.accounts.names.add("juliet")
    node.accounts.remembered = True
    first, second = Pending(), Pending()
    node.manager.reroute(
        [
            Record(from_romeo("message", "juliet@localhost/x", type="groupchat"), first),
            Record(from_romeo("message", "juliet@localhost"), second),
        ]
    )
    assert (first.result, second.result) == (ERROR, SAFE)


async def test_what_is_routed_again_keeps_its_order_and_comes_before_what_is_new():
    node = Node()
    node.keep_for_absent()
    node.accounts.names |= {"juliet", "nurse"}
    node.accounts.gate = asyncio.Event()
    again = [from_romeo("message", "juliet@localhost/dead", f"<body>{number}</body>".encode()) for number in (1, 2)]
    outcomes = [Pending(), Pending()]

    node.manager.reroute(map(Record, again, outcomes))  # the first has to ask for the account
    await asyncio.sleep(0)
    node.accounts.remembered = True  # from here on nobody has to
    new = node.send("message", "juliet@localhost", b"<body>3</body>")
    other = node.send("message", "nurse@localhost", b"<body>4</body>")

    assert [stanza.to.local for stanza in node.stored] == ["nurse"]
    assert isinstance(new, Pending)
    assert not new.decided
    node.accounts.gate.set()
    assert await node.settle(new) is SAFE
    assert [stanza.inner for stanza in node.stored[1:]] == [b"<body>%d</body>" % number for number in (1, 2, 3)]
    assert [outcome.result for outcome in outcomes] == [SAFE, SAFE]
    assert other.result is SAFE
    assert node.send("message", "juliet@localhost", b"<body>5</body>").decided  # nothing waits any more


async def test_records_behind_one_that_fails_are_routed_all_the_same():
    node = Node()
    node.keep_for_absent()
    node.accounts.failure = StorageUnavailable("away")
    outcomes = [Pending(), Pending()]
    records = [from_romeo("message", "juliet@localhost/dead", id=f"s{number}") for number in (1, 2)]

    node.manager.reroute(map(Record, records, outcomes))
    while node.tasks:
        await node.tasks.pop()

    assert [outcome.result for outcome in outcomes] == [ERROR, ERROR]
    assert [(stanza.type, stanza.id) for stanza in node.romeo.received] == [("error", "s1"), ("error", "s2")]
    node.accounts.failure, node.accounts.remembered = None, True
    node.accounts.names.add("juliet")
    assert node.send("message", "juliet@localhost", BODY).decided


# -- broadcasts


async def test_multicast_reaches_every_available_resource_once():
    node = Node()
    sessions = {name: node.bind(f"juliet@localhost/{name}", priority)[0] for name, priority in
                [("a", 0), ("b", -1), ("c", None)]}  # fmt: skip
    presence = build("presence", {"from": "romeo@localhost/orchard"})
    node.manager.multicast(presence, [parse("juliet@localhost"), parse("nobody@localhost")])
    assert [name for name, session in sessions.items() if session.received] == ["a", "b"]
    assert sessions["a"].received[0].to.full == "juliet@localhost"
    assert sessions["a"].received[0].element.get("to") == "juliet@localhost"
