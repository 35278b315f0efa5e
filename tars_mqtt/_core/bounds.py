"""How much may be held at once, and who waits until something leaves."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable

from tars_mqtt.errors import QueueFullError


class Bounds:
    """Counts messages and their bytes, refuses more than so many, and tells who waits when it is worth trying again.

    A place is for one: as long as places are all that lack, as many are told as messages left. Where bytes are short,
    which fit depends on sizes: then as many are told as the smallest of them would have room, and one that is told and
    does not fit passes it on to all the others.

    Args:
        lock: The queue's. Everything but the last group of methods is called under it.
        most: Messages.
        most_bytes: Bytes of them.
        settings: The names of these two, for the errors.
    """

    def __init__(self, lock: threading.Lock, most: int, most_bytes: int, settings: tuple[str, str]) -> None:
        self._lock = lock
        self._most = most
        self._most_bytes = most_bytes
        self._settings = settings
        self._left = threading.Condition(lock)
        self._waiting = 0
        self._callbacks: deque[Callable[[], None]] = deque()
        # Of all who were refused since nobody waited:
        self._short = False  # whether one lacked more than a place
        self._least: int | None = None  # bytes
        self._smaller_may_fit = False  # than the one that was refused last, and may not block
        self._all_notified = self._all_called = True  # of what left last
        self.held = 0
        """Messages."""
        self.held_bytes = 0

    def fits(self, size: int) -> bool:
        """Whether there is room for a message of so many bytes."""
        return self.held < self._most and self.held_bytes + size <= self._most_bytes

    @property
    def waited_for(self) -> bool:
        """Whether somebody waits for room."""
        return self._waiting > 0 or bool(self._callbacks)

    def take(self, size: int) -> None:
        """A message is held, whether it fits or not."""
        self.held += 1
        self.held_bytes += size

    def wait(self, size: int, timeout: float | None, called_off: Callable[[], bool]) -> None:
        """Wait until a message fits, or the wait is called off. Gives the lock away meanwhile.

        Whoever was told of a place and does not `take` it owes it to the next in line: see `leave_to_next`.

        Args:
            size: Bytes.
            timeout: Seconds; None waits for ever, 0 not at all.
            called_off: Asked whenever something left, and by `notify_all`.

        Raises:
            QueueFullError: No room came free in time, or never will.
        """
        if size > self._most_bytes:
            raise QueueFullError(
                f"the message of {size:,} bytes is larger than all that may be held: raise {self._settings[1]}",
                retriable=False,
            )

        def over() -> bool:
            if self.fits(size) or called_off():
                return True
            smaller_may_fit = self._refused(size)
            if timeout == 0:
                self._smaller_may_fit = self._smaller_may_fit or smaller_may_fit
            elif smaller_may_fit and not self._all_notified:
                self._all_notified = True
                self._left.notify_all()
            return False

        self._waiting += 1
        try:
            if not self._left.wait_for(over, timeout):
                raise QueueFullError(
                    f"{self.held:,} outgoing messages with {self.held_bytes:,} bytes are held already: "
                    f"publish slower, or raise {' or '.join(self._settings)}"
                )
        finally:
            self._waiting -= 1

    def _refused(self, size: int) -> bool:
        """Note the size of a refused message; True when a smaller one that waits might still fit."""
        self._least = size if self._least is None else min(self._least, size)
        self._short = self._short or self.held_bytes + size > self._most_bytes
        return self._short and self._places() > 0

    def _places(self) -> int:
        """How many of the smallest that wait have room."""
        return max(0, min(self._most - self.held, (self._most_bytes - self.held_bytes) // (self._least or 1)))

    def give(self, count: int, size: int) -> int:
        """Messages left, of so many bytes in all; returns how many to `call_back`, without the lock."""
        before = self._places() if self._short else 0
        self.held -= count
        self.held_bytes -= size
        told = count
        if self._waiting or self._callbacks:
            if self._short:
                told = max(count, self._places() - before)
            self._all_notified = told >= self._waiting
            self._all_called = told >= len(self._callbacks)
            self._left.notify(told)
        else:
            self._short = False
            self._least = None
        return told

    def clear(self) -> None:
        """All that was held is given up."""
        self.held = self.held_bytes = 0
        self._left.notify_all()

    def leave_to_next(self) -> None:
        """A place that was waited for is not wanted any more; then `call_back` one, without the lock."""
        self._left.notify()

    def notify_all(self) -> None:
        """Have all who wait look again; then `call_back` all others, without the lock."""
        self._left.notify_all()

    # -- for whoever may not block: without the lock ---------------------------------------------

    def when_room(self, callback: Callable[[], None]) -> None:
        """Have *callback* called once, when it is worth trying again."""
        self.pass_on()
        with self._lock:
            self._callbacks.append(callback)

    def pass_on(self) -> None:
        """A caller that was called did not fit: if a smaller message might, call back everybody who waits."""
        with self._lock:
            tell = self._smaller_may_fit and not self._all_called
            self._smaller_may_fit = False
            self._all_called = self._all_called or tell
        if tell:
            self.call_back()

    def never_mind(self, callback: Callable[[], None]) -> None:
        """Undo `when_room`; where the call has come already, it goes to the next in line."""
        try:
            self._callbacks.remove(callback)
        except ValueError:
            self.call_back(1)

    def call_back(self, most: int | None = None) -> None:
        """Call so many of those who may not block, or all."""
        if not self._callbacks:
            return
        with contextlib.suppress(IndexError):  # another thread may take the last one
            for _ in range(len(self._callbacks) if most is None else most):
                self._callbacks.popleft()()
