"""Session and route tables: our own rows as objects, those of other nodes as bytes, one answer to who asks."""

import gc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xmppd.cluster.frames import FrameError
from xmppd.cluster.packed import PackedRows, digest_of, items_in, read_row, row_bytes
from xmppd.cluster.shared import Owner, Tally
from xmppd.cluster.tables import Route, RouteTable, SessionRow, SessionTable, pack_session, unpack_session
from xmppd.protocol.jid import JID, parse

US = Owner(b"u" * 16, 0, 1)
NEAR = Owner(b"n" * 16, 0, 1)
FAR = Owner(b"f" * 16, 0, 1)
JULIET = "juliet@example.net"

text = st.text(st.characters(exclude_categories=("Cs",)), max_size=200)
names = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="@/"), max_size=150)
priorities = st.none() | st.integers(-128, 127)


def own(table, jid, at=1, priority=None):
    row = SessionRow(parse(jid), US, at, object())
    displaced = table.insert(row)
    table.set_priority(row, priority)
    return row, displaced


def value(at=1, priority=None, *, anonymous=False):
    row = SessionRow(parse(JULIET + "/x"), US, at, anonymous=anonymous)
    row.priority = priority
    return pack_session(row)


def put(table, owner, jid, at=1, priority=None):
    if table.held(owner) == Tally():
        table.begin(owner)
        table.end(owner)
    assert table.put(owner, parse(jid).bare, parse(jid).resource.encode(), value(at, priority))


def delete(table, owner, jid):
    assert table.delete(owner, parse(jid).bare, parse(jid).resource.encode())


# -- packing


@given(names, names.filter(bool), text, st.integers(0, 2**63), priorities, st.booleans(), st.binary(max_size=300))
def test_a_row_comes_out_as_it_went_in_whatever_newer_fields_it_has(local, domain, resource, at, priority, anon, more):
    bare = f"{local}@{domain}" if local else domain
    row = SessionRow(JID(local, domain, resource, bare, f"{bare}/{resource}"), US, at, anonymous=anon)
    row.priority = priority
    packed = PackedRows()

    wire = b"?" + row_bytes(bare, resource.encode(), pack_session(row) + more)
    group, item, there, end = read_row(wire, 1)
    packed.put(group, item, there)

    [(item, there)] = items_in(packed.groups[bare])
    found = unpack_session(FAR, group, item, there)
    assert end == len(wire)
    assert found.jid.full == (f"{bare}/{resource}" if resource else bare)
    assert (found.jid.local, found.jid.domain, found.jid.resource, found.jid.bare) == (local, domain, resource, bare)
    assert (found.bound_at, found.priority, found.anonymous) == (at, priority, anon)
    assert (found.owner, found.session) == (FAR, None)
    assert packed.digest == digest_of(wire[1:])


@given(st.lists(st.tuples(st.booleans(), st.sampled_from("abc"), st.sampled_from("xyz"), st.binary(max_size=140))))
def test_packed_rows_are_a_dict_of_dicts(changes):
    packed, plain = PackedRows(), {}
    for there, group, item, value in changes:
        group, item = f"{group}@{group * 70}.org", item.encode() * 70
        old = plain.get((group, item))
        if there:
            plain[group, item] = value
            assert packed.put(group, item, value) == old
        else:
            plain.pop((group, item), None)
            assert packed.delete(group, item) == old

    assert {(group, item): value for group, item, value in packed.all()} == plain
    assert packed.count == len(plain)
    assert packed.groups.keys() == {group for group, _ in plain}
    hosts = [group.partition("@")[2] for group, _ in plain]
    assert packed.hosts == {host: hosts.count(host) for host in hosts}
    digest = 0
    for (group, item), value in plain.items():
        digest ^= digest_of(row_bytes(group, item, value))
    assert packed.digest == digest


