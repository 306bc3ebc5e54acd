"""Measure a server under load. Prints one JSON object; docs/benchmarks.md tells how to read it.

    scripts/bench chat                      on a node of its own, started for this run and thrown away after it
    scripts/bench chat --target 127.0.0.1:5222 --host example.net --pidfile var/pid

Scenarios:
    chat      pairs of users write to each other
    login     sessions are set up, up to the answer to the first ping
    idle      sessions do nothing: memory per session
    cluster   chat with the two ends of each pair on different nodes, and, for comparison, on one node; or, with --rows,
              how a node joins another one that has so many sessions
    acknowledged  chat without stream management, with it, and with clients so slow that each message is stored
    post_log  chat on a node with the module post_log, and on one without: by turns
    resume    sessions lose their streams and are resumed, on the node where they are and on another one: how fast
    waiting   sessions lose their streams and wait: memory per session, without and with messages in their queues
    register  accounts are made in band, on a server that allows it (--target needed)

The accounts are u00000, u00001 ... with the passwords p00000, p00001 ... On a server named with --target they must be
there: `register` makes them, or write `register u00000 HOST p00000` and so on to its `xmppctl batch`.
The generator is C (tools/loadgen), compiled on first use with $CC or cc; it needs the OpenSSL headers.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bench_chat
import bench_join
import bench_sessions
from bench_own import COST, Failed, Own, Server, middle, own_nodes
from sampling import Sample

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "loadgen"
UNIT = {"chat": "message", "login": "login", "idle": "session", "register": "account"}
BY_TURNS = {"acknowledged": bench_chat.acknowledged, "post_log": bench_chat.post_log}
SESSIONS = {"resume": bench_sessions.resume, "waiting": bench_sessions.waiting}
OWN = (*BY_TURNS, *SESSIONS)  # scenarios that need nodes of their own
ROUNDS = ("cluster", *BY_TURNS, "resume")


def main() -> None:
    arguments = parse(sys.argv[1:])
    try:
        if arguments.rows:
            with tempfile.TemporaryDirectory(prefix="xmppd-bench-") as folder:
                found = bench_join.measure(arguments.rows, Path(folder), arguments.server_cpus)
            print(json.dumps({"scenario": arguments.scenario, **found}))
            return
        if arguments.scenario in SESSIONS:
            print(json.dumps(SESSIONS[arguments.scenario](arguments)))
            return
        generator = build()
        if arguments.scenario in BY_TURNS:
            print(json.dumps(BY_TURNS[arguments.scenario](chat_with(generator), arguments)))
            return
        with server_for(arguments) as (server, cache):
            measured = run_cluster if arguments.scenario == "cluster" else run
            print(json.dumps(measured(generator, server, cache, arguments)))
    except Failed as failure:
        print(f"bench: {failure}", file=sys.stderr)
        sys.exit(1)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scenario", choices=[*UNIT, "cluster", *OWN])

    load = parser.add_argument_group("load")
    load.add_argument("--pairs", type=int, help="users are twice as many (default 100)")
    load.add_argument("--users", type=int, help="in place of --pairs (default 200; login 600, idle, waiting 1000)")
    load.add_argument("--first-user", type=int, default=0, metavar="N")
    load.add_argument("--tls", choices=["none", "starttls", "direct"], nargs="?", const="starttls", default="none")
    load.add_argument("--auth", choices=["scram-sha-1", "scram-sha-256", "plain"], default="scram-sha-1")
    load.add_argument("--concurrency", type=int, default=50, help="logins at one time")
    load.add_argument("--window", type=int, default=1, help="chat: messages in flight per user")
    load.add_argument("--rate", type=float, help="chat: messages per second in all, by the clock, in place of --window")
    load.add_argument("--body", type=int, default=100, help="chat: bytes of text")
    load.add_argument("--to", choices=["bare", "full"], default="bare", help="chat: to the bare or the full address")
    load.add_argument(
        "--ack", type=float, default=-1, metavar="S", help="chat: stream management, <a/> so many seconds after <r/>"
    )
    load.add_argument(
        "--depth", choices=["full", "bind"], default="full", help="login: with roster and presence, or not"
    )
    load.add_argument(
        "--layout", choices=["both", "cross", "same"], default="both", help="cluster: the ends of a pair on which nodes"
    )
    load.add_argument(
        "--rounds", type=int, help="cluster (default 1), acknowledged, post_log (3): by turns, so often; medians"
    )
    load.add_argument(
        "--post-format", choices=["ejabberd", "json", "ndjson_batch"], default="ejabberd", help="post_log: its `format`"
    )
    load.add_argument("--sink-down", action="store_true", help="post_log: nobody takes what is posted")
    load.add_argument("--rows", type=int, help="cluster: measure no chat, but the join of a node with so many sessions")
    load.add_argument("--warm", type=float, default=1.5, metavar="S", help="before measuring")
    load.add_argument("--time", type=float, default=5, metavar="S", help="of measuring")
    load.add_argument("--settle", type=float, default=3, metavar="S", help="idle, waiting: before measuring memory")
    load.add_argument("--cpus", metavar="LIST", help="CPUs the generator may run on")

    target = parser.add_argument_group("a server that runs already")
    target.add_argument("--target", metavar="IP:PORT[,IP:PORT]", help="several: sessions go to them in turn")
    target.add_argument("--host", default="localhost", help="the XMPP domain")
    target.add_argument("--pid", type=int, action="append", default=[], help="its process, descendants are included")
    target.add_argument("--pidfile", type=Path, action="append", default=[])
    target.add_argument("--database-pid", type=int, action="append", default=[], help="counted apart")
    target.add_argument("--scram-cache", metavar="FILE", help="keeps salted passwords, so that logins cost us little")

    own = parser.add_argument_group("a server of our own")
    own.add_argument("--config", metavar="FILE", help="YAML merged over the node's configuration")
    own.add_argument(
        "--mysql",
        metavar="URL",
        nargs="?",
        const="own",
        help="in place of an SQLite file; no URL: a MariaDB for the run",
    )
    own.add_argument("--nodes", type=int, default=2, help="cluster: how many")
    own.add_argument("--server-cpus", metavar="LIST", help="CPUs the nodes may run on")
    arguments = parser.parse_args(argv)

    default_users = {"login": 600, "idle": 1000, "waiting": 1000}.get(arguments.scenario, 200)
    default_rounds = 1 if arguments.scenario == "cluster" else 3
    arguments.users = arguments.users or (2 * arguments.pairs if arguments.pairs else default_users)
    arguments.rounds = default_rounds if arguments.rounds is None else arguments.rounds
    if arguments.scenario in ("chat", "cluster", *BY_TURNS) and arguments.users % 2:
        parser.error(f"{arguments.scenario} needs an even number of users")
    check_cluster(parser, arguments)
    if arguments.scenario in OWN and arguments.target:
        parser.error(f"{arguments.scenario} measures nodes of its own")
    if arguments.rounds < 1:
        parser.error(f"{arguments.scenario} needs one round at least")
    if arguments.sink_down and arguments.scenario != "post_log":
        parser.error(f"--sink-down is for post_log, not for {arguments.scenario}")
    if arguments.mysql and arguments.target:
        parser.error("--mysql is for a server of our own")
    if arguments.scenario == "register" and not arguments.target:
        parser.error("register needs --target")
    if arguments.auth == "plain" and arguments.tls == "none":
        parser.error("--auth plain needs --tls: no server should take a password in the clear")
    return arguments


def check_cluster(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if arguments.scenario != "cluster":
        if arguments.rows is not None:
            parser.error(f"--rows is for cluster, not for {arguments.scenario}")
        return
    if arguments.rows is not None and arguments.rows < 1:
        parser.error("--rows needs one session at least")
    if arguments.rows is not None and arguments.target:
        parser.error("--rows measures nodes of its own: it reaches into their processes")
    if arguments.nodes < 2 or (arguments.target and "," not in arguments.target):
        parser.error("cluster needs two nodes")


# ---------------------------------------------------------------------------------------------- the generator


def build() -> Path:
    """The compiled generator, kept under the user's cache folder by the hash of its sources and compiler."""
    sources = sorted(SOURCES.glob("*.[ch]"))
    command = [*shlex.split(os.environ.get("CC", "cc")), "-O2", "-std=gnu17", "-Wall", "-Wextra"]
    digest = hashlib.sha256(repr(command).encode())
    for source in sources:
        digest.update(source.read_bytes())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xmppd"
    program = folder / f"loadgen-{digest.hexdigest()[:16]}"
    if program.exists():
        return program
    remedy = "On Debian and Ubuntu: apt-get install gcc libc6-dev libssl-dev"
    if shutil.which(command[0]) is None:
        raise Failed(f"the load generator is C, and there is no compiler {command[0]} here. {remedy}")
    folder.mkdir(parents=True, exist_ok=True)
    fresh = program.with_suffix(f".{os.getpid()}")
    units = [str(source) for source in sources if source.suffix == ".c"]
    compiled = subprocess.run([*command, "-o", str(fresh), *units, "-lssl", "-lcrypto"], capture_output=True, text=True)
    if compiled.returncode:
        raise Failed(f"the load generator does not compile. {remedy}\n{compiled.stderr}")
    fresh.replace(program)
    return program


