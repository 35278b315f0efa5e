"""Handlers on an event loop: which task serves whom, and that none waits for another's handler."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import sys
import time
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

import pytest

from tars_mqtt import MQTTClientConfig
from tars_mqtt._core.claim import Claims
from tars_mqtt._core.dispatch import Consumer
from tars_mqtt._core.handler import HandlerCall
from tars_mqtt._core.lane import Delivery, Fifo
from tars_mqtt._core.recovery import Recovery
from tars_mqtt._core.stats import Counters
from tars_mqtt.aio.loop import Bridge, CoroutineCall, LoopDispatcher
from tars_mqtt.message import Message


async def until(predicate: Callable[[], object], pause: float = 0.001) -> None:
    async with asyncio.timeout(30):
        while not predicate():  # noqa: ASYNC110 - what is waited for sets no event
            await asyncio.sleep(pause)


class Harness:
    """A dispatcher on the running loop."""

    def __init__(self) -> None:
        self.counters = Counters()
        bridge = Bridge()
        bridge.bind(asyncio.get_running_loop())
        config = MQTTClientConfig("mqtt://localhost", "test", workers=1)
        self.dispatcher = LoopDispatcher(bridge, config, self.counters, lambda: None, lambda _: None)

    def consumer(self, handler: Callable[[bytes], Awaitable[Any]]) -> Consumer:
        claims = Claims(None, "t", "field", self.counters, "test")
        consumer = Consumer(Fifo(), 1, CoroutineCall(handler, claims, self.counters, "test"))
        self.dispatcher.add(consumer)
        return consumer

    def plain_consumer(self, handler: Callable[[bytes], Any]) -> Consumer:
        claims = Claims(None, "t", "field", self.counters, "test")
        consumer = Consumer(Fifo(), 1, HandlerCall(handler, claims, self.counters, "test"))
        self.dispatcher.add(consumer)
        return consumer

    def submit(self, *consumers: Consumer, payload: bytes = b"") -> None:
        self.dispatcher.submit({each: [Delivery(Message("t", payload), None)] for each in consumers})

    async def idle(self) -> None:
        await until(lambda: not (self.dispatcher.pending or self.dispatcher._tasks))

    async def stop(self) -> None:
        assert await asyncio.to_thread(self.dispatcher.stop, 30) == []


async def test_handlers_that_wait_for_something_wait_side_by_side() -> None:
    harness = Harness()
    inside = 0
    everybody = asyncio.Event()

    async def meet(_: bytes) -> None:
        nonlocal inside
        inside += 1
        if inside == 50:
            everybody.set()
        await everybody.wait()

    async with asyncio.timeout(30):
        harness.submit(*(harness.consumer(meet) for _ in range(50)))
        await everybody.wait()
    await harness.idle()
    assert harness.dispatcher.handled == 50
    await harness.stop()


async def test_those_who_come_while_a_handler_waits_do_not_wait_for_it() -> None:
    harness = Harness()
    first, second = asyncio.Event(), asyncio.Event()

    async def wait_for_the_second(_: bytes) -> None:
        first.set()
        await second.wait()

    async def be_second(_: bytes) -> None:
        second.set()

    async with asyncio.timeout(30):
        harness.submit(harness.consumer(wait_for_the_second))
        await first.wait()
        harness.submit(harness.consumer(be_second))
        await harness.idle()
    await harness.stop()


async def test_handlers_that_never_wait_share_a_task_and_leave_the_loop_to_others_now_and_then() -> None:
    harness = Harness()
    tasks: set[asyncio.Task[Any] | None] = set()
    loop_ran = 0
    seen: list[int] = []

    async def handler(_: bytes) -> None:
        tasks.add(asyncio.current_task())
        seen.append(loop_ran)

    async def run_beside() -> None:
        nonlocal loop_ran
        while True:
            loop_ran += 1
            await asyncio.sleep(0)

    beside = asyncio.create_task(run_beside())
    consumers = [harness.consumer(handler) for _ in range(2_000)]
    harness.submit(*consumers)
    await harness.idle()
    assert len(seen) == 2_000
    assert len(tasks) == 1
    assert len(set(seen)) > 1, "nobody else ran before all were handled"
    beside.cancel()
    await harness.stop()


async def test_a_burst_that_comes_when_the_last_is_done_is_no_sign_of_a_handler_that_waits() -> None:
    harness = Harness()
    spawn, spawned, handled = harness.dispatcher._spawn, 0, 0

    def count() -> None:
        nonlocal spawned
        spawned += 1
        spawn()

    harness.dispatcher._spawn = count  # type: ignore[method-assign]

    async def handler(_: bytes) -> None:
        nonlocal handled
        handled += 1

    consumers = [harness.consumer(handler) for _ in range(10)]
    for burst in range(1, 21):
        harness.submit(*consumers)
        await until(lambda burst=burst: handled == 10 * burst, pause=0)
    assert spawned <= 20
    await harness.stop()


async def test_a_handler_that_cancels_its_task_cancels_no_other() -> None:
    """Whether it waits for something after that, and so is cancelled itself, or returns first."""
    harness = Harness()
    handled: list[str] = []

    async def cancel_and_return(_: bytes) -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        handled.append("returned")

    async def cancel_and_wait(_: bytes) -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(0)

    async def innocent(_: bytes) -> None:
        await asyncio.sleep(0)
        handled.append("innocent")

    one, two, three = (harness.consumer(each) for each in (cancel_and_return, cancel_and_wait, innocent))
    harness.submit(one, three, two)
    harness.submit(one, three, two)
    await harness.idle()
    assert sorted(handled) == ["innocent"] * 2 + ["returned"] * 2
    assert harness.counters.totals()["handler_failures"] == 4, "those who waited, and once more each"
    await harness.stop()


async def test_everybody_is_served_after_all_tasks_were_cancelled() -> None:
    harness = Harness()
    inside = asyncio.Event()
    handled: list[bytes] = []

    async def handler(payload: bytes) -> None:
        if payload == b"wait" and not inside.is_set():
            inside.set()
            await asyncio.Event().wait()
        handled.append(payload)

    stuck, other = harness.consumer(handler), harness.consumer(handler)
    harness.submit(stuck, payload=b"wait")
    await inside.wait()
    harness.submit(other, payload=b"1")
    harness.submit(stuck, payload=b"2")
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
    await harness.idle()
    assert sorted(handled) == [b"1", b"2", b"wait"], "that which was cancelled has been handled again"
    await harness.stop()


async def test_a_context_variable_of_one_handler_is_not_seen_by_another() -> None:
    harness = Harness()
    secret: ContextVar[str | None] = ContextVar("secret", default=None)
    seen: list[str | None] = []

    async def set_it(_: bytes) -> None:
        secret.set("a")

    async def wait_with_it(_: bytes) -> None:
        secret.set("b")
        await asyncio.sleep(0.01)

    class Incomparable:
        def __eq__(self, other: object) -> bool:
            raise ValueError

        __hash__ = None  # type: ignore[assignment]

    async def set_what_cannot_be_compared(_: bytes) -> None:
        secret.set(Incomparable())  # type: ignore[arg-type]

    async def look(_: bytes) -> None:
        seen.append(secret.get())

    for setter in (set_it, wait_with_it, set_what_cannot_be_compared):
        setting = harness.consumer(setter)
        harness.submit(setting)
        harness.submit(setting, harness.consumer(look), harness.consumer(look))
        harness.submit(setting)
        await harness.idle()
    assert seen == [None] * 6
    await harness.stop()


async def test_what_a_handler_leaves_running_is_not_part_of_anothers_work() -> None:
    """A shutdown that it asks for waits for the others."""
    harness = Harness()
    later: list[asyncio.Task[bool]] = []
    inside, looked = asyncio.Event(), asyncio.Event()

    async def look_later() -> bool:
        await inside.wait()
        return harness.dispatcher.in_handler()

    async def leave_it(_: bytes) -> None:
        assert harness.dispatcher.in_handler()
        later.append(asyncio.create_task(look_later()))

    async def work(_: bytes) -> None:
        inside.set()
        await looked.wait()

    harness.submit(harness.consumer(leave_it), harness.consumer(work))
    await inside.wait()
    assert not await later[0]
    looked.set()
    await harness.idle()
    await harness.stop()


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks are of Python 3.12")
async def test_on_a_loop_with_eager_tasks_handlers_wait_side_by_side_as_well() -> None:
    asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined]
    harness = Harness()
    answer = asyncio.Event()

    async def ask(_: bytes) -> None:
        harness.submit(answering)
        async with asyncio.timeout(30):
            await answer.wait()

    async def give_answer(_: bytes) -> None:
        answer.set()

    answering = harness.consumer(give_answer)
    harness.submit(harness.consumer(ask))
    await until(answer.is_set)
    await harness.idle()
    await harness.stop()


class _Broken(logging.Filter):
    """An error where nobody expects one: in the user's logging."""

    def filter(self, record: logging.LogRecord) -> bool:
        if "handler" in record.getMessage():
            raise RuntimeError("broken filter")
        return True


