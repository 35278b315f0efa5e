"""How long a shutdown may take, of which several callers have each an opinion."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

_RESERVE_SHARE = 0.1
"""Of the time for a shutdown: kept for its last steps, whatever those before took."""

_LOOK = 0.1
"""Seconds between two looks at whether somebody with less time has come."""


class Deadline(NamedTuple):
    """Of one caller."""

    at: float
    """On the monotonic clock."""
    reserve: float
    """Seconds that each of the last steps has to itself."""


class Deadlines:
    """Those of all callers that wait for the same; the first of them counts. Any thread."""

    def __init__(self) -> None:
        self._deadlines: list[Deadline] = []  # each step on it is atomic

    @contextlib.contextmanager
    def within(self, timeout: float) -> Iterator[None]:
        """Somebody waits, or does the work, and has so many seconds."""
        deadline = self.add(timeout)
        try:
            yield
        finally:
            self._deadlines.remove(deadline)

    def add(self, timeout: float) -> Deadline:
        """From now on there is no more time than that."""
        deadline = Deadline(time.monotonic() + timeout, timeout * _RESERVE_SHARE)
        self._deadlines.append(deadline)
        return deadline

    def left(self, reserves: int = 0) -> float:
        """Seconds, without the reserves of so many steps."""
        deadline = min(self._deadlines, default=None)
        if deadline is None:  # Ctrl-C has ended the life halfway, and its deadlines with it
            return 0.0
        return max(0.0, deadline.at - reserves * deadline.reserve - time.monotonic())

    def wait(self, step: Callable[[float], bool], reserves: int = 0) -> bool:
        """Have *step* wait until it is true; False when the time was up first.

        Args:
            step: Waits for so many seconds, and no longer. Called again and again, for there may be less time by then.
            reserves: See `left`.
        """
        while not step(min(self.left(reserves), _LOOK)):
            if not self.left(reserves):
                return False
        return True
