"""The C library's memory allocator, told to give back what was freed.

A TLS connection has a buffer of 256 KiB, of which it touches a page or two. When connections end, glibc keeps all of it
for the next ones, which touch other pages: after some waves of them a node that never had more than 2000 at once would
hold 600 MiB. `malloc_trim` gives the pages back, some 10 ms for 100 MiB, so it is called when it is worth it. Elsewhere
(musl, macOS) there is nothing to call, and nothing is done.
"""

import asyncio
import ctypes
import time
from typing import Final

from xmppd.log import get_logger
from xmppd.metrics import Counters

_EVERY: Final = 1.0  # seconds
_SHARE: Final = 200  # at most this part of the time
_ENDED: Final = 100  # connections
_log = get_logger(__name__)


async def give_back(counters: Counters) -> None:
    """Until it is cancelled: look whether so many connections have ended that it is time."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return
    trim.argtypes = [ctypes.c_size_t]
    seen, took = 0, 0.0
    while True:
        await asyncio.sleep(max(_EVERY, took * _SHARE))
        ended = counters.accepted - counters.open
        if ended - seen >= _ENDED:
            seen = ended
            began = time.perf_counter()
            trim(0)
            took = time.perf_counter() - began
            counters.given_back += 1
            _log.debug("memory given back", ms=round(took * 1000, 1))