def generator_arguments(
    scenario: str, server: Server, cache: str, arguments: argparse.Namespace, layout: str
) -> list[str]:
    options = {
        "layout": layout,
        "target": server.direct_tls if arguments.tls == "direct" else server.plain,
        "host": server.host,
        "tls": arguments.tls,
        "auth": arguments.auth,
        "users": arguments.users,
        "first-user": arguments.first_user,
        "concurrency": arguments.concurrency,
        "window": arguments.window,
        "rate": arguments.rate or 0,
        "body": arguments.body,
        "to": arguments.to,
        "depth": arguments.depth,
        "warm": arguments.warm,
        "time": arguments.time,
        "settle": arguments.settle,
        "ack": arguments.ack,
        "scram-cache": cache,
    }
    return [scenario, *(text for name, value in options.items() for text in (f"--{name}", str(value)))]


def generate(
    command: list[str], server: Server, cpus: str | None, seen: Callable[[str], None] = lambda phase: None
) -> tuple[dict[str, Any], dict[str, tuple[Sample, Sample]]]:
    """Runs the generator; samples server and database at each phase it tells of, and calls `seen`."""
    if cpus:
        command = ["taskset", "-c", cpus, *command]
    samples: dict[str, tuple[Sample, Sample]] = {}
    result = None
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for line in process.stdout:
            word, _, rest = line.partition(" ")
            if word == "PHASE":
                samples[rest.strip()] = (Sample.take(server.pids), Sample.take(server.database_pids))
                seen(rest.strip())
                process.stdin.write("\n")
                process.stdin.flush()
            elif word == "JSON":
                result = json.loads(rest)
    if result is None or process.returncode:
        raise Failed(f"the load generator ended with exit code {process.returncode} and without a result")
    return result, samples


