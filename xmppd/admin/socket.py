"""The control socket: `data_dir/xmppd.sock`, JSON lines, for the user the node runs as and for root.

The client sends one line per request, several in a row on one connection:

    {"argv": ["register", "juliet", "localhost", "-"], "json": false, "secret": null, "local": false, "node": null}

All but `argv` may be missing; request.py carries it out. The node answers with lines, the last of which has `code`:

    {"progress": "..."}           long work goes on
    {"need": "password"}          a secret argument was `-` and no `secret` came along: {"secret": "..."} is to follow
    {"out": "..."}                a part of a long output
    {"out": "...", "err": "...", "code": 0}

`secret` fills the `-` of a secret argument; where no argument is `-` and exactly one is missing, it is inserted at the
secret one's place. A request with the `node` of another node that is up is carried out there; any other name is refused
(code 3).
"""

import asyncio
import errno
import json
import os
import socket
import stat
import struct
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final, Protocol

from xmppd.admin.registry import Caller, Registry, UsageError
from xmppd.admin.request import Ask, Frame, Send, answer, refusal
from xmppd.errors import CommandError, DataFolderInUse
from xmppd.log import get_logger

log = get_logger("admin")

NAME: Final = "xmppd.sock"
MAX_LINE: Final = 1 << 20  # a request; an answer is cut into parts and has no such limit
MAX_CONNECTIONS: Final = 64
IDLE: Final = 600.0  # seconds between requests, and for typing a password
SLOW: Final = 15.0  # seconds in which a client must take what was written
LINGER: Final = 1.0  # seconds a refused client has to read why
_SUN_PATH: Final = 100  # sockaddr_un holds 104 to 108 bytes, depending on the system

NOT_REACHABLE: Final = 3


class Elsewhere(Protocol):
    """The other nodes, as far as a request can be passed on to them (nodes.py)."""

    def names(self) -> Sequence[str]: ...

    async def relay(self, node: str, frame: Frame, caller: Caller, send: Send, ask: Ask) -> None: ...


@contextmanager
def short_path(path: Path) -> Iterator[str]:
    """A name of the socket that fits into sockaddr_un: its own, or one through a descriptor of its folder (Linux)."""
    if len(os.fsencode(path)) <= _SUN_PATH:
        yield str(path)
        return
    if not os.path.isdir("/proc/self/fd"):
        raise OSError(errno.ENAMETOOLONG, f"the path of the control socket is longer than {_SUN_PATH} bytes", str(path))
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def peer_of(sock: Any) -> tuple[int, int]:
    """(pid, uid) of the process at the other end, from the kernel."""
    pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return pid, uid


class ControlSocket:
    """Serves a registry on a unix socket.

    `node` is this node's name. start() raises DataFolderInUse when a living process serves on the path, and OSError
    where the socket cannot be made.
    """

    def __init__(
        self,
        path: Path,
        registry: Registry,
        *,
        node: str = "",
        nodes: Elsewhere | None = None,
        max_connections: int = MAX_CONNECTIONS,
        max_line: int = MAX_LINE,
        idle: float = IDLE,
        slow: float = SLOW,
    ) -> None:
        self.path = path
        self._registry = registry
        self._node = node
        self._nodes = nodes
        self._max_connections = max_connections
        self._max_line = max_line
        self._idle = idle
        self._slow = slow
        self._server: asyncio.Server | None = None
        self._inode = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._connections: set[_Connection] = set()

    async def start(self) -> None:
        """Listen. A socket that a dead process left is replaced."""
        self._refuse_if_served()
        listener = self._bind()
        self._server = await asyncio.start_unix_server(self._connected, sock=listener, limit=self._max_line)

    async def close(self, grace: float = 2.0) -> None:
        """Stop listening, let running commands end for `grace` seconds, then cut them off; the socket's file goes."""
        if self._server is None:
            return
        self._server.close()
        self._server = None
        try:
            if self.path.lstat().st_ino == self._inode:
                self.path.unlink()
        except OSError:
            pass
        for connection in self._connections:
            connection.finish()
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=grace)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    def _refuse_if_served(self) -> None:
        try:
            mode = self.path.lstat().st_mode
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(mode):
            raise FileExistsError(
                errno.EEXIST, "the control socket's place is taken by something else; move it away", str(self.path)
            )
        with socket.socket(socket.AF_UNIX) as probe, short_path(self.path) as name:
            probe.settimeout(1.0)
            try:
                probe.connect(name)
            except (ConnectionRefusedError, FileNotFoundError):
                return
            except TimeoutError:
                raise DataFolderInUse(str(self.path.parent), None) from None
            raise DataFolderInUse(str(self.path.parent), peer_of(probe)[0])

    def _bind(self) -> socket.socket:
        # made under another name and renamed: under its own it never existed with other rights, or without a listener
        draft = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        draft.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX)
        try:
            with short_path(draft) as name:
                listener.bind(name)
            draft.chmod(0o600)
            listener.listen(self._max_connections)
            listener.setblocking(False)
            self._inode = draft.lstat().st_ino
            draft.rename(self.path)
        except OSError as exc:
            listener.close()
            draft.unlink(missing_ok=True)
            raise OSError(exc.errno, exc.strerror, str(self.path)) from exc  # bind() does not say which file
        return listener

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer), name="admin.socket")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(reader, writer, self._registry, self._node, self._nodes, self._idle, self._slow)
        try:
            pid, uid = peer_of(writer.get_extra_info("socket"))
            if uid not in (0, os.geteuid()):
                log.warning("control socket refused", uid=uid, pid=pid)
                await connection.end("only root and the user of the node may control it")
            elif len(self._connections) >= self._max_connections:
                log.warning("control socket full", connections=self._max_connections, pid=pid)
                await connection.end(f"more than {self._max_connections} control connections; try again later")
            else:
                self._connections.add(connection)
                try:
                    await connection.serve(Caller("ctl", f"uid={uid}"))
                finally:
                    self._connections.discard(connection)
        except (ConnectionError, TimeoutError):
            pass  # the client left, or did not take its answer in time
        except Exception as exc:
            log.error("control connection failed", exc=exc)
        finally:
            writer.transport.abort() if connection.stuck else writer.close()


