"""A raw client with stream management (XEP-0198): it counts, acknowledges when told to, and resumes."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from xml.etree.ElementTree import Element

from tests.harness.inbox import PATIENCE, Got
from tests.harness.raw import Raw

SM = "urn:xmpp:sm:3"


class Managed(Raw):
    """`prompt`: it answers each <r/> at once. `acked` is the last `h` of the server."""

    def __init__(self, certificate: Path, host: str = "localhost", *, prompt: bool = True) -> None:
        super().__init__(certificate, host)
        self.prompt = prompt
        self.handled = 0
        self.acked = 0
        self.requests = 0  # <r/> that have come
        self.acks: list[int] = []  # all `h` that have come
        self.counting = False
        self.id = ""

    def _arrive(self, element: Element) -> None:
        if element.tag == f"{{{SM}}}r":
            self.requests += 1
            if self.prompt:
                self.acknowledge()
            self._changed.set()
            return
        if element.tag == f"{{{SM}}}a":
            self.acked = int(element.get("h", "-1"))
            self.acks.append(self.acked)
            self._changed.set()
            return
        if element.tag.startswith("{jabber:client}") and self.counting:
            self.handled += 1
        elif element.tag == f"{{{SM}}}enabled":
            self.counting, self.handled = True, 0  # what came before does not count
        super()._arrive(element)

    def acknowledge(self, h: int | None = None) -> None:
        """<a/>, by default for all that has come."""
        self.send_raw(f"<a xmlns='{SM}' h='{self.handled if h is None else h}'/>")

    def request(self) -> None:
        self.send_raw(f"<r xmlns='{SM}'/>")

    async def enable(self, *, resume: bool = True, max: int | None = None) -> Got:
        wanted = " resume='true'" if resume else ""
        wanted += "" if max is None else f" max='{max}'"
        self.send_raw(f"<enable xmlns='{SM}'{wanted}/>")
        answer = await self.wait_for(lambda got: got.name in ("enabled", "failed"), "enabled")
        self.id = answer.xml.get("id", "")
        return answer

    async def until(self, reached: Callable[[], bool], what: str) -> None:
        try:
            async with asyncio.timeout(PATIENCE):
                while not reached():
                    assert not self.is_over, f"the connection was lost before there was {what}"
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise AssertionError(f"there was no {what}; acks {self.acks}") from None

    async def until_acked(self, h: int) -> None:
        """Wait for the server to acknowledge so many."""
        await self.until(lambda: self.acked >= h, f"h={h}, not {self.acked}")

    async def until_requested(self, count: int = 1) -> None:
        await self.until(lambda: self.requests >= count, "a request")

    async def cut(self) -> None:
        """The connection breaks, without a word."""
        assert self._writer is not None
        await self._stop_listening()
        self._writer.transport.abort()
        self._writer = None

    async def leave(self) -> None:
        if self._writer is not None:
            await super().leave()

    async def come_back(self, port: int, user: str, password: str, *, h: int | None = None, id: str = "") -> Got:
        """A new stream, and <resume/>: <resumed/> or <failed/>."""
        self.counting = self.at_end = self.is_over = self._closing = False
        kept, self._inbox = [got for got in self._inbox if got.is_stanza], []
        await self.connect_tls(port)
        await self.authenticate(user, password)
        self._inbox[:0] = kept
        return await self.resume(h=h, id=id)

    async def resume(self, *, h: int | None = None, id: str = "") -> Got:
        self.counting = True
        self.send_raw(f"<resume xmlns='{SM}' previd='{id or self.id}' h='{self.handled if h is None else h}'/>")
        answer = await self.wait_for(lambda got: got.name in ("resumed", "failed"), "resumed")
        if answer.name == "resumed":
            self.acked = int(answer.xml.get("h", "-1"))
        else:
            self.counting = False
        return answer