@pytest.mark.parametrize("cut", range(len(row_bytes("juliet@example.net", b"balcony", b"0123456789"))))
def test_a_row_that_is_cut_off_is_refused(cut):
    row = row_bytes("juliet@example.net", b"balcony", b"0123456789")

    with pytest.raises(FrameError):
        read_row(row[:cut], 0)


def test_a_group_that_is_no_text_is_refused():
    with pytest.raises(FrameError):
        read_row(b"\x02\xff\xfe\x00\x00", 0)


def test_the_collector_never_looks_at_rows_of_others():
    table = SessionTable()
    for number in range(50):
        put(table, FAR, f"user{number}@example.net/{number}", number + 1, 0)
        put(table, FAR, f"user{number}@example.net/other", number + 1, 0)

    [groups] = table._groups

    assert len(groups) == 50
    assert not gc.is_tracked(groups)
    assert not any(gc.is_tracked(packed) for packed in groups.values())


# -- look-ups


def test_rows_of_all_nodes_are_found_together():
    table = SessionTable()
    here, _ = own(table, f"{JULIET}/here", 5, 3)
    put(table, NEAR, f"{JULIET}/near", 6, -1)
    put(table, FAR, f"{JULIET}/far", 7)
    put(table, FAR, "romeo@example.org/far", 8)

    rows = table.rows(JULIET)

    assert {resource: (row.owner, row.bound_at, row.priority) for resource, row in rows.items()} == {
        "here": (US, 5, 3),
        "near": (NEAR, 6, -1),
        "far": (FAR, 7, None),
    }
    assert rows["here"] is here
    assert table.nodes_of(JULIET) == {NEAR.member, FAR.member}
    assert table.nodes_of("romeo@example.org") == {FAR.member}
    assert table.nodes_of("nobody@example.org") == set()
    assert (table.count(), table.count("example.net"), table.count("example.org"), table.count("else")) == (4, 3, 1, 0)
    assert (table.count_of(NEAR), table.count_of(FAR)) == (1, 2)
    assert table.is_bound(parse(f"{JULIET}/far"))
    assert not table.is_bound(parse(f"{JULIET}/farther"))
    assert sorted(row.jid.full for row in table.all()) == [
        "juliet@example.net/far",
        "juliet@example.net/here",
        "juliet@example.net/near",
        "romeo@example.org/far",
    ]
    assert list(table.own_sessions()) == [here]


def test_a_bare_jid_with_own_rows_alone_is_not_copied():
    table = SessionTable()
    put(table, FAR, "romeo@example.net/far")
    own(table, f"{JULIET}/here")

    assert table.rows(JULIET) is table.rows(JULIET) is table._rows[JULIET]


def test_rows_stand_alone_again_when_those_of_others_have_gone():
    table = SessionTable()
    own(table, f"{JULIET}/here")
    put(table, FAR, f"{JULIET}/far")
    assert len(table.rows(JULIET)) == 2

    delete(table, FAR, f"{JULIET}/far")

    assert list(table.rows(JULIET)) == ["here"]
    assert table.rows(JULIET) is table._rows[JULIET]


def test_what_was_looked_up_before_does_not_outlive_a_change():
    table = SessionTable()
    put(table, FAR, f"{JULIET}/far", 1, 0)
    assert table.rows(JULIET)["far"].priority == 0
    put(table, FAR, f"{JULIET}/far", 1, 7)
    assert table.rows(JULIET)["far"].priority == 7
    own(table, f"{JULIET}/here")
    assert set(table.rows(JULIET)) == {"here", "far"}
    put(table, NEAR, f"{JULIET}/near")
    assert set(table.rows(JULIET)) == {"here", "far", "near"}
    table.drop(FAR)
    assert set(table.rows(JULIET)) == {"here", "near"}
    delete(table, NEAR, f"{JULIET}/near")
    assert set(table.rows(JULIET)) == {"here"}


