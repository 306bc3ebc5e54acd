"""Every command that ejabberdctl 23.01 was recorded with, on the real server (tests/golden/README.md)."""

import asyncio
import io
import re
import sys

import pytest

from tests.golden import compare
from xmppd.ctl.main import main

FILES = compare.files()
HOSTS = FILES[0]["given"]["hosts"]


@pytest.fixture
async def golden(served, fresh, file):
    """The server with the recorded hosts; whatever accounts the commands have made go with the test."""
    if any(case["argv"][:1] == ["stop"] for case in file["cases"]):
        scene = fresh(hosts=HOSTS)
        yield scene
        for command in ("stop", "stopped"):  # what `xmppctl start` has started is nobody's child
            await asyncio.to_thread(main, ["--config", str(scene.node.path), command])
        return
    scene = await served(hosts=HOSTS)
    yield scene
    scene.node.quick("set_loglevel", "info")
    for host in HOSTS:
        for user in scene.node.quick("registered_users", host).splitlines():
            scene.node.unregister(user, host)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file["command"])
async def test_xmppctl_answers_as_ejabberdctl_does(golden, file, capfd, monkeypatch):
    async def ctl(*argv, stdin=""):
        """In a thread, for the clients want to be served meanwhile; test_xmppctl.py runs the process itself."""
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((stdin or "").encode())))
        code = await asyncio.to_thread(main, ["--config", str(golden.node.path), *argv])
        return capfd.readouterr().out, code

    given = file["given"]
    assert given["hosts"] == HOSTS
    for user, password in given["accounts"].items():
        assert (await ctl("register", user, "localhost", password))[1] == 0
    for argv in given["before"]:
        assert (await ctl(*argv))[1] == 0, argv
        if argv[0] == "send_message":
            await golden.stored("juliet")  # it returns when the message is on its way
    for session in given["online"]:
        await online(golden, session, given["accounts"])
    status = (await ctl("status"))[0]
    node, version = status.split()[2], re.search(r"xmppd (\S+) is running", status)[1]

    for case in file["cases"]:
        stdout, code = await ctl(*case["argv"], stdin=case.get("stdin"))
        compare.check(file["command"], case, stdout, code, node=node, version=version)


async def online(scene, session, passwords):
    """A client as it was recorded: over STARTTLS, with this presence; one that sent none is bound and silent."""
    client = scene.raw()
    await client.connect(scene.node.port)
    await client.open()
    await client.starttls()
    await client.authenticate(session["user"], passwords[session["user"]])
    answer = await client.bind(session["resource"])
    assert answer.type == "result", answer
    client.send_raw(session["presence"])
    await client.sync()
