"""The engine's side of an event loop: how its threads reach the loop, and handlers that run on it."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

import attrs

from tars_mqtt._core.aside import on_a_thread
from tars_mqtt._core.burst import Burst
from tars_mqtt._core.dispatch import Turn
from tars_mqtt._core.handler import HandlerCall, is_coroutine_function, name_of
from tars_mqtt._core.lane import Delivery
from tars_mqtt._core.recovery import Outcome
from tars_mqtt._core.stats import Counters
from tars_mqtt._core.workers import WorkerPool
from tars_mqtt.config import MQTTClientConfig
from tars_mqtt.context import current_message, log_fields
from tars_mqtt.message import Message

logger = logging.getLogger("tars_mqtt.dispatch")

_AFTER_CANCELLATION = 0.1
"""Seconds until another task goes on: whoever cancels all tasks mostly closes the loop next."""

_LONGEST_HOLD = 0.001
"""Seconds that handlers which never wait may keep the loop, before everyone else on it has a turn."""

_MOST_CALLS = 256
"""Calls run in one turn of the loop; the others wait for the next, so that nobody else waits long."""


class Bridge:
    """Runs calls from any thread on one event loop, with one wake-up per burst.

    Lasting calls survive a loop that is closed, and run first; each kind keeps its order.

    Bound to the loop that is running when `bind` is called; calls from before wait for it.
    """

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        self._calls: deque[Callable[[], None]] = deque()
        self._lasting: deque[Callable[[], None]] = deque()
        self._scheduled = False

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """Belong to *loop* from now on."""
        self.loop = loop
        self._scheduled = False
        if self._calls or self._lasting:
            self._schedule(loop)

    def post(self, call: Callable[[], None], *, lasting: bool = False) -> None:
        """Have *call* run on the loop soon. Any thread; never raises.

        Args:
            lasting: Where the loop is closed, the next one is to run it.
        """
        (self._lasting if lasting else self._calls).append(call)
        # The flag is cleared before the calls are looked at: one that is added in between is seen.
        if not self._scheduled and self.loop is not None:
            self._schedule(self.loop)

    def start_call(self, function: Callable[[], Any], name: str) -> Future[Any]:
        """Await a coroutine function on the loop, call a plain one on a thread. Any thread but the loop's."""
        if not is_coroutine_function(function):
            return on_a_thread(function, name)
        if self.loop is None or self.loop.is_closed():
            raise RuntimeError("the client's event loop is closed")
        return asyncio.run_coroutine_threadsafe(_run_named(function, name), self.loop)

    def _schedule(self, loop: asyncio.AbstractEventLoop) -> None:
        self._scheduled = True
        try:
            loop.call_soon_threadsafe(self._run)
        except RuntimeError:
            # The loop is closed, and with it everyone who waited there.
            self._calls.clear()
            self._scheduled = False

    def _run(self) -> None:
        self._scheduled = False
        for calls in (self._lasting, self._calls):
            for _ in range(min(len(calls), _MOST_CALLS)):
                calls.popleft()()
        if (self._calls or self._lasting) and not self._scheduled and self.loop is not None:
            self._schedule(self.loop)


async def _run_named(function: Callable[[], Any], name: str) -> Any:
    task = asyncio.current_task()
    assert task is not None
    task.set_name(name)
    return await function()


class CoroutineCall(HandlerCall):
    """The steps around one call of a coroutine function. Runs on the loop."""

    async def run(self, delivery: Delivery, timeout: float | None) -> Outcome:
        """Handle one delivery."""
        argument = self.begin(delivery)
        if argument.__class__ is Outcome:
            return argument
        limit = None if timeout is None else asyncio.timeout(timeout)
        token = current_message.set(delivery.message)
        try:
            if limit is None:
                await self.handler(argument)
            else:
                async with limit:
                    await self.handler(argument)
        except GeneratorExit:
            raise  # whoever awaits knows whether the handler raised it
        except BaseException as error:
            if timeout is not None and limit is not None and limit.expired():
                return Outcome.FAILED if delivery.given_up else self.timed_out(delivery, timeout)
            outcome = self.failed(delivery, error)
            if isinstance(error, asyncio.CancelledError) and asyncio.current_task().cancelling():  # type: ignore[union-attr]
                raise
            return outcome
        finally:
            with contextlib.suppress(ValueError):  # the collector has another context
                current_message.reset(token)
        return self.succeeded(delivery)

    def _report(self, message: Message, error: BaseException) -> None:
        if not (isinstance(error, asyncio.CancelledError) and asyncio.current_task().cancelling()):  # type: ignore[union-attr]
            super()._report(message, error)
            return
        # By a shutdown that has no more time for it, or by whoever cancels all tasks: no fault of the handler's.
        logger.warning(
            "handler %s was cancelled on a message of %r",
            name_of(self.handler),
            message.topic,
            extra=log_fields(message, self._client_id),
        )