@pytest.mark.parametrize("is_coroutine", [True, False])
async def test_an_internal_error_costs_one_attempt_and_no_order(
    is_coroutine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tars_mqtt._core.workers._AFTER_ERROR", 0.0)
    monkeypatch.setattr("tars_mqtt.aio.loop._AFTER_CANCELLATION", 0.0)
    harness = Harness()
    inside = most = 0
    handled: list[bytes] = []

    def work(payload: bytes) -> None:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        try:
            if payload == b"raise":
                raise ValueError
            handled.append(payload)
        finally:
            inside -= 1

    async def work_on_the_loop(payload: bytes) -> None:
        work(payload)

    recovery = Recovery(timeout=0.05)
    consumer = harness.consumer(work_on_the_loop) if is_coroutine else harness.plain_consumer(work)
    consumer.recovery = recovery
    logger = logging.getLogger("tars_mqtt.dispatch")
    broken = _Broken()
    logger.addFilter(broken)
    try:
        for number in range(5):
            harness.submit(consumer, payload=b"raise")
            harness.submit(consumer, payload=b"%d" % number)
        await until(lambda: len(handled) == 5)
        await asyncio.sleep(0.15)  # the time limits of the calls that failed are over by then
    finally:
        logger.removeFilter(broken)
    await until(lambda: consumer.tokens == 0)
    assert handled == [b"%d" % number for number in range(5)]
    assert (most, harness.dispatcher.pending, consumer.offered) == (1, 0, 0)
    assert "handler_timeouts" not in harness.counters.totals()
    await harness.stop()


async def test_calls_come_in_their_turn_however_busy_the_handlers_are() -> None:
    """Of an acknowledgement, for instance, while each round of the loop has a turn to see to."""
    bridge = Bridge()
    bridge.bind(asyncio.get_running_loop())
    rounds = 0
    called: list[int] = []

    def see_to_a_turn() -> None:
        nonlocal rounds
        rounds += 1
        if not called and rounds < 100:
            bridge.post(see_to_a_turn, lasting=True)

    see_to_a_turn()
    bridge.post(lambda: called.append(rounds))
    await until(lambda: called)
    assert called[0] <= 2


async def test_a_loop_that_was_held_up_does_not_count_one_time_limit_twice() -> None:
    harness = Harness()
    consumer = harness.consumer(lambda payload: asyncio.sleep(10))
    consumer.recovery = Recovery(timeout=0.02)
    harness.submit(consumer)
    await until(lambda: consumer.tokens)
    await asyncio.sleep(0.005)
    time.sleep(0.1)  # noqa: ASYNC251 - somebody holds up the loop
    await harness.idle()
    assert harness.counters.totals()["handler_timeouts"] == 1
    await harness.stop()


async def test_a_coroutine_that_ends_after_it_was_given_up_is_not_counted_again() -> None:
    harness = Harness()
    release = asyncio.Event()

    async def late(payload: bytes) -> None:
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            await release.wait()
            raise

    consumer = harness.consumer(late)
    consumer.recovery = Recovery(timeout=0.02)
    harness.submit(consumer)
    await until(lambda: harness.dispatcher._stuck_tasks)
    release.set()
    await harness.idle()
    assert harness.counters.totals() == {"handler_timeouts": 1}
    await harness.stop()


async def test_no_more_coroutines_than_workers_outlive_their_time_limit() -> None:
    """The lanes of others that do not heed it wait, as they do for threads: or there would be ever more of them."""
    harness = Harness()  # of one worker
    release = asyncio.Event()
    seen: list[bytes] = []

    async def stubborn(payload: bytes) -> None:
        seen.append(payload)
        while payload.isupper() and not release.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await release.wait()

    for payloads in ((b"A", b"a"), (b"B", b"b")):
        consumer = harness.consumer(stubborn)
        consumer.recovery = Recovery(timeout=0.02)
        for payload in payloads:
            harness.submit(consumer, payload=payload)
    try:
        await until(lambda: len(seen) == 3)
        await asyncio.sleep(0.1)
        assert sorted(seen) in ([b"A", b"B", b"a"], [b"A", b"B", b"b"])
        assert harness.counters.totals()["handler_timeouts"] == 1
    finally:
        release.set()
    await harness.idle()
    assert sorted(seen) == [b"A", b"B", b"a", b"b"]
    assert harness.dispatcher._stuck_tasks == set()
    await harness.stop()


def test_turns_that_a_cancelled_loop_leaves_behind_are_taken_on_the_next() -> None:
    handled: list[bytes] = []
    left: list[bool] = []
    harnesses: list[Harness] = []

    async def handler(payload: bytes) -> None:
        if payload == b"wait" and not left:
            left.append(True)
            await asyncio.Event().wait()
        handled.append(payload)

    async def first_loop() -> None:
        harness = Harness()
        harnesses.append(harness)
        consumers = [harness.consumer(handler) for _ in range(3)]
        harness.submit(consumers[0], payload=b"wait")
        await asyncio.sleep(0)
        harness.submit(*consumers, payload=b"later")

    async def second_loop() -> None:
        (harness,) = harnesses
        harness.dispatcher._bridge.bind(asyncio.get_running_loop())
        await until(lambda: len(handled) == 4)
        await harness.stop()

    asyncio.run(first_loop())
    asyncio.run(second_loop())
    assert sorted(handled) == [b"later"] * 3 + [b"wait"]


def test_tasks_of_a_loop_that_was_closed_under_them_keep_nobody_waiting() -> None:
    handled: list[bytes] = []
    harnesses: list[Harness] = []

    async def handler(payload: bytes) -> None:
        handled.append(payload)
        if payload == b"stop":
            # So long that its task leaves the loop to others next, of which there are none.
            time.sleep(0.005)  # noqa: ASYNC251
            asyncio.get_running_loop().stop()

    async def first_loop() -> None:
        harness = Harness()
        harnesses.append(harness)
        first, second = harness.consumer(handler), harness.consumer(handler)
        harness.submit(first, payload=b"stop")
        harness.submit(second, payload=b"later")

    async def second_loop() -> None:
        (harness,) = harnesses
        harness.dispatcher._bridge.bind(asyncio.get_running_loop())
        harness.submit(harness.consumer(handler), payload=b"last")
        await until(lambda: len(handled) == 3)
        await harness.stop()

    with contextlib.closing(asyncio.new_event_loop()) as loop:
        task = loop.create_task(first_loop())
        loop.run_forever()
        assert task.done()
        assert handled == [b"stop"]
    asyncio.run(second_loop())
    assert handled == [b"stop", b"later", b"last"]
    del task
    harnesses.clear()
    gc.collect()  # asyncio complains of what was left pending: here, and not in another test


def test_what_a_closed_loop_left_in_the_middle_begins_anew_on_the_next() -> None:
    """Its coroutine is destroyed by the collector, at any time and on any thread."""
    handled: list[bytes] = []
    left: list[bool] = []
    harnesses: list[Harness] = []
    consumers: list[Consumer] = []

    async def handler(payload: bytes) -> None:
        if payload == b"wait" and not left:
            left.append(True)
            asyncio.get_running_loop().stop()
            await asyncio.Event().wait()
        handled.append(payload)

    async def first_loop() -> None:
        harness = Harness()
        harnesses.append(harness)
        consumers.extend(harness.consumer(handler) for _ in range(3))
        harness.submit(consumers[0], payload=b"wait")

    async def second_loop() -> None:
        (harness,) = harnesses
        harness.dispatcher._bridge.bind(asyncio.get_running_loop())
        harness.dispatcher.bound()
        await asyncio.sleep(0)
        await asyncio.to_thread(gc.collect)
        harness.submit(*consumers, payload=b"later")
        await until(lambda: len(handled) == 4)
        await until(lambda: harness.dispatcher.pending == 0)
        assert [consumer.tokens for consumer in consumers] == [0, 0, 0]
        assert "handler_failures" not in harness.counters.totals()
        await harness.stop()

    with contextlib.closing(asyncio.new_event_loop()) as loop:
        task = loop.create_task(first_loop())
        loop.run_forever()
        assert task.done()
    asyncio.run(second_loop())
    assert sorted(handled) == [b"later"] * 3 + [b"wait"]
