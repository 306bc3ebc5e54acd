"""A private MariaDB for tests: a free loopback port, a folder of its own, ended by its pid."""

import contextlib
import datetime
import ipaddress
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pymysql
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.harness.ports import free_port
from tests.harness.watcher import Watcher

USER = "xmppd"
PASSWORD = "open, sesame: @/%"  # every character that a URL and a shell could get wrong
START_SECONDS = 30.0
_PREFIX = "xmppd-mariadb-"


def missing() -> str | None:
    """Why there is no MariaDB here, or None when there is."""
    if _binary("mariadbd") is None:
        return "mariadbd is not installed"
    if _binary("mariadb-install-db") is None:
        return "mariadb-install-db is not installed"
    return None


def required() -> bool:
    return os.environ.get("XMPPD_REQUIRE_MARIADB") == "1"


class MariaDB:
    """`start`, `stop` and `kill` may be repeated; the data stay. Made durable as an operator would run it."""

    def __init__(
        self, options: tuple[str, ...] = (), *, prefix: tuple[str, ...] = (), address: str = "127.0.0.1"
    ) -> None:
        """`prefix` is a command that becomes the server, as `ip netns exec`; `address` where it listens then."""
        _sweep()
        self.prefix = prefix
        self.address = address
        self.folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=_fast_folder()))
        self.port = free_port()
        self.options = options
        self._process: subprocess.Popen[bytes] | None = None
        self._schemas: dict[str, list[str]] = {}
        self._install()
        self.start()
        self._let_in()

    def _let_in(self) -> None:
        host = "127.0.0.1" if self.address == "127.0.0.1" else "%"
        self.query(f"CREATE USER '{USER}'@'{host}' IDENTIFIED BY '{PASSWORD}'")
        self.query(f"GRANT ALL ON `t\\_%`.* TO '{USER}'@'{host}'")  # and nothing that only root may

    @property
    def pid(self) -> int:
        """Of the server, while it runs."""
        assert self._process is not None
        return self._process.pid

    def new_database(self) -> str:
        """A fresh database; the URL that leads to it."""
        name = f"t_{secrets.token_hex(6)}"
        self.query(f"CREATE DATABASE {name}")
        return self.url(name)

    def drop_database(self, url: str) -> None:
        self.query(f"DROP DATABASE {_name(url)}")

    def url(self, name: str) -> str:
        quoted = PASSWORD.replace("%", "%25").replace(" ", "%20").replace("/", "%2F").replace("@", "%40")
        return f"mysql://{USER}:{quoted.replace(':', '%3A').replace(',', '%2C')}@{self.address}:{self.port}/{name}"

    def query(self, sql: str, database: str | None = None) -> list[tuple[object, ...]]:
        """One statement as root."""
        with self._root(database) as connection, connection.cursor() as cursor:
            cursor.execute(sql)
            return list(cursor.fetchall())

    def copy_schema(self, template: str, url: str) -> None:
        """Gives the empty database at `url` the tables of the one at `template`, and its Alembic revision."""
        with self._root(_name(template)) as connection, connection.cursor() as cursor:
            if template not in self._schemas:
                cursor.execute("SHOW TABLES")
                names = [row[0] for row in cursor.fetchall()]
                self._schemas[template] = [f"SHOW CREATE TABLE {name}" for name in names]
                for number, show in enumerate(self._schemas[template]):
                    cursor.execute(show)
                    self._schemas[template][number] = cursor.fetchone()[1]
            cursor.execute(f"USE {_name(url)}")
            for create in self._schemas[template]:
                cursor.execute(create)
            cursor.execute(f"INSERT INTO alembic_version SELECT * FROM {_name(template)}.alembic_version")

    def _root(self, database: str | None) -> "pymysql.Connection[pymysql.cursors.Cursor]":
        socket_file = str(self.folder / "my.sock")
        return pymysql.connect(
            unix_socket=socket_file, user="root", database=database, autocommit=True, ssl_disabled=True
        )

    def start(self) -> None:
        if self._process is not None:
            return
        log = (self.folder / "out.log").open("ab")
        with log:
            self._process = subprocess.Popen(
                [
                    *self.prefix,
                    _need("mariadbd"),
                    "--no-defaults",
                    *_as_root(),
                    f"--datadir={self.folder / 'data'}",
                    f"--socket={self.folder / 'my.sock'}",
                    f"--pid-file={self.folder / 'my.pid'}",
                    f"--bind-address={self.address}",
                    f"--port={self.port}",
                    "--skip-name-resolve",
                    "--innodb-buffer-pool-size=64M",
                    "--innodb-log-file-size=16M",
                    "--innodb-flush-log-at-trx-commit=1",
                    "--max-connections=200",
                    "--performance-schema=OFF",
                    *self.options,
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._watcher = Watcher(self._process.pid)
        try:
            self._wait_until_it_answers()
        except BaseException:
            self._end(kill=True)
            raise

    def stop(self) -> None:
        """An orderly shutdown."""
        self._end(kill=False)

    def kill(self) -> None:
        """As a power cut would."""
        self._end(kill=True)

    def pause(self) -> None:
        """The process stands still; its connections stay open and nobody answers."""
        if self._process is not None:
            self._process.send_signal(signal.SIGSTOP)
            # A signal stops a process thread by thread: one of them could still answer after the call.
            while any(state not in "tTZX" for state in _thread_states(self._process.pid)):
                time.sleep(0.001)

    def go_on(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)

    def destroy(self) -> None:
        self._end(kill=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _end(self, *, kill: bool) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        self._watcher.dismiss()
        if kill:
            process.kill()
        else:
            process.terminate()
        process.wait(timeout=START_SECONDS)

    def _install(self) -> None:
        if os.geteuid() == 0:
            shutil.chown(self.folder, _user())
        subprocess.run(
            [
                _need("mariadb-install-db"),
                "--no-defaults",
                *_as_root(),
                f"--datadir={self.folder / 'data'}",
                "--auth-root-authentication-method=normal",
                "--skip-test-db",
                "--innodb-log-file-size=16M",
            ],
            check=True,
            capture_output=True,
            stdin=subprocess.DEVNULL,
        )

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self._listens():
            assert self._process is not None
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((self.folder / "out.log").read_text()[-2000:])
            time.sleep(0.05)
        self.query("SELECT 1")

    def _listens(self) -> bool:
        """pymysql leaves a socket open when it is refused, so a plain one knocks first."""
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.folder / "my.sock")) == 0


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1, and its key, readable by the server's user."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
        .sign(key, hashes.SHA256())
    )
    cert_file, key_file = folder / "cert.pem", folder / "key.pem"
    cert_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return cert_file, key_file


