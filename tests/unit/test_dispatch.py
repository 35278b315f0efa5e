"""Workers: who takes which turn, and that nobody works in vain."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

import pytest

from tars_mqtt import MQTTClientConfig
from tars_mqtt._core.dispatch import Consumer
from tars_mqtt._core.lane import Delivery, Fifo, Keyed
from tars_mqtt._core.recovery import Outcome, Recovery
from tars_mqtt._core.stats import Counters
from tars_mqtt._core.workers import WorkerPool
from tars_mqtt.message import Message
from tests.support.wait import eventually


class Handling:
    """Notes what it is called for, and waits where a test wants it to."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.inside: list[str] = []
        self.may_return: dict[str, threading.Event] = {}

    def hold(self, *names: str) -> None:
        self.may_return |= {name: threading.Event() for name in names}

    def release(self) -> None:
        for event in self.may_return.values():
            event.set()

    def __call__(self, delivery: Delivery) -> Outcome:
        name = delivery.message.payload.decode()
        self.inside.append(name)
        if name in self.may_return:
            assert self.may_return[name].wait(30)
        self.inside.remove(name)
        self.seen.append(name)
        return Outcome.HANDLED

    def timed_out(self, delivery: Delivery, timeout: float) -> Outcome:
        raise AssertionError("nothing has a time limit here")


def deliveries(*names: str) -> list[Delivery]:
    """What is before a colon is the key."""
    return [Delivery(Message("t", name.encode()), None, name.partition(":")[0]) for name in names]


def new_pool(workers: int, counters: Counters) -> WorkerPool:
    config = MQTTClientConfig("mqtt://localhost", "test", workers=workers)
    return WorkerPool(config, counters, lambda: None, lambda _: None)


@contextmanager
def a_pool(workers: int) -> Iterator[WorkerPool]:
    pool = new_pool(workers, Counters())
    try:
        yield pool
    finally:
        assert pool.stop(30) == []


def threads_of(pool: WorkerPool) -> int:
    return len(pool._threads)


def consumer(
    pool: WorkerPool, handling: Handling, lane: Fifo | Keyed | None = None, limit: int = 1
) -> Consumer:
    added = Consumer(lane=Fifo() if lane is None else lane, limit=limit, handle=handling)
    pool.add(added)
    return added


def test_one_handler_that_blocks_keeps_no_other_consumer_waiting() -> None:
    handling = Handling()
    handling.hold("0")
    with a_pool(workers=2) as pool:
        pool.submit({consumer(pool, handling): deliveries(str(number)) for number in range(50)})
        eventually(lambda: len(handling.seen) == 49)
        assert handling.inside == ["0"]
        handling.release()
        eventually(lambda: len(handling.seen) == 50)


def test_as_many_handlers_block_at_once_as_there_are_workers() -> None:
    handling = Handling()
    names = [str(number) for number in range(5)]
    handling.hold(*names)
    with a_pool(workers=4) as pool:
        pool.submit({consumer(pool, handling): deliveries(name) for name in names})
        eventually(lambda: len(handling.inside) == 4)
        handling.release()
        eventually(lambda: len(handling.seen) == 5)
        assert threads_of(pool) == 4


def test_consumers_that_come_one_after_the_other_find_a_worker_each() -> None:
    """Each turn that arrives while everybody is busy starts or wakes one more."""
    handling = Handling()
    names = [str(number) for number in range(3)]
    handling.hold(*names)
    with a_pool(workers=3) as pool:
        for count, name in enumerate(names, 1):
            pool.submit({consumer(pool, handling): deliveries(name)})
            eventually(lambda count=count: len(handling.inside) == count)
        handling.release()
        eventually(lambda: len(handling.seen) == 3)
        # All asleep now: the same again, with those who sleep.
        eventually(lambda: len(pool._idle) == 3)
        handling.hold(*names)
        pool.submit({consumer(pool, handling): deliveries(name) for name in names})
        eventually(lambda: len(handling.inside) == 3)
        handling.release()
        assert threads_of(pool) == 3


