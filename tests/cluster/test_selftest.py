"""The self-test finds what is wrong, says so by its exit code, and leaves nothing behind."""

import asyncio
import json
from typing import Any

import pytest

from tests.cluster.command_net import Cluster
from tests.modules.world import HOST
from xmppd.admin import puppets, selftest
from xmppd.admin.selftest import FAILED
from xmppd.errors import CommandError
from xmppd.events import StanzaDelivering, StanzaSending

NODES = ("xmppd@node01", "xmppd@node02", "xmppd@node03")


async def traces(cluster: Cluster) -> list[str]:
    """What a test has left: accounts, sessions, hooks."""
    left = [name for name in await cluster.nodes[0].accounts.names(HOST) if name.startswith("selftest-")]
    for node in cluster.nodes:
        left += [row.jid.full for row in node.table.all()]
        left += [f"hook on {node.name}"] * node.hooks.wants_of("selftest")
    return left


@pytest.mark.parametrize("count", [1, 2, 3])
async def test_every_node_chats_with_every_node(cluster: Cluster, count: int) -> None:
    nodes = await cluster.add(*NODES[:count])
    await nodes[-1].online("juliet")
    await cluster.settle()

    result = await nodes[0].run("selftest")

    checks = json.loads(result.json())
    assert (result.code, [check for check in checks if check["result"] != "ok"]) == (0, [])
    chats = [(check["from"], check["to"]) for check in checks if check["check"] == "chat"]
    assert chats == [(one, other) for one in NODES[:count] for other in NODES[:count]]
    seen = {(check["from"], check["to"]): check["detail"] for check in checks if check["check"] == "seen"}
    assert set(seen) == set(chats)
    assert seen[NODES[0], NODES[count - 1]] == "3 sessions"
    hooks = {check["from"]: check["detail"] for check in checks if check["check"] == "hook"}
    assert hooks == dict.fromkeys(
        ("stanza_sending", "stanza_routing", "stanza_delivering"), f"once for each of {2 * count * count} stanzas"
    )
    text = result.text()
    assert text.count(" ms") == count * count
    assert text.splitlines()[1].split() == list(NODES[:count])
    for node in nodes:
        for client in list(node.manager.local()):
            client.close(clean=True)  # type: ignore[attr-defined]
    await cluster.settle()
    assert await traces(cluster) == []


async def test_a_module_that_watches_is_named(cluster: Cluster) -> None:
    one, _ = await cluster.add(*NODES[:2])
    one.hooks.add("post_log", StanzaDelivering, lambda event: None)

    checks = json.loads((await one.run("selftest")).json())

    assert next(check["to"] for check in checks if check["from"] == "stanza_delivering") == "post_log"


