"""@xmpp/client, a client in another language, as one more inbox (tests/interop/node/driver.mjs)."""

import asyncio
import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import fromstring

from tests.harness.inbox import PATIENCE, Inbox

FOLDER = Path(__file__).parents[1] / "interop" / "node"


def missing() -> str | None:
    """Why it cannot run here, or None when it can."""
    if shutil.which("node") is None:
        return "Node.js is not installed"
    if not (FOLDER / "node_modules" / "@xmpp" / "client").is_dir():
        return "@xmpp/client is not installed (npm ci in tests/interop/node)"
    return None


class NodeClient(Inbox):
    """Reconnects by itself when its connection is lost."""

    def __init__(self, certificate: Path) -> None:
        super().__init__()
        self._certificate = certificate
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._events: list[str] = []

    async def connect(self, service: str, user: str, password: str, resource: str | None = None) -> None:
        """Log in; `service` is xmpp://host:port, or xmpps:// for direct TLS."""
        self._process = await asyncio.create_subprocess_exec(
            "node",
            "driver.mjs",
            cwd=FOLDER,
            env=dict(os.environ, NODE_EXTRA_CA_CERTS=str(self._certificate)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        self._reading = asyncio.create_task(self._read())
        await self._do(
            "start", service=service, domain="localhost", username=user, password=password, resource=resource
        )
        await self.event("online")
        self.forget()  # the answer to its bind request

    async def _do(self, op: str, **values: Any) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"op": op, **values}).encode() + b"\n")
        await self._process.stdin.drain()

    async def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            said = json.loads(line)
            if said["event"] == "stanza":
                text = said["data"]
                if " xmlns=" not in text.partition(">")[0]:
                    text = text.replace(" ", ' xmlns="jabber:client" ', 1)
                self._arrive(fromstring(text))
            else:
                if said["event"] == "online":
                    self.jid = said["data"]
                self._events.append(f"{said['event']} {said.get('data', '')}".rstrip())
                self._changed.set()
        self._lost()

    async def event(self, name: str) -> None:
        """Wait for an event of the library: online, disconnect, offline, error."""

        async def look() -> None:
            while True:
                for index, event in enumerate(self._events):
                    if event.startswith(name):
                        del self._events[: index + 1]
                        return
                assert not self.is_over, self._events
                self._changed.clear()
                await self._changed.wait()

        try:
            await asyncio.wait_for(look(), PATIENCE)
        except TimeoutError:
            raise AssertionError(f"{name} did not happen, but {self._events}") from None

    def send_raw(self, data: str | bytes) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        text = data.decode() if isinstance(data, bytes) else data
        self._process.stdin.write(json.dumps({"op": "send", "xml": text}).encode() + b"\n")

    async def drop(self) -> None:
        """Its socket dies."""
        await self._do("drop")
        await self.event("disconnect")

    async def leave(self) -> None:
        """Log out and end."""
        if self._process is None:
            return
        with contextlib.suppress(OSError):
            await self._do("stop")
        try:
            await asyncio.wait_for(self._process.wait(), PATIENCE)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        if self._reading is not None:
            await self._reading
        self._process = None
