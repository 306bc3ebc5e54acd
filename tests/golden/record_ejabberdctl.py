"""Record what ejabberdctl of Debian's ejabberd 23.01 prints: one JSON file per command, read by the golden tests.

Run it where Debian's `ejabberd` package is installed (its service need not run, and is not touched):

    python tests/golden/record_ejabberdctl.py [COMMAND ...]

It starts its own node `ejabberd@localhost` with its own epmd on a free port, own cookie and own database, all of it in
a temporary folder and on the loopback interface, puts real clients online (STARTTLS, SASL PLAIN), and ends all of it.
tests/golden/README.md describes the files and their placeholders.
"""

import asyncio
import base64
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cases import CASES, Case, CommandFile

HERE = Path(__file__).parent
WRAPPER = Path("/usr/sbin/ejabberdctl")
ROOT_WARNING = "WARNING: It is not recommended to run ejabberd as root\n"

CONFIG = """
loglevel: info
hosts: [localhost, capulet.example]
certfiles: ["{folder}/tls.pem"]
auth_password_format: scram
listen:
  - {{port: {port}, ip: 127.0.0.1, module: ejabberd_c2s, starttls: true}}
access_rules: {{everyone: [{{allow: all}}]}}
modules: {{mod_admin_extra: {{}}, mod_roster: {{versioning: true}}, mod_offline: {{}}, mod_disco: {{}}, mod_last: {{}}}}
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


class Node:
    """A private ejabberd and the wrapper script that controls it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.epmd: subprocess.Popen[bytes] | None = None
        self.env = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "LANG": "C.UTF-8",
            "ERL_EPMD_PORT": str(free_port()),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_CRASH_DUMP_BYTES": "0",
        }

    def prepare(self) -> None:
        cookie = self.folder / ".erlang.cookie"
        cookie.write_text("recorder")
        cookie.chmod(0o400)
        subprocess.run(
            [
                *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"),
                *("-keyout", "key.pem", "-out", "cert.pem"),
            ],
            cwd=self.folder,
            check=True,
            capture_output=True,
        )
        (self.folder / "tls.pem").write_text(
            (self.folder / "cert.pem").read_text() + (self.folder / "key.pem").read_text()
        )
        self.write_config()
        (self.folder / "inetrc").write_text("{lookup, [file, native]}.\n")
        (self.folder / "ejabberdctl.cfg").write_text("INET_DIST_INTERFACE=127.0.0.1\n")
        # the same script, but for the account it insists on
        script = WRAPPER.read_text().replace("INSTALLUSER=ejabberd", "INSTALLUSER=")
        (self.folder / "ejabberdctl").write_text(script)
        self.epmd = subprocess.Popen(
            ["epmd", "-port", self.env["ERL_EPMD_PORT"], "-address", "127.0.0.1"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def write_config(self, extra: str = "") -> None:
        (self.folder / "ejabberd.yml").write_text(CONFIG.format(folder=self.folder, port=self.port) + extra)

    def ctl(self, *argv: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        f = str(self.folder)
        return subprocess.run(
            ["bash", f"{f}/ejabberdctl", "--config-dir", f, "--logs", f"{f}/log", "--spool", f"{f}/spool", *argv],
            env=self.env,
            capture_output=True,
            text=True,
            input=stdin if stdin is not None else "",
            timeout=120,
        )

    def start(self) -> None:
        (self.folder / "log").mkdir(exist_ok=True)
        self.ctl("start")
        for _ in range(60):
            if self.ctl("status").returncode == 0:
                return
            time.sleep(0.3)
        raise SystemExit("ejabberd does not start: " + (self.folder / "log" / "ejabberd.log").read_text()[-2000:])

    def end(self) -> None:
        self.ctl("stop")
        for _ in range(40):
            if self.ctl("status").returncode == 3:
                break
            time.sleep(0.3)
        # after a `stopped` it is no longer the one we started, but one that ejabberd started on the same port
        subprocess.run(["epmd", "-kill"], env=self.env, capture_output=True)
        if self.epmd:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.epmd.pid, signal.SIGTERM)
            self.epmd.wait(10)


class Client:
    """A client that is online and keeps what it receives; speaks just enough XMPP for that."""

    def __init__(self, user: str, resource: str) -> None:
        self.user, self.resource = user, resource
        self.seen = ""

    async def login(self, port: int, password: str) -> None:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", port)
        await self.open("<starttls")
        await self.ask("<starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>", "<proceed")
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        await self.writer.start_tls(context)
        await self.open("<mechanism>PLAIN")
        token = base64.b64encode(f"\0{self.user}\0{password}".encode()).decode()
        await self.ask(f"<auth xmlns='urn:ietf:params:xml:ns:xmpp-sasl' mechanism='PLAIN'>{token}</auth>", "<success")
        await self.open("<bind")
        bind = f"<bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'><resource>{self.resource}</resource></bind>"
        await self.ask(f"<iq type='set' id='b'>{bind}</iq>", "</iq>")

    async def open(self, until: str) -> None:
        await self.ask(
            "<stream:stream xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams' "
            "to='localhost' version='1.0'>",
            until,
        )
        await self.until("</stream:features>")

    async def ask(self, text: str, until: str) -> None:
        self.seen = ""
        self.writer.write(text.encode())
        await self.until(until)

    async def until(self, mark: str) -> None:
        while mark not in self.seen:
            data = await asyncio.wait_for(self.reader.read(65536), 10)
            if not data:
                raise ConnectionError(f"closed while waiting for {mark}: {self.seen}")
            self.seen += data.decode()

    async def drain(self) -> str:
        """What arrived since the last call, up to 0.5 s of silence; ends with `{closed}` when the stream is gone."""
        out, self.seen = "", ""
        with contextlib.suppress(asyncio.TimeoutError):
            while True:
                data = await asyncio.wait_for(self.reader.read(65536), 0.5)
                if not data:
                    return out + "{closed}"
                out += data.decode()
        return out

    def close(self) -> None:
        self.writer.close()


async def go_online(node: Node, spec: dict[str, Any], passwords: dict[str, str]) -> Client:
    client = Client(spec["user"], spec["resource"])
    await client.login(node.port, passwords[spec["user"]])
    presence = spec.get("presence", "<presence/>")
    if presence:
        await client.ask(presence, "<presence")
    await client.drain()
    return client


class Recorder:
    def __init__(self, node: Node) -> None:
        self.node = node

    def scrub(self, text: str, rules: list[tuple[str, str]]) -> str:
        """Volatile parts become placeholders (tests/golden/README.md)."""
        text = text.replace(ROOT_WARNING, "")
        text = re.sub(r"\nCommands to start an ejabberd node:\n.*", "{wrapper_help}", text, flags=re.S)
        text = text.replace("ejabberd@localhost", "{node}").replace(str(self.node.folder), "{folder}")
        text = re.sub(r"ctl-[\w-]+@[\w.-]+|\b[0-9a-f]{3}-ctl-\S+", "{ctl_node}", text)
        text = re.sub(r"<\d+\.\d+\.\d+>", "{pid}", text)
        for pattern, replacement in rules:
            text = re.sub(pattern, replacement, text, flags=re.M)
        return text

    async def case(self, file: CommandFile, case: Case, clients: dict[str, Client]) -> dict[str, Any]:
        done = await asyncio.to_thread(self.node.ctl, *case.argv, stdin=case.stdin)
        out = {
            "name": case.name,
            "argv": list(case.argv),
            "stdout": self.scrub(done.stdout, file.scrub),
            "stderr": self.scrub(done.stderr, file.scrub),
            "code": done.returncode,
        }
        if case.stdin is not None:
            out["stdin"] = case.stdin
        if case.note:
            out["note"] = case.note
        received = {}
        for name, client in clients.items():
            if case.watch and (text := await client.drain()):
                received[name] = self.scrub(
                    text, [(r"( id=)'[^']*'", r"\1'{id}'"), (r"stamp='[^']*'", "stamp='{time}'")]
                )
        if case.watch:
            out["received"] = received
        return out

    async def command(self, file: CommandFile) -> None:
        passwords = file.accounts
        for user, password in passwords.items():
            done = await asyncio.to_thread(self.node.ctl, "register", user, "localhost", password)
            assert done.returncode == 0, done
        for argv in file.before:
            done = await asyncio.to_thread(self.node.ctl, *argv)
            assert done.returncode == 0, done
        clients = {f"{o['user']}/{o['resource']}": await go_online(self.node, o, passwords) for o in file.online}
        cases = [await self.case(file, case, clients) for case in file.cases]
        for client in clients.values():
            client.close()
        if not file.stops_node:
            for argv in file.after:
                await asyncio.to_thread(self.node.ctl, *argv)
            users = (await asyncio.to_thread(self.node.ctl, "registered_users", "localhost")).stdout.split()
            for user in users:
                await asyncio.to_thread(self.node.ctl, "unregister", user, "localhost")
        else:
            await asyncio.to_thread(self.node.start)
        given = {
            "hosts": ["localhost", "capulet.example"],
            "accounts": passwords,
            "before": file.before,
            "online": file.online,
        }
        text = json.dumps(
            {"command": file.command, "ejabberd": "23.01", "given": given, "cases": cases}, indent=1, ensure_ascii=False
        )
        folder = HERE / "ejabberdctl-23.01"
        folder.mkdir(exist_ok=True)
        (folder / f"{file.command}.json").write_text(text + "\n")
        print(f"{file.command}: {len(cases)} cases", flush=True)


def main() -> None:
    if not WRAPPER.exists() or not shutil.which("erl"):
        raise SystemExit("Debian's ejabberd is not installed (apt-get install ejabberd)")
    wanted: Callable[[CommandFile], bool] = (lambda f: f.command in sys.argv[1:]) if sys.argv[1:] else (lambda f: True)
    with tempfile.TemporaryDirectory(prefix="xr", ignore_cleanup_errors=True) as folder:
        node = Node(Path(folder))
        try:
            node.prepare()
            node.start()
            recorder = Recorder(node)
            for file in CASES:
                if wanted(file):
                    asyncio.run(recorder.command(file))
        finally:
            node.end()


if __name__ == "__main__":
    main()