def test_nobody_asks_again_and_again_for_a_key_that_is_in_work() -> None:
    """It would keep a processor busy for as long as one handler takes."""

    class Counted(Keyed):
        taken = 0

        def take(self, most: int) -> list[Delivery]:
            self.taken += 1
            return super().take(most)

    handling, lane = Handling(), Counted()
    handling.hold("a:1")
    with a_pool(workers=4) as pool:
        keyed = consumer(pool, handling, lane, limit=4)
        pool.submit({keyed: deliveries("a:1", "a:2", "a:3", "b:1", "b:2", "c:1")})
        eventually(lambda: sorted(handling.seen) == ["b:1", "b:2", "c:1"])
        eventually(lambda: keyed.tokens == 1)
        taken = lane.taken
        time.sleep(0.05)
        assert lane.taken == taken
        handling.release()
        eventually(lambda: len(handling.seen) == 6)
    assert [name for name in handling.seen if name.startswith("a")] == ["a:1", "a:2", "a:3"]


def test_an_idle_worker_keeps_no_message() -> None:
    """It may be large, and the next may not come for long."""
    handling = Handling()
    with a_pool(workers=1) as pool:
        batch = deliveries("1")
        ended = threading.Event()
        batch[0].message.payload = _Payload(ended)
        pool.submit({consumer(pool, handling): batch})
        del batch
        assert ended.wait(30)


class _Payload(bytes):
    """Says when nobody has it any more."""

    def __new__(cls, ended: threading.Event) -> Self:
        self = super().__new__(cls, b"1")
        self.ended = ended
        return self

    def __del__(self) -> None:
        self.ended.set()


def test_a_call_that_is_over_is_not_kept_until_its_time_would_have_been_up() -> None:
    """With a long limit, and much traffic, that would be all messages of that time."""
    handling = Handling()
    with a_pool(workers=2) as pool:
        limited = consumer(pool, handling)
        limited.recovery = Recovery(timeout=600.0)
        for number in range(100):
            ended = threading.Event()
            batch = deliveries(str(number))
            batch[0].message.payload = _Payload(ended)
            pool.submit({limited: batch})
            del batch
            assert ended.wait(30)
        assert len(pool.timer._due) == 1
        assert not pool._watches


def test_each_time_limit_is_kept_whichever_is_due_first() -> None:
    """One look at the watches serves all: it comes in time for the shortest, and again for the next."""
    timed_out: list[tuple[str, float]] = []

    class Limited(Handling):
        def timed_out(self, delivery: Delivery, timeout: float) -> Outcome:
            timed_out.append((delivery.message.payload.decode(), timeout))
            return Outcome.FAILED

    handling = Limited()
    handling.hold("slow", "slower", "forever")
    with a_pool(workers=4) as pool:
        for name, limit in (("forever", 600.0), ("slower", 0.15), ("slow", 0.05), ("quick", 0.1)):
            limited = consumer(pool, handling)
            limited.recovery = Recovery(timeout=limit)
            pool.submit({limited: deliveries(name)})
        eventually(lambda: len(timed_out) == 2)
        assert timed_out == [("slow", 0.05), ("slower", 0.15)]
        eventually(lambda: pool.pending == 1)
        handling.release()
        eventually(lambda: pool.pending == 0)
        assert len(timed_out) == 2


def test_a_thread_that_cannot_be_started_costs_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    handling = Handling()
    start = threading.Thread.start
    refused = []

    def refuse(thread: threading.Thread) -> None:
        if "worker" in thread.name and not refused:
            refused.append(thread)
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with a_pool(workers=1) as pool:
        both = consumer(pool, handling), consumer(pool, handling)
        pool.submit({both[0]: deliveries("1")})
        assert refused
        assert handling.seen == []
        pool.submit({both[1]: deliveries("2")})
        eventually(lambda: sorted(handling.seen) == ["1", "2"])


