"""Access rules, shapers and options per host on a node that serves: each option changes what happens."""

import asyncio
import re
import subprocess
import sys
import time

import yaml

from tests.harness.client import Client, LoginFailed
from tests.harness.inbox import Got
from tests.harness.raw import SASL
from tests.harness.scene import PASSWORD, Scene, together

KIB = 1024
MECHANISMS = f"{{{SASL}}}mechanisms"


async def attempt(scene: Scene, user: str, resource: str = "balcony", host: str = "localhost") -> Got:
    """Log in up to bind, whose answer is returned."""
    scene.account(user, host)
    client = scene.raw(host)
    await client.connect_tls(scene.node.tls_port)
    await client.authenticate(user, PASSWORD)
    return await client.bind(resource)


# -- acl, access_rules and listen[].access


async def test_whom_the_access_rule_denies_may_not_bind(served):
    scene = await served(acl={"blocked": {"user": "tybalt@localhost"}})

    assert (await attempt(scene, "romeo")).type == "result"
    refused = await attempt(scene, "tybalt")

    assert (refused.type, refused.condition, refused.error_type) == ("error", "not-allowed", "cancel")
    assert "login refused by access rule jid=tybalt@localhost/balcony" in scene.node.new_log()


async def test_a_listener_has_its_own_access_rule_and_a_resource_may_count(served):
    scene = await served(
        acl={"bots": {"resource_glob": "bot-*"}, "house": {"ip": "127.0.0.0/8"}, "moon": {"ip": "192.0.2.0/24"}},
        access_rules={"no_bots": [{"deny": "moon"}, {"deny": ["bots", "house"]}, {"allow": "all"}]},
        c2s={"access": "no_bots"},
    )
    scene.account("romeo")
    client = await scene.encrypted()
    await client.authenticate("romeo", PASSWORD)

    assert (await client.bind("bot-7")).condition == "not-allowed"
    assert (await client.bind("balcony")).type == "result"


async def test_max_user_sessions_is_a_matter_of_who_it_is(served):
    scene = await served(
        acl={"admin": {"user": "nurse"}}, access_rules={"max_user_sessions": [{"infinity": "admin"}, {"1": "all"}]}
    )
    first = await scene.raw_login("romeo", "one")
    await scene.raw_login("romeo", "two")

    assert (await first.wait_for(lambda got: got.name == "error")).condition == "conflict"

    nurses = [await scene.raw_login("nurse", f"r{number}") for number in range(12)]
    await together(*nurses)


# -- shaper, shaper_rules and listen[].shaper


async def flood(client, to: str, count: int, size: int) -> None:
    body = "x" * size
    for number in range(count):
        client.send_raw(f"<message to='{to}' id='f{number}'><body>{body}</body></message>")


async def taken(sender, receiver, count: int, size: int) -> float:
    """Seconds until a flood has arrived, whole and in order, and the sender is listened to again: what is read at once
    is handled at once, and paid for afterwards."""
    began = time.monotonic()
    await flood(sender, receiver.jid, count, size)
    for number in range(count):
        assert (await receiver.next_message()).id == f"f{number}"
    await sender.sync()
    return time.monotonic() - began


async def test_who_sends_too_fast_is_slowed_down_and_loses_nothing(served):
    scene = await served(
        acl={"fast": {"user": "nurse"}},
        shaper={"slow": {"rate": "40KiB", "burst": "20KiB"}},
        shaper_rules={"c2s_shaper": [{"none": "fast"}, {"slow": "all"}]},
    )
    juliet = await scene.raw_login("juliet")
    romeo = await scene.raw_login("romeo")
    nurse = await scene.raw_login("nurse")
    mercutio = await scene.raw_login("mercutio")

    assert await taken(nurse, juliet, 50, 2 * KIB) < 1.0

    slow = asyncio.create_task(taken(romeo, juliet, 50, 2 * KIB))
    quick = await taken(mercutio, mercutio, 5, 100)  # others notice nothing
    seconds = await slow

    assert 1.9 < seconds < 6  # 100 KiB and their tags at 40 KiB/s after 20 KiB
    assert quick < 0.5


