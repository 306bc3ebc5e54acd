"""Attackers by the hundred: the node's memory stays flat, a normal pair hardly notices, each refusal has its name.

Every attack runs in several rounds. The first warms up: caches fill, the memory allocator gets its pages. After it
nothing may grow. The pair's p99 is that of its best round: what else goes on in the machine only ever adds to it,
whereas a server that stands still does so in every round.
"""

import pytest

from tests.harness.attackers import HOST, Attack
from tests.harness.pulse import NOISE, Gauge, Pulse
from tests.harness.scene import until

ROUNDS = 3
FLAT = 4.0  # MiB that three rounds may differ from the first one: pages the allocator keeps
STREAMS = "http://etherx.jabber.org/streams"
LISTEN = [
    {"port": 0, "ip": "127.0.0.1", "module": "c2s", "starttls_required": False},
    {"port": 0, "ip": "127.0.0.1", "module": "c2s", "tls": True},
    {"port": 0, "ip": "127.0.0.1", "module": "http"},
]
OPTIONS = {
    "hosts": [HOST, "localhost"],
    "host_config": {HOST: {"auth_method": ["anonymous"]}},
    "shaper_rules": {"c2s_shaper": [{"normal": "all"}]},  # as it comes
    "log_burst_limit_count": 100,
}


def listen(**c2s):
    return [each if each["module"] == "http" else {**each, **c2s} for each in LISTEN]


class Siege:
    """A server, a pair that chats on it, and rounds of attacks."""

    def __init__(self, scene, pulse):
        self.node, self.pulse = scene.node, pulse
        self.gauge = Gauge(scene.node)
        self.quiet = 0.0
        self.during = []
        self.memory = []

    def attack(self, kind, **options):
        return Attack(self.node, kind, **options)

    async def listen(self, seconds=1.5):
        """How the pair fares now, in the middle of an attack."""
        self.during.append(await self.pulse.p99(seconds))

    async def weigh(self):
        """After a round, when all have gone and what they used was given back."""
        await until(lambda: self.gauge.total("xmppd_connections") == 2, "the attackers to be gone")
        before = self.gauge.total("xmppd_memory_given_back")
        await until(lambda: self.gauge.total("xmppd_memory_given_back") > before, "memory to be given back")
        self.memory.append(self.gauge.memory())

    def judge(self):
        print(
            f"quiet p99 {self.quiet * 1000:.1f} ms, during {[round(one * 1000, 1) for one in self.during]} ms,"
            f" memory {[round(one, 1) for one in self.memory]} MiB"
        )
        assert min(self.during) < 3 * max(self.quiet, NOISE), (self.quiet, self.during)
        assert max(self.memory[1:]) - self.memory[0] < FLAT, self.memory


@pytest.fixture
async def besiege(served):
    """`besiege(**c2s)`: a siege of a server whose listeners have these options."""
    pulses = []

    async def begin(**c2s):
        scene = await served(listen=listen(**c2s), **OPTIONS)
        romeo, juliet = await scene.raw_login("romeo"), await scene.raw_login("juliet")
        for client in (romeo, juliet):
            client.forget()
        siege = Siege(scene, Pulse(romeo, juliet))
        pulses.append(siege.pulse)
        await siege.pulse.p99(0.3)
        siege.quiet = await siege.pulse.p99(1.5)
        return siege

    yield begin
    for pulse in pulses:
        await pulse.end()


async def test_two_thousand_stop_in_the_middle_of_a_handshake(besiege):
    siege = await besiege()
    stages = {"tcp": 400, "tcp before tls": 400, "half a client hello": 400, "half a header": 400}
    stages |= {"half a header in tls": 200, "half an auth in tls": 200}

    for _ in range(ROUNDS):
        async with siege.attack("half_open", stages=stages) as attack:
            assert siege.gauge.total("xmppd_connections") == 2000 + 2
            await siege.listen()
        assert attack.result == {"open": 2000}
        await siege.weigh()

    siege.judge()