def test_what_a_worker_was_woken_for_may_be_gone_when_it_comes() -> None:
    """And it sleeps again, to be woken for the next."""
    handling = Handling()
    with a_pool(workers=1) as pool:
        first = consumer(pool, handling)
        pool.submit({first: deliveries("1")})
        eventually(lambda: len(pool._idle) == 1)
        with pool._lock:
            pool._waking = True
            bell = pool._idle.pop()
        bell.release()
        eventually(lambda: len(pool._idle) == 1 and not pool._waking)
        pool.submit({first: deliveries("2")})
        eventually(lambda: handling.seen == ["1", "2"])


def test_a_pool_that_was_stopped_begins_anew_and_what_waited_is_counted() -> None:
    handling = Handling()
    handling.hold("1")
    pool = new_pool(1, counters := Counters())
    first = consumer(pool, handling)
    pool.submit({first: deliveries("1", "2", "3")})
    eventually(lambda: handling.inside == ["1"])
    assert len(pool.stop(0)) == 1
    assert pool.pending == 0
    assert counters.dropped() == {"shutdown": 2}
    pool.start()
    pool.submit({first: deliveries("4")})
    eventually(lambda: handling.seen == ["4"])
    handling.release()
    eventually(lambda: handling.seen == ["4", "1"])
    pool.submit({first: deliveries("5")})
    eventually(lambda: handling.seen == ["4", "1", "5"])
    assert threads_of(pool) == 1
    assert pool.stop(30) == []


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_order_holds_within_a_consumer_whoever_does_the_work(workers: int) -> None:
    handlings = [Handling() for _ in range(20)]
    with a_pool(workers) as pool:
        consumers = [consumer(pool, handling) for handling in handlings]
        for number in range(200):
            pool.submit({each: deliveries(str(number)) for each in consumers[number % 3 :: 3]})
        expected = [[str(number) for number in range(200) if number % 3 == index % 3] for index in range(20)]
        eventually(lambda: [handling.seen for handling in handlings] == expected)
        eventually(lambda: pool.pending == 0)
        assert pool.handled == sum(map(len, expected))


def test_an_iterator_is_woken_for_its_own_deliveries_alone() -> None:
    """There may be many, each with its thread, and much else that is handled."""
    handling = Handling()
    with a_pool(workers=1) as pool:
        quiet = consumer(pool, handling, limit=0)
        busy = consumer(pool, handling)
        looks, taken = 0, []
        lane_length = Fifo.__len__

        class Counted(Fifo):
            def __len__(self) -> int:
                nonlocal looks
                looks += 1
                return lane_length(self)

        quiet.lane = Counted()
        reading = threading.Thread(target=lambda: taken.append(pool.next(quiet, 30)), daemon=True)
        reading.start()
        eventually(lambda: quiet.reader is reading)
        for number in range(100):
            pool.submit({busy: deliveries(str(number))})
            eventually(lambda number=number: len(handling.seen) == number + 1)
        assert looks <= 2
        pool.submit({quiet: deliveries("mine")})
        reading.join(30)
        assert taken[0].delivery.message.payload == b"mine"
        pool.finished(taken[0])


def test_a_shutdown_waits_for_handlers_though_the_reader_of_an_iterator_asks_for_it() -> None:
    """What an iterator has handed out is not waited for; that is what it has handed out, and no more."""
    handling = Handling()
    handling.hold("work")
    with a_pool(workers=1) as pool:
        read = consumer(pool, handling, limit=0)
        pool.submit({read: deliveries(*map(str, range(10)))})
        for _ in range(10):
            taken = pool.next(read, 30)
            assert taken is not None
            pool.finished(taken)
        pool.submit({consumer(pool, handling): deliveries("work")})
        eventually(lambda: handling.inside == ["work"])
        assert not pool.wait_idle(0.05)
        handling.release()
        assert pool.wait_idle(30)
        assert read.tokens == 0