# ---------------------------------------------------------------------------------------------- the server


@contextlib.contextmanager
def server_for(arguments: argparse.Namespace) -> Iterator[tuple[Server, str]]:
    """The server to measure, and the file of salted passwords that goes with its accounts."""
    if arguments.target:
        pids = arguments.pid + [int(pid) for file in arguments.pidfile for pid in file.read_text().split()]
        server = Server(arguments.target, arguments.target, arguments.host, pids, arguments.database_pid)
        with tempfile.TemporaryDirectory(prefix="xmppd-bench-") as folder:
            yield server, arguments.scram_cache or f"{folder}/scram"
        return
    count = arguments.nodes if arguments.scenario == "cluster" else 1
    with own_nodes(count, file=arguments.config, mysql=arguments.mysql, cpus=arguments.server_cpus) as own:
        own.register(range(arguments.first_user, arguments.first_user + arguments.users))
        yield own.server, f"{own.folder}/scram"


# ---------------------------------------------------------------------------------------------- the result


def run(
    generator: Path,
    server: Server,
    cache: str,
    arguments: argparse.Namespace,
    *,
    layout: str = "cross",
    seen: Callable[[str], None] = lambda phase: None,
) -> dict[str, Any]:
    scenario = arguments.scenario if arguments.scenario in UNIT else "chat"

    def generated() -> tuple[dict[str, Any], dict[str, tuple[Sample, Sample]]]:
        options = generator_arguments(scenario, server, cache, arguments, layout)
        return generate([str(generator), *options], server, arguments.cpus, seen)

    if scenario == "login" and arguments.auth != "plain":
        # Once without measuring: salting the passwords is the client's work, and dearer than the server's whole login.
        generated()
    result, samples = generated()
    if result["failed"] == arguments.users:
        raise Failed("no session came up")
    result = {"scenario": scenario, "host": server.host, "tls": arguments.tls, **result}
    if server.pids:
        result |= costs(scenario, result, samples, server)
    return result


