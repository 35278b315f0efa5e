"""The threads that call handlers."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable

import attrs

from tars_mqtt._core.dispatch import Dispatcher, Turn
from tars_mqtt._core.lane import Delivery
from tars_mqtt._core.stats import Counters

logger = logging.getLogger("tars_mqtt.dispatch")


@attrs.define(eq=False)
class Watch:
    """One call of a handler that has a time limit. Guarded by the pool's lock."""

    turn: Turn
    delivery: Delivery
    thread: threading.Thread
    returned: bool = False
    expired: bool = False


class WorkerPool(Dispatcher):
    """Calls handlers on at most *workers* threads, started when first needed.

    A handler that exceeds its time limit keeps its thread until it returns; another thread takes
    the place, as long as no more than *workers* are stuck so.

    Args:
        stuck: Called when a handler exceeds its time limit, with the message's topic, and with None
            when the last such handler has returned.
    """

    def __init__(
        self,
        workers: int,
        max_pending: int,
        counters: Counters,
        acknowledge: Callable[[], None],
        client_id: str,
        stuck: Callable[[str | None], None] = lambda _: None,
    ) -> None:
        super().__init__(max_pending, counters, acknowledge, client_id)
        self._workers = workers
        self._tell_stuck = stuck
        self._names = 0
        # Guarded by _lock:
        self._threads: set[threading.Thread] = set()
        self._stuck: set[threading.Thread] = set()
        self._busy = 0
        self._ready: queue.SimpleQueue[Turn | None] = queue.SimpleQueue()

    def start(self) -> None:
        with self._lock:
            if not self.stopping:
                return
            # A thread that is still in a handler keeps the old queue, and ends with it.
            self._ready = queue.SimpleQueue()
            self._threads = set()
            self._busy = 0
            self.stopping = False

    def _start(self, turn: Turn) -> None:
        with self._lock:
            if turn.life != self._life:
                return
            self._busy += 1
            thread = self._another_thread()
        self._ready.put(turn)
        if thread is not None:
            thread.start()

    def _another_thread(self) -> threading.Thread | None:
        """A thread to start, if all are busy and one more is allowed. Holds the lock."""
        if self._busy <= len(self._threads) or len(self._threads) >= self._workers:
            return None
        self._names += 1
        name = f"tars-mqtt/{self._client_id}/worker-{self._names}"
        thread = threading.Thread(target=self._work, args=(self._ready,), name=name, daemon=True)
        self._threads.add(thread)
        return thread

    def _work(self, ready: queue.SimpleQueue[Turn | None]) -> None:
        this = threading.current_thread()
        while (turn := ready.get()) is not None:
            try:
                self._handle(turn, ready)
            except Exception:
                logger.exception("internal error on a worker thread", extra={"client_id": self._client_id})
            if this in self._stuck:
                break
        with self._lock:
            self._threads.discard(this)
            was_stuck = this in self._stuck
            self._stuck.discard(this)
            last = was_stuck and not self._stuck
        if last:
            self._tell_stuck(None)

    def _handle(self, turn: Turn, ready: queue.SimpleQueue[Turn | None]) -> None:
        consumer = turn.consumer
        handle, timeout = consumer.handle, consumer.recovery.timeout
        assert handle is not None
        burst = self._begin(turn)
        for delivery in burst:
            if timeout is None:
                outcome = handle(delivery)
            else:
                watch = self._watch(turn, delivery, timeout)
                outcome = handle(delivery)
                if self._expired(watch):
                    return  # dealt with, and this thread replaced
            burst.came_out(delivery, outcome)
        if burst.finish():
            ready.put(Turn(consumer, turn.life))
        else:
            self._idle(turn)

    def _idle(self, turn: Turn) -> None:
        with self._lock:
            if turn.life == self._life:
                self._busy -= 1

    # -- handlers with a time limit -----------------------------------------------------------

    def _watch(self, turn: Turn, delivery: Delivery, timeout: float) -> Watch:
        watch = Watch(turn, delivery, threading.current_thread())
        with self._lock:
            if turn.life == self._life:
                self.timer.call_later(timeout, lambda: self._expire(watch, timeout))
        return watch

    def _expired(self, watch: Watch) -> bool:
        with self._lock:
            watch.returned = True
            return watch.expired

    def _expire(self, watch: Watch, timeout: float) -> None:
        """The time is up: treat the message as failed, and go on without the thread. Timer thread."""
        with self._lock:
            if watch.returned or watch.turn.life != self._life:
                return
            if len(self._stuck) >= self._workers:
                # No thread can take the place of this one: look again later.
                self.timer.call_later(timeout, lambda: self._expire(watch, timeout))
                return
            watch.expired = True
            self._threads.discard(watch.thread)
            self._stuck.add(watch.thread)
            self._busy -= 1
            # Turns that were queued while all threads were taken wait for this one's successor.
            successor = self._another_thread()
        if successor is not None:
            successor.start()
        self._go_on_without(watch.turn, watch.delivery, timeout)

    def _go_on_without(self, turn: Turn, delivery: Delivery, timeout: float) -> None:
        """Treat *delivery* as failed, and have the rest of its lane handled, though its handler goes on."""
        consumer = turn.consumer
        assert consumer.handle is not None
        outcome = consumer.handle.timed_out(delivery, timeout)
        self._tell_stuck(delivery.message.topic)
        delay = self._after_failure(consumer, delivery, outcome)
        if delay is not None:
            self._postpone(turn, [], [delivery], 0, delay)
        elif self._finish(turn, [delivery], 0, timeout):
            self._start(Turn(consumer, turn.life))

    def stop(self, timeout: float) -> list[str]:
        deadline = time.monotonic() + timeout
        with self._changed:
            self._end_life()
            threads = (self._threads | self._stuck) - {threading.current_thread()}
            iterators = [consumer.arrived for consumer in self._iterators if consumer.arrived is not None]
        self.timer.stop()
        for arrived in iterators:
            arrived()
        for _ in range(len(threads) + 1):
            self._ready.put(None)
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return [thread.name for thread in threads if thread.is_alive()]
