"""A clock that moves only when told."""

from __future__ import annotations


class FakeClock:
    """Stands in for ``time.monotonic``: call it for the time."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        assert seconds >= 0, "a monotonic clock never goes back"
        self.now += seconds
