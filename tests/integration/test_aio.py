"""What only the asyncio client promises: a loop that is never blocked, cancellation, loops and threads."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import time
from concurrent.futures import CancelledError as FutureCancelledError
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tars_mqtt import MQTTClient as SyncClient
from tars_mqtt.aio import (
    AckTimeoutError,
    ClosedError,
    ConnectError,
    ConnectionState,
    Envelope,
    Message,
    MQTTClient,
    QueueFullError,
    SubscribeError,
)
from tars_mqtt.aio.loop import LoopDispatcher
from tests.support import PacketType, ScriptedBroker
from tests.support import packet as mqtt
from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

    from tests.support import Broker, FaultProxy


QUICK = {"reconnect_min_delay": 0.1, "reconnect_max_delay": 0.5, "shutdown_timeout": 2.0}


async def until(predicate: Callable[[], object], timeout: float = 30.0) -> None:
    """Like ``eventually``, without blocking the loop."""
    async with asyncio.timeout(timeout):
        while not predicate():  # noqa: ASYNC110 - what is waited for sets no event
            await asyncio.sleep(0.01)


class Ticker:
    """Measures the longest time, in seconds, for which the loop worked or waited in one go.

    A machine that runs somebody else in between says nothing about the loop. So work is measured in
    processor time, without the garbage collector's, which grows with all that the process holds. Waiting is
    measured by another thread of this process: it counts how often it gets to look while the loop neither
    ticks nor works, and no thread of ours waits for a processor.
    """

    _PERIOD = 0.005

    def __init__(self) -> None:
        self.longest = 0.0
        self._ticks = 0
        self._collecting = 0.0
        self._collected = 0.0
        self._ended = threading.Event()
        self._loop_thread = threading.get_ident()
        self._watcher = threading.Thread(target=self._watch, name="ticker")

    async def __aenter__(self) -> Self:
        gc.callbacks.append(self._on_collection)
        self._task = asyncio.create_task(self._tick())
        await asyncio.sleep(0)
        self._watcher.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._ended.set()
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._watcher.join()
        gc.callbacks.remove(self._on_collection)

    def _on_collection(self, phase: str, _: object) -> None:
        if threading.get_ident() == self._loop_thread:
            if phase == "start":
                self._collecting = time.thread_time()
            else:
                self._collected += time.thread_time() - self._collecting

    def _worked(self) -> float:
        return time.thread_time() - self._collected

    async def _tick(self) -> None:
        while True:
            worked = self._worked()
            await asyncio.sleep(self._PERIOD)
            self.longest = max(self.longest, self._worked() - worked)
            self._ticks += 1

    def _watch(self) -> None:
        clock = time.pthread_getcpuclockid(self._loop_thread)
        ticks, spent, waits, starved = -1, 0.0, 0, 0.0
        while not self._ended.wait(self._PERIOD):
            before, spent = spent, time.clock_gettime(clock)
            starved_before, starved = starved, _starved()
            if self._ticks != ticks:
                ticks, waits = self._ticks, 0
            elif spent - before < self._PERIOD / 10 and starved - starved_before < self._PERIOD / 10:
                waits += 1
                self.longest = max(self.longest, waits * self._PERIOD)


def _starved() -> float:
    """For how many seconds threads of this process had work to do, and no processor. Known on Linux."""
    total = 0
    for task in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError, IndexError):
            total += int(task.read_text().split()[1])
    return total / 1e9


async def test_the_ticker_sees_a_loop_that_waits_and_one_that_works() -> None:
    async with Ticker() as ticker:
        time.sleep(1.5)  # noqa: ASYNC251 - on purpose, and for long: a busy machine counts for less
    assert ticker.longest > 0.05
    async with Ticker() as ticker:
        until = time.thread_time() + 0.1
        while time.thread_time() < until:
            pass
        await asyncio.sleep(0.02)
    assert ticker.longest > 0.05


# -- the loop is never blocked ------------------------------------------------------------------


async def test_the_loop_goes_on_while_the_broker_is_frozen(broker: Broker) -> None:
    """Connected, publishing, subscribing, timing out and shutting down: nothing of it blocks."""
    client = MQTTClient(broker.url, "ticker", enable_health=True, **QUICK)
    async with Ticker() as ticker:
        await client.connect()
        broker.freeze()
        try:
            for number in range(200):
                client.submit_event("a", "n", number, qos=1)
            with pytest.raises(AckTimeoutError):
                await client.publish_event("a", "n", 1, qos=1, timeout=0.3)
            with contextlib.suppress(Exception):
                await client.subscribe("b", lambda payload: None, timeout=0.3)
            await client.shutdown()
        finally:
            broker.thaw()
    assert ticker.longest < 0.05
    assert client.state is ConnectionState.CLOSED


async def test_the_loop_goes_on_while_nobody_answers(broker: Broker) -> None:
    """The kernel of a frozen broker takes the connection; connecting times out, and blocks nobody."""
    broker.freeze()
    try:
        async with Ticker() as ticker:
            client = MQTTClient(broker.url, "ticker", **QUICK)
            with pytest.raises(ConnectError):
                await client.connect(timeout=0.6)
        assert ticker.longest < 0.05
    finally:
        broker.thaw()


async def test_the_loop_goes_on_while_ten_thousand_messages_come_and_go(broker: Broker) -> None:
    """Handlers that never wait share the loop all the same, and so do ten thousand acknowledgements."""
    handled = 0

    async def handler(payload: bytes) -> None:
        nonlocal handled
        handled += 1

    async with MQTTClient(broker.url, "ticker", **QUICK) as client:
        await client.subscribe("a", handler, qos=1)
        async with Ticker() as ticker:
            receipts = []
            for number in range(10_000):
                receipts.append(client.submit_event("a", "n", number, qos=1))
                if number % 100 == 99:
                    await asyncio.sleep(0)
            for receipt in receipts:
                await receipt
            await until(lambda: handled == 10_000)
    assert ticker.longest < 0.05


async def test_the_loop_goes_on_behind_a_slow_link(proxy: FaultProxy) -> None:
    """A link that takes bytes slowly fills our buffers, not the loop's time."""
    proxy.bandwidth(200_000)
    async with MQTTClient(proxy.url, "ticker", **QUICK) as client, Ticker() as ticker:
        for _ in range(4):
            await client.publish("a", b"x" * 100_000, qos=1)
    assert ticker.longest < 0.05


