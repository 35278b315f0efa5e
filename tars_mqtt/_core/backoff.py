"""How long to wait before the next connection attempt."""

from __future__ import annotations

import random
from collections.abc import Callable


class Backoff:
    """Exponential delays with full jitter, so that a fleet does not come back as one.

    Each delay is drawn evenly from zero to a ceiling that doubles from *minimum* to *maximum*.
    Owned by the network thread.
    """

    def __init__(
        self, minimum: float, maximum: float, uniform: Callable[[float, float], float] = random.uniform
    ) -> None:
        self._minimum = minimum
        self._maximum = maximum
        self._uniform = uniform
        self.attempt = 0

    @property
    def ceiling(self) -> float:
        """The longest that the next delay can be."""
        # The exponent is bounded: 2.0 ** 1024 overflows after some hours of outage.
        return min(self._maximum, self._minimum * 2.0 ** min(self.attempt, 32))

    def next(self) -> float:
        """Draw the next delay and double the ceiling."""
        delay = self._uniform(0.0, self.ceiling)
        self.attempt += 1
        return delay

    def longest(self) -> float:
        """Draw from the upper half of the longest delay: for what retrying is unlikely to cure."""
        self.attempt += 1
        return self._uniform(self._maximum / 2, self._maximum)

    def reset(self) -> None:
        """Start again from the minimum."""
        self.attempt = 0
