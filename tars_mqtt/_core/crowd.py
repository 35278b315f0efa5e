"""Large messages of QoS 0 that come faster than they leave."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

LARGE_BYTES = 49_152
"""Packets larger than this make a crowd."""

_CROWD_BYTES = 1_048_576

PACE_TIME = 0.005
"""Seconds for which a publisher waits at most; its message is taken already."""


class Crowd:
    """Has those who publish large messages wait a moment for the network thread.

    That one waits for the interpreter while they make more; and more than about a megabyte is out of the
    processor's cache before it leaves, and takes fresh memory each time.

    Args:
        lock: The queue's. `grew` and `shrank` are called under it, the other methods without it, on any thread.
    """

    def __init__(self, lock: threading.Lock) -> None:
        self.there = False
        """Read without the lock."""
        # Guarded by it:
        self._lock = lock
        self._gone = threading.Condition(lock)
        self._callbacks: list[Callable[[], None]] = []

    def grew(self, queued_bytes: int) -> None:
        """A large message joined, with which that many bytes wait."""
        if queued_bytes > _CROWD_BYTES:
            self.there = True

    def shrank(self, queued_bytes: int) -> None:
        """Messages left; then `tell`, without the lock."""
        if self.there and queued_bytes <= _CROWD_BYTES // 2:
            self.there = False
            self._gone.notify_all()

    def tell(self) -> None:
        """Call back those who wait for it to go, if it has."""
        if self._callbacks and not self.there:
            with self._lock:
                callbacks, self._callbacks = self._callbacks, []
            for callback in callbacks:
                callback()

    def wait(self) -> None:
        """Wait until it has gone, but not for long."""
        with self._lock:
            self._gone.wait_for(lambda: not self.there, PACE_TIME)

    def when_gone(self, callback: Callable[[], None]) -> None:
        """Have *callback* called once, when it has gone; for whoever may not block."""
        with self._lock:
            self._callbacks.append(callback)
        self.tell()  # it may have gone in between

    def never_mind(self, callback: Callable[[], None]) -> None:
        """Undo `when_gone`."""
        with self._lock, contextlib.suppress(ValueError):
            self._callbacks.remove(callback)
