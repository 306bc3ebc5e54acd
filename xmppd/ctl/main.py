"""xmppctl: `xmppctl [options] command [arguments]`; docs/xmppctl.md describes it.

The common path is: read a few lines, connect, send argv, print, exit. What is not on it is imported where it is needed.
"""

import os
import sys

from xmppd.ctl.client import TIMEOUT, Client, NotReachable, complain, write
from xmppd.ctl.settings import Settings
from xmppd.errors import CommandError

USAGE = 2
INTERRUPTED = 130
BROKEN_PIPE = 141

VALUES = {"--config": "config", "-f": "config", "--node": "node", "-n": "node"}
VALUES |= {"--data-dir": "data_dir", "--ctl-config": "ctl_config", "-c": "ctl_config"}
FLAGS = {"--json": "json", "--no-timeout": "no_timeout", "-t": "no_timeout"}
FLAGS |= {"--password-stdin": "password_stdin", "--local": "local"}
LIFECYCLE = ("start", "started", "stopped")

USAGE_TEXT = """Usage: xmppctl [options] command [arguments]

Commands that work without a running node:
  start      Start the node in the background and wait until it serves
  started    Wait until the node serves
  stopped    Wait until the node has stopped
  batch      Run commands from standard input, one a line
All other commands are the node's: `xmppctl help` lists them, `xmppctl help COMMAND` describes one.

Options, before the command:
  -f, --config FILE      xmppd.yml          ($XMPPD_CONFIG; else etc/xmppd.yml, /etc/xmppd/xmppd.yml)
  -n, --node NAME        the node that is to do it, if it is not the one here ($XMPPD_NODE)
  --data-dir DIR         where xmppd.sock is ($XMPPD_DATA_DIR; else as the configuration says)
  -c, --ctl-config FILE  xmppctl.cfg        ($XMPPD_CTL_CONFIG; else etc/xmppctl.cfg, /etc/xmppd/xmppctl.cfg)
  --json                 print JSON
  --local                answer for this node alone
  --password-stdin       take the password from standard input; `-` in its place does so too
  -t, --no-timeout       wait for ever
Exit codes: 0 done, 1 not done, 2 wrong usage, 3 the node cannot be reached, 10-33 see docs/exit-codes.md
"""


class Options:
    """The command line, taken apart: options stand before the command, all behind it is the command's."""

    def __init__(self, argv: list[str]) -> None:
        self.values: dict[str, str] = {}
        self.flags: set[str] = set()
        self.help = False
        place = 0
        while place < len(argv) and argv[place].startswith("-") and argv[place] != "-":
            word, equals, value = argv[place].partition("=")
            place += 1
            if word == "--":
                break
            if word in ("--help", "-h"):
                self.help = True
            elif word in FLAGS and not equals:
                self.flags.add(FLAGS[word])
            elif word in VALUES:
                if not equals:
                    if place == len(argv):
                        raise CommandError(f"option {word} needs a value", USAGE)
                    value = argv[place]
                    place += 1
                if not value:
                    raise CommandError(f"option {word} needs a value", USAGE)
                self.values[VALUES[word]] = value
            else:
                raise CommandError(f"unknown option '{word}'; `xmppctl --help` lists them", USAGE)
        self.argv = argv[place:]

    @property
    def json(self) -> bool:
        return "json" in self.flags


def main(argv: list[str] | None = None) -> int:
    """Run a command line and return the exit code; never a traceback for what an operator may do."""
    arguments = sys.argv[1:] if argv is None else argv
    as_json = endless = False
    try:
        options = Options(arguments)
        as_json, endless = options.json, options.argv[:1] == ["watch"]
        code = run(options)
        sys.stdout.flush()
        return code
    except CommandError as exc:
        return refuse(exc, as_json)
    except KeyboardInterrupt:
        if endless:
            return INTERRUPTED  # that is how it ends
        complain("\nxmppctl: interrupted; what the node had begun it goes on with\n")
        return INTERRUPTED
    except BrokenPipeError:
        # the reader (`| head`) has left; keep the interpreter from complaining when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


def run(options: Options) -> int:
    if options.help or not options.argv:
        write(USAGE_TEXT)
        return 0 if options.help else USAGE
    settings = Settings(**options.values)
    verb = options.argv[0]
    if verb in LIFECYCLE:
        from xmppd.ctl import lifecycle

        return lifecycle.run(verb, options.argv[1:], settings)
    if verb == "batch":
        from xmppd.ctl import batch

        return batch.run(options, settings)
    return one(options, settings)


def one(options: Options, settings: Settings) -> int:
    """The common path: one command of the node's."""
    try:
        client = Client(settings.socket, settings.node, timeout=timeout_of(options))
    except NotReachable:
        if options.argv == ["help"]:
            write(USAGE_TEXT)
            return 0
        raise
    try:
        frame = frame_of(options.argv, options, settings)
        if "password_stdin" in options.flags:
            frame["secret"] = typed_secret("password")
        return client.request(frame, ask=typed_secret)
    finally:
        client.close()


def timeout_of(options: Options) -> float | None:
    return None if "no_timeout" in options.flags else TIMEOUT


def frame_of(argv: list[str], options: Options, settings: Settings) -> dict[str, object]:
    return {
        "argv": argv,
        "json": options.json,
        "local": "local" in options.flags,
        "node": settings.given_node,
    }


def typed_secret(name: str) -> str | None:
    """The next line of standard input, without echo where that is a terminal."""
    if sys.stdin.isatty():
        import getpass

        return getpass.getpass(f"{name}: ")
    line = sys.stdin.buffer.readline()
    if not line:
        return None
    try:
        return line.removesuffix(b"\n").removesuffix(b"\r").decode()
    except UnicodeDecodeError:
        raise CommandError(f"the {name} on standard input is not UTF-8", USAGE) from None


def refuse(exc: CommandError, as_json: bool) -> int:
    """Print a refusal of xmppctl's own, in the words of the node's."""
    if as_json:
        import json

        write(json.dumps({"status": "error", "code": exc.code, "message": exc.text}, ensure_ascii=False) + "\n")
    elif isinstance(exc, NotReachable):
        write(f"{exc.text}\n")
    else:
        write(f"Error: {exc.text}\n")
    sys.stdout.flush()
    if isinstance(exc, NotReachable):
        complain(f"{exc.hint}\n")
    return exc.code


if __name__ == "__main__":
    sys.exit(main())
