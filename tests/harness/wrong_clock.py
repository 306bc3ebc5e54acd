"""A node whose wall clock is wrong: `python wrong_clock.py SECONDS --config ...`, ahead by so many, or behind."""

import sys
import time

SECONDS = float(sys.argv.pop(1))
_time, _time_ns = time.time, time.time_ns

if __name__ == "__main__":
    del sys.path[0]  # our own folder has modules that are called like some of Python's
    time.time = lambda: _time() + SECONDS
    time.time_ns = lambda: _time_ns() + round(SECONDS * 1e9)

    from xmppd.__main__ import run

    run()
