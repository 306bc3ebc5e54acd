"""Every command that ejabberdctl 23.01 was recorded with, on the real server (tests/golden/README.md)."""

import re

import pytest

from tests.golden import compare

FILES = compare.files()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file["command"])
async def test_xmppctl_answers_as_ejabberdctl_does(server, file):
    given = file["given"]
    for user, password in given["accounts"].items():
        done = await server.ctl("register", user, "localhost", password)
        assert done.returncode == 0, done
    for argv in given["before"]:
        done = await server.ctl(*argv)
        assert done.returncode == 0, done
    clients = [await online(server, session, given["accounts"]) for session in given["online"]]
    node = (await server.ctl("status")).stdout.split()[2]
    version = re.search(r"xmppd (\S+) is running", (await server.ctl("status")).stdout)[1]

    for case in file["cases"]:
        done = await server.ctl(*case["argv"], stdin=case.get("stdin"))
        compare.check(file["command"], case, done.stdout, done.returncode, node=node, version=version)

    for client in clients:
        await client.close()


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
