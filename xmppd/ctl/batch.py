"""`xmppctl batch`: commands from standard input, one a line with the shell's quotes, over one connection."""

import shlex
import sys

from xmppd.ctl.client import Client, NotReachable
from xmppd.ctl.main import USAGE, Options, frame_of, refuse, timeout_of
from xmppd.ctl.settings import Settings
from xmppd.errors import CommandError

NOT_HERE = ("batch", "start", "started", "stopped")


def run(options: Options, settings: Settings) -> int:
    """Carry out all lines, also after one failed; blank lines and those that begin with # are skipped.

    The exit code is the worst (greatest) of all. A connection that breaks ends the batch, naming the line.
    """
    if len(options.argv) > 1:
        raise CommandError("batch takes its commands from standard input, and no argument", USAGE)
    if "password_stdin" in options.flags:
        raise CommandError("in a batch the password stands in its line", USAGE)
    client = Client(settings.socket, settings.node, timeout=timeout_of(options))
    worst = 0
    try:
        for number, raw in enumerate(sys.stdin.buffer, 1):
            worst = max(worst, _line(client, raw, number, options, settings))
            sys.stdout.flush()  # whoever reads along wants each answer when it is there
    finally:
        client.close()
    return worst


def _line(client: Client, raw: bytes, number: int, options: Options, settings: Settings) -> int:
    try:
        argv = words(raw, number)
        return client.request(frame_of(argv, options, settings)) if argv else 0
    except NotReachable as exc:
        raise NotReachable(settings.node, f"line {number}: {exc.hint}") from None
    except CommandError as exc:
        if exc.code != USAGE:  # no answer came in time; the next one would be this one's
            raise CommandError(f"line {number}: {exc.text}", exc.code) from None
        return refuse(exc, options.json)


def words(raw: bytes, number: int) -> list[str]:
    """The words of a line; none for a comment. Raises CommandError (usage) naming the line."""
    try:
        line = raw.decode().strip()
        argv = [] if line.startswith("#") else shlex.split(line)
    except UnicodeDecodeError:
        raise CommandError(f"line {number}: not UTF-8", USAGE) from None
    except ValueError as exc:
        raise CommandError(f"line {number}: {str(exc).lower()}", USAGE) from None
    if argv and argv[0] in NOT_HERE:
        raise CommandError(f"line {number}: {argv[0]} cannot stand in a batch", USAGE)
    return argv
