"""The outgoing messages that lie in the durable outbox, and which of them are in memory as well."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

from tars_mqtt._core.outgoing import Outgoing, Stored, left_in_outbox
from tars_mqtt._core.property import Properties
from tars_mqtt.errors import OutboxError
from tars_mqtt.message import PublishReceipt

if TYPE_CHECKING:
    from tars_mqtt.outbox import Outbox

logger = logging.getLogger("tars_mqtt.publish")

_MOST_IN_MEMORY = 1024
_PRUNE_DELAY = 0.005
"""Seconds that acknowledged messages gather for one deletion: a kill in between repeats them."""
_RETRY_DELAY = 1.0


class Spool:
    """Stands between the queue in memory and the file. Messages enter the queue in the order of their numbers.

    Args:
        outbox: The file.
        later: Runs a call on another thread, after so many seconds.
        max_age: Seconds after which a message is not worth sending any more; 0 for never.
    """

    def __init__(
        self,
        outbox: Outbox,
        later: Callable[[float, Callable[[], None]], None],
        max_age: float,
        client_id: str = "",
    ) -> None:
        self._client_id = client_id
        self._outbox = outbox
        self._later = later
        self._max_age = max_age
        # Guarded by the lock of the queue:
        self.on_disk_only, self.bytes_found = outbox.totals()
        self._last_in_memory = 0
        self._loading = False
        # A receipt that nobody holds tells nobody anything: it need not take up memory.
        self._receipts: weakref.WeakValueDictionary[int, PublishReceipt] = weakref.WeakValueDictionary()
        # One that was taken back tells us something; each step on these is atomic.
        self._taken_back: set[PublishReceipt] = set()
        # Guarded by _lock:
        self._lock = threading.Lock()
        self._closed = False
        self._pruning = False
        self._committing = False

    def store(self, message: Outgoing, stored: Callable[[Outgoing], None]) -> None:
        """Return when *message* is on disk; *stored* has been called with it, in order of numbers.

        Raises:
            OutboxError: It could not be written.
        """
        self._outbox.store(*_row(message), _committed(message, stored), _properties(message))

    def store_soon(
        self,
        message: Outgoing,
        stored: Callable[[Outgoing], None],
        failed: Callable[[Outgoing, OutboxError], None],
    ) -> None:
        """Have *stored* or *failed* called with *message*, on another thread as a rule. Does not block.

        What comes while a commit is under way shares the next: without this, a single thread would wait
        for the disk once for each message.
        """
        self._outbox.store_soon(
            *_row(message),
            _committed(message, stored),
            lambda error: failed(message, error),
            _properties(message),
        )
        with self._lock:
            if self._committing:
                return
            if not self._closed:
                self._committing = True
                self._later(0.0, self._commit)
                return
        self.flush()  # it is closed, so this calls *failed*

    def _commit(self) -> None:
        with self._lock:
            self._committing = False
        self.flush()

    def flush(self) -> None:
        """Write what `store_soon` has taken."""
        self._outbox.commit()

    def stays_in_memory(self, message: Outgoing, queued: int) -> bool:
        """Whether *message*, just stored, goes to the queue of so many at once. Holds the queue's lock."""
        assert message.stored is not None
        number = message.stored.number
        if self.on_disk_only or queued >= _MOST_IN_MEMORY:
            self.on_disk_only += 1
            self._receipts[number] = message.receipt
            message.receipt._add_done_callback(self._ended)
            return False
        self._last_in_memory = number
        return True

    def _ended(self, receipt: PublishReceipt) -> None:
        """A message that is only on disk has come to its end: hold the receipt until it is gone from there, too."""
        if receipt.cancelled():
            self._taken_back.add(receipt)

    def wants_more(self, queued: int) -> bool:
        """Whether the queue of so many runs low while there is more on disk.

        Asked without the lock, by the network thread alone: what it misses now, it sees at its next look.
        """
        return self.on_disk_only > 0 and not self._loading and queued < _MOST_IN_MEMORY // 4

    def load(self, loaded: Callable[[list[Outgoing]], None]) -> None:
        """Have the next messages read, and *loaded* called with them. Holds the queue's lock."""
        self._loading = True
        self._load_in(0.0, loaded)

    def _load_in(self, delay: float, loaded: Callable[[list[Outgoing]], None]) -> None:
        with self._lock:
            if not self._closed:
                self._later(delay, lambda: self._load(loaded))

    def _load(self, loaded: Callable[[list[Outgoing]], None]) -> None:
        try:
            rows = self._outbox.fetch(self._last_in_memory, _MOST_IN_MEMORY // 2)
        except OutboxError as error:
            if not self._closed:
                logger.error("%s; trying again", error, extra={"client_id": self._client_id})
                self._load_in(_RETRY_DELAY, loaded)
            return
        messages = []
        for row in rows:
            receipt = self._receipts.pop(row.number, None)
            if receipt is None:
                receipt = PublishReceipt(row.envelope_id, row.topic.decode(), row.qos)
            receipt._remove_done_callback(self._ended)  # the message holds it from now on
            self._taken_back.discard(receipt)
            message = Outgoing(row.topic, row.payload, row.qos, row.retain, receipt)
            if row.properties:
                waited = max(0.0, time.time() - row.stored_at)
                message.properties = Properties.since(row.properties, time.monotonic() - waited)
            message.stored = Stored(row.number, row.stored_at)
            messages.append(message)
        loaded(messages)

    def entered(self, messages: list[Outgoing]) -> None:
        """*messages* are in the queue now. Holds the queue's lock."""
        self._loading = False
        if messages and (last := messages[-1].stored):
            self._last_in_memory = last.number
            self.on_disk_only -= len(messages)
        else:
            self.on_disk_only = 0

    def too_old(self, message: Outgoing) -> bool:
        """Whether *message* is not worth sending any more."""
        stored = message.stored
        return bool(self._max_age and stored and time.time() - stored.at > self._max_age)

    def leave(self, message: Outgoing) -> None:
        """Give up *message*: it stays in the file, unless it was taken back."""
        message.receipt._fail(left_in_outbox())
        if message.receipt.cancelled():
            self.discard(message)

    def discard(self, message: Outgoing) -> None:
        """*message* need not be kept any longer. Does not block."""
        if message.stored is None:
            return
        self._outbox.discard(message.stored.number)
        self._prune_in(_PRUNE_DELAY)

    def _prune_in(self, delay: float) -> None:
        with self._lock:
            if not self._pruning and not self._closed:
                self._pruning = True
                self._later(delay, self._prune)

    def _prune(self) -> None:
        with self._lock:
            self._pruning = False
        try:
            self._outbox.prune()
        except OutboxError as error:
            # Until they are deleted, a restart sends them once more.
            logger.error("%s; trying again", error, extra={"client_id": self._client_id})
            self._prune_in(_RETRY_DELAY)

    def retire(self) -> None:
        """Nothing is sent from here any more, and nothing run later. What was handled may still be remembered."""
        with self._lock:
            self._closed = True
        for number, receipt in list(self._receipts.items()):
            receipt._fail(left_in_outbox())
            if receipt.cancelled():
                self._outbox.discard(number)

    def close(self) -> None:
        """Let go of the file. What was not sent stays in it."""
        with contextlib.suppress(OutboxError):
            self._outbox.prune()
            if left := self._outbox.totals()[0]:
                extra = {"client_id": self._client_id}
                logger.info("%d messages stay in the outbox %s", left, self._outbox.path, extra=extra)
        self._outbox.close()


def _row(message: Outgoing) -> tuple[bytes, bytes, int, bool, str | None]:
    return message.topic, message.payload, message.qos, message.retain, message.receipt.envelope_id


def _properties(message: Outgoing) -> bytes:
    return b"" if message.properties is None else message.properties.raw


def _committed(message: Outgoing, stored: Callable[[Outgoing], None]) -> Callable[[int], None]:
    now = time.time()

    def committed(number: int) -> None:
        message.stored = Stored(number, now)
        stored(message)

    return committed
