"""`scripts/fuzz`: a parent that starts children, and a child that goes through inputs until one fails.

The child notes the number of its input before it tries it, in memory that outlives it. So a crash of libxml2, which
leaves no exception, and an input that is never done with are found like a broken invariant.
"""

import argparse
import faulthandler
import hashlib
import importlib
import mmap
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Final

from tests.fuzz import mutate

TARGETS: Final = ("stream", "sasl")
CRASHES: Final = Path(__file__).parent / "crashes"
PROGRAM: Final = ["-m", "tests.fuzz.main"]
_ROOT: Final = Path(__file__).parents[2]
_PER_CHILD: Final = (
    20_000  # inputs; then a new one, for memory that is not given back to show as a crash, not as swapping
)
_MEMORY: Final = 2 << 30  # bytes of address space
_HANGS: Final = 20.0  # seconds for one input
_FAILED: Final = 70  # the exit code of a child whose input broke an invariant
_MARK: Final = struct.Struct("qq")  # the number of the input, and how many are done


def check(target: str, seed: int, data: bytes) -> str:
    """One input; raises whatever is wrong with it."""
    outcome: str = importlib.import_module(f"tests.fuzz.{target}_target").check(data, seed)
    return outcome


def child(target: str, seed: int, count: int, until: float, mark: Path) -> None:
    """`count` inputs, or those that fit until then."""
    faulthandler.enable()
    kept = mutate.corpus(target)
    outcomes: Counter[str] = Counter()
    with mark.open("r+b") as file:
        shared = mmap.mmap(file.fileno(), _MARK.size)
        for done in range(count):
            if time.time() >= until:
                break
            _MARK.pack_into(shared, 0, seed + done, done + 1)
            try:
                outcomes[check(target, seed + done, mutate.make(target, seed + done, kept))] += 1
            except Exception:
                traceback.print_exc()
                sys.exit(_FAILED)
    print(" ".join(f"{outcome}={number}" for outcome, number in outcomes.most_common()))


class Hunt:
    """Children one after the other until the time is over or one of them is lost."""

    def __init__(self, target: str, seed: int, out: Path) -> None:
        self.target = target
        self.seed = seed
        self.out = out
        self.done = 0
        self.outcomes: Counter[str] = Counter()

    def run(self, seconds: float, count: int | None = None) -> Path | None:
        """The file with the input that failed, or None."""
        until = time.time() + seconds
        with tempfile.TemporaryDirectory(prefix="xmppd-fuzz-") as folder:
            mark = Path(folder) / "mark"
            while time.time() < until and (count is None or self.done < count):
                mark.write_bytes(bytes(_MARK.size))
                batch = _PER_CHILD if count is None else min(_PER_CHILD, count - self.done)
                command = ["child", self.target, str(self.seed + self.done), str(batch), str(until), str(mark)]
                fault, text = self._watch(command, mark)
                number, done = _MARK.unpack(mark.read_bytes())
                self.done += done
                if fault:
                    return self._save(number, done, fault, text)
                for pair in text.split():
                    outcome, _, times = pair.rpartition("=")
                    self.outcomes[outcome] += int(times)
        return None

    def _watch(self, command: list[str], mark: Path) -> tuple[str, str]:
        """What the child died of, "" for nothing, and what it said."""
        with tempfile.TemporaryFile("w+", errors="replace") as said:
            process = start(command, said)
            before, since = b"", time.monotonic()
            while (code := process.poll()) is None:
                time.sleep(0.02)
                now = mark.read_bytes()
                if now != before or not any(now):  # it may take its time to start
                    before, since = now, time.monotonic()
                elif time.monotonic() - since > _HANGS:
                    process.send_signal(signal.SIGABRT)  # faulthandler says where it was
                    code = process.wait()
                    return f"not done after {_HANGS:.0f} seconds", _text(said)
            return ending(code), _text(said)

    def _save(self, number: int, done: int, fault: str, text: str) -> Path:
        data = mutate.make(self.target, number, mutate.corpus(self.target))
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / f"{self.target}-{hashlib.sha256(data).hexdigest()[:12]}.json"
        mutate.write(path, self.target, number, data, fault=fault, first=number - done + 1, inputs=done)
        say(text.rstrip())
        say(f"{self.target}: {fault}; seed {number}, input kept. Again:\n  scripts/fuzz replay {path}")
        say(f"If it takes what came before:\n  scripts/fuzz {self.target} --seed {number - done + 1} --count {done}")
        return path


def start(command: list[str], said: object) -> "subprocess.Popen[str]":
    """A process of this program in which memory is overwritten when it is freed, for its use to be noticed."""
    environment = {**os.environ, "MALLOC_PERTURB_": "165", "PYTHONPATH": str(_ROOT)}
    return subprocess.Popen(
        [sys.executable, *PROGRAM, *command],
        cwd=_ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=said,  # type: ignore[arg-type]
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY)),
    )


def ending(code: int) -> str:
    """The fault behind an exit code, "" if there is none."""
    if code == 0:
        return ""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return "an invariant is broken" if code == _FAILED else f"exit code {code}"


def _text(said: object) -> str:
    said.seek(0)  # type: ignore[attr-defined]
    text: str = said.read()  # type: ignore[attr-defined]
    return text


def say(text: str) -> None:
    print(text, flush=True)


def replay(path: Path) -> int:
    """Try a kept input once, in a process of its own."""
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        code = start(["once", str(path.resolve())], said).wait()
        say(_text(said).rstrip())
    say(f"{path}: {ending(code) or 'nothing is wrong with it'}")
    return 1 if code else 0


def once(path: Path) -> None:
    """A kept input, in this process."""
    faulthandler.enable()
    target, seed, data = mutate.read(path)
    say(f"{target} seed={seed} {data!r}")
    try:
        say(check(target, seed, data))
    except Exception:
        traceback.print_exc()
        sys.exit(_FAILED)


def hunt(options: argparse.Namespace) -> int:
    seed = random.SystemRandom().randrange(1 << 40) if options.seed is None else options.seed
    say(f"{options.command}: seed {seed}")
    one = Hunt(options.command, seed, options.out)
    began = time.time()
    path = one.run(options.seconds if options.count is None else float("inf"), options.count)
    say(
        f"{options.command}: {one.done} inputs in {time.time() - began:.0f} s; " + str(dict(one.outcomes.most_common()))
    )
    return 1 if path else 0


def main() -> int:
    if sys.argv[1:2] == ["child"]:
        child(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]), Path(sys.argv[6]))
        return 0
    if sys.argv[1:2] == ["once"]:
        once(Path(sys.argv[2]))
        return 0
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description="Random input until something breaks.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="stream|sasl|replay")
    for target in TARGETS:
        command = commands.add_parser(target, help=f"hunt in xmppd/protocol/{target}.py")
        command.add_argument("--seconds", type=float, default=60.0, help="how long (60)")
        command.add_argument("--seed", type=int, help="the number of the first input; another one each time without it")
        command.add_argument("--count", type=int, help="so many inputs, however long it takes")
        command.add_argument("--out", type=Path, default=CRASHES, help="where what fails is kept (tests/fuzz/crashes)")
    again = commands.add_parser("replay", help="try a kept input again")
    again.add_argument("file", type=Path)
    options = parser.parse_args()
    return replay(options.file) if options.command == "replay" else hunt(options)


if __name__ == "__main__":
    sys.exit(main())
