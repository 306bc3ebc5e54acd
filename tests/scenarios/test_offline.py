"""Messages for people who are away."""

import signal


async def test_offline_message_waits_for_juliet(server):
    romeo = await server.login("romeo")
    server.account("juliet")
    romeo.send_message("juliet@localhost", "O, speak again, bright angel!")
    await romeo.sync()

    juliet = await server.login("juliet")

    message = await juliet.next_message()
    assert message.body == "O, speak again, bright angel!"
    assert message.sender == romeo.jid
    assert message.delay.sender == "localhost"


async def test_who_has_gone_before_a_message_is_written_to_them_finds_it_when_they_come_back(server):
    """They closed the stream properly; the server read both behind each other. Their machine takes nothing more."""
    romeo, juliet = await server.raw_login("romeo"), await server.raw_login("juliet")
    await juliet.sync()
    server.node.process.send_signal(signal.SIGSTOP)
    try:
        romeo.send_raw("<message to='juliet@localhost' type='chat'><body>Wilt thou be gone?</body></message>")
        await romeo.drain()
        juliet.send_raw("</stream:stream>")
        await juliet.drain()
        await juliet.close()
    finally:
        server.node.process.send_signal(signal.SIGCONT)
    await romeo.sync()

    juliet = await server.login("juliet")

    assert (await juliet.next_message()).body == "Wilt thou be gone?"
