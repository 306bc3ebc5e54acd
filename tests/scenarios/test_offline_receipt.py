"""offline_receipt seen from outside: a client that saves again what nobody confirms."""

import asyncio

from tests.harness.saver import Saver
from xmppd.config.schema import DEFAULT_MODULES

MODULES = {**{name: {} for name in DEFAULT_MODULES}, "mod_offline_receipt": {"from": "bare"}}
TIMER = 0.3


async def test_or_08_a_client_that_hears_of_the_storing_saves_nothing_again(served):
    """OR-08"""
    scene = await served(modules=MODULES)
    scene.account("juliet")
    saver = Saver(await scene.raw_login("romeo"), lambda id: None, timer=TIMER * 100)

    for number in range(5):
        saver.send("juliet@localhost", f"m{number}", "hello")
    answered = [await saver.receive() for _ in range(5)]
    await saver.stop()

    assert sorted(answered) == [f"m{number}" for number in range(5)]
    assert set(saver.saves.values()) == {1}
    told = scene.ctl("message_state", "romeo@localhost", "juliet@localhost", "m0").stdout
    assert told.startswith("stored-offline\t")


async def test_or_08_without_the_module_it_saves_at_every_turn_of_its_timer(server):
    """OR-08"""
    server.account("juliet")
    saved = asyncio.Event()
    saver = Saver(await server.raw_login("romeo"), lambda id: saver.saves[id] >= 4 and saved.set(), timer=TIMER)

    saver.send("juliet@localhost", "m1", "hello")

    async with asyncio.timeout(30):
        await saved.wait()
    await saver.stop()
    assert saver.saves["m1"] >= 4