async def test_the_shaper_before_login_goes_by_the_address(served):
    scene = await served(
        acl={"house": {"ip": "127.0.0.1"}},
        shaper={"crawl": {"rate": 200, "burst": 200}},
        shaper_rules={"mine": [{"crawl": ["house", "all"]}]},
        c2s={"shaper": "mine"},
    )
    began = time.monotonic()
    await scene.raw_login("romeo")

    assert time.monotonic() - began > 0.5  # some 450 bytes of negotiation, 200 of them at once


async def test_a_slowed_client_is_not_taken_for_a_dead_one(served):
    scene = await served(
        c2s={"idle_timeout": "1s"},
        shaper={"slow": {"rate": "10KiB", "burst": "5KiB"}},
        shaper_rules={"c2s_shaper": "slow"},
    )
    romeo = await scene.raw_login("romeo")

    assert await taken(romeo, romeo, 20, KIB) > 1.4


# -- rules that modules ask


async def test_the_offline_quota_is_a_matter_of_who_it_is(served):
    scene = await served(
        acl={"admin": {"user": "nurse"}, "sink": {"user": "sink"}},
        shaper_rules={"max_user_offline_messages": [{"3": "admin"}, {"infinity": "sink"}, {"1": "all"}]},
    )
    for name in ("juliet", "nurse"):
        scene.account(name)
    romeo = await scene.raw_login("romeo")

    for user, room in (("juliet", 1), ("nurse", 3)):
        for number in range(room + 1):
            romeo.send_message(f"{user}@localhost", str(number), id=f"{user}{number}")
        error = await romeo.next_message()
        assert (error.id, error.condition) == (f"{user}{room}", "resource-constraint")
        assert await scene.stored(user) == room


async def test_who_may_register_is_a_rule_and_from_where(served):
    def request(name: str) -> str:
        return (
            f"<iq type='set' id='r'><query xmlns='jabber:iq:register'>"
            f"<username>{name}</username><password>abc</password></query></iq>"
        )

    async def answer(scene: Scene, name: str) -> Got:
        client = await scene.encrypted()
        await client.open()
        client.send_raw(request(name))
        return await client.next_stanza("iq")

    rules = {"no_bots": [{"deny": "bots"}, {"allow": "all"}], "moon": {"allow": "moon"}}
    acl = {"bots": {"user_regexp": "^bot"}, "moon": {"ip": "192.0.2.0/24"}}
    scene = await served(acl=acl, access_rules=rules, modules={"register": {"access": "no_bots"}})
    assert (await answer(scene, "bot7")).condition == "forbidden"
    assert (await answer(scene, "balthasar")).type == "result"
    scene.node.unregister("balthasar")

    scene = await served(acl=acl, access_rules=rules, modules={"register": {"ip_access": "moon"}})
    assert (await answer(scene, "balthasar")).condition == "forbidden"


# -- hosts


async def test_each_host_has_its_own_options(served, tmp_path):
    scene = await served(
        hosts=["a.localhost", "localhost"],
        acl={"staff": {"user": "nurse"}},
        host_config={
            "a.localhost": {
                "resource_conflict": "closenew",
                "auth_scram": {"hashes": ["sha512"]},
                "access_rules": {"c2s": {"allow": "staff"}},
            }
        },
        append_host_config={"a.localhost": {"disable_sasl_mechanisms": ["SCRAM-SHA-512"]}},
    )

    async def offered(host: str) -> list[str | None]:
        client = scene.raw(host)
        await client.connect_tls(scene.node.tls_port)
        found = (await client.open()).xml.find(MECHANISMS)
        return [each.text for each in found if not each.text.endswith("-PLUS")]

    assert await offered("localhost") == ["SCRAM-SHA-256", "SCRAM-SHA-1", "PLAIN"]
    assert await offered("a.localhost") == ["PLAIN"]
    assert (await attempt(scene, "nurse", host="a.localhost")).type == "result"
    assert (await attempt(scene, "nurse", host="a.localhost")).condition == "conflict"
    assert (await attempt(scene, "romeo", host="a.localhost")).condition == "not-allowed"
    assert (await attempt(scene, "romeo")).type == "result"
    assert (await attempt(scene, "romeo")).type == "result"


