"""A node as a process, and a client of a page: as much as the scenarios of an operator need, and nothing hidden."""

import asyncio
import base64
import contextlib
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, XMLPullParser

import yaml

ROOT = Path(__file__).parents[2]
PATIENCE = 40.0  # seconds; nothing that is waited for takes so long but on a machine that stands still
SASL = "urn:ietf:params:xml:ns:xmpp-sasl"
BIND = "urn:ietf:params:xml:ns:xmpp-bind"
CLIENT = "{jabber:client}"
STANZAS = "{urn:ietf:params:xml:ns:xmpp-stanzas}"
PASSWORD = "rose"
_CONTROLLING_TERMINAL = 0x540E  # TIOCSCTTY


class Node:
    """One process of the server in a folder of its own; `options` is its configuration."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.folder = folder
        self.data_dir = folder / "var"
        self.path = folder / "xmppd.yml"
        self.options: dict[str, Any] = {
            "data_dir": str(self.data_dir),
            "shutdown_grace": 2,
            "listen": [{"port": 0, "ip": "127.0.0.1", "module": "c2s", "tls": True}],
            **options,
        }
        folder.mkdir(parents=True, exist_ok=True)
        self.write()
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("XMPPD_", "NOTIFY_", "WATCHDOG_"))}
        self.environment["PYTHONPATH"] = str(ROOT)
        self.process: subprocess.Popen[bytes] | None = None

    def write(self, **changes: Any) -> None:
        self.options |= changes
        self.path.write_text(yaml.safe_dump(self.options))

    def launch(self, *, environment: dict[str, str] | None = None, terminal: int | None = None) -> None:
        """Start; with `terminal` in a session of its own on that terminal."""
        with (self.folder / "err.log").open("ab") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "xmppd", "--config", str(self.path)],
                stdin=subprocess.DEVNULL if terminal is None else terminal,
                stdout=err,
                stderr=err,
                cwd=self.folder,
                env=self.environment | (environment or {}),
                start_new_session=terminal is not None,
                preexec_fn=None if terminal is None else _take_terminal,
            )

    def start(self, **how: Any) -> None:
        """Start, and return when it serves."""
        self.launch(**how)
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        assert self.process is not None
        deadline = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(OSError, ValueError):
                ready = json.loads((self.data_dir / "ready.json").read_text())
                if ready["pid"] == self.process.pid:
                    break
            assert self.process.poll() is None, self.err
            assert time.monotonic() < deadline, self.err
            time.sleep(0.02)
        ports = {each["module"]: each["port"] for each in ready["listen"]}
        self.port: int = ports["c2s"]
        self.http_port: int | None = ports.get("http")

    def end(self, number: int = signal.SIGTERM) -> int:
        """End it with this signal; its exit code."""
        process, self.process = self.process, None
        if process is None:
            return 0
        process.send_signal(number)
        try:
            return process.wait(PATIENCE)
        finally:
            process.kill()
            process.wait()

    @property
    def err(self) -> str:
        return (self.folder / "err.log").read_text()

    def trouble(self) -> list[str]:
        """Lines of the log that tell of a bug or a loss."""
        return re.findall(r"^(?:\S+ (?:ERROR|CRIT) .*|Traceback.*)$", self.err, re.MULTILINE)

    def ctl(self, *argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "xmppd.ctl", "--config", str(self.path), *argv],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            env=self.environment,
            cwd=self.folder,
            check=False,
        )

    def register(self, *users: str) -> None:
        lines = "".join(f"register {user} localhost {PASSWORD}\n" for user in users)
        done = subprocess.run(
            [sys.executable, "-m", "xmppd.ctl", "--config", str(self.path), "batch"],
            input=lines,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            env=self.environment,
            check=False,
        )
        assert done.returncode == 0, done.stdout


def _take_terminal() -> None:
    import fcntl

    fcntl.ioctl(0, _CONTROLLING_TERMINAL, 0)


class Refused(Exception):
    """SASL said no; the condition is the text."""


class Client:
    """Direct TLS, PLAIN, bind. What arrives is handed to `got` at once."""

    def __init__(self, user: str) -> None:
        self.user = user
        self.arrived: list[tuple[float, Element]] = []
        self._changed = asyncio.Event()
        self._replies: dict[str, asyncio.Future[Element]] = {}
        self._number = 0

    @classmethod
    async def login(cls, node: Node, user: str, *, available: bool = True) -> "Client":
        """Raises Refused."""
        self = cls(user)
        context = ssl.create_default_context(cafile=str(node.data_dir / "certs" / "localhost.pem"))
        self._reader, self._writer = await asyncio.open_connection(
            "127.0.0.1", node.port, ssl=context, server_hostname="localhost"
        )
        self._task = asyncio.create_task(self._read())
        try:
            await self._negotiate()
        except BaseException:
            await self.close()
            raise
        if available:
            self.send("<presence/>")
        return self

    async def _negotiate(self) -> None:
        self._open()
        await self._next("features")
        secret = base64.b64encode(f"\0{self.user}\0{PASSWORD}".encode()).decode()
        self.send(f"<auth xmlns='{SASL}' mechanism='PLAIN'>{secret}</auth>")
        answer = await self._next("success", "failure")
        if answer.tag.endswith("failure"):
            raise Refused(answer[0].tag.rpartition("}")[2])
        self._open()
        await self._next("features")
        await self.ask("set", f"<bind xmlns='{BIND}'/>")

    def _open(self) -> None:
        self._parser = XMLPullParser(["start", "end"])
        self._depth = 0
        self.send(
            "<?xml version='1.0'?><stream:stream to='localhost' version='1.0' xmlns='jabber:client' "
            "xmlns:stream='http://etherx.jabber.org/streams'>"
        )

    async def _read(self) -> None:
        with contextlib.suppress(OSError, ssl.SSLError):
            while data := await self._reader.read(65536):
                self._parser.feed(data)
                for kind, element in self._parser.read_events():
                    self._depth += 1 if kind == "start" else -1
                    if kind == "end" and self._depth == 1:
                        self._take(element)
        self._changed.set()
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(ConnectionError(f"{self.user} lost the connection"))

    def _take(self, element: Element) -> None:
        reply = self._replies.pop(element.get("id", ""), None) if element.tag == f"{CLIENT}iq" else None
        if reply is not None and not reply.done():
            reply.set_result(element)
            return
        self.arrived.append((time.monotonic(), element))
        self._changed.set()

    async def _next(self, *names: str) -> Element:
        async with asyncio.timeout(PATIENCE):
            while True:
                for index, (_, element) in enumerate(self.arrived):
                    if element.tag.rpartition("}")[2] in names:
                        return self.arrived.pop(index)[1]
                if self._task.done():
                    raise ConnectionError(f"{self.user} lost the connection; {names} did not come")
                self._changed.clear()
                await self._changed.wait()

    def send(self, text: str) -> None:
        self._writer.write(text.encode())

    async def ask(self, type: str, payload: str, *, to: str | None = None) -> Element:
        """The answer to an IQ, result or error."""
        self._number += 1
        name = f"{self.user}{self._number}"
        reply = self._replies[name] = asyncio.get_running_loop().create_future()
        address = f" to='{to}'" if to else ""
        self.send(f"<iq type='{type}' id='{name}'{address}>{payload}</iq>")
        return await asyncio.wait_for(reply, PATIENCE)

    async def sync(self) -> None:
        """Everything sent before has been dealt with when this returns."""
        await self.ask("get", "<ping xmlns='urn:xmpp:ping'/>", to="localhost")

    def messages(self) -> list[tuple[float, Element]]:
        return [(when, one) for when, one in self.arrived if one.tag == f"{CLIENT}message"]

    def bodies(self) -> list[str]:
        """Of the messages that are no errors, in the order of arrival."""
        return [one.findtext(f"{CLIENT}body") or "" for _, one in self.messages() if one.get("type") != "error"]

    def errors(self) -> dict[str, str]:
        """`type condition` of the error that came for each message id."""
        return {one.get("id", ""): error_of(one) for _, one in self.messages() if one.get("type") == "error"}

    async def until(self, reached: Any, what: str) -> None:
        async with asyncio.timeout(PATIENCE):
            while not reached():
                assert not self._task.done(), f"{self.user} lost the connection while waiting for {what}"
                self._changed.clear()
                await self._changed.wait()

    async def close(self) -> None:
        self._writer.transport.abort()
        await asyncio.wait([self._task])
        with contextlib.suppress(OSError, ssl.SSLError):
            await self._writer.wait_closed()


def error_of(stanza: Element) -> str:
    """`type condition` of an error stanza."""
    error = stanza.find(f"{CLIENT}error")
    assert error is not None
    names = [child.tag.removeprefix(STANZAS) for child in error if child.tag.startswith(STANZAS)]
    return f"{error.get('type')} {next(name for name in names if name != 'text')}"
