"""A small network inside this machine: clients, a balancer, nodes and a database, each a host (namespace) of its own.

    clients 10.77.0.0/24 -- eth0 balancer eth1 -- 10.77.1.0/24: nodes, database

Takes root, `ip`, and a kernel with namespaces, bridges and nftables NAT. LVS itself is not in every kernel; nftables
forwards packets in its place, with the same addresses.
"""

import contextlib
import ctypes
import itertools
import os
import re
import shutil
import socket
import subprocess
import threading
from typing import Final

_CLONE_NEWNET: Final = 0x40000000
_PATH: Final = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_numbers = itertools.count(1)


def missing(*programs: str) -> str | None:
    """Why there can be no such network here, or None."""
    if os.geteuid() != 0:
        return "network namespaces take root"
    for name in ("ip", *programs):
        if shutil.which(name, path=_PATH) is None:
            return f"{name} is not installed"
    name = f"xmppd-{os.getpid()}-probe"
    try:
        run("ip", "netns", "add", name)
        try:
            run("ip", "-n", name, "link", "add", "br0", "type", "bridge")
            if "nft" in programs:
                rules = "table ip t { chain c { type nat hook prerouting priority dstnat; }; }"
                run("ip", "netns", "exec", name, "nft", rules)
        finally:
            run("ip", "netns", "delete", name)
    except subprocess.CalledProcessError as exc:
        return f"the kernel does not let us: {exc.stderr.strip()[:200]}"
    return None


def run(*argv: str) -> str:
    done = subprocess.run(
        argv, capture_output=True, text=True, check=True, timeout=60, env={**os.environ, "PATH": _PATH}
    )
    return done.stdout


class Host:
    """One namespace."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.name = f"xmppd-{os.getpid()}-{next(_numbers)}-{label}"
        self.address = ""
        run("ip", "netns", "add", self.name)
        self.ip("link", "set", "lo", "up")

    @property
    def prefix(self) -> tuple[str, ...]:
        """A command in front of another one that is to run here; it becomes that one."""
        return ("ip", "netns", "exec", self.name)

    def ip(self, *argv: str) -> None:
        run("ip", "-n", self.name, *argv)

    def run(self, *argv: str) -> str:
        return run(*self.prefix, *argv)

    def new_socket(self) -> socket.socket:
        """A TCP socket of this host, for us: it stays where it was made."""
        made: list[socket.socket | OSError] = []

        def make() -> None:
            libc = ctypes.CDLL(None, use_errno=True)
            with open(f"/run/netns/{self.name}") as namespace:
                if libc.setns(namespace.fileno(), _CLONE_NEWNET):
                    made.append(OSError(ctypes.get_errno(), "setns"))
                else:
                    made.append(socket.socket())

        thread = threading.Thread(target=make)  # of its own: where it has gone it stays
        thread.start()
        thread.join()
        if isinstance(made[0], OSError):
            raise made[0]
        return made[0]

    def connect(self, address: tuple[str, int], *, source: str, patience: float) -> socket.socket:
        """Blocks; OSError."""
        sock = self.new_socket()
        try:
            sock.settimeout(patience)
            sock.bind((source, 0))
            sock.connect(address)
        except OSError:
            sock.close()
            raise
        sock.setblocking(False)
        return sock

    def delete(self) -> None:
        run("ip", "netns", "delete", self.name)


class Network:
    """The hosts and their cables."""

    CLIENTS = tuple(f"10.77.0.{number}" for number in range(2, 8))
    SERVICE = "10.77.0.1"
    INNER = "10.77.1.1"

    def __init__(self) -> None:
        _sweep()
        self._hosts: list[Host] = []
        try:
            self._lay()
        except BaseException:
            self.close()
            raise

    def _lay(self) -> None:
        self.clients, self.balancer, self._switch = map(self._add, ("clients", "balancer", "switch"))
        self._switch.ip("link", "add", "br0", "type", "bridge")
        self._switch.ip("link", "set", "br0", "up")
        self.balancer.run("sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
        self.balancer.ip("link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", self.clients.name)
        self.balancer.ip("address", "add", f"{self.SERVICE}/24", "dev", "eth0")
        self.balancer.ip("link", "set", "eth0", "up")
        for address in self.CLIENTS:
            self.clients.ip("address", "add", f"{address}/24", "dev", "eth0")
        self.clients.ip("link", "set", "eth0", "up")
        self._plug(self.balancer, self.INNER, "eth1")
        self.nodes = [self.inside(f"node{number}", f"10.77.1.1{number}") for number in (1, 2)]
        self.database = self.inside("database", "10.77.1.21")

    def inside(self, label: str, address: str) -> Host:
        """A host behind the balancer, which is its way out."""
        host = self._add(label)
        self._plug(host, address, "eth0")
        host.ip("route", "add", "default", "via", self.INNER)
        return host

    def _add(self, label: str) -> Host:
        self._hosts.append(Host(label))
        return self._hosts[-1]

    def _plug(self, host: Host, address: str, device: str) -> None:
        host.address = address
        host.ip("link", "add", device, "type", "veth", "peer", "name", host.label, "netns", self._switch.name)
        self._switch.ip("link", "set", host.label, "master", "br0")
        self._switch.ip("link", "set", host.label, "up")
        host.ip("address", "add", f"{address}/24", "dev", device)
        host.ip("link", "set", device, "up")

    def unplug(self, host: Host) -> None:
        """Its cable is pulled: nobody hears a FIN or RST."""
        self._switch.ip("link", "set", host.label, "down")

    def plug_in(self, host: Host) -> None:
        self._switch.ip("link", "set", host.label, "up")

    def close(self) -> None:
        """When nothing runs in them any more."""
        for host in self._hosts:
            host.delete()
        self._hosts.clear()


def _sweep() -> None:
    """Delete the namespaces of test runs that were killed; what ran in them has been ended by its watcher."""
    for line in run("ip", "netns", "list").splitlines():
        found = re.match(r"xmppd-(\d+)-\S+", line)
        if found and not os.path.exists(f"/proc/{found[1]}"):
            with contextlib.suppress(subprocess.CalledProcessError):  # somebody else was quicker
                run("ip", "netns", "delete", found[0])
