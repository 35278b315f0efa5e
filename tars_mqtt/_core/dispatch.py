"""Bringing deliveries to handlers: what waits, within bounds and in order; and what becomes of failures."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import attrs

from tars_mqtt._core.burst import in_work
from tars_mqtt._core.claim import Claims
from tars_mqtt._core.lane import Delivery, Lane
from tars_mqtt._core.recovery import Outcome, Recovery
from tars_mqtt._core.stats import Counters
from tars_mqtt._core.throttle import Throttle
from tars_mqtt._core.timer import Timer
from tars_mqtt.config import MQTTClientConfig
from tars_mqtt.context import current_message

logger = logging.getLogger("tars_mqtt.dispatch")

_LONGEST_BURST = 64
"""Deliveries that a worker takes from a lane at once; then the next lane has its turn."""

_LONG_BURST_TIME = 0.005
"""Seconds; a burst that took longer is halved next time, a shorter one doubled."""


class Handling(Protocol):
    """What a dispatcher does with one delivery. Never raises."""

    def __call__(self, delivery: Delivery, /) -> Outcome: ...

    def timed_out(self, delivery: Delivery, timeout: float, /) -> Outcome:
        """The delivery is taken away from a call that does not end."""


@attrs.define(eq=False)
class Consumer:
    """One subscription as its dispatcher sees it. From *burst* on: guarded by its lock."""

    lane: Lane
    limit: int
    """How many bursts may be in work at once; 0 where nobody is called, but an iterator takes."""
    handle: Handling | None
    claims: Claims | None = None
    """For what an iterator takes; a handler's `HandlerCall` has the same object."""
    recovery: Recovery = attrs.field(factory=Recovery)
    arrived: Callable[[], None] | None = None
    """Called when there is something to take, or nothing will come any more; for an iterator on a loop."""
    burst: int = 1
    offered: int = 0
    """How many of *tokens* are queued, and not yet taken by a worker."""
    tokens: int = 0
    """Bursts in work or waiting for a worker: never more than *limit*. For an iterator: what it has handed out."""
    closed: bool = False
    reader: object = None
    """The thread or task that reads an iterator."""
    came: threading.Condition | None = None
    """Where a thread waits for an iterator's next delivery: each for its own, so none is woken for another's."""
    turn: Turn | None = None
    """The last one that it was given; they are all alike."""


class Turn(NamedTuple):
    """A consumer's turn to have a burst handled."""

    consumer: Consumer
    life: int
    """The life of the dispatcher that it belongs to; a turn of an earlier life changes nothing any more."""
    postponed: Sequence[Delivery] | None = None
    """Deliveries that waited for a retry; None to take new ones from the lane."""

    def next(self) -> Turn:
        """The one after this."""
        return self if self.postponed is None else Turn(self.consumer, self.life)


