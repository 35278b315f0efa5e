"""The threads that call handlers."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable

import attrs

from tars_mqtt._core.burst import Burst
from tars_mqtt._core.dispatch import Dispatcher, Turn
from tars_mqtt._core.lane import Delivery
from tars_mqtt._core.stats import Counters
from tars_mqtt.config import MQTTClientConfig

logger = logging.getLogger("tars_mqtt.dispatch")

_MOMENT = 0.1
"""Seconds that an idle thread needs at most to end."""

_AFTER_ERROR = 0.1
"""Seconds until what an error of ours interrupted goes on."""


@attrs.define(eq=False)
class Watch:
    """One call of a handler that has a time limit. Guarded by the pool's lock."""

    turn: Turn
    delivery: Delivery
    thread: threading.Thread
    timeout: float
    deadline: float
    expired: bool = False


class WorkerPool(Dispatcher):
    """Calls handlers on at most ``workers`` threads, started when first needed.

    A handler that exceeds its time limit keeps its thread until it returns; another thread takes
    the place, as long as no more than ``workers`` are stuck so.

    Args:
        stuck: Called when a handler exceeds its time limit, with the message's topic, and with None
            when the last such handler has returned.
    """

    def __init__(
        self,
        config: MQTTClientConfig,
        counters: Counters,
        acknowledge: Callable[[], None],
        stuck: Callable[[str | None], None],
    ) -> None:
        super().__init__(config, counters, acknowledge)
        self._workers = config.workers
        self._tell_stuck = stuck
        self._names = 0
        # Guarded by _lock:
        self._turns: deque[Turn] = deque()
        self._threads: set[threading.Thread] = set()
        self._stuck: set[threading.Thread] = set()
        self._watches: dict[threading.Thread, Watch] = {}
        self._look_at = math.inf
        """When the timer looks at the watches."""
        self._idle: list[threading.Lock] = []
        """A bell of each thread that sleeps: a lock, released to wake it."""
        self._waking = False
        """Whether a thread is about to look for turns: one at a time, which calls the next if that is needed."""

    def start(self) -> None:
        with self._lock:
            if not self.stopping:
                return
            # A thread that is still in a handler belongs to the old life, and ends with it.
            self._threads = set()
            self._waking = False
            self.stopping = False

    def _start(self, turn: Turn) -> None:
        if turn.life == self._life:
            self._turns.append(turn)

    def _wake(self) -> None:
        # Read without the lock: a thread that is about to look will see the turns.
        if self._turns and not self._waking:
            with self._lock:
                call = self._whom_to_call()
            if call is not None:
                call()

    def _whom_to_call(self) -> Callable[[], None] | None:
        """What brings one more thread to the turns that wait, if one is to spare. Holds the lock."""
        if self._waking or not self._turns:
            return None
        if self._idle:
            self._waking = True
            return self._idle.pop().release
        if len(self._threads) >= self._workers:
            return None
        self._names += 1
        name = f"tars-mqtt/{self._client_id}/worker-{self._names}"
        thread = threading.Thread(target=self._work, args=(self._life,), name=name, daemon=True)
        try:
            thread.start()  # under the lock: whoever is in `_threads` can be joined
        except RuntimeError as error:
            # The next turn that comes is another attempt.
            return functools.partial(
                logger.error,
                "%d threads for handlers, and no more: %s",
                len(self._threads),
                error,
                extra={"client_id": self._client_id},
            )
        self._waking = True
        self._threads.add(thread)
        return None

    def _work(self, life: int) -> None:
        this = threading.current_thread()
        burst = Burst(self)
        bell = threading.Lock()
        bell.acquire()
        while this not in self._stuck:
            try:
                if not self._next_turn(burst, bell, life):
                    break
                self._handle(burst)
            except Exception:
                logger.exception("internal error on a worker thread", extra={"client_id": self._client_id})
                with contextlib.suppress(Exception):
                    burst.give_back(_AFTER_ERROR)
        with self._lock:
            self._threads.discard(this)
            was_stuck = this in self._stuck
            self._stuck.discard(this)
            last = was_stuck and not self._stuck
        if last:
            self._tell_stuck(None)

    def _conclude(self, burst: Burst, turns: deque[Turn]) -> None:
        """Finish a burst; what is left for its consumer has its turn behind the others'. Holds the lock."""
        turn = burst.turn
        if turn is not None and burst.finish():
            turns.append(turn.next())

    def _next_turn(self, burst: Burst, bell: threading.Lock, life: int) -> bool:
        """Finish a burst, and begin the next, when there is one; False when the thread is to end."""
        arrived = burst.turn is None
        while True:
            with self._lock:
                self._conclude(burst, self._turns)
                if life != self._life:
                    return False
                if arrived:
                    self._waking = False
                call = None
                if self._turns:
                    burst.begin(self._turns.popleft())
                    call = self._whom_to_call()
                else:
                    self._idle.append(bell)
            if call is not None:
                call()
            if burst.turn is not None:
                return True
            bell.acquire()
            arrived = True

    def _handle(self, burst: Burst) -> None:
        turn = burst.turn
        assert turn is not None
        handle, timeout = turn.consumer.handle, turn.consumer.recovery.timeout
        assert handle is not None
        for delivery in burst:
            if timeout is None:
                outcome = handle(delivery)
            else:
                watch = self._watch(turn, delivery, timeout)
                try:
                    outcome = handle(delivery)
                finally:
                    if self._expired(watch):
                        burst.forget()  # dealt with, and this thread replaced
                if burst.turn is None:
                    return
            burst.came_out(delivery, outcome)

    # -- handlers with a time limit -----------------------------------------------------------

    def _watch(self, turn: Turn, delivery: Delivery, timeout: float) -> Watch:
        thread = threading.current_thread()
        watch = Watch(turn, delivery, thread, timeout, time.monotonic() + timeout)
        with self._lock:
            if turn.life == self._life:
                self._watches[thread] = watch
                self._look_by(watch.deadline)
        return watch

    def _expired(self, watch: Watch) -> bool:
        """The call has returned; whether that was too late."""
        with self._lock:
            if self._watches.get(watch.thread) is watch:
                del self._watches[watch.thread]
            return watch.expired

    def _look_by(self, deadline: float) -> None:
        """Have the timer look at the watches by then. One look for all: most calls are over before. Holds the lock."""
        if deadline < self._look_at:
            self._look_at = deadline
            delay = max(0.0, deadline - time.monotonic())
            self.timer.call_later(delay, lambda: self._look_at_watches(deadline))

    def _look_at_watches(self, deadline: float) -> None:
        """Treat messages whose time is up as failed, and go on without their threads. Timer thread."""
        overdue: list[Watch] = []
        with self._lock:
            if deadline != self._look_at:
                return  # an earlier look took its place
            self._look_at = math.inf
            now = time.monotonic()
            for watch in tuple(self._watches.values()):
                if watch.deadline > now:
                    continue
                if len(self._stuck) >= self._workers:
                    # No thread can take the place of this one: look again later.
                    watch.deadline = now + watch.timeout
                    continue
                watch.expired = True
                del self._watches[watch.thread]
                self._threads.discard(watch.thread)
                self._stuck.add(watch.thread)
                overdue.append(watch)
            if self._watches:
                self._look_by(min(watch.deadline for watch in self._watches.values()))
        self._wake()  # turns that were queued while all threads were taken wait for a successor
        for watch in overdue:
            self._go_on_without(watch.turn, watch.delivery, watch.timeout)

    def _go_on_without(self, turn: Turn, delivery: Delivery, timeout: float) -> None:
        """Treat *delivery* as failed, and have the rest of its lane handled, though its handler goes on."""
        consumer = turn.consumer
        assert consumer.handle is not None
        outcome = consumer.handle.timed_out(delivery, timeout)
        late, delivery = delivery, attrs.evolve(delivery)
        late.given_up = True
        self._tell_stuck(delivery.message.topic)
        delay = self._after_failure(consumer, delivery, outcome)
        if delay is not None:
            self._postpone(turn, [], [delivery], 0, delay)
            return
        with self._lock:
            if self._finish(turn, [delivery], 0, timeout):
                self._start(turn.next())
        self._wake()

    def _end_life(self) -> None:
        super()._end_life()
        self._turns.clear()
        self._watches.clear()
        self._look_at = math.inf
        while self._idle:
            self._idle.pop().release()

    def stop(self, timeout: float) -> list[str]:
        deadline = time.monotonic() + timeout
        with self._lock:
            self._end_life()
            threads = (self._threads | self._stuck) - {threading.current_thread()}
            iterators = [consumer.arrived for consumer in self._iterators if consumer.arrived is not None]
        for arrived in iterators:
            arrived()
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        # Last: what the handlers leave for it, a commit for instance, needs no thread of its own.
        timer = self.timer.stop(max(_MOMENT, deadline - time.monotonic()))
        return [thread.name for thread in threads if thread.is_alive()] + ([timer] if timer else [])
