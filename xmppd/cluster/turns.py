"""Long work in short steps: nothing that anybody waits for may stand behind a hundred thousand rows."""

from collections import deque
from collections.abc import Callable
from typing import Any, Final

from xmppd.log import get_logger

SLICE: Final = 0.003  # seconds of one turn of the loop, for all work together

_log = get_logger("cluster")


class Turns:
    """Takes steps of several pieces of work by turns, for a few milliseconds in each turn of the event loop.

    A step is a plain function that takes a millisecond at most and says whether there is more to do."""

    def __init__(
        self, call_soon: Callable[[Callable[[], None]], Any], clock: Callable[[], float], *, slice_: float = SLICE
    ) -> None:
        self._call_soon = call_soon
        self._clock = clock
        self._slice = slice_
        self._steps: deque[Callable[[], bool]] = deque()
        self._scheduled = False

    def add(self, step: Callable[[], bool]) -> None:
        """Take this step from the next turn on, until it answers False. One that crashes is logged and left."""
        self._steps.append(step)
        self._schedule()

    def _schedule(self) -> None:
        if self._steps and not self._scheduled:
            self._scheduled = True
            self._call_soon(self._turn)

    def _turn(self) -> None:
        self._scheduled = False
        end = self._clock() + self._slice
        while self._steps:
            step = self._steps.popleft()
            if self._take(step):
                self._steps.append(step)
            if self._clock() >= end:
                break
        self._schedule()

    @staticmethod
    def _take(step: Callable[[], bool]) -> bool:
        try:
            return step()
        except Exception as exc:
            _log.error("task failed", exc=exc, task=getattr(step, "__qualname__", str(step)))
            return False
