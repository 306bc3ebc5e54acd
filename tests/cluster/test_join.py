"""Joining and leaving with real processes that share one database."""

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.harness.cluster import ClusterNode, free_ports, until
from tests.harness.scene import Scene
from xmppd.cluster.membership import Copy

ALREADY_JOINED, UNREACHABLE, WRONG_COOKIE, OTHER_VERSION, OTHER_HOSTS, SELF = 17, 18, 19, 20, 21, 22
NODE_LOCAL_DATABASE = 23
OTHER_DATABASE, REMOVED, IN_USE, NO_SUCH_NODE, NOT_CONVERGED = 24, 25, 16, 27, 26


def members(node: ClusterNode) -> list[str]:
    return sorted(node.asked("list_cluster").splitlines())


def refused(node: ClusterNode, code: int, *argv: str) -> str:
    """What a command that must be refused with this code prints."""
    done = node.ctl(*argv)
    assert done.returncode == code, f"{argv}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def failing(node: ClusterNode, name: str) -> list[str]:
    """The checks of `test_node` that fail."""
    done = node.ctl("test_node", name)
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == ["name", "tcp", "cookie", "version", "clock", "hosts", "database"]
    found = [row[0] for row in rows if row[1] != "ok"]
    assert done.returncode == (1 if found else 0), done.stdout
    return found


def listens(node: ClusterNode) -> bool:
    """Whether its cluster port is open."""
    wanted = f":{node.port_of_cluster:04X}"
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any(line[1].endswith(wanted) and line[3] == "0A" for line in lines)


@pytest.mark.long
async def test_a_node_that_never_joined_opens_no_port_and_runs_no_engine(real_cluster):
    cluster = real_cluster(1)

    assert not listens(cluster[0])
    assert not (cluster[0].data_dir / "nats").exists()
    assert members(cluster[0]) == ["xmppd@node01"]
    assert cluster[0].ctl("cluster_status").returncode == 0


async def test_joining_needs_no_command_on_the_other_node_and_cuts_off_no_client(real_cluster):
    cluster = real_cluster(2, join=False)
    first, second = Scene(cluster[0]), Scene(cluster[1])
    romeo = await first.login("romeo")
    juliet = await second.login("juliet")

    done = cluster[1].ctl("join_cluster", "xmppd@node01")

    assert done.returncode == 0, done.stdout + done.stderr
    assert "asking xmppd@node01 through the database to open its cluster port" in done.stderr
    assert members(cluster[0]) == members(cluster[1]) == ["xmppd@node01", "xmppd@node02"]
    romeo.send_message("juliet@localhost", "With love's light wings")
    assert (await juliet.next_message()).body == "With love's light wings"
    for scene in (first, second):
        await scene.leave()
    for scene in (first, second):
        await scene.end()


@pytest.mark.long
async def test_the_command_returns_when_the_tables_agree(real_cluster):
    cluster = real_cluster(2, join=False)
    scene = Scene(cluster[0])
    await scene.login("romeo")

    cluster[1].asked("join_cluster", "xmppd@node01")

    assert cluster[1].asked("connected_users_number") == "1"
    assert cluster[1].ctl("cluster_status").returncode == 0
    status = json.loads(
        cluster[1].asked("--json", "cluster_status") if False else cluster[1].ctl("--json", "cluster_status").stdout
    )
    assert status["converged"] == "yes"
    assert {row["owner"] for row in status["tables"]} == {"xmppd@node01", "xmppd@node02"}
    assert [
        row["rows"] for row in status["tables"] if row["table"] == "session" and row["owner"] == "xmppd@node01"
    ] == [1, 1]
    await scene.end()


async def test_several_nodes_join_at_once(real_cluster):
    cluster = real_cluster(3, join=False)

    with ThreadPoolExecutor() as pool:
        done = list(pool.map(lambda node: node.ctl("join_cluster", "xmppd@node01"), cluster.nodes[1:]))

    assert [each.returncode for each in done] == [0, 0], done
    cluster.converged()


@pytest.mark.long
async def test_two_nodes_join_each_other_at_once(real_cluster):
    cluster = real_cluster(2, join=False)
    pairs = [(cluster[0], "xmppd@node02"), (cluster[1], "xmppd@node01")]

    with ThreadPoolExecutor() as pool:
        done = list(pool.map(lambda pair: pair[0].ctl("join_cluster", pair[1]), pairs))

    assert {each.returncode for each in done} <= {0, ALREADY_JOINED}, done
    cluster.converged()