def test_look_ups_of_very_many_bare_jids_keep_few_of_them():
    table = SessionTable()
    for number in range(10000):
        put(table, FAR, f"user{number}@example.net/far", 1, 0)

    for number in range(10000):
        assert table.rows(f"user{number}@example.net")["far"].priority == 0

    assert len(table._young) + len(table._old) <= 4096


def test_all_rows_can_be_read_in_pieces_while_they_change():
    table = SessionTable()
    rows = [own(table, f"user{number}@example.net/here")[0] for number in range(10)]
    for number in range(10):
        put(table, FAR, f"user{number}@example.org/far")

    pieces = table.pieces(3)
    found = next(pieces)
    table.remove(rows[9])
    delete(table, FAR, "user9@example.org/far")
    put(table, FAR, "user8@example.net/far")  # moves a bare JID from one dict to another
    found += [row for piece in pieces for row in piece]

    seen = [row.jid.full for row in found]
    assert {f"user{number}@example.net/here" for number in range(9)} <= set(seen)
    assert {f"user{number}@example.org/far" for number in range(9)} <= set(seen)
    assert len(seen) == len(set(seen))


# -- one full JID on two nodes


def test_the_later_bind_wins_and_the_loser_hears_of_it():
    table, lost = SessionTable(), []
    table.on_conflict.append(lost.append)
    announced = []
    older, _ = own(table, f"{JULIET}/r", 5)
    table.announce = lambda number, there, row: announced.append((number, there, read_row(row, 0)[:2]))

    put(table, FAR, f"{JULIET}/r", 6, 1)

    assert lost == [older]
    assert table.conflicts == 1
    assert announced == [(1, False, (JULIET, b"r"))]
    assert table.rows(JULIET)["r"].owner == FAR
    assert table.count() == 1
    assert not table.remove(older)


def test_an_earlier_bind_elsewhere_is_hidden_until_its_owner_takes_it_out():
    table, lost = SessionTable(), []
    table.on_conflict.append(lost.append)
    newer, _ = own(table, f"{JULIET}/r", 5)

    put(table, FAR, f"{JULIET}/r", 4, 1)

    assert table.rows(JULIET) == {"r": newer}
    assert lost == []
    assert newer.hides == FAR.member
    delete(table, FAR, f"{JULIET}/r")
    assert table.rows(JULIET)["r"].hides is None


def test_of_two_rows_elsewhere_the_newer_one_knows_whom_it_hides():
    table = SessionTable()
    put(table, NEAR, f"{JULIET}/r", 5)
    assert table.rows(JULIET)["r"].hides is None

    put(table, FAR, f"{JULIET}/r", 6, 1)

    row = table.rows(JULIET)["r"]
    assert row.owner == FAR
    assert row.hides == NEAR.member
    delete(table, NEAR, f"{JULIET}/r")
    assert table.rows(JULIET)["r"].hides is None


@pytest.mark.parametrize(("owner", "we_win"), [(NEAR, True), (Owner(b"z" * 16, 0, 1), False)])
def test_of_binds_at_the_same_time_the_larger_member_id_wins(owner, we_win):
    table, lost = SessionTable(), []
    table.on_conflict.append(lost.append)
    row, _ = own(table, f"{JULIET}/r", 5)

    put(table, owner, f"{JULIET}/r", 5)

    assert (table.rows(JULIET)["r"] is row) is we_win
    assert lost == [] if we_win else [row]


@pytest.mark.parametrize("order", [(NEAR, FAR), (FAR, NEAR)])
def test_a_third_node_sees_the_same_winner(order):
    table = SessionTable()
    for owner in order:
        put(table, owner, f"{JULIET}/r", 5, 0)

    assert table.rows(JULIET)["r"].owner == max(NEAR, FAR, key=lambda owner: owner.member)


