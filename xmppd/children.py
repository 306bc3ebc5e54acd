"""Child processes of a node: hear of their end without a thread, and leave no zombie."""

import asyncio
import os
import subprocess
from collections.abc import Callable


def when_ended(process: subprocess.Popen[bytes], call: Callable[[], None]) -> None:
    """Reap a process when it has ended, and call back; on the running loop."""
    loop = asyncio.get_running_loop()
    handle = os.pidfd_open(process.pid)

    def ended() -> None:
        loop.remove_reader(handle)
        os.close(handle)
        process.wait()
        call()

    loop.add_reader(handle, ended)