@pytest.mark.long
async def test_the_other_side_may_ask_for_the_join(real_cluster):
    cluster = real_cluster(2, join=False)

    cluster[0].asked("join_cluster_here", "xmppd@node02")

    cluster.converged()


async def test_what_does_not_fit_is_refused_with_its_own_words_and_code(real_cluster):
    cluster = real_cluster(2, start=False)
    stranger, elsewhere = cluster.add(), cluster.add(hosts=["localhost", "example.net"])
    stranger.set_cookie("another-cookie-of-more-than-twenty-characters")
    alone = cluster.add(name="xmppd@alone", database=f"sqlite:///{cluster.folder}/alone.db")
    cluster.start()
    cluster[1].asked("join_cluster", "xmppd@node01")
    alone.options["cluster"]["hosts"]["node01"] = f"127.0.0.1:{cluster[0].port_of_cluster}"
    alone.configure(alone.options)
    alone.restart()
    (nobody,) = free_ports(1)
    before = {node.name: (node.data_dir / "members.json").read_text() for node in cluster}

    assert "is this node itself" in refused(elsewhere, SELF, "join_cluster", "xmppd@node04")
    text = refused(elsewhere, UNREACHABLE, "join_cluster", f"xmppd@127.0.0.1:{nobody}")
    assert "no node of this name" in text
    assert "cluster.hosts" in refused(elsewhere, UNREACHABLE, "join_cluster", "xmppd@there.is.no.such.host.invalid")
    assert "share its database" in refused(alone, UNREACHABLE, "join_cluster", "xmppd@node03")
    assert ".xmppd.cookie" in refused(stranger, WRONG_COOKIE, "join_cluster", "xmppd@node01")
    assert "only here: example.net" in refused(elsewhere, OTHER_HOSTS, "join_cluster", "xmppd@node01")
    assert "another database" in refused(alone, OTHER_DATABASE, "join_cluster", "xmppd@node01")

    assert {node.name: (node.data_dir / "members.json").read_text() for node in cluster} == before
    assert failing(elsewhere, "xmppd@node01") == ["hosts"]
    assert failing(alone, "xmppd@node01") == ["database"]
    assert failing(elsewhere, "xmppd@there.is.no.such.host.invalid")[0] == "name"
    assert failing(elsewhere, f"xmppd@127.0.0.1:{nobody}")[0] == "tcp"
    assert failing(stranger, "xmppd@node01")[0] == "cookie"
    given = stranger.ctl("cookie", "set", "-", stdin=cluster[0].asked("cookie", "show") + "\n")
    assert given.returncode == 0, given.stdout
    stranger.asked("join_cluster", "xmppd@node01")
    cluster.converged(*cluster.nodes[:3])


@pytest.mark.long
@pytest.mark.skipif(os.geteuid() != 0, reason="another machine is a mount namespace, which takes root")
async def test_an_sqlite_file_is_not_shared_with_another_machine(real_cluster):
    cluster = real_cluster(2, start=False)
    boot_id = cluster.folder / "boot_id"
    boot_id.write_text("6f0c3c0e-0000-4000-8000-000000000000\n")
    cluster[0].start()
    script = 'mount --bind "$0" /proc/sys/kernel/random/boot_id && exec "$@"'
    cluster[1].start("unshare", "--mount", "sh", "-c", script, str(boot_id))

    assert "SQLite file" in refused(cluster[1], NODE_LOCAL_DATABASE, "join_cluster", "xmppd@node01")
    assert failing(cluster[1], "xmppd@node01") == ["database"]
    assert members(cluster[0]) == ["xmppd@node01"]


@pytest.mark.long
async def test_a_node_of_a_distant_version_is_refused(real_cluster):
    cluster = real_cluster(2, start=False)
    newer = cluster.folder / "newer"  # what a release with a protocol two steps on says of itself
    newer.mkdir()
    (newer / "sitecustomize.py").write_text("import xmppd.clustering\n\nxmppd.clustering.PROTOCOL += 2\n")
    cluster[1].environment["PYTHONPATH"] = f"{newer}:{cluster[1].environment['PYTHONPATH']}"
    cluster.start()

    assert "upgrade the older one" in refused(cluster[1], OTHER_VERSION, "join_cluster", "xmppd@node01")
    assert "upgrade the older one" in refused(cluster[0], OTHER_VERSION, "join_cluster", "xmppd@node02")
    assert failing(cluster[1], "xmppd@node01") == ["version"]
    assert members(cluster[0]) == ["xmppd@node01"]