async def test_the_loops_default_executor_may_be_full(broker: Broker) -> None:
    """What blocks runs on threads of our own."""
    loop = asyncio.get_running_loop()
    release = threading.Event()
    loop.set_default_executor(ThreadPoolExecutor(1))
    busy = loop.run_in_executor(None, release.wait)
    try:
        async with asyncio.timeout(8):
            async with MQTTClient(broker.url, "busy", **QUICK) as client:
                await client.publish_event("a", "n", 1, qos=1)
    finally:
        release.set()
        await busy


# -- handlers -----------------------------------------------------------------------------------


async def test_a_handler_may_await_everything_on_its_own_client(broker: Broker) -> None:
    """Publishing, subscribing, unsubscribing and shutting down, inside a handler."""
    done = asyncio.Event()
    client = MQTTClient(broker.url, "inside", **QUICK)

    async def second(envelope: Envelope) -> None:
        await subscription.unsubscribe()
        await client.shutdown()
        done.set()

    async def first(envelope: Envelope) -> None:
        await client.subscribe("answers", second, qos=1)
        await client.publish_event("answers", "n", envelope.data, qos=1)

    subscription = await client.subscribe("questions", first, qos=1)
    await client.connect()
    await client.publish_event("questions", "n", 1, qos=1)
    async with asyncio.timeout(8):
        await done.wait()
    await until(lambda: client.state is ConnectionState.CLOSED)


async def test_coroutines_run_on_the_loop_and_functions_on_threads(broker: Broker) -> None:
    threads: dict[str, threading.Thread] = {}

    async def coroutine(payload: bytes) -> None:
        threads["coroutine"] = threading.current_thread()

    def function(payload: bytes) -> None:
        threads["function"] = threading.current_thread()

    async with MQTTClient(broker.url, "threads", **QUICK) as client:
        await client.subscribe("a", coroutine)
        await client.subscribe("a", function)
        await client.publish("a", b"")
        await until(lambda: len(threads) == 2)
    assert threads["coroutine"] is threading.current_thread()
    assert threads["function"].name.startswith("tars-mqtt/threads/worker")


async def test_one_subscription_keeps_order_while_others_go_on(broker: Broker) -> None:
    """A handler that waits holds its own lane only."""
    order: list[bytes] = []
    others: list[bytes] = []
    gate = asyncio.Event()

    async def slow(payload: bytes) -> None:
        await gate.wait()
        order.append(payload)

    async def quick(payload: bytes) -> None:
        others.append(payload)

    async with MQTTClient(broker.url, "lanes", **QUICK) as client:
        await client.subscribe("slow", slow, qos=1)
        await client.subscribe("quick", quick, qos=1)
        for number in range(5):
            await client.publish("slow", str(number), qos=1)
            await client.publish("quick", str(number), qos=1)
        await until(lambda: len(others) == 5)
        assert order == []
        gate.set()
        await until(lambda: len(order) == 5)
    assert order == [b"0", b"1", b"2", b"3", b"4"]