def _is_current(task: asyncio.Task[None]) -> bool:
    try:
        return asyncio.current_task() is task
    except RuntimeError:  # there is no loop here
        return False


@attrs.define(eq=False)
class TaskWatch:
    """One call of a coroutine function that has a time limit. Owned by the loop's thread."""

    task: asyncio.Task[None]
    turn: Turn
    delivery: Delivery
    timeout: float
    timer: asyncio.TimerHandle | None = None
    """When it is looked at next."""


class LoopDispatcher(WorkerPool):
    """Runs coroutine handlers as tasks on the loop, and plain functions on worker threads.

    As many tasks as there are workers may go on in spite of their time limit; the lanes of further ones wait.

    `stop` and `wait_idle` block: call them on another thread than the loop's.
    """

    def __init__(
        self,
        bridge: Bridge,
        config: MQTTClientConfig,
        counters: Counters,
        acknowledge: Callable[[], None],
        stuck: Callable[[str | None], None],
    ) -> None:
        super().__init__(config, counters, acknowledge, stuck)
        self._bridge = bridge
        self._called = False
        """Whether the loop is about to look at its turns."""
        # Guarded by _lock:
        self._loop_turns: deque[Turn] = deque()
        # Owned by the loop's thread:
        self._tasks: dict[asyncio.Task[None], Burst | None] = {}
        """The tasks, and what they have in work."""
        self._free: set[asyncio.Task[None]] = set()
        """Of the tasks, those that are about to take a turn."""
        self._looking = False
        """Whether a `_look` is scheduled."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stuck_tasks: set[asyncio.Task[None]] = set()

    def _start(self, turn: Turn) -> None:
        if not isinstance(turn.consumer.handle, CoroutineCall):
            super()._start(turn)
        elif turn.life == self._life:
            self._loop_turns.append(turn)

    def _wake(self) -> None:
        super()._wake()
        # The flag is cleared before the turns are looked at: one that is added in between is seen.
        if self._loop_turns and not self._called:
            self._called = True
            # Lasting: otherwise the consumers would never have a turn again.
            self._bridge.post(self._take_up, lasting=True)

    def bound(self) -> None:
        """The bridge has a loop, perhaps after another, which left something behind."""
        self._bridge.post(self._take_up, lasting=True)

    def _take_up(self) -> None:
        """There are turns: have them taken by a task. Runs on the loop."""
        self._called = False
        if self._loop is not self._bridge.loop:
            self._change_loop()
        if self._loop_turns and not self._free:
            self._spawn()

    def _change_loop(self) -> None:
        """The tasks of a loop that was closed never end: what they had in work begins anew."""
        abandoned, self._tasks = self._tasks, {}
        self._loop = self._bridge.loop
        self._free.clear()
        self._looking = False
        for task, burst in abandoned.items():
            if burst is None:
                task.get_coro().close()  # or Python complains that it never began
            elif task not in self._stuck_tasks and burst.turn is not None:
                self._cancelled(burst, burst.turn, from_outside=True)
        if self._stuck_tasks:
            self._stuck_tasks.clear()
            self._tell_stuck(None)

    def _look(self) -> None:
        """Give each turn a task of its own if the one that takes them in turn waits for something."""
        self._looking = False
        # Turns that came just now are no sign of that: `_take_up` is about to see to them.
        if not self._free and not self._called:
            for _ in range(len(self._loop_turns)):
                self._spawn()

    def _spawn(self) -> None:
        assert self._loop is not None
        # Made without the loop's factory: a task that began at once would not be free. And with a context of its
        # own: what called this may run in that of a handler.
        name = f"tars-mqtt/{self._client_id}/handler"
        task = asyncio.Task(self._serve(), loop=self._loop, name=name, context=contextvars.Context())
        self._tasks[task] = None
        self._free.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.pop(task, None)
        self._free.discard(task)
        if task.cancelled():
            self._later(self._wake)

    async def _serve(self) -> None:
        """Handle bursts, of whichever consumer has its turn, until there are none.

        A task for each would cost as much as the handling. Should a handler wait for something, `_look` has
        the other turns taken by others; and what it leaves behind in its task, a cancellation or a context
        variable, is not for the next: that has another task.
        """
        task = asyncio.current_task()
        assert task is not None
        loop = task.get_loop()
        burst = self._tasks[task] = Burst(self)
        until = loop.time() + _LONGEST_HOLD
        ours = 0  # context variables, counted before the first handler ran
        while self._begin_next(burst):
            self._free.discard(task)
            if self._loop_turns and not self._looking:
                self._looking = True
                loop.call_soon(self._look)
            ours = ours or len(contextvars.copy_context())
            await self._handle_burst(burst, task)
            if task.cancelling() or (self._loop_turns and len(contextvars.copy_context()) > ours):
                self._leave_to_another(burst)
                return
            if loop.time() >= until:
                # Handlers that never wait would keep the loop to themselves.
                with self._lock:
                    self._conclude(burst, self._loop_turns)
                self._free.add(task)
                await asyncio.sleep(0)
                until = loop.time() + _LONGEST_HOLD
        self._free.discard(task)

    def _leave_to_another(self, burst: Burst) -> None:
        with self._lock:
            self._conclude(burst, self._loop_turns)
        if self._loop_turns and not self._free:
            self._spawn()

    def _begin_next(self, burst: Burst) -> bool:
        """Finish a burst, and begin the next; False when there is none."""
        with self._lock:
            self._conclude(burst, self._loop_turns)
            if not self._loop_turns:
                return False
            burst.begin(self._loop_turns.popleft())
            return True

    async def _handle_burst(self, burst: Burst, task: asyncio.Task[None]) -> None:
        turn = burst.turn
        assert turn is not None
        call, timeout = turn.consumer.handle, turn.consumer.recovery.timeout
        assert isinstance(call, CoroutineCall)
        watch: TaskWatch | None = None
        try:
            for delivery in burst:
                if timeout is not None:
                    watch = self._watch_task(turn, delivery, timeout)
                try:
                    outcome = await call.run(delivery, timeout)
                except GeneratorExit as error:
                    if not _is_current(task):
                        raise
                    outcome = call.failed(delivery, error)
                if self._given_up(watch):
                    burst.forget()
                    return
                burst.came_out(delivery, outcome)
        except GeneratorExit:
            raise  # the loop is closed, and this the collector, on any thread, which may hold any lock
        except BaseException as error:
            if self._given_up(watch):
                burst.forget()
            else:
                self._cancelled(burst, turn, from_outside=bool(task.cancelling()))
            if isinstance(error, asyncio.CancelledError):
                raise
            logger.exception("internal error in a handler's task", extra={"client_id": self._client_id})

    def _cancelled(self, burst: Burst, turn: Turn, from_outside: bool) -> None:
        """A burst ends early: by a shutdown, or by somebody else, at the cost of an attempt and not of the lane.

        Tasks are cancelled when a loop is about to end, too, and the process with it. Nothing tells, so the first
        time the message is handled again after a moment, which then never comes, nor an acknowledgement.
        """
        if turn.life == self._life:
            burst.give_back(_AFTER_CANCELLATION, from_outside)
        with self._lock:
            more = burst.finish()
        if more:
            self._later(lambda: self._resume(turn.next()))

    def _later(self, call: Callable[[], None]) -> None:
        with self._lock:
            if not self.stopping:
                self.timer.call_later(_AFTER_CANCELLATION, call)

    # -- coroutines that do not heed their cancellation -----------------------------------------

    def _watch_task(self, turn: Turn, delivery: Delivery, timeout: float) -> TaskWatch:
        task = asyncio.current_task()
        assert task is not None
        # The time limit itself cancels, in the round of the loop in which this looks as well.
        watch = TaskWatch(task, turn, delivery, timeout)
        watch.timer = task.get_loop().call_later(timeout, self._was_told, watch)
        return watch

    def _was_told(self, watch: TaskWatch) -> None:
        """The handler was cancelled at its time limit; if it still runs after as long again, it is given up.

        As long from now, since a loop that was held up may come here long after the limit.
        """
        watch.timer = watch.task.get_loop().call_later(watch.timeout, self._give_up_task, watch)

    def _give_up_task(self, watch: TaskWatch) -> None:
        if watch.turn.life != self._life:
            return
        if len(self._stuck_tasks) >= self._workers:
            self._was_told(watch)  # as many as may be: look again later
            return
        self._stuck_tasks.add(watch.task)
        self._go_on_without(watch.turn, watch.delivery, watch.timeout)

    def _given_up(self, watch: TaskWatch | None) -> bool:
        """Whether the delivery has been dealt with, and the lane given to another task."""
        if watch is None:
            return False
        if watch.timer is not None:
            watch.timer.cancel()
        if watch.task not in self._stuck_tasks:
            return False
        self._stuck_tasks.discard(watch.task)
        if not self._stuck_tasks:
            self._tell_stuck(None)
        return True

    def _end_life(self) -> None:
        super()._end_life()
        self._loop_turns.clear()

    @property
    def deserted(self) -> bool:
        loop = self._bridge.loop
        return loop is not None and loop.is_closed()

    def stop(self, timeout: float) -> list[str]:
        deadline = time.monotonic() + timeout
        stuck = super().stop(timeout)
        while self._tasks and not self.deserted:
            # A task may swallow one cancellation, or two: ask until it ends. Once in any case.
            left = max(0.0, deadline - time.monotonic())
            looked = threading.Event()
            self._bridge.post(partial(self._cancel, tuple(self._tasks), looked))
            looked.wait(min(left, 0.05))
            if not left:
                break
            if self._tasks:
                time.sleep(min(left, 0.01))
        return stuck + [task.get_name() for task in tuple(self._tasks)]

    def _cancel(self, tasks: tuple[asyncio.Task[None], ...], looked: threading.Event) -> None:
        for task in tasks:
            task.cancel()
        looked.set()
