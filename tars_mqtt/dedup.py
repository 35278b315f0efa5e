"""Handling each message once: which ids are in work, and which were handled lately."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

from tars_mqtt.errors import OutboxError

if TYPE_CHECKING:
    from tars_mqtt.outbox import Outbox

__all__ = ["DurableDeduplicator", "MessageDeduplicator"]

logger = logging.getLogger("tars_mqtt.dispatch")


class MessageDeduplicator:
    """Remembers keys for a time, least recently seen forgotten first. Any thread.

    A key is *claimed* when its handling begins, *kept* when it succeeded and *released* when it
    failed, so that a redelivery after a failure is handled. A claimed key is never forgotten; a kept
    one when *ttl* seconds have passed since it was kept, however often it was met in between.

    Args:
        ttl: Seconds, above 0.
        max_entries: How many kept keys are remembered, above 0.
        clock: Monotonic seconds.
    """

    def __init__(self, ttl: float, max_entries: int, clock: Callable[[], float] = time.monotonic) -> None:
        if not ttl > 0:
            raise ValueError(f"ttl must be above 0, not {ttl!r}")
        if max_entries < 1:
            raise ValueError(f"max_entries must be at least 1, not {max_entries!r}")
        self._ttl = ttl
        self._max_entries = max_entries
        self._clock = clock
        self.lives = 0
        """How often all claims were given up: those of earlier lives count no more."""
        # Guarded by _lock:
        self._lock = threading.Lock()
        self._claimed: set[Hashable] = set()
        self._kept: OrderedDict[Hashable, float] = OrderedDict()

    def claim(self, key: Hashable, life: int | None = None) -> bool:
        """Claim *key*; False when it is in work, or was handled lately, or *life* is not that of `lives` any more."""
        with self._lock:
            if key in self._claimed or life not in (None, self.lives):
                return False
            expiry = self._kept.get(key)
            if expiry is not None:
                if self._clock() < expiry:
                    self._kept.move_to_end(key)
                    return False
                del self._kept[key]
            self._claimed.add(key)
            return True

    def keep(self, key: Hashable) -> None:
        """The key is handled: remember it."""
        self._keep(key)

    def _keep(self, key: Hashable) -> Hashable | None:
        """Remember a key; returns the one that is forgotten for it."""
        with self._lock:
            self._claimed.discard(key)
            self._kept[key] = self._clock() + self._ttl
            self._kept.move_to_end(key)
            return self._kept.popitem(last=False)[0] if len(self._kept) > self._max_entries else None

    def release(self, key: Hashable, life: int | None = None) -> None:
        """The handling failed: the next one may claim it; unless a claim of an earlier *life* was meant."""
        with self._lock:
            if life in (None, self.lives):
                self._claimed.discard(key)

    def release_all(self) -> None:
        """Whoever has a claim will not be heard of any more, or too late."""
        with self._lock:
            self._claimed.clear()
            self.lives += 1

    def clear(self) -> None:
        """Forget what was kept; what is claimed stays claimed."""
        with self._lock:
            self._kept.clear()

    def __len__(self) -> int:
        return len(self._claimed) + len(self._kept)


class DurableDeduplicator(MessageDeduplicator):
    """A deduplicator that remembers across restarts what it kept, once it has a file to do so."""

    _outbox: Outbox | None = None
    _client_id = ""

    def attach(self, outbox: Outbox, client_id: str = "") -> None:
        """Recall what *outbox* remembers, and keep there from now on."""
        now = self._clock()
        recalled = outbox.remembered(self._max_entries)
        with self._lock:
            for key, left in recalled:
                self._kept[key] = now + left
            self._outbox = outbox
            self._client_id = client_id

    def claim(self, key: Hashable, life: int | None = None) -> bool:
        return super().claim(repr(key), life)

    def keep(self, key: Hashable) -> None:
        """The key is handled: remember it, on disk when this returns, so before the acknowledgement."""
        text = repr(key)
        forgotten = self._keep(text)
        if self._outbox is not None:
            try:
                self._outbox.remember(text, self._ttl, forgotten)
            except OutboxError as error:
                logger.error(
                    "a redelivery after a restart will be handled again: %s",
                    error,
                    extra={"client_id": self._client_id},
                )

    def release(self, key: Hashable, life: int | None = None) -> None:
        super().release(repr(key), life)
