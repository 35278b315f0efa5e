"""Bringing deliveries to handlers: bounds, order, and the worker threads."""

from __future__ import annotations

import contextvars
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Protocol

import attrs

from tars_mqtt._core.lane import Delivery, Lane
from tars_mqtt._core.stats import Counters
from tars_mqtt._core.throttle import Throttle

logger = logging.getLogger("tars_mqtt.dispatch")

_LONGEST_BURST = 64
"""Deliveries that a worker takes from a lane at once; then the next lane has its turn."""

_LONG_BURST_TIME = 0.005
"""Seconds; a burst that took longer is halved next time, a shorter one doubled."""


in_work: contextvars.ContextVar[int] = contextvars.ContextVar("in_work", default=0)
"""Inside a handler: the size of the burst that it belongs to. Whoever waits for all work to be done
must not wait for its own."""


class Handling(Protocol):
    """What a dispatcher does with one delivery. Never raises; True when the handler returned."""

    def __call__(self, delivery: Delivery, /) -> bool: ...


@attrs.define(eq=False)
class Consumer:
    """One subscription as its dispatcher sees it. All but the first three: guarded by its lock."""

    lane: Lane
    limit: int
    """How many bursts may be in work at once; 0 where nobody is called, but an iterator takes."""
    handle: Handling | None
    arrived: Callable[[], None] | None = None
    """Called when there is something to take, or nothing will come any more; for an iterator on a loop."""
    burst: int = 1
    tokens: int = 0
    """Bursts in work or waiting for a worker: never more than *limit*."""
    closed: bool = False


