"""Every command that ejabberdctl 23.01 was recorded with, on the real server (tests/golden/README.md)."""

import asyncio
import re

import pytest

from tests.golden import compare

FILES = compare.files()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file["command"])
async def test_xmppctl_answers_as_ejabberdctl_does(server, file):
    given = file["given"]
    for user, password in given["accounts"].items():
        done = await ctl(server, "register", user, "localhost", password)
        assert done.returncode == 0, done
    for argv in given["before"]:
        done = await ctl(server, *argv)
        assert done.returncode == 0, done
    clients = [await online(server, session, given["accounts"]) for session in given["online"]]
    status = (await ctl(server, "status")).stdout
    node, version = status.split()[2], re.search(r"xmppd (\S+) is running", status)[1]

    for case in file["cases"]:
        done = await ctl(server, *case["argv"], stdin=case.get("stdin"))
        compare.check(file["command"], case, done.stdout, done.returncode, node=node, version=version)

    for client in clients:
        await client.close()


async def ctl(server, *argv, stdin=None):
    """In a thread: the clients that are online want to be served meanwhile."""
    return await asyncio.to_thread(server.ctl, *argv, stdin=stdin)


async def online(server, session, passwords):
    """A client with the presence that was recorded; one that sent none is bound and silent."""
    found = {name: re.search(f"<{name}>(.*?)</{name}>", session["presence"]) for name in ("show", "status", "priority")}
    presence = {name: match[1] for name, match in found.items() if match}
    return await server.login(
        session["user"],
        resource=session["resource"],
        password=passwords[session["user"]],
        presence=presence if session["presence"] else None,
    )