async def test_concurrency_and_order_by_hold_for_tasks(broker: Broker) -> None:
    """As many tasks at once as allowed, and one at a time for each key."""
    running: list[str] = []
    most = 0
    all_published = asyncio.Event()
    per_topic: dict[str, list[bytes]] = {"k/1": [], "k/2": [], "k/3": []}

    async def handler(message: Message) -> None:
        nonlocal most
        assert message.topic not in running
        running.append(message.topic)
        most = max(most, len(running))
        await all_published.wait()
        await asyncio.sleep(0.02)
        running.remove(message.topic)
        per_topic[message.topic].append(message.payload)

    async with MQTTClient(broker.url, "keys", **QUICK) as client:
        await client.subscribe("k/+", handler, qos=1, order_by="topic", concurrency=2)
        for number in range(5):
            for topic in per_topic:
                await client.publish(topic, str(number), qos=1)
        await until(lambda: len(running) == 2)
        all_published.set()
        await until(lambda: all(len(seen) == 5 for seen in per_topic.values()))
    assert most == 2
    assert all(seen == [b"0", b"1", b"2", b"3", b"4"] for seen in per_topic.values())


async def test_a_handler_that_swallows_cancellation_is_cancelled_until_it_ends(broker: Broker) -> None:
    """Shutdown does not rely on a single ``cancel``."""
    swallowed = 0

    async def stubborn(payload: bytes) -> None:
        nonlocal swallowed
        while swallowed < 3:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                swallowed += 1

    client = MQTTClient(broker.url, "stubborn", **QUICK)
    await client.subscribe("a", stubborn)
    await client.connect()
    await client.publish("a", b"")
    await until(lambda: client.stats().pending == 1)
    await client.shutdown(timeout=1.5)
    assert swallowed == 3
    assert not [task for task in asyncio.all_tasks() if "tars-mqtt" in task.get_name()]