def _name(url: str) -> str:
    return url.rsplit("/", 1)[1].split("?")[0]


def _binary(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


def _need(name: str) -> str:
    found = _binary(name)
    assert found is not None, missing()
    return found


def _as_root() -> list[str]:
    return [f"--user={_user()}"] if os.geteuid() == 0 else []


def _user() -> str:
    """Whom a MariaDB started by root becomes; the programs alone come without the user `mysql`."""
    try:
        return pwd.getpwnam("mysql").pw_name
    except KeyError:
        return "root"


def _sweep() -> None:
    """Removes the folders of test runs that were killed."""
    for folder in Path(_fast_folder() or tempfile.gettempdir()).glob(f"{_PREFIX}*-*"):
        owner = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if owner.isdigit() and not os.path.exists(f"/proc/{owner}"):
            shutil.rmtree(folder, ignore_errors=True)


def _fast_folder() -> str | None:
    """Memory, where there is plenty: we test killed processes and not power cuts, and each table made costs syncs."""
    with contextlib.suppress(OSError):
        if shutil.disk_usage("/dev/shm").free > 2 << 30:
            return "/dev/shm"
    return None


def _thread_states(pid: int) -> list[str]:
    states = []
    for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
        try:
            states.append(stat.read_text().rpartition(")")[2].split()[0])
        except OSError:  # the thread has ended
            continue
    return states