def test_the_last_one_to_bind_wins_whatever_the_clocks_say():
    table = SessionTable()
    put(table, FAR, f"{JULIET}/r", 1000, 3)

    row, displaced = own(table, f"{JULIET}/r", 5)
    again, before = own(table, f"{JULIET}/r", 7)

    assert (displaced.owner, displaced.priority, displaced.session) == (FAR, 3, None)
    assert before is row
    assert (row.bound_at, again.bound_at) == (1001, 1002)
    assert table.rows(JULIET) == {"r": again}


def test_an_observer_that_crashes_keeps_nothing_from_the_others(caplog):
    def crash(row):
        raise RuntimeError("observer")

    table, lost = SessionTable(), []
    table.on_conflict += [crash, lost.append]
    row, _ = own(table, f"{JULIET}/r", 5)

    put(table, FAR, f"{JULIET}/r", 6)

    assert lost == [row]
    assert "table observer failed" in caplog.text


# -- who appears and who vanishes


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("absent", None, False),
        ("absent", -5, True),
        ("absent", 0, True),
        (None, 0, True),
        (None, -5, True),
        (-5, 0, True),
        (-5, -6, False),
        (0, 5, False),
        (0, -5, False),
        (0, None, False),
    ],
)
def test_a_row_elsewhere_that_becomes_available_is_told(before, after, told):
    table, appeared = SessionTable(), []
    if before != "absent":
        put(table, FAR, f"{JULIET}/r", 1, before)
    table.on_appeared.append(lambda bare, row: appeared.append((bare, row.jid.full, row.owner, row.priority)))

    put(table, FAR, f"{JULIET}/r", 1, after)

    assert appeared == ([(JULIET, f"{JULIET}/r", FAR, after)] if told else [])


def test_a_row_behind_a_newer_one_does_not_appear():
    table, appeared = SessionTable(), []
    own(table, f"{JULIET}/r", 9)
    table.on_appeared.append(lambda bare, row: appeared.append(row))

    put(table, FAR, f"{JULIET}/r", 8, 0)

    assert appeared == []


def test_a_repair_that_changes_nothing_tells_nothing():
    table, appeared, vanished = SessionTable(), [], []
    put(table, FAR, f"{JULIET}/r", 1, 0)
    table.on_appeared.append(lambda bare, row: appeared.append(row))
    table.on_vanished.append(lambda owner, rows: vanished.append(rows))

    table.begin(FAR)
    put(table, FAR, f"{JULIET}/r", 1, 0)
    table.end(FAR)

    assert (appeared, vanished) == ([], [])
    assert table.count() == 1


def test_who_goes_with_an_owner_is_told_except_who_is_as_available_elsewhere():
    table, gone = SessionTable(), []
    for number in range(4):
        put(table, FAR, f"user{number}@example.net/r", 5, number)
    put(table, FAR, "silent@example.net/r", 5)
    own(table, "user1@example.net/r", 6, 0)
    own(table, "silent@example.net/r", 6)
    put(table, NEAR, "user1@example.net/other", 1)
    for _ in range(2):  # each observer has an iterator of its own
        table.on_vanished.append(lambda owner, rows: gone.append((owner, rows)))

    table.drop(FAR)
    put(table, NEAR, "user2@example.net/r", 7, 0)  # between the death and the reading
    own(table, "user3@example.net/r", 7)  # bound, and nobody sees it yet

    for owner, rows in gone:
        assert owner == FAR
        for _ in range(2):
            assert [row.jid.full for row in rows] == ["user0@example.net/r", "user3@example.net/r"]
    assert table.count() == 5
    assert table.rows("user0@example.net") == {}