@pytest.mark.long
async def test_members_see_each_other_and_do_not_join_twice(real_cluster):
    cluster = real_cluster(2)

    assert "already joined that running node" in refused(cluster[1], ALREADY_JOINED, "join_cluster", "xmppd@node01")
    assert failing(cluster[1], "xmppd@node01") == []
    assert cluster[0].asked("nodes") == "xmppd@node02"
    assert cluster[0].asked("nodes", "--hidden") == ""
    assert cluster[0].asked("ping", "xmppd@node02") == "pong"
    cluster[0].asked("disconnect", "xmppd@node02", "--for", "2")
    assert cluster[0].asked("nodes") == ""
    assert cluster[0].asked("nodes", "--known") == "xmppd@node02"
    assert refused(cluster[0], NOT_CONVERGED, "cluster_status")
    cluster.converged()
    cluster[1].stop()
    until(lambda: cluster[0].asked("nodes") == "", "xmppd@node02 is still up")
    assert refused(cluster[0], 1, "ping", "xmppd@node02") == "pang\n"
    assert failing(cluster[0], "xmppd@node02")[0] == "tcp"
    assert "already joined that known node" in refused(cluster[0], ALREADY_JOINED, "join_cluster", "xmppd@node02")


@pytest.mark.parametrize("order", [(0, 1), pytest.param((1, 0), marks=pytest.mark.long)])
async def test_nodes_come_back_in_any_order_without_a_command(real_cluster, order):
    cluster = real_cluster(2)
    for node in cluster:
        node.stop()

    for place in order:
        began = time.monotonic()
        cluster[place].start()
        assert time.monotonic() - began < 15

    cluster.converged()


@pytest.mark.long
async def test_a_missing_peer_does_not_delay_a_start(real_cluster):
    cluster = real_cluster(2)
    for node in cluster:
        node.kill()

    cluster[0].start()

    scene = Scene(cluster[0])
    await scene.login("romeo")
    await scene.end()


@pytest.mark.long
async def test_a_killed_node_comes_back(real_cluster):
    cluster = real_cluster(2)
    cluster[1].kill()
    until(lambda: members(cluster[0]) == ["xmppd@node01"], "xmppd@node02 is still up")

    cluster[1].start()

    cluster.converged()


async def test_a_removed_node_stops_and_stays_removed_until_it_is_a_new_one(real_cluster):
    cluster = real_cluster(3)

    cluster[0].asked("leave_cluster", "xmppd@node03")

    assert cluster[2].wait() == 0
    assert "removed from the cluster by=xmppd@node01" in cluster[2].log
    cluster.converged(cluster[0], cluster[1])
    again = cluster[2].second_start()
    assert again.returncode == REMOVED
    assert "removed from the cluster by xmppd@node01 at 20" in again.stderr
    assert "--new-identity" in again.stderr
    assert refused(cluster[0], NO_SUCH_NODE, "leave_cluster", "xmppd@node03")

    old = cluster[2].node_id
    assert cluster[2].main("--new-identity").returncode == 0
    assert cluster[2].node_id != old
    cluster[2].start()
    cluster[2].asked("join_cluster", "xmppd@node01")
    cluster.converged()


@pytest.mark.long
async def test_a_node_that_does_not_run_can_be_removed_and_learns_it(real_cluster):
    cluster = real_cluster(2)
    cluster[1].kill()

    cluster[0].asked("leave_cluster", "xmppd@node02")

    again = cluster[1].second_start()
    assert again.returncode == REMOVED, again.stderr
    cluster.converged(cluster[0])


@pytest.mark.long
async def test_a_node_can_remove_itself(real_cluster):
    cluster = real_cluster(2)

    cluster[1].asked("leave_cluster", "xmppd@node02")

    assert cluster[1].wait() == 0
    cluster.converged(cluster[0])


async def test_a_copied_data_folder_is_refused_while_the_first_one_serves(real_cluster):
    cluster = real_cluster(2)

    copy = cluster.copy_of(cluster[1])
    done = copy.second_start()

    assert done.returncode == IN_USE, done.stderr
    assert "two nodes claim one node id: xmppd@node02" in done.stderr
    cluster.converged(cluster[0], cluster[1])
    assert copy.main("--new-identity").returncode == 0
    copy.configure({**copy.options, "node": "xmppd@node03"})
    copy.name = "xmppd@node03"
    copy.start()
    copy.asked("join_cluster", "xmppd@node01")
    cluster.converged()