class _Connection:
    """One client and its requests, one after the other."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        registry: Registry,
        node: str,
        nodes: Elsewhere | None,
        idle: float,
        slow: float,
    ) -> None:
        self._reader, self._writer = reader, writer
        self._registry, self._node, self._nodes = registry, node, nodes
        self._idle, self._slow = idle, slow
        self.stuck = False
        self._finishing = False
        self._wait: asyncio.Timeout | None = None  # while the next request is awaited
        self._endless: asyncio.Timeout | None = None  # while one is answered that does not end with this node's work

    def finish(self) -> None:
        """Take no further request; the one that runs is answered first, unless that may take for ever."""
        self._finishing = True
        for timeout in (self._wait, self._endless):
            if timeout is not None and not timeout.expired():
                timeout.reschedule(asyncio.get_running_loop().time())

    async def send(self, frame: dict[str, Any]) -> None:
        """Write a frame; TimeoutError when the client does not read."""
        self._writer.write(json.dumps(frame, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
        try:
            async with asyncio.timeout(self._slow):
                await self._writer.drain()
        except TimeoutError:
            self.stuck = True
            raise

    async def end(self, text: str, code: int = 1) -> None:
        """Refuse, and take what the client still sends for a moment: to close with it unread would reset the answer."""
        await self.send({"out": "", "err": f"Error: {text}\n", "code": code})
        self._writer.write_eof()
        async with asyncio.timeout(LINGER):
            while await self._reader.read(65536):
                pass

    async def _frame(self) -> dict[str, Any] | None:
        """The next line; None at the end of the connection. Raises UsageError for what is no request."""
        try:
            async with asyncio.timeout(self._idle) as self._wait:
                line = await self._reader.readline()
        except ValueError:
            raise UsageError("the request is too long") from None
        finally:
            self._wait = None
        if not line.endswith(b"\n"):
            return None
        try:
            frame = json.loads(line)
        except (ValueError, RecursionError):
            raise UsageError("the request is no JSON") from None
        if not isinstance(frame, dict):
            raise UsageError("the request is no JSON object")
        return frame

    async def serve(self, caller: Caller) -> None:
        """Answer requests until the client leaves; a line that is no request ends the connection."""
        while not self._finishing:
            try:
                frame = await self._frame()
            except UsageError as exc:
                return await self.end(exc.text, exc.code)
            if frame is None:
                return
            await self._answer(frame, caller)

    async def _answer(self, frame: dict[str, Any], caller: Caller) -> None:
        node = frame.get("node")
        if not node or node == self._node:
            await answer(self._registry, frame, caller, self.send, self._ask, self._while_endless)
        elif self._nodes is None or node not in self._nodes.names():
            text = f"Failed RPC connection to the node {node}: nodedown (the node here is {self._node})"
            await self.send(refusal(CommandError(text, NOT_REACHABLE), frame.get("json") is True))
        else:
            async with self._while_endless():
                return await self._nodes.relay(node, frame, caller, self.send, self._ask)
            await self.send({"out": "", "err": f"the node {self._node} stops\n", "code": NOT_REACHABLE})

    @asynccontextmanager
    async def _while_endless(self) -> AsyncIterator[None]:
        """What is done in it is broken off, without an error, when the node stops."""
        try:
            async with asyncio.timeout(None) as self._endless:
                yield
        except TimeoutError:
            if self.stuck or not self._finishing:
                raise
        finally:
            self._endless = None

    async def _ask(self, name: str) -> str | None:
        await self.send({"need": name})
        reply = await self._frame()
        if reply is None:
            raise ConnectionResetError
        secret = reply.get("secret")
        return secret if isinstance(secret, str) else None
