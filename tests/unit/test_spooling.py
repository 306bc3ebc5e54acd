"""Which unacknowledged messages are written to the spool, and when their senders may know. No database, no clock."""

import asyncio
from types import SimpleNamespace

import pytest

from xmppd.c2s.backlog import LATE, SOON
from xmppd.c2s.managed import Managed
from xmppd.c2s.resumption import Resumption
from xmppd.c2s.spooling import Spooling
from xmppd.cluster.tables import Owner
from xmppd.delivery import ERROR, SAFE
from xmppd.errors import StorageUnavailable
from xmppd.events import MessagesFreeing, MessageSpooling
from xmppd.hooks import Hooks
from xmppd.protocol.jid import parse
from xmppd.protocol.stanza import build
from xmppd.spool import KeepItem, Kept
from xmppd.storage import next_place

OWNER = Owner(b"A" * 16, 0, 1)


class Spool:
    """Commits when it is told to."""

    def __init__(self):
        self.standing = self
        self.lease = True
        self.writes: list[tuple[KeepItem, asyncio.Future]] = []
        self.deleted: list[bytes] = []
        self.released: list[bytes] = []

    def holds_lease(self):
        return self.lease

    def sees_all(self):
        return True

    def keep_item(self, host, username, sender, stanza, **options):
        item = KeepItem(
            options["row_id"], host, username, sender, stanza, 0.0, None, options["dedup"], None, options["holder"]
        )
        return "spool keep", item

    def submit(self, item):
        future = asyncio.get_running_loop().create_future()
        self.writes.append((item, future))
        return future

    def submit_all(self, items):
        """One future for all, as the batcher has it: what each of them gives, or raises."""
        return asyncio.gather(*(self.submit(item) for item in items), return_exceptions=True)

    def delete(self, ids):
        self.deleted += ids
        return self._done()

    def release(self, ids, holder):
        self.released += ids
        return self._done()

    def _done(self):
        future = asyncio.get_running_loop().create_future()
        future.set_result(None)
        return future

    async def commit(self, result=Kept.STORED):
        writes, self.writes = self.writes, []
        for _, future in writes:
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)
        for _ in range(3):  # those who are told of it tell others
            await asyncio.sleep(0)


class Play:
    """A session with stream management whose client says nothing by itself."""

    def __init__(self):
        self.spool, self.hooks, self.rerouted, self.freed = Spool(), Hooks(), [], []
        self.hooks.add("offline", MessageSpooling, self.judge)
        self.hooks.add("offline", MessagesFreeing, self.freed.append)
        self.spooling = Spooling(self.spool, self.hooks, OWNER, reroute=self.rerouted.extend)
        self.written: list[bytes] = []
        self.available = True  # another session of hers
        jid = parse("juliet@capulet.example/balcony")
        self.session = SimpleNamespace(
            jid=jid,
            user=parse("juliet@capulet.example"),
            anonymous=False,
            closed=False,
            parts=SimpleNamespace(
                hooks=self.hooks,
                spooling=self.spooling,
                resumption=Resumption(),
                manager=SimpleNamespace(is_available=lambda user: self.available),
            ),
            carrier=SimpleNamespace(write=self.written.append),
        )
        self.managed = self.session.managed = Managed(self.session)
        self.backlog = self.managed.backlog

    def judge(self, event):
        event.keep = b"no-store" not in event.message.xml
        event.stanza = b"stamped " + event.message.xml

    def send(self, *ids, kind="message", inner=b""):
        attrs = {"to": "juliet@capulet.example", "from": "romeo@montague.example/a", "type": "chat"}
        if kind == "iq":
            attrs["type"] = "get"
        outcomes = [self.managed.send(build(kind, {**attrs, "id": id}, inner)) for id in ids]
        return outcomes[0] if len(outcomes) == 1 else outcomes

    def pass_time(self, start, seconds):
        """Visits every 50 ms."""
        for step in range(round(seconds / 0.05) + 1):
            self.backlog.visit(start + step * 0.05)


@pytest.fixture
async def play():
    play = Play()
    yield play
    play.spooling.stop()


async def test_the_patience_follows_the_round_trip(play):
    assert play.backlog.patience == SOON
    for _ in range(20):
        play.backlog.answered(0.2)
    assert play.backlog.patience == pytest.approx(0.6)
    for _ in range(20):
        play.backlog.answered(30.0)
    assert play.backlog.patience == LATE


async def test_what_is_acknowledged_in_time_is_not_written(play):
    for turn in range(50):
        outcome = play.send(f"m{turn}")
        play.backlog.visit(turn * 0.05)
        play.managed.acknowledged(turn + 1)
        assert outcome.result is SAFE
    assert play.spool.writes == []
    assert play.spooling.unacknowledged == 0


