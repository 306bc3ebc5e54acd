"""Links over a simulated network that loses, delays, repeats and cuts."""

import pytest

from tests.cluster.sim import Sim, Weather
from xmppd.cluster.frames import BEAT, HEADER, VERSION
from xmppd.cluster.interfaces import Kind
from xmppd.cluster.link_types import Settings


def two(**options):
    sim = Sim(**options)
    one, other = sim.add("one", "two")
    sim.run_until(sim.all_up)
    return sim, one, other


def three(**options):
    sim = Sim(**options)
    nodes = sim.add("one", "two", "three")
    sim.run_until(sim.all_up)
    sim.run(3)  # each knows by now whom the others reach
    return sim, *nodes


def status(node, of):
    return next(status for status in node.links.status() if status.node == of.links.owner.member)


def test_two_members_find_each_other_and_say_who_they_are():
    sim, one, other = two()

    assert one.ups == ["two"]
    assert other.ups == ["one"]
    peer = one.links.peers[sim.id("two")]
    assert (peer.name, peer.version, peer.protocol, peer.owner) == ("two", "0.1.0", VERSION, other.links.owner)
    assert status(one, other).epoch == "1/1"


def test_frames_of_one_turn_of_the_loop_are_one_packet():
    sim, one, other = two()
    before = status(one, other).sent_packets

    for number in range(100):
        one.send(sim.id("two"), b"%d" % number)
    sim.run(0.01)

    assert other.seen(sim.id("one")) == [b"%d" % number for number in range(100)]
    assert status(one, other).sent_packets - before == 1


def test_a_lonely_acknowledgement_comes_within_20_ms():
    sim, one, _ = two()
    one.send(sim.id("two"), b"x")

    assert sim.run_until(lambda: one.links.queued == 0) < 0.03


def test_an_acknowledgement_rides_on_what_is_sent_anyway():
    sim, one, other = two()
    other.frame = lambda peer, body: other.links.send(peer.node, Kind.STANZA, b"answer")
    other.links._handlers[Kind.STANZA] = other.frame
    sim.run(0.1)
    before = sim.packets

    one.send(sim.id("two"), b"question")
    sim.run(0.015)

    assert one.links.queued == 0
    assert sim.packets - before == 2


def test_an_idle_link_costs_one_heartbeat_a_second_each_way():
    sim, _, _ = two()
    sim.run(1)
    before = sim.packets

    sim.run(10)

    assert sim.packets - before <= 22


