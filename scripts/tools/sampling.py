"""What processes cost: CPU and memory of a server with all its descendants, and the CPU of the whole machine."""

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Sample:
    time: float  # s, monotonic
    cpu: float  # s, user and system, of the processes
    processes: int
    rss_mb: float
    pss_mb: float  # pages shared by several processes are counted once
    machine_busy: float  # s, of all CPUs
    own_cpu: float  # s, of `roots` without their descendants

    @classmethod
    def take(cls, roots: Iterable[int]) -> "Sample":
        roots = list(roots)
        pids = with_descendants(roots)
        rss, pss = memory(pids)
        return cls(time.monotonic(), cpu_seconds(pids), len(pids), rss, pss, machine_busy(), cpu_seconds(roots))


def stat_fields(pid: int) -> list[str]:
    """/proc/PID/stat from the third field, the state, on; the second, the name, may hold anything."""
    text = Path(f"/proc/{pid}/stat").read_text()
    return text[text.rindex(")") + 2 :].split()


def with_descendants(roots: Iterable[int]) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                children.setdefault(int(stat_fields(int(entry))[1]), []).append(int(entry))
            except (OSError, ValueError):
                continue  # it ended while we looked
    found: list[int] = []
    todo = [pid for pid in roots if Path(f"/proc/{pid}").exists()]
    while todo:
        pid = todo.pop()
        if pid not in found:
            found.append(pid)
            todo += children.get(pid, [])
    return found


def cpu_seconds(pids: Iterable[int]) -> float:
    ticks = 0
    for pid in pids:
        try:
            fields = stat_fields(pid)
        except (OSError, ValueError):
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / TICKS


def memory(pids: Iterable[int]) -> tuple[float, float]:
    """RSS and PSS in MiB."""
    sums = {"Rss": 0, "Pss": 0}
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            name, _, rest = line.partition(":")
            if name in sums:
                sums[name] += int(rest.split()[0])
    return sums["Rss"] / 1024, sums["Pss"] / 1024


def machine_busy() -> float:
    user, nice, system, _idle, _iowait, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / TICKS