# -- reload_config


def rewrite(scene: Scene, **changes: object) -> None:
    scene.node.configure({**scene.node.options, **changes})


async def test_a_reload_applies_rules_and_says_what_needs_a_restart(fresh):
    scene = fresh(shaper={"slow": {"rate": "10KiB", "burst": "1KiB"}}, shaper_rules={"c2s_shaper": "none"})
    romeo = await scene.raw_login("romeo")
    assert (await attempt(scene, "tybalt")).type == "result"
    assert scene.asked("reload_config") == ""

    rewrite(
        scene,
        database={"commit_interval": "20ms"},
        loglevel="debug",
        acl={"blocked": {"user": "tybalt"}},
        shaper_rules={"c2s_shaper": "slow"},
        modules={"offline": {"max_messages": 1}, "ping": {}},
    )
    report = scene.asked("reload_config").splitlines()

    assert "applied: loglevel: info -> debug" in report
    assert "applied: acl.blocked.user: [] -> ['tybalt']" in report
    assert "applied: modules.offline.max_messages: (not set) -> 1" in report
    assert "applied: modules.roster: {} -> (not set)" in report
    assert report[-1] == "needs a restart: database.commit_interval: 10ms -> 20ms"
    assert (await attempt(scene, "tybalt")).condition == "not-allowed"
    assert await taken(romeo, romeo, 20, KIB) > 1.0  # a connection that was open before
    assert scene.asked("get_loglevel") == "debug"
    loaded = [line.split("\t")[0] for line in scene.asked("module", "list").splitlines() if "\tloaded" in line]
    assert loaded == ["offline", "ping"]
    # What waits for a restart is told each time.
    assert scene.asked("reload_config").splitlines() == report[-1:]


async def test_hosts_of_the_new_file_do_not_disturb_those_that_are_served(fresh):
    scene = fresh()
    scene.account("benvolio")

    scene.node.path.write_text(yaml.safe_dump({**scene.node.options, "hosts": ["verona.localhost"]}))
    report = scene.asked("reload_config")

    assert report == "needs a restart: hosts: ['localhost'] -> ['verona.localhost']"
    assert (await attempt(scene, "benvolio")).type == "result"


REFUSING = """
from dataclasses import dataclass
from pathlib import Path

from xmppd.module_api import Module


@dataclass(frozen=True, slots=True)
class Config:
    path: str = ""


class Refusing(Module[Config]):
    async def start(self) -> None:
        Path(self.config.path).read_text()
"""


async def test_a_reload_that_is_refused_changes_nothing(fresh, tmp_path):
    folder, good, bad = tmp_path / "site", tmp_path / "good", tmp_path / "bad.pem"
    folder.mkdir()
    (folder / "refusing.py").write_text(REFUSING)
    good.write_text("")
    bad.write_text("no certificate")
    modules = {"offline": {}, "roster": {}, "presence": {}, "ping": {}, "refusing": {"path": str(good)}}
    scene = fresh(modules=modules, module_paths=[str(folder)])
    scene.node.expects_trouble = True
    juliet = await scene.raw_login("juliet")
    before = scene.asked("module", "list")
    harmless = {"loglevel": "debug", "acl": {"blocked": {"user": "juliet"}}}

    for wrong, words in (
        ({"acl": {"x": {"usr": "y"}}}, "acl.x.usr: unknown option. Did you mean user?"),
        ({"certfiles": [str(bad)]}, str(bad)),
        ({"modules": {**modules, "offline": {"max_mesages": 1}}}, "max_mesages: unknown option"),
        ({"modules": {**modules, "offline": {"access_max_user_messages": "x"}}}, "there is no shaper rule 'x'"),
        ({"modules": {**modules, "ofline": {}}}, "modules.ofline: unknown module. Did you mean offline?"),
        (
            {"modules": {"offline": {"max_messages": 0}, "vcard": {}, "refusing": {"path": str(tmp_path / "none")}}},
            "modules.refusing: cannot be started: FileNotFoundError",
        ),
    ):
        old = scene.node.options
        rewrite(scene, **(harmless | wrong))
        answer = scene.ctl("reload_config")
        scene.node.configure(old)

        assert answer.returncode == 10
        assert "nothing was applied" in answer.stdout + answer.stderr
        assert words in answer.stdout + answer.stderr
        assert scene.asked("get_loglevel") == "info"
        assert scene.asked("module", "list") == before
        assert (await attempt(scene, "juliet", "orchard")).type == "result"

    # The modules that had been stopped do their work: juliet's roster is heard, offline messages are kept.
    await juliet.query("get", "<query xmlns='jabber:iq:roster'/>")
    scene.account("nurse")
    juliet.send_message("nurse@localhost", "Go to bed")
    assert await scene.stored("nurse") == 1