def chat_with(generator: Path) -> bench_chat.Chat:
    def chat(own: Own, arguments: argparse.Namespace, seen: Callable[[str], None]) -> dict[str, Any]:
        return run(generator, own.server, f"{own.folder}/scram", arguments, seen=seen)

    return chat


def run_cluster(generator: Path, server: Server, cache: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Both layouts by turns; of each the run of which half of the others were dearer."""
    layouts = ("cross", "same") if arguments.layout == "both" else (arguments.layout,)
    runs: dict[str, list[dict[str, Any]]] = {layout: [] for layout in layouts}
    for _ in range(arguments.rounds):
        for layout in layouts:
            runs[layout].append(run(generator, server, cache, arguments, layout=layout))
    cost = COST if server.pids else "messages_per_s"
    found: dict[str, Any] = {"scenario": "cluster", "nodes": server.plain.count(",") + 1, "rounds": arguments.rounds}
    for layout, results in runs.items():
        found[layout] = middle(results, cost)
    if len(layouts) == 2 and found["same"][cost]:
        found["cross_over_same"] = round(found["cross"][cost] / found["same"][cost], 3)
    return found


def costs(
    scenario: str, result: dict[str, Any], samples: dict[str, tuple[Sample, Sample]], server: Server
) -> dict[str, Any]:
    (start, start_db), (end, end_db) = samples["start"], samples["end"]
    if not end.processes:
        raise Failed(f"there is no process {', '.join(map(str, server.pids))} (any more)")
    seconds, cpu, units = end.time - start.time, end.cpu - start.cpu, max(result["units"], 1)
    others = end.machine_busy - start.machine_busy - cpu - (end_db.cpu - start_db.cpu) - result["generator_cpu_s"]
    found: dict[str, Any] = {
        "server_cpu_s": round(cpu, 3),
        "server_cores": round(cpu / seconds, 3),
        "server_processes": end.processes,
        "other_cores": round(max(others, 0) / seconds, 3),  # the kernel counts the machine more coarsely than processes
    }
    if scenario == "idle":
        base, closed = samples["base"][0], samples["closed"][0]
        found |= {
            "rss_mb": {
                "before": round(base.rss_mb, 1),
                "with": round(start.rss_mb, 1),
                "after": round(closed.rss_mb, 1),
            },
            "rss_kb_per_session": round((start.rss_mb - base.rss_mb) * 1024 / units, 2),
            "pss_kb_per_session": round((start.pss_mb - base.pss_mb) * 1024 / units, 2),
        }
    else:
        found["rss_mb"] = {"start": round(start.rss_mb, 1), "end": round(end.rss_mb, 1)}
        found[f"server_cpu_us_per_{UNIT[scenario]}"] = round(cpu * 1e6 / units, 2)
        children = cpu - (end.own_cpu - start.own_cpu)
        found[f"of_it_descendants_us_per_{UNIT[scenario]}"] = round(children * 1e6 / units, 2)
    if server.database_pids:
        found[f"database_cpu_us_per_{UNIT[scenario]}"] = round((end_db.cpu - start_db.cpu) * 1e6 / units, 2)
    return found


if __name__ == "__main__":
    main()
