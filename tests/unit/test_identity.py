"""The data folder: one process, one identity, whatever was killed when."""

import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from tests.harness.folders import let_in
from xmppd.errors import DataFolderInUse, XmppdError
from xmppd.identity import DataFolder, new_identity

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make other people's files")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "var"


def once(path):
    """Start and stop a node."""
    with DataFolder.open(path) as folder:
        return folder


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def in_process(code, *arguments, **options):
    """Another interpreter that runs `code`, with standard output to read."""
    return subprocess.Popen(
        [
            sys.executable,
            "-S",
            "-c",
            f"import sys\nfrom xmppd.identity import DataFolder\n{code}",
            *map(str, arguments),
        ],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        **options,
    )


HOLD = "folder = DataFolder.open(sys.argv[1]); folder.write_ready({}); print('open', flush=True); sys.stdin.read()"


def test_the_first_start_makes_everything(path):
    old = os.umask(0)
    try:
        folder = DataFolder.open(path)
    finally:
        os.umask(old)
    assert mode(path) == 0o700
    assert mode(path / ".xmppd.cookie") == 0o400
    assert {mode(path / name) for name in ("lock", "pid", "node_id", "incarnation")} == {0o600}
    assert folder.incarnation == 1
    assert uuid.UUID(folder.node_id).version == 4
    assert len(bytes.fromhex(folder.cookie)) == 32
    assert (path / ".xmppd.cookie").read_text().strip() == folder.cookie
    assert int((path / "pid").read_text()) == int((path / "lock").read_text()) == os.getpid()
    assert folder.warnings == ()
    folder.close()
    folder.close()
    assert {entry.name for entry in path.iterdir()} == {"lock", "node_id", "incarnation", ".xmppd.cookie"}


def test_who_we_are_stays_and_each_start_counts(path):
    starts = [once(path) for _ in range(3)]
    assert [folder.incarnation for folder in starts] == [1, 2, 3]
    assert len({folder.node_id for folder in starts}) == len({folder.cookie for folder in starts}) == 1


def test_two_folders_are_two_nodes(tmp_path):
    first, second = once(tmp_path / "a"), once(tmp_path / "b")
    assert first.node_id != second.node_id
    assert first.cookie != second.cookie


def test_a_second_start_is_refused_and_says_who_is_there(path):
    holder = in_process(HOLD, path)
    try:
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(DataFolderInUse) as caught:
            DataFolder.open(path)
        assert caught.value.pid == holder.pid
        assert str(holder.pid) in str(caught.value)
        assert str(path) in str(caught.value)
        assert (path / "incarnation").read_text() == "1\n"  # the second start changed nothing
        assert (path / "ready.json").exists()
    finally:
        holder.kill()
        holder.communicate()
    folder = once(path)  # killed, not stopped: the lock went with it, and so does what it left
    assert folder.incarnation == 2
    assert not (path / "ready.json").exists()


def test_a_child_does_not_keep_the_folder_of_a_dead_node(path):
    code = (
        "import subprocess; folder = DataFolder.open(sys.argv[1]);"
        "child = subprocess.Popen(['sleep', '60'], close_fds=False); print(child.pid, flush=True); sys.stdin.read()"
    )
    holder = in_process(code, path)
    child = int(holder.stdout.readline())
    try:
        holder.kill()
        holder.wait()
        assert once(path).incarnation == 2
    finally:
        os.kill(child, signal.SIGKILL)
        holder.communicate()


def test_a_start_in_the_same_process_is_refused_too(path):
    with DataFolder.open(path), pytest.raises(DataFolderInUse):
        DataFolder.open(path)


def test_a_start_that_fails_lets_go_of_the_lock(path):
    once(path)
    (path / "node_id").write_text("")
    for _ in range(2):
        with pytest.raises(XmppdError, match="holds no UUID"):
            DataFolder.open(path)


def test_ready_is_there_while_the_node_serves(path):
    with DataFolder.open(path) as folder:
        assert not (path / "ready.json").exists()
        folder.write_ready({"pid": 7, "c2s": "127.0.0.1:5222"})
        folder.write_ready({"pid": 8, "hosts": ["localhost"]})
        assert json.loads((path / "ready.json").read_text()) == {"pid": 8, "hosts": ["localhost"]}
        folder.remove_ready()
        folder.remove_ready()
        assert not (path / "ready.json").exists()
        folder.write_ready({})
    assert not (path / "ready.json").exists()


