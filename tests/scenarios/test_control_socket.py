"""The control socket: who may use it, what a hostile or slow client can do, dead and living predecessors."""

import asyncio
import json
import os
import socket
import stat
import subprocess
import sys
import tempfile
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.golden.memory import NODE, Node
from xmppd.admin.registry import Arg, command, commands_of
from xmppd.admin.results import List, Rescode, Restuple, integer, string
from xmppd.admin.socket import ControlSocket, short_path
from xmppd.errors import DataFolderInUse


@asynccontextmanager
async def serving(path, **options):
    node = Node()
    control = ControlSocket(path, node.registry, node=NODE, **options)
    await control.start()
    try:
        yield node
    finally:
        await control.close()


class Peer:
    """Speaks the protocol line by line."""

    @classmethod
    async def connect(cls, path):
        self = cls()
        with short_path(path) as name:
            self.reader, self.writer = await asyncio.open_unix_connection(name, limit=1 << 24)
        return self

    def send(self, **frame):
        self.writer.write(json.dumps(frame).encode() + b"\n")

    async def frame(self):
        line = await asyncio.wait_for(self.reader.readline(), 10)
        return json.loads(line) if line else None

    async def ask(self, *argv, **more):
        """The frames up to the last one."""
        self.send(argv=list(argv), **more)
        frames = [await self.frame()]
        while "code" not in frames[-1]:
            frames.append(await self.frame())
        return frames

    async def text(self, *argv, **more):
        frames = await self.ask(*argv, **more)
        return "".join(frame.get("out", "") for frame in frames), frames[-1]["code"]

    def close(self):
        self.writer.close()


async def test_many_requests_go_over_one_connection(tmp_path):
    async with serving(tmp_path / "xmppd.sock"):
        peer = await Peer.connect(tmp_path / "xmppd.sock")
        assert await peer.text("register", "juliet", "localhost", "rose") == (
            "User juliet@localhost successfully registered\n",
            0,
        )
        assert await peer.text("registered_users", "localhost") == ("juliet\n", 0)
        assert await peer.text("registered_users", "localhost", json=True) == ('["juliet"]\n', 0)
        text, code = await peer.text("register", "juliet")
        assert text.startswith("  Command Name: register\n")
        assert text.endswith("\n\nError: the command 'register' requires 2 more argument.\n")
        assert code == 2
        out, code = await peer.text("register", "juliet", json=True)
        assert json.loads(out) == {
            "status": "error",
            "code": 2,
            "message": "the command 'register' requires 2 more argument.",
        }
        peer.close()


async def test_the_socket_is_for_its_owner_alone_and_goes_with_the_node(tmp_path):
    path = tmp_path / "xmppd.sock"
    async with serving(path):
        assert stat.S_IMODE(path.lstat().st_mode) == 0o600
        assert os.listdir(tmp_path) == ["xmppd.sock"]
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be somebody else")
async def test_another_user_is_refused_even_where_the_file_lets_him_in():
    code = (
        "import os, socket, sys\nos.setgid(65534); os.setuid(65534)\n"
        "s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])\n"
        's.sendall(b\'{"argv": ["stop"]}\\n\'); print(s.makefile().read())'
    )
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to other users
        path = Path(folder, "xmppd.sock")
        async with serving(path) as node:
            os.chmod(folder, 0o755)
            os.chmod(path, 0o666)
            other = await asyncio.create_subprocess_exec(sys.executable, "-c", code, str(path), stdout=subprocess.PIPE)
            out, _ = await other.communicate()
            assert json.loads(out)["code"] == 1
            assert "only root and the user of the node" in json.loads(out)["err"]
            assert not node.server.asked_to_stop.is_set()


async def test_a_secret_comes_on_request_or_with_the_request_and_only_for_secret_arguments(tmp_path):
    async with serving(tmp_path / "xmppd.sock") as node:
        peer = await Peer.connect(tmp_path / "xmppd.sock")
        peer.send(argv=["register", "juliet", "localhost", "-"])
        assert await peer.frame() == {"need": "password"}
        peer.send(secret="rose")
        assert (await peer.frame())["out"].startswith("User juliet")
        assert (await peer.frame())["code"] == 0
        assert (await peer.text("register", "romeo", "localhost", "-", secret="sweet"))[1] == 0
        assert (await peer.text("register", "nurse", "localhost", secret="angelica"))[1] == 0
        assert {user: password for (_, user), password in node.accounts.passwords.items()} == {
            "juliet": "rose",
            "romeo": "sweet",
            "nurse": "angelica",
        }
        assert (await peer.text("send_message", "chat", "localhost", "juliet@localhost", "-", "b"))[1] == 0
        peer.send(argv=["check_password", "juliet", "localhost", "-"])
        await peer.frame()
        peer.send(secret=None)
        assert await peer.frame() == {"out": "Error: no password was given\n", "err": "", "code": 2}
        assert (await peer.text("check_password", "juliet", "localhost", "rose"))[1] == 0
        peer.close()


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"GET / HTTP/1.1\r\n",
        b"[]\n",
        b"[" * 100_000 + b"\n",
        b"\xff\xfe\n",
        b'{"argv": "register"}\n',
        b'{"argv": []}\n',
        b'{"argv": [1]}\n',
        b'{"argv": [["a"]]}\n',
        b"{}\n",
        b'{"argv": ["stop"], "node": ["x"]}\n',
    ],
)
async def test_what_is_no_request_gets_a_clear_error_and_harms_nobody(tmp_path, line):
    async with serving(tmp_path / "xmppd.sock") as node:
        peer, other = await Peer.connect(tmp_path / "xmppd.sock"), await Peer.connect(tmp_path / "xmppd.sock")
        peer.writer.write(line)
        answer = await peer.frame()
        assert answer["code"] in (2, 3)
        assert "Error: " in answer["out"] + answer["err"]
        assert not node.server.asked_to_stop.is_set()
        assert (await other.text("registered_vhosts"))[1] == 0
        peer.close()
        other.close()