def test_what_a_snapshot_does_not_confirm_goes_at_its_end():
    table, gone = SessionTable(), []
    table.on_vanished.append(lambda owner, rows: gone.extend(row.jid.full for row in rows))
    for resource in ("kept", "changed", "deleted", "unknown"):
        put(table, FAR, f"{JULIET}/{resource}", 1, 0)

    table.begin(FAR)
    put(table, FAR, f"{JULIET}/kept", 1, 0)
    put(table, FAR, f"{JULIET}/changed", 1, 5)
    put(table, FAR, f"{JULIET}/new", 2)
    delete(table, FAR, f"{JULIET}/deleted")
    assert set(table.rows(JULIET)) == {"kept", "changed", "new", "unknown"}
    assert table.count() == 4

    assert table.end(FAR) == 1
    assert gone == [f"{JULIET}/unknown"]
    assert {resource: row.priority for resource, row in table.rows(JULIET).items()} == {
        "kept": 0,
        "changed": 5,
        "new": None,
    }
    fresh = SessionTable()
    for row in table.all():
        put(fresh, FAR, row.jid.full, row.bound_at, row.priority)
    assert fresh.held(FAR) == table.held(FAR)


def test_a_snapshot_that_begins_again_leaves_no_row_twice():
    table = SessionTable()
    for resource in ("a", "b", "c"):
        put(table, FAR, f"{JULIET}/{resource}", 1, 0)
    for resource in ("a", "b"):
        table.begin(FAR)
        put(table, FAR, f"{JULIET}/{resource}", 1, 0)
    assert set(table.rows(JULIET)) == {"a", "b", "c"}
    assert table.count() == 3

    table.end(FAR)

    assert set(table.rows(JULIET)) == {"b"}
    assert table.count() == 1


def test_an_earlier_start_of_a_node_has_no_say():
    table = SessionTable()
    new = Owner(FAR.member, 0, 2)
    put(table, FAR, f"{JULIET}/old")

    assert table.begin(new)
    assert table.rows(JULIET) == {}
    assert not table.put(FAR, JULIET, b"old", value())
    assert not table.delete(FAR, JULIET, b"old")
    assert not table.begin(FAR)
    assert table.drop(FAR) == 0
    put(table, new, f"{JULIET}/new")

    assert set(table.rows(JULIET)) == {"new"}
    assert table.held(FAR) == Tally()


def test_own_rows_have_the_tally_that_others_compute():
    table, copy = SessionTable(), SessionTable()
    rows = [own(table, f"user{number}@example.net/ü", number + 1, number - 5)[0] for number in range(10)]
    own(table, "user3@example.net/ü", 50)  # displaces
    table.remove(rows[4])
    table.set_priority(rows[5], None)
    table.set_priority(rows[3], 9)  # displaced: nobody's business
    copy.begin(FAR)

    for row in table.own_rows():
        copy.put(FAR, *row)

    assert copy.held(FAR) == table.own
    assert table.own.rows == 9


# -- routes


def test_routes_elsewhere_are_seen_and_ours_come_first():
    table = RouteTable()
    announced = []
    table.announce = lambda number, there, row: announced.append((number, there, read_row(row, 0)[0]))
    here = Route("example.net", US, lambda stanza: None)
    table.insert(here)
    twice = Route("example.net", US, lambda stanza: None)
    table.insert(twice)
    for owner in (NEAR, FAR):
        table.begin(owner)
        table.put(owner, "example.net", b"", b"")
    table.put(FAR, "rooms.example.net", b"", b"")

    assert table.routes("example.net")[:2] == (here, twice)
    assert table.elsewhere("example.net") == (FAR, NEAR)
    assert table.elsewhere("rooms.example.net") == (FAR,)
    assert [route.deliver for route in table.routes("rooms.example.net")] == [None]
    assert table.local("rooms.example.net") is None
    assert table.elsewhere("other.example") == table.routes("other.example") == ()
    assert table.domains() == ["example.net", "rooms.example.net"]
    assert list(table.own_rows()) == [("example.net", b"", b"")]
    table.remove(here)
    assert table.own.rows == 1
    table.remove(twice)
    table.drop(FAR)

    assert announced == [(2, True, "example.net"), (2, False, "example.net")]
    assert table.own == Tally()
    assert table.domains() == ["example.net"]