@pytest.mark.parametrize("loose", [0o600, 0o440, 0o404, 0o644, 0o401, 0o420])
def test_a_cookie_others_could_read_is_refused_with_the_fix(path, loose):
    cookie = once(path).cookie
    (path / ".xmppd.cookie").chmod(loose)
    with pytest.raises(XmppdError, match=f"chmod 400 {path}/.xmppd.cookie"):
        DataFolder.open(path)
    (path / ".xmppd.cookie").chmod(0o400)
    assert once(path).cookie == cookie


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "20 to 1024 characters, not 0"),
        ("\n", "not 0"),
        ("x" * 19, "not 19"),
        ("x" * 1025, "not 1025"),
        ("two words in a cookie file", "without blanks"),
        ("ä" * 20, "printable ASCII"),
        ("x" * 20 + "\0", "printable ASCII"),
    ],
)
def test_a_cookie_that_is_none_is_refused(path, content, complaint):
    path.mkdir(mode=0o700)
    (path / ".xmppd.cookie").write_text(content)
    (path / ".xmppd.cookie").chmod(0o400)
    with pytest.raises(XmppdError, match=complaint) as caught:
        DataFolder.open(path)
    assert not content.strip() or content.strip() not in str(caught.value)


def test_a_cookie_copied_from_another_node_is_taken(path):
    path.mkdir(mode=0o700)
    (path / ".xmppd.cookie").write_text("ABCDEFGHIJKLMNOPQRST\n")
    (path / ".xmppd.cookie").chmod(0o400)
    assert once(path).cookie == "ABCDEFGHIJKLMNOPQRST"


def test_a_cookie_may_be_a_link_to_a_mounted_secret(path, tmp_path):
    path.mkdir(mode=0o700)
    secret = tmp_path / "secret"
    (path / ".xmppd.cookie").symlink_to(secret)
    with pytest.raises(XmppdError, match="No such file"):  # and no new one in its place
        DataFolder.open(path)
    secret.write_text("x" * 40)
    secret.chmod(0o444)
    with pytest.raises(XmppdError, match="chmod 400"):
        DataFolder.open(path)
    secret.chmod(0o400)
    assert once(path).cookie == "x" * 40


@pytest.mark.parametrize("content", ["", "zero", "-1", "1.5", "9" * 30, "٣", "\udcff"])
def test_a_damaged_incarnation_is_named(path, content):
    once(path)
    (path / "incarnation").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(XmppdError, match=f"{path}/incarnation holds no number"):
        DataFolder.open(path)


def test_a_lost_incarnation_does_not_begin_again(path):
    once(path)
    (path / "incarnation").unlink()
    with pytest.raises(XmppdError, match="incarnation is missing"):
        DataFolder.open(path)
    (path / "incarnation").write_text("1700000000")
    assert once(path).incarnation == 1700000001


@pytest.mark.parametrize("name", ["incarnation", "node_id", ".xmppd.cookie", "pid"])
def test_what_a_killed_start_left_is_no_obstacle(path, name):
    path.mkdir(mode=0o700)
    (path / f"{name}.new").write_text("half of")
    (path / f"{name}.new").chmod(0o400)
    folder = once(path)
    assert folder.incarnation == 1
    assert not list(path.glob("*.new"))
    assert not list(path.glob(".*.new"))


DEADLY = """
import os
left = int(sys.argv[2])
def deadly(name):
    real = getattr(os, name)
    def call(*args, **options):
        global left
        left -= 1
        if not left:
            os.kill(os.getpid(), 9)
        return real(*args, **options)
    setattr(os, name, call)
for name in ('open', 'fsync', 'replace', 'link', 'fchmod', 'ftruncate', 'write', 'mkdir', 'close', 'unlink'):
    deadly(name)
print(DataFolder.open(sys.argv[1]).incarnation)
"""


def killed_at(step, path):
    """Start a node and kill it at its Nth system call that makes something; False if it came through."""
    process = in_process(DEADLY, path, step)
    _, err = process.communicate(timeout=30)
    assert process.returncode in (0, -signal.SIGKILL), err
    return process.returncode != 0


@pytest.mark.slow
def test_a_first_start_killed_at_any_moment_leaves_no_half_made_file(tmp_path):
    step = 1
    while killed_at(step, path := tmp_path / str(step)):
        assert once(path).incarnation in (1, 2)
        assert {entry.name for entry in path.iterdir()} == {"lock", "node_id", "incarnation", ".xmppd.cookie"}
        step += 1
    assert step > 30


@pytest.mark.slow
def test_a_later_start_killed_at_any_moment_uses_no_incarnation_twice(path):
    first = last = once(path)
    step = 1
    while killed_at(step, path):
        before, last = last, once(path)
        assert last.incarnation - before.incarnation in (1, 2)
        assert (last.node_id, last.cookie) == (first.node_id, first.cookie)
        step += 1
    assert step > 15


def test_a_full_disk_is_said_in_words(path):
    def limit():  # no file may grow past 0 bytes: the write fails as it does on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

    code = """
from xmppd.errors import XmppdError
try:
    DataFolder.open(sys.argv[1])
except XmppdError as exc:
    print(exc)
"""
    path.mkdir(mode=0o700)
    process = in_process(code, path, preexec_fn=limit)
    out, err = process.communicate(timeout=30)
    assert not err
    assert out.startswith(f"{path}/lock: cannot lock this file: File too large")
    assert once(path).incarnation == 1


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(XmppdError, match=r"file/var: cannot make this folder: File exists"):
        DataFolder.open(tmp_path / "file/var")
    with pytest.raises(XmppdError, match="is no folder"):
        DataFolder.open(tmp_path / "file")
    with pytest.raises(XmppdError, match="cannot make this folder"):
        DataFolder.open("/proc/xmppd")


