"""Who serves from a database, who is a member, who lives: the same on both databases."""

import asyncio
import uuid
from dataclasses import replace

import pytest

from xmppd.errors import NodeIdInUse, NodeNameTaken, NodeRemoved
from xmppd.storage.members import Members, Registration

LEASE = 5.0


def registration(name: str = "xmppd@node01", **changes: object) -> Registration:
    values = {
        "node": uuid.uuid4().bytes,
        "name": name,
        "address": "127.0.0.1:4369",
        "incarnation": 1,
        "version": "0.1.0",
        "hosts_hash": b"h" * 32,
        "instance": uuid.uuid4().bytes,
        "place": uuid.uuid4().bytes * 2,
    }
    return Registration(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture
async def members(storage) -> Members:
    members = Members(storage)
    await members.identity()
    return members


async def registered(members: Members, name: str, **changes: object) -> Registration:
    me = registration(name, **changes)
    await members.register(me, lease=LEASE)
    return me


async def states(members: Members) -> dict[str, str]:
    return {row.name: row.state for row in await members.all()}


async def test_nodes_that_start_at_once_agree_on_the_identity_of_the_database(storage, make_storage, database):
    other = make_storage(database)
    await other.open()

    found = await asyncio.gather(*(Members(each).identity() for each in (storage, other) * 3))

    assert len(set(found)) == 1
    assert found[0].cluster != found[0].database


async def test_a_new_node_is_single_and_lives(members):
    me = await registered(members, "xmppd@node01")

    (row,) = await members.all()
    assert (row.node, row.state, row.running) == (me.node, "single", True)
    assert 0 < row.lease_left <= LEASE


async def test_a_node_that_released_its_lease_does_not_run(members):
    me = await registered(members, "xmppd@node01")

    await members.release(me.node, me.instance)

    (row,) = await members.all()
    assert not row.running


async def test_a_copy_of_the_data_folder_is_refused_while_the_first_one_lives(members):
    me = await registered(members, "xmppd@node01")
    copy = replace(me, instance=uuid.uuid4().bytes, place=b"elsewhere".ljust(32))

    with pytest.raises(NodeIdInUse, match=r"two nodes claim one node id: xmppd@node01.*--new-identity"):
        await members.register(copy, lease=LEASE)

    assert (await members.renew(me.node, me.instance, lease=LEASE)).ours


async def test_a_moved_data_folder_is_taken_up_when_the_lease_has_ended(members):
    me = registration()
    await members.register(me, lease=0.05)
    moved = replace(me, instance=uuid.uuid4().bytes, place=b"elsewhere".ljust(32))
    await asyncio.sleep(0.1)

    await members.register(moved, lease=LEASE)

    assert not (await members.renew(me.node, me.instance, lease=LEASE)).ours
    assert (await members.renew(moved.node, moved.instance, lease=LEASE)).ours


async def test_a_killed_node_comes_back_to_its_place_at_once(members):
    me = await registered(members, "xmppd@node01")
    again = replace(me, instance=uuid.uuid4().bytes, incarnation=2)

    await members.register(again, lease=LEASE)

    assert (await members.look(me.node, again.instance)).ours
    assert not (await members.look(me.node, me.instance)).ours


async def test_a_lapsed_lease_is_renewed_when_nobody_else_took_the_id(members):
    me = registration()
    await members.register(me, lease=0.05)
    await asyncio.sleep(0.1)

    pulse = await members.renew(me.node, me.instance, lease=LEASE)

    assert pulse.ours
    assert (await members.all())[0].running


async def test_joining_twice_and_at_once_makes_each_a_member_once(members, make_storage, database):
    nodes = [await registered(members, f"xmppd@node0{number}") for number in range(4)]
    other = make_storage(database)
    await other.open()
    pairs = [(nodes[0].node, each.node) for each in nodes[1:]] * 2

    await asyncio.gather(*(each.join(pair) for pair, each in zip(pairs, [members, Members(other)] * 3, strict=True)))

    rows = await members.all()
    assert {row.state for row in rows} == {"member"}
    assert all(row.joined_at for row in rows)


async def test_every_change_of_the_members_shows_in_the_revision(members):
    first = await registered(members, "xmppd@node01")
    second = await registered(members, "xmppd@node02")
    revisions = [(await members.look(first.node, first.instance)).revision]

    for change in (
        members.join([first.node, second.node]),
        members.remove(second.node, by="xmppd@node01", why="asked to"),
    ):
        await change
        revisions.append((await members.look(first.node, first.instance)).revision)

    assert revisions == sorted(set(revisions))


async def test_a_removed_member_stays_removed_and_knows_why(members):
    first = await registered(members, "xmppd@node01")
    second = await registered(members, "xmppd@node02")
    await members.join([first.node, second.node])

    assert await members.remove(second.node, by="xmppd@node01", why="leave_cluster")
    row = await members.register(replace(second, instance=uuid.uuid4().bytes), lease=LEASE)

    assert (row.state, row.left_by, row.left_why) == ("removed", "xmppd@node01", "leave_cluster")
    assert row.left_at
    with pytest.raises(NodeRemoved, match=r"xmppd@node02 was removed from the cluster by xmppd@node01 at 20"):
        await members.join([first.node, second.node])
    assert await states(members) == {"xmppd@node01": "member", "xmppd@node02": "removed"}


async def test_only_a_member_can_be_removed_and_only_once(members):
    first = await registered(members, "xmppd@node01")
    second = await registered(members, "xmppd@node02")

    assert not await members.remove(second.node, by="x", why="y")
    await members.join([first.node, second.node])
    assert await members.remove(second.node, by="x", why="y")
    assert not await members.remove(second.node, by="z", why="y")


async def test_two_members_never_have_one_name(members):
    first = await registered(members, "xmppd@node01")
    twin = await registered(members, "xmppd@node01")
    other = await registered(members, "xmppd@node02")
    await members.join([first.node, other.node])

    with pytest.raises(NodeNameTaken, match=r"another member at 127\.0\.0\.1:4369 is called xmppd@node01"):
        await members.join([twin.node, other.node])
    with pytest.raises(NodeNameTaken):
        await members.register(replace(other, name="xmppd@node01"), lease=LEASE)

    assert [row.state for row in await members.all()].count("member") == 2


async def test_a_node_sees_that_it_is_wanted_and_how_long_ago(members):
    me = await registered(members, "xmppd@node01")
    assert (await members.look(me.node, me.instance)).wanted_ago is None

    await members.want(me.node)

    ago = (await members.look(me.node, me.instance)).wanted_ago
    assert ago is not None
    assert 0 <= ago < 5


async def test_a_row_that_has_gone_is_nobodys(members):
    pulse = await members.look(uuid.uuid4().bytes, uuid.uuid4().bytes)

    assert (pulse.ours, pulse.state) == (False, "")
