"""A client that comes back: it has stream management, notices that its connection is dead, connects anew to the service
address, resumes its stream or begins another one, and sends again what was not acknowledged. As phones do."""

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable
from pathlib import Path

from tests.harness.behind import Behind
from tests.harness.cluster import ClusterNode
from tests.harness.ledger import PASSWORD, Ledger, Person
from tests.harness.managed import Managed

_ASKS = 0.2  # seconds between two <r/>
_SILENCE = 4.0  # seconds without an answer to them, and the connection is dead
_ATTEMPT = 8.0  # seconds for one login


class Roaming(Behind, Managed):
    """Keeps the stanzas that wait for their <a/>."""

    def __init__(self, certificate: Path, dial: Callable[[], socket.socket]) -> None:
        super().__init__(certificate, dial=dial)
        self.unacknowledged: list[str] = []
        self._taken = 0  # how many the server has acknowledged and are not kept any more

    def send_raw(self, data: str | bytes) -> None:
        if self.counting and isinstance(data, str) and data.startswith(("<message", "<presence", "<iq")):
            self.unacknowledged.append(data)
        super().send_raw(data)

    def prune(self) -> None:
        """Forget what is acknowledged."""
        del self.unacknowledged[: self.acked - self._taken]
        self._taken = self.acked

    def send_again(self) -> None:
        """On the resumed stream."""
        self.prune()
        for stanza in self.unacknowledged:
            super().send_raw(stanza)

    def start_over(self) -> None:
        """Before the first stream."""
        self.at_end = self.is_over = self._closing = False

    def begin_anew(self) -> list[str]:
        """Another stream: nothing has been counted. The messages that were not acknowledged."""
        waiting = [each for each in self.unacknowledged if each.startswith("<message")]
        self.unacknowledged, self._taken, self.acked = [], 0, 0
        return waiting


class Traveller(Person):
    """`dial` leads to the service address; where that is the balancer knows."""

    def __init__(
        self, ledger: Ledger, name: str, node: ClusterNode, certificate: Path, dial: Callable[[], socket.socket]
    ) -> None:
        super().__init__(ledger, name, node, "r")
        self._roaming = Roaming(certificate, dial)
        self._journey: asyncio.Task[None] | None = None
        self.logins = 0
        self.resumed = 0

    def set_out(self) -> None:
        """From now on be connected, whatever happens."""
        self._journey = asyncio.create_task(self._travel())

    async def settle_down(self) -> None:
        """No more."""
        journey, self._journey = self._journey, None
        if journey is not None:
            journey.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await journey

    async def leave(self) -> None:
        """At once: the other end may be a node that is cut off."""
        await self.settle_down()
        self.client = None
        await self._roaming.close()

    async def _travel(self) -> None:
        while True:
            try:
                async with asyncio.timeout(_ATTEMPT):
                    await self._connect()
            except (OSError, AssertionError, TimeoutError):
                await self._break_off()
                await asyncio.sleep(_ASKS)
                continue
            self.client = self._roaming
            await self._stay()
            self.client = None
            await self._break_off()

    async def _break_off(self) -> None:
        """And enter what had come: a resumed stream does not bring it again."""
        with contextlib.suppress(AssertionError, OSError):
            await self._roaming.cut()
        self._roaming.counting = False
        self._roaming.forget(lambda got: not got.is_stanza)
        self.client = self._roaming
        self.look()
        self.client = None

    def interrupt(self) -> None:
        """Lose the connection, and come back."""
        self._roaming.is_over = True

    async def _stay(self) -> None:
        """Until the connection is dead."""
        client = self._roaming
        heard, answered = time.monotonic(), len(client.acks)
        while not client.is_over and time.monotonic() - heard < _SILENCE:
            client.request()
            client.prune()
            await asyncio.sleep(_ASKS)
            if len(client.acks) > answered:
                heard, answered = time.monotonic(), len(client.acks)

    async def _connect(self) -> None:
        client = self._roaming
        if client.id:
            answer = await client.come_back(0, self.name, PASSWORD)
            if answer.name == "resumed":
                self.resumed += 1
                client.send_again()
                return
        else:
            client.start_over()
            await client.connect_tls(0)
            await client.authenticate(self.name, PASSWORD)
        client.id = ""
        bound = await client.bind(self.resource)
        assert bound.type == "result", bound
        await client.query("get", "<query xmlns='jabber:iq:roster'/>")
        waiting = client.begin_anew()
        await client.enable()
        self.logins += 1
        client.send_presence()
        for message in waiting:
            client.send_raw(message)
