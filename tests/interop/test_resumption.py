"""Streams that are cut and resumed (XEP-0198), with other people's clients: slixmpp, and @xmpp/client from npm."""

import asyncio
import random

import pytest

from tests.harness import node_client
from tests.harness.client import Client
from tests.harness.inbox import PATIENCE
from tests.harness.node_client import NodeClient
from tests.harness.scene import PASSWORD

ROUNDS = 12


class Slixmpp:
    """A client that reconnects when its socket dies."""

    def __init__(self, client, port):
        self.client = client
        self.port = port
        self.resumed = 0
        self.got = []
        self.changed = asyncio.Event()
        client.xmpp.register_plugin("xep_0198")
        client.xmpp.add_event_handler("session_resumed", self._resumed)
        client.xmpp.add_event_handler("message", self._message)

    def _resumed(self, event):
        self.resumed += 1
        self.changed.set()

    def _message(self, message):
        self.got.append((message["id"], message["body"]))
        self.changed.set()

    async def until(self, reached, what):
        try:
            async with asyncio.timeout(PATIENCE):
                while not reached():
                    self.changed.clear()
                    await self.changed.wait()
        except TimeoutError:
            raise AssertionError(f"{what} did not happen; {self.got[-3:]}") from None

    async def cut(self):
        """The socket is reset; the client comes back at once."""
        xmpp, before = self.client.xmpp, self.resumed
        lost = asyncio.get_running_loop().create_future()
        xmpp.add_event_handler("disconnected", lambda reason: lost.done() or lost.set_result(None), disposable=True)
        xmpp.transport.abort()
        await asyncio.wait_for(lost, PATIENCE)
        xmpp.connect("127.0.0.1", self.port)
        await self.until(lambda: self.resumed > before, "a resumption")

    def say(self, to, number):
        body = f"{number}"
        message = self.client.xmpp.make_message(mto=to, mbody=body, mtype="chat")
        message["id"] = f"{self.client.xmpp.boundjid.user}-{number}"
        message.send()


@pytest.fixture
def slixmpp(fresh):
    scene = fresh(stream_management={"resume_timeout": "8s"})

    async def enter(user):
        scene.account(user)
        made = Client(f"{user}@localhost/here", PASSWORD, scene.node.certificate())
        scene.adopt(made)
        self = Slixmpp(made, scene.node.port)
        await made.connect(scene.node.port)
        made.xmpp.send_presence()  # slixmpp has to count what it sends
        await made.xmpp.get_roster()
        return self

    return enter


def bodies(got):
    """Without repetitions, which have the same id."""
    seen = {}
    for id, body in got:
        assert seen.setdefault(id, body) == body
    return list(seen.values())


async def test_slixmpp_loses_nothing_when_its_sockets_are_reset(slixmpp):
    romeo, juliet = await slixmpp("romeo"), await slixmpp("juliet")
    number, chance = 0, random.Random(198)

    async def talk(count):
        nonlocal number
        for _ in range(count):
            number += 1
            for one, other in ((romeo, juliet), (juliet, romeo)):
                if one.client.xmpp.transport is not None:
                    one.say(other.client.jid, number)
            await asyncio.sleep(0)

    for turn in range(ROUNDS):
        await talk(chance.randrange(1, 20))
        cut = chance.choice([[romeo], [juliet], [romeo, juliet]])
        await asyncio.gather(*(each.cut() for each in cut))
        if turn % 3 == 0:  # twice in a row
            await cut[0].cut()
    await talk(5)
    expected = [str(n) for n in range(1, number + 1)]
    for each in (romeo, juliet):
        await each.until(lambda each=each: len(bodies(each.got)) >= number, f"all of {number} messages")
        assert bodies(each.got) == expected
    assert romeo.resumed + juliet.resumed > ROUNDS


@pytest.mark.node
@pytest.mark.skipif(node_client.missing() is not None, reason=str(node_client.missing()))
async def test_the_node_client_resumes_its_stream(server):
    server.account("juliet")
    juliet = NodeClient(server.node.certificate())
    server.adopt(juliet)
    await juliet.connect(f"xmpps://localhost:{server.node.tls_port}", "juliet", PASSWORD, "balcony")
    await juliet.become_available()
    romeo = await server.login("romeo")
    number = 0
    for _ in range(4):
        for _ in range(5):
            number += 1
            romeo.send_message(juliet.jid, str(number))
            juliet.send_message(romeo.jid, str(number))
        await juliet.drop()
        romeo.send_message(juliet.jid, f"{number} and a half")
        await juliet.event("resumed")
        juliet.send_message(romeo.jid, f"{number} and a half")
    expected = [text for n in range(1, number + 1) for text in ([str(n)] if n % 5 else [str(n), f"{n} and a half"])]
    for each in (romeo, juliet):
        got = {}
        while len(got) < len(expected):
            message = await each.next_message()
            assert got.setdefault(message.id, message.body) == message.body
        assert list(got.values()) == expected
