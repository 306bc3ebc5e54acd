"""What systemd hears, on a real datagram socket."""

import asyncio
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from xmppd.notify import Notifier


class Manager:
    """The end of the socket that systemd has."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address.replace("@", "\0", 1))
        self.socket.settimeout(5)

    def next(self) -> dict[str, str]:
        return dict(line.split("=", 1) for line in self.socket.recv(4096).decode().split("\n"))

    def has_more(self) -> bool:
        self.socket.setblocking(False)
        try:
            self.socket.recv(4096)
        except BlockingIOError:
            return False
        finally:
            self.socket.settimeout(5)
        return True


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(str(tmp_path / "notify") if request.param == "path" else f"@xmppd-test-{os.getpid()}")
    yield manager
    manager.socket.close()


def test_ready_reloading_and_stopping_are_said(manager):
    notifier = Notifier.from_environment({"NOTIFY_SOCKET": manager.address})

    before = time.monotonic_ns() // 1000
    notifier.ready("serving")
    notifier.reloading()
    notifier.ready("serving")
    notifier.stopping("stopping")

    assert manager.next() == {"READY": "1", "STATUS": "serving"}
    reloading = manager.next()
    assert before <= int(reloading.pop("MONOTONIC_USEC")) <= time.monotonic_ns() // 1000
    assert reloading == {"RELOADING": "1"}
    assert manager.next() == {"READY": "1"}
    assert manager.next() == {"STOPPING": "1", "STATUS": "stopping"}


def test_a_status_that_has_not_changed_is_not_said_again(manager):
    notifier = Notifier(manager.address)

    notifier.status("one session")
    notifier.status("one session")
    notifier.status("two\nsessions\nREADY=1")

    assert manager.next() == {"STATUS": "one session"}
    assert manager.next() == {"STATUS": "two sessions READY=1"}
    assert not manager.has_more()


async def test_signs_of_life_come_from_the_event_loop_and_stop_when_it_hangs(manager):
    notifier = Notifier(manager.address, watchdog=0.2)
    loop = asyncio.get_running_loop()

    notifier.beat(loop, lambda: (False, "serving"))
    beats = [await asyncio.to_thread(manager.next) for _ in range(3)]
    while manager.has_more():
        pass
    time.sleep(0.5)  # noqa: ASYNC251 - the loop hangs, which is what a watchdog is for
    silent = not manager.has_more()
    later = await asyncio.to_thread(manager.next)
    notifier.rest()

    assert beats == [{"WATCHDOG": "1", "STATUS": "serving"}, {"WATCHDOG": "1"}, {"WATCHDOG": "1"}]
    assert silent
    assert later == {"WATCHDOG": "1"}


async def test_a_slow_start_asks_for_time_while_the_loop_runs(manager):
    notifier = Notifier(manager.address, watchdog=0.1)

    notifier.beat(asyncio.get_running_loop(), lambda: (True, "starting"))
    first = await asyncio.to_thread(manager.next)
    notifier.rest()

    assert first == {"WATCHDOG": "1", "EXTEND_TIMEOUT_USEC": "30000000", "STATUS": "starting"}


async def test_nobody_is_told_anything_after_the_end(manager):
    notifier = Notifier(manager.address, watchdog=0.02)
    notifier.beat(asyncio.get_running_loop(), lambda: (False, ""))

    notifier.rest()
    manager.next()
    await asyncio.sleep(0.1)

    assert not manager.has_more()


@pytest.mark.parametrize(
    ("environment", "watchdog"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),  # meant for our parent
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_the_watchdog_of_somebody_else_is_not_ours(environment, watchdog):
    assert Notifier.from_environment({"NOTIFY_SOCKET": "/nowhere", **environment}).watchdog == watchdog


@pytest.mark.parametrize("address", [None, "", "relative/path", "/nowhere/at/all", "/" + "x" * 200])
def test_without_a_manager_nothing_happens(address):
    environment = {} if address is None else {"NOTIFY_SOCKET": address}

    Notifier.from_environment(environment).ready("serving")


def test_a_manager_that_does_not_read_holds_nobody_up(manager):
    notifier = Notifier(manager.address)

    for number in range(5000):
        notifier.status(f"{number} sessions")

    assert manager.next() == {"STATUS": "0 sessions"}
