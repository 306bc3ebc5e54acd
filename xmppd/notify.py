"""Telling systemd how we are (sd_notify(3)): ready, reloading, stopping, alive, and a line of text.

A message is one datagram of `NAME=value` lines to the socket that $NOTIFY_SOCKET names. Without it nothing is sent:
the same server runs in a terminal, in a container, under any supervisor.
"""

import asyncio
import os
import socket
import time
from collections.abc import Callable, Mapping
from typing import Final, Self

_EXTENSION: Final = 30  # seconds that a slow start or stop asks for, again and again while it makes progress
_TICK: Final = 10.0  # seconds between two signs of life where nobody asked for them more often


class Notifier:
    """Sends to `address`, a path or `@name` (abstract); None: to nobody. Never raises and never blocks.

    `watchdog` in seconds: a sign of life is due at least that often (WatchdogSec=), or None.
    """

    def __init__(self, address: str | None, watchdog: float | None = None) -> None:
        self._address = address
        self.watchdog = watchdog if address else None
        self._status = ""
        self._heart: asyncio.TimerHandle | None = None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """As systemd tells a service. WATCHDOG_PID names who is meant: not us when we are somebody's child."""
        address = environment.get("NOTIFY_SOCKET") or None
        if address is not None and address[0] not in "/@":
            address = None
        meant = environment.get("WATCHDOG_PID", str(os.getpid()))
        microseconds = environment.get("WATCHDOG_USEC", "")
        if meant != str(os.getpid()) or not microseconds.isascii() or not microseconds.isdigit():
            return cls(address)
        return cls(address, int(microseconds) / 1e6 or None)

    def ready(self, status: str = "") -> None:
        """The node serves, for the first time or again after `reloading`."""
        self.send(READY="1", STATUS=status)

    def reloading(self, status: str = "") -> None:
        """Until `ready` is called. The time lets systemd tell our answer from one to an earlier request."""
        self.send(RELOADING="1", MONOTONIC_USEC=str(time.monotonic_ns() // 1000), STATUS=status)

    def stopping(self, status: str = "") -> None:
        """The node ends; after this systemd takes no `ready` any more."""
        self.send(STOPPING="1", STATUS=status)

    def status(self, text: str) -> None:
        """What `systemctl status` shows."""
        self.send(STATUS=text)

    def send(self, **fields: str) -> None:
        """One datagram; a status that has not changed is left out."""
        if self._address is None:
            return
        if fields.get("STATUS") in ("", self._status):
            del fields["STATUS"]
        self._status = fields.get("STATUS", self._status)
        data = "\n".join(f"{name}={value.translate(_ONE_LINE)}" for name, value in fields.items())
        if not data:
            return
        path = f"\0{self._address[1:]}" if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.setblocking(False)
                sender.sendto(data.encode("utf-8", "replace"), path)
        except OSError:
            pass  # nobody listens, or is too busy to: the next sign of life is soon

    # -- signs of life

    def beat(self, loop: asyncio.AbstractEventLoop, state: Callable[[], tuple[bool, str]]) -> None:
        """From now on send signs of life from the event loop, so that one that hangs is noticed, until `rest`.

        `state` tells whether the node is on its way up or down, for which it then gets more time, and its status.
        """
        self.rest()
        if self._address is None:
            return
        # half the time that is allowed, as sd_watchdog_enabled(3) advises
        pause = min(_TICK, self.watchdog / 2) if self.watchdog else _TICK

        def live() -> None:
            self._heart = loop.call_later(pause, live)
            on_the_way, status = state()
            more = {"EXTEND_TIMEOUT_USEC": str(_EXTENSION * 1_000_000)} if on_the_way else {}
            self.send(WATCHDOG="1", **more, STATUS=status)

        live()

    def rest(self) -> None:
        """No more signs of life."""
        if self._heart is not None:
            self._heart.cancel()
            self._heart = None


_ONE_LINE: Final = {ord(char): " " for char in "\r\n\0"}