async def test_a_new_certificate_is_served_after_a_reload(fresh, tmp_path):
    scene = fresh(start=False, hosts=["localhost"])
    scene.node.start()
    before = scene.node.certificate().read_text()
    other = tmp_path / "own.pem"
    # another node's self-signed certificate for the same host
    donor = fresh()
    other.write_text(donor.node.certificate().read_text())

    rewrite(scene, host_config={"localhost": {"certfiles": [str(other)]}})
    report = scene.asked("reload_config").splitlines()

    assert "applied: the certificate of localhost has changed" in report
    assert other.read_text() != before
    scene.account("romeo")
    client = Client("romeo@localhost", PASSWORD, other)
    await client.connect(scene.node.port)
    await client.leave()
    stranger = Client("romeo@localhost", PASSWORD, scene.node.certificate())
    try:
        await asyncio.wait_for(stranger.connect(scene.node.port), 5)
    except (LoginFailed, TimeoutError):
        pass
    else:
        raise AssertionError("the old certificate is still served")
    finally:
        await stranger.close()


# -- looking at it


def run(scene: Scene, *argv: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "xmppd", "--config", str(scene.node.path), *argv],
        capture_output=True,
        text=True,
        env=scene.node.environment,
        cwd=scene.node.folder,
        timeout=30,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


async def test_check_looks_at_everything_and_starts_nothing(fresh, tmp_path):
    scene = fresh(start=False)
    code, out, err = run(scene, "--check")
    assert (code, out, err) == (0, f"{scene.node.path}: no problems found\n", "")

    rewrite(
        scene,
        certfiles=[str(tmp_path / "no.pem")],
        modules={"offline": {"access_max_user_messages": "x"}, "prsence": {}, "register": {"acess": "y"}},
    )
    code, out, err = run(scene, "--check")
    assert (code, out) == (10, "")
    for words in (
        "no.pem",
        "modules.offline.access_max_user_messages: there is no shaper rule 'x'",
        "modules.prsence: unknown module. Did you mean presence?",
        f"{scene.node.path}: modules.register.acess: unknown option. Did you mean access?",
    ):
        assert words in err
    rewrite(scene, certfiles=[], modules={}, include_config_file="more.yml")
    (scene.node.folder / "more.yml").write_text("loglevl: debug\n")
    code, out, err = run(scene, "--check")
    assert code == 10
    assert f"{scene.node.folder}/more.yml: loglevl: unknown option. Did you mean loglevel?" in err
    assert not scene.node.data_dir.exists()


async def test_the_dumped_configuration_can_be_served(fresh):
    scene = fresh(start=False, modules={"mod_offline": {"max_messages": 7}, "ping": {}})
    code, out, err = run(scene, "--dump-config")
    assert (code, err) == (0, "")
    assert re.search(rf"max_messages: 7 +# {re.escape(str(scene.node.path))}:[0-9]+\n", out)
    assert "timeout_action: " in out  # an option of ping, at its default

    scene.node.path.write_text(out)
    scene.node.start()

    assert scene.asked("module", "list").count("\tloaded") == 2
