"""What ends the processes of a test run that was killed itself, as by a time-out."""

import subprocess


class Watcher:
    """Kills a process when we are gone.

    A parent-death signal would not do: it is lost when the process changes its user, and follows the thread, not the
    process, that started it.
    """

    def __init__(self, pid: int) -> None:
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", 'read -r _; kill -9 "$0"', str(pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def dismiss(self) -> None:
        """Before the process ends: afterwards its number may be another's."""
        self._process.kill()
        self._process.communicate()
