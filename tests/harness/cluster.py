"""Several nodes as processes of their own on one machine: one database, one cookie, each its own folder and ports."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.harness.ports import free_port
from tests.harness.server import PATIENCE, Options, Server, options


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody uses or is given, all different."""
    return [free_port() for _ in range(count)]


class ClusterNode(Server):
    """One node; `port_of_cluster` is where the others reach it."""

    def __init__(self, folder: Path, name: str, port: int, database: str, changes: Options) -> None:
        self.name = name
        self.port_of_cluster = port
        cluster = {"listen": f"127.0.0.1:{port}", **changes.pop("cluster", {})}
        own = {"node": name, "database": {"url": database}, "cluster": cluster}
        super().__init__(folder, options(**{**own, **changes}))

    @property
    def node_id(self) -> str:
        return (self.data_dir / "node_id").read_text().strip()

    @property
    def cookie(self) -> str:
        return (self.data_dir / ".xmppd.cookie").read_text().strip()

    def set_cookie(self, cookie: str) -> None:
        """Before its first start, or while it is stopped."""
        self.data_dir.mkdir(mode=0o700, exist_ok=True)
        file = self.data_dir / ".xmppd.cookie"
        file.unlink(missing_ok=True)
        file.touch(mode=0o600)
        file.write_text(cookie + "\n")
        file.chmod(0o400)

    def main(self, *argv: str) -> "subprocess.CompletedProcess[str]":
        """`xmppd` with other arguments, to its end."""
        return subprocess.run(
            [sys.executable, "-m", "xmppd", "--config", str(self.path), *argv],
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )


class RealCluster:
    """Nodes that share a database; none is started or joined unless asked for."""

    def __init__(self, folder: Path, count: int, *, database: str | None = None, **changes: Any) -> None:
        self.folder = folder
        self.database = database or f"sqlite:///{folder}/shared.db"
        self._changes = changes
        self.nodes: list[ClusterNode] = []
        self.cookie = os.urandom(16).hex()
        for _ in range(count):
            self.add()

    def __getitem__(self, place: int) -> ClusterNode:
        return self.nodes[place]

    def __iter__(self) -> Iterator[ClusterNode]:
        return iter(self.nodes)

    def add(self, **changes: Any) -> ClusterNode:
        """One more node that could join."""
        number = len(self.nodes) + 1
        (port,) = free_ports(1)
        name = changes.pop("name", f"xmppd@node0{number}")
        merged = {**self._changes, **changes}
        merged["cluster"] = {"hosts": {f"node0{n}": "127.0.0.1" for n in range(1, 10)}, **merged.get("cluster", {})}
        database = merged.pop("database", self.database)
        node = ClusterNode(self.folder / f"node{number}", name, port, database, merged)
        node.set_cookie(self.cookie)
        self.nodes.append(node)
        return node

    def copy_of(self, node: ClusterNode) -> ClusterNode:
        """A node whose data folder is a copy of another one's."""
        copy = self.add(name=node.name)
        shutil.rmtree(copy.data_dir)
        shutil.copytree(
            node.data_dir, copy.data_dir, ignore=lambda folder, names: [n for n in names if n.endswith(".sock")]
        )
        return copy

    def start(self) -> None:
        """All at once."""
        for node in self.nodes:
            node.launch()
        for node in self.nodes:
            node.wait_until_ready()

    def join(self) -> None:
        """Every node to the first one, one after the other."""
        for node in self.nodes[1:]:
            done = node.ctl("join_cluster", self.nodes[0].name)
            assert done.returncode == 0, f"{done.stdout}{done.stderr}"

    def converged(self, *nodes: ClusterNode, patience: float = PATIENCE) -> None:
        """Wait until these nodes (all, unless named) say that the cluster agrees, with exactly them."""
        which = nodes or tuple(self.nodes)
        names = sorted(node.name for node in which)
        for node in which:
            until(
                lambda node=node: (  # type: ignore[misc]
                    sorted(node.quick("list_cluster").splitlines()) == names
                    and node.ctl("cluster_status").returncode == 0
                ),
                lambda node=node: f"{node.name}: {node.ctl('cluster_status').stdout}",  # type: ignore[misc]
                patience,
            )

    def end(self) -> None:
        """Stop what runs; nothing survives a test."""
        running = [node for node in self.nodes if node.process is not None and node.process.poll() is None]
        for node in running:
            assert node.process is not None
            node.process.terminate()
        for node in self.nodes:
            node.stop() if node in running else node.kill()


def until(reached: Callable[[], bool], what: Callable[[], str] | str, patience: float = PATIENCE) -> None:
    """Look until it is so."""
    deadline = time.monotonic() + patience
    while not reached():
        assert time.monotonic() < deadline, what() if callable(what) else what
        time.sleep(0.05)
