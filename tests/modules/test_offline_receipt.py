"""offline_receipt: who is answered by the server and when, what became of messages, and what web servers are told."""

from typing import Any

import pytest
from lxml import etree

from tests.modules.world import HOST, Client, World, message
from xmppd.protocol.stanza import Stanza

JULIET, ROMEO = f"juliet@{HOST}", f"romeo@{HOST}"
RECEIPTS = "urn:xmpp:receipts"
REQUEST = f"<request xmlns='{RECEIPTS}'/>"


async def ready(world: World, **options: Any) -> Client:
    """Loaded beside offline; romeo is online and juliet has an account."""
    await world.load(offline={}, offline_receipt=options)
    await world.account("romeo", "juliet")
    return await world.online("romeo", "orchard")


def receipts(client: Client) -> list[Stanza]:
    """What the server (or somebody) has answered, oldest first."""
    return [stanza for stanza in client.received if stanza.kind == "message" and stanza.type != "error"]


def received_ids(client: Client) -> list[str]:
    found = (stanza.child(RECEIPTS, "received") for stanza in receipts(client))
    return [element.get("id") for element in found if element is not None]


async def state(world: World, id: str = "m1", to: str = JULIET, from_: str = ROMEO) -> str:
    return (await world.command("message_state", from_, to, id))[0]


def ask(id: str | None = "m1", body: str | None = "O, speak again", inner: str = REQUEST, **more: Any) -> str:
    return message(JULIET, body, id, inner, **more)


async def test_or_01_a_stored_message_is_answered_after_its_commit(any_world):
    """OR-01"""
    world = any_world
    romeo = await ready(world)

    outcome = await romeo.send(ask())
    assert not receipts(romeo)  # the row is not committed yet
    await world.stored(outcome)

    (receipt,) = await world.found(lambda: receipts(romeo))
    assert received_ids(romeo) == ["m1"]
    assert (receipt.from_.full, receipt.to.full, receipt.type) == (JULIET, f"{ROMEO}/orchard", "chat")
    assert {child.tag for child in receipt.children} == {
        f"{{{RECEIPTS}}}received",
        "{urn:xmpp:hints}no-store",
        "{urn:xmpp:hints}no-copy",
    }
    assert len(await world.rows()) == 1
    assert await state(world) == "stored-offline"