async def test_a_handler_that_shutdown_cancels_is_no_error(
    broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    """An alarm at every restart would hide those that count. What the handler itself lets happen is one."""

    async def waiting(message: Message) -> None:
        if message.payload == b"own":
            raise asyncio.CancelledError
        await asyncio.sleep(60)

    client = MQTTClient(broker.url, "waiting", **QUICK)
    await client.subscribe("a", waiting)
    await client.connect()
    await client.publish("a", b"own")
    await client.publish("a", b"")
    await until(lambda: client.stats().handler_failures == 1)
    await until(lambda: client.stats().pending == 1)
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    caplog.clear()
    await client.shutdown(timeout=0.5)
    assert {record.levelname for record in caplog.records} == {"WARNING"}
    assert "waiting was cancelled on a message of 'a'" in caplog.text


# -- cancellation and time-outs -----------------------------------------------------------------


async def test_cancelling_a_publish_stops_the_wait_and_not_the_send(broker: Broker) -> None:
    received: list[bytes] = []

    async def handler(payload: bytes) -> None:
        received.append(payload)

    async with MQTTClient(broker.url, "cancel", **QUICK) as client:
        await client.subscribe("a", handler, qos=1)
        broker.freeze()
        publish = asyncio.create_task(client.publish("a", b"on its way", qos=1))
        await until(lambda: client.stats().inflight == 1)
        publish.cancel()
        with pytest.raises(asyncio.CancelledError):
            await publish
        broker.thaw()
        await until(lambda: received == [b"on its way"])


async def test_cancelling_connect_leaves_nothing_behind(broker: Broker) -> None:
    broker.freeze()
    try:
        client = MQTTClient(broker.url, "cancel", **QUICK)
        connect = asyncio.create_task(client.connect())
        await until(lambda: any("cancel/network" in thread.name for thread in threading.enumerate()))
        connect.cancel()
        with pytest.raises(asyncio.CancelledError):
            await connect
        await until(lambda: not any("tars-mqtt/cancel" in thread.name for thread in threading.enumerate()))
    finally:
        broker.thaw()


async def test_cancelling_a_connect_takes_away_no_connection_that_it_did_not_make(broker: Broker) -> None:
    client = MQTTClient(broker.url, "me", **QUICK)
    await client.connect()
    second = asyncio.create_task(client.connect())
    await asyncio.sleep(0)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    assert client.connected
    broker.kill()
    await until(lambda: not client.connected)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await client.connect()
    assert client.state is ConnectionState.RECONNECTING
    broker.start()
    await until(lambda: client.connected)
    await client.shutdown()


async def test_many_who_wait_for_a_connection_hold_up_no_shutdown(broker: Broker) -> None:
    client = MQTTClient(broker.url, "me", **QUICK)
    await client.connect()
    broker.kill()
    await until(lambda: not client.connected)
    waiting = [asyncio.create_task(client.connect(timeout=None)) for _ in range(20)]
    await asyncio.sleep(0.1)
    async with asyncio.timeout(10):
        await client.shutdown()
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {ClosedError}


async def test_a_handler_that_shuts_down_a_client_which_runs_is_not_cancelled_by_that(broker: Broker) -> None:
    client = MQTTClient(broker.url, "me", shutdown_timeout=30)
    ended: list[str] = []

    @client.on("end")
    async def end(payload: bytes) -> None:
        await client.shutdown()
        ended.append("in good order")

    running = asyncio.create_task(client.run())
    assert await client.wait_connected(10)
    await client.publish("end", b"")
    async with asyncio.timeout(15):
        await running
    assert ended == ["in good order"]


async def test_cancelling_the_body_of_async_with_shuts_down(broker: Broker) -> None:
    inside = asyncio.Event()
    clients = []

    async def service() -> None:
        async with MQTTClient(broker.url, "body", **QUICK) as client:
            clients.append(client)
            inside.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(service())
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert clients[0].state is ConnectionState.CLOSED


async def test_shutdown_survives_being_cancelled(broker: Broker) -> None:
    """The work is done first, then the cancellation is delivered."""
    release = asyncio.Event()

    async def handler(payload: bytes) -> None:
        await release.wait()

    client = MQTTClient(broker.url, "survivor", **QUICK)
    await client.subscribe("a", handler)
    await client.connect()
    await client.publish("a", b"")
    await until(lambda: client.stats().pending == 1)
    shutdown = asyncio.create_task(client.shutdown())
    await until(lambda: client.state is ConnectionState.CLOSING)
    shutdown.cancel()
    await asyncio.sleep(0)
    release.set()
    with pytest.raises(asyncio.CancelledError):
        await shutdown
    assert client.state is ConnectionState.CLOSED
    assert client.stats().handled == 1


async def test_asyncio_timeout_works_around_every_call(broker: Broker) -> None:
    client = MQTTClient(broker.url, "timeouts", **QUICK)
    await client.connect()
    broker.freeze()
    try:
        calls = (
            lambda: client.publish("a", b"", qos=1),
            lambda: client.publish_event("a", "n", 1, qos=1),
            lambda: client.subscribe("b", lambda payload: None),
            lambda: client.wait_connected() if not client.connected else asyncio.sleep(5),
            lambda: client.messages("c").next(None),
            lambda: client.submit_event("a", "n", 1, qos=2).result(),
        )
        for call in calls:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await call()
    finally:
        broker.thaw()
    await client.shutdown()


# -- acknowledgements and backpressure ------------------------------------------------------------


async def test_five_hundred_publishes_at_once(broker: Broker) -> None:
    received: set[bytes] = set()

    async def handler(payload: bytes) -> None:
        received.add(payload)

    async with MQTTClient(broker.url, "gather", **QUICK) as client:
        await client.subscribe("a", handler, qos=1)
        ids = await asyncio.gather(*(client.publish_event("a", "n", n, qos=1) for n in range(500)))
        assert len(set(ids)) == 500
        await until(lambda: len(received) == 500)


async def test_large_messages_leave_while_others_are_made(broker: Broker) -> None:
    """They need not all be held at once, and a broker that takes none holds nobody up."""
    payload = b"x" * 600_000
    async with MQTTClient(broker.url, "large", **QUICK) as client:
        received = 0

        async def count(_: bytes) -> None:
            nonlocal received
            received += 1

        await client.subscribe("a", count)
        for _ in range(20):
            await client.publish("a", payload)
        await until(lambda: received == 20)
        broker.freeze()
        async with asyncio.timeout(30):
            for _ in range(30):
                await client.publish("a", payload)
        assert client._engine.backlog.crowd.there
        broker.thaw()
        await until(lambda: received == 50)
        assert not client._engine.backlog.crowd.there


async def test_a_full_queue_is_awaited_by_publish_and_an_error_for_submit(broker: Broker) -> None:
    """Backpressure is awaited, never blocked on; ``submit_event`` has nothing to await."""
    async with MQTTClient(broker.url, "full", max_queued=5, **QUICK) as client:
        broker.freeze()
        for number in range(5):
            client.submit_event("a", "n", number, qos=1)
        with pytest.raises(QueueFullError):
            client.submit_event("a", "n", 5, qos=1)
        with pytest.raises(QueueFullError):
            await client.publish_event("a", "n", 5, qos=1, timeout=0.2)
        waiting = [asyncio.create_task(client.publish_event("a", "n", n, qos=1)) for n in range(20)]
        await asyncio.sleep(0.05)
        assert not any(task.done() for task in waiting)
        broker.thaw()
        await asyncio.gather(*waiting)


async def test_a_receipt_can_be_awaited_and_asked_and_taken_back(broker: Broker) -> None:
    async with MQTTClient(broker.url, "receipts", max_inflight=1, **QUICK) as client:
        receipt = client.submit_event("a", "n", 1, qos=1)
        assert await receipt == receipt.envelope_id
        assert receipt.done()
        assert await receipt.exception() is None
        broker.freeze()
        try:
            first = client.submit_event("a", "n", 1, qos=1)
            await until(lambda: client.stats().inflight == 1)
            unsent = client.submit_event("a", "n", 2, qos=1)
            with pytest.raises(AckTimeoutError) as caught:
                await first.result(0.1)
            assert caught.value.receipt is first
            assert unsent.cancel()
            assert not first.cancel()
            with pytest.raises(FutureCancelledError):
                await unsent
        finally:
            broker.thaw()
        assert await first == first.envelope_id


# -- loops and threads ----------------------------------------------------------------------------


async def test_several_clients_on_one_loop(broker: Broker) -> None:
    heard: dict[int, list[bytes]] = {number: [] for number in range(5)}
    async with contextlib.AsyncExitStack() as stack:
        for number in range(5):

            async def handler(payload: bytes, number: int = number) -> None:
                heard[number].append(payload)

            client = await stack.enter_async_context(MQTTClient(broker.url, f"many-{number}", **QUICK))
            await client.subscribe("a", handler, qos=1)
        await client.publish("a", b"to all", qos=1)
        await until(lambda: all(payloads == [b"to all"] for payloads in heard.values()))


def test_clients_in_several_loops_and_threads(broker: Broker) -> None:
    results: list[int] = []

    async def service(number: int) -> None:
        got = asyncio.Event()

        async def handler(payload: bytes) -> None:
            got.set()

        async with MQTTClient(broker.url, f"loop-{number}", **QUICK) as client:
            await client.subscribe(f"loops/{number}", handler, qos=1)
            await client.publish_event(f"loops/{number}", "n", number, qos=1)
            await asyncio.wait_for(got.wait(), 8)
            results.append(number)

    threads = [threading.Thread(target=asyncio.run, args=(service(number),)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(results) == [0, 1, 2, 3]


async def test_a_client_used_from_another_loop_says_so(broker: Broker) -> None:
    async with MQTTClient(broker.url, "mine", **QUICK) as client:

        def elsewhere() -> None:
            with pytest.raises(RuntimeError, match="another event loop"):
                asyncio.run(client.publish_event("a", "n", 1))

        await asyncio.to_thread(elsewhere)


def test_a_client_may_move_to_another_loop_once_it_is_shut_down(broker: Broker) -> None:
    client = MQTTClient(broker.url, "mover", **QUICK)

    async def use() -> str:
        async with client:
            return await client.publish_event("a", "n", 1, qos=1)

    assert asyncio.run(use()) != asyncio.run(use())


def test_a_loop_that_is_closed_without_shutdown_does_not_hurt_the_engine(broker: Broker) -> None:
    """The service forgot to shut down; the network thread goes on, and a new loop can end it."""
    client = MQTTClient(broker.url, "orphan", **QUICK)

    async def forget() -> None:
        async def handler(payload: bytes) -> None:
            pass

        await client.subscribe("a", handler)
        await client.connect()
        client.submit_event("a", "n", 1, qos=1)

    asyncio.run(forget())
    eventually(lambda: client.stats().acknowledged == 1)
    asyncio.run(client.shutdown(timeout=1))
    assert client.state is ConnectionState.CLOSED


def test_a_handler_that_a_closed_loop_never_began_begins_on_the_next(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = MQTTClient(broker.url, "orphan", **QUICK)
    handled: list[bytes] = []

    async def handler(payload: bytes) -> None:
        handled.append(payload)

    async def begin() -> None:
        await client.subscribe("a", handler)
        await client.connect()

    loop = asyncio.new_event_loop()
    loop.run_until_complete(begin())
    with monkeypatch.context() as patch:
        spawn = LoopDispatcher._spawn

        def spawn_too_late(dispatcher: LoopDispatcher) -> None:
            spawn(dispatcher)
            loop.stop()

        patch.setattr(LoopDispatcher, "_spawn", spawn_too_late)
        client.submit_event("a", "n", 1, qos=1)
        loop.run_forever()
    loop.close()
    assert not handled

    async def again() -> None:
        async with client:
            await until(lambda: handled)

    asyncio.run(again())
    gc.collect()


def test_it_runs_on_uvloop(broker: Broker) -> None:
    uvloop = pytest.importorskip("uvloop")
    received: list[bytes] = []

    async def main() -> None:
        async def handler(payload: bytes) -> None:
            received.append(payload)

        async with MQTTClient(broker.url, "uv", **QUICK) as client:
            await client.subscribe("a", handler, qos=1)
            await client.publish("a", b"fast", qos=1)
            await until(lambda: received == [b"fast"])

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


# -- messages -------------------------------------------------------------------------------------


async def test_messages_are_iterated_in_order(broker: Broker) -> None:
    async with MQTTClient(broker.url, "iterate", **QUICK) as client:
        async with client.messages("a/#", qos=1) as messages:
            for number in range(20):
                await client.publish("a/b", str(number), qos=1)
            seen = []
            async for message in messages:
                seen.append(int(message.payload))
                if len(seen) == 20:
                    break
        assert seen == list(range(20))


async def test_an_iterator_whose_first_wait_is_cancelled_goes_on(proxy: FaultProxy) -> None:
    """Its subscription is under way; and the limit of a wait holds for that as well."""
    async with MQTTClient(proxy.url, "me", **QUICK) as client:
        proxy.stall("to_client")
        messages = client.messages("a", qos=1)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await anext(messages)
        with pytest.raises(TimeoutError, match="no message came in time"):
            await messages.next(0.05)
        proxy.resume()
        receiving = asyncio.create_task(messages.next())
        await until(lambda: messages._asked is not None and messages._asked.done())
        await client.publish("a", b"1", qos=1)
        message = await receiving
        assert message is not None
        assert message.payload == b"1"


async def test_an_iterator_that_the_broker_does_not_answer_says_so_and_ends(proxy: FaultProxy) -> None:
    async with MQTTClient(proxy.url, "me", connect_timeout=0.3, keepalive=60, **QUICK) as client:
        proxy.stall("to_client")
        messages = client.messages("a")
        with pytest.raises(SubscribeError, match="did not answer"):
            await messages.next()
        assert await messages.next() is None
        proxy.resume()


async def test_an_iterator_that_is_refused_after_a_wait_was_cut_short_says_so() -> None:
    answer = threading.Event()

    def refuse(connection) -> None:
        connection.accept()
        asked = connection.expect(PacketType.SUBSCRIBE)
        assert answer.wait(30)
        connection.send(mqtt.suback(asked.packet_id, [0x87], level=connection.level))
        connection.serve()

    with ScriptedBroker(refuse) as broker:
        async with MQTTClient(broker.url, "me", **QUICK) as client:
            messages = client.messages("secret/#")
            with pytest.raises(TimeoutError):
                await messages.next(0.05)
            answer.set()
            with pytest.raises(SubscribeError, match="Not authorized"):
                await messages.next()
            assert await messages.next() is None


async def test_a_connected_client_needs_no_time_to_connect(broker: Broker) -> None:
    async with MQTTClient(broker.url, "me", **QUICK) as client:
        for _ in range(20):
            await client.connect(timeout=0)


async def test_a_handler_that_shuts_down_twice_at_once_is_finished_first(broker: Broker) -> None:
    client = MQTTClient(broker.url, "me", shutdown_timeout=30)
    ended: list[str] = []

    @client.on("end")
    async def end(payload: bytes) -> None:
        await asyncio.gather(client.shutdown(), client.shutdown())
        await asyncio.sleep(0.1)
        ended.append("in good order")

    await client.connect()
    await client.publish("end", b"")
    async with asyncio.timeout(15):
        await until(lambda: client.state is ConnectionState.CLOSED)
    assert ended
    await until(lambda: "blocking" not in str(threading.enumerate()))


async def test_a_task_that_outlives_its_handler_is_in_no_handler(broker: Broker) -> None:
    """Not even while the worker of that handler has another message in work: a shutdown waits for that."""
    client = MQTTClient(broker.url, "me", **QUICK)
    tasks: list[asyncio.Task[None]] = []
    may_stop = asyncio.Event()
    handled: list[bytes] = []

    async def stop() -> None:
        await may_stop.wait()
        await client.shutdown(20)
        assert client.state is ConnectionState.CLOSED
        assert handled[-1] == b"slow"

    async def handler(payload: bytes) -> None:
        if payload == b"start":
            tasks.append(asyncio.create_task(stop()))
        if payload == b"slow":
            may_stop.set()
            await asyncio.sleep(0.3)
        handled.append(payload)

    await client.subscribe("a", handler, 1)
    await client.connect()
    payloads = [b"x"] * 100 + [b"start", b"slow"]  # in one burst, once those have grown
    await asyncio.gather(*(client.publish("a", payload, qos=1) for payload in payloads))
    await until(lambda: bool(tasks))
    await tasks[0]


def test_a_loop_that_ends_in_the_middle_of_a_connect_leaves_nothing_behind(broker: Broker) -> None:
    clients: list[MQTTClient] = []

    async def leave() -> None:
        clients.append(client := MQTTClient(broker.url, "me", **QUICK))
        task = asyncio.create_task(client.connect())
        await asyncio.sleep(0)
        assert not task.done()

    for _ in range(5):
        asyncio.run(leave())
        assert not clients[-1]._engine.life._attempts
        eventually(lambda: not clients[-1]._engine._session.thread.running)


async def test_health_waits_for_room_as_every_publish_does(broker: Broker) -> None:
    async with MQTTClient(broker.url, "me", max_queued=3, enable_health=True, **QUICK) as client:
        await until(lambda: client.stats().queued == 0)
        broker.freeze()
        waiting = [client.submit_event("a", "n", number, qos=1) for number in range(3)]
        saying = asyncio.create_task(client.publish_health(False, "degraded"))
        await asyncio.sleep(0.05)
        assert not saying.done()
        broker.thaw()
        await saying
        await asyncio.gather(*waiting)


async def test_shutdown_ends_the_iteration(broker: Broker) -> None:
    client = MQTTClient(broker.url, "end", **QUICK)
    await client.connect()

    async def consume() -> int:
        return len([message async for message in client.messages("a")])

    task = asyncio.create_task(consume())
    await asyncio.sleep(0.05)
    await client.shutdown()
    assert await asyncio.wait_for(task, 5) == 0


async def test_leaving_messages_of_pahos_face_while_too_much_waits_stops_nobody(broker: Broker) -> None:
    """What was not taken is there for the next who iterates."""
    async with MQTTClient(broker.url, "me", max_pending=5, **QUICK) as client:
        await client.client.subscribe("a", 1)
        async with client.client.messages() as messages:
            for number in range(7):
                await client.publish("a", b"%d" % number, qos=1)
            # One was taken, five fill the box, and the last waits for room in it.
            assert (await anext(messages)).payload == b"0"
            await until(lambda: len(client.client._boxes[0]._messages) == 5 and client.stats().pending == 1)
        async with client.client.messages() as messages, asyncio.timeout(10):
            await client.publish("a", b"7", qos=1)
            assert [(await anext(messages)).payload for _ in range(7)] == [
                b"%d" % number for number in range(1, 8)
            ]
    assert broker.log.count("Received PUBACK from me") == 8


async def test_what_nobody_takes_from_pahos_face_is_dropped_and_counted(broker: Broker) -> None:
    async with MQTTClient(broker.url, "me", max_pending=3, **QUICK) as client:
        await client.client.subscribe("a", 1)
        for number in range(5):
            await client.publish("a", b"%d" % number, qos=1)
        await until(lambda: client.stats().dropped == {"max_pending": 2})
        async with client.client.messages() as messages:
            assert [(await anext(messages)).payload for _ in range(3)] == [b"2", b"3", b"4"]


async def test_shutdown_lets_a_reader_finish_what_it_has(broker: Broker) -> None:
    client = MQTTClient(broker.url, "me", **QUICK)
    await client.connect()
    taken, payloads = asyncio.Event(), []

    async def read() -> None:
        async for message in client.messages("a", 1):
            taken.set()
            await asyncio.sleep(0.2)
            payloads.append(message.payload)

    await client.publish("a", b"0", qos=1, retain=True)
    reading = asyncio.create_task(read())
    await taken.wait()
    await client.publish("a", b"1", qos=1)
    await client.shutdown()
    await reading
    assert payloads == [b"0", b"1"]
    await until(lambda: broker.log.count("Received PUBACK from me") == 2)


def test_what_comes_between_two_loops_is_handled_on_the_second(broker: Broker) -> None:
    """A client that outlived its loop without a shutdown still works on the next."""
    received: list[bytes] = []
    client = MQTTClient(broker.url, "between", **QUICK)

    async def handler(payload: bytes) -> None:
        received.append(payload)

    async def first() -> None:
        await client.subscribe("a", handler, 1)
        await client.connect()

    async def second() -> None:
        await client.publish("a", b"on the second", qos=1)
        await until(lambda: received == [b"between", b"on the second"])
        await client.shutdown()

    asyncio.run(first())
    with SyncClient(broker.url, "other") as other:
        other.publish("a", b"between", qos=1)
        eventually(lambda: client.stats().messages_in)
    asyncio.run(second())


async def test_what_belongs_to_another_loop_says_so_and_remembers_nothing(broker: Broker) -> None:
    client = MQTTClient(broker.url, "mine", **QUICK)
    await client.connect()
    broker.freeze()
    receipt = client.submit_event("a", "n", None, qos=1)

    async def elsewhere() -> None:
        with pytest.raises(RuntimeError, match="another event loop"):
            await receipt
        with pytest.raises(RuntimeError, match="another event loop"):
            await client.subscribe("a", print)

    await asyncio.to_thread(asyncio.run, elsewhere())
    broker.thaw()
    await receipt
    await client.shutdown()
    assert "SUBSCRIBE" not in broker.log


async def test_a_shutdown_ends_a_connect_that_was_begun_before_it(broker: Broker, monkeypatch) -> None:
    """Though its thread be late."""
    client = MQTTClient(broker.url, "late", **QUICK)
    life = client._engine.life
    begin = life.begin

    def late(*args: Any) -> Any:
        time.sleep(0.2)
        return begin(*args)

    monkeypatch.setattr(life, "begin", late)
    connecting = asyncio.create_task(client.connect())
    await asyncio.sleep(0)
    await client.shutdown()
    with pytest.raises(ClosedError):
        await connecting
    assert client.state is not ConnectionState.CONNECTED
    assert not life._session.thread.running


async def test_a_reader_and_the_shutdown_of_a_handler_do_not_wait_for_each_other(broker: Broker) -> None:
    """Who leaves the block reads no more."""
    async with MQTTClient(broker.url, "me", **QUICK) as client:
        incoming = client.messages("data", 1)

        async def end(payload: bytes) -> None:
            await client.shutdown(timeout=30)

        await client.subscribe("end", end)
        await incoming.__aenter__()  # and is not left
        for number in range(5):
            await client.publish("data", b"%d" % number, qos=1)
        assert (await anext(incoming)).payload == b"0"
        await client.publish("end", b"", qos=1)
        await client._until(lambda state: state is not ConnectionState.CONNECTED)
        started = time.monotonic()
    assert time.monotonic() - started < 15
    assert client.state is ConnectionState.CLOSED


async def test_a_time_that_is_none_leaves_run_alone(broker: Broker) -> None:
    client = MQTTClient(broker.url, "me", **QUICK)
    serving = asyncio.create_task(client.run())
    await client.wait_connected(10)
    with pytest.raises(ValueError, match="timeout"):
        await client.shutdown(timeout=-1)
    await asyncio.sleep(0.1)
    assert client.connected
    await client.shutdown()
    await serving


async def test_run_ends_its_own_life_and_not_the_next(broker: Broker, monkeypatch) -> None:
    """Somebody may connect as soon as the one is over, even before `run` hears that it was connected."""
    client = MQTTClient(broker.url, "me", **QUICK)
    await_asides, connected = client._await_asides, asyncio.Event()
    begin = client._engine.life.begin

    def slow_to_return(*args: Any) -> Any:
        attempt = begin(*args)
        time.sleep(0.3)
        return attempt

    async def late(hurried: asyncio.Event) -> None:
        await await_asides(hurried)
        await connected.wait()

    monkeypatch.setattr(client, "_await_asides", late)
    monkeypatch.setattr(client._engine.life, "begin", slow_to_return)
    serving = asyncio.create_task(client.run())
    await client.wait_connected(10)
    monkeypatch.setattr(client._engine.life, "begin", begin)
    await client.shutdown()
    await client.connect()
    connected.set()
    await serving
    assert client.connected
    await client.shutdown()