@pytest.mark.parametrize("size", [0, 1, 126, 127, 128, 65_000, 65_400, 70_000, 1_000_000, 16 * 1024 * 1024])
def test_a_frame_of_any_size_arrives_whole(size):
    sim, one, other = two(weather=Weather(loss=0.05, jitter=0.002))
    frames = [b"before", bytes(range(256)) * (size // 256) + b"y" * (size % 256), b"after"]

    for body in frames:
        one.send(sim.id("two"), body)

    sim.run_until(lambda: len(other.seen(sim.id("one"))) == 3)
    assert other.seen(sim.id("one")) == frames


def test_a_frame_that_no_link_carries_is_refused_here():
    sim, one, _ = two()

    with pytest.raises(ValueError, match="at most"):
        one.send(sim.id("two"), bytes(16 * 1024 * 1024 + 1))


def test_nothing_is_sent_to_those_who_are_not_up():
    sim, one, _ = two()

    assert not one.links.send(sim.id("nobody"), Kind.STANZA, b"x")


@pytest.mark.parametrize("loss", [0.01, 0.1, 0.3])
def test_what_is_lost_is_sent_again_and_what_comes_twice_is_dropped(loss):
    sim, one, other = two(seed=3, weather=Weather(loss=loss, twice=0.1, jitter=0.02))
    sent = []
    for number in range(500):
        sent.append(b"%d" % number)
        one.send(sim.id("two"), sent[-1])
        sim.run(0.003)

    sim.run_until(lambda: one.links.queued == 0)

    assert other.seen(sim.id("one")) == sent
    assert one.downs == other.downs == []


def test_one_lost_packet_costs_a_round_trip_and_not_a_time_out():
    sim, one, other = two()
    sim.run(3)
    sim.cut("one", "two")
    one.send(sim.id("two"), b"lost")
    sim.run(0.001)
    sim.heal()
    sim.run(0.003)
    one.send(sim.id("two"), b"next")

    assert sim.run_until(lambda: len(other.seen(sim.id("one"))) == 2) < 0.015
    assert other.seen(sim.id("one")) == [b"lost", b"next"]


def test_no_flapping_with_200_ms_and_one_in_a_hundred_lost():
    sim, one, other = two(seed=5, weather=Weather(delay=0.1, jitter=0.01, loss=0.01))
    for number in range(3000):
        one.send(sim.id("two"), b"%d" % number)
        other.send(sim.id("one"), b"%d" % number)
        sim.run(0.02)
    sim.run_until(lambda: one.links.queued == other.links.queued == 0)

    assert one.downs == other.downs == []
    assert other.seen(sim.id("one")) == one.seen(sim.id("two")) == [b"%d" % number for number in range(3000)]
    assert 190 < status(one, other).rtt_ms < 250
    assert status(one, other).retransmitted < 100


def test_round_trips_are_measured_without_the_time_an_answer_waits():
    sim, one, other = two(weather=Weather(delay=0.005))
    sim.run(5)

    assert status(one, other).rtt_ms == pytest.approx(10, abs=0.5)


def test_silence_is_noticed_within_peer_timeout_on_both_sides():
    sim, one, other = two()
    sim.run(5)
    sim.cut("one", "two")

    took = sim.run_until(lambda: one.downs and other.downs)

    assert 5 <= took <= 6.1
    assert one.downs[0][1].startswith("silent for 6")


def test_a_cut_of_one_direction_takes_both_ends_down_and_up_together():
    sim, one, other = two()
    sim.cut("one", "two", both=False)
    sim.run_until(lambda: one.downs and other.downs, 8)
    sim.run(20)
    assert not one.links.peers
    assert not other.links.peers
    assert (len(one.ups), len(other.ups)) == (1, 1)

    sim.heal()
    sim.run_until(sim.all_up, 2)

    assert (one.ups, other.ups) == (["two"] * 2, ["one"] * 2)


def test_a_killed_process_is_noticed_in_less_than_a_second():
    sim, one, _ = two()
    sim.run(2)

    sim.kill("two")

    assert sim.run_until(lambda: one.downs) < 0.9
    assert one.downs == [("two", "its process has gone")]


@pytest.mark.parametrize("delay", [0.0005, 0.1])
def test_a_false_suspicion_harms_nobody(delay):
    sim, one, other = two(weather=Weather(delay=delay))
    sim.run(5)

    for _ in range(5):
        one.transport.on_suspect(sim.id("two"))
        sim.run(1)

    assert one.downs == other.downs == []


@pytest.mark.parametrize("seconds", [0.05, 0.3, 0.6])
def test_a_server_that_is_started_again_within_the_probes_is_no_death(seconds):
    sim, one, other = two()
    sim.run(5)
    sim.cut("one", "two")
    one.transport.on_suspect(sim.id("two"))
    one.send(sim.id("two"), b"kept")
    sim.run(seconds)

    sim.heal()
    sim.run(2)

    assert one.downs == other.downs == []
    assert other.seen(sim.id("one")) == [b"kept"]


def test_nobody_is_suspected_while_our_own_connection_is_away():
    sim, one, _ = two()
    sim.run(2)
    sim.cut("one", "two")
    one.transport.connected = False
    one.transport.on_suspect(sim.id("two"))
    sim.run(2)

    assert one.downs == []


def test_a_restarted_peer_is_down_and_up_at_once():
    sim, one, _ = two()
    one.send(sim.id("two"), b"to the old one")
    sim.kill("two", noticed=False)
    (other,) = sim.add("two")

    assert sim.run_until(lambda: len(one.ups) == 2) < 0.2
    assert one.downs == [("two", "it was restarted")]
    one.send(sim.id("two"), b"to the new one")
    sim.run(0.1)
    assert other.seen(sim.id("one")) == [b"to the new one"]
    assert one.links.peers[sim.id("two")].owner.incarnation == 2


def test_old_packets_of_a_former_life_change_nothing():
    sim, one, other = two()
    kept = []
    other.transport.send = lambda node, packet: (kept.append(packet), sim.carry(other.transport, node, packet))
    other.links._local.emit = other.transport.send
    for _ in range(5):
        other.send(sim.id("one"), b"old")
        sim.run(1)
    sim.kill("two", noticed=False)
    sim.add("two")
    sim.run(3)
    before = (list(one.ups), list(one.downs), one.seen(sim.id("two")))

    for packet in kept:
        one.transport.on_packet(packet)
    sim.run(5)

    assert (one.ups, one.downs, one.seen(sim.id("two"))) == before


def test_a_node_that_stops_says_so():
    sim, one, other = two()
    other.send(sim.id("one"), b"last words")

    other.links.stop("leaving")
    sim.run(0.01)

    assert other.links.farewells == 0
    assert one.seen(sim.id("two")) == [b"last words"]
    assert one.downs == [("two", "leaving")]
    assert other.downs == [("one", "leaving")]
    sim.run(20)
    assert one.ups == ["two"]


def test_a_goodbye_that_is_lost_is_said_again():
    sim, one, other = two()
    sim.run(3)
    sim.cut("one", "two")
    other.links.stop("leaving")
    sim.run(0.1)
    assert other.links.farewells == 1

    sim.heal()
    sim.run(1.1)

    assert one.downs == [("two", "leaving")]
    assert other.links.farewells == 0
    assert one.ups == ["two"]


def test_a_link_that_is_cut_by_an_operator_stays_down_for_so_long():
    sim, one, other = two()

    assert one.links.disconnect(sim.id("two"), 10)
    sim.run(0.01)

    assert one.downs == [("two", "disconnected by an operator")]
    assert other.downs == [("one", "disconnected by an operator")]
    assert status(one, other).state == "disconnected"
    sim.run(9.9)
    assert not one.links.peers
    assert sim.run_until(sim.all_up) < 1.5
    assert not one.links.disconnect(sim.id("nobody"), 1)


def test_a_member_that_is_removed_is_told_and_not_heard_any_more():
    sim, one, other = two()

    one.links.set_members([])
    sim.run(5)

    assert one.downs == [("two", "no longer a member")]
    assert other.downs == [("one", "no longer a member")]
    assert one.links.status() == []
    assert one.links.counters.foreign > 0


def test_a_node_that_is_no_member_is_not_answered_until_it_is_one():
    members = set()
    sim = Sim()
    (one,) = sim.add("one", is_member=members.__contains__)
    (other,) = sim.add("two")
    one.links.set_members([])
    sim.run(5)
    assert one.transport.sent == 0

    members.add(sim.id("two"))
    sim.run(2)

    assert one.ups == ["two"]
    assert other.ups == ["one"]


def test_packets_of_another_cluster_are_nobodys():
    sim, one, _ = two()

    one.links.set_cluster(b"d" * 16)
    sim.run(20)

    assert one.downs[0] == ("two", "it changed to another cluster")
    assert not one.links.peers
    assert one.links.counters.foreign > 0


def test_too_much_that_nobody_takes_ends_the_link():
    sim, one, other = two(settings=Settings(max_queue=1_000_000))
    sim.cut("one", "two")
    for _ in range(100):
        one.send(sim.id("two"), bytes(20_000))
    sim.run(0.01)
    assert one.downs == [("two", "too much waits for it")]
    assert one.links.queued == 0

    sim.heal()
    sim.run(3)

    assert len(one.ups) == len(other.ups) == 2


def test_a_short_outage_loses_nothing_and_is_made_good_quickly():
    sim, one, other = two()
    sim.run(5)
    sent = []
    sim.cut("one", "two")
    for number in range(200):
        sent.append(b"%d" % number * 1000)
        one.send(sim.id("two"), sent[-1])
        sim.run(0.005)
    sim.heal()

    took = sim.run_until(lambda: one.links.queued == 0)

    assert took < 0.7
    assert other.seen(sim.id("one")) == sent
    assert one.downs == other.downs == []


def test_20_mb_go_through_in_round_trips_and_not_in_heartbeats():
    sim, one, other = two(weather=Weather(delay=0.002))
    for _ in range(200):
        one.send(sim.id("two"), bytes(100_000))

    assert sim.run_until(lambda: one.links.queued == 0) < 0.2
    assert len(other.seen(sim.id("one"))) == 200


def test_a_gap_that_the_transport_noticed_is_filled_at_once():
    sim, one, other = two()
    sim.run(5)
    sim.cut("one", "two")
    for number in range(20):
        one.send(sim.id("two"), b"%d" % number)
        sim.run(0.0001)
    sim.heal()
    sim.run(0.003)

    other.transport.on_gap()

    assert sim.run_until(lambda: len(other.seen(sim.id("one"))) == 20) < 0.01


def test_a_process_that_stood_still_does_not_blame_the_others():
    sim, one, other = two()
    sim.run(3)
    sim.clock.freeze(30)
    sim.run(3)

    assert one.downs == other.downs == []


# Ways


def test_a_pair_that_is_cut_talks_through_a_third_and_nobody_goes_down():
    sim, one, two_, three_ = three()
    sim.cut("one", "three")
    for number in range(1000):
        one.send(sim.id("three"), b"%d" % number)
        three_.send(sim.id("one"), b"%d" % number)
        sim.run(0.02)
    sim.run(1)

    assert [node.downs for node in (one, two_, three_)] == [[], [], []]
    assert three_.seen(sim.id("one")) == one.seen(sim.id("three")) == [b"%d" % number for number in range(1000)]
    assert status(one, three_).via == sim.id("two")
    assert two_.links.counters.relayed > 500

    sim.heal()
    sim.run(3)
    assert status(one, three_).via is None
    assert status(three_, one).via is None


def test_a_node_is_unseen_while_somebody_does_not_reach_it():
    sim, one, other, third = three()
    members = {name: node.links.owner.member for name, node in (("one", one), ("two", other), ("three", third))}

    def unseen(node, me):
        found = node.links.unseen(member for name, member in members.items() if name != me)
        return sorted(name for name, member in members.items() if member in found)

    assert unseen(one, "one") == []
    sim.cut("two", "three")
    sim.run_until(lambda: unseen(one, "one") == ["three", "two"])
    assert len(one.links.peers) == len(other.links.peers) == 2  # nobody is down
    sim.heal()
    sim.run_until(lambda: unseen(one, "one") == [] and unseen(third, "three") == [])
    sim.kill("three")
    sim.run_until(lambda: unseen(one, "one") == ["three"])


def test_the_first_frame_after_a_cut_arrives_within_a_second_through_the_third():
    sim, one, _, three_ = three()
    sim.cut("one", "three")

    one.send(sim.id("three"), b"quick")

    assert sim.run_until(lambda: three_.seen(sim.id("one"))) < 1


def test_a_cut_of_one_direction_is_gone_around_in_that_direction_alone():
    sim, one, _, three_ = three()
    sim.cut("one", "three", both=False)
    for number in range(500):
        one.send(sim.id("three"), b"%d" % number)
        three_.send(sim.id("one"), b"%d" % number)
        sim.run(0.02)
    sim.run(1)

    assert one.downs == three_.downs == []
    assert three_.seen(sim.id("one")) == one.seen(sim.id("three")) == [b"%d" % number for number in range(500)]
    assert status(one, three_).via == sim.id("two")
    assert status(three_, one).via is None


def test_two_that_never_reached_each_other_meet_through_a_third():
    sim = Sim()
    sim.cut("one", "three")
    one, _, three_ = sim.add("one", "two", "three")

    sim.run_until(sim.all_up, 5)

    one.send(sim.id("three"), b"hello")
    sim.run(0.1)
    assert three_.seen(sim.id("one")) == [b"hello"]


def test_a_relay_that_dies_is_replaced():
    sim = Sim()
    one, *_, four = sim.add("one", "two", "three", "four")
    sim.run_until(sim.all_up)
    sim.run(3)
    sim.cut("one", "four")
    sim.run(4)
    via = status(one, four).via
    one.send(sim.id("four"), b"first")
    sim.run(0.2)

    sim.kill(via.rstrip(b"\0").decode(), noticed=False)
    one.send(sim.id("four"), b"second")
    sim.run(8)

    assert four.seen(sim.id("one")) == [b"first", b"second"]
    assert ("four" in dict(one.downs)) is False
    assert status(one, four).via not in (None, via)


def test_a_node_cut_off_from_all_is_down_everywhere():
    sim, one, two_, three_ = three()
    sim.cut("one", "three")
    sim.cut("two", "three")

    sim.run(9)

    assert dict(one.downs).keys() == dict(two_.downs).keys() == {"three"}
    assert sorted(dict(three_.downs)) == ["one", "two"]
    assert one.links.peers.keys() == {sim.id("two")}


def test_a_packet_is_relayed_once_only():
    sim, one, two_, _ = three()
    sim.cut("one", "three")
    sim.run(5)
    packets = []
    two_.links._local.emit = lambda node, packet: packets.append((node, packet))
    one.send(sim.id("three"), b"x")
    sim.run(0.01)
    relayed = [
        packet for node, packet in packets if node == sim.id("three") and packet[6 + 16 : 6 + 32] == sim.id("one")
    ]
    assert relayed

    packets.clear()
    two_.transport.on_packet(relayed[0])

    assert not [packet for node, packet in packets if node == sim.id("three")]


# Handlers


def test_a_handler_that_crashes_loses_its_frame_alone(caplog):
    sim, one, other = two()
    got = []

    def crash(peer, body):
        if body == b"bad":
            raise RuntimeError("oops")
        got.append(body)

    other.links._handlers[Kind.STANZA] = crash
    for body in (b"1", b"bad", b"2"):
        one.send(sim.id("two"), body)
    sim.run(0.1)

    assert got == [b"1", b"2"]
    assert other.links.counters.handler_failures == 1


def test_frames_of_a_kind_nobody_knows_are_passed_over():
    sim, one, other = two()
    one.links.send(sim.id("two"), 99, b"from the future")
    one.send(sim.id("two"), b"x")
    sim.run(0.1)

    assert other.seen(sim.id("one")) == [b"x"]
    assert other.links.counters.unknown_frames == 1


def test_after_a_handler_cut_the_link_nothing_of_that_epoch_comes():
    sim, one, other = two()
    got = []

    def cut(peer, body):
        got.append(body)
        other.links.disconnect(peer.node, 5)

    other.links._handlers[Kind.STANZA] = cut
    for body in (b"1", b"2", b"3"):
        one.send(sim.id("two"), body)
    sim.run(1)

    assert got == [b"1"]


def test_the_one_handler_of_a_kind_is_the_only_one():
    _, one, _ = two()

    with pytest.raises(ValueError, match="STANZA"):
        one.links.on(Kind.STANZA, lambda peer, body: None)


# Hostile and newer ones


def test_junk_is_counted_and_harms_nobody():
    sim, one, other = two()
    packets = []
    other.links._local.emit = lambda node, packet: (packets.append(packet), other.transport.send(node, packet))
    other.send(sim.id("one"), b"hello")
    sim.run(2)
    packet = packets[0]

    for cut in range(len(packet)):
        one.transport.on_packet(packet[:cut])
        one.transport.on_packet(packet[:cut] + b"\xff" * 40)
        one.transport.on_packet(packet + b"\xff" * cut)
    sim.run(2)

    assert one.links.counters.malformed > 50
    other.send(sim.id("one"), b"still here")
    sim.run(3)
    assert one.seen(sim.id("two"))[-1] == b"still here"


def test_a_node_of_a_version_we_cannot_read_is_named_once_in_the_log(caplog):
    sim, one, other = two()
    packets = []
    other.links._local.emit = lambda node, packet: packets.append(packet)
    sim.run(2)

    for packet in packets * 3:
        one.transport.on_packet(packet[:2] + bytes((VERSION + 2,)) + packet[3:])

    assert one.links.counters.incompatible >= 3
    assert len([record for record in caplog.records if "another protocol" in record.getMessage()]) == 1


def speak(sim, node, protocol, oldest):
    """What that node sends says that it understands other versions."""

    def emit(target, packet):
        if packet[3] == BEAT:
            packet = packet[: HEADER.size] + bytes((protocol, oldest)) + packet[HEADER.size + 2 :]
        node.transport.send(target, packet)

    node.links._local.emit = emit


def test_a_newer_node_that_still_understands_us_is_a_peer():
    sim = Sim()
    one, other = sim.add("one", "two")
    speak(sim, other, VERSION + 1, VERSION)

    sim.run_until(sim.all_up)

    assert one.links.peers[sim.id("two")].protocol == VERSION + 1
    one.send(sim.id("two"), b"hello")
    sim.run(0.1)
    assert other.seen(sim.id("one")) == [b"hello"]


def test_a_node_without_a_version_in_common_is_no_peer_and_is_named_in_the_log(caplog):
    sim = Sim()
    one, other = sim.add("one", "two")
    speak(sim, other, VERSION + 2, VERSION + 1)

    sim.run(10)

    assert one.ups == []
    assert one.links.counters.incompatible > 3
    assert [record.getMessage() for record in caplog.records if "another protocol" in record.getMessage()] == [
        f"node speaks another protocol node=two protocol={VERSION + 2}"
    ]


def test_a_short_peer_timeout_makes_the_heartbeats_quicker():
    sim, one, other = two(seed=1, settings=Settings(peer_timeout=1.0), weather=Weather(loss=0.05))
    sim.run(60)
    assert one.downs == other.downs == []

    sim.cut("one", "two")

    assert sim.run_until(lambda: one.downs and other.downs) < 1.1
