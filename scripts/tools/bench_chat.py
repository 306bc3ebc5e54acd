"""Chat in several ways by turns, so that their difference can be told on a machine whose speed changes by the hour."""

import argparse
import contextlib
import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench_own import COST, Failed, Own, middle, own_nodes

CHILDREN = "of_it_descendants_us_per_message"
HERE = Path(__file__).resolve().parent
ACKS = {"plain": -1.0, "prompt": 0.0, "stored": 1.5}  # seconds the clients take; -1: no stream management

# Made and thrown away: if they piled up, the garbage collector's work on them would be measured.
IN_MEMORY = {"durability": "none", "memory": {"max_events": 1000, "when_full": "drop_new"}}

# Runs chat once: the server and what belongs to it, the options, what to do at each phase.
Chat = Callable[[Own, argparse.Namespace, Callable[[str], None]], dict[str, Any]]


def acknowledged(chat: Chat, arguments: argparse.Namespace) -> dict[str, Any]:
    """What stream management costs: without it, with clients that acknowledge at once, and with such slow ones that
    every message is written to the database. At one rate, on one node."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ACKS}
    options = argparse.Namespace(**vars(arguments))
    options.rate = arguments.rate or 1000
    with own_nodes(file=arguments.config, mysql=arguments.mysql, cpus=arguments.server_cpus) as own:
        own.register(range(arguments.first_user, arguments.first_user + arguments.users))
        for _ in range(arguments.rounds):
            for name, seconds in ACKS.items():
                options.ack = seconds
                runs[name].append(chat(own, options, lambda phase: None))
    found = {name: middle(results) for name, results in runs.items()}
    return {
        "scenario": "acknowledged",
        "database": "mysql" if arguments.mysql else "sqlite",
        "rounds": arguments.rounds,
        "rate": options.rate,
        "prompt_us_per_message": _more(found["prompt"], found["plain"]),
        "stored_us_per_message": _more(found["stored"], found["plain"]),
        **found,
    }


def post_log(chat: Chat, arguments: argparse.Namespace) -> dict[str, Any]:
    """What the module post_log costs: the same chat on a node with it, on one without, and, as long as there is a web
    server, on one that only makes the events, and drops them: what they cost before anybody sends them."""
    options = argparse.Namespace(**vars(arguments))
    options.rate = arguments.rate or 2000
    with contextlib.ExitStack() as stack:
        sink = stack.enter_context(_sink(down=arguments.sink_down, cpus=arguments.cpus))
        configs: dict[str, dict[str, Any]] = {"plain": {}}
        if not arguments.sink_down:
            nobody = stack.enter_context(_sink(down=True, cpus=None))
            configs["made"] = _modules(nobody, arguments.post_format) | {"outbox": IN_MEMORY}
        configs["post_log"] = _modules(sink, arguments.post_format)
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in configs}
        owns = {
            name: stack.enter_context(
                own_nodes(config=config, file=arguments.config, mysql=arguments.mysql, cpus=arguments.server_cpus)
            )
            for name, config in configs.items()
        }
        for own in owns.values():
            own.register(range(arguments.first_user, arguments.first_user + arguments.users))
        for _ in range(arguments.rounds):
            for name, own in owns.items():
                counts: dict[str, int] = {}

                def count(phase: str, counts: dict[str, int] = counts) -> None:
                    counts[phase] = sink.posted()

                result = chat(own, options, count)
                if name == "post_log":
                    result["requests"] = counts["end"] - counts["start"]
                runs[name].append(result)
        waiting = owns["post_log"].ctl("outbox", "status").strip().splitlines()
    found = {name: middle(results) for name, results in runs.items()}
    return {
        "scenario": "post_log",
        "format": arguments.post_format,
        "sink": "down" if arguments.sink_down else "up",
        "rounds": arguments.rounds,
        "rate": options.rate,
        "post_log_us_per_message": _more(found["post_log"], found["plain"]),
        "chat_path_us_per_message": _own_more(found["post_log"], found["plain"]),
        "sender_us_per_message": _more(found["post_log"], found["plain"], CHILDREN),
        **({"made_us_per_message": _more(found["made"], found["plain"])} if "made" in found else {}),
        "outbox_at_the_end": [line.split("\t") for line in waiting],
        **found,
    }


def _modules(sink: "Sink", form: str) -> dict[str, Any]:
    return {"modules": {"post_log": {"url": sink.url, "format": form}}}


def _more(one: dict[str, Any], other: dict[str, Any], cost: str = COST) -> float:
    return round(float(one[cost]) - float(other[cost]), 2)


def _own_more(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The difference without the processes that the node has started: what those pay who chat."""
    return round(_more(one, other) - _more(one, other, CHILDREN), 2)


class Sink:
    """sink.py in a process of its own, or nobody at all behind a port."""

    def __init__(self, process: "subprocess.Popen[str] | None", port: int) -> None:
        self._process = process
        self.url = f"http://127.0.0.1:{port}/messages"

    def posted(self) -> int:
        """Requests so far."""
        if self._process is None:
            return 0
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return int(json.loads(self._process.stdout.readline()))


@contextlib.contextmanager
def _sink(*, down: bool, cpus: str | None) -> Iterator[Sink]:
    if down:
        with socket.socket() as nobody:
            nobody.bind(("127.0.0.1", 0))  # and does not listen: who connects is refused
            yield Sink(None, nobody.getsockname()[1])
        return
    command = [*(["taskset", "-c", cpus] if cpus else []), sys.executable, str(HERE / "sink.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            port = process.stdout.readline()
            if not port:
                raise Failed("the sink did not start")
            yield Sink(process, int(port))
        finally:
            process.stdin.close()