async def test_a_line_without_end_is_cut_off(tmp_path):
    async with serving(tmp_path / "xmppd.sock", max_line=4096):
        peer = await Peer.connect(tmp_path / "xmppd.sock")
        peer.writer.write(b"x" * 100_000)
        assert (await peer.frame())["err"] == "Error: the request is too long\n"
        assert await peer.frame() is None
        peer.close()


async def test_an_unfinished_request_is_not_carried_out(tmp_path):
    async with serving(tmp_path / "xmppd.sock") as node:
        peer = await Peer.connect(tmp_path / "xmppd.sock")
        peer.writer.write(b'{"argv": ["stop"]}')
        peer.writer.write_eof()
        assert await peer.frame() is None
        assert not node.server.asked_to_stop.is_set()
        peer.close()


async def test_one_connection_too_many_is_told_so_and_room_comes_back(tmp_path):
    path = tmp_path / "xmppd.sock"
    async with serving(path, max_connections=2):
        first, second = await Peer.connect(path), await Peer.connect(path)
        assert (await first.text("registered_vhosts"))[1] == (await second.text("registered_vhosts"))[1] == 0
        third = await Peer.connect(path)
        assert "more than 2 control connections" in (await third.frame())["err"]
        first.close()
        await first.writer.wait_closed()
        async with asyncio.timeout(10):
            while True:  # the server sees the end of the first one when it gets to it
                fourth = await Peer.connect(path)
                fourth.send(argv=["registered_vhosts"])
                if not (await fourth.frame()).get("err"):
                    break
                fourth.close()
        for peer in (second, third, fourth):
            peer.close()


async def test_an_idle_client_is_let_go(tmp_path):
    async with serving(tmp_path / "xmppd.sock", idle=0.05):
        peer = await Peer.connect(tmp_path / "xmppd.sock")
        assert await peer.frame() is None
        peer.close()


def read_all(sock: socket.socket) -> bytes:
    data = b""
    try:
        while chunk := sock.recv(1 << 20):
            data += chunk
    except ConnectionResetError:
        pass
    return data


class Big:
    ended = 0

    @command("big", result=List("l", string("s")), doc="More than the kernel buffers")
    def big(self):
        try:
            for n in range(400_000):
                yield f"user{n:08}@localhost/resource-of-some-length"
        finally:
            self.ended += 1

    @command("slow", args=(Arg("n", "integer"),), result=Restuple(), doc="With progress")
    async def slow(self, n, call):
        for step in range(n):
            await call.progress(f"{step + 1} of {n}")
        return "done"

    @command("break", result=List("l", integer("n")), doc="Fails while it is printed")
    def break_(self):
        yield 1
        yield 1 // 0

    @command("hang", result=Rescode(), doc="Never ends")
    async def hang(self):
        await asyncio.Event().wait()


async def test_a_client_that_does_not_read_is_cut_off_and_others_are_served_meanwhile(tmp_path):
    path = tmp_path / "xmppd.sock"
    big = Big()
    async with serving(path, slow=0.3) as node:
        node.registry.register("big", commands_of(big))
        stuck = socket.socket(socket.AF_UNIX)
        stuck.connect(str(path))
        stuck.sendall(b'{"argv": ["big"]}\n')
        peer = await Peer.connect(path)
        async with asyncio.timeout(10):
            while not big.ended:
                assert (await peer.text("registered_vhosts"))[1] == 0
        with stuck:
            stuck.settimeout(5)
            data = await asyncio.to_thread(read_all, stuck)
        assert b'"code"' not in data
        peer.close()


async def test_a_long_list_arrives_whole_and_progress_before_the_result(tmp_path):
    path = tmp_path / "xmppd.sock"
    async with serving(path) as node:
        node.registry.register("big", commands_of(Big()))
        peer = await Peer.connect(path)
        text, code = await peer.text("big")
        assert (text.count("\n"), code) == (400_000, 0)
        assert text.endswith("user00399999@localhost/resource-of-some-length\n")
        frames = await peer.ask("slow", "2")
        assert frames[:2] == [{"progress": "1 of 2"}, {"progress": "2 of 2"}]
        assert frames[2]["out"] == "done\n"
        peer.close()


