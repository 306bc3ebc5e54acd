"""Announcements of administrators, and the message of the day."""

from typing import Any

import pytest

from tests.modules.world import HOST, Client, World, condition, message
from xmppd.access import AccessRules
from xmppd.config import parse as parse_config
from xmppd.errors import CommandError, ConfigError, StorageUnavailable
from xmppd.events import UserDeleted
from xmppd.protocol.jid import parse

ADMIN = f"escalus@{HOST}"


def rules(**options: Any) -> AccessRules:
    usual = {"hosts": [HOST], "acl": {"admin": {"user": ADMIN}}}
    return AccessRules(parse_config(usual | options, source="x.yml"))


async def admin_in(world: World, **options: Any) -> Client:
    world.access.rules = rules()
    await world.load(offline={}, announce=options)
    await world.account("escalus", "romeo", "juliet", "nurse")
    return await world.online("escalus")


async def announce(world: World, client: Client, path: str, body: str | None = "Peace!", **more: Any) -> None:
    """And wait until it has been done."""
    await client.send(message(f"{HOST}/announce/{path}", body, **more))
    await world.until(lambda: not [task for task in world.tasks if "announce" in task.get_name()])
    await world.storage.batcher.drain()


def errors(client: Client) -> list[str]:
    return [condition(stanza) for stanza in client.received if stanza.type == "error"]


async def test_an_announcement_reaches_everybody_who_is_connected(any_world):
    world = any_world
    admin = await admin_in(world)
    romeo, silent = await world.online("romeo"), world.login("juliet")
    phone = await world.online("juliet", "phone", priority=-1)

    await announce(world, admin, "online", inner="<subject>Decree</subject>", type="headline")

    for client in (admin, romeo, silent, phone):
        [stanza] = client.received
        assert (stanza.type, stanza.from_.full, stanza.to) == ("headline", HOST, client.session.jid)
        assert (stanza.body, stanza.element.findtext("{jabber:client}subject")) == ("Peace!", "Decree")
    assert await world.spool.count(HOST, "nurse") == 0


async def test_an_announcement_to_all_waits_for_those_who_are_absent(any_world, monkeypatch):
    monkeypatch.setattr("modules.announce._PIECE", 2)  # several pages of accounts
    world = any_world
    admin = await admin_in(world)
    romeo = await world.online("romeo")

    await announce(world, admin, "all", type="headline")  # which is never stored, so it becomes an ordinary message

    assert romeo.bodies == admin.bodies == ["Peace!"]
    assert (await world.online("juliet")).bodies == (await world.online("nurse")).bodies == ["Peace!"]


async def test_all_hosts_are_meant_when_it_says_so(world):
    admin = await admin_in(world)
    romeo = await world.online("romeo")

    await announce(world, admin, "all-hosts/online")
    await announce(world, admin, "all-hosts/all", "To all")

    assert romeo.bodies == ["Peace!", "To all"]


@pytest.mark.parametrize("path", ["all", "online", "all-hosts/all", "motd", "motd/update", "motd/delete"])
async def test_only_administrators_announce(world, path):
    admin = await admin_in(world)
    await announce(world, admin, "motd/update", "The old one")
    romeo = await world.online("romeo")
    romeo.received.clear()

    await announce(world, romeo, path)

    assert errors(romeo) == ["forbidden"]
    assert admin.received == []
    assert await world.command("announce_motd_get", HOST) == "The old one"


async def test_an_access_rule_says_who_announces_and_to_the_users_of_which_host(world):
    world.access.rules = rules(
        acl={"staff": {"user": f"romeo@{HOST}"}},
        access_rules={"heralds": {"allow": "staff"}},
        host_config={"globe.example": {"access_rules": {"heralds": "deny"}}},
        hosts=[HOST, "globe.example"],
    )
    world.hosts = (HOST, "globe.example")
    await world.load(announce={"access": "heralds"})
    await world.account("romeo")
    romeo = await world.online("romeo")

    await announce(world, romeo, "online")
    await announce(world, romeo, "all-hosts/online", "Everywhere!")

    assert romeo.bodies == ["Peace!"]
    assert errors(romeo) == ["forbidden"]


async def test_a_rule_that_does_not_exist_is_refused(world):
    with pytest.raises(ConfigError, match=r"modules\.announce\.access: there is no access rule 'anounce'"):
        await world.load(announce={"access": "anounce"})


@pytest.mark.parametrize(("path", "body", "expected"), [
    ("nonsense", "x", "item-not-found"), ("all-hosts", "x", "item-not-found"), ("online", None, "bad-request"),
    ("", "x", "item-not-found"), ("motd/", "x", "item-not-found"),
    ("all-hosts/all-hosts/online", "x", "item-not-found"),
])  # fmt: skip
async def test_what_is_no_announcement(world, path, body, expected):
    admin = await admin_in(world)

    await announce(world, admin, path, body)

    assert errors(admin) == [expected]
    assert admin.bodies == []


