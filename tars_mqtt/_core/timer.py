"""Calls at a later time, on one thread that exists only when somebody needs it."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable

logger = logging.getLogger("tars_mqtt.dispatch")


class Timer:
    """Runs short calls when they are due. Any thread; started by the first call, ended by `stop`.

    With an outbox its writes are among them: a disk that is slow delays retries and time limits.
    """

    def __init__(self, client_id: str) -> None:
        self._client_id = client_id
        self._numbers = itertools.count()
        # Guarded by _changed:
        self._changed = threading.Condition(threading.Lock())
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._thread: threading.Thread | None = None

    def call_later(self, delay: float, call: Callable[[], None]) -> None:
        """Have *call* run in *delay* seconds; it must not block for long."""
        with self._changed:
            heapq.heappush(self._due, (time.monotonic() + delay, next(self._numbers), call))
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name=f"tars-mqtt/{self._client_id}/timer", daemon=True
                )
                try:
                    self._thread.start()
                except RuntimeError:
                    self._thread = None  # the next call is another attempt
                    raise
            self._changed.notify()

    def stop(self, timeout: float) -> str | None:
        """Forget what is not due, and join the thread; its name, if it is still busy after *timeout* seconds."""
        with self._changed:
            thread, self._thread = self._thread, None
            self._due.clear()
            self._changed.notify()
        if thread is None or thread is threading.current_thread():
            return None
        thread.join(timeout)
        return thread.name if thread.is_alive() else None

    def _run(self) -> None:
        while (call := self._next()) is not None:
            try:
                call()
            except Exception:
                logger.exception("internal error on the timer thread", extra={"client_id": self._client_id})

    def _next(self) -> Callable[[], None] | None:
        with self._changed:
            while self._thread is threading.current_thread():
                wait = self._due[0][0] - time.monotonic() if self._due else None
                if wait is not None and wait <= 0:
                    return heapq.heappop(self._due)[2]
                self._changed.wait(wait)
            return None
