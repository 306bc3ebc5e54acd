"""Long work over many sessions, in slices between which the loop turns."""

import time
from collections.abc import Iterable, Iterator
from typing import Final, TypeVar

T = TypeVar("T")
_SLICE: Final = 0.003  # seconds
_LOOK: Final = 32  # steps between two looks at the clock


class Slice:
    """`over` is true when others should have their turn; then a new slice has begun."""

    def __init__(self) -> None:
        self._end = time.monotonic() + _SLICE
        self._steps = 0

    @property
    def over(self) -> bool:
        self._steps += 1
        if self._steps % _LOOK:
            return False
        now = time.monotonic()
        if now < self._end:
            return False
        self._end = now + 2 * _SLICE  # one for the others
        return True


def sliced(things: Iterable[T], slice_: Slice) -> Iterator[T | None]:
    """The things, and None where others should have their turn."""
    for thing in things:
        yield thing
        if slice_.over:
            yield None
