"""Modules come and go while people chat, and leave nothing behind."""

import asyncio

from tests.harness.scene import together

CYCLED = ("ping", "disco", "version", "time", "last", "private", "vcard", "offline", "presence", "roster")


async def test_a_hundred_reloads_under_traffic_leave_nothing(fresh):
    scene = fresh()
    romeo = await scene.raw_login("romeo")
    juliet = await scene.raw_login("juliet")
    scene.account("nurse")
    going = True
    sent = 0

    async def chat() -> None:
        nonlocal sent
        while going:
            sent += 1
            romeo.send_message("juliet@localhost", str(sent), id=f"c{sent}")
            romeo.send_presence("juliet@localhost")
            await asyncio.sleep(0.002)

    async def cycles(number: int) -> None:
        for index in range(number):
            name = CYCLED[index % len(CYCLED)]
            if name in ("roster", "presence") or index % 3:
                answer = await asyncio.to_thread(scene.node.quick, "module", "reload", name)
            else:
                answer = await asyncio.to_thread(scene.node.quick, "module", "unload", name)
                answer += await asyncio.to_thread(scene.node.quick, "module", "load", name)
            assert "rror" not in answer, (name, answer)

    await cycles(10)
    await juliet.sync()
    chatting = asyncio.create_task(chat())
    await cycles(20)
    before = census(scene)
    await cycles(100)
    going = False
    await chatting
    await together(romeo, juliet)

    messages = [got.body for got in juliet.forget() if got.name == "message"]
    assert messages == [str(number) for number in range(1, sent + 1)]
    assert [got for got in romeo.forget() if got.type == "error"] == []
    after = census(scene)
    assert after["modules"] == before["modules"]
    assert after["tasks"] <= before["tasks"] + 1
    assert after["memory"] - before["memory"] < 6 * 1024, (before, after)
    romeo.send_message("nurse@localhost", "later")
    assert await scene.stored("nurse") == 1


def census(scene) -> dict:
    return {
        "tasks": int(scene.node.quick("stats", "processes")),
        "modules": scene.node.quick("module", "list"),
        "memory": scene.node.memory,
    }


async def test_an_unloaded_module_is_gone_and_a_loaded_one_is_there(fresh):
    scene = fresh()
    romeo = await scene.raw_login("romeo")
    version = "<query xmlns='jabber:iq:version'/>"
    await romeo.query("get", version, to="localhost")
    features = await features_of(romeo)
    assert "jabber:iq:version" in features

    scene.asked("module", "unload", "version")
    assert await romeo.refusal("get", version, to="localhost") == "service-unavailable"
    assert features - await features_of(romeo) == {"jabber:iq:version"}

    scene.asked("module", "load", "version")
    await romeo.query("get", version, to="localhost")
    assert await features_of(romeo) == features


async def features_of(client) -> set[str]:
    answer = await client.query("get", "<query xmlns='http://jabber.org/protocol/disco#info'/>", to="localhost")
    return {child.get("var") for child in answer.payload if child.tag.endswith("feature")}


async def test_without_offline_the_sender_is_told(fresh):
    scene = fresh()
    romeo = await scene.raw_login("romeo")
    scene.account("juliet")
    scene.asked("module", "unload", "offline")
    id = romeo.send_message("juliet@localhost", "anybody?")
    answer = await romeo.next_message()
    assert (answer.id, answer.condition) == (id, "service-unavailable")


async def test_a_module_that_does_not_exist_is_named(fresh):
    scene = fresh()
    done = scene.ctl("module", "load", "offlin")
    assert done.returncode != 0
    assert "offlin" in done.stderr + done.stdout
    romeo = await scene.raw_login("romeo")
    await romeo.sync()