async def test_what_is_late_is_written_in_order_and_safe_with_the_commit(play):
    outcomes = play.send("a", "b")
    play.pass_time(0.0, 0.05)
    assert play.spool.writes == []
    play.pass_time(0.1, 0.05)
    assert [item.stanza.split(b'id="')[1][:1] for item, _ in play.spool.writes] == [b"a", b"b"]
    ids = [item.id for item, _ in play.spool.writes]
    assert ids == sorted(ids)
    assert [outcome.result for outcome in outcomes] == [None, None]
    await play.spool.commit()
    assert [outcome.result for outcome in outcomes] == [SAFE, SAFE]
    play.managed.acknowledged(2)
    assert play.spool.deleted == []  # not at once: many together
    play.spooling._tick()
    assert play.spool.deleted == ids


async def test_what_is_overdue_at_one_time_is_one_lot_of_which_each_is_told_of_its_own(play):
    lots = []
    submit_all = play.spool.submit_all
    play.spool.submit_all = lambda items: lots.append(items) or submit_all(items)
    outcomes = play.send("a", "b", "c")
    play.pass_time(-10.0, 0.0)  # seen long ago
    play.spooling._tick()
    assert [len(lot) for lot in lots] == [3]
    assert len(play.backlog.flying()) == 1
    (_, first), (_, second), (_, third) = play.spool.writes
    first.set_result(Kept.STORED)
    second.set_exception(StorageUnavailable("away"))
    third.set_result(Kept.DUPLICATE)
    play.spool.writes.clear()
    await play.spool.commit()
    assert [outcome.result for outcome in outcomes] == [SAFE, None, SAFE]
    assert play.backlog.flying() == set()
    assert play.backlog.rows == 2  # one of them is to be written once more
    play.backlog._again_at = 0.0
    play.spooling._tick()
    assert [lot[0].id for lot in lots[1:]] == [outcomes[1].row]


async def test_a_lot_the_queue_has_no_room_for_is_tried_again(play):
    def refuse(items):
        raise StorageUnavailable("the write queue is full")

    submit_all, play.spool.submit_all = play.spool.submit_all, refuse
    outcomes = play.send("a", "b")
    play.pass_time(-10.0, 0.0)
    play.spooling._tick()
    assert [outcome.result for outcome in outcomes] == [None, None]
    play.spool.submit_all = submit_all
    play.backlog._again_at = 0.0
    play.spooling._tick()
    await play.spool.commit()
    assert [outcome.result for outcome in outcomes] == [SAFE, SAFE]


async def test_a_lot_is_bounded(play):
    lots = []
    submit_all = play.spool.submit_all
    play.spool.submit_all = lambda items: lots.append(len(items)) or submit_all(items)
    play.send(*(f"m{number}" for number in range(300)))
    play.pass_time(-10.0, 0.0)
    play.spooling._tick()
    assert lots == [250, 50]
    lots.clear()
    play.managed.acknowledged(300)
    play.send("a", "b", "c", inner=b"<body>" + b"x" * 300_000 + b"</body>")
    play.pass_time(-10.0, 0.0)
    play.spooling._tick()
    assert lots == [2, 1]


@pytest.mark.parametrize("end", ["close", "leave", "stop"])
async def test_deletions_that_were_put_off_are_written_with_the_end(play, end):
    play.send("a")
    play.pass_time(0.0, 0.2)
    await play.spool.commit()
    play.managed.acknowledged(1)
    assert play.spool.deleted == []
    play.spooling.stop() if end == "stop" else getattr(play.managed, end)()
    assert len(play.spool.deleted) == 1


async def test_what_is_acknowledged_while_it_is_written_is_deleted(play):
    outcome = play.send("a")
    play.pass_time(0.0, 0.2)
    play.managed.acknowledged(1)
    assert outcome.result is SAFE
    await play.spool.commit()
    play.spooling._tick()
    assert len(play.spool.deleted) == 1
    assert play.backlog.rows == 0


async def test_without_a_lease_nothing_is_promised(play):
    outcome = play.send("a")
    play.pass_time(0.0, 0.2)
    play.spool.lease = False
    await play.spool.commit()
    play.spooling._tick()
    assert outcome.result is None
    play.spool.lease = True
    play.spooling._tick()
    assert outcome.result is SAFE


async def test_what_may_not_be_kept_is_safe_and_routed_again_at_the_end(play):
    secret, request = play.send("s", inner=b"<no-store xmlns='urn:xmpp:hints'/>"), play.send("q", kind="iq")
    play.pass_time(0.0, 0.2)
    assert (secret.result, request.result) == (SAFE, SAFE)
    assert play.spool.writes == []
    left = play.managed.close()
    assert [record.stanza.id for record in left] == ["s", "q"]
    assert all(record.outcome.result is None for record in left)


