"""`python -m xmppd`: run a node in the foreground."""

import argparse
import contextlib
import faulthandler
import gc
import os
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

from xmppd.errors import (
    ConfigError,
    DataFolderInUse,
    NodeIdTaken,
    NodeNameTaken,
    NodeRemoved,
    WrongDatabase,
    XmppdError,
)

# docs/exit-codes.md
EXIT_CODES: dict[type[XmppdError], int] = {
    ConfigError: 10,
    DataFolderInUse: 16,
    NodeIdTaken: 16,
    WrongDatabase: 24,
    NodeRemoved: 25,
    NodeNameTaken: 28,
}


def run() -> NoReturn:
    """`main` as a program, which is gone when the node has stopped.

    Python would first wait for every thread that anybody has left behind (a module's, one that looks up a name or waits
    for a disk), however long that takes, and whoever stops a node with it. What has to be kept is kept by then.
    """
    try:
        code = main()
    except SystemExit as exc:  # argparse
        code = exc.code if isinstance(exc.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and serve; the exit code of the process."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.dry_run and not arguments.migrate:
        parser.error("--dry-run goes with --migrate")
    # Only now: `--help` should not load the server. Nothing of it is garbage, and looking for some costs a tenth of it.
    gc.disable()
    import asyncio

    import uvloop

    from xmppd import config, log
    from xmppd.server import Server, software_version

    gc.enable()
    if arguments.version:
        print(f"xmppd {software_version()}")
        return 0
    # What each thread was doing, when the process dies of a signal: also that of a watchdog (SIGABRT).
    faulthandler.enable()
    overrides: dict[str, Any] = {}
    if arguments.data_dir is not None:
        overrides["data_dir"] = str(arguments.data_dir)
    try:
        loaded = config.load(arguments.config, overrides=overrides, node=arguments.name)
        if arguments.check or arguments.dump_config:
            return _look(loaded, dump=arguments.dump_config)
        if arguments.new_identity:
            return _new_identity(loaded.data_dir)
        if arguments.migrate:
            from xmppd.migration import run as migration

            return asyncio.run(migration(loaded, dry=arguments.dry_run))
        log.setup_from(loaded)
        # Never closed: that would wait for threads, too, and for tasks that do not heed being cancelled.
        again = asyncio.Runner(loop_factory=uvloop.new_event_loop).run(_serve(Server, loaded))
    except XmppdError as exc:
        print(f"xmppd: {exc}", file=sys.stderr)
        return next((code for kind, code in EXIT_CODES.items() if isinstance(exc, kind)), 1)
    except KeyboardInterrupt:
        return 130
    if again:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)  # what is ignored would stay so in the new program
        os.execv(sys.executable, [sys.executable, "-m", "xmppd", *(sys.argv[1:] if argv is None else argv)])
    return 0


def _look(loaded: Any, *, dump: bool) -> int:
    """Start nothing; ConfigError when it could not start."""
    from xmppd import config
    from xmppd.check import check, effective_options

    prepared, warnings = check(loaded)
    for warning in warnings:
        print(f"xmppd: warning: {warning}", file=sys.stderr)
    if dump:
        print(config.dump(loaded, effective_options(prepared)), end="")
    else:
        print(f"{loaded.source}: no problems found")
    return 0


def _new_identity(data_dir: Path) -> int:
    """A copied data folder, or one of a removed node, becomes that of a new node."""
    from xmppd.identity import new_identity

    old, new = new_identity(data_dir)
    print(f"{data_dir}: node id {old} is now {new}; the node has never joined anything")
    return 0


async def _serve(server: Any, loaded: Any) -> bool:
    again: bool = await server(loaded).run()
    return again


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="xmppd", description="A clustered XMPP server; runs in the foreground.")
    parser.add_argument("--config", type=Path, help="xmppd.yml; else $XMPPD_CONFIG, ./etc/, /etc/xmppd/, defaults")
    parser.add_argument("--node", "--name", "--sname", dest="name", help="this node's name, such as xmppd@node01")
    parser.add_argument("--data-dir", type=Path, help="where the node keeps what is its own (`data_dir`)")
    look = parser.add_mutually_exclusive_group()
    look.add_argument("--check", action="store_true", help="validate the configuration, start nothing; 0, or 10")
    look.add_argument("--dump-config", action="store_true", help="print every value and where it came from")
    look.add_argument(
        "--new-identity", action="store_true", help="make a copied data folder, or a removed node's, one of a new node"
    )
    look.add_argument("--migrate", action="store_true", help="bring the database's tables to this version, and end")
    parser.add_argument(
        "--dry-run", action="store_true", help="with --migrate: print what would be done, change nothing"
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    return parser


if __name__ == "__main__":
    run()
