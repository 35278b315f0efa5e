"""Whether packets come and go so fast that it pays to let them gather."""

from __future__ import annotations

_WINDOW = 0.001
"""Seconds that are looked at together."""

_DENSE_RATE = 16_000.0
"""Packets in a second, either way, from which on traffic is dense."""

_DENSE_ROUND = 3.0
"""Packets in one look at the connection. A dialogue may be fast, but has one at a time: it must not wait."""

_GATHERING_TIME = 0.0002
"""Seconds. Each read and each write carries more, and the threads on both sides of the connection are woken
for many messages at a time."""


class Density:
    """Counts packets, and says how long to leave dense traffic to itself. Owned by the network thread."""

    def __init__(self) -> None:
        self._packets = 0
        self._rounds = 0
        self._since = 0.0
        self._dense = False

    def note(self, packets: int) -> None:
        """That many packets were read, or are about to be written, at once."""
        if packets:
            self._packets += packets
            self._rounds += 1

    def pause(self, now: float) -> float:
        """Seconds to wait before the next look at the connection; 0 while traffic is thin."""
        elapsed = now - self._since
        if elapsed >= _WINDOW:
            packets = self._packets
            self._dense = packets >= _DENSE_RATE * elapsed and packets >= _DENSE_ROUND * self._rounds
            self._packets = self._rounds = 0
            self._since = now
        return _GATHERING_TIME if self._dense else 0.0
