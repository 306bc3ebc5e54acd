"""A client that trusts nobody: it saves each message over HTTP, sends it, and saves it again for as long as no receipt
has come (XEP-0184). As a program it does that against a server that runs:

    python -m tests.harness.saver --port 5223 --certificate cert.pem --timer 5 romeo secret juliet@localhost
"""

import argparse
import asyncio
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from xml.sax.saxutils import escape

from tests.harness.raw import Raw

RECEIPTS = "{urn:xmpp:receipts}"


class Saver:
    """`save` is told the id of a message each time it is saved; `timer` in seconds."""

    def __init__(self, client: Raw, save: Callable[[str], None], *, timer: float = 5.0) -> None:
        self.saves: Counter[str] = Counter()
        self._client = client
        self._save = save
        self._timer = timer
        self._waiting: dict[str, asyncio.Task[None]] = {}

    def send(self, to: str, id: str, text: str) -> None:
        """Save it, send it, and wait for the receipt."""
        self._saved(id)
        body = escape(json.dumps({"type": "message", "data": {"content": text}, "no_need_save": True}))
        self._client.send_raw(
            f"<message type='chat' to='{to}' id='{id}'><body>{body}</body>"
            "<request xmlns='urn:xmpp:receipts'/></message>"
        )
        self._waiting[id] = asyncio.create_task(self._save_again(id), name=f"timer of {id}")

    def _saved(self, id: str) -> None:
        self.saves[id] += 1
        self._save(id)

    async def _save_again(self, id: str) -> None:
        while True:
            await asyncio.sleep(self._timer)
            self._saved(id)

    async def receive(self) -> str:
        """Wait for one receipt, which stops a timer; its id."""
        got = await self._client.wait_for(lambda got: got.xml.find(f"{RECEIPTS}received") is not None, "a receipt")
        id = got.xml.find(f"{RECEIPTS}received").get("id", "")
        task = self._waiting.pop(id, None)
        if task is not None:
            task.cancel()
        return id

    async def stop(self) -> None:
        tasks, self._waiting = list(self._waiting.values()), {}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def main(options: argparse.Namespace) -> None:
    client = Raw(options.certificate)
    await client.login(options.port, options.user, options.password)
    await client.become_available()
    saver = Saver(client, lambda id: print(f"saved {id}", flush=True), timer=options.timer)
    saver.send(options.to, "saver-1", "hello")
    try:
        async with asyncio.timeout(options.seconds):
            print(f"receipt for {await saver.receive()}", flush=True)
    except (TimeoutError, AssertionError):
        print("no receipt", flush=True)
    await saver.stop()
    await client.leave()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("user")
    parser.add_argument("password")
    parser.add_argument("to")
    parser.add_argument("--port", type=int, required=True, help="for direct TLS")
    parser.add_argument("--certificate", type=Path, required=True)
    parser.add_argument("--timer", type=float, default=5.0)
    parser.add_argument("--seconds", type=float, default=30.0)
    asyncio.run(main(parser.parse_args()))
