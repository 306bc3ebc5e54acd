"""A client that takes nothing costs a bounded amount of memory, then its stream; nobody else waits for it."""

import asyncio

from tests.harness.scene import together, until

LINE = "O, she doth teach the torches to burn bright! " * 400


async def test_a_slow_reader_is_cut_off_and_loses_no_message(served):
    server = await served(c2s={"max_write_queue": "256KiB", "send_timeout": "60s"})
    juliet = await server.raw_login("juliet", "balcony")
    romeo = await server.raw_login("romeo")
    nurse = await server.raw_login("nurse")
    juliet.stop_reading()
    before = server.node.memory

    sent = []

    def gone() -> bool:
        return "juliet@localhost/balcony" not in server.node.quick("connected_users")

    while not gone():
        sent += [romeo.send_message("juliet@localhost", LINE) for _ in range(30)]
        await romeo.sync()
        assert len(sent) < 40_000, "it is never cut off"
        # Somebody else is served meanwhile.
        romeo.send_message("nurse@localhost", "and you?")
        assert (await nurse.next_message()).body == "and you?"

    assert server.node.memory - before < 64 * 1024  # KiB
    await juliet.close()
    await server.stored("juliet")
    await romeo.sync()
    refused = {got.id for got in romeo.forget() if got.type == "error"}  # more than the offline storage takes
    again = await server.raw_login("juliet", "balcony")
    missing = set(sent) - refused - {got.id for got in juliet.forget()}
    while missing:
        missing.discard((await again.next_message()).id)


async def test_a_peer_that_takes_nothing_for_too_long_is_cut_off(served):
    server = await served(c2s={"send_timeout": "500ms"})
    juliet = await server.raw_login("juliet", "balcony")
    romeo = await server.raw_login("romeo")
    juliet.stop_reading()
    gone = False
    for _ in range(200):
        for _ in range(10):
            romeo.send_message("juliet@localhost/balcony", LINE, type="headline")
        await romeo.sync()
        romeo.forget()
        gone = "juliet" not in server.node.quick("connected_users")
        if gone:
            break
        await asyncio.sleep(0.01)
    if not gone:
        await until(lambda: "juliet" not in server.node.quick("connected_users"), "the slow reader's end")


async def test_a_sender_who_waits_for_the_database_does_not_hold_up_others(server):
    juliet = await server.raw_login("juliet")
    romeo = await server.raw_login("romeo")
    for number in range(300):
        romeo.send_message(f"nobody{number}@localhost", "a")  # each has to be looked up
    nurse = await server.raw_login("nurse")
    nurse.send_message("juliet@localhost", "first")
    assert (await juliet.next_message()).body == "first"
    await together(romeo)
    assert len(romeo.forget()) == 300


async def test_order_is_kept_whatever_has_to_wait(server):
    juliet = await server.raw_login("juliet")
    romeo = await server.raw_login("romeo")
    for number in range(100):
        romeo.send_message("juliet@localhost", str(number))
        romeo.send_message("nobody@localhost", "wait")
    assert [(await juliet.next_message()).body for _ in range(100)] == [str(number) for number in range(100)]
    await romeo.sync()
    romeo.forget()