async def test_younger_messages_do_not_overtake_those_in_the_spool_at_the_end(play):
    play.send("a")
    play.pass_time(0.0, 0.2)
    await play.spool.commit()
    first = play.spool.released
    young = play.send("b")
    assert play.managed.close() == []
    [(item, _)] = play.spool.writes
    assert len(play.spool.released) == 2
    assert play.spool.released[1] == item.id
    assert first == play.spool.released
    await play.spool.commit()
    assert young.result is SAFE
    await asyncio.sleep(0.01)
    [event] = play.freed
    assert event.done.done()
    assert play.spooling.freeing == {}


async def test_without_rows_all_goes_to_another_session_at_once(play):
    play.send("a", "b")
    assert [record.stanza.id for record in play.managed.close()] == ["a", "b"]
    assert play.spool.writes == []


async def test_without_another_session_all_is_stored_at_once(play):
    play.available = False
    play.send("a", "b")
    assert play.managed.close() == []
    assert len(play.spool.writes) == len(play.spool.released) == 2


async def test_what_could_not_be_written_is_tried_again_with_the_same_id(play):
    outcome = play.send("a")
    play.pass_time(0.0, 0.2)
    [(item, _)] = play.spool.writes
    await play.spool.commit(StorageUnavailable("away"))
    assert outcome.result is None
    play.backlog._again_at = 0.0
    play.pass_time(1.0, 0.05)
    [(again, _)] = play.spool.writes
    assert again.id == item.id
    await play.spool.commit()
    assert outcome.result is SAFE


async def test_what_cannot_be_written_when_the_session_has_ended_is_routed_again(play):
    outcome = play.send("a")
    play.pass_time(0.0, 0.2)
    play.managed.close()
    await play.spool.commit(StorageUnavailable("away"))
    assert outcome.result is None
    assert [record.outcome for record in play.rerouted] == [outcome]


async def test_a_repetition_is_as_safe_as_what_is_stored_and_has_no_row(play):
    outcome = play.send("a")
    play.pass_time(0.0, 0.2)
    await play.spool.commit(Kept.DUPLICATE)
    assert outcome.result is SAFE
    assert play.managed.close() == []
    assert play.spool.released == []
    assert play.spooling.duplicates == 1


async def test_what_moves_keeps_its_row_until_it_is_safe_elsewhere(play):
    play.send("a", "b")
    play.pass_time(0.0, 0.2)
    await play.spool.commit()
    (one, first), (other, second) = play.managed.leave()
    assert (one.kept, other.kept) == (True, True)
    first.settle(SAFE)
    play.spooling._tick()
    assert play.spool.deleted == [one.row_id]
    other.holder = None  # it has come back, and was set free
    second.settle(SAFE)
    play.spooling._tick()
    assert play.spool.deleted == [one.row_id]


async def test_what_comes_back_and_was_not_written_is_routed_again(play):
    outcome = play.send("a")
    play.pass_time(0.0, 0.2)
    [(moved, pending)] = play.managed.leave()
    moved.holder = None
    pending.settle(SAFE)
    assert outcome.result is None
    await play.spool.commit(StorageUnavailable("away"))
    assert [record.outcome for record in play.rerouted] == [outcome]


async def test_what_is_refused_where_its_session_has_gone_stays_in_the_database(play):
    outcome = play.send("a")
    play.pass_time(0.0, 0.2)
    await play.spool.commit()
    assert outcome.result is SAFE
    [(moved, pending)] = play.managed.leave()
    pending.settle(ERROR)
    await asyncio.sleep(0.01)
    assert (play.spool.deleted, play.spool.released) == ([], [moved.row_id])
    assert [event.user.full for event in play.freed] == ["juliet@capulet.example"]


async def test_what_is_refused_there_before_it_was_promised_has_been_told_to_its_sender(play):
    outcome = play.send("a")
    play.pass_time(0.0, 0.2)
    [(moved, pending)] = play.managed.leave()
    pending.settle(ERROR)
    play.spooling._tick()
    assert outcome.result is ERROR
    assert (play.spool.deleted, play.spool.released) == ([moved.row_id], [])


async def test_what_was_let_go_and_could_not_be_written_is_routed_again_once(play):
    """It may come back to the same session, with the same place, so its row has the same id."""
    stanza = build("message", {"to": "juliet@capulet.example", "type": "chat", "id": "m"})
    stanza.place = next_place()
    play.managed.send(stanza)
    play.backlog.at_once()
    play.backlog.set_aside()
    assert play.backlog.resume() == []
    await play.spool.commit(StorageUnavailable("away"))
    assert [record.stanza for record in play.rerouted] == [stanza]

    play.managed.send(stanza)
    play.backlog.at_once()
    await play.spool.commit(StorageUnavailable("away"))
    assert len(play.rerouted) == 1
