"""Messages for people who are away."""


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
