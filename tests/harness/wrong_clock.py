"""A node whose wall clock is wrong: `python wrong_clock.py SECONDS --config ...`, ahead by so many, or behind."""

import sys
import time

SECONDS = float(sys.argv.pop(1))
_time, _time_ns = time.time, time.time_ns

if __name__ == "__main__":
    time.time = lambda: _time() + SECONDS
    time.time_ns = lambda: _time_ns() + round(SECONDS * 1e9)

    from xmppd.__main__ import run

    run()