class Dispatcher:
    """Keeps what waits within bounds; a subclass calls the handlers.

    At most ``max_pending`` deliveries wait or are in work, over all consumers. Beyond it the oldest of QoS 0 is given
    up; QoS 1 and 2 are never refused here, the missing acknowledgements hold the broker back.

    Args:
        acknowledge: Called, on the thread that finished the work, when an acknowledgement is due.
    """

    def __init__(self, config: MQTTClientConfig, counters: Counters, acknowledge: Callable[[], None]) -> None:
        self._max_pending = config.max_pending
        self._counters = counters
        self._acknowledge = acknowledge
        self._client_id = config.client_id
        self._overflow = Throttle()
        self.timer = Timer(config.client_id)
        # Guarded by _lock:
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._watchers = 0  # who waits for less to be pending
        self._pending = 0
        self._postponed = 0
        self._consumers: set[Consumer] = set()
        self._iterators: set[Consumer] = set()
        self._handled = 0
        self._life = 0
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
            if not consumer.limit:
                consumer.came = threading.Condition(self._lock)
                self._iterators.add(consumer)

    def remove(self, consumer: Consumer) -> None:
        """Forget a consumer; what waits for it is over without being handled. Any thread."""
        with self._lock:
            self._consumers.discard(consumer)
            self._iterators.discard(consumer)
            consumer.closed = True
            removed = consumer.lane.clear()
            self._pending -= len(removed)
            self._tell()
            if consumer.came is not None:
                consumer.came.notify_all()
        if consumer.arrived is not None:
            consumer.arrived()
        if removed:
            self._give_up(removed, "unsubscribed")

    def submit(self, batches: Mapping[Consumer, list[Delivery]]) -> None:
        """Take a burst as it came from the broker. Network thread; does not block."""
        late: list[Delivery] = []
        excess: list[Delivery] = []
        with self._lock:
            for consumer, deliveries in batches.items():
                if consumer.closed:
                    late += deliveries
                    continue
                consumer.lane.push(deliveries)
                self._pending += len(deliveries)
                if self._pending > self._max_pending:
                    excess += self._shed(consumer)
                self._offer(consumer)
        self._wake()
        for consumer in batches:
            if consumer.arrived is not None:
                consumer.arrived()
        if late:
            self._give_up(late, "unsubscribed")
        if excess:
            self._give_up(excess, "max_pending")

    def _offer(self, consumer: Consumer) -> None:
        """Start each burst that may begin. Holds the lock."""
        if consumer.came is not None:
            consumer.came.notify_all()
        elif not self.stopping:
            takes = consumer.lane.takes()
            while consumer.tokens < consumer.limit and consumer.offered < takes:
                consumer.tokens += 1
                consumer.offered += 1
                turn = consumer.turn
                if turn is None or turn.life != self._life:
                    turn = consumer.turn = Turn(consumer, self._life)
                self._start(turn)

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

    def _give_up(self, deliveries: Sequence[Delivery], reason: str) -> None:
        self._counters.drop(reason, len(deliveries))
        for delivery in deliveries:
            self._over(delivery)
        total = self._overflow.admit(len(deliveries)) if reason == "max_pending" else 0
        if total:
            logger.warning(
                "dropped %d incoming messages of QoS 0: more than max_pending=%d wait for handlers",
                total,
                self._max_pending,
                extra={"client_id": self._client_id},
            )

    # -- life of a subclass -----------------------------------------------------------------

    def start(self) -> None:
        """Be ready to handle; after `stop`, again."""
        raise NotImplementedError

    def in_handler(self) -> bool:
        """Whether this runs inside a handler, or in what one has started that is still in work."""
        burst, number = in_work.get() or (None, 0)
        return (
            burst is not None and burst.dispatcher is self and burst.in_work_as(number, current_message.get())
        )

    def wait_idle(self, timeout: float) -> bool:
        """Wait until nothing waits or is in work, but for what iterators hold that nobody reads. Not in a handler."""

        def unread() -> int:
            return sum(
                len(consumer.lane) + consumer.tokens
                for consumer in self._iterators
                if _has_left(consumer.reader)
            )

        with self._lock:
            self._watchers += 1
            try:
                return self._changed.wait_for(lambda: self._pending <= unread(), timeout)
            finally:
                self._watchers -= 1

    @property
    def deserted(self) -> bool:
        """Whether what is in work cannot end any more."""
        return False

    def _tell(self) -> None:
        """Something changed that others may wait for. Holds the lock."""
        if self._watchers:
            self._changed.notify_all()

    def stop(self, timeout: float) -> list[str]:
        """Give up what still waits, unacknowledged; name the handlers that do not return in time."""
        raise NotImplementedError

    def _end_life(self) -> None:
        """Give up what still waits, and have nothing to do with what is in work. Holds the lock."""
        self.stopping = True
        self._life += 1
        given_up, self._postponed = self._postponed, 0
        for consumer in self._consumers:
            given_up += len(consumer.lane.clear())
            consumer.lane = type(consumer.lane)()
            consumer.tokens = consumer.offered = 0
            consumer.reader = None
            if consumer.came is not None:
                consumer.came.notify_all()
        self._pending = 0
        if given_up:
            self._counters.drop("shutdown", given_up)
        self._tell()

    # -- what a subclass's workers do -------------------------------------------------------

    def _start(self, turn: Turn) -> None:
        """Queue a turn; one of an older life, never. Holds the lock: when it is released, `_wake`."""
        raise NotImplementedError

    def _wake(self) -> None:
        """Have workers see to the turns that were queued."""
        raise NotImplementedError

    def _over(self, delivery: Delivery) -> None:
        """A delivery needs nothing more."""
        if delivery.finish():
            self._acknowledge()

    def _after_failure(self, consumer: Consumer, delivery: Delivery, outcome: Outcome) -> float | None:
        """Decide what becomes of it: seconds until the next attempt, or None when it is dealt with."""
        delivery.failures += 1
        delivery.failed_first = delivery.failed_first or time.time()
        recovery = consumer.recovery
        delay = recovery.delay(delivery, outcome)
        if delay is not None:
            self._counters.add("handler_retries")
        elif recovery.bury is not None:
            # Done only when the broker has the dead letter: a kill in between loses nothing.
            recovery.bury(delivery, lambda: self._over(delivery))
        else:
            self._over(delivery)
        return delay

    def _postpone(
        self, turn: Turn, done: Sequence[Delivery], rest: Sequence[Delivery], handled: int, delay: float
    ) -> None:
        """Go on with the rest of a burst later, with the same token: its lane waits, so order is kept."""
        with self._lock:
            self._handled += handled
            if turn.life == self._life:
                self._pending -= len(done)
                self._postponed += len(rest)
                # Under the lock: no timer is started once `stop` has ended it.
                self.timer.call_later(delay, lambda: self._resume(turn._replace(postponed=rest)))
                self._tell()
                return
        self._counters.drop("shutdown", len(rest))

    def _resume(self, turn: Turn) -> None:
        with self._lock:
            self._start(turn)
        self._wake()

    def _take(self, turn: Turn) -> Sequence[Delivery]:
        """What is to be handled now. Holds the lock."""
        if turn.life != self._life:
            return ()
        if turn.postponed is not None:
            self._postponed -= len(turn.postponed)
            return turn.postponed
        consumer = turn.consumer
        consumer.offered -= 1
        alone = consumer.limit > 1 or consumer.recovery.timeout is not None
        batch = consumer.lane.take(1 if alone else consumer.burst)
        if consumer.claims is not None:
            consumer.claims.begin(batch)
        return batch

    def _finish(self, turn: Turn, batch: Sequence[Delivery], handled: int, duration: float) -> bool:
        """Account for a burst; True when the consumer has more for the same token. Holds the lock."""
        self._handled += handled
        if turn.life != self._life:
            return False
        consumer = turn.consumer
        size = len(batch)
        self._pending -= size
        takes = consumer.lane.finish(batch)
        if duration > _LONG_BURST_TIME:
            consumer.burst = max(1, consumer.burst // 2)
        elif size == consumer.burst < _LONGEST_BURST:
            consumer.burst *= 2
        self._tell()
        if consumer.limit and consumer.offered < takes and not consumer.closed:
            consumer.offered += 1
            return True
        consumer.tokens -= 1
        return False

    # -- iterators --------------------------------------------------------------------------

    def next(self, consumer: Consumer, timeout: float | None) -> Taken | None:
        """Take one delivery for an iterator; None once the consumer is removed, or nothing more comes.

        Raises:
            TimeoutError: Nothing came in time.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            with self._lock:
                assert consumer.came is not None
                consumer.reader = threading.current_thread()
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                if not consumer.came.wait_for(
                    lambda: len(consumer.lane) or consumer.closed or self.stopping, left
                ):
                    consumer.reader = None
                    raise TimeoutError("no message came in time")
                taken = self._next(consumer)
            if taken is None or self._wanted(taken):
                return taken

    def next_nowait(self, consumer: Consumer, reader: object) -> Taken | None:
        """Take one delivery if there is one; *reader* is the task that asks, and waits for it if not."""
        while True:
            with self._lock:
                consumer.reader = reader
                taken = self._next(consumer)
            if taken is None or self._wanted(taken):
                return taken

    def _next(self, consumer: Consumer) -> Taken | None:
        batch = consumer.lane.take(1)
        if not batch:
            return None
        if consumer.claims is not None:
            consumer.claims.begin(batch)
        consumer.tokens += 1
        return Taken(Turn(consumer, self._life), batch[0])

    def _wanted(self, taken: Taken) -> bool:
        """Whether an iterator is to have it; a duplicate is over."""
        claims = taken.turn.consumer.claims
        if claims is None or claims.claim(taken.delivery):
            return True
        self._taken_back(taken, handled=0)
        return False

    def finished(self, taken: Taken) -> None:
        """What `next` returned is handled."""
        claims = taken.turn.consumer.claims
        if claims is not None:
            claims.keep(taken.delivery)
        self._taken_back(taken, handled=1)

    def _taken_back(self, taken: Taken, handled: int) -> None:
        self._over(taken.delivery)  # first: who waits until nothing is in work may close the connection
        with self._lock:
            self._finish(taken.turn, [taken.delivery], handled, 0.0)

    def left_alone(self, consumer: Consumer) -> None:
        """Nobody asks an iterator for the next delivery any more."""
        with self._lock:
            consumer.reader = None
            self._tell()

    def leave_iterators(self, reader: object) -> None:
        """A thread or task has other things to do than to read."""
        with self._lock:
            for consumer in self._iterators:
                if consumer.reader is reader:
                    consumer.reader = None
            self._tell()


class Taken(NamedTuple):
    """What an iterator has handed out."""

    turn: Turn
    delivery: Delivery


def _has_left(reader: Any) -> bool:
    """Whether a thread or task, or nobody, will never ask for the next delivery."""
    if isinstance(reader, threading.Thread):
        return not reader.is_alive()
    return reader is None or reader.done()