@pytest.mark.long
async def test_another_database_than_the_clusters_is_not_served_from(real_cluster):
    cluster = real_cluster(2)
    cluster[1].stop()
    cluster[1].configure({**cluster[1].options, "database": {"url": f"sqlite:///{cluster.folder}/other.db"}})

    done = cluster[1].second_start()

    assert done.returncode == OTHER_DATABASE, done.stderr
    assert "belongs to the cluster" in done.stderr


@pytest.mark.long
async def test_a_damaged_copy_of_the_members_is_made_anew_from_the_database(real_cluster):
    cluster = real_cluster(2)
    cluster[1].stop()
    file = cluster[1].data_dir / "members.json"
    file.write_text(file.read_text()[:100])

    cluster[1].start()

    cluster.converged()
    assert Copy.parse(file.read_text()).state == "member"
    assert "copy of the members is damaged" in cluster[1].log


@pytest.mark.long
async def test_a_renamed_node_is_the_same_member(real_cluster):
    cluster = real_cluster(2)
    cluster[1].stop()
    cluster[1].configure({**cluster[1].options, "node": "xmppd@node09"})
    cluster[1].name = "xmppd@node09"

    cluster[1].start()

    cluster.converged()
    assert cluster[0].asked("nodes", "--known") == "xmppd@node09"


@pytest.mark.long
async def test_two_members_cannot_have_one_name(real_cluster):
    cluster = real_cluster(2)
    cluster[1].stop()
    cluster[1].configure({**cluster[1].options, "node": "xmppd@node01"})

    done = cluster[1].second_start()

    assert done.returncode == 28, done.stderr


@pytest.mark.long
async def test_a_stopped_process_that_was_suspended_finds_its_place_again(real_cluster):
    cluster = real_cluster(2)
    process = cluster[1].process
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    until(lambda: members(cluster[0]) == ["xmppd@node01"], "xmppd@node02 is still up")

    process.send_signal(signal.SIGCONT)

    cluster.converged()


@pytest.mark.long
async def test_the_cookie_is_changed_without_a_link_going_down(real_cluster):
    cluster = real_cluster(3)
    old = cluster[0].cookie

    cluster[1].asked("cookie", "rotate")

    new = {node.cookie for node in cluster}
    assert len(new) == 1
    assert new != {old}
    assert not [node.name for node in cluster if "node down" in node.log]
    for node in cluster:
        assert not (node.data_dir / ".xmppd.cookie.also").exists()
        node.stop()
        node.start()
    cluster.converged()


@pytest.mark.long
async def test_the_cookie_is_not_taken_from_the_command_line(real_cluster):
    cluster = real_cluster(1)

    text = refused(cluster[0], 2, "cookie", "set", "a-cookie-that-everybody-sees-in-ps")

    assert "standard input" in text or "never given on the command line" in text
    assert cluster[0].cookie == cluster.cookie


@pytest.mark.long
async def test_a_member_that_is_down_stops_a_change_of_the_cookie(real_cluster):
    cluster = real_cluster(2)
    cluster[1].kill()
    until(lambda: members(cluster[0]) == ["xmppd@node01"], "xmppd@node02 is still up")

    assert "not up: xmppd@node02" in refused(cluster[0], 1, "cookie", "rotate")
    assert cluster[0].cookie == cluster[1].cookie


def test_the_copy_of_the_members_is_read_back_as_it_was_written(tmp_path):
    copy = Copy(b"c" * 16, b"d" * 16, "member")

    assert Copy.parse(copy.text()) == copy
    with pytest.raises(ValueError, match="checksum"):
        Copy.parse(copy.text().replace("member", "single", 1))


@pytest.mark.long
@pytest.mark.mariadb
async def test_members_start_and_find_each_other_without_the_database(real_cluster, databases, tmp_path):
    url = databases.empty("mariadb", tmp_path)
    cluster = real_cluster(2, database=url)
    server = databases._server()
    for node in cluster:
        node.stop()
    server.stop()

    cluster.start()

    assert "serving without the database" in cluster[0].log
    until(lambda: members(cluster[0]) == members(cluster[1]) == ["xmppd@node01", "xmppd@node02"], "no link")
    server.start()
    until(lambda: all("database is back" in node.log for node in cluster), "the database is not found again")
    scene = Scene(cluster[0])
    await scene.login("romeo")
    await scene.end()
    cluster.converged()
    cluster.end()
    databases.drop(url)
