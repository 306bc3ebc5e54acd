"""A node as a process of its own: free ports, a data folder, and an end by its pid."""

import json
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from tests.harness.nursery import Child, nursery
from tests.harness.watcher import Watcher

ROOT = Path(__file__).parents[2]
WRONG_CLOCK = Path(__file__).with_name("wrong_clock.py")
BATCH_IDLE = 300.0  # seconds; after ten minutes the node hangs up
PATIENCE = 60.0  # seconds until a node must serve or be gone
_TROUBLE = re.compile(r"^\S+ (ERROR|CRITICAL)|^Traceback", re.MULTILINE)

Options = dict[str, Any]


class NotServing(AssertionError):
    """The process ended, or did not become ready."""


def options(**changes: Any) -> Options:
    """A small configuration; `changes` replace whole sections, `c2s` adds options to both client listeners."""
    c2s = changes.pop("c2s", {})
    listen = [
        {"port": 0, "ip": "127.0.0.1", "module": "c2s", **c2s},
        {"port": 0, "ip": "127.0.0.1", "module": "c2s", "tls": True, **c2s},
    ]
    own = {"node": "xmppd@localhost", "hosts": ["localhost"], "shutdown_grace": 5, "listen": listen}
    # Floods are to meet the limits that a test is about, not this one.
    return {**own, "shaper_rules": {"c2s_shaper": "none"}, **changes}


