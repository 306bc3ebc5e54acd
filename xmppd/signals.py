"""What signals do to the node."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def handled(*, starting: Callable[[], bool], stop: Callable[[], None], reload: Callable[[], object]) -> Iterator[None]:
    """SIGTERM and SIGINT stop the node, also while it starts; SIGHUP makes it read log and configuration anew, or
    stops it when the terminal it was started in has gone.

    From the first moment to the last, so that a signal never finds the default handler, which kills.
    """
    loop = asyncio.get_running_loop()
    main = asyncio.current_task()
    assert main is not None
    interrupted = False
    had_terminal = sys.stdin is not None and sys.stdin.isatty()

    def end() -> None:
        nonlocal interrupted
        if starting():
            interrupted = True
            main.cancel()
        stop()

    def hang_up() -> None:
        if had_terminal and not _terminal_lives():
            stop()
        else:
            reload()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)
    loop.add_signal_handler(signal.SIGHUP, hang_up)
    try:
        yield
    except asyncio.CancelledError:
        if not interrupted:
            raise
        main.uncancel()
    finally:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)  # nothing is left but to exit


def _terminal_lives() -> bool:
    try:
        os.tcgetpgrp(0)
    except OSError:
        return False
    return True