class Dispatcher:
    """Keeps what waits within bounds; a subclass calls the handlers.

    Args:
        max_pending: Deliveries waiting or in work, over all consumers. Beyond it the oldest of
            QoS 0 is given up; QoS 1/2 are never refused here, the missing acknowledgements hold
            the broker back.
        acknowledge: Called, on the thread that finished the work, when an acknowledgement is due.
    """

    def __init__(
        self, max_pending: int, counters: Counters, acknowledge: Callable[[], None], client_id: str
    ) -> None:
        self._max_pending = max_pending
        self._counters = counters
        self._acknowledge = acknowledge
        self._client_id = client_id
        self._overflow = Throttle()
        # Guarded by _lock:
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._pending = 0
        self._consumers: set[Consumer] = set()
        self._handled = 0
        self.stopping = False

    @property
    def pending(self) -> int:
        """Deliveries that wait or are in work."""
        return self._pending

    @property
    def handled(self) -> int:
        """Deliveries whose handler returned."""
        return self._handled

    def add(self, consumer: Consumer) -> None:
        """Make a consumer known. Any thread."""
        with self._lock:
            self._consumers.add(consumer)

    def remove(self, consumer: Consumer) -> None:
        """Forget a consumer; what waits for it is over without being handled. Any thread."""
        with self._changed:
            self._consumers.discard(consumer)
            consumer.closed = True
            removed = consumer.lane.clear()
            self._pending -= len(removed)
            self._changed.notify_all()
        if consumer.arrived is not None:
            consumer.arrived()
        self._give_up(removed, "unsubscribed")

    def submit(self, batches: Mapping[Consumer, list[Delivery]]) -> None:
        """Take a burst as it came from the broker. Network thread; does not block."""
        late: list[Delivery] = []
        excess: list[Delivery] = []
        starts: list[Consumer] = []
        with self._lock:
            for consumer, deliveries in batches.items():
                if consumer.closed:
                    late += deliveries
                    continue
                consumer.lane.push(deliveries)
                self._pending += len(deliveries)
                if self._pending > self._max_pending:
                    excess += self._shed(consumer)
                while consumer.tokens < consumer.limit and consumer.tokens < len(consumer.lane):
                    consumer.tokens += 1
                    starts.append(consumer)
                if not consumer.limit:
                    self._changed.notify_all()
        for consumer in starts:
            self._start(consumer)
        for consumer in batches:
            if consumer.arrived is not None:
                consumer.arrived()
        if late:
            self._give_up(late, "unsubscribed")
        if excess:
            self._give_up(excess, "max_pending")
            total = self._overflow.admit(len(excess))
            if total:
                logger.warning(
                    "dropped %d incoming messages of QoS 0: more than max_pending=%d wait for handlers",
                    total,
                    self._max_pending,
                    extra={"client_id": self._client_id},
                )

    def _shed(self, consumer: Consumer) -> list[Delivery]:
        """Give up the oldest of QoS 0, where most of them wait. Holds the lock."""
        excess = []
        victim = consumer
        while self._pending > self._max_pending:
            fair_share = self._max_pending // len(self._consumers) if self._consumers else 0
            if len(victim.lane) <= fair_share:
                victim = max(self._consumers, key=lambda other: len(other.lane), default=consumer)
            delivery = victim.lane.drop_oldest()
            if delivery is None and victim is not consumer:
                delivery = consumer.lane.drop_oldest()
            if delivery is None:
                break
            excess.append(delivery)
            self._pending -= 1
        return excess

    def _give_up(self, deliveries: list[Delivery], reason: str) -> None:
        if deliveries:
            self._counters.drop(reason, len(deliveries))
        # Each has to be told; a generator inside any() would stop at the first.
        if any([delivery.done() for delivery in deliveries]):
            self._acknowledge()

    # -- life of a subclass -----------------------------------------------------------------

    def start(self) -> None:
        """Be ready to handle; after `stop`, again."""
        raise NotImplementedError

    def wait_idle(self, timeout: float, own: int) -> bool:
        """Wait until nothing waits or is in work, but for the *own* burst of the caller; see `in_work`."""
        with self._changed:
            return self._changed.wait_for(lambda: self._pending <= own, timeout)

    def stop(self, timeout: float) -> list[str]:
        """Give up what still waits, unacknowledged; name the handlers that do not return in time."""
        raise NotImplementedError

    # -- what a subclass's workers do -------------------------------------------------------

    def _start(self, consumer: Consumer) -> None:
        """Have one burst of *consumer* handled soon."""
        raise NotImplementedError

    def _take(self, consumer: Consumer) -> list[Delivery]:
        with self._lock:
            return consumer.lane.take(consumer.burst if consumer.limit == 1 else 1)

    def _finish(self, consumer: Consumer, batch: list[Delivery], handled: int, duration: float) -> bool:
        """Account for a burst; True when the consumer has more for the same token."""
        with self._changed:
            self._handled += handled
            self._pending -= len(batch)
            if batch:
                consumer.lane.finish(batch)
                if duration > _LONG_BURST_TIME:
                    consumer.burst = max(1, consumer.burst // 2)
                elif len(batch) == consumer.burst:
                    consumer.burst = min(_LONGEST_BURST, consumer.burst * 2)
            self._changed.notify_all()
            if len(consumer.lane) and not consumer.closed:
                return True
            if consumer.limit:
                consumer.tokens -= 1
            return False

    # -- iterators --------------------------------------------------------------------------

    def next(self, consumer: Consumer, timeout: float | None) -> Delivery | None:
        """Take one delivery for an iterator; None once the consumer is removed, or nothing more comes.

        Raises:
            TimeoutError: Nothing came in time.
        """
        with self._changed:
            if not self._changed.wait_for(
                lambda: len(consumer.lane) or consumer.closed or self.stopping, timeout
            ):
                raise TimeoutError("no message came in time")
            return self._next(consumer)

    def next_nowait(self, consumer: Consumer) -> Delivery | None:
        """Take one delivery if there is one."""
        with self._lock:
            return self._next(consumer)

    def _next(self, consumer: Consumer) -> Delivery | None:
        batch = consumer.lane.take(1)
        return batch[0] if batch else None

    def finished(self, consumer: Consumer, delivery: Delivery) -> None:
        """What `next` returned is handled."""
        self._finish(consumer, [delivery], 1, 0.0)
        if delivery.done():
            self._acknowledge()


class WorkerPool(Dispatcher):
    """Calls handlers on at most *workers* threads, started when first needed."""

    def __init__(
        self,
        workers: int,
        max_pending: int,
        counters: Counters,
        acknowledge: Callable[[], None],
        client_id: str,
    ) -> None:
        super().__init__(max_pending, counters, acknowledge, client_id)
        self._workers = workers
        # Guarded by _lock:
        self._threads: set[threading.Thread] = set()
        self._busy = 0
        self._ready: queue.SimpleQueue[Consumer | None] = queue.SimpleQueue()

    def start(self) -> None:
        with self._lock:
            if self.stopping:
                # A thread that is still stuck in a handler keeps the old queue, and ends with it.
                self._ready = queue.SimpleQueue()
                self._threads = set()
                self._busy = 0
                self.stopping = False
                for consumer in self._consumers:
                    consumer.tokens = 0

    def _start(self, consumer: Consumer) -> None:
        self._ready.put(consumer)
        with self._lock:
            self._busy += 1
            if self._busy <= len(self._threads) or len(self._threads) >= self._workers:
                return
            thread = threading.Thread(
                target=self._work,
                name=f"tars-mqtt/{self._client_id}/worker-{len(self._threads)}",
                daemon=True,
            )
            self._threads.add(thread)
        thread.start()

    def _work(self) -> None:
        ready = self._ready
        while (consumer := ready.get()) is not None:
            try:
                self._burst(consumer, ready)
            except Exception:
                logger.exception("internal error on a worker thread", extra={"client_id": self._client_id})
        with self._lock:
            self._threads.discard(threading.current_thread())

    def _burst(self, consumer: Consumer, ready: queue.SimpleQueue[Consumer | None]) -> None:
        batch = self._take(consumer)
        in_work.set(len(batch))
        handled = 0
        started = time.monotonic()
        for delivery in batch:
            if self.stopping:
                # Not done, so not acknowledged: the broker delivers it to the next session.
                self._counters.drop("shutdown")
                continue
            assert consumer.handle is not None
            handled += consumer.handle(delivery)
            if delivery.done():
                self._acknowledge()
        in_work.set(0)
        if self._finish(consumer, batch, handled, time.monotonic() - started):
            ready.put(consumer)
        else:
            with self._lock:
                self._busy -= 1

    def stop(self, timeout: float) -> list[str]:
        deadline = time.monotonic() + timeout
        with self._changed:
            self.stopping = True
            threads = self._threads - {threading.current_thread()}
            for consumer in self._consumers:
                left = consumer.lane.clear()
                self._pending -= len(left)
                if left:
                    self._counters.drop("shutdown", len(left))
            iterators = [consumer.arrived for consumer in self._consumers if consumer.arrived is not None]
            self._changed.notify_all()
        for arrived in iterators:
            arrived()
        for _ in range(len(threads) + 1):
            self._ready.put(None)
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return [thread.name for thread in threads if thread.is_alive()]