async def test_an_error_that_comes_back_is_no_announcement(world):
    admin = await admin_in(world)

    await announce(world, admin, "online", type="error")

    assert admin.received == []


async def test_the_message_of_the_day_is_shown_once_to_everybody(any_world):
    world = any_world
    admin = await admin_in(world)
    romeo = await world.online("romeo")

    await announce(world, admin, "motd")
    juliet = await world.online("juliet")
    again = await world.online("juliet", "phone")
    world.sweep()
    romeo.lose()
    back = await world.online("romeo")
    await world.storage.batcher.drain()
    await world.loader.reload("announce")  # it is in the database
    later = await world.online("juliet", "laptop")
    nurse = await world.online("nurse")

    assert (admin.bodies, romeo.bodies, juliet.bodies, nurse.bodies) == (["Peace!"],) * 4
    assert again.bodies == back.bodies == later.bodies == []
    [stanza] = juliet.received
    assert (stanza.from_.full, stanza.to.full) == (HOST, f"juliet@{HOST}")


async def test_an_update_is_shown_at_the_next_login_and_a_deleted_one_no_longer(any_world):
    world = any_world
    admin = await admin_in(world)
    await announce(world, admin, "motd", "one")
    admin.received.clear()

    await announce(world, admin, "motd/update", "two")
    juliet = await world.online("juliet")
    await announce(world, admin, "motd/delete", None)
    nurse = await world.online("nurse")

    assert (admin.bodies, juliet.bodies, nurse.bodies) == ([], ["two"], [])
    assert await world.command("announce_motd_get", HOST) == ""


async def test_a_session_with_a_negative_priority_is_not_shown_it_yet(world):
    admin = await admin_in(world)
    await announce(world, admin, "motd/update")

    juliet = await world.online("juliet", priority=-1)
    assert juliet.bodies == []
    await juliet.available(1)

    assert juliet.bodies == ["Peace!"]


async def test_what_another_node_has_set_is_seen_a_little_later(world):
    await admin_in(world)
    first = await world.online("romeo")
    store = world.loader._loaded["announce"].instance._store
    await store.set(HOST, b"<message from='capulet.example'><body>From afar</body></message>")

    world.advanced += 11
    juliet = await world.online("juliet")

    assert (first.bodies, juliet.bodies) == ([], ["From afar"])


async def test_a_login_does_not_fail_when_the_message_of_the_day_cannot_be_read(world):
    admin = await admin_in(world)
    await announce(world, admin, "motd/update")
    read = world.storage.loader._read

    async def away(*args: Any, **options: Any) -> Any:
        raise StorageUnavailable("the database is away")

    world.storage.loader._read = away
    juliet = await world.online("juliet")
    world.storage.loader._read = read
    phone = await world.online("juliet", "phone")

    assert juliet.session.priority == 0
    assert phone.bodies == ["Peace!"]


async def test_a_new_account_of_the_same_name_is_shown_it_again(any_world):
    world = any_world
    admin = await admin_in(world)
    await announce(world, admin, "motd/update")
    first = await world.online("juliet")
    world.sweep()
    first.lose()
    await world.storage.batcher.drain()

    await world.tell(UserDeleted(parse(f"juliet@{HOST}")))

    assert (await world.online("juliet")).bodies == ["Peace!"]


async def test_operators_announce_with_commands(any_world):
    world = any_world
    admin = await admin_in(world)

    await world.command("announce_send_online", HOST, "Decree", "one <b>")
    await world.command("announce_send_all", HOST, "", "two")
    await world.command("announce_motd_set_online", HOST, "", "three")
    await world.until(lambda: len(admin.bodies) == 3)
    await world.command("announce_motd_update", HOST, "", "four")

    assert sorted(admin.bodies) == ["one <b>", "three", "two"]
    assert await world.command("announce_motd_get", HOST) == "four"
    await world.command("announce_motd_delete", HOST)
    assert await world.command("announce_motd_get", HOST) == ""
    with pytest.raises(CommandError, match="unknown host"):
        await world.command("announce_send_all", "verona.example", "", "x")


async def test_an_anonymous_user_is_shown_it_and_nothing_is_kept_about_them(world):
    admin = await admin_in(world)
    await announce(world, admin, "motd/update")

    guest = world.login("guest", anonymous=True)
    await guest.available()
    await guest.available(-1)
    await guest.available()
    await announce(world, admin, "motd", "Another")
    await world.storage.batcher.drain()

    assert guest.bodies == ["Peace!", "Another"]
    assert await world.loader._loaded["announce"].instance._store.seen(guest.session.user) is None
