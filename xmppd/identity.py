"""The data folder: who this node is, and that no other process serves from here.

    lock             held (flock) while the node runs, with its process id inside
    pid              the process id, for scripts
    node_id          the node's UUID, for the life of its data
    incarnation      how often it has been started: what an earlier run left behind can be told apart
    .xmppd.cookie    the cluster's secret
    .xmppd.cookie.also   others that are accepted while the cookie is changed on all nodes
    members.json     a copy of the cluster's members, for a start without the database
    ready.json       there while the node serves: how to reach it

What identifies the node is on disk before it is used, and survives a process killed or a machine stopped at any moment.
"""

import errno
import fcntl
import hashlib
import json
import os
import secrets
import socket
import stat
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from xmppd.errors import DataFolderInUse, XmppdError

COOKIE: Final = ".xmppd.cookie"
ALSO: Final = ".xmppd.cookie.also"
MEMBERS: Final = "members.json"
_WRITTEN: Final = ("incarnation", "node_id", COOKIE, ALSO, MEMBERS, "pid", "ready.json")
MIN_COOKIE: Final = 20  # characters; ours has 64, people copy shorter ones
MAX_COOKIE: Final = 1024
MAX_INCARNATION: Final = 2**62  # fits a signed column; nobody starts that often

_REMEDIES: Final = {
    errno.ENOSPC: "free some space on its disk",
    errno.EDQUOT: "the disk quota of this user is used up",
    errno.EROFS: "its file system is mounted read-only",
    errno.EACCES: "give it to the user that runs xmppd",
    errno.EPERM: "give it to the user that runs xmppd",
    errno.ENOLCK: "this file system has no locks; put data_dir on a local disk",
}


