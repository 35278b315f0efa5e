"""Whether the peer is still there."""

from __future__ import annotations

import attrs


@attrs.define
class Liveness:
    """When a connection last showed life. Owned by the network thread.

    The peer is asked for a sign of life after half of the shorter of *keepalive* and *patience*
    without traffic in either direction, and given up after *patience* seconds without a sign of life: a
    byte from it, or progress through a link that is full, where an answer waits behind a long message.
    """

    keepalive: float
    patience: float
    received: float
    sent: float
    signs_of_life: int = 0
    bytes_out: int = 0
    asked: float | None = None
    suspected: bool = False
    """Overdue at the last look: one more look at the socket comes before the verdict."""

    def note(self, now: float, signs_of_life: int, bytes_out: int) -> None:
        """Take note of how many signs of life there were, and how many bytes went, so far."""
        if signs_of_life != self.signs_of_life:
            self.signs_of_life = signs_of_life
            self.received = now
            self.suspected = False
        if bytes_out != self.bytes_out:
            self.bytes_out = bytes_out
            self.sent = now

    def excuse(self, now: float) -> None:
        """Reading is paused, so the broker's silence proves nothing: start the clock anew.

        An answer that is not read is not waited for; the broker needs its pings all the same.
        """
        self.received = now
        self.suspected = False
        if self.asked is not None and now - self.asked >= self._interval():
            self.asked = None

    def ping_due(self, now: float) -> bool:
        """Whether to ask for a sign of life now."""
        return self.asked is None and now >= self._ping_at()

    def overdue(self, now: float) -> float | None:
        """For how many seconds the peer has been silent, if that is too long."""
        silence = now - self.received
        return silence if silence >= self.patience else None

    def deadline(self) -> float:
        """When the next of the two decisions is due."""
        given_up_at = self.received + self.patience
        return given_up_at if self.asked is not None else min(self._ping_at(), given_up_at)

    def _ping_at(self) -> float:
        return min(self.received, self.sent) + self._interval()

    def _interval(self) -> float:
        return min(self.keepalive, self.patience) / 2
