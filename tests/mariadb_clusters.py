"""A Galera cluster of MariaDB servers on loopback, and a replica of a MariaDB, for tests."""

import contextlib
import os
import shutil
import time

import pymysql

from tests.harness.ports import free_port
from tests.mariadb import PASSWORD, START_SECONDS, MariaDB

_PROVIDER = "/usr/lib/galera/libgalera_smm.so"


def missing() -> str | None:
    """Why there can be no Galera cluster here, or None when there can."""
    if not os.path.exists(_PROVIDER):
        return "galera-4 is not installed"
    return None if shutil.which("rsync") else "rsync is not installed"


class GaleraNode(MariaDB):
    def __init__(self, number: int, ports: list[int]) -> None:
        self._first = number == 0
        super().__init__(
            (
                "--wsrep-on=ON",
                f"--wsrep-provider={_PROVIDER}",
                "--wsrep-cluster-name=verona",
                f"--wsrep-cluster-address=gcomm://{','.join(f'127.0.0.1:{port}' for port in ports)}",
                f"--wsrep-node-name=galera{number}",
                "--wsrep-node-address=127.0.0.1",
                f"--wsrep-sst-receive-address=127.0.0.1:{free_port()}",
                "--wsrep-sst-method=rsync",
                "--wsrep-provider-options="
                f"gmcast.listen_addr=tcp://127.0.0.1:{ports[number]};ist.recv_addr=127.0.0.1:{free_port()};"
                "gcache.size=16M",
                "--binlog-format=ROW",
                "--innodb-autoinc-lock-mode=2",
                *(("--wsrep-new-cluster",) if number == 0 else ()),
            )
        )

    def _let_in(self) -> None:
        if self._first:  # the others get the user with everything else
            super()._let_in()

    def _wait_until_it_answers(self) -> None:
        """Ready is a node that has taken over the others' data."""
        deadline = time.monotonic() + 2 * START_SECONDS
        while True:
            with contextlib.suppress(pymysql.Error, OSError):
                if self._listens() and self.status("wsrep_ready") == "ON":
                    return
            if self._process is None or self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((self.folder / "out.log").read_text()[-4000:])
            time.sleep(0.1)

    def status(self, name: str) -> str:
        return str(self.query(f"SHOW STATUS LIKE '{name}'")[0][1])


class Galera:
    """Three nodes; `url(name, first=1)` begins with the second one."""

    def __init__(self) -> None:
        ports = [free_port() for _ in range(3)]
        self.nodes: list[GaleraNode] = []
        try:
            for number in range(3):
                self.nodes.append(GaleraNode(number, ports))
        except BaseException:
            self.destroy()
            raise

    def new_database(self) -> str:
        """Its name."""
        return self.nodes[0].new_database().rpartition("/")[2]

    def url(self, name: str, first: int = 0) -> str:
        order = [*self.nodes[first:], *self.nodes[:first]]
        own = order[0].url(name)
        return own.replace(
            f":{order[0].port}/",
            "".join([f":{order[0].port}", *(f",127.0.0.1:{node.port}" for node in order[1:]), "/"]),
        )

    def destroy(self) -> None:
        for node in self.nodes:
            node.destroy()


class Pair:
    """A server, and a replica that is `delay` seconds late."""

    def __init__(self, delay: int) -> None:
        self.primary = MariaDB(("--server-id=1", "--log-bin=log", "--binlog-format=ROW"))
        self.replica = MariaDB(("--server-id=2", "--read-only=1"))
        self.primary.query(f"CREATE USER 'replica'@'127.0.0.1' IDENTIFIED BY '{PASSWORD}'")
        self.primary.query("GRANT REPLICATION SLAVE ON *.* TO 'replica'@'127.0.0.1'")
        file, position, *_ = self.primary.query("SHOW MASTER STATUS")[0]
        self.replica.query(
            f"CHANGE MASTER TO MASTER_HOST='127.0.0.1', MASTER_PORT={self.primary.port}, MASTER_USER='replica', "
            f"MASTER_PASSWORD='{PASSWORD}', MASTER_LOG_FILE='{file}', MASTER_LOG_POS={position}, MASTER_DELAY={delay}"
        )
        self.replica.query("START SLAVE")

    def urls(self) -> tuple[str, str]:
        """Of a new database, on the primary and on the replica."""
        url = self.primary.new_database()
        return url, url.replace(f":{self.primary.port}/", f":{self.replica.port}/")

    def destroy(self) -> None:
        self.replica.destroy()
        self.primary.destroy()
