"""Any weather, any cuts, any deaths: per epoch each frame once and in order, and after quiet everything."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.cluster.sim import Node, Sim, Weather

NAMES = ("one", "two", "three", "four")

WEATHERS = st.builds(
    Weather,
    delay=st.sampled_from([0.0002, 0.002, 0.05, 0.1]),
    jitter=st.sampled_from([0.0, 0.001, 0.05]),
    loss=st.sampled_from([0.0, 0.01, 0.1, 0.4]),
    twice=st.sampled_from([0.0, 0.1]),
)
NAME = st.sampled_from(NAMES)
SHORT = st.floats(0.0, 0.1)
STEPS = st.one_of(
    st.tuples(st.just("send"), NAME, NAME, st.integers(1, 300), st.sampled_from([5, 500, 30_000])),
    st.tuples(st.just("run"), st.sampled_from([0.001, 0.01, 0.1, 1.0, 4.0, 10.0])),
    st.tuples(st.just("cut"), NAME, NAME, st.booleans()),
    st.tuples(st.just("heal")),
    st.tuples(st.just("restart"), NAME, SHORT, st.booleans()),
    st.tuples(st.just("disconnect"), NAME, NAME, st.sampled_from([0.0, 0.5, 5.0])),
    st.tuples(st.just("suspect"), NAME, NAME),
    st.tuples(st.just("gap"), NAME),
    st.tuples(st.just("weather"), WEATHERS),
    st.tuples(st.just("freeze"), st.sampled_from([0.3, 3.0, 20.0])),
)


class World:
    """A simulation with all processes that ever lived in it."""

    def __init__(self, seed: int, weather: Weather) -> None:
        self.sim = Sim(seed, weather=weather)
        self.lives: list[Node] = list(self.sim.add(*NAMES[:3]))
        self.sent = 0

    def step(self, step: tuple) -> None:
        match step:
            case ("send", one, other, count, size):
                for _ in range(count):
                    if one != other and one in self.sim.nodes:
                        self.sent += 1
                        self.sim.nodes[one].send(self.sim.id(other), b"%d " % self.sent + bytes(size))
            case ("run", seconds):
                self.sim.run(seconds)
            case ("cut", one, other, both):
                self.sim.cut(one, other, both=both)
            case ("heal",):
                self.sim.heal()
            case ("restart", name, pause, noticed):
                self.restart(name, pause, noticed)
            case ("disconnect", one, other, seconds) if one in self.sim.nodes:
                self.sim.nodes[one].links.disconnect(self.sim.id(other), seconds)
            case ("suspect", one, other) if one in self.sim.nodes:
                self.sim.nodes[one].transport.on_suspect(self.sim.id(other))
            case ("gap", name) if name in self.sim.nodes:
                self.sim.nodes[name].transport.on_gap()
            case ("weather", weather):
                self.sim.weather = weather
            case ("freeze", seconds):
                self.sim.clock.freeze(seconds)

    def restart(self, name: str, pause: float, noticed: bool) -> None:
        if name in self.sim.nodes:
            self.sim.kill(name, noticed=noticed)
            self.sim.run(pause)
        self.lives += self.sim.add(name)

    def judge(self) -> None:
        """Within an epoch what came is a beginning of what was sent, and nobody has two links to one node."""
        by_epoch: dict[tuple, list[bytes]] = {}
        for node in self.lives:
            for peer, epochs in node.epochs.items():
                assert len(epochs) == len(set(epochs))
                for epoch, sent in zip(epochs, node.sent[peer], strict=True):
                    theirs, pair = epoch.split(":")
                    mine, other = pair.split("/")
                    by_epoch[node.links.owner.member, node.links.owner.incarnation, mine, peer, theirs, other] = sent
        for node in self.lives:
            for peer, epochs in node.epochs.items():
                for epoch, got in zip(epochs, node.got[peer], strict=True):
                    theirs, pair = epoch.split(":")
                    mine, other = pair.split("/")
                    key = (peer, int(theirs), other, node.links.owner.member, str(node.links.owner.incarnation), mine)
                    sent = by_epoch.get(key, [])
                    assert got == sent[: len(got)]

    def calm(self) -> None:
        """The weather is fine for a while: all are up and everything that was sent in a living epoch has come."""
        self.sim.heal()
        self.sim.weather = Weather()
        self.sim.run(15)
        nodes = self.sim.nodes
        for node in nodes.values():
            self_up = {peer.name for peer in node.links.peers.values()}
            assert self_up == nodes.keys() - {node.name}
            assert node.links.queued == 0
            assert len(node.ups) == len(node.downs) + len(nodes) - 1
            for other in nodes.values():
                if other is not node:
                    mine, theirs = node.links.owner.member, other.links.owner.member
                    assert other.got[mine][-1] == node.sent[theirs][-1]
                    assert node.links.peers[theirs].owner == other.links.owner
        self.judge()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.integers(0, 2**16), WEATHERS, st.lists(STEPS, max_size=40))
def test_whatever_happens_frames_come_once_in_order_and_all_is_well_after_a_calm(seed, weather, steps):
    world = World(seed, weather)
    world.sim.run(2)

    for step in steps:
        world.step(step)
        world.judge()

    world.calm()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_a_long_day_with_everything(seed):
    world = World(seed, Weather(jitter=0.002, loss=0.02, twice=0.02))
    choose = world.sim.random
    world.lives += world.sim.add("four")

    for _ in range(150):
        one, other = choose.sample(NAMES, 2)
        what = choose.randrange(12)
        if what < 6:
            world.step(("send", one, other, choose.randint(1, 100), choose.choice([5, 500])))
        elif what == 6:
            world.step(("cut", one, other, choose.random() < 0.5))
        elif what == 7:
            world.step(("heal",))
        elif what == 8 and choose.random() < 0.3:
            world.step(("restart", one, choose.random(), choose.random() < 0.5))
        else:
            world.step(("suspect", one, other))
        world.sim.run(choose.random())
    world.judge()

    world.calm()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("weather", [Weather(0.1, 0.01, 0.01), Weather(0.001, 0.05, 0.05, 0.1)])
def test_bad_weather_alone_takes_no_link_down(seed, weather):
    world = World(seed, weather)
    world.sim.run_until(world.sim.all_up)
    for _ in range(100):
        for one in NAMES[:3]:
            for other in NAMES[:3]:
                world.step(("send", one, other, 3, 100))
        world.sim.run(0.3)

    assert [node.downs for node in world.lives] == [[], [], []]
    world.calm()