class DataFolder:
    """An opened data folder; get one with `open`. Close it last of all: until then nobody else can start here."""

    def __init__(
        self, path: Path, lock: int, incarnation: int, node_id: str, cookies: tuple[str, ...], warnings: list[str]
    ) -> None:
        self.path = path
        self.incarnation = incarnation
        self.node_id = node_id
        self.cookie, *others = cookies
        self.also_trusted = tuple(others)  # cookies that are accepted as well
        self.warnings = tuple(warnings)  # for the log, once there is one
        self._lock: int | None = lock

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Create the folder if needed, lock it, find out who we are.

        Raises `DataFolderInUse`; `XmppdError` naming file and remedy for anything else.
        """
        folder = Path(path).absolute()
        warnings = _prepare(folder)
        lock = _lock(folder)
        try:
            for left in ("ready.json", *(f"{name}.new" for name in _WRITTEN)):  # by a run that was killed
                _remove(folder / left)
            incarnation = _next_incarnation(folder)
            node_id = _node_id(folder)
            cookies = (_cookie(folder), *_also(folder))
            _replace(folder / "pid", f"{os.getpid()}\n")
        except BaseException:
            os.close(lock)
            raise
        return cls(folder, lock, incarnation, node_id, cookies, warnings)

    def write_ready(self, info: Mapping[str, Any]) -> None:
        """Tell scripts that the node serves, and how to reach it; whole at once."""
        _replace(self.path / "ready.json", json.dumps(dict(info)) + "\n")

    def remove_ready(self) -> None:
        """The node is about to stop serving. Without effect if it is not there."""
        _remove(self.path / "ready.json")

    def advance(self, beyond: int) -> int:
        """The incarnation of this run is larger than `beyond` from now on: the folder came from a backup, and the
        cluster has seen later runs."""
        if self.incarnation <= beyond:
            _replace(self.path / "incarnation", f"{beyond + 1}\n")
            self.incarnation = beyond + 1
        return self.incarnation

    def write_cookies(self, cookie: str, also_trusted: Iterable[str] = ()) -> None:
        """Keep another cookie, and others that are to be accepted as well. XmppdError: one that cannot be a cookie."""
        others = tuple(other for other in dict.fromkeys(also_trusted) if other != cookie)
        for each in (cookie, *others):
            check_cookie(each)
        # in this order a start in between accepts one more than it must, never one less
        known = dict.fromkeys((*others, self.cookie, *self.also_trusted))
        _replace(self.path / ALSO, "".join(f"{each}\n" for each in known), 0o400)
        _replace(self.path / COOKIE, f"{cookie}\n", 0o400)
        if others:
            _replace(self.path / ALSO, "".join(f"{each}\n" for each in others), 0o400)
        else:
            _remove(self.path / ALSO)
        self.cookie, self.also_trusted = cookie, others

    def read_members(self) -> str | None:
        """What `write_members` wrote last; None if there is nothing, or nothing that can be read."""
        try:
            return (self.path / MEMBERS).read_text()
        except (OSError, UnicodeDecodeError):
            return None

    def write_members(self, text: str) -> None:
        """Keep a copy of the cluster's members; whole at once."""
        _replace(self.path / MEMBERS, text)

    @property
    def place(self) -> bytes:
        """32 bytes that tell this folder on this running machine from a copy of it elsewhere."""
        about = self.path.stat()
        words = f"{_boot_id()} {socket.gethostname()} {about.st_dev} {about.st_ino}"
        return hashlib.sha256(words.encode()).digest()

    def close(self) -> None:
        """Let the next one in. The file `lock` stays: removing it would let two processes lock two files."""
        if self._lock is None:
            return
        lock, self._lock = self._lock, None
        try:
            for name in ("ready.json", "pid"):
                _remove(self.path / name)
        finally:
            os.close(lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def new_identity(path: str | Path) -> tuple[str, str]:
    """Make a copied data folder that of a new node: its old and its new node id come back.

    The cookie stays, and so does what the node keeps for its clients. Raises as `DataFolder.open`.
    """
    folder = DataFolder.open(path)
    try:
        _remove(folder.path / MEMBERS)  # first: without it the old id is merely a node that asks its database
        made = str(uuid.uuid4())
        _replace(folder.path / "node_id", f"{made}\n")
        return folder.node_id, made
    finally:
        folder.close()


def machine() -> bytes:
    """16 bytes that all processes of one running machine share: those may share an SQLite file."""
    return hashlib.sha256(_boot_id().encode()).digest()[:16]


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _prepare(folder: Path) -> list[str]:
    """Make the folder, or look whether the one that is there can be trusted; what deserves a warning."""
    with _named(folder, "make this folder"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            pass
        else:
            _sync(folder.parent)
        link, about = folder.lstat(), folder.stat()
    ours = os.geteuid()
    if not stat.S_ISDIR(about.st_mode):
        raise XmppdError(f"{folder} is no folder; move it away, or set data_dir to another path")
    if stat.S_ISLNK(link.st_mode) and link.st_uid not in (ours, 0):
        raise XmppdError(f"{folder} is a link that belongs to another user ({link.st_uid}); set data_dir to its target")
    if about.st_uid != ours and ours != 0:
        raise XmppdError(
            f"{folder} belongs to another user ({about.st_uid}); start xmppd as that user, or: chown -R {ours} {folder}"
        )
    if about.st_mode & 0o022:
        raise XmppdError(f"other users can write to {folder}; chmod go-w {folder}")
    warnings = []
    if about.st_uid != ours:
        warnings.append(
            f"{folder} belongs to user {about.st_uid}, but xmppd runs as root: that user cannot run it later"
        )
    if about.st_mode & 0o055:
        warnings.append(f"other users can read {folder}; chmod go-rx {folder}")
    return warnings


def _lock(folder: Path) -> int:
    """The descriptor that holds the lock. No child inherits it, or it would keep the folder when we are gone."""
    path = folder / "lock"
    with _named(path, "lock this file"):
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(lock, 0)
            os.write(lock, f"{os.getpid()}\n".encode())
        except BlockingIOError:
            holder = os.pread(lock, 32, 0).strip()
            os.close(lock)
            raise DataFolderInUse(str(folder), int(holder) if holder.isdigit() else None) from None
        except BaseException:
            os.close(lock)
            raise
    return lock


def _next_incarnation(folder: Path) -> int:
    path = folder / "incarnation"
    text = _read(path)
    if text is None and (folder / "node_id").exists():
        # starting at 1 again would make this run look like an old one to the other nodes
        raise XmppdError(
            f"{path} is missing, but node_id is there: restore it, or write a number into it that is certainly "
            "larger than the last: date +%s > incarnation"
        )
    last = text.strip() if text is not None else "0"
    if not (last.isascii() and last.isdigit() and len(last) < 20 and int(last) < MAX_INCARNATION):
        raise XmppdError(f"{path} holds no number: restore it, or write a larger one than the last: date +%s")
    _replace(path, f"{int(last) + 1}\n")
    return int(last) + 1


def _node_id(folder: Path) -> str:
    path = folder / "node_id"
    text = _read(path)
    if text is None:
        text = _create(path, f"{uuid.uuid4()}\n", 0o600)
    try:
        return str(uuid.UUID(text.strip()))
    except ValueError:
        raise XmppdError(f"{path} holds no UUID: restore it; delete it only if this is to become a new node") from None


def _cookie(folder: Path) -> str:
    path = folder / COOKIE
    text = _read(path)
    if text is None:
        text = _create(path, f"{secrets.token_hex(32)}\n", 0o400)
    with _named(path, "read this file"):
        about = path.stat()  # of its target: mounted secrets are links
    if not stat.S_ISREG(about.st_mode):
        raise XmppdError(f"{path} is no file")
    if stat.S_IMODE(about.st_mode) & 0o377:
        raise XmppdError(f"{path} must be readable by its owner and nothing else; chmod 400 {path}")
    if about.st_uid not in (os.geteuid(), 0):
        raise XmppdError(f"{path} belongs to another user ({about.st_uid}); chown {os.geteuid()} {path}")
    cookie = text.strip()
    try:
        check_cookie(cookie)
    except XmppdError as exc:
        raise XmppdError(
            f"{path}: {exc}: copy it from another node of the cluster; on the first one delete it to get a new one"
        ) from None
    return cookie


def check_cookie(cookie: str) -> None:
    """Raises XmppdError for what cannot be one."""
    if not MIN_COOKIE <= len(cookie) <= MAX_COOKIE:
        raise XmppdError(f"a cookie must hold {MIN_COOKIE} to {MAX_COOKIE} characters, not {len(cookie)}")
    if not (cookie.isascii() and cookie.isprintable() and " " not in cookie):
        raise XmppdError("a cookie must hold printable ASCII characters without blanks")


def _also(folder: Path) -> tuple[str, ...]:
    """Left by a change of the cookie that is under way, or was broken off."""
    found = []
    for cookie in (_read(folder / ALSO) or "").split():
        try:
            check_cookie(cookie)
        except XmppdError:
            continue
        found.append(cookie)
    return tuple(found)


def _read(path: Path) -> str | None:
    with _named(path, "read this file"):
        try:
            with path.open("rb") as file:
                data = file.read(4096)
        except FileNotFoundError:
            if path.is_symlink():
                raise
            return None
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "?"  # no number, no UUID, no cookie: the caller says so


def _create(path: Path, text: str, mode: int) -> str:
    """Make a file that must not be there yet, whole or not at all; the text that is in it afterwards."""
    beside = path.with_name(f"{path.name}.new")
    with _named(path, "write this file"):
        _write(beside, text, mode)
        try:
            os.link(beside, path)  # unlike rename it fails if somebody has put one there meanwhile
        except FileExistsError:
            text = path.read_text()
        except OSError:  # a file system without links; nobody else creates this file, we hold the lock
            os.rename(beside, path)
        beside.unlink(missing_ok=True)
        _sync(path.parent)
    return text


def _replace(path: Path, text: str, mode: int = 0o600) -> None:
    """Write a file so that a reader, or a start after a power cut, finds the old text or the new one."""
    beside = path.with_name(f"{path.name}.new")
    with _named(path, "write this file"):
        _write(beside, text, mode)
        os.replace(beside, path)
        _sync(path.parent)


def _write(path: Path, text: str, mode: int) -> None:
    path.unlink(missing_ok=True)  # left by a write that failed; the folder is ours alone
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    try:
        with os.fdopen(descriptor, "w") as file:
            os.fchmod(descriptor, mode)  # whatever the umask says
            file.write(text)
            file.flush()
            os.fsync(descriptor)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _sync(folder: Path) -> None:
    """Names are durable when their folder is."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    with _named(path, "remove this file"):
        path.unlink(missing_ok=True)


@contextmanager
def _named(path: Path, doing: str) -> Iterator[None]:
    """An `OSError` becomes an `XmppdError` that says what could not be done, why, and where we can, the remedy."""
    try:
        yield
    except OSError as exc:
        remedy = _REMEDIES.get(exc.errno or 0)
        raise XmppdError(f"{path}: cannot {doing}: {exc.strerror}{f'; {remedy}' if remedy else ''}") from exc