def test_a_folder_others_can_write_to_is_refused(path):
    once(path)
    path.chmod(0o770)
    with pytest.raises(XmppdError, match=f"chmod go-w {path}"):
        DataFolder.open(path)
    path.chmod(0o755)
    (warning,) = once(path).warnings
    assert f"chmod go-rx {path}" in warning


def test_a_link_of_our_own_to_the_folder_is_fine(path, tmp_path):
    first = once(path)
    (tmp_path / "link").symlink_to(path)
    assert once(tmp_path / "link").node_id == first.node_id
    with DataFolder.open(path), pytest.raises(DataFolderInUse):
        DataFolder.open(tmp_path / "link")


def test_a_link_in_place_of_the_lock_is_not_followed(path, tmp_path):
    path.mkdir(mode=0o700)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (path / "lock").symlink_to(victim)
    with pytest.raises(XmppdError, match="lock"):
        DataFolder.open(path)
    assert victim.read_text() == "precious"


@as_root
def test_other_peoples_folders(path, tmp_path):
    once(path)
    os.chown(path, NOBODY, NOBODY)
    (warning,) = once(path).warnings  # root may, as in a container, but hears of it
    assert f"belongs to user {NOBODY}" in warning

    (tmp_path / "link").symlink_to(path)
    os.lchown(tmp_path / "link", NOBODY, NOBODY)
    with pytest.raises(XmppdError, match="link that belongs to another user"):
        DataFolder.open(tmp_path / "link")

    os.chown(path, 0, 0)
    let_in(tmp_path)
    code = """
import os
os.setuid(65534)
from xmppd.errors import XmppdError
try:
    DataFolder.open(sys.argv[1])
except XmppdError as exc:
    print(exc)
"""
    out, err = in_process(code, path).communicate(timeout=30)
    assert not err
    assert "belongs to another user (0); start xmppd as that user, or: chown -R 65534" in out


@as_root
def test_another_users_cookie(path):
    once(path)
    os.chown(path / ".xmppd.cookie", NOBODY, NOBODY)
    with pytest.raises(XmppdError, match=f"chown 0 {path}/.xmppd.cookie"):
        DataFolder.open(path)


def test_the_cookie_is_replaced_and_what_else_is_accepted_survives_a_start(tmp_path):
    with DataFolder.open(tmp_path / "var") as folder:
        old = folder.cookie
        folder.write_cookies("a-new-cookie-of-thirty-characters", [old])

    with DataFolder.open(tmp_path / "var") as folder:
        assert (folder.cookie, folder.also_trusted) == ("a-new-cookie-of-thirty-characters", (old,))
        assert stat.S_IMODE((folder.path / ".xmppd.cookie").stat().st_mode) == 0o400
        assert stat.S_IMODE((folder.path / ".xmppd.cookie.also").stat().st_mode) == 0o400
        folder.write_cookies("a-new-cookie-of-thirty-characters")
        assert not (folder.path / ".xmppd.cookie.also").exists()


def test_what_cannot_be_a_cookie_changes_nothing(tmp_path):
    with DataFolder.open(tmp_path / "var") as folder:
        before = folder.cookie

        for wrong in ("short", "a cookie with blanks, twenty", "x" * 2000):
            with pytest.raises(XmppdError, match="a cookie must hold"):
                folder.write_cookies(wrong)

        assert folder.cookie == before == (folder.path / ".xmppd.cookie").read_text().strip()


def test_a_copied_folder_becomes_a_new_node_and_keeps_its_cookie(tmp_path):
    with DataFolder.open(tmp_path / "var") as folder:
        before = (folder.node_id, folder.cookie)
        folder.write_members("members")

    assert new_identity(tmp_path / "var")[0] == before[0]

    with DataFolder.open(tmp_path / "var") as folder:
        assert folder.node_id != before[0]
        assert folder.cookie == before[1]
        assert folder.read_members() is None


def test_a_copy_of_a_folder_is_another_place(tmp_path):
    with DataFolder.open(tmp_path / "var") as folder:
        first = folder.place
        assert folder.place == first
    shutil.copytree(tmp_path / "var", tmp_path / "copy")

    with DataFolder.open(tmp_path / "copy") as copy:
        assert copy.place != first


def test_a_folder_from_a_backup_starts_behind_what_others_have_seen(tmp_path):
    with DataFolder.open(tmp_path / "var") as folder:
        assert folder.advance(41) == 42
        assert folder.advance(3) == 42

    with DataFolder.open(tmp_path / "var") as folder:
        assert folder.incarnation == 43
