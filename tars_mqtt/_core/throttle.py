"""Warnings about a condition that lasts, without a line per message."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Throttle:
    """Lets one event through per *interval* and counts the others. Any thread."""

    def __init__(self, interval: float = 5.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval = interval
        self._clock = clock
        self._lock = threading.Lock()
        self._next = float("-inf")
        self._held_back = 0

    def admit(self, count: int = 1) -> int:
        """Return how many events to report now: those held back and these, or 0 to stay silent."""
        with self._lock:
            total = self._held_back + count
            now = self._clock()
            if now < self._next:
                self._held_back = total
                return 0
            self._next = now + self._interval
            self._held_back = 0
            return total