async def test_a_message_that_is_lost_fails_its_pair_alone(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(puppets, "RECEIPT", 0.3)
    one, two = await cluster.add(*NODES[:2])
    from xmppd.events import HANDLED

    def swallow(event: StanzaDelivering) -> Any:
        stanza = event.stanza
        return HANDLED if stanza.kind == "message" and (stanza.id or "").endswith("-0-1") else None

    two.hooks.add("thief", StanzaDelivering, swallow)

    result = await one.run("selftest")

    failed = [check for check in json.loads(result.json()) if check["result"] != "ok"]
    assert [(check["check"], check["from"], check["to"]) for check in failed] == [("chat", *NODES[:2])]
    assert result.code == FAILED
    assert "FAIL" in result.text()
    assert await traces(cluster) == []


async def test_an_event_that_is_raised_twice_is_found(cluster: Cluster) -> None:
    one, two = await cluster.add(*NODES[:2])

    def again(event: StanzaDelivering) -> None:
        if (event.stanza.id or "").endswith("-0-1"):
            two.puppets._probe(event)

    two.hooks.add("echo", StanzaDelivering, again)

    result = await one.run("selftest")

    failed = [check for check in json.loads(result.json()) if check["result"] != "ok"]
    assert [check["from"] for check in failed] == ["stanza_delivering"]
    assert failed[0]["detail"].endswith("raised it 2 times")


async def test_sessions_that_a_node_does_not_see_are_counted(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "SETTLE", 0.1)
    one, two = await cluster.add(*NODES[:2])
    lost = await two.online("juliet")
    await cluster.settle()
    one.table.delete(two.owner, f"juliet@{HOST}", lost.session.jid.resource.encode())

    result = await one.run("selftest")

    failed = [check for check in json.loads(result.json()) if check["result"] != "ok"]
    assert [(check["check"], check["from"], check["to"]) for check in failed] == [("seen", *NODES[:2])]
    assert failed[0]["detail"] == "1 of 3 not seen"


async def test_a_node_that_dies_meanwhile_fails_and_nothing_stays(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = await cluster.add(*NODES[:2])
    chat = two.puppets.handlers["selftest.chat"]

    async def die(asked: Any) -> None:
        cluster.net.kill(NODES[1])
        await asyncio.Event().wait()

    two.calls.off("selftest.chat")
    two.calls.on_call("selftest.chat", lambda peer, asked: die(asked))
    del chat

    result = await one.run("selftest")

    assert result.code == FAILED
    assert any(check.result == "fail" and check.from_ == NODES[1] for check in result.value)
    cluster.nodes.remove(two)
    assert await traces(cluster) == []
    await two.close()


async def test_a_test_that_is_cut_off_cleans_up(cluster: Cluster) -> None:
    one, two = await cluster.add(*NODES[:2])
    two.calls.off("selftest.chat")
    reached = asyncio.Event()

    async def never(peer: Any, asked: Any) -> None:
        reached.set()
        await asyncio.Event().wait()

    two.calls.on_call("selftest.chat", never)
    testing = asyncio.ensure_future(one.run("selftest"))
    await reached.wait()

    testing.cancel()
    await asyncio.gather(testing, return_exceptions=True)

    async def clean() -> bool:
        return await traces(cluster) == []

    await one.until_true(clean)


async def test_puppets_whose_tester_died_end_by_themselves(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(puppets, "IDLE", 0.05)
    one, two = await cluster.add(*NODES[:2])

    await one.nodes.call(NODES[1], "selftest.open", {"run": "selftest-x", "jids": [f"x@{HOST}/a"]}, timeout=1)
    assert two.table.count() == 1

    await one.until(lambda: two.table.count() == 0)
    assert not two.hooks.wants(StanzaSending)


async def test_accounts_of_a_test_that_died_are_removed_by_the_next(cluster: Cluster) -> None:
    (one,) = await cluster.add(NODES[0])
    await one.account("selftest-65000000-abcd-0a", "selftest-user", "selftest-zz")
    now = f"selftest-{int(one.clock()):x}-abcd-0a"
    await one.account(now)

    await one.run("selftest")

    assert sorted(await one.accounts.names(HOST)) == sorted(["selftest-user", "selftest-zz", now])


async def test_one_test_at_a_time(cluster: Cluster) -> None:
    (one,) = await cluster.add(NODES[0])

    first = asyncio.ensure_future(one.run("selftest"))
    await asyncio.sleep(0)
    with pytest.raises(CommandError, match="already"):
        await one.run("selftest")
    assert (await first).code == 0


def test_the_matrix_has_a_row_and_a_column_per_node() -> None:
    checks = [
        selftest.Check("chat", "a", "a", "ok", "0.4 ms"),
        selftest.Check("chat", "a", "bb", "fail", "no receipt within 5 s"),
        selftest.Check("chat", "bb", "a", "ok", "1.2 ms"),
        selftest.Check("chat", "bb", "bb", "ok", "0.5 ms"),
        selftest.Check("seen", "a", "bb", "ok", "7 sessions"),
    ]

    assert selftest.matrix(checks) == (
        "message and receipt, from the left to the top:\n"
        "    a       bb\n"
        "a   0.4 ms  FAIL\n"
        "bb  1.2 ms  0.5 ms\n"
        "\n"
        "fail\tchat\ta\tbb\tno receipt within 5 s\n"
        "ok\tseen\ta\tbb\t7 sessions\n"
    )
