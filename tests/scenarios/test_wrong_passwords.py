"""Wrong passwords, many of them: who has to wait, and who must not notice."""

import base64

import pytest
from scramp import ScramClient

from tests.harness.raw import SASL
from tests.harness.scene import PASSWORD

SLOW = {"exempt": [], "per_address": "4/h", "per_account": "none"}
ACCOUNT = {"exempt": [], "per_address": "none", "per_account": "4/h"}
CRACKER, HOME, CAFE = "127.6.6.6", "127.0.0.2", "127.0.0.3"


async def plain(client, user, password):
    return await client.plain(user, password)


async def scram(client, user, password):
    peer = ScramClient(["SCRAM-SHA-256"], user, password)
    client.send_raw(f"<auth xmlns='{SASL}' mechanism='SCRAM-SHA-256'>{encoded(peer.get_client_first())}</auth>")
    answer = await client.next()
    if answer.name != "challenge":
        return answer
    peer.set_server_first(base64.b64decode(answer.xml.text).decode())
    client.send_raw(f"<response xmlns='{SASL}'>{encoded(peer.get_client_final())}</response>")
    return await client.next()


def encoded(text):
    return base64.b64encode(text.encode()).decode()


class Tries:
    """Attempts from an address, each on a stream of its own."""

    def __init__(self, scene, how):
        self.scene, self.how = scene, how

    async def once(self, address, user, password="wrong"):
        client = self.scene.raw()
        await client.connect_tls(self.scene.node.tls_port, source=address)
        await client.open()
        return verdict(await self.how(client, user, password))


def verdict(answer):
    return "success" if answer.name == "success" else answer.xml[0].tag.rpartition("}")[2]


@pytest.fixture(params=[plain, scram], ids=["plain", "scram"])
def how(request):
    return request.param


WAIT = "temporary-auth-failure"


async def test_an_address_that_failed_too_often_has_to_wait(fresh, how):
    server = fresh(login_limits=SLOW)
    server.account("romeo")
    tries = Tries(server, how)
    seen = [await tries.once(CRACKER, f"user{n}") for n in range(6)]
    assert seen == ["not-authorized"] * 4 + [WAIT] * 2
    assert await tries.once(CRACKER, "romeo", PASSWORD) == WAIT  # also with the right one
    assert await tries.once(HOME, "romeo", PASSWORD) == "success"
    assert "login limited" in server.node.new_log()


async def test_an_account_under_attack_and_one_that_does_not_exist_look_the_same(fresh, how):
    server = fresh(login_limits=ACCOUNT)
    server.account("romeo")
    tries = Tries(server, how)
    for user in ("romeo", "nobody"):
        seen = [await tries.once(f"127.6.6.{n}", user) for n in range(1, 7)]
        assert seen == ["not-authorized"] * 4 + [WAIT] * 2


async def test_the_owner_comes_in_from_home_while_others_guess(fresh, how):
    server = fresh(login_limits=ACCOUNT)
    server.account("romeo")
    tries = Tries(server, how)
    assert await tries.once(HOME, "romeo", PASSWORD) == "success"
    for n in range(1, 6):
        await tries.once(f"127.6.6.{n}", "romeo")
    assert await tries.once(CRACKER, "romeo") == WAIT
    assert await tries.once(HOME, "romeo", PASSWORD) == "success"
    assert await tries.once(CAFE, "romeo", PASSWORD) == WAIT


async def test_guesses_in_parallel_are_no_more(fresh, how):
    """All streams are past the first question before the first answer."""
    server = fresh(login_limits=ACCOUNT)
    server.account("romeo")
    clients, peers = [], []
    for n in range(1, 11):
        client = server.raw()
        await client.connect_tls(server.node.tls_port, source=f"127.6.6.{n}")
        await client.open()
        clients.append(client)
    if how is plain:
        secret = encoded("\0romeo\0wrong")
        for client in clients:
            client.send_raw(f"<auth xmlns='{SASL}' mechanism='PLAIN'>{secret}</auth>")
    else:
        for client in clients:
            peers.append(peer := ScramClient(["SCRAM-SHA-256"], "romeo", "wrong"))
            client.send_raw(f"<auth xmlns='{SASL}' mechanism='SCRAM-SHA-256'>{encoded(peer.get_client_first())}</auth>")
            challenge = await client.next()
            assert challenge.name == "challenge", challenge
            peer.set_server_first(base64.b64decode(challenge.xml.text).decode())
        for client, peer in zip(clients, peers, strict=True):
            client.send_raw(f"<response xmlns='{SASL}'>{encoded(peer.get_client_final())}</response>")
    seen = sorted([verdict(await client.next()) for client in clients])
    assert seen == ["not-authorized"] * 4 + [WAIT] * 6


async def test_a_client_that_has_to_wait_is_told_for_how_long_and_loses_its_stream_if_it_does_not(fresh):
    server = fresh(login_limits=SLOW)
    tries = Tries(server, plain)
    for _ in range(4):
        await tries.once(CRACKER, "romeo")
    client = server.raw()
    await client.connect_tls(server.node.tls_port, source=CRACKER)
    await client.open()
    for _ in range(3):
        answer = await client.plain("romeo", "wrong")
        assert verdict(answer) == WAIT
        words = answer.xml[1].text
        assert words.startswith("too many failed logins from your address; try again in "), words
        assert 800 < int(words.split()[-2]) <= 900
    await client.assert_stream_error("policy-violation")


async def test_loopback_is_exempt_unless_told_otherwise(fresh):
    server = fresh(login_limits={"per_address": "1/h", "per_account": "1/h"})
    server.account("romeo")
    tries = Tries(server, plain)
    assert [await tries.once(CRACKER, "romeo") for _ in range(5)] == ["not-authorized"] * 5
    assert await tries.once(HOME, "romeo", PASSWORD) == "success"


async def test_reload_config_changes_the_limits(fresh):
    server = fresh(login_limits=SLOW)
    tries = Tries(server, plain)
    seen = [await tries.once(CRACKER, "romeo") for n in range(5)]
    assert seen[-1] == WAIT
    server.node.configure({**server.node.options, "login_limits": {**SLOW, "per_address": "none"}})
    server.asked("reload_config")
    assert await tries.once(CRACKER, "romeo") == "not-authorized"