async def test_a_list_that_breaks_while_it_is_printed_is_an_error_and_the_connection_lives_on(tmp_path):
    async with serving(tmp_path / "xmppd.sock") as node:
        node.registry.register("big", commands_of(Big()))
        peer = await Peer.connect(tmp_path / "xmppd.sock")
        for as_json in (False, True):
            text, code = await peer.text("break", json=as_json)
            assert "the command 'break' failed (ZeroDivisionError), see the log" in text
            assert code == 1
        assert (await peer.text("registered_vhosts"))[1] == 0
        peer.close()


async def test_a_command_that_hangs_does_not_keep_the_node_from_stopping(tmp_path):
    path = tmp_path / "xmppd.sock"
    node = Node()
    node.registry.register("big", commands_of(Big()))
    control = ControlSocket(path, node.registry, node=NODE)
    await control.start()
    peer = await Peer.connect(path)
    peer.send(argv=["hang"])
    other = await Peer.connect(path)
    await other.text("registered_vhosts")  # by then the other one's command has begun
    other.close()
    async with asyncio.timeout(5):
        await control.close(grace=0.05)
        assert await peer.reader.read() == b""
    assert not path.exists()
    peer.close()


async def test_a_node_that_stops_does_not_wait_for_idle_connections(tmp_path):
    node = Node()
    control = ControlSocket(tmp_path / "xmppd.sock", node.registry, node=NODE)
    await control.start()
    peer, slow = await Peer.connect(tmp_path / "xmppd.sock"), await Peer.connect(tmp_path / "xmppd.sock")
    node.registry.register("big", commands_of(Big()))
    assert (await peer.text("registered_vhosts"))[1] == 0
    assert (await slow.text("registered_vhosts"))[1] == 0
    slow.send(argv=["slow", "50"])
    assert await slow.frame() == {"progress": "1 of 50"}
    began = asyncio.get_running_loop().time()
    await control.close(grace=30)
    assert asyncio.get_running_loop().time() - began < 10
    assert await peer.frame() is None
    while "code" not in (frame := await slow.frame()):  # what had begun is answered
        pass
    assert frame["code"] == 0
    assert await slow.frame() is None
    peer.close()
    slow.close()


async def test_the_socket_of_a_dead_process_is_replaced(tmp_path):
    path = tmp_path / "xmppd.sock"
    code = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen()"
    dead = await asyncio.create_subprocess_exec(sys.executable, "-c", code, str(path))
    assert await dead.wait() == 0
    assert stat.S_ISSOCK(path.lstat().st_mode)
    async with serving(path):
        peer = await Peer.connect(path)
        assert (await peer.text("registered_vhosts"))[1] == 0
        peer.close()


async def test_the_socket_of_a_living_process_is_left_alone_and_its_holder_named(tmp_path):
    path = tmp_path / "xmppd.sock"
    async with serving(path):
        with pytest.raises(DataFolderInUse) as caught:
            await ControlSocket(path, Node().registry).start()
        assert caught.value.pid == os.getpid()
        peer = await Peer.connect(path)
        assert (await peer.text("registered_vhosts"))[1] == 0
        peer.close()


async def test_a_node_that_goes_takes_only_its_own_socket_along(tmp_path):
    path = tmp_path / "xmppd.sock"
    control = ControlSocket(path, Node().registry)
    await control.start()
    path.unlink()
    async with serving(path):
        await control.close()
        peer = await Peer.connect(path)
        assert (await peer.text("registered_vhosts"))[1] == 0
        peer.close()


async def test_something_else_in_its_place_is_not_deleted(tmp_path):
    path = tmp_path / "xmppd.sock"
    path.write_text("precious")
    with pytest.raises(FileExistsError):
        await ControlSocket(path, Node().registry).start()
    assert path.read_text() == "precious"


async def test_a_path_too_long_for_the_system_call_works(tmp_path):
    folder = tmp_path / ("d" * 120) / ("e" * 120)
    folder.mkdir(parents=True)
    async with serving(folder / "xmppd.sock"):
        assert stat.S_IMODE((folder / "xmppd.sock").lstat().st_mode) == 0o600
        peer = await Peer.connect(folder / "xmppd.sock")
        assert (await peer.text("registered_vhosts"))[1] == 0
        peer.close()
        with pytest.raises(DataFolderInUse):
            await ControlSocket(folder / "xmppd.sock", Node().registry).start()


async def test_a_folder_that_is_not_there_is_an_error_with_its_name(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        await ControlSocket(tmp_path / "gone" / "xmppd.sock", Node().registry).start()
    assert str(tmp_path) in str(caught.value)


async def test_a_request_for_another_node_is_refused_with_code_3(tmp_path):
    async with serving(tmp_path / "xmppd.sock") as node:
        peer = await Peer.connect(tmp_path / "xmppd.sock")
        text, code = await peer.text("stop", node="xmppd@node02")
        assert text.startswith("Error: Failed RPC connection to the node xmppd@node02: nodedown")
        assert code == 3
        assert not node.server.asked_to_stop.is_set()
        assert (await peer.text("registered_vhosts", node=NODE))[1] == 0
        peer.close()