class Server:
    """`start`, `stop` and `kill` may be repeated; the data stay."""

    def __init__(self, folder: Path, configuration: Options | None = None) -> None:
        self.folder = folder
        self.data_dir = folder / "var"
        self.path = folder / "xmppd.yml"
        self.log_path = folder / "xmppd.log"
        self.environment = dict(os.environ, PYTHONPATH=str(ROOT))
        for name in [name for name in self.environment if name.startswith("XMPPD_")]:
            del self.environment[name]
        self.expects_trouble = False  # a test that provokes errors in the log says so
        self.from_nothing = False  # a program that loads its own code
        self.clock = 0.0  # seconds by which its wall clock is ahead of the others'
        self.process: subprocess.Popen[bytes] | Child | None = None
        self._batch: subprocess.Popen[bytes] | None = None
        self._batch_used = 0.0
        self._watcher: Watcher | None = None
        self._seen = 0  # how much of the log has been judged
        folder.mkdir(parents=True, exist_ok=True)
        self.configure(configuration or options())

    def configure(self, configuration: Options) -> None:
        """Write the configuration file; it counts from the next start or reload."""
        self.options = {"data_dir": str(self.data_dir), **configuration}
        self.path.write_text(yaml.safe_dump(self.options))

    # -- life

    def launch(self, *prefix: str) -> None:
        """Start the process and return at once."""
        assert self.process is None, "it runs already"
        with self.log_path.open("ab") as log:
            if prefix or self.clock or self.from_nothing or not nursery().takes(self.environment):
                self.process = subprocess.Popen(
                    [*prefix, sys.executable, *self._program, "--config", str(self.path)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=self.folder,
                    env=self.environment,
                )
            else:
                how: Any = {"cwd": self.folder, "environment": self.environment, "output": log}
                self.process = nursery().start(["--config", str(self.path)], **how)
        self._watcher = Watcher(self.process.pid)

    @property
    def _program(self) -> list[str]:
        return ["-m", "xmppd"] if not self.clock else [str(WRONG_CLOCK), str(self.clock)]

    def start(self, *prefix: str) -> None:
        """Start the process and wait until it serves."""
        self.launch(*prefix)
        try:
            self.wait_until_ready()
        except BaseException:
            self.kill()
            raise

    def second_start(self) -> subprocess.CompletedProcess[str]:
        """Another process with the same configuration."""
        return subprocess.run(
            [sys.executable, "-m", "xmppd", "--config", str(self.path)],
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )

    def wait_until_ready(self) -> None:
        assert self.process is not None
        deadline = time.monotonic() + PATIENCE
        while (ready := self._ready()) is None:
            if self.process.poll() is not None:
                code, self.process = self.process.returncode, None
                self._dismiss_watcher()
                raise NotServing(f"exit code {code}\n{self.log}")
            if time.monotonic() > deadline:
                raise NotServing(f"not ready in {PATIENCE} s\n{self.log}")
            time.sleep(0.01)
        self.ready = ready
        self.port, self.tls_port = (
            next((each["port"] for each in ready["listen"] if each["module"] == "c2s" and each["tls"] is tls), 0)
            for tls in (False, True)
        )

    def _ready(self) -> dict[str, Any] | None:
        assert self.process is not None
        try:
            ready: dict[str, Any] = json.loads((self.data_dir / "ready.json").read_text())
        except (OSError, ValueError):
            return None
        return ready if ready["pid"] == self.process.pid else None

    def send_signal(self, number: int) -> None:
        """If it runs."""
        if self.process is not None:
            self.process.send_signal(number)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it in order; the exit code."""
        self.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """Wait until it has ended by itself; the exit code."""
        process, self.process = self.process, None
        self._end_batch()
        self._dismiss_watcher()
        if process is None:
            return 0
        try:
            return process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)  # what each of its threads is doing comes to the log
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()
            raise NotServing(f"it did not stop\n{self.log}") from None

    def kill(self) -> None:
        """End it as a power cut would."""
        process, self.process = self.process, None
        self._end_batch()
        self._dismiss_watcher()
        if process is not None:
            process.kill()
            process.wait()

    def restart(self) -> None:
        self.stop()
        self.start()

    # -- its words

    @property
    def log(self) -> str:
        return self.log_path.read_text() if self.log_path.exists() else ""

    def new_log(self) -> str:
        """What was logged since `judge`."""
        return self.log[self._seen :]

    def judge(self) -> None:
        """Fail when errors were logged that no test expected."""
        log = self.new_log()
        self._seen += len(log)
        expected, self.expects_trouble = self.expects_trouble, False
        if not expected:
            found = _TROUBLE.search(log)
            assert found is None, f"trouble in the server's log:\n{log[found.start() if found else 0 :][:4000]}"

    # -- its operator

    def ctl(self, *argv: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run xmppctl against it."""
        return subprocess.run(
            [sys.executable, "-m", "xmppd.ctl", "--config", str(self.path), *argv],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            env=self.environment,
            cwd=self.folder,
            check=False,
        )

    def asked(self, *argv: str) -> str:
        """What a command that must succeed prints."""
        done = self.ctl(*argv)
        assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
        return done.stdout.rstrip("\n")

    def quick(self, *argv: str) -> str:
        """What a command prints, over one connection that stays open: milliseconds."""
        if time.monotonic() - self._batch_used > BATCH_IDLE:
            self._end_batch()
        self._batch_used = time.monotonic()
        if self._batch is None:
            self._batch = subprocess.Popen(
                [sys.executable, "-m", "xmppd.ctl", "--config", str(self.path), "batch"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                bufsize=0,
                env=self.environment,
                cwd=self.folder,
            )
        batch = self._batch
        assert batch.stdin is not None
        assert batch.stdout is not None
        # Some commands print nothing, so one follows whose answer is known.
        batch.stdin.write(shlex.join(argv).encode() + b"\nregistered_vhosts\n")
        end = "".join(f"{host}\n" for host in self.options["hosts"]).encode()
        answer = b""
        while not answer.endswith(end):
            assert select.select([batch.stdout], [], [], PATIENCE)[0], f"no answer to {argv}: {answer!r}"
            more = batch.stdout.read(65536)
            assert more, f"the batch ended at {argv}: {answer!r}"
            answer += more
        return answer.removesuffix(end).decode().rstrip("\n")

    def _end_batch(self) -> None:
        batch, self._batch = self._batch, None
        if batch is not None:
            assert batch.stdin is not None
            assert batch.stdout is not None
            batch.stdin.close()
            batch.wait(PATIENCE)
            batch.stdout.close()

    def _dismiss_watcher(self) -> None:
        watcher, self._watcher = self._watcher, None
        if watcher is not None:
            watcher.dismiss()

    def register(self, user: str, password: str, host: str = "localhost") -> None:
        answer = self.quick("register", user, host, password)
        assert "successfully registered" in answer, answer

    def unregister(self, user: str, host: str = "localhost") -> None:
        self.quick("unregister", user, host)

    def certificate(self, host: str = "localhost") -> Path:
        """The self-signed certificate that clients are to trust."""
        return self.data_dir / "certs" / f"{host}.pem"

    @property
    def memory(self) -> int:
        """Resident KiB."""
        assert self.process is not None
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * 4
